"""The student, transformer and projectors in one module for one DeepSpeed engine. The teacher is a transformer only."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from megastar.config.schema import RunConfig
from megastar.model.masks import MaskSpec
from megastar.model.projector import Projector
from megastar.model.token_order import Placement
from megastar.model.transformer import Transformer
from megastar.objectives.alignment import output_positions
from megastar.objectives.self_guided import rows_at
from megastar.parallel.alignment import encoder_width
from megastar.run_dir.training_checks import uses_contrastive


class StudentOutput(NamedTuple):
    loss: Tensor  # mean next-token cross-entropy in nats, N = B * student views sequences
    last: Tensor | None  # (N, T, D) before the final norm
    anchors: Tensor | None  # (N, K, D) projected features at the drawn positions
    aligned: Tensor | None = None  # (N, P, C) features projected to the encoder's width, of the aligned positions


class Student(nn.Module):
    """``student.transformer`` has LlamaGen's weight names; ``student.projector`` exists when self-guided,
    ``student.repa_projector`` under representation alignment."""

    def __init__(self, cfg: RunConfig):
        super().__init__()
        guided = cfg.self_guided
        self.transformer = Transformer(cfg.model)
        self.block, self.checkpointing = guided.contrastive_block, cfg.parallel.activation_checkpointing
        self.contrastive = uses_contrastive(guided)
        if self.contrastive:
            self.projector = Projector(cfg.model.dim, guided.projector_dim)
        self.repa_block, self.repa_match = cfg.repa.block_of(cfg.model.n_layer), cfg.repa.match
        if cfg.repa.active:  # last, so that the other weights are drawn as without it
            self.repa_projector = Projector(cfg.model.dim, cfg.repa.projector_dim, encoder_width(cfg.repa))

    def forward(
        self,
        labels: Tensor,
        tokens: Tensor,
        mask: MaskSpec | None = None,
        positions: Tensor | None = None,
        placement: Placement | None = None,
        align: bool = False,
    ) -> StudentOutput:
        """labels (N,), tokens (N, T), in the order of ``placement`` where it is given; positions (K,), or (N, K) of each
        sequence, or None for plain next-token prediction; ``align``: project the features of the aligned positions."""
        positions = positions if self.contrastive else None
        block = self.block if positions is not None else None
        out = self.transformer(
            labels, tokens[:, :-1], mask, features_at=block, checkpointing=self.checkpointing, targets=tokens,
            aligned_at=self.repa_block if align else None, placement=placement,
        )  # fmt: skip
        anchors = None if positions is None else self.projector(rows_at(out.features, positions))
        aligned = self.repa_projector(output_positions(out.aligned, self.repa_match)) if align else None
        return StudentOutput(out.loss, out.last, anchors, aligned)
