"""The tensor-parallel table: which weights it splits, and that the split layers add up to the whole one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megastar.config.rules.model import tensor_parallel_degrees
from megastar.config.schema import ModelConfig
from megastar.model.projector import Projector
from megastar.model.rope import rope_table
from megastar.model.transformer import Transformer
from megastar.parallel.collectives import gather_rows
from megastar.parallel.cross_entropy import linear_cross_entropy
from megastar.parallel.plan import CHUNK, TENSOR_PLAN, Split, chunk_rows, split_of

CONFIGS = Path(__file__).parents[3] / "configs" / "model"
TINY = ModelConfig(n_layer=2, n_head=4, dim=16, multiple_of=8, vocab_size=12, num_classes=5, image_tokens=9)


def matches(name: str) -> list[Split]:
    return [split for split in TENSOR_PLAN if re.match(split.pattern, name)]


@pytest.mark.parametrize("prefix", ["", "transformer.", "module.student."])
def test_each_weight_is_named_at_most_once(prefix: str) -> None:
    model = nn.ModuleDict({"transformer": Transformer(TINY), "projector": Projector(16, 32)})
    split = {name for name, _ in model.named_parameters() if matches(prefix + name)}
    for name in split:
        assert len(matches(prefix + name)) == 1
    inside = ("wqkv", "wo", "w1", "w2", "w3")
    want = {n for n, _ in model.named_parameters() if "layers." in n and n.split(".")[-2] in inside}
    assert split == want | {"transformer.output.weight"}


def sharded(module: nn.Module, prefix: str, rank: int, degree: int) -> dict[str, Tensor]:
    return {n: matches(prefix + n)[0].cut(p, degree, rank) for n, p in module.named_parameters()}


@pytest.mark.parametrize("degree", tensor_parallel_degrees(TINY))
def test_parts_add_up(degree: int) -> None:
    torch.manual_seed(0)
    model = Transformer(TINY).double().eval()
    nn.init.normal_(model.output.weight)
    block = model.layers[1]
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    rope = rope_table(3, 4, 10000.0, x.device, torch.float64)[:9]

    def parts(module: nn.Module, prefix: str, **kwargs: Tensor) -> list[Tensor]:
        return [
            torch.func.functional_call(module, sharded(module, prefix, rank, degree), (x,), kwargs)
            for rank in range(degree)
        ]

    torch.testing.assert_close(
        sum(parts(block.attention, "layers.1.attention.", rope=rope)), block.attention(x, rope=rope)
    )
    torch.testing.assert_close(sum(parts(block.feed_forward, "layers.1.feed_forward.")), block.feed_forward(x))
    torch.testing.assert_close(torch.cat(parts(model.output, "output."), -1), model.output(x))


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_cut_parts_join_to_the_whole(degree: int) -> None:
    for name, p in Transformer(TINY).named_parameters():
        if split := split_of("transformer." + name):
            parts = [split.cut(p, degree, r) for r in range(degree)]
            assert all(tuple(part.shape) == split.local_shape(p.shape, degree) for part in parts)
            assert torch.equal(split.join(parts), p)
    # Each rank has its heads of q, of k and of v, not the first rows of all.
    qkv = torch.arange(12.0)[:, None].expand(12, 2)
    assert split_of("layers.0.attention.wqkv.weight").cut(qkv, 2, 1)[:, 0].tolist() == [2, 3, 6, 7, 10, 11]
    assert split_of("tok_embeddings.weight") is None and split_of("norm.weight") is None


def problem(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden (23, 12), weight (20, 12), targets (23,); logits of some tens."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 12, dtype=torch.float64, generator=g) * 4 for n in (23, 20))
    return hidden.to(dtype), weight.to(dtype), torch.randint(0, 20, (23,), generator=g)


def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, scale: float) -> list[torch.Tensor]:
    """Loss and gradients by torch in fp64."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    loss = torch.nn.functional.cross_entropy(hidden @ weight.t(), targets)
    return [loss.detach(), *torch.autograd.grad(loss * scale, (hidden, weight))]


@pytest.mark.parametrize("chunk", [20, 60, 200, 1 << 20])  # logits: 1, 3, 8, 23 rows
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_chunked_cross_entropy(chunk: int, dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setitem(CHUNK, "cpu", chunk)
    hidden, weight, targets = problem(dtype)
    want = plain(hidden, weight, targets, 3)
    hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets)
    (loss * 3).backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for got, wanted in zip((loss, hidden.grad, weight.grad), want, strict=True):
        assert (got.double() - wanted).norm() <= close * wanted.norm()
    assert hidden.grad.dtype == weight.grad.dtype == dtype
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, targets), loss)
    frozen = weight.detach()
    (alone,) = torch.autograd.grad(linear_cross_entropy(hidden, frozen, targets) * 3, hidden)
    assert torch.equal(alone, hidden.grad)


def test_chunks_are_alike_and_bounded() -> None:
    assert chunk_rows(2048, 16384, "cpu") == 512 and chunk_rows(100, 16384, "cpu") == 100
    assert chunk_rows(513, 16384, "cpu") == 257 and chunk_rows(1, 1 << 30, "cpu") == 1
    assert chunk_rows(64 * 256 * 2, 16384, "cuda") == 4096


@pytest.mark.parametrize("split", [False, True])
def test_logits_in_memory_are_bounded_for_a_large_vocabulary(split: bool) -> None:
    """V = 2^18: no tensor of forward and backward is larger than a chunk, with the whole vocabulary or a rank's share."""
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                largest = max(largest, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
            return out

    rows, codes = 48, 1 << 18  # 1.5 chunks of 2^23 logits
    hidden, weight = torch.randn(rows, 2, requires_grad=True), torch.randn(codes, 2, requires_grad=True)
    targets = torch.randint(0, codes, (rows,))
    if split:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with Sizes():
            loss = linear_cross_entropy(hidden, weight, targets, dist.group.WORLD if split else None)
            loss.backward()
    finally:
        if split:
            dist.destroy_process_group()
    assert rows * codes // 2 <= largest <= CHUNK["cpu"]
    wanted = torch.nn.functional.cross_entropy(hidden.detach() @ weight.detach().t(), targets)
    torch.testing.assert_close(loss.detach(), wanted)


def cross_entropy_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4)
    for dtype, close in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        for chunk in (15, 1 << 20):
            CHUNK["cpu"] = chunk
            hidden, weight, targets = problem(dtype)
            loss, to_hidden, to_weight = plain(hidden, weight, targets, 3)
            mine = weight.chunk(4)[rank].clone().requires_grad_()
            got = linear_cross_entropy(hidden.requires_grad_(), mine, targets, dist.group.WORLD)
            (got * 3).backward()
            wanted = (loss, to_hidden, to_weight.chunk(4)[rank])
            for value, want in zip((got, hidden.grad, mine.grad), wanted, strict=True):
                assert (value.double() - want).norm() <= close * want.norm(), (dtype, chunk)
    dist.destroy_process_group()


@pytest.mark.dist
def test_vocabulary_parallel_cross_entropy(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(cross_entropy_worker, (str(tmp_path),), nprocs=4)


@pytest.mark.parametrize(
    ("name", "degrees"),
    [("b", [1, 2, 4]), ("l", [1, 2, 4, 8, 16]), ("xl", [1, 2, 4]), ("xxl", [1, 2, 4, 8]), ("3b", [1, 2, 4, 8, 16, 32])],
)
def test_tensor_parallel_degrees(name: str, degrees: list[int]) -> None:
    assert tensor_parallel_degrees(ModelConfig(**yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()))) == degrees


def test_tensor_parallel_degrees_look_at_heads_ffn_and_vocabulary() -> None:
    base = ModelConfig(n_head=12, dim=768, multiple_of=256, vocab_size=12)
    assert tensor_parallel_degrees(base) == [1, 2, 4]  # 2048 is no multiple of 3
    assert tensor_parallel_degrees(ModelConfig(n_head=12, dim=720, multiple_of=12, vocab_size=24)) == [
        1,
        2,
        3,
        4,
        6,
        12,
    ]
    assert tensor_parallel_degrees(ModelConfig(n_head=12, dim=720, multiple_of=12, vocab_size=9)) == [1, 3]


def test_gather_without_a_group_is_the_tensor_itself() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    got = gather_rows(x)
    assert torch.equal(got, x) and not got.requires_grad


def gather_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    x = (torch.arange(6.0).view(3, 2) + 100 * rank).requires_grad_()
    got = gather_rows(x.t().contiguous().t(), dist.group.WORLD)  # not contiguous
    want = torch.cat([torch.arange(6.0).view(3, 2) + 100 * r for r in range(2)])
    assert torch.equal(got, want) and not got.requires_grad
    assert torch.equal(gather_rows(x.bfloat16(), dist.group.WORLD), want.bfloat16())
    alone = [dist.new_group([r]) for r in range(2)][rank]
    assert torch.equal(gather_rows(x, alone), x)
    dist.destroy_process_group()


@pytest.mark.dist
def test_gather_keeps_rank_order(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(gather_worker, (str(tmp_path),), nprocs=2)
