"""Images per second of `megastar pretokenize`, compared with LlamaGen's extraction loop with equal random VQ-16 weights.

LLAMAGEN_DIR=<a checkout of github.com/FoundationVision/LlamaGen> python -m benchmarks.pretokenize [--images 4] [--rounds 2]
LLAMAGEN_DIR=... python -m benchmarks.pretokenize --tiny        # one image of 32 pixels; its times mean nothing

The reference is the loop of autoregressive/train/extract_codes_c2i.py on this device: a DataLoader of batch size 1 that
makes ten crops, LlamaGen's VQModel, one .npy per image and one per label. torchvision is not used (it cannot be installed
with every torch): its CenterCrop, TenCrop, ToTensor and Normalize are reimplemented in PIL and torch. Both read the same
JPEGs of 400 x 350 and use all cores; they take turns. The codes must be equal, except for ties: codes whose distances are
equal in float64, so that rounding decides between them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch.utils.data import DataLoader, Dataset

from megastar.config.schema import TokenizerConfig
from megastar.data.images.crops import parse_crops
from megastar.data.images.dataset import ImageSet
from megastar.data.images.image_files import FORMATS
from megastar.data.pretokenize.encoding import Pipeline, ViewEncoder
from megastar.data.pretokenize.runner import pretokenize
from megastar.data.shards.reader import ShardSet
from megastar.tokenizer.io import load_tokenizer, save_tokenizer
from megastar.tokenizer.vq import VQModel
from tests.unit.data.images.test_dataset import tenfold

TIE = 1e-4  # maximum difference of squared distances on the unit sphere, which are between 0 and 4


class TenCrops(Dataset):
    """ImageFolder with LlamaGen's transform."""

    def __init__(self, paths: list[Path], size: int):
        self.paths, self.size = paths, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        with Image.open(self.paths[i], formats=FORMATS) as image:
            crops = tenfold(image.convert("RGB"), self.size, 1.1)
        tensors = [torch.from_numpy(np.array(c)).permute(2, 0, 1).contiguous().float().div(255) for c in crops]
        return torch.stack(tensors).sub_(0.5).div_(0.5), 0


def peer_model(model: VQModel):
    """LlamaGen's VQ-16 with the weights of ``model``, which have the same names."""
    folder = os.environ.get("LLAMAGEN_DIR")
    if not folder:
        raise SystemExit(
            "set LLAMAGEN_DIR to a checkout of LlamaGen: git clone https://github.com/FoundationVision/LlamaGen"
        )
    sys.path.insert(0, folder)
    from tokenizer.tokenizer_image.vq_model import VQ_models

    peer = VQ_models["VQ-16"](codebook_size=model.config.codebook_size, codebook_embed_dim=8).eval()
    missing, unexpected = peer.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and set(missing) <= {"quantize.codebook_used"}, (missing, unexpected)
    return peer


@torch.no_grad()
def llamagen(peer, paths: list[Path], size: int, out: Path) -> None:
    for n, (x, y) in enumerate(
        DataLoader(TenCrops(paths, size), batch_size=1, num_workers=len(os.sched_getaffinity(0)))
    ):
        _, _, [_, _, indices] = peer.encode(x.flatten(0, 1))
        np.save(out / f"{n}.npy", indices.reshape(1, 10, -1).numpy())
        np.save(out / f"{n}.label.npy", y.numpy())


@torch.no_grad()
def compare(model: VQModel, paths: list[Path], ours: np.ndarray, theirs: np.ndarray) -> int:
    """Assert equal codes (n, 10, T) except for ties; returns the number of ties."""
    differ = np.argwhere(ours != theirs)
    if len(differ):
        exact = VQModel(model.config).double().eval()
        exact.load_state_dict(model.state_dict())
        book = torch.nn.functional.normalize(exact.quantize.embedding.weight, dim=-1)
    for n, view, t in differ:
        crop = tenfold(Image.open(paths[n], formats=FORMATS).convert("RGB"), model.config.image_size, 1.1)[view]
        image = torch.from_numpy(np.array(crop)).permute(2, 0, 1)[None].double().div(255).sub(0.5).div(0.5)
        z = torch.nn.functional.normalize(exact.latents(image)[0].flatten(1).T[t], dim=-1)
        near = [(z - book[int(c[n, view, t])]).square().sum() for c in (ours, theirs)]
        assert abs(near[0] - near[1]) < TIE, f"image {n}, view {view}, token {t}: {near}"
    return len(differ)


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--images", type=int, default=4)
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--tiny", action="store_true", help="one image of 32 pixels, a narrow tokenizer")
    a = p.parse_args()
    count, rounds = (1, 1) if a.tiny else (a.images, a.rounds)
    config = TokenizerConfig(image_size=32, channels=32, codebook_size=512) if a.tiny else TokenizerConfig()
    with tempfile.TemporaryDirectory() as name:
        folder, rng = Path(name), np.random.default_rng(0)
        (folder / "pictures" / "class").mkdir(parents=True)
        for i in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (14, 16, 3), dtype=np.uint8))
            coarse.resize((400, 350), Image.Resampling.BICUBIC).save(folder / f"pictures/class/{i:03d}.jpg", quality=95)
        paths = sorted((folder / "pictures" / "class").iterdir())
        torch.manual_seed(0)
        save_tokenizer(VQModel(config), folder / "vq.safetensors", {}, torch.float32)
        model = load_tokenizer(folder / "vq.safetensors")
        peer = peer_model(model)
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(cores)
        pictures, (make, views) = ImageSet(folder / "pictures"), parse_crops("ten:1.1")
        seconds: dict[str, list[float]] = {"megastar": [], "LlamaGen": []}
        waited = []
        for _ in range(rounds):
            start = time.perf_counter()
            with Pipeline(pictures, make, views, ViewEncoder(model, torch.device("cpu"), torch.float32, 0), cores) as p:
                list(p([(i, i) for i in range(count)]))
                waited.append(p.waiting)
            seconds["megastar"].append(time.perf_counter() - start)
            start = time.perf_counter()
            llamagen(peer, paths, config.image_size, folder)
            seconds["LlamaGen"].append(time.perf_counter() - start)
            print("  ".join(f"{k} {v[-1]:.1f} s" for k, v in seconds.items()), flush=True)
        pretokenize(folder / "pictures", None, folder / "vq.safetensors", folder / "out", console=Console())
        codes, ids = ShardSet(folder / "out").gather(np.arange(count), np.tile(np.arange(10), (count, 1)))[0], []
        with tarfile.open(folder / "out" / "shard-00000.tar") as tar:
            ids = [json.load(tar.extractfile(m))["source"] for m in tar if m.name.endswith(".json")]  # type: ignore[arg-type]
        ours = codes[np.argsort(ids)].astype(np.int64)
        theirs = np.concatenate([np.load(folder / f"{i}.npy") for i in range(count)])
        ties = compare(model, paths, ours, theirs)
        median = {k: statistics.median(v) for k, v in seconds.items()}
        for k, v in median.items():
            print(f"{k:<10} {count / v:7.3f} images/s  ({min(seconds[k]):.1f} to {max(seconds[k]):.1f} s for {count})")
        print(f"megastar / LlamaGen = {median['LlamaGen'] / median['megastar']:.2f}   (goal: at least 1.5)")
        print(f"the encoder waited {100 * statistics.median(waited):.2f} % of the time   (goal: at most 5 %)")
        print(f"codes: {ours.size - ties} of {ours.size} equal, {ties} ties, {len(np.unique(ours))} different codes")


if __name__ == "__main__":
    main()
