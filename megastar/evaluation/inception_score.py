"""Inception Score (Salimans et al. 2016): exp of the mean KL divergence of p(class | picture) from p(class)."""

from __future__ import annotations

import torch
from torch import Tensor


def inception_score(logits: Tensor, split: int = 5000) -> tuple[float, float]:
    """Logits (N, C), in the order of drawing -> mean and standard deviation over consecutive splits, in float64.

    ADM's evaluator takes splits of 5,000 and leaves the bias out of the logits. A last, shorter split counts like the
    others, as there.
    """
    scores = []
    for part in logits.split(split):
        log_p = part.double().log_softmax(1)
        log_q = (log_p.logsumexp(0) - torch.tensor(len(part), dtype=torch.float64).log()).to(log_p)
        scores.append((log_p.exp() * (log_p - log_q)).sum(1).mean().exp())
    all_of_them = torch.stack(scores)
    return all_of_them.mean().item(), all_of_them.std(correction=0).item()
