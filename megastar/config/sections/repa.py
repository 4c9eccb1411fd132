"""The fields of the section repa."""

from __future__ import annotations

from dataclasses import dataclass

from megastar.config.knob import LARGE, knob

ENCODERS = ("efflite0", "dinov2", "dinov3")  # of megastar; any other is module:function


@dataclass
class RepaConfig:
    """Representation alignment (REPA, arXiv 2410.06940): features of a block against those of a frozen encoder."""

    enabled: bool = knob(False, "representation alignment with the features that the shards store (docs/repa.md)")
    weight: float = knob(0.5, "weight of the alignment loss [L: LlamaGen-REPA]; 0: not computed", low=0, high=LARGE)
    block: int = knob(
        0,
        "block, counted from 1, whose output is aligned; 0: model.n_layer // 3, which is LlamaGen-REPA's 4, 8, 12 for B, L, XL [L]",
        low=0,
        high=1024,
    )
    match: str = knob(
        "next",
        "patch that position t is aligned with: next: patch t, whose token it predicts [L]; input: patch t - 1, whose "
        "token it reads, without the class position and the last patch",
        choices=("next", "input"),
    )
    projector_dim: int = knob(2048, "hidden width of the projector to the encoder's width [L]", low=1, high=65536)
    width: int = knob(
        0, "width of the encoder's features; 0: that of the shards, or of repa.encoder", low=0, high=65536
    )
    encoder: str = knob(
        "",
        "encoder of the features: efflite0, dinov2, dinov3 or module:function; stored ones of another are refused; empty: any",
    )
    encoder_weights: str = knob(
        "",
        "weights file of the encoder: stored features made with another file are refused; empty: not compared, or none",
    )
    online: bool = knob(False, "compute the features in training, from repa.pictures, instead of reading stored ones")
    pictures: str = knob("", "online: the folder, tar or s3:// prefix of images that the shards were made from")
    feature_pool: bool = knob(
        False, "online: average the patches of an encoder whose grid is a multiple of the tokens'"
    )

    @property
    def active(self) -> bool:
        """Whether the loss is computed, so that the student has a projector and the batches have features."""
        return self.enabled and self.weight > 0

    def block_of(self, n_layer: int) -> int:
        """The aligned block of a network of ``n_layer`` blocks, counted from 1."""
        return self.block or max(1, n_layer // 3)

    def patches(self, tokens: int) -> int:
        """Aligned positions of a sequence of ``tokens`` image tokens."""
        return tokens if self.match == "next" else tokens - 1
