"""L_MIM: distance of the masked student's last features from the unmasked teacher's on the same tokens."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from megastar.objectives.next_token import at_least_fp32


def masked_image_loss(student_last: Tensor, teacher_last: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean cosine distance 1 - cos over all sequences and positions, in fp32; no gradient to the teacher.

    student_last, teacher_last (N, S, D): after the last block, before the final norm. Returns (scalar in 0..2, metrics).
    """
    teacher_last = at_least_fp32(teacher_last.detach())
    cosine = F.cosine_similarity(at_least_fp32(student_last), teacher_last, dim=-1)  # (N, S)
    loss = 1 - cosine.mean()
    return loss, {"loss_mim": loss.detach()}
