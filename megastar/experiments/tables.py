"""The results as tables: in Markdown, and on the console, split to fit its width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from megastar.experiments.plan import changed_fields
from megastar.experiments.results import HIGHER, LOSS, Results, spread
from megastar.experiments.samplers import decoding_words, sampler_of

if TYPE_CHECKING:
    from rich.console import Console

Rows = list[list[str]]  # the header first
UNBROKEN = "\N{NO-BREAK SPACE}"


def quantities_table(results: Results, summary: Mapping[str, Any], weights: str) -> Rows:
    """One row per variant: mean and standard deviation over seeds of each quantity."""
    table = summary["weights"][weights]
    rows = [["variant", "seeds", *map(heading, table)]]
    for variant, label in results.labels.items():
        names = [r.name for r in results.runs if r.variant == variant]
        done = [n for n in names if weights in results.rows.get(n, {}).get("weights", {})]
        cells = [formatted(q[variant], digits(q), seeds=len(done)) if variant in q else "" for q in table.values()]
        if LOSS in table and variant in table[LOSS] and variant in permuted(results):
            cells[list(table).index(LOSS)] += " (random order)"
        rows.append([label, f"{len(done)}/{len(names)}", *cells])
    return rows


def differences_table(results: Results, summary: Mapping[str, Any], weights: str) -> Rows:
    """One row per pair: variant minus baseline of the same seed, mean and standard deviation over seeds."""
    table, pairs = summary["weights"][weights], summary["differences"][weights]
    rows = [["difference", "seeds", *map(heading, table)]]
    for b, a in results.pairs():
        if cells := pairs.get(f"{b} - {a}"):
            seeds = min(cell["n"] for cell in cells.values())
            values = [formatted(cells[n], digits(q), "+", seeds) if n in cells else "" for n, q in table.items()]
            rows.append([f"{results.labels[b]} − {results.labels[a]}", str(seeds), *values])
    return rows


def cost_table(results: Results, summary: Mapping[str, Any]) -> Rows:
    """One row per variant: images, sequences, and time."""
    cost = summary["cost"]
    more = max((c["includes"] for c in cost.values()), key=len, default="")
    cpu = f"CPU ms per image, with {more}" if more else "CPU ms per image"
    header = ["variant", "images", "sequences", "s per run", "wall ms per image", cpu]
    rows = [header + [f"× {results.labels[b]}" for b in results.baselines]]
    for variant, label in results.labels.items():
        run = next((r for r in results.runs if r.variant == variant), None)
        c = cost[variant]
        counts = [f"{run.images:,}", f"{run.sequences:,}"] if run else ["", ""]
        numbers = [(c["seconds"], ".0f"), (c["ms_per_image"], ".2f"), (c["cpu_ms_per_image"], ".2f")]
        numbers += [(c["relative"][b], ".2f") for b in results.baselines]
        rows.append([label, *counts, *("" if value is None else f"{value:{form}}" for value, form in numbers)])
    return rows


def epochs_table(results: Results) -> Rows:
    """One row per variant: the first evaluated epoch at or below each of ``base.eval.thresholds``, mean and standard deviation
    over the seeds that reached it, and how many did. Only a header where no run was scored while it trained."""
    metric, thresholds = results.scored_metric(), results.cfg.base.eval.thresholds
    rows = [["variant", *(f"epochs to {metric} ≤ {k:g}" for k in thresholds)]]
    for variant, label in results.labels.items() if metric and thresholds else ():
        cells = []
        for k in thresholds:
            epochs, runs = results.epochs_to(variant, k)
            value = formatted(spread(epochs), 1) if epochs else "not reached"
            cells.append(f"{value.removesuffix(' (n=1)')} ({len(epochs)}/{runs})" if runs else "")
        rows.append([label, *cells])
    return rows


def epochs_note(results: Results) -> str:
    """The meaning of the columns of the table of epochs."""
    e = results.cfg.base.eval
    return (
        f"The first evaluated epoch with {results.scored_metric()} at or below the threshold, not interpolated: evaluations every "
        f"{e.every} steps of {e.samples} samples of the {e.weights} weights, cfg_scale {e.cfg_scale:g}, against "
        f"{' and '.join(results.scored_against())}. (reached/scored) counts runs; mean and deviation are over those that reached it."
    )


def unscored_note(results: Results) -> str:
    """The runs of which not all due steps were scored; empty where there are none."""
    texts = []
    for run in results.runs:
        row = results.rows.get(run.name, {})
        if row and (steps := results.unscored(row)):
            more = f" and {len(steps) - 4} more" if len(steps) > 4 else ""
            texts.append(f"{run.name}: {', '.join(map(str, steps[:4])) + more if row.get('scored') else 'all'}")
    if not texts:
        return ""
    return (
        f"Steps that have no score of these settings: {'; '.join(texts)}. Such a run counts for a threshold only if all steps "
        "due before the run reached the threshold have a score."
    )


def permuted(results: Results) -> list[str]:
    """The variants that are validated in random order, where others are validated in raster order."""
    found = [variant for variant, order in results.validated.items() if order == "random"]
    return found if len(found) < len(results.validated) else []


def validation_note(results: Results) -> str:
    """The order of the tokens of the validation loss, where it is not that of the raster for all variants."""
    if found := permuted(results):
        labels = " and ".join(results.labels[variant] for variant in found)
        return f", tokens in raster order; in random order for {labels}, not comparable with the other losses"
    return ", tokens in random order" if "random" in results.validated.values() else ""


def changes_table(results: Results) -> Rows:
    """One row per variant: the fields in which it differs from the base run."""
    changes = {results.labels[r.variant]: changed_fields(results.cfg, r) for r in results.runs}
    return [["variant", "fields"], *([label, "; ".join(fields) or "none"] for label, fields in changes.items())]


def markdown(
    results: Results,
    summary: Mapping[str, Any],
    command: str,
    failed: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> str:
    """table.md. ``failed``: the runs that failed, with the stage."""
    c = results.cfg
    out = [f"`{command}`", description(results)]
    if failed:
        stages = ", ".join(f"{name} ({how['stage']})" for name, how in failed.items())
        out += [f"**Failed, and not part of the tables: {stages}.** The same command tries again."]
    for weights in c.weights:
        out += [f"## {weights} weights", as_markdown(quantities_table(results, summary, weights))]
        if len(pairs := differences_table(results, summary, weights)) > 1:
            out += ["Differences within a seed, mean ± standard deviation over seeds:", as_markdown(pairs)]
    if len(epochs := epochs_table(results)) > 1:
        out += [
            "## Epochs to a score",
            epochs_note(results),
            as_markdown(epochs),
            *filter(None, [unscored_note(results)]),
        ]
    out += ["## Cost", cost_note(results), as_markdown(cost_table(results, summary))]
    out += ["## Differences from the base run", as_markdown(changes_table(results))]
    return "\n\n".join(out) + "\n"


def show(results: Results, summary: Mapping[str, Any], console: Console) -> None:
    """Print the tables."""
    from rich.text import Text

    for weights in results.cfg.weights:
        console.print(Text.assemble(("\n" + weights + " weights", "bold"), ", mean ± standard deviation over seeds"))
        print_rows(quantities_table(results, summary, weights), console)
        if len(pairs := differences_table(results, summary, weights)) > 1:
            print_rows(pairs, console)
    if len(epochs := epochs_table(results)) > 1:
        console.print(Text("\nepochs to a score", "bold"))
        print_rows(epochs, console)
        for note in filter(None, [epochs_note(results), unscored_note(results)]):
            console.print(note, highlight=False, markup=False)
    console.print(Text("\ncost", "bold"))
    print_rows(cost_table(results, summary), console)
    console.print(description(results), cost_note(results), sep="\n", highlight=False, markup=False)


def description(results: Results) -> str:
    """How the quantities are measured."""
    c = results.cfg
    return (
        f"Mean ± standard deviation (n - 1) over seeds; n=1: one seed, no standard deviation. Probe: block "
        f"{c.probe.block}, null class, fitted on {c.probe.fit_on}, scored on {c.probe.score_on}; the best position is "
        f"chosen per run. Scores: {c.sample.count} images, cfg_scale {c.sample.cfg_scale:g}, temperature "
        f"{c.sample.temperature:g}{decoding_note(results)}, against {' and '.join(c.score.against)}. Validation loss: next token, one crop, no "
        f"mask, student weights{validation_note(results)}. ↑ higher is better, ↓ lower is better."
    )


def decoding_note(results: Results) -> str:
    """How the tokens are drawn where it is not one by one in raster order; empty if they all are."""
    words = {label: decoding_words(sampler_of(results.cfg, v)) for v, label in results.labels.items()}
    used = {label: text for label, text in words.items() if text}
    if len(used) == len(words) and len(set(used.values())) == 1:
        return f", tokens drawn in {next(iter(used.values()))}"
    return f", tokens drawn in {'; '.join(f'{text} for {label}' for label, text in used.items())}" if used else ""


def cost_note(results: Results) -> str:
    """The meaning of the columns of the cost table."""
    kind = "wall-clock" if results.gpus else "CPU"
    return (
        f"Medians over runs. s per run: wall-clock time, including start-up, validation and saving. Per image: training "
        f"steps only, unless the column says otherwise. × NAME: {kind} time per image relative to NAME."
    )


# Forms -------------------------------------------------------------------------------------------------------------
def heading(quantity: str) -> str:
    return f"{quantity} {'↑' if quantity.startswith(HIGHER) else '↓'}"


def digits(quantity: Mapping[str, Mapping[str, Any]]) -> int:
    """Number of decimals, the same for all variants."""
    largest = max((abs(s["mean"]) for s in quantity.values()), default=0.0)
    return 2 if largest >= 10 else 3 if largest >= 1 else 4


def formatted(s: Mapping[str, Any], digits: int, sign: str = "", seeds: int | None = None) -> str:
    """4.31 ± 0.02, or 4.31 (n=1). ``seeds``: of the row; another number of a cell is told."""
    mean = f"{s['mean']:{sign}.{digits}f}"
    if s["std"] is None:
        return f"{mean} (n=1)"
    return f"{mean} ± {s['std']:.{digits}f}" + (f" (n={s['n']})" if seeds not in (None, s["n"]) else "")


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    header, *body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([header, "|" + "---|" * len(rows[0]), *body])


def print_rows(rows: Rows, console: Console) -> None:
    """One table, or several with the same first column if the console is too narrow for one."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    for columns in split_columns(rows, console.width):
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for i in columns:  # a heading may wrap, a value must not
            justify: Literal["left", "right"] = "right" if i else "left"
            table.add_column(Text(rows[0][i]), justify=justify, vertical="bottom", width=column_width(rows, i))
        for row in rows[1:]:
            table.add_row(*(Text(row[i].replace(" ", UNBROKEN)) for i in columns))
        console.print(table)


def split_columns(rows: Rows, width: int) -> list[list[int]]:
    """The columns of each table, at most ``width`` wide if possible; each begins with the first column."""
    tables, used = [[0]], column_width(rows, 0)
    for i in range(1, len(rows[0])):
        space = column_width(rows, i) + 3  # between columns
        if used + space > width - 2 and len(tables[-1]) > 1:
            tables.append([0])
            used = column_width(rows, 0)
        tables[-1].append(i)
        used += space
    return tables


def column_width(rows: Rows, i: int) -> int:
    """Characters that column ``i`` needs: its widest value, or the longest word of its heading."""
    return max(*(len(word) for word in rows[0][i].split()), *(len(row[i]) for row in rows[1:]), 1)
