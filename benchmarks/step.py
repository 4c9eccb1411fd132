"""Time of a training step, compared with LlamaGen's gpt.py on the same weights and batches, interleaved in one process.

    LLAMAGEN_DIR=checkout python benchmarks/step.py --size nano --batch 32
    LLAMAGEN_DIR=checkout python benchmarks/step.py --size b --batch 2 --dtype bf16 --level engine
    python benchmarks/step.py --size nano --batch 16 --star          ST-AR compared with AR, per sequence
    LLAMAGEN_DIR=checkout python benchmarks/step.py --size b --dtype bf16 --host       CPU time of the host, on a GPU or the
                                                      null CUDA device (python tests/nullgpu/device.py benchmarks/step.py ...)

The AR step consists of forward, loss, backward, gradient clipping and AdamW on both sides. LlamaGen runs as in its
train_c2i.py: fp32 weights, autocast for bf16, torch's fused AdamW. megastar has bf16 weights and fp32 masters. ``--level
model`` excludes DeepSpeed and the average of the weights; ``--level engine`` is the step of `megastar train` on one rank,
including the average. The losses and gradients of the networks are first compared without dropout, then the first steps,
at either level: the same sequences and tokens and an equal loss, or nothing is timed. The steps are timed with the
dropout of the model size (or ``--dropout``). ``--compiled`` adds LlamaGen's network under torch.compile, which is the default
of train_c2i.py, ``--compile-blocks`` sets train.compile=on for megastar. On a CPU LlamaGen's steps run with glibc's default allocation
and the engine's with that of `megastar train` (utils/device.py), as in processes of their own. ``--tiny`` checks the script in seconds; its times mean nothing.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from common import random_batch, report, run_config, seconds
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from megastar.config.schema import RunConfig
from megastar.engine.student import Student
from megastar.engine.train_step import losses, set_schedules
from megastar.engine.zero.partitions import parameter_groups
from megastar.engine.zero.process_group import start
from megastar.engine.zero.setup import build
from megastar.utils.device import keep_freed_memory

Step = Callable[[], Tensor]
# LlamaGen's schedule: a constant learning rate.
CONSTANT = ("optim.scale_lr=false", "optim.warmup_steps=0", "optim.schedule=constant", "optim.lr=1e-4")


def llamagen(cfg: RunConfig) -> nn.Module:
    """LlamaGen's network with our configuration; class dropout is off, since the labels are already dropped."""
    root = os.environ.get("LLAMAGEN_DIR", "")
    if not (Path(root) / "autoregressive/models/gpt.py").is_file():
        sys.exit(
            f"LLAMAGEN_DIR={root!r} has no autoregressive/models/gpt.py: "
            "git clone https://github.com/FoundationVision/LlamaGen and set LLAMAGEN_DIR to the checkout"
        )
    sys.path.insert(0, root)
    from autoregressive.models.gpt import ModelArgs, Transformer

    m = cfg.model
    args = ModelArgs(
        dim=m.dim, n_layer=m.n_layer, n_head=m.n_head, multiple_of=m.multiple_of, rope_base=m.rope_base,
        norm_eps=m.norm_eps, token_dropout_p=m.token_dropout_p, resid_dropout_p=m.resid_dropout_p,
        ffn_dropout_p=m.ffn_dropout_p, num_classes=m.num_classes, vocab_size=m.vocab_size, block_size=m.image_tokens,
    )  # fmt: skip
    model = Transformer(args)
    model.cls_embedding.dropout_prob = 0.0
    return model.train()


def their_step(cfg: RunConfig, model: nn.Module, batch: dict, dtype: torch.dtype, device: torch.device) -> Step:
    o, codes, labels = cfg.optim, batch["codes"][:, 0].contiguous().to(device), batch["labels"].to(device)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, o.weight_decay), lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps, fused=True
    )

    def step() -> Tensor:
        keep_freed_memory(False)  # its own process has glibc's defaults
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            _, loss = model(cond_idx=labels, idx=codes[:, :-1], targets=codes)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def our_loss(student: nn.Module, codes: Tensor, labels: Tensor) -> Tensor:
    return student(labels, codes).loss


def model_step(cfg: RunConfig, student: nn.Module, batch: dict, dtype: torch.dtype, device: torch.device) -> Step:
    """The step without DeepSpeed; in bf16 with fp32 masters."""
    o, codes, labels = cfg.optim, batch["codes"][:, 0].contiguous().to(device), batch["labels"].to(device)
    weights = list(student.parameters())
    groups = parameter_groups(student, o.weight_decay)
    masters = weights
    if dtype == torch.bfloat16:
        copies = {p: p.detach().clone() for p in weights}
        masters = list(copies.values())
        groups = [{**g, "params": [copies[p] for p in g["params"]]} for g in groups]
        student.to(dtype)
    optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps, fused=True)

    def step() -> Tensor:
        loss = our_loss(student, codes, labels)
        loss.backward()
        if masters is not weights:
            for master, p in zip(masters, weights, strict=True):
                master.grad, p.grad = p.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, o.grad_clip)
        optimizer.step()
        if masters is not weights:
            with torch.no_grad():
                torch._foreach_copy_(weights, masters)
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def engine_step(cfg: RunConfig, batch: dict, weights: dict | None = None) -> tuple[nn.Module, Step]:
    """The student's transformer, and a step of it."""
    ctx = start(cfg)
    engines = build(cfg, ctx)
    if weights:
        from megastar.engine.zero.partitions import publish_masters

        for shard in engines.shards():
            shard.view("fp32").copy_(
                weights[shard.name.removeprefix("transformer.")].flatten()[shard.start : shard.stop]
            )
        publish_masters(engines.student)
    engines.student.train()

    def step() -> Tensor:
        keep_freed_memory()  # as the engine sets it on a CPU
        loss, _ = losses(cfg, engines, ctx, batch, 0)
        engines.student.backward(loss)
        set_schedules(cfg, engines, 0, 10)
        engines.student.step()
        engines.refresh_teacher()
        return loss.detach()

    return engines.student.module.transformer, step


def first_step(net: nn.Module, step: Step) -> tuple[list[tuple[int, ...]], float]:
    """One step without dropout: the shape of each batch of tokens that ``net`` embeds, and the loss."""
    shapes: list[tuple[int, ...]] = []
    hook = net.tok_embeddings.register_forward_hook(
        lambda module, inputs, output: shapes.append(tuple(inputs[0].shape))
    )
    try:
        with without_dropout(net):
            return shapes, step().item()
    finally:
        hook.remove()


@contextmanager
def without_dropout(*nets: nn.Module) -> Iterator[None]:
    probabilities = {m: m.p for net in nets for m in net.modules() if isinstance(m, nn.Dropout)}
    for m in probabilities:
        m.p = 0.0
    yield
    for m, value in probabilities.items():
        m.p = value


def check_equal_work(firsts: dict[str, tuple[list[tuple[int, ...]], float]], tolerance: float) -> None:
    """Exit unless all have embedded the same shapes and, to ``tolerance`` of it, have the same loss."""
    (peer, (shapes, loss)), *others = firsts.items()
    for name, (own, value) in others:
        if own != shapes:
            sys.exit(f"not timed: {peer} trains on sequences x tokens {shapes}, {name} on {own}")
        if not abs(value - loss) <= tolerance * abs(loss):
            sys.exit(f"not timed: the first loss of {peer} is {loss:.6f}, of {name} {value:.6f}")
    print(
        f"first step without dropout: sequences x tokens {shapes[0]}, losses "
        + ", ".join(f"{v:.6f}" for _, v in firsts.values())
    )


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", default="nano", help="nano, b, l, xl")
    p.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    p.add_argument("--batch", type=int, default=32, help="images per step")
    p.add_argument("--level", default="model", choices=("model", "engine"))
    p.add_argument("--dropout", type=float, help="all three dropouts (default: those of the size)")
    p.add_argument("--stage", default="zero1", help="ZeRO stage for --level engine and --star")
    p.add_argument("--blocks", type=int, default=0, help="number of blocks (default: all blocks of the size)")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--star", action="store_true", help="compare ST-AR with AR, per sequence that the student processes")
    p.add_argument("--host", action="store_true", help="CPU time of the host in AR and ST-AR steps; needs a GPU")
    p.add_argument("--compiled", action="store_true", help="also time LlamaGen's network under torch.compile")
    p.add_argument(
        "--tiny", action="store_true", help="two narrow blocks, 2 images, one repeat: a check of this script"
    )
    p.add_argument("--compile-blocks", action="store_true", help="train.compile=on for megastar's engine")
    p.add_argument("--student-views", type=int, default=2, choices=(1, 2))
    a = p.parse_args()

    torch.set_num_threads(a.threads)
    drop = [f"model.{k}_dropout_p={a.dropout}" for k in ("token", "resid", "ffn")] if a.dropout is not None else []
    fewer = [f"model.n_layer={a.blocks}", f"self_guided.contrastive_block={max(1, a.blocks // 2)}"] if a.blocks else []
    if a.tiny:
        a.size, a.batch, a.repeats, a.blocks = "nano", 2, 1, 2
        fewer = [
            "model.n_layer=2",
            "self_guided.contrastive_block=1",
            "model.dim=32",
            "model.n_head=2",
            "model.vocab_size=64",
        ]
    compiled_blocks = ["train.compile=on"] if a.compile_blocks else []
    common = [
        *compiled_blocks,
        f"train.dtype={a.dtype}",
        f"train.threads={a.threads}",
        f"parallel.deepspeed={a.stage}",
        *drop,
        *fewer,
    ]
    if a.star or a.host:
        (star if a.star else host)(a, common)
        return
    cfg = run_config(a.size, *common, f"train.global_batch={a.batch}", "self_guided.enabled=false", *CONSTANT)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if a.dtype == "bf16" else torch.float32
    ctx = start(cfg)
    batch = random_batch(cfg, ctx)
    peer = llamagen(cfg).to(device)
    torch.nn.init.normal_(peer.output.weight, std=0.02)  # a head of zeros has no gradient to compare
    weights = {k: v.detach().clone() for k, v in peer.state_dict().items() if "freqs" not in k}
    student = Student(cfg).to(device).train()
    student.transformer.load_state_dict(weights)
    compare(cfg, peer, student, batch, device)
    theirs = their_step(cfg, peer, batch, dtype, device)
    net, ours = student.transformer, None
    if a.level == "model":
        ours = model_step(cfg, student, batch, dtype, device)
    else:
        net, ours = engine_step(cfg, batch, weights)
    mine, steps = f"megastar ({a.level})", {"LlamaGen": theirs}
    firsts = {}
    if a.compiled:
        copied = copy.deepcopy(peer)
        steps["LlamaGen, compiled"] = compiled = their_step(cfg, torch.compile(copied), batch, dtype, device)
    firsts["LlamaGen"] = first_step(peer, theirs)
    if a.compiled:
        with without_dropout(copied):
            firsts["LlamaGen, compiled"] = (firsts["LlamaGen"][0], compiled().item())  # it was given the same codes
    steps[mine] = ours
    firsts[mine] = first_step(net, ours)
    check_equal_work(firsts, 1e-5 if a.dtype == "fp32" else 5e-3)
    rows: dict[str, list[float]] = {name: [] for name in steps}
    last: dict[str, list[float]] = {name: [step().item()] for name, step in steps.items()}
    clock = time.process_time if a.threads == 1 and not torch.cuda.is_available() else time.perf_counter
    for _ in range(a.repeats):
        for name, step in steps.items():
            rows[name] += seconds(lambda name=name, step=step: last[name].append(step().item()), 1, clock=clock)
    blocks = f", {a.blocks} blocks" if a.blocks else ""
    title = f"AR step of {a.size}{blocks}, {a.batch} images, {a.dtype}, {device.type}, {a.threads} thread(s), dropout {cfg.model.ffn_dropout_p:g}"
    report(title, rows, "LlamaGen")
    print(f"  losses after {a.repeats + 2} steps: " + ", ".join(f"{k} {v[-1]:.4f}" for k, v in last.items()))
    for name in [n for n in rows if n != mine]:
        ratio = statistics.median(x / y for x, y in zip(rows[name], rows[mine], strict=True))
        print(f"{name} / megastar = {ratio:.2f} (median of the pairs' ratios)")


def compare(cfg: RunConfig, peer: nn.Module, student: nn.Module, batch: dict, device: torch.device) -> None:
    """Assert equal loss and gradients in fp32 without dropout, so that both sides compute the same."""
    codes, labels = batch["codes"][:, 0].contiguous().to(device), batch["labels"].to(device)
    with without_dropout(peer, student):
        _, want = peer(cond_idx=labels, idx=codes[:, :-1], targets=codes)
        got = our_loss(student, codes, labels)
        want.backward()
        got.backward()
    grads = dict(peer.named_parameters())
    worst = max(
        ((q.grad - grads[n].grad).norm() / grads[n].grad.norm()).item()
        for n, q in student.transformer.named_parameters()
    )
    assert abs(want - got) < 1e-4 and worst < 1e-3, (want, got, worst)
    print(f"equal weights, no dropout, fp32: losses {want:.6f} and {got:.6f}, gradients within {worst:.1e}")
    for net in (peer, student):
        net.zero_grad(set_to_none=True)


def star(a: argparse.Namespace, common: list[str]) -> None:
    """Compare ST-AR with AR, both through the engine.

    Forward and backward of the student cost 3 forward passes, the teacher costs 1, so the expected ratio is 4 / 3 with two
    student views. With one, the teacher's second view adds the blocks up to the contrastive one.
    """
    made = {}
    sequences = a.batch * a.student_views
    for name, images, more in (
        ("AR", sequences, ["self_guided.enabled=false"]),
        ("ST-AR", a.batch, [f"self_guided.student_views={a.student_views}"]),
    ):
        cfg = run_config(a.size, *common, f"train.global_batch={images}", *more)
        made[name] = engine_step(cfg, random_batch(cfg, start(cfg)))
    seen = {name: first_step(net, step)[0] for name, (net, step) in made.items()}
    if seen["AR"] != seen["ST-AR"] or seen["AR"][0][0] != sequences:
        sys.exit(f"not timed: the students train on sequences x tokens {seen}, {sequences} sequences are expected")
    rows: dict[str, list[float]] = {name: [] for name in made}
    for _, step in made.values():
        step()
    clock = time.process_time if a.threads == 1 and not torch.cuda.is_available() else time.perf_counter
    for _ in range(a.repeats):
        for name, (_, step) in made.items():
            rows[name] += seconds(step, 1, clock=clock)
    depth = cfg.self_guided.contrastive_block / cfg.model.n_layer
    arithmetic = (4 + (depth if a.student_views == 1 else 0)) / 3
    report(f"one step of {a.size}, {sequences} sequences, {a.dtype}, {a.threads} thread(s)", rows, "AR")
    ratio = statistics.median(y / x for x, y in zip(*rows.values(), strict=True))
    print(
        f"ST-AR / AR per sequence = {ratio:.3f}; expected from the arithmetic: {arithmetic:.3f}; quotient {ratio / arithmetic:.2f}"
    )


def host(a: argparse.Namespace, common: list[str]) -> None:
    """CPU time until a step is queued on the device, interleaved; the wait for the device is outside of it."""
    cfg = run_config(a.size, *common, f"train.global_batch={a.batch}", "self_guided.enabled=false", *CONSTANT)
    ctx, dtype = start(cfg), torch.bfloat16 if a.dtype == "bf16" else torch.float32
    assert ctx.device.type == "cuda", "--host needs a GPU or the null CUDA device"
    batch = random_batch(cfg, ctx)
    peer = llamagen(cfg).to(ctx.device)
    guided = run_config(a.size, *common, f"train.global_batch={a.batch}")
    made = {
        "LlamaGen": their_step(cfg, peer, batch, dtype, ctx.device),
        "megastar AR": engine_step(cfg, batch)[1],
        "megastar ST-AR": engine_step(guided, random_batch(guided, ctx))[1],
        "megastar AR, graph": graph_step(cfg, batch),
    }
    work = [products(made[name]) for name in ("LlamaGen", "megastar AR")]
    assert abs(work[0] / work[1] - 1) < 1e-3, (
        f"FLOPs of matrix products: LlamaGen {work[0]:.4g}, megastar {work[1]:.4g}"
    )
    rows: dict[str, list[float]] = {name: [] for name in made}
    for repeat in range(a.repeats + 3):
        for name, step in made.items():
            torch.cuda.synchronize()
            begin = time.process_time()
            step()
            if repeat >= 3:
                rows[name].append(time.process_time() - begin)
    report(f"host: a step of {a.size}, {a.batch} images, {a.dtype}, {a.stage}, CPU time", rows, "LlamaGen")


def products(step: Step) -> int:
    """FLOPs of the matrix products of one step, without those of attention."""
    with FlopCounterMode(display=False) as counter:
        step()
    return sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) in ("aten.mm", "aten.addmm"))


def graph_step(cfg: RunConfig, batch: dict) -> Step:
    """A trial: forward and backward pass as one CUDA graph, at stage 1 with one data rank; the optimizer's step is eager."""
    ctx = start(cfg)
    engines = build(cfg, ctx)
    engine, zero = engines.student, engines.student.optimizer
    engine.train()
    batch = batch | {k: batch[k].to(ctx.device) for k in ("codes", "labels")}

    def forward_backward() -> None:
        engine.backward(losses(cfg, engines, ctx, batch, 0)[0])

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            forward_backward()
            engine.step()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        forward_backward()
    weights = list(engine.module.parameters())
    grads = [p.grad for p in weights]

    def step() -> Tensor:
        graph.replay()
        for p, grad in zip(weights, grads, strict=True):
            p.grad = grad
        zero.reduce_gradients()
        set_schedules(cfg, engines, 0, 10)
        engine.step()
        return torch.zeros(())

    return step


if __name__ == "__main__":
    main()
