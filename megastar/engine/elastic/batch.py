"""How many of the available ranks a run uses, and its micro-batch on them. The global batch never changes."""

from __future__ import annotations

from megastar.config.load import resolve_batch
from megastar.config.rules.problem import divisors
from megastar.config.schema import RunConfig
from megastar.errors import UserError
from megastar.run_dir.training_checks import compares_one_pass


def usable_ranks(global_batch: int, tensor: int, ranks: int) -> int:
    """The largest number of ``ranks`` that the tensor-parallel degree and the global batch allow; 0 if they allow no rank."""
    return max((d for d in divisors(global_batch) if d * tensor <= ranks), default=0) * tensor


def fit_batch(cfg: RunConfig, ranks: int, planned: int) -> tuple[int, int]:
    """(ranks to use, ``train.micro_batch`` on them) if ``ranks`` of ``planned`` ranks are available.

    Fewer ranks accumulate more micro-batches, no larger than on the planned ranks, so that they fit the same memory. The
    contrastive losses of ``self_guided.negatives = micro_batch`` compare the images of one forward pass: with
    ``train.micro_batch = 0`` these stay one pass.
    """
    t, tensor = cfg.train, cfg.parallel.tensor_parallel
    most = usable_ranks(t.global_batch, tensor, planned)
    use = usable_ranks(t.global_batch, tensor, min(ranks, planned))
    if not use:
        raise UserError(
            f"{ranks} rank(s) cannot hold parallel.tensor_parallel = {tensor}: start more ranks per node, or more nodes"
        )
    if not t.micro_batch and compares_one_pass(cfg.self_guided):
        return use, 0
    limit, _ = resolve_batch(t, tensor, most)
    return use, max(d for d in divisors(t.global_batch // (use // tensor)) if d <= limit)
