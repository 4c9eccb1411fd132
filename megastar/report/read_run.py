"""What ``megastar report`` reads from a run folder, complete or not."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megastar.config.env_text import recorded
from megastar.config.files import read_yaml
from megastar.config.load import config_from_dict, resolve_batch
from megastar.config.schema import RunConfig
from megastar.errors import UserError
from megastar.report.page import ReportRun
from megastar.report.series import Column, best, read_columns, training_hours
from megastar.run_dir import checkpoint_dir
from megastar.run_dir.events import NAME as EVENTS
from megastar.run_dir.events import STARTED, read_events
from megastar.run_dir.layout import CHECKPOINTS, CONFIG, METRICS
from megastar.run_dir.status import Status, status_of
from megastar.run_dir.tokenizer_run import is_tokenizer_run
from megastar.run_dir.training_checks import compares_one_pass
from megastar.utils.clock import duration
from megastar.utils.files import read_lines

MAX_CONFIG = 200_000  # characters of a configuration that are shown
MAX_WARNINGS = 20
TOKENIZER_SCORES = {  # of the newest validation
    "psnr": ("PSNR", "{:.2f} dB"),
    "ssim": ("SSIM", "{:.4f}"),
    "rFID": ("rFID", "{:.3f}"),
    "rFD-EffLite0": ("rFD-EffLite0", "{:.3f}"),
    "codes_used": ("codes used", "{:.1%}"),
}


def find_runs(source: Path) -> list[Path]:
    """A run folder itself, or the runs of a comparison's folder (``runs/*``). Raises ``UserError``."""
    if not source.is_dir():
        raise UserError(f"{source} is not a folder: name a run folder, the `run` of its configuration")
    if is_run(source):
        return [source]
    below = sorted(p for p in (source / "runs").glob("*") if p.is_dir() and is_run(p))
    if not below:
        raise UserError(
            f"{source} is not a run folder: it contains neither {CONFIG} nor {METRICS}, and no runs/*; name the `run` of a "
            "configuration"
        )
    return below


def is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (CONFIG, METRICS, EVENTS))


def run_names(paths: list[Path], given: str | None) -> list[str]:
    """A unique name for each run: the given ones (comma-separated), or the shortest unique ends of the paths."""
    if given is not None:
        names = [n.strip() for n in given.split(",")]
        if len(names) != len(paths) or len(set(names)) != len(names) or not all(names):
            raise UserError(f"--names {given}: give {len(paths)} different names for {len(paths)} runs")
        return names
    whole = [p.resolve().parts for p in paths]
    if len(set(whole)) != len(whole):
        raise UserError("a run is named twice: name each run once")
    for count in range(1, max(map(len, whole))):
        names = ["/".join(parts[-count:]) for parts in whole]
        if len(set(names)) == len(names):
            return names
    return ["/".join(parts) for parts in whole]


def read_config(folder: Path) -> tuple[RunConfig | None, dict[str, Any] | None, str]:
    """The configuration of a run, its fields (an invalid one has some too), and its problem or "". That of a tokenizer's
    training has fields only."""
    path = folder / CONFIG
    if not path.is_file():
        return None, None, f"{path} is missing"
    try:
        fields = read_yaml(path, lenient=True)
    except UserError as error:
        return None, None, str(error)
    if is_tokenizer_run(fields):
        return None, recorded(fields), ""
    try:
        cfg = config_from_dict(dict(fields))
    except UserError as error:
        return None, recorded(fields), " ".join(str(error).split())
    return cfg, recorded(asdict(cfg)), ""


def read_run(folder: Path, name: str) -> tuple[ReportRun, RunConfig | None]:
    """All but samples and attention, and the configuration if it is valid."""
    cfg, fields, problem = read_config(folder)
    run = ReportRun(name, config=fields, events=read_events(folder))
    try:
        run.columns = read_columns(folder / METRICS)
    except (OSError, UserError) as error:
        run.notes.append(f"metrics: {error}")
    if problem:
        run.notes.append(f"configuration: {problem}")
    status = None
    with suppress(UserError):  # an invalid configuration, already in the notes
        status = status_of(folder)
    if status is not None:
        run.state, run.why, run.health = status.state, status.why, list(status.health)
    # The last of equal ones.
    warnings = {str(e.get("text")): e.get("step") for e in run.events if e["event"] == "warning"}
    past = [f"step {step}: {text}" for text, step in reversed(warnings.items()) if text not in run.health]
    run.health += past[:MAX_WARNINGS]
    run.config_text = "\n".join(read_lines(folder / CONFIG))[:MAX_CONFIG]
    if cfg is not None:
        run.global_batch, run.chance = cfg.train.global_batch, chance_accuracy(cfg, run.events)
    elif fields and is_tokenizer_run(fields) and isinstance(fields.get("batch"), int):
        run.global_batch = int(fields["batch"])
    run.facts, run.origin = find_facts(run, cfg, status), find_origin(run, status, folder)
    return run, cfg


def chance_accuracy(cfg: RunConfig, events: list[dict[str, Any]]) -> float | None:
    """The contrastive accuracy of guessing: 1 / the images that an anchor is compared with; None if unknown."""
    if not cfg.self_guided.enabled:
        return None
    if not cfg.train.micro_batch or not compares_one_pass(cfg.self_guided):
        return 1 / cfg.train.global_batch
    ranks = [e["ranks"] for e in events if "ranks" in e]
    with suppress(UserError):
        if ranks:
            return resolve_batch(cfg.train, cfg.parallel.tensor_parallel, ranks[-1])[1] / cfg.train.global_batch
    return None


def find_facts(run: ReportRun, cfg: RunConfig | None, status: Status | None) -> list[tuple[str, str]]:
    """The lines of a run's card."""
    step = max([c.steps[-1] for c in run.columns.values()], default=0)
    total = status.steps if status else None
    step = max(step, status.step if status else 0)
    found = [("step", f"{step:,} of {total:,} ({step / total:.0%})" if total else f"{step:,}")]
    if cfg is not None:
        m = cfg.model
        found.append(("objective", cfg.objective))
        size = f"{m.n_layer} blocks, width {m.dim}, {m.image_tokens} tokens, vocabulary of {m.vocab_size}"
        found.append(("network", f"{m.name}: {size}"))
        if cfg.token_order.kind == "random":
            found.append(("tokens", cfg.token_order.text))
    if run.config and is_tokenizer_run(run.config):
        found += tokenizer_facts(run)
    if (lowest := best(run.columns.get("val_loss_ar"))) is not None:
        found.append(("best validation loss", f"{lowest[0]:.4f} at step {lowest[1]:,}"))
    for name, label in (("loss_ar", "last next-token loss"), ("loss", "last loss")):
        if (last := last_finite(run.columns.get(name))) is not None:
            found.append((label, f"{last:.4f}"))
            break
    if status is not None and status.evaluation:
        found.append(("scores while training", "; ".join(status.evaluation.splitlines())))
    if run.global_batch:
        found.append(("images seen", f"{step * run.global_batch:,}"))
    if spent := training_hours(run.columns)["y"]:
        found.append(("training time", duration(3600 * spent[-1])))
    if (speed := last_finite(run.columns.get("images_per_s"))) is not None:
        found.append(("throughput", f"{speed:.4g} images/s"))
    if status is not None:
        if status.left_s is not None:
            found.append(("time left", duration(status.left_s)))
        if status.checkpoint_step is not None:
            found.append(("checkpoint", f"step {status.checkpoint_step:,}"))
        if status.restarts:
            found.append(("restarts", f"{len(status.restarts)}"))
    return found


def tokenizer_facts(run: ReportRun) -> list[tuple[str, str]]:
    """The lines of the card of a tokenizer's training."""
    config = (run.config or {}).get("tokenizer")
    found = []
    if isinstance(config, dict):
        names = ("image_size", "codebook_size", "codebook_embed_dim")
        size, codes, dim = (str(config.get(name, "?"))[:20] for name in names)
        found.append(("tokenizer", f"images of {size} pixels, {codes} codes of {dim} dimensions"))
    for name, (label, form) in TOKENIZER_SCORES.items():
        if (value := last_finite(run.columns.get(name))) is not None:
            found.append((label, form.format(value)))
    return found


def find_origin(run: ReportRun, status: Status | None, folder: Path) -> list[tuple[str, str]]:
    """Command, hosts and versions of the newest start; the command also from the newest checkpoint."""
    found = [("folder", str(folder))]
    starts = [e for e in run.events if e["event"] in STARTED]
    command = next((str(e["command"]) for e in reversed(starts) if e.get("command")), "")
    if not command:
        with suppress(UserError):
            if (newest := checkpoint_dir.latest(folder / CHECKPOINTS)) is not None:
                command = str(checkpoint_dir.parse_manifest(newest).get("command") or "")
    if command:
        found.append(("command", command))
    hosts = list(dict.fromkeys(str(e["host"]) for e in run.events if e.get("host")))
    if hosts:
        ranks = next((f"{e['ranks']} rank(s)" for e in reversed(starts) if "ranks" in e), "")
        device = next((str(e["device"]) for e in reversed(starts) if e.get("device")), "")
        found.append(("hosts", ", ".join(filter(None, [*hosts[-8:], ranks, device]))))
    packages = [e["packages"] for e in starts if "packages" in e]
    if packages and packages[-1]:
        found.append(("packages", ", ".join(f"{k} {v}" for k, v in packages[-1].items())))
    if status is not None and status.restarts:
        found.append(("last restart", status.restarts[-1]))
    return found


def last_finite(column: Column | None) -> float | None:
    """The newest finite value."""
    if column is None:
        return None
    return next((v for v in reversed(column.values) if math.isfinite(v)), None)


def read_provenance(png: Path) -> dict[str, Any]:
    """The metadata that ``megastar sample`` stores in a grid's PNG; empty for other images."""
    from megastar.data.images.image_files import open_image

    with suppress(Exception), open_image(png) as image:  # Pillow raises a dozen types for broken files
        provenance = json.loads(getattr(image, "text", {}).get("megastar", "null"))
        return provenance if isinstance(provenance, dict) else {}
    return {}
