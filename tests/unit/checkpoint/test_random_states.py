"""The random states that `megastar convert --to checkpoint` writes for other data ranks."""

from __future__ import annotations

import sys

import pytest
import torch

from megastar.checkpoint import convert
from megastar.checkpoint.rng_state import random_file
from megastar.config.knob import MOST_SEED
from tests.checkpoints import write_checkpoint
from tests.dist.reference import config
from tests.unit.checkpoint.test_convert import step_of


@pytest.mark.parametrize("seed", [0, 2**31, 92_233_720_368, 2**62 + 12_345, MOST_SEED])
def test_every_allowed_seed_has_random_states(tmp_path, seed):
    write_checkpoint(tmp_path / "run", config(data={"shards": "codes"}, train={"seed": seed}), 2, 1)
    convert.convert(tmp_path / "run", "checkpoint", tmp_path / "out", data=4)
    for d in range(4):
        file = step_of(tmp_path / "out") / random_file(d)
        number = ((seed * 1_000_003 + 3) * 100_003 + d) % 2**64
        state = torch.load(file, weights_only=True)
        assert bytes(state["cuda"].tolist()) == number.to_bytes(8, sys.byteorder) + bytes(8)
        assert torch.equal(state["torch"], torch.Generator().manual_seed(number).get_state())
        if number < 2**63:  # the bytes of earlier versions
            old = tmp_path / "old" / file.name
            old.parent.mkdir(exist_ok=True)
            torch.save({"torch": state["torch"], "cuda": torch.tensor([number, 0]).view(torch.uint8)}, old)
            assert file.read_bytes() == old.read_bytes()
