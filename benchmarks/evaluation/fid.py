"""Values and times of FID and related scores, compared with torch-fidelity and pytorch-fid.

FID_PEERS=FOLDER python -m benchmarks.evaluation.fid [--dim 512] [--repeats 3]

Goals: scores of the same features agree to 1e-6 (relative), Inception features of the same images, with the same random
weights, to 1e-4. For torch-fidelity the features are computed from uint8 images. pytorch-fid resizes with half-pixel
centres and scales by 127.5, unlike TensorFlow's graph, so its network is compared on megastar's scaled input; the
difference caused by its own resizing is also printed. Neither package can be imported with a CPU-only torch: their
``__init__`` is bypassed, and torch-fidelity's copies of the layers replace torchvision's in pytorch-fid.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import statistics
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import report, seconds
from megastar.evaluation.frechet import Statistics, frechet_distance
from megastar.evaluation.inception import from_state, scale
from megastar.evaluation.inception_score import inception_score
from megastar.evaluation.kid import mmd2
from megastar.evaluation.prdc import precision_recall
from tests.unit.evaluation.test_inception import random_state

HOW = "pip install --no-deps --target FOLDER torch-fidelity pytorch-fid scipy, then FID_PEERS=FOLDER python -m benchmarks.evaluation.fid"
ARITHMETIC, PATH = 1e-6, 1e-4


def bypass(name: str) -> None:
    """Make a package importable without its ``__init__``."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{name} is not installed: {HOW}")
    package = types.ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules[name] = package


def stand_in(fidelity: types.ModuleType, weights: Path) -> None:
    """Replace the part of torchvision that pytorch-fid requires, if torchvision is missing."""
    if importlib.util.find_spec("torchvision"):
        return
    vision, models, blocks, transforms = (
        types.ModuleType(f"torchvision{n}") for n in ("", ".models", ".models.inception", ".transforms")
    )
    vision.__version__, vision.models, vision.transforms, models.inception = "0.15.0", models, transforms, blocks
    blocks.InceptionA, blocks.InceptionC, blocks.InceptionE = (
        fidelity.InceptionA, fidelity.InceptionC, fidelity.InceptionE_1,
    )  # fmt: skip
    models.inception_v3 = lambda **_: fidelity.FeatureExtractorInceptionV3("x", ["2048"], str(weights))
    for module in (vision, models, blocks, transforms):
        sys.modules[module.__name__] = module


def error(ours, peer) -> float:
    """Norm of the difference divided by the norm of ``peer``."""
    a, b = (np.asarray(x, dtype=np.float64) for x in (ours, peer))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


class Table:
    missed = False

    def row(self, what: str, ours, peer, goal: float) -> None:
        e = error(ours, peer)
        self.missed |= not e <= goal
        shown = f"{float(ours):.10g}  {float(peer):.10g}" if np.ndim(ours) == 0 else f"{np.shape(ours)}"
        print(f"  {what:<58} {e:9.2e}  goal {goal:.0e}  {'ok' if e <= goal else 'MISSED'}   {shown}")


def features(dim: int, n: int, seed: int) -> np.ndarray:
    """Random features similar to Inception's: non-negative, correlated, with a decreasing spectrum. ``seed`` shifts the mean."""
    mix = np.random.default_rng(0).normal(size=(dim, dim)) / np.sqrt(dim) * np.arange(1, dim + 1)[:, None] ** -0.3
    x = np.random.default_rng(seed).normal(size=(n, dim)) @ mix
    return np.maximum(x + 0.3 + 0.02 * seed, 0).astype(np.float32)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--dim",
        type=int,
        default=512,
        help="number of features in the comparison of scores (default 512; Inception has 2048)",
    )
    p.add_argument("--repeats", type=int, default=3)
    a = p.parse_args()
    if folder := os.environ.get("FID_PEERS"):
        sys.path.insert(0, folder)
    for name in ("torch_fidelity", "pytorch_fid"):
        bypass(name)
    if importlib.util.find_spec("scipy") is None:
        raise SystemExit(f"scipy is not installed; pytorch-fid uses its matrix square root: {HOW}")
    with tempfile.TemporaryDirectory() as place:
        weights = Path(place) / "random.pth"
        state = random_state()
        torch.save(state, weights)
        fidelity = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
        peer = fidelity.FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(weights)).eval()
        stand_in(fidelity, weights)
        pfid = importlib.import_module("pytorch_fid.inception")
        counters = {k: v for k, v in peer.state_dict().items() if k.endswith("num_batches_tracked")}
        pfid.load_state_dict_from_url = lambda *_, **__: state | counters
        other = pfid.InceptionV3([3], resize_input=False, normalize_input=False).eval()
        its_own = pfid.InceptionV3([3]).eval()
    # The module for datasets and caches, which the scores do not use, would import torchvision.
    idle = types.ModuleType("torch_fidelity.utils")
    idle.__getattr__ = lambda name: None
    sys.modules[idle.__name__] = idle
    fid, kid, isc, prc = (importlib.import_module(f"torch_fidelity.metric_{m}") for m in ("fid", "kid", "isc", "prc"))
    score = importlib.import_module("pytorch_fid.fid_score")
    out = Table()

    print(f"scores of {a.dim} features of {4 * a.dim} and {5 * a.dim} images: relative difference")
    x, y = features(a.dim, 4 * a.dim, 1), features(a.dim, 5 * a.dim, 2)
    ours = frechet_distance(Statistics().update(x), Statistics().update(y))
    moments = [fid.fid_features_to_statistics(torch.from_numpy(v).double()) for v in (x, y)]
    pair = [m[k] for m in moments for k in ("mu", "sigma")]
    out.row("FID, torch-fidelity", ours, fid.fid_statistics_to_metric(*moments, False)[fid.KEY_METRIC_FID], ARITHMETIC)
    square_root = score.linalg.sqrtm  # newer scipy has no argument ``disp``, which pytorch-fid passes
    if "disp" not in square_root.__code__.co_varnames[: square_root.__code__.co_argcount]:
        score.linalg = types.SimpleNamespace(sqrtm=lambda m, disp=True: square_root(m) if disp else (square_root(m), 0))
    out.row("FID, pytorch-fid", ours, score.calculate_frechet_distance(*pair), ARITHMETIC)
    u, v = x[:1000].astype(np.float64), y[:1000].astype(np.float64)
    kernel = {
        "kid_kernel": "poly",
        "kid_kernel_poly_degree": 3,
        "kid_kernel_poly_gamma": None,
        "kid_kernel_poly_coef0": 1,
    }
    out.row("KID of one subset, torch-fidelity", mmd2(u, v), kid.kernel_mmd(u, v, **kernel), ARITHMETIC)
    logits = torch.from_numpy(x) * 3
    theirs = isc.isc_features_to_metric(logits, splits=4, shuffle=False)
    mine = inception_score(logits, split=len(logits) // 4)
    out.row("Inception Score, torch-fidelity", mine[0], theirs[isc.KEY_METRIC_ISC_MEAN], ARITHMETIC)
    real, made = torch.from_numpy(y).double(), torch.from_numpy(x).double()
    theirs = prc.calculate_precision_recall_full(made, real)
    out.row("precision and recall, torch-fidelity", precision_recall(real, made), theirs, ARITHMETIC)

    print("Inception with the same random weights: relative difference")
    net = from_state(state).to(memory_format=torch.channels_last)

    def run(pixels: torch.Tensor) -> torch.Tensor:
        return net(scale(pixels).contiguous(memory_format=torch.channels_last), False)[0]

    with torch.no_grad():
        for side in (64, 256, 299):
            pixels = torch.randint(0, 256, (4, side, side, 3), dtype=torch.uint8)
            mine, (pool, unbiased) = run(pixels), peer(pixels.permute(0, 3, 1, 2))
            out.row(f"features of {side} px, torch-fidelity", mine, pool, PATH)
            out.row(f"logits of {side} px, torch-fidelity", net.logits(mine), unbiased, PATH)
            out.row(f"features of {side} px, pytorch-fid's network", mine, other(scale(pixels))[0].flatten(1), PATH)
            whole = its_own(pixels.permute(0, 3, 1, 2) / 255)[0].flatten(1)
            print(f"  {f'(pytorch-fid from {side} px with its own resizing)':<58} {error(mine, whole):9.2e}")
        pixels = torch.randint(0, 256, (8, 256, 256, 3), dtype=torch.uint8)
        nchw = pixels.permute(0, 3, 1, 2)
        rows: dict[str, list[float]] = {"megastar": [], "torch-fidelity": []}
        for _ in range(a.repeats + 1):  # interleaved; the first of each warms up
            rows["megastar"] += seconds(lambda: run(pixels), 1)
            rows["torch-fidelity"] += seconds(lambda: peer(nchw), 1)
    report("8 images of 256 px to features", {k: t[1:] for k, t in rows.items()}, "torch-fidelity")
    m = [Statistics().update(w) for w in (x, y)]
    rows = {"megastar": [], "torch-fidelity": [], "pytorch-fid": []}
    for _ in range(a.repeats):
        rows["megastar"] += seconds(lambda: frechet_distance(*m), 1)
        rows["torch-fidelity"] += seconds(lambda: fid.fid_statistics_to_metric(*moments, False), 1)
        rows["pytorch-fid"] += seconds(lambda: score.calculate_frechet_distance(*pair), 1)
    report(f"Frechet distance of {a.dim} features", rows, "torch-fidelity")
    ratio = statistics.median(rows["pytorch-fid"]) / statistics.median(rows["megastar"])
    print(f"  pytorch-fid / megastar = {ratio:.2f}")
    if out.missed:
        raise SystemExit("a goal was missed")


if __name__ == "__main__":
    main()
