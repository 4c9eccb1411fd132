"""What ``megastar report`` reads from a run folder. A folder that is half written or damaged tells what it can."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megastar.config.files import read_yaml
from megastar.config.load import config_from_dict, resolve_batch
from megastar.config.schema import RunConfig
from megastar.errors import UserError
from megastar.report.page import ReportRun
from megastar.report.series import Column, best, hours, read_columns
from megastar.run_dir import checkpoint_dir
from megastar.run_dir.events import NAME as EVENTS
from megastar.run_dir.events import STARTED, read_events
from megastar.run_dir.status import Status, status_of

METRICS = "metrics.jsonl"
LONGEST = 200_000  # characters of a configuration that are shown
WARNINGS = 20


def expand(source: Path) -> list[Path]:
    """A run folder -> itself; the folder of a comparison -> the runs in its ``runs/``. Raises ``UserError``."""
    if not source.is_dir():
        raise UserError(f"{source} is no folder: name a run folder, the `run` of its configuration")
    if is_run(source):
        return [source]
    below = sorted(p for p in (source / "runs").glob("*") if p.is_dir() and is_run(p))
    if not below:
        raise UserError(
            f"{source} is no run folder: it holds neither config.yaml nor {METRICS}, and no runs/*; name the `run` of a "
            "configuration"
        )
    return below


def is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.yaml", METRICS, EVENTS))


def names_of(paths: list[Path], given: str | None) -> list[str]:
    """A different name for each run: those given, or the ends of the paths, as long as they must be."""
    if given is not None:
        names = [n.strip() for n in given.split(",")]
        if len(names) != len(paths) or len(set(names)) != len(names) or not all(names):
            raise UserError(f"--names {given}: {len(paths)} runs need as many different names")
        return names
    whole = [p.resolve().parts for p in paths]
    if len(set(whole)) != len(whole):
        raise UserError("one run is named twice: name each once")
    for count in range(1, max(map(len, whole))):
        names = ["/".join(parts[-count:]) for parts in whole]
        if len(set(names)) == len(names):
            return names
    return ["/".join(parts) for parts in whole]


def config_of(folder: Path) -> tuple[RunConfig | None, dict[str, Any] | None, str]:
    """The configuration of a run, its fields, and what is wrong with it: an old one still has fields."""
    path = folder / "config.yaml"
    if not path.is_file():
        return None, None, f"{path} is missing"
    try:
        fields = read_yaml(path)
    except UserError as error:
        return None, None, str(error)
    try:
        cfg = config_from_dict(dict(fields))
    except UserError as error:
        return None, fields, " ".join(str(error).split())
    return cfg, asdict(cfg), ""


def read_run(folder: Path, name: str) -> tuple[ReportRun, RunConfig | None]:
    """All but pictures and attention, and the configuration where it can be read."""
    cfg, fields, problem = config_of(folder)
    run = ReportRun(name, config=fields, columns=read_columns(folder / METRICS), events=read_events(folder))
    if problem:
        run.notes.append(f"configuration: {problem}")
    status = None
    with suppress(UserError):  # of the configuration: told above
        status = status_of(folder)
    if status is not None:
        run.state, run.why, run.health = status.state, status.why, list(status.health)
    warnings = {
        str(e.get("text")): e.get("step") for e in run.events if e["event"] == "warning"
    }  # the last of its kind
    told = [f"step {step}: {text}" for text, step in reversed(warnings.items()) if text not in run.health]
    run.health += told[:WARNINGS]
    with suppress(OSError):
        run.config_text = (folder / "config.yaml").read_text(errors="replace")[:LONGEST]
    if cfg is not None:
        run.global_batch, run.chance = cfg.train.global_batch, chance_of(cfg, run.events)
    run.facts, run.origin = facts_of(run, cfg, status), origin_of(run, status, folder)
    return run, cfg


def chance_of(cfg: RunConfig, events: list[dict[str, Any]]) -> float | None:
    """The contrastive accuracy of guessing: one over the images that are compared, those of a pass over all ranks."""
    if not cfg.self_guided.enabled:
        return None
    if not cfg.train.micro_batch:
        return 1 / cfg.train.global_batch
    ranks = [e["ranks"] for e in events if isinstance(e.get("ranks"), int)]
    with suppress(UserError):
        if ranks:
            return resolve_batch(cfg, ranks[-1])[1] / cfg.train.global_batch
    return None


def facts_of(run: ReportRun, cfg: RunConfig | None, status: Status | None) -> list[tuple[str, str]]:
    """The lines of a run's card."""
    step = max([c.steps[-1] for c in run.columns.values()], default=0)
    total = status.steps if status else None
    step = max(step, status.step if status else 0)
    found = [("step", f"{step:,} of {total:,} ({step / total:.0%})" if total else f"{step:,}")]
    if cfg is not None:
        m = cfg.model
        kind = "ST-AR (self-guided)" if cfg.self_guided.enabled else "next token (AR baseline)"
        found.append(("objective", kind))
        found.append(
            ("network", f"{m.name}: {m.n_layer} blocks, width {m.dim}, {m.image_tokens} tokens of {m.vocab_size}")
        )
    if (lowest := best(run.columns.get("val_loss_ar"))) is not None:
        found.append(("best validation loss", f"{lowest[0]:.4f} at step {lowest[1]:,}"))
    for name, label in (("loss_ar", "last next-token loss"), ("loss", "last loss")):
        if (last := ending(run.columns.get(name))) is not None:
            found.append((label, f"{last:.4f}"))
            break
    if run.global_batch:
        found.append(("images seen", f"{step * run.global_batch:,}"))
    if spent := hours(run.columns)["y"]:
        found.append(("time trained", duration(3600 * spent[-1])))
    if (speed := ending(run.columns.get("images_per_s"))) is not None:
        found.append(("speed", f"{speed:.4g} images/s"))
    if status is not None:
        if status.left_s is not None:
            found.append(("time left", duration(status.left_s)))
        if status.checkpoint_step is not None:
            found.append(("checkpoint", f"step {status.checkpoint_step:,}"))
        if status.restarts:
            found.append(("restarts", f"{len(status.restarts)}"))
    return found


def origin_of(run: ReportRun, status: Status | None, folder: Path) -> list[tuple[str, str]]:
    """Command, hosts and versions, as the newest start tells them; the command also as a checkpoint does."""
    found = [("folder", str(folder))]
    starts = [e for e in run.events if e["event"] in STARTED]
    command = next((str(e["command"]) for e in reversed(starts) if e.get("command")), "")
    if not command:
        with suppress(UserError, OSError, ValueError, KeyError, TypeError):
            if (newest := checkpoint_dir.latest(folder / "checkpoints")) is not None:
                command = str(checkpoint_dir.parse_manifest(newest).get("command") or "")
    if command:
        found.append(("command", command))
    hosts = list(dict.fromkeys(str(e["host"]) for e in run.events if e.get("host")))
    if hosts:
        ranks = next((f"{e['ranks']} rank(s)" for e in reversed(starts) if "ranks" in e), "")
        device = next((str(e["device"]) for e in reversed(starts) if e.get("device")), "")
        found.append(("hosts", ", ".join(filter(None, [*hosts[-8:], ranks, device]))))
    packages: dict[str, Any] = next(
        (e["packages"] for e in reversed(starts) if isinstance(e.get("packages"), dict)), {}
    )
    if packages:
        found.append(("packages", ", ".join(f"{k} {v}" for k, v in packages.items())))
    if status is not None and status.restarts:
        found.append(("last restart", status.restarts[-1]))
    return found


def ending(column: Column | None) -> float | None:
    """The newest finite value."""
    if column is None:
        return None
    return next((v for v in reversed(column.values) if math.isfinite(v)), None)


def duration(seconds: float) -> str:
    from megastar.run_dir.status import duration as words

    return words(seconds) if seconds > 0 else "0 s"


def provenance_of(png: Path) -> dict[str, Any]:
    """What a grid's PNG says of itself; nothing for one that is not ours."""
    from PIL import Image

    with suppress(OSError, ValueError, SyntaxError, TypeError), Image.open(png) as image:
        told = json.loads(getattr(image, "text", {}).get("megastar", "null"))
        return told if isinstance(told, dict) else {}
    return {}
