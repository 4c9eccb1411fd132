"""Options for scoring, shared by ``megastar evaluate`` and ``megastar sample --score``."""

from __future__ import annotations

import argparse
from typing import Any

from megastar.commands._common import positive
from megastar.errors import UserError


def add_options(p: Any, *, required: bool) -> None:
    """Add the scoring options, except those whose names differ between commands (the input, --out, --batch)."""
    p.add_argument(
        "--real", required=required, help="reference: VIRTUAL_*.npz of ADM; folder, tar or .npz of images; token shards"
    )
    p.add_argument("--real-subset", help="use only real images in this top-level folder")
    p.add_argument("--real-sha256", help="fail unless the reference has this SHA-256")
    p.add_argument("--real-tokenizer", help="tokenizer that decodes the token shards of --real")
    p.add_argument("--inception", help="file with FID's Inception weights; never downloaded")
    p.add_argument("--inception-sha256", help="SHA-256 of a custom Inception file")
    p.add_argument("--features", default="efflite0", help="without --inception: efflite0 or module:function")
    p.add_argument(
        "--metrics",
        help="comma-separated: fid,sfid,is,pr,kid (default fid,sfid,is,pr); without --inception fd,pr,kid (default fd)",
    )
    p.add_argument("--is-split", type=positive, default=5000, help="images per split for IS (default 5000, as in ADM)")
    p.add_argument("--kid-subsets", type=positive, default=100, help="random subsets for KID")
    p.add_argument("--kid-size", type=positive, default=1000, help="images per subset for KID")
    p.add_argument("--allow-few", action="store_true", help="score fewer images than a metric requires, for testing")


def options_of(a: argparse.Namespace, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of ``evaluation.runner``; ``seed`` selects KID's subsets. Raises ``UserError``."""
    from megastar.evaluation.options import Settings

    if a.inception is not None and a.features not in ("efflite0", "inception"):
        raise UserError(f"--inception and --features {a.features} select different networks: give one")
    metrics = [m.strip().lower() for m in a.metrics.split(",") if m.strip()] if a.metrics else None
    features = a.features
    if metrics and set(metrics) & {"fid", "sfid", "is"} and features == "efflite0":
        features = "inception"  # reports that --inception is missing
    settings = {k: getattr(a, k) for k in ("is_split", "kid_subsets", "kid_size", "allow_few")}
    names = ("inception", "inception_sha256", "real_subset", "real_sha256", "real_tokenizer")
    kwargs = {name: getattr(a, name) for name in names}
    return kwargs | {"metrics": metrics, "features": features, "settings": Settings(**settings, seed=seed)}
