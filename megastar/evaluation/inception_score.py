"""Inception Score (Salimans et al. 2016): exp of the mean KL divergence of p(class | image) from p(class)."""

from __future__ import annotations

import torch
from torch import Tensor


def inception_score(logits: Tensor, split: int = 5000) -> tuple[float, float]:
    """Logits (N, C), in the order of sampling -> mean and standard deviation over consecutive splits, in float64.

    As in ADM's evaluator: splits of 5,000, logits without the bias, and a shorter last split has the same weight.
    """
    scores = []
    for part in logits.split(split):
        log_p = part.double().log_softmax(1)
        log_q = (log_p.logsumexp(0) - torch.tensor(len(part), dtype=torch.float64).log()).to(log_p)
        scores.append((log_p.exp() * (log_p - log_q)).sum(1).mean().exp())
    stacked = torch.stack(scores)
    return stacked.mean().item(), stacked.std(correction=0).item()
