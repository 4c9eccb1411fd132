"""What ``megastar evaluate`` and ``megastar sample --score`` share: the options of a score."""

from __future__ import annotations

import argparse
from typing import Any

from megastar.commands._common import positive
from megastar.errors import UserError


def add_options(p: Any, *, required: bool) -> None:
    """The options of a score, but for those that every command calls otherwise (what is scored, --out, --batch)."""
    p.add_argument(
        "--real",
        required=required,
        default=None,
        help="ADM's VIRTUAL_*.npz, a folder, a tar, an .npz of pictures, or token shards",
    )
    p.add_argument("--real-subset", default=None, help="only real pictures below this top folder")
    p.add_argument("--real-sha256", default=None, help="refuse a reference with another hash")
    p.add_argument("--real-tokenizer", default=None, help="the tokenizer that decodes --real's token shards")
    p.add_argument("--inception", default=None, help="FID's Inception file; never downloaded")
    p.add_argument("--inception-sha256", default=None, help="vouch for an Inception file of your own")
    p.add_argument(
        "--features", default="efflite0", help="without --inception: efflite0 or module:function (default efflite0)"
    )
    p.add_argument(
        "--metrics",
        default=None,
        help="with commas: fid, sfid, is, pr, kid (default fid,sfid,is,pr); without --inception: fd, pr, kid (default fd)",
    )
    p.add_argument("--is-split", type=positive, default=5000, help="pictures in a split of IS (default 5000, as ADM)")
    p.add_argument("--kid-subsets", type=positive, default=100, help="random subsets of KID (default 100)")
    p.add_argument("--kid-size", type=positive, default=1000, help="pictures in each (default 1000)")
    p.add_argument(
        "--allow-few", action="store_true", help="score fewer pictures than a metric needs, to try things out"
    )


def options_of(a: argparse.Namespace, seed: int = 0) -> dict[str, Any]:
    """Fields of ``evaluation.runner.Options``; ``seed`` is that of KID's subsets. Raises ``UserError``."""
    from megastar.evaluation.scores import Settings

    if a.inception is not None and a.features not in ("efflite0", "inception"):
        raise UserError(f"--inception and --features {a.features} are two networks: give one")
    metrics = [m.strip().lower() for m in a.metrics.split(",") if m.strip()] if a.metrics else None
    features = a.features
    if metrics and set(metrics) & {"fid", "sfid", "is"} and features == "efflite0":
        features = "inception"  # whose absence then has its sentence
    settings = {k: getattr(a, k) for k in ("is_split", "kid_subsets", "kid_size", "allow_few")}
    names = ("inception", "inception_sha256", "real_subset", "real_sha256", "real_tokenizer")
    known = {name: getattr(a, name) for name in names}
    return known | {"metrics": metrics, "features": features, "settings": Settings(**settings, seed=seed)}


def without_words(words: list[str], option: str) -> list[str]:
    """The words without ``option`` and its value: torch's launcher would take --nproc for its own."""
    out, after = [], False
    for word in words:
        if not after and word != option and not word.startswith(f"{option}="):
            out.append(word)
        after = word == option
    return out
