"""CUDA graphs of whole sampling steps, on the null GPU: captured once a position, without a synchronization, in one pool."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.nullgpu import device
from tests.nullgpu.test_commands import ROOT

pytestmark = pytest.mark.nullgpu

SCRIPT = """
import json, sys
import torch
from megastar.config.schema import ModelConfig
from megastar.model.transformer import Transformer
from megastar.sampling.decoder import StepGraphs
from megastar.sampling.options import SamplingOptions
from megastar.sampling.sampler import Sampler, sample_seeds

graphs, passes = sys.argv[1] == "graphs", int(sys.argv[2])
T, batch = 64, 32
found = {"captures": 0, "replays": []}

class Graph(torch.cuda.CUDAGraph):
    def capture_begin(self, *args, **kwargs):
        found["captures"] += 1
        super().capture_begin(*args, **kwargs)

    def replay(self):
        found["replays"][-1] += 1
        super().replay()

def without_synchronization(method):
    def checked(self, position):
        if position or method is capture:  # the first step creates constants
            torch.cuda.set_sync_debug_mode("error")
        try:
            method(self, position)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return checked

call, capture = StepGraphs.__call__, StepGraphs._capture
torch.cuda.CUDAGraph = Graph
StepGraphs.__call__, StepGraphs._capture = without_synchronization(call), without_synchronization(capture)
model = Transformer(ModelConfig(n_layer=4, n_head=4, dim=256, image_tokens=T)).to("cuda", torch.bfloat16)
options = SamplingOptions(cfg_scale=2.0, cfg_interval=40, temperature=0.9, top_k=100, top_p=0.9)
sampler = Sampler(model, options, batch, passes=passes, cuda_graphs=graphs)
start = torch.cuda.memory_allocated()
torch.cuda.reset_peak_memory_stats()
for count in (batch, batch, batch - 3):
    found["replays"].append(0)
    codes = sampler.draw(torch.arange(count), sample_seeds(0, count))
    assert codes.shape == (count, T) and codes.device.type == "cpu"
    found.setdefault("kept", []).append(torch.cuda.memory_allocated() - start)
found["peak"] = torch.cuda.max_memory_allocated() - start
found["pools"] = len({g.pool() for g in sampler.graphs.graphs.values()}) if graphs else 0
found["logits"] = 2 * batch * 16384 * 2
print(json.dumps(found))
"""


def sample(kind: str, passes: int) -> dict:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **device.environment()}
    env["PYTHONPATH"] = f"{device.HERE / 'site'}{os.pathsep}{ROOT}"
    command = [sys.executable, "-c", SCRIPT, kind, str(passes)]
    done = subprocess.run(command, cwd=ROOT, env=env, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("passes", [1, 2])
def test_each_position_is_captured_once_and_the_graphs_share_their_memory(passes: int) -> None:
    found, plain = sample("graphs", passes), sample("none", passes)
    assert plain["captures"] == 0
    assert found["captures"] == 64 and found["pools"] == 1
    assert found["replays"] == [0, 64, 64]  # a smaller last batch runs in the same graphs
    # 64 graphs together keep less than the logits of one step, and need no more memory than steps without graphs.
    assert max(found["kept"]) < max(plain["kept"]) + found["logits"]
    assert found["peak"] < plain["peak"] + found["logits"]
