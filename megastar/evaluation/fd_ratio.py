"""FDr^k: how far generated images are from real ones, in units of the distance of held-out real images, over k networks.

For features phi, FDr_phi = FD_phi(generated, real) / FD_phi(held-out, real): 1 is as near as held-out images. FDr^k is the
mean over k networks (Representation Frechet Loss for Visual Generation, arXiv 2604.28190, which uses six; a score of other
networks is comparable only with scores of the same ones).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from megastar.errors import UserError
from megastar.evaluation.feature_statistics import Collector, collect
from megastar.evaluation.features import Network, open_network
from megastar.evaluation.frechet import frechet_distance
from megastar.evaluation.image_sources import open_images
from megastar.evaluation.options import EvaluationOptions
from megastar.evaluation.reference import read_reference
from megastar.evaluation.runner import logger, package_versions
from megastar.evaluation.scores import check_count, check_real
from megastar.utils.files import write_output


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

    ``options`` are the fields of ``EvaluationOptions``. Each network reads all images in turn. Raises ``UserError``.
    """
    o, start = EvaluationOptions(**options), time.perf_counter()
    if len(set(networks)) != len(networks) or not networks:
        raise UserError(f"--fdr {','.join(networks)}: name one or more networks, each once")
    made = open_images(generated, subset=generated_subset)
    if made.height != made.width:
        raise UserError(f"{generated}: images of {made.width} x {made.height} pixels; crop them to squares first")
    held = open_images(held_out, subset=held_out_subset, size=made.height)
    opened = [_open(word, o) for word in networks]  # all files are checked before the first image is read
    rows: dict[str, dict[str, Any]] = {}
    for network in opened:
        metric = network.metrics[0]  # fd, fid or fd_dinov2
        for source, where in ((made, generated), (held, held_out)):
            check_count([metric], network, o.settings, source.count, where)
        reference = read_reference(real, made.height, network, o, keep=False, spatial=False)
        check_real([metric], network, o.settings, reference)
        distances = []
        for source, title in ((made, "generated"), (held, "held-out")):
            found = collect(Collector(network), source.batches(o.batch), source.count, title, o.console)
            distances.append(frechet_distance(reference.stats, found.stats))
        if not distances[1] > 0:
            raise UserError(
                f"{held_out} has distance {distances[1]:g} from {real}: name held-out images, not the real ones themselves"
            )
        rows[network.name(metric)] = {
            "generated": distances[0],
            "held_out": distances[1],
            "ratio": distances[0] / distances[1],
            "real": reference.metadata,
            "features": network.describe(),
        }
    warnings = []
    if made.count != held.count:
        warnings.append(
            f"{made.count} generated and {held.count} held-out images: a Frechet distance depends on the number of images, use equal numbers"
        )
    result = {
        "metric": f"FDr^{len(rows)}",
        "value": fmean(row["ratio"] for row in rows.values()),
        "networks": rows,
        "warnings": warnings,
        "generated": {
            "source": str(generated),
            "subset": generated_subset,
            "pictures": made.count,
            "size": made.height,
        },
        "held_out": {"source": str(held_out), "subset": held_out_subset, "pictures": held.count},
        "versions": package_versions(),
        "seconds": round(time.perf_counter() - start, 1),
        "provenance": dict(o.provenance),
    }
    for warning in warnings:
        logger.warning(warning)
    if o.console is not None:
        table = Table("network", "generated", "held-out", "ratio")
        for name, row in rows.items():
            table.add_row(name, *(f"{row[what]:.4g}" for what in ("generated", "held_out", "ratio")))
        table.add_row(f"FDr^{len(rows)}", "", "", f"{result['value']:.4g}")
        o.console.print(table)
    if o.out is not None:
        Path(o.out).parent.mkdir(parents=True, exist_ok=True)
        write_output(Path(o.out), (json.dumps(result, indent=2) + "\n").encode())
    return result


def _open(word: str, o: EvaluationOptions) -> Network:
    own = replace(
        o, inception=o.inception if word == "inception" else None, dinov2=o.dinov2 if word == "dinov2" else None
    )
    return open_network(word, o.device, inception=own.inception, inception_sha256=o.inception_sha256, dinov2=own.dinov2)
