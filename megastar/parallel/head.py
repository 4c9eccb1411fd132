"""The output head and the embedding of the codes, full or factorised (model/layers.py, model/factorised.py): the shapes of
their weights, the memory of their loss, their operations. D width, F SwiGLU width, V codes."""

from __future__ import annotations

import math

from megastar.config.rules.model import tensor_parallel_degrees
from megastar.config.rules.problem import words
from megastar.config.schema import ModelConfig
from megastar.errors import UserError
from megastar.parallel.plan import chunk_rows

Shapes = dict[str, tuple[int, ...]]
OUTPUT = "transformer.output."  # begins the names of the head's weights


def embedding_shapes(m: ModelConfig) -> Shapes:
    """The table of the codes, or one per sub-code."""
    if m.head == "full":
        return {"transformer.tok_embeddings.weight": (m.vocab_size, m.dim)}
    return {f"transformer.tok_embeddings.tables.{i}.weight": (n, m.dim) for i, n in enumerate(m.head_factors)}


def head_shapes(m: ModelConfig) -> Shapes:
    """The output layer, or one per sub-code and what is between them."""
    D, F = m.dim, m.ffn_dim
    if m.head == "full":
        return {OUTPUT + "weight": (m.vocab_size, D)}
    shapes: Shapes = {f"{OUTPUT}heads.{i}.weight": (n, D) for i, n in enumerate(m.head_factors)}
    for i, n in enumerate(m.head_factors[:-1]):
        mixer = {"code": (n, D), "norm": (D,), "w1": (F, D), "w3": (F, D), "w2": (D, F), "out_norm": (D,)}
        shapes |= {f"{OUTPUT}mixers.{i}.{name}.weight": shape for name, shape in mixer.items()}
    return shapes


def head_products(m: ModelConfig) -> int:
    """Elements of the head's weights that multiply each token."""
    matrices = [n for n, s in head_shapes(m).items() if len(s) == 2 and not n.endswith(".code.weight")]
    return sum(math.prod(head_shapes(m)[n]) for n in matrices)


def logits_per_token(m: ModelConfig, tensor: int) -> int:
    """Logits of a token on one tensor rank: a factorised head is replicated."""
    return m.vocab_size // tensor if m.head == "full" else sum(m.head_factors)


def head_bytes(m: ModelConfig, sequences: int, tensor: int, dtype: str) -> tuple[int, int]:
    """(what the loss keeps for the backward pass: the gradients of the logits' inputs and weights; its temporary memory)."""
    rows = sequences * m.image_tokens
    if m.head == "full":
        return _loss_bytes(m.dim, m.vocab_size // tensor, rows, dtype)
    each = [_loss_bytes(m.dim, size, rows, dtype) for size in m.head_factors]
    e, D, F = 2 if dtype == "bf16" else 4, m.dim, m.ffn_dim
    # A mixer: both norms' input and output and 1 / rms in fp32, the SwiGLU's operands, the sub-codes (int64).
    mixer = rows * (2 * (2 * e * D + 4) + 4 * e * F + 8)
    gradients = rows * e * (D + 2 * F)  # of a SwiGLU's operands and of the state
    return sum(kept for kept, _ in each) + (len(each) - 1) * mixer, max(gradients, *(most for _, most in each))


def _loss_bytes(D: int, V: int, rows: int, dtype: str) -> tuple[int, int]:
    """(gradients kept by the loss, its temporary memory): parallel/cross_entropy.py.

    Temporary: a chunk of logits, in their type and in fp32 (twice: torch widens bf16 first on a CPU); or a chunk of
    their gradient with its part of the weight's; or, in the backward pass, both gradients again, scaled.
    """
    e = 2 if dtype == "bf16" else 4
    size = chunk_rows(rows, V)
    wide = e if size >= rows else 4  # of the weight's gradient, summed over chunks
    kept = rows * D * e + V * D * wide
    chunk = size * V * (e + 4 + (4 if e < 4 else 0))
    temporary = (
        chunk - (kept - rows * D * e if size >= rows else 0),
        size * V * e + V * D * e,
        rows * D * e + V * D * (e if wide == e else wide + e),
    )
    return kept, max(temporary)


def check_tensor(model: ModelConfig, tensor: int) -> None:
    """Raises ``UserError`` if the degree does not divide heads, ffn width and the vocabulary of a full head; lists the
    valid degrees."""
    valid = tensor_parallel_degrees(model)
    if tensor not in valid:
        divided = [f"{model.n_head} heads", f"the ffn width {model.ffn_dim}"]
        divided += [f"{model.vocab_size} codes"] if model.head == "full" else []
        raise UserError(
            f"tensor parallel degree {tensor}: must divide {', '.join(divided[:-1])} and {divided[-1]}; use {words(valid)}"
        )
