"""The fields of the section self_guided."""

from __future__ import annotations

from dataclasses import dataclass

from megastar.config.knob import LARGE, knob


@dataclass
class SelfGuidedConfig:
    """The ST-AR objectives. ``enabled: false`` is the LlamaGen baseline: next-token loss only, no mask, no teacher."""

    enabled: bool = knob(True, "self-guided training; false is the AR baseline")
    alpha: float = knob(1.0, "weight of the masked-image loss [P]", low=0, high=LARGE)
    beta: float = knob(0.5, "weight of the mean of the two contrastive losses [P]", low=0, high=LARGE)
    mask_ratio: float = knob(0.25, "share of the T - 1 image-token keys hidden from the student [P]", low=0, below=1)
    views: int = knob(2, "crops M of an image per step [P]; distinct stored crops [C]", low=1, high=1024)
    baseline_views: int = knob(
        1,
        "crops of an image per step, each a sequence, when enabled is false; 2: control for twice as many sequences",
        low=1,
        high=1024,
    )
    student_views: int = knob(
        2, "views that the student processes, 1 or 2; the paper has 2 in its text, 1 in its figure [C]", choices=(1, 2)
    )
    contrastive_block: int = knob(
        6, "block, counted from 1, whose output feeds the contrastive losses [P: B 6, L 18, XL 18]", low=1, high=1024
    )
    positions: int = knob(
        4,
        "positions K drawn once per step, shared by the batch and the views [P]; never that of the class [C]",
        low=1,
        high=65536,
    )
    temperature: float = knob(0.2, "tau of both InfoNCE losses [C]", above=0, high=LARGE)
    projector_dim: int = knob(2048, "hidden width of the student's projector [C]", low=1, high=65536)
    step_loss: bool = knob(True, "contrastive loss between positions (L_step); false: ablation")
    view_loss: bool = knob(True, "contrastive loss between views (L_view); false: ablation")
    negatives: str = knob(
        "auto",
        "images that an anchor is compared with: global_batch, all of the step, however it is cut; micro_batch, those of "
        "one forward pass of all data ranks; auto: what the run folder has (before this field: micro_batch), else global_batch",
        choices=("auto", "global_batch", "micro_batch"),
    )
    share_label_drop: bool = knob(True, "drop the same class labels in teacher and student [C]")
    teacher_decay: float = knob(0.9999, "EMA decay of the teacher [P]", low=0, high=1)
    teacher_warmup: bool = knob(False, "use the decay min(teacher_decay, (1+t)/(10+t)), for short runs [C]")

    @property
    def sequences(self) -> int:
        """Crops of an image that the student processes per step."""
        return self.student_views if self.enabled else self.baseline_views
