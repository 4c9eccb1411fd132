"""The state of a run, from its folder alone; a copied, truncated or half-written folder yields what it contains."""

from __future__ import annotations

import math
import shutil
import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megastar.config.files import read_yaml
from megastar.config.load import config_from_dict
from megastar.config.schema import RunConfig, TrainConfig
from megastar.errors import UserError
from megastar.run_dir import checkpoint_dir, evaluations, events, tokenizer_run, training_checks
from megastar.run_dir.jsonl import read_jsonl
from megastar.run_dir.layout import CHECKPOINTS, CONFIG, EVALUATING, HEARTBEATS, MANIFEST, METRICS
from megastar.run_dir.lease import read_holder
from megastar.utils.clock import duration
from megastar.utils.files import read_lines
from megastar.utils.json_file import integer, record, shown, text, validator

RECENT = 20  # rows of metrics whose median is the run's speed
STARTING = 900.0  # seconds without a row that a start may take: imports, engines, the first steps
MIN_SILENCE = 120.0  # seconds without a row before a run counts as stopped, however fast its steps are
MAX_WAIT = 0.1  # share of a step that may be spent on waiting for data
MAX_SECONDS = 1e9  # of a step
_HEARTBEAT = validator(
    record({"time": text(100)}, {"rank": integer(), "host": text(1000), "phase": text(1000), "step": integer()})
)
MIN_SPEED = 0.7  # of the median throughput


@dataclass(frozen=True)
class Status:
    """What ``megastar status`` shows; None and empty where the folder does not contain it. Times in seconds."""

    run: str
    state: str  # running, starting, stopped, finished, new
    why: str
    step: int = 0
    steps: int | None = None
    loss: float | None = None
    val_loss: float | None = None
    val_step: int | None = None
    validation: str = ""  # of a tokenizer: its scores in a sentence
    evaluation: str = ""  # scores of samples while the run trained
    epochs_to: dict[str, float | None] = field(default_factory=dict)  # eval.thresholds: the first epoch at or below
    images_per_s: float | None = None
    step_s: float | None = None
    data_wait_s: float | None = None
    last_sign_s: float | None = None  # age of the newest row or event
    holder: str = ""  # the process that holds the run folder, and its last heartbeat
    ranks: str = ""  # their heartbeats: the age of the newest, and the rank of the oldest
    left_s: float | None = None
    checkpoint: str = ""
    checkpoint_step: int | None = None
    checkpoint_age_s: float | None = None
    checkpoint_problem: str = ""
    saving: bool = False
    upload: str = ""
    restarts: list[str] = field(default_factory=list)  # the reason of each
    mesh: list[str] = field(default_factory=list)  # changes of the ranks or nodes, of elastic runs and between starts
    excluded: list[str] = field(default_factory=list)  # hosts that the batch script excludes
    health: list[str] = field(default_factory=list)


def status_of(run: Path, now: float | None = None) -> Status:
    """Read ``run``. ``now``: seconds since 1970. Raises ``UserError`` where ``run`` is not a run folder."""
    now = time.time() if now is None else now
    if not run.is_dir():
        raise UserError(f"{run} is not a folder: name a run folder, the `run` of its configuration")
    path = run / CONFIG
    if not path.is_file():
        raise UserError(f"{run} is not a run folder: it contains no {CONFIG}; name the `run` of a configuration")
    past = events.read_events(run)
    cfg: RunConfig | None = None
    try:
        fields = read_yaml(path, lenient=True)
        if tokenizer_run.is_tokenizer_run(fields):
            train = tokenizer_run.as_train(fields)
        else:
            cfg = config_from_dict(fields)
            train = cfg.train
    except UserError as error:
        problem = " ".join(str(error).split())
        raise UserError(f"{path} cannot be used ({problem}): restore the file that the run wrote") from error
    if cfg is not None:
        rows, scores = training_checks.read_rows(run), ""
        checkpoint, manifest = read_checkpoint(run, now)
    else:
        rows = tokenizer_run.read_rows(run)
        scores = tokenizer_run.describe_scores(rows)
        checkpoint, manifest = tokenizer_run.read_state(run, past, now), {}
    status = Status(
        str(run),
        "new",
        "nothing was trained yet",
        steps=total_of(train, past, manifest),
        last_sign_s=last_sign(run, now),
        holder=describe_holder(run, now),
        ranks=describe_heartbeats(run, now),
        validation=scores,
        upload=describe_upload(train, past),
        restarts=restart_reasons(past),
        mesh=[f"{e['time']} at step {e.get('step')}: {e.get('text')}" for e in past if e["event"] == "mesh_changed"],
        excluded=excluded_hosts(run),
        **read_metrics(rows),
        **checkpoint,
    )
    status = replace(status, step=max(status.step, status.checkpoint_step or 0))
    if cfg is not None:
        scored, progress = evaluations.read_evaluations(run, status.step), evaluations.read_progress(run)
        reached = evaluations.epochs_to(scored, cfg.eval.thresholds) if scored else {}
        status = replace(
            status,
            evaluation=evaluations.describe_evaluations(scored, cfg.eval.thresholds, progress),
            epochs_to={f"{k:g}": finite(epoch) for k, epoch in reached.items()},
        )
    state, why = find_state(status, train, run, past)
    status = replace(status, state=state, why=why)
    if status.steps and status.step_s and state in ("running", "starting"):
        status = replace(status, left_s=max(0, status.steps - status.step) * status.step_s)
    health = [
        *health_of_rows(rows),
        *(health_of_method(cfg, status.steps, rows, past) if cfg is not None else ()),
        *health_of_checkpoint(status, train),
        *health_of_disk(status, run, manifest),
        *health_of_restarts(past),
        *(f"since step {e.get('step')}: {e.get('text')}" for e in events.open_situations(past)),
    ]
    return replace(status, health=health)


def number(value: Any) -> float | None:
    """A number of a row; non-finite ones are stored as words."""
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def finite(value: Any) -> float | None:
    """A finite number of a row."""
    found = number(value)
    return found if found is not None and math.isfinite(found) else None


def last(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next((r for r in reversed(rows) if name in r), {})


def read_metrics(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The fields of ``Status`` that metrics.jsonl contains."""
    steps = [r for r in rows if "step_s" in r]
    validated = last(rows, "val_loss_ar")
    seconds = [s for r in steps[-RECENT:] if (s := finite(r["step_s"])) and 0 < s < MAX_SECONDS]
    return {
        "step": max((r["step"] for r in rows), default=0),
        "loss": number(last(rows, "loss").get("loss")),
        "val_loss": number(validated.get("val_loss_ar")),
        "val_step": validated.get("step"),
        "images_per_s": finite(last(steps, "images_per_s").get("images_per_s")),
        "data_wait_s": finite(last(steps, "data_wait_s").get("data_wait_s")),
        "step_s": statistics.median(seconds) if seconds else None,
    }


def read_checkpoint(run: Path, now: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of ``Status`` about the newest complete checkpoint, and its manifest."""
    folder = run / CHECKPOINTS
    fields: dict[str, Any] = {"saving": (folder / checkpoint_dir.WRITING).is_dir()}
    manifest: dict[str, Any] = {}
    try:
        if folder.is_dir() and (found := checkpoint_dir.latest(folder)):
            fields |= {"checkpoint": found.name, "checkpoint_step": checkpoint_dir.step_in(found)}
            fields["checkpoint_age_s"] = max(0.0, now - (found / MANIFEST).stat().st_mtime)
            manifest = checkpoint_dir.read_manifest(found)
    except (UserError, OSError) as error:
        fields["checkpoint_problem"] = " ".join(str(error).split())
    return fields, manifest


def total_of(train: TrainConfig, past: list[dict[str, Any]], manifest: dict[str, Any]) -> int | None:
    """Steps of the whole run: from the configuration, or as the run computed them from its number of samples."""
    recorded = [e["steps"] for e in past if e.get("steps") is not None]
    return train.steps or (recorded[-1] if recorded else manifest.get("steps"))


def last_sign(run: Path, now: float) -> float | None:
    """The age of the newest row or event, in seconds."""
    times = [p.stat().st_mtime for p in (run / METRICS, run / events.NAME, run / EVALUATING) if p.is_file()]
    return max(0.0, now - max(times)) if times else None


def find_state(status: Status, train: TrainConfig, run: Path, past: list[dict[str, Any]]) -> tuple[str, str]:
    """The state and its reason. Only files are read, so a run counts as stopped once it was silent for too long."""
    end = past[-1] if past else {}
    if status.steps and status.checkpoint_step is not None and status.checkpoint_step >= status.steps:
        failed = f", but {status.upload}" if events.NOT_UPLOADED in status.upload else ""
        return "finished", f"all {status.steps} steps are done and saved{failed}"
    if end.get("event") in events.ENDED:
        return "stopped", str(end.get("text", ""))
    if status.last_sign_s is None:
        return status.state, status.why
    began = max((events.seconds_of(e) for e in past if e["event"] in events.STARTED), default=0.0)
    row = run / METRICS
    # The writer opens (and cuts) metrics.jsonl just before it records the start.
    rows_since = row.is_file() and row.stat().st_mtime > began + 1.0
    due = train.log_every * status.step_s if status.step_s else 0.0
    starting = bool(began) and not rows_since
    if status.last_sign_s <= max(STARTING if starting or not due else MIN_SILENCE, 5 * due):
        return "starting" if starting else "running", f"last sign {duration(status.last_sign_s)} ago"
    rate = f", a row is due every {duration(due)}" if due else ""
    return "stopped", f"no sign for {duration(status.last_sign_s)}{rate}: it was killed, or it hangs"


def describe_heartbeats(run: Path, now: float) -> str:
    """The ranks' last heartbeats (engine/fault_tolerance/watchdog.py) in a sentence; empty without any."""
    beats = []
    for path in sorted((run / HEARTBEATS).glob("rank-*.json")):
        for beat in read_jsonl(path, _HEARTBEAT, 1 << 16)[:1]:
            if seconds := events.seconds_of(beat):
                beats.append((max(0.0, now - seconds), beat))
    if not beats:
        return ""
    (youngest, _), (age, oldest) = min(beats, key=lambda b: b[0]), max(beats, key=lambda b: b[0])
    rank, host, phase, step = (oldest.get(name) for name in ("rank", "host", "phase", "step"))
    where = f'rank {rank} on {host}, at "{phase}" of step {step}'
    return f"{len(beats)} rank(s), last heartbeat {duration(youngest)} ago; the oldest {duration(age)} ago: {where}"


def describe_holder(run: Path, now: float) -> str:
    """The process that holds the run folder (run_dir/lease.py); empty if no process holds it."""
    if (found := read_holder(run)) is None:
        return ""
    holder, renewed = found
    return f"{holder}, last heartbeat {duration(max(0.0, now - renewed))} ago"


def restart_reasons(past: list[dict[str, Any]]) -> list[str]:
    """Why and when the run was resumed."""
    reasons = []
    for before, event in zip([{}, *past], past, strict=False):
        if event["event"] != "resumed":
            continue
        kind = before.get("event")
        why = str(before.get("text", "")) if kind in events.ENDED else "no end was recorded (killed)"
        reasons.append(f"{event['time']} at step {event.get('step')} on {event.get('host')}: {why}")
    return reasons


def excluded_hosts(run: Path) -> list[str]:
    """Hosts that slurm/bad_hosts.sh excluded at the last requeue and that nobody has readmitted since."""
    bad = {words[2] for line in read_lines(run / "bad_hosts.log") if len(words := line.split()) > 2}
    requeues = read_lines(run / "requeues.log")
    hosts = requeues[-1].partition(", excluding ")[2].split(",")[0].split() if requeues else []
    return [host for host in hosts if host in bad]


def describe_upload(train: TrainConfig, past: list[dict[str, Any]]) -> str:
    if not train.upload:
        return ""
    uploads = [e for e in past if e.get("situation") == "upload"]
    saved = max((e.get("step", 0) for e in past if e["event"] == "saved"), default=0)
    if uploads and not uploads[-1].get("over") and uploads[-1].get("step", 0) >= saved:
        return str(uploads[-1].get("text", ""))
    return f"to {train.upload}; no failure recorded"


# Health ----------------------------------------------------------------------------------------------------------
def health_of_rows(rows: list[dict[str, Any]]) -> list[str]:
    """Problems in the newest rows."""
    found = []
    newest = rows[-1]["step"] if rows else 0
    for name in ("loss", "grad_norm", "val_loss_ar"):
        row = last(rows, name)
        value = number(row.get(name))
        if row and (value is None or not math.isfinite(value)):
            found.append(
                f"{name} is {shown(row[name])} at step {row['step']}: resume from an earlier checkpoint, lower optim.lr"
            )
    steps = [r for r in rows if finite(r.get("step_s")) and finite(r.get("images_per_s"))][-RECENT:]
    waits = [(finite(r.get("data_wait_s")), finite(r["step_s"])) for r in steps[-5:]]
    shares = [w / s for w, s in waits if w is not None and s]
    if shares and (share := statistics.median(shares)) > MAX_WAIT:
        found.append(
            f"{share:.0%} of a step is spent on waiting for data: see docs/loader.md, and megastar doctor for disk and S3"
        )
    rates = [finite(r["images_per_s"]) or 0.0 for r in steps]
    if len(rates) >= 5 and rates[-1] < MIN_SPEED * (median := statistics.median(rates[:-1])):
        found.append(
            f"throughput fell to {rates[-1]:.3g} images/s at step {newest}, its median was {median:.3g}: "
            "look for a slow node with srun megastar doctor"
        )
    return found


def health_of_method(
    cfg: RunConfig, steps: int | None, rows: list[dict[str, Any]], past: list[dict[str, Any]]
) -> list[str]:
    """The warnings of the run itself that still hold, by the same checks on the newest rows."""
    ranks = [e["ranks"] for e in past if e["event"] in events.STARTED and isinstance(e.get("ranks"), int)]
    try:
        images = training_checks.contrastive_images(cfg, ranks[-1] if ranks else cfg.parallel.tensor_parallel)
    except UserError:  # started with another split than the configuration's
        images = cfg.train.global_batch
    return [
        *training_checks.problems_at_start(cfg, images, steps or 0).values(),
        *training_checks.find_problems(cfg, images, rows).values(),
    ]


def health_of_checkpoint(status: Status, train: TrainConfig) -> list[str]:
    if status.checkpoint_problem:
        return [f"the last checkpoint is damaged: {status.checkpoint_problem}"]
    unsaved = status.step - (status.checkpoint_step or 0)
    if unsaved > 2 * train.save_every:
        return [f"{unsaved} steps are unsaved, a save is due every {train.save_every}: see the log, and the free space"]
    return []


def health_of_disk(status: Status, run: Path, manifest: dict[str, Any]) -> list[str]:
    """On a full disk the run itself cannot record this."""
    size = sum(entry["bytes"] for entry in manifest["files"].values()) if manifest else 0
    if status.state not in ("running", "starting") or not size:
        return []
    try:
        free = shutil.disk_usage(run).free
    except OSError as error:
        return [f"the free space of {run} cannot be determined ({error.strerror})"]
    if free >= size:
        return []
    return [f"{run} has {free / 2**20:.0f} MiB free, the next checkpoint takes {size / 2**20:.0f} MiB: free some space"]


def health_of_restarts(past: list[dict[str, Any]]) -> list[str]:
    """Repeated starts at one step: the run makes no progress."""
    steps = [e.get("step") for e in past if e["event"] in events.STARTED]
    alike = next((n for n, step in enumerate(reversed(steps)) if step != steps[-1]), len(steps))
    if alike >= 3 and past[-1]["event"] != "finished":
        return [f"the last {alike} starts were all at step {steps[-1]}: it fails before it saves; see the log"]
    return []
