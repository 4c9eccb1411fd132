"""Which values of metrics.jsonl are drawn, and how; a value without a chart gets its own."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ChartLine:
    name: str  # in metrics.jsonl
    label: str = ""  # beside the run's name, in a chart with several lines
    style: str = "line"  # line, dashed, or points


@dataclass(frozen=True)
class Chart:
    title: str
    lines: tuple[ChartLine, ...]
    note: str = ""  # what to look for
    unit: str = ""  # appended to numbers; "%" shows fractions as percentages
    log: bool = False  # initial scale of the axis
    zero: bool = False  # the axis includes 0
    smooth: bool = True  # noisy: may be smoothed
    reference: str = ""  # "chance": a line at the accuracy of guessing
    references: tuple[tuple[float, str], ...] = ()


def single(name: str, title: str, note: str = "", **options: Any) -> Chart:
    """A chart of one value."""
    return Chart(title, (ChartLine(name),), note, **options)


def points(name: str, title: str, note: str = "", **options: Any) -> Chart:
    return Chart(title, (ChartLine(name, style="points"),), note, zero=True, **options)


def accuracy(name: str, what: str) -> Chart:
    note = "at chance: nothing is learned from this loss"
    return single(name, f"Contrastive accuracy, {what}", note, unit="%", zero=True, reference="chance")


SPREAD = (ChartLine("spread_student", "student"), ChartLine("spread_teacher", "teacher", "dashed"))
SPREAD_NOTE = "1: features in all directions; near 0: collapsed to one"
DISTANCE_NOTE = (
    "relative distance of the weights; constant 0: the teacher equals the student; steady growth: it lags behind"
)
GROUPS: tuple[tuple[str, tuple[Chart, ...]], ...] = (
    (
        "Losses",
        (
            single("loss_ar", "Next-token loss", "in training: dropout and, for ST-AR, hidden keys", unit=" nats"),
            single(
                "val_loss_ar", "Validation loss", "next token, no hidden keys or dropout", unit=" nats", smooth=False
            ),
            single("loss", "Total loss", "weighted sum of all terms: comparable only between runs with equal terms"),
            single(
                "loss_mim", "Masked-image loss", "1 - cosine to the teacher's last features; near 0: nothing to learn"
            ),
            single("loss_step", "Contrastive loss between positions", "falls as features of one image agree"),
            single("loss_repa", "Alignment loss", "1 - cosine to the encoder's features of the matched patches"),
            single("loss_view", "Contrastive loss between views", "falls as two crops of one image agree"),
        ),
    ),
    (
        "Scores while training",
        (
            single(
                "eval_fid", "FID", "samples of the averaged weights, unless eval.weights says otherwise", smooth=False
            ),
            single("eval_fd_dinov2", "FD-DINOv2", "samples of the averaged weights", smooth=False),
            single("eval_fd", "FD-EffLite0", "samples of the averaged weights", smooth=False),
        ),
    ),
    (
        "Self-guidance",
        (
            accuracy("acc_step", "positions"),
            accuracy("acc_view", "views"),
            Chart("Feature spread", SPREAD, SPREAD_NOTE, zero=True, references=((0.0, "collapsed"),)),
            single("teacher_distance", "Teacher-student distance", DISTANCE_NOTE, zero=True, smooth=False),
        ),
    ),
    (
        "Tokenizer",
        (
            single("l2", "Reconstruction error", "mean squared error of the training crops, in [-1, 1]", log=True),
            single("perceptual", "Perceptual loss"),
            single("vq", "Codebook and commitment loss"),
            single("discriminator", "Discriminator's hinge loss", "1: it cannot tell reconstructions from images"),
            single("psnr", "PSNR", "held-out images, averaged weights", unit=" dB", smooth=False),
            single("ssim", "SSIM", "held-out images", smooth=False),
            single("perceptual_distance", "Perceptual distance", "held-out images", smooth=False),
            single("rFID", "rFID", "reconstructions of the held-out images", smooth=False),
            single("rFD-EffLite0", "rFD-EffLite0", "reconstructions of the held-out images", smooth=False),
            single("codes_used", "Codes used", "by the held-out images", unit="%", zero=True, smooth=False),
            single("perplexity", "Perplexity of the codes", "the codebook size if all are used equally", smooth=False),
            points("dead", "Dead codes", "unused between the last two revivals"),
        ),
    ),
    (
        "Optimizer",
        (
            single("lr", "Learning rate", zero=True, smooth=False),
            single("grad_norm", "Gradient norm", "before clipping"),
            points("skipped", "Skipped steps", "since the previous row"),
        ),
    ),
    (
        "Machine",
        (
            single("images_per_s", "Throughput", "images, not views", unit=" images/s", zero=True),
            single("mfu", "MFU", "model FLOPs relative to the device's peak", unit="%", zero=True),
            single("memory_gib", "Memory", "peak of the rank with the largest", unit=" GiB", zero=True, smooth=False),
            single("step_s", "Step time", unit=" s", zero=True),
            single("data_wait_s", "Data wait", "per step, slowest rank", unit=" s", zero=True),
            points("save_blocked_s", "Checkpoint wait", unit=" s"),
            single("slowest_ratio", "Slowest rank", "its time / the median", zero=True, references=((1.0, "equal"),)),
        ),
    ),
)
HIDDEN = {"slowest_rank", "eval_epoch", "eval_samples", "eval_cfg_scale"}  # a rank, and how a score was measured


def charts_for(names: Collection[str]) -> list[dict[str, Any]]:
    """The groups of charts that have a value in ``names``, as input of the page's script."""
    known = {line.name for _, charts in GROUPS for chart in charts for line in chart.lines} | HIDDEN
    others = tuple(single(name, name) for name in sorted(set(names) - known))
    out = []
    for title, charts in (*GROUPS, ("Other values", others)):
        shown = [c for c in charts if any(line.name in names for line in c.lines)]
        if shown:
            out.append({"title": title, "charts": [asdict(c) for c in shown]})
    return out
