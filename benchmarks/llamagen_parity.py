"""Check that LlamaGen's code and megastar give equal results with weights converted by `megastar convert`.

LLAMAGEN_DIR=/path/to/LlamaGen python -m benchmarks.llamagen_parity [--image 64]
LLAMAGEN_DIR=/path/to/LlamaGen python -m benchmarks.llamagen_parity --tiny        # small grids, seconds

Random weights are saved by LlamaGen's modules, converted and loaded. The script asserts that in fp32 the logits of whole
sequences (8 x 8 and 24 x 24 tokens, and weights of 16 x 16 on 24 x 24 and 32 x 32), the greedy tokens with and without
guidance, the VQ codes and the pixels agree, and prints the largest differences. VQ-16 and VQ-8 have their released widths;
the AR network is small, since the code is the same at every size.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.sampling import llamagen, networks
from megastar.checkpoint.convert_weights import convert_file, open_weights
from megastar.config.schema import ModelConfig
from megastar.model.io import load_model
from megastar.tokenizer.io import load_tokenizer
from tests.sampling import sample_tokens

CFG = ModelConfig(
    name="t", n_layer=4, n_head=4, dim=128, multiple_of=32, vocab_size=512, num_classes=10, image_tokens=64
)


def check(what: str, value: float | torch.Tensor, limit: float) -> None:
    value = float(value)
    print(f"  {what:<60} {value:.3g}  (limit {limit:.0e})", flush=True)
    assert value <= limit, what


INTERVALS = ((1.0, -1), (2.0, -1), (3.0, 10))  # guidance, and the last token that it applies to


def network(folder: Path, cfg: ModelConfig, guided: tuple[tuple[float, int], ...] = INTERVALS[1:2]) -> None:
    theirs, _ = networks(cfg, torch.float32, "cpu")
    for p in theirs.parameters():  # large enough that the distributions are far from flat
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.08)
    from autoregressive.models.generate import generate

    (folder / "t.yaml").write_text(yaml.safe_dump(vars(cfg)))
    torch.save({"model": theirs.state_dict(), "steps": 1}, folder / "w.pt")
    source = open_weights(folder / "w.pt", config=folder / "t.yaml")
    convert_file(source, "safetensors", folder / "w.safetensors", force=True)
    ours, _ = load_model(folder / "w.safetensors")
    labels, tokens = torch.arange(4), torch.randint(cfg.vocab_size, (4, cfg.image_tokens - 1))
    check("logits of whole sequences", (ours(labels, tokens).logits - logits(theirs, labels, tokens)).abs().max(), 1e-4)
    for scale, interval in guided:
        guidance: dict[str, Any] = {"cfg_scale": scale, "cfg_interval": interval}
        their = generate(
            theirs, labels, cfg.image_tokens, temperature=1.0, top_k=0, top_p=1.0, sample_logits=False, **guidance
        )
        mine = sample_tokens(ours, labels, seeds=[0] * 4, top_k=1, **guidance)
        different = (mine != their.long()).sum().item()
        check(f"greedy tokens that differ, guidance {scale}, interval {interval}", different, 0)
    convert_file(open_weights(folder / "w.safetensors"), "llamagen", folder / "back.pt", force=True)
    back = torch.load(folder / "back.pt", weights_only=True)["model"]
    first = torch.load(folder / "w.pt", weights_only=True)["model"]
    check(
        "weights after conversion in both directions",
        max((back[k] - v).abs().max().item() for k, v in first.items()),
        0,
    )
    networks(cfg, torch.float32, "cpu")[0].load_state_dict(back, strict=True)
    print("  LlamaGen loads all weights after the reverse conversion")


@torch.no_grad()
def logits(theirs: Any, labels: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """LlamaGen's logits of whole sequences, (B, T, V)."""
    theirs.freqs_cis = theirs.freqs_cis[: tokens.shape[1] + 1]  # without a cache it uses the whole table
    theirs.train()  # its whole-sequence path requires training mode; dropout and label dropping are disabled
    for m in theirs.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
    theirs.cls_embedding.dropout_prob = 0.0
    wanted: torch.Tensor = theirs(tokens, labels, targets=None)[0]
    theirs.eval()
    return wanted


@torch.no_grad()
def resized(small: ModelConfig, large: ModelConfig) -> None:
    """The weights of one grid on another, as ``train.init_resize`` takes them: RoPE of the new grid, all else as it was."""
    before, _ = networks(small, torch.float32, "cpu")
    theirs, ours = networks(large, torch.float32, "cpu")
    ours.load_state_dict({k: v for k, v in before.state_dict().items() if k in ours.state_dict()})
    theirs.load_state_dict(before.state_dict(), strict=True)
    labels, tokens = torch.arange(4), torch.randint(large.vocab_size, (4, large.image_tokens - 1))
    difference = (ours(labels, tokens).logits - logits(theirs, labels, tokens)).abs().max()
    check(f"logits on {large.grid} x {large.grid} of weights of {small.grid} x {small.grid}", difference, 1e-4)


def tokenizer(folder: Path, name: str, side: int) -> None:
    from tokenizer.tokenizer_image.vq_model import VQ_models

    torch.manual_seed(1)
    theirs = VQ_models[name]().eval()
    torch.save({"model": theirs.state_dict()}, folder / "vq.pt")
    source = open_weights(folder / "vq.pt", image_size=side)
    convert_file(source, "safetensors", folder / "vq.safetensors", force=True)
    ours = load_tokenizer(folder / "vq.safetensors")
    images = torch.rand(2, 3, side, side) * 2 - 1
    with torch.no_grad():
        _, _, (_, _, codes) = theirs.encode(images)
        mine = ours.encode(images)
        check(f"{name}: codes that differ, of {mine.numel()}", (mine.flatten() != codes).sum().item(), 0)
        size = ours.config.grid
        wanted = theirs.decode_code(codes, (2, ours.config.codebook_embed_dim, size, size)).clamp(-1, 1)
        check(f"{name}: pixels, of a range of 2", (ours.decode_codes(mine) - wanted).abs().max().item(), 1e-4)
    convert_file(open_weights(folder / "vq.safetensors"), "llamagen", folder / "vq-back.pt", force=True)
    theirs.load_state_dict(torch.load(folder / "vq-back.pt", weights_only=True)["model"], strict=True)
    print(f"  {name}: LlamaGen loads all weights after the reverse conversion")


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--image", type=int, default=64, help="side of the tokenizers' images in pixels")
    p.add_argument("--tiny", action="store_true", help="grids of 4 x 4 to 8 x 8 tokens")
    a = p.parse_args()
    llamagen()
    warnings.filterwarnings("ignore", category=FutureWarning)
    print("largest differences in fp32, equal weights")
    cfg, pretrained, larger = (
        (replace(CFG, image_tokens=16), 16, (6, 8)) if a.tiny else (CFG, 256, (24, 32))
    )  # 384, 512 pixels
    with tempfile.TemporaryDirectory() as place:
        network(Path(place), cfg, INTERVALS)
        for side in larger:
            print(f" {side} x {side} tokens")
            large = replace(cfg, image_tokens=side * side)
            if side == larger[0]:
                network(Path(place), large)
            resized(replace(cfg, image_tokens=pretrained), large)
        for name in ("VQ-16", "VQ-8"):
            tokenizer(Path(place), name, a.image)


if __name__ == "__main__":
    main()
