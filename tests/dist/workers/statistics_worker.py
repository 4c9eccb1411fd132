"""Run by torchrun on four ranks from test_statistics.py: each has seen a part of one set, one has seen nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megastar.evaluation.feature_statistics import Collector
from megastar.evaluation.frechet import Statistics, frechet_distance

SHARES = [range(0, 1300), range(1300, 1307), range(0), range(1307, 1700)]


class Pixels:
    """Features are the pixels themselves, far from zero, and spatial ones their squares."""

    key, spatial_dim, device, metrics = "pixels", 48, torch.device("cpu"), ("fd",)

    def __call__(self, pixels, spatial=False):
        x = pixels.flatten(1).float() + 5000
        return x, x.square() if spatial else None


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    pictures = np.random.default_rng(0).integers(0, 256, (1700, 4, 4, 3), dtype=np.uint8)
    order = np.random.default_rng(1).permutation(1700)  # rank r draws pictures order[SHARES[r]]
    ids = order[np.array(SHARES[rank], dtype=np.int64)]
    made = Collector(Pixels(), keep=True, spatial=True)
    for some in np.array_split(ids, 5):
        if len(some):
            made.update(pictures[some], ids=some)
    made.finish(dist.group.WORLD)

    x = pictures.reshape(1700, 48).astype(np.float32) + 5000
    assert made.count == 1700 and made.dim == 48
    for got, plain in ((made.stats, x), (made.spatial_stats, x**2)):
        wanted = Statistics().update(plain)
        assert got.count == wanted.count
        np.testing.assert_allclose(got.mean, wanted.mean, rtol=1e-10)
        size = np.abs(wanted.covariance).max()
        np.testing.assert_allclose(got.covariance / size, wanted.covariance / size, rtol=0, atol=1e-10)
        assert frechet_distance(got, wanted) < 1e-10 * size * 48
        other = Statistics().update(plain[:600] * 1.1)
        assert abs(frechet_distance(got, other) / frechet_distance(wanted, other) - 1) < 1e-10
    assert np.array_equal(made.features, x)  # in the order of the ids, whoever drew them
    (out / f"passed-{rank}").touch()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
