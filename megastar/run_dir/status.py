"""Where a run is, from its folder alone: a folder that is copied, cut off or half written tells what it can."""

from __future__ import annotations

import math
import shutil
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megastar.config.files import read_yaml
from megastar.config.load import config_from_dict
from megastar.config.schema import RunConfig
from megastar.errors import UserError
from megastar.run_dir import checkpoint_dir, events, training_checks
from megastar.run_dir.jsonl import read_jsonl
from megastar.run_dir.layout import HEARTBEATS

RECENT = 20  # rows of metrics whose median is the run's speed
STARTING = 900.0  # seconds without a row that a start may take: imports, engines, the first steps
LEAST = 120.0  # seconds without a row before a run is taken for stopped, however fast its steps are
WAITS = 0.1  # share of a step that may be spent on waiting for data
SLOWER = 0.7  # of the median throughput


@dataclass
class Status:
    """What ``megastar status`` shows; None and empty: the folder does not say. Times in seconds."""

    run: str
    state: str  # running, starting, stopped, finished, new
    why: str
    step: int = 0
    steps: int | None = None
    loss: float | None = None
    val_loss: float | None = None
    val_step: int | None = None
    images_per_s: float | None = None
    step_s: float | None = None
    data_wait_s: float | None = None
    last_sign_s: float | None = None  # age of the newest row or event
    ranks: str = ""  # their heartbeats: how old the newest is, and whose is the oldest
    left_s: float | None = None
    checkpoint: str = ""
    checkpoint_step: int | None = None
    checkpoint_age_s: float | None = None
    checkpoint_problem: str = ""
    saving: bool = False
    upload: str = ""
    restarts: list[str] = field(default_factory=list)  # why each was needed
    excluded: list[str] = field(default_factory=list)  # hosts that the batch script keeps the run away from
    health: list[str] = field(default_factory=list)


def status_of(run: Path, now: float | None = None) -> Status:
    """Read ``run``. ``now``: seconds since 1970. Raises ``UserError`` for what is no run folder, in one sentence."""
    now = time.time() if now is None else now
    if not run.is_dir():
        raise UserError(f"{run} is no folder: name a run folder, the `run` of its configuration")
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run} is no run folder: it holds no config.yaml; name the `run` of a configuration")
    try:
        cfg = config_from_dict(read_yaml(path))
    except UserError as error:
        first = " ".join(str(error).split())
        raise UserError(
            f"{path} cannot be used ({first}): restore it; a `megastar train` command of this run wrote it"
        ) from error
    rows = [r for r in training_checks.read_rows(run) if isinstance(r.get("step"), int)]
    happened = events.read_events(run)
    status = Status(str(run), "new", "")
    read_rows(status, rows)
    about = read_checkpoint(status, run, now)
    status.steps = total_of(cfg, happened, about)
    find_state(status, cfg, run, happened, now)
    status.ranks = heartbeats_of(run, now)
    if status.steps and status.step_s and status.state in ("running", "starting"):
        status.left_s = max(0, status.steps - status.step) * status.step_s
    status.restarts = restarts_of(happened)
    status.excluded = excluded_of(run)
    status.upload = upload_of(cfg, happened)
    status.health = [
        *health_of_rows(rows),
        *health_of_method(cfg, status.steps, rows, happened),
        *health_of_checkpoint(status, cfg),
        *health_of_disk(status, run, about),
        *health_of_restarts(happened),
        *(f"since step {e.get('step')}: {e.get('text')}" for e in events.open_situations(happened)),
    ]
    return status


def number(value: Any) -> float | None:
    """A number of a row; those that are not finite were written as words."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def last(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next((r for r in reversed(rows) if name in r), {})


def read_rows(status: Status, rows: list[dict[str, Any]]) -> None:
    steps = [r for r in rows if "step_s" in r]
    status.step = max((r["step"] for r in rows), default=0)
    status.loss = number(last(rows, "loss").get("loss"))
    validated = last(rows, "val_loss_ar")
    status.val_loss, status.val_step = number(validated.get("val_loss_ar")), validated.get("step")
    status.images_per_s = number(last(steps, "images_per_s").get("images_per_s"))
    status.data_wait_s = number(last(steps, "data_wait_s").get("data_wait_s"))
    seconds = [s for r in steps[-RECENT:] if (s := number(r["step_s"]))]
    status.step_s = statistics.median(seconds) if seconds else None


def read_checkpoint(status: Status, run: Path, now: float) -> dict[str, Any]:
    """The newest complete checkpoint; returns its manifest, or nothing."""
    folder = run / "checkpoints"
    if not folder.is_dir():
        return {}
    status.saving = (folder / checkpoint_dir.WRITING).is_dir()
    try:
        found = checkpoint_dir.latest(folder)
        if found is None:
            return {}
        status.checkpoint, status.checkpoint_step = found.name, checkpoint_dir.step_in(found)
        status.checkpoint_age_s = max(0.0, now - (found / checkpoint_dir.MANIFEST).stat().st_mtime)
        status.step = max(status.step, status.checkpoint_step)
        return checkpoint_dir.read_manifest(found)
    except (UserError, OSError, ValueError, KeyError, TypeError) as error:
        status.checkpoint_problem = " ".join(str(error).split())
        return {}


def total_of(cfg: RunConfig, happened: list[dict[str, Any]], about: dict[str, Any]) -> int | None:
    """Steps of the whole run: the configuration's, else what the run found when it counted its samples."""
    told = [e["steps"] for e in happened if isinstance(e.get("steps"), int)]
    return cfg.train.steps or (told[-1] if told else about.get("steps"))


def find_state(status: Status, cfg: RunConfig, run: Path, happened: list[dict[str, Any]], now: float) -> None:
    """Running or not. Nothing but files is asked, so a run is taken for stopped when it has been silent too long."""
    signs = [p.stat().st_mtime for p in (run / "metrics.jsonl", run / events.NAME) if p.is_file()]
    status.last_sign_s = max(0.0, now - max(signs)) if signs else None
    end = happened[-1] if happened else {}
    if status.steps and status.checkpoint_step is not None and status.checkpoint_step >= status.steps:
        status.state, status.why = "finished", f"all {status.steps} steps are done and saved"
    elif end.get("event") in events.ENDED:
        status.state, status.why = "stopped", str(end.get("text", ""))
    elif status.last_sign_s is None:
        status.why = "nothing was trained yet"
    else:
        began = max((events.seconds_of(e) for e in happened if e["event"] in events.STARTED), default=0.0)
        row = run / "metrics.jsonl"
        # The writer opens (and cuts) metrics.jsonl just before it says that it started.
        rows_since = row.is_file() and row.stat().st_mtime > began + 1.0
        due = cfg.train.log_every * status.step_s if status.step_s else 0.0
        starting = bool(began) and not rows_since
        patience = max(STARTING if starting or not due else LEAST, 5 * due)
        silent = f"no sign for {duration(status.last_sign_s)}"
        if status.last_sign_s <= patience:
            status.state = "starting" if starting else "running"
            status.why = f"last sign {duration(status.last_sign_s)} ago"
        else:
            status.state = "stopped"
            status.why = f"{silent}, a row is due every {duration(due)}" if due else silent
            status.why += ": it was killed, or it hangs"


def heartbeats_of(run: Path, now: float) -> str:
    """The ranks' last signs of life (engine/watchdog.py), in a sentence; nothing where there are none."""
    beats = []
    for path in sorted((run / HEARTBEATS).glob("rank-*.json")):
        said = read_jsonl(path)
        if said and events.seconds_of(said[0]):
            beats.append((max(0.0, now - events.seconds_of(said[0])), said[0]))
    if not beats:
        return ""
    (youngest, _), (age, oldest) = min(beats, key=lambda b: b[0]), max(beats, key=lambda b: b[0])
    where = (
        f'rank {oldest.get("rank")} on {oldest.get("host")}, at "{oldest.get("phase")}" of step {oldest.get("step")}'
    )
    return f"{len(beats)} rank(s), last sign {duration(youngest)} ago; the oldest {duration(age)} ago: {where}"


def restarts_of(happened: list[dict[str, Any]]) -> list[str]:
    """Why each resumption was needed, and when."""
    found = []
    for before, event in zip([{}, *happened], happened, strict=False):
        if event["event"] != "resumed":
            continue
        kind = before.get("event")
        why = str(before.get("text", "")) if kind in events.ENDED else "it ended without a word (killed)"
        found.append(f"{event['time']} at step {event.get('step')} on {event.get('host')}: {why}")
    return found


def excluded_of(run: Path) -> list[str]:
    """Hosts that slurm/bad_hosts.sh excluded at the last requeue, without those that a person has forgiven since."""
    bad = {words[2] for line in lines_of(run / "bad_hosts.log") if len(words := line.split()) > 2}
    requeues = lines_of(run / "requeues.log")
    named = requeues[-1].partition(", excluding ")[2].split(",")[0].split() if requeues else []
    return [host for host in named if host in bad]


def lines_of(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines() if path.is_file() else []


def upload_of(cfg: RunConfig, happened: list[dict[str, Any]]) -> str:
    if not cfg.train.upload:
        return ""
    told = [e for e in happened if e.get("situation") == "upload"]
    saved = max((e.get("step", 0) for e in happened if e["event"] == "saved"), default=0)
    if told and not told[-1].get("over") and told[-1].get("step", 0) >= saved:
        return str(told[-1]["text"])
    return f"to {cfg.train.upload}; no failure on record"


# Health ----------------------------------------------------------------------------------------------------------
def health_of_rows(rows: list[dict[str, Any]]) -> list[str]:
    """Sentences about what looks wrong in the newest rows."""
    found = []
    newest = rows[-1]["step"] if rows else 0
    for name in ("loss", "grad_norm", "val_loss_ar"):
        row = last(rows, name)
        value = number(row.get(name))
        if row and (value is None or not math.isfinite(value)):
            found.append(
                f"{name} is {row[name]} at step {row['step']}: resume from an earlier checkpoint, lower optim.lr"
            )
    steps = [r for r in rows if number(r.get("step_s")) and number(r.get("images_per_s"))][-RECENT:]
    waits = [(number(r.get("data_wait_s")), number(r["step_s"])) for r in steps[-5:]]
    shares = [w / s for w, s in waits if w is not None and s]
    if shares and (share := statistics.median(shares)) > WAITS:
        found.append(
            f"{share:.0%} of a step is spent on waiting for data: see megastar doctor for the disk and S3, docs/loader.md"
        )
    rates = [number(r["images_per_s"]) or 0.0 for r in steps]
    if len(rates) >= 5 and rates[-1] < SLOWER * (median := statistics.median(rates[:-1])):
        found.append(
            f"throughput fell to {rates[-1]:.3g} images/s at step {newest}, its median was {median:.3g}: "
            "look for a slow node with srun megastar doctor"
        )
    return found


def health_of_method(
    cfg: RunConfig, steps: int | None, rows: list[dict[str, Any]], happened: list[dict[str, Any]]
) -> list[str]:
    """What the run itself warns of, asked of the same rows again: of warnings only those that still hold."""
    ranks = [e["ranks"] for e in happened if e["event"] in events.STARTED and isinstance(e.get("ranks"), int)]
    try:
        images = training_checks.contrastive_images(cfg, ranks[-1] if ranks else cfg.parallel.tensor_parallel)
    except UserError:  # started on another split than the configuration's
        images = cfg.train.global_batch
    return [
        *training_checks.problems_at_start(cfg, images, steps or 0).values(),
        *training_checks.find_problems(cfg, images, rows).values(),
    ]


def health_of_checkpoint(status: Status, cfg: RunConfig) -> list[str]:
    if status.checkpoint_problem:
        return [f"the last checkpoint is not whole: {status.checkpoint_problem}"]
    lost = status.step - (status.checkpoint_step or 0)
    if lost > 2 * cfg.train.save_every:
        return [
            f"{lost} steps are in no checkpoint, one is due every {cfg.train.save_every}: see the log, and the free space"
        ]
    return []


def health_of_disk(status: Status, run: Path, about: dict[str, Any]) -> list[str]:
    """A full disk keeps the run from saying so itself."""
    size = sum(entry["bytes"] for entry in about["files"].values()) if about else 0
    if status.state not in ("running", "starting") or not size:
        return []
    try:
        free = shutil.disk_usage(run).free
    except OSError as error:
        return [f"the disk of {run} cannot be asked for its free space ({error.strerror})"]
    if free >= size:
        return []
    return [f"{run} has {free / 2**20:.0f} MiB free, the next checkpoint takes {size / 2**20:.0f} MiB: free some space"]


def health_of_restarts(happened: list[dict[str, Any]]) -> list[str]:
    """A run that starts again and again at one step gets nowhere."""
    steps = [e.get("step") for e in happened if e["event"] in events.STARTED]
    alike = 0
    for step in reversed(steps):
        if step != steps[-1]:
            break
        alike += 1
    ended = bool(happened) and happened[-1]["event"] == "finished"
    if alike >= 3 and not ended:
        return [f"the last {alike} starts were all at step {steps[-1]}: it fails before it saves; see the log"]
    return []


def duration(seconds: float) -> str:
    """ "40 s", "3 min 5 s", "2 h 10 min", "3 d 4 h"."""
    if seconds < 1:
        return f"{seconds:.1g} s"
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    whole = round(seconds)
    parts: list[tuple[int, str]] = []
    for name, size in units:
        if whole >= size or parts:
            parts.append((whole // size, name))
            whole %= size
    return " ".join(f"{n} {name}" for n, name in parts[:2] if n)
