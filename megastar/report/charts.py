"""Which values of metrics.jsonl are drawn, and how; a value that no chart knows gets one of its own."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class ChartLine:
    name: str  # in metrics.jsonl
    label: str = ""  # beside the run's name, where a chart has several lines
    style: str = "line"  # line, dashed, or points


@dataclass(frozen=True)
class Chart:
    title: str
    lines: tuple[ChartLine, ...]
    about: str = ""  # what a reader should look for
    unit: str = ""  # appended to numbers; "%" shows shares of one
    log: bool = False  # the axis at first
    zero: bool = False  # the axis reaches down to 0
    smooth: bool = True  # noise that the page may smooth away
    reference: str = ""  # "chance": a line at the share that guessing would get
    references: tuple[tuple[float, str], ...] = field(default=())


def one(name: str, title: str, about: str = "", **more: Any) -> Chart:
    return Chart(title, (ChartLine(name),), about, **more)


GROUPS: tuple[tuple[str, tuple[Chart, ...]], ...] = (
    (
        "Losses",
        (
            one(
                "loss_ar", "Next-token loss", "of training: with dropout, and for ST-AR with hidden keys", unit=" nats"
            ),
            one(
                "val_loss_ar",
                "Validation loss",
                "next token, without hidden keys or dropout",
                unit=" nats",
                smooth=False,
            ),
            one("loss", "Total loss", "of all terms with their weights: compare only runs that have the same terms"),
            one("loss_mim", "Masked-image loss", "1 - cosine to the teacher's last features; near 0: nothing to learn"),
            one("loss_step", "Contrastive loss between positions", "falls when features of one image agree"),
            one("loss_view", "Contrastive loss between views", "falls when two crops of one image agree"),
        ),
    ),
    (
        "Self-guidance",
        (
            one(
                "acc_step",
                "Contrastive accuracy, positions",
                "at chance: nothing is learned from it",
                unit="%",
                zero=True,
                reference="chance",
            ),
            one(
                "acc_view",
                "Contrastive accuracy, views",
                "at chance: nothing is learned from it",
                unit="%",
                zero=True,
                reference="chance",
            ),
            Chart(
                "Feature spread",
                (ChartLine("spread_student", "student"), ChartLine("spread_teacher", "teacher", "dashed")),
                "1: features point everywhere; near 0: they collapsed onto one",
                zero=True,
                references=((0.0, "collapsed"),),
            ),
            one(
                "teacher_distance",
                "Teacher-student distance",
                "of the weights, relative; stays 0: the teacher is a copy, grows on: it hardly moves",
                zero=True,
                smooth=False,
            ),
        ),
    ),
    (
        "Optimizer",
        (
            one("lr", "Learning rate", zero=True, smooth=False),
            one("grad_norm", "Gradient norm", "before clipping"),
            Chart("Skipped steps", (ChartLine("skipped", style="points"),), "since the row before", zero=True),
        ),
    ),
    (
        "Machine",
        (
            one("images_per_s", "Throughput", "images, not views", unit=" images/s", zero=True),
            one("mfu", "MFU", "model FLOPs as a share of the device's peak", unit="%", zero=True),
            one("memory_gib", "Memory", "peak of the fullest rank", unit=" GiB", zero=True, smooth=False),
            one("step_s", "Time of a step", unit=" s", zero=True),
            one("data_wait_s", "Wait for data", "of a step, slowest rank", unit=" s", zero=True),
            Chart("Wait for checkpoints", (ChartLine("save_blocked_s", style="points"),), unit=" s", zero=True),
            one("slowest_ratio", "Slowest rank", "its time over the median's", zero=True, references=((1.0, "even"),)),
        ),
    ),
)
SILENT = {"slowest_rank"}  # a number that is a name


def charts_for(names: Collection[str]) -> list[dict[str, Any]]:
    """The groups that have something to show of ``names``, as the page's script takes them."""
    known = {line.name for _, charts in GROUPS for chart in charts for line in chart.lines} | SILENT
    others = tuple(one(name, name) for name in sorted(set(names) - known))
    out = []
    for title, charts in (*GROUPS, ("Other values", others)):
        shown = [c for c in charts if any(line.name in names for line in c.lines)]
        if shown:
            out.append({"title": title, "charts": [asdict(c) for c in shown]})
    return out
