"""The benchmarks run to their last line at a size that takes seconds. Their times there mean nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import forker
from tests.stand_in.llamagen import write_checkout

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "attention": ("--repeats 1 --blocks 1 --batch 1", "masked / plain causal"),
    "checkpoint_save": ("--ranks 2 --size nano --repeats 1", "megastar, until complete and hashed"),
    "compile_check": ("--size nano --batch 1 --steps 2", "speed-up"),
    "convert": ("--tiny", '"to": "checkpoint"'),
    "cold_start": ("--repeats 1", "no torch"),
    "ema_update": ("--ranks 2 --size nano --repeats 1", "EMA on the shards"),
    "first_batch": ("--shards 2 --megabytes 0.1 --window 1 --batch 8 --repeats 1", "S3, empty cache"),
    "guard_cost": ("--row --batch 2 --repeats 1", "mean with a row"),
    "loader": ("--samples 200 --shard 50 --batch 8 --seconds 0.1 --repeats 1 --only plain,packed", "megastar, packed"),
    "llamagen_parity": ("--tiny --image 32", "VQ-8: LlamaGen loads all weights after the reverse conversion"),
    "loss_head": ("--rows 64 --dim 32 --vocabulary 256 --repeats 1", "megastar: chunks"),
    "optimizer.muon_step": ("--tiny", "Muon"),
    "evaluation/parallel_decoding": ("--tiny", "4 steps, cosine"),
    "parallel_step": ("--ranks 2 --tiny", "zero3, tensor 2 x data 1"),
    "pretokenize": ("--tiny", "codes: 40 of 40 equal, 0 ties"),
    "sampling": ("--tiny", "LlamaGen generate"),
    "tokenizer/ranks": ("--tiny", "two ranks / one ="),
    "vocab_parallel": ("--ranks 2 --size nano --rows 16 --repeats 1", "vocabulary-parallel"),
}
RANKED = ("checkpoint_save", "guard_cost", "parallel_step", "vocab_parallel")  # ema_update starts its ranks itself
PEERS = ("llamagen_parity", "pretokenize", "sampling")  # compare with LlamaGen: here with a stand-in


@pytest.mark.long
@pytest.mark.parametrize("name", TINY)
def test_the_benchmark_runs(name, tmp_path):
    words, last = TINY[name]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if name in PEERS:
        environment["LLAMAGEN_DIR"] = str(write_checkout(tmp_path))
    module = name in ("convert", "optimizer.muon_step", *PEERS)  # these import from other benchmarks or tests
    script = ["-m", f"benchmarks.{name}"] if module else [str(ROOT / f"benchmarks/{name}.py")]
    ranks = 2 if name in RANKED else 0
    done = forker.run([*script, *words.split()], environment, ranks, timeout=300)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert last in done.stdout
