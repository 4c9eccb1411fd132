"""The Triton kernels on the CPU, in Triton's interpreter, against fp64: the environment must hold TRITON_INTERPRET=1.

TRITON_INTERPRET=1 python tests/interpreted.py '[["hidden", 176, 64, "float32"], ...]'        one line of JSON a case
"""

from __future__ import annotations

import json
import sys

import torch

from megastar.model.kernels import triton as ours
from megastar.model.kernels.check import draw, errors, exact_attention, example, results

if __name__ == "__main__":
    torch.set_num_threads(1)
    for which, size, head_dim, dtype in json.loads(sys.argv[1]):
        spec = example(which, 2, size)
        inputs = draw(2, 1, size, head_dim, getattr(torch, dtype), torch.device("cpu"))
        inputs[3] = inputs[3] if size % 64 else inputs[3][..., :1].expand(inputs[3].shape)  # a gradient of stride 0
        exact = results(exact_attention, [t.double() for t in inputs], spec)
        print(json.dumps(errors(ours.attention, inputs, spec, exact)), flush=True)
