"""FDr^k: how far generated images are from real ones, in units of the distance of held-out real images, over k networks.

For features phi, FDr_phi = FD_phi(generated, real) / FD_phi(held-out, real): 1 is as near as held-out images. FDr^k is the
mean over k networks (Representation Frechet Loss for Visual Generation, arXiv 2604.28190, which uses six; a score of other
networks is comparable only with scores of the same ones).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from megastar.errors import UserError
from megastar.evaluation.feature_statistics import Collector, collect
from megastar.evaluation.features import Network, open_network
from megastar.evaluation.frechet import frechet_distance
from megastar.evaluation.image_sources import ImageSource, holds_shards, open_images, source_hash
from megastar.evaluation.options import EvaluationOptions
from megastar.evaluation.reference import read_reference
from megastar.evaluation.runner import (
    describe_images,
    not_recorded,
    open_generated,
    package_versions,
    report,
    resized_warnings,
)
from megastar.evaluation.scores import check_count, check_real, warnings_of

FILES = ("inception", "dinov2")  # networks that are read from a file that an option names
ROUNDING = (
    1e-9  # of the features' variance: equal sets have up to 1e-13, due to rounding, other sets of n images about 1 / n
)


def fd_ratio(
    generated: str | Path,
    real: str | Path,
    held_out: str | Path,
    networks: Sequence[str],
    *,
    generated_subset: str | None = None,
    held_out_subset: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """FDr^k of ``generated``. ``networks``: efflite0, inception, dinov2 (whose files ``options`` name), or module:function.

    ``options`` are the fields of ``EvaluationOptions``. Each network reads all images in turn. The sampler's record of an .npz
    and images of other sizes are treated as in ``runner.evaluate``. Raises ``UserError``.
    """
    o, start = EvaluationOptions(**options), time.perf_counter()
    _check_networks(networks, o)
    made, provenance = open_generated(generated, generated_subset)
    held = open_images(held_out, subset=held_out_subset, size=made.height)
    opened = [_open(word, o) for word in networks]  # all files are checked before the first image is read
    for network in opened:
        for source, where in ((made, generated), (held, held_out)):
            check_count(network.metrics[:1], network, o.settings, source.count, where)
    _check_held_out(held, held_out, real, o)
    rows: dict[str, dict[str, Any]] = {}
    warnings: list[str] = []
    counts: dict[str, int] = {}
    for network in opened:
        metric = network.metrics[0]  # fd, fid or fd_dinov2
        reference = read_reference(real, made.height, network, o, keep=False, spatial=False)
        check_real([metric], network, o.settings, reference)
        distances: dict[str, float] = {}
        for source, title, where in ((made, "generated", generated), (held, "held-out", held_out)):
            found = collect(Collector(network), source.batches(o.batch), source.count, title, o.console)
            check_count([metric], network, o.settings, found.count, where)
            distances[title], counts[title] = frechet_distance(reference.stats, found.stats), found.count
            warnings += warnings_of(found, reference, [metric], o.settings, title)
        if not distances["held-out"] > ROUNDING * reference.stats.covariance.trace():
            raise UserError(
                f"{held_out} has distance {distances['held-out']:g} from {real}: name held-out images, not the real ones "
                "themselves"
            )
        rows[network.name(metric)] = {
            "generated": distances["generated"],
            "held_out": distances["held-out"],
            "ratio": distances["generated"] / distances["held-out"],
            "real": reference.metadata,
            "features": network.describe(),
        }
    if counts["generated"] != counts["held-out"]:
        warnings.append(
            f"{counts['generated']} generated and {counts['held-out']} held-out images: a Frechet distance depends on the number "
            "of images, use equal numbers"
        )
    images = describe_images(generated, generated_subset, made, counts["generated"])
    others = describe_images(held_out, held_out_subset, held, counts["held-out"])
    warnings += [*resized_warnings(images, reference.metadata), *resized_warnings(others, {}, "held-out")]
    provenance |= dict(o.provenance)
    result = {
        "metric": f"FDr^{len(rows)}",
        "value": fmean(row["ratio"] for row in rows.values()),
        "networks": rows,
        "warnings": list(dict.fromkeys(warnings)),  # of several networks, each once
        "generated": images,
        "held_out": others,
        "versions": package_versions(),
        "seconds": round(time.perf_counter() - start, 1),
        "provenance": provenance,
        "not_recorded": not_recorded(provenance),
    }
    report(result, o, _show)
    return result


def _check_networks(networks: Sequence[str], o: EvaluationOptions) -> None:
    """Raise ``UserError`` for networks named twice, and for the file of a network that is not named."""
    if len(set(networks)) != len(networks) or not networks:
        raise UserError(f"--fdr {','.join(networks)}: name one or more networks, each once")
    for name in FILES:
        if (file := getattr(o, name)) is not None and name not in networks:
            raise UserError(
                f"--{name} {file} would not be used: --fdr {','.join(networks)} does not name {name}; name it too, or leave "
                "the file out"
            )


def _check_held_out(held: ImageSource, held_out: str | Path, real: str | Path, o: EvaluationOptions) -> None:
    """Raise ``UserError`` if the held-out images are the files of the real ones, before any image is read."""
    arrays = Path(real).suffix == ".npz"
    if holds_shards(real) or arrays != (Path(held_out).suffix == ".npz"):
        return  # the hashes are not comparable; the distance is checked later
    if not arrays and open_images(real, subset=o.real_subset, size=held.height).count != held.count:
        return
    if held.sha256() == source_hash(real, subset=o.real_subset):
        raise UserError(
            f"{held_out} has the same contents as {real}: name held-out images, not the real ones themselves"
        )


def _show(result: Mapping[str, Any], console: Console) -> None:
    table = Table("network", "generated", "held-out", "ratio")
    for name, row in result["networks"].items():
        table.add_row(name, *(f"{row[what]:.4g}" for what in ("generated", "held_out", "ratio")))
    table.add_row(result["metric"], "", "", f"{result['value']:.4g}")
    console.print(table)


def _open(word: str, o: EvaluationOptions) -> Network:
    files = {name: getattr(o, name) if word == name else None for name in FILES}
    return open_network(word, o.device, inception_sha256=o.inception_sha256, **files)
