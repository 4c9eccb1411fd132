"""Losses of compiled and eager blocks over many steps; run this before enabling `train.compile`.

    python benchmarks/compile_check.py --size nano --batch 8 --steps 200

With some torch releases, LlamaGen's compiled network trained worse (pytorch issue 113180). Two students with equal weights
are trained on the same batches, with hidden keys in every other step; the script prints the difference of their losses and
the ratio of their times. Dropout is off, because compiled and eager code draw different random numbers. Batches are drawn
from a fixed random Markov chain, so that the loss can fall. A third student, eager, starts from weights that differ in the
last digit: its difference shows the effect of rounding.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
from common import run_config
from torch import Tensor

from megastar.engine.student import Student
from megastar.engine.zero.compiled_blocks import compile_blocks
from megastar.engine.zero.partitions import AdamWEMA, parameter_groups
from megastar.model.masks import MaskSpec, draw_hidden
from megastar.utils.device import pick_dtype


def chain(vocabulary: int, batch: int, tokens: int, g: torch.Generator) -> Tensor:
    """Sequences (batch, tokens) in which each code has 8 successors."""
    successors = torch.randint(0, vocabulary, (vocabulary, 8), generator=torch.Generator().manual_seed(0))
    out = [torch.randint(0, vocabulary, (batch,), generator=g)]
    for _ in range(tokens - 1):
        out.append(successors[out[-1], torch.randint(0, 8, (batch,), generator=g)])
    return torch.stack(out, 1)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", default="nano")
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--steps", type=int, default=200)
    p.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"), help="bf16: autocast around fp32 weights")
    p.add_argument("--lr", type=float, default=1e-3)
    a = p.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    off = [f"model.{k}_dropout_p=0" for k in ("token", "resid", "ffn")]
    cfg = run_config(a.size, "self_guided.enabled=false", *off)
    m = cfg.model
    torch.manual_seed(0)
    eager = Student(cfg).to(device)
    compiled = copy.deepcopy(eager)
    compile_blocks(compiled.transformer)
    control = copy.deepcopy(eager)
    with torch.no_grad():
        for weight in control.parameters():
            weight.mul_(1 + 1e-7 * torch.randn_like(weight))
    sides = []
    for student in (eager, compiled, control):
        student.train()
        sides.append((student, AdamWEMA(parameter_groups(student, 0.05), lr=a.lr, betas=(0.9, 0.95))))
    g, losses, times = torch.Generator().manual_seed(1), ([], [], []), ([], [], [])
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    for step in range(a.steps):
        codes = chain(m.vocab_size, a.batch, m.image_tokens, g).to(device)
        labels = torch.randint(0, m.num_classes, (a.batch,), generator=g).to(device)
        ids = torch.arange(a.batch) + step * a.batch
        hidden = draw_hidden(0, torch.zeros_like(ids), ids, m.image_tokens, 0.25).to(device)
        for i, (student, optimizer) in enumerate(sides):
            start = clock()
            mask = MaskSpec.hidden(hidden) if step % 2 else None
            with torch.autocast(device.type, torch.bfloat16, enabled=pick_dtype(a.dtype, device) == torch.bfloat16):
                loss = student(labels, codes, mask=mask).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses[i].append(loss.item())
            times[i].append(clock() - start)
    one, two, three = (torch.tensor(x, dtype=torch.float64) for x in losses)
    apart, tail = (one - two).abs(), max(1, a.steps // 10)
    print(f"{a.steps} steps of {a.size}, {a.batch} images, {a.dtype}, {device.type}, torch {torch.__version__}")
    print(f"  eager loss    {one[0]:.4f} -> {one[-tail:].mean():.5f} (mean of the last {tail})")
    print(f"  compiled loss {two[0]:.4f} -> {two[-tail:].mean():.5f}")
    print(f"  difference: at most {apart.max():.2e}, mean of the last {tail} steps {apart[-tail:].mean():.2e}")
    print(
        f"  control (eager, weights perturbed by 1e-7): loss {three[-tail:].mean():.5f}, "
        f"difference at most {(one - three).abs().max():.2e}"
    )
    medians = [statistics.median(x[len(x) // 4 :]) for x in times]
    print(f"compiled: {medians[1]:.3f} s per step, eager: {medians[0]:.3f} s, speed-up {medians[0] / medians[1]:.2f}")


if __name__ == "__main__":
    main()
