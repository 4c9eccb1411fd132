"""DeepSpeed's universal format, written without DeepSpeed (layout: deepspeed/checkpoint/ds_to_universal.py, 0.19.8).

OUT/latest_universal                          the tag, global_step400
OUT/global_step400/zero/NAME/fp32.pt          {"param": whole tensor, fp32}; also exp_avg.pt, exp_avg_sq.pt, ema.pt
OUT/global_step400/zero/NAME/step.pt          optimizer steps, a tensor
OUT/global_step400/zero/optimizer_state.pt    what stage 3 and stages 1 and 2 look for, both in one file
OUT/global_step400/*_model_states.pt          global_steps and the run's manifest (client_state["megastar"]), no weights

``engine.load_checkpoint(OUT)`` with ``checkpoint: {load_universal: true}`` reads it at ZeRO stages 1, 2 and 3, at any
number of data and of AutoTP ranks, for a module with the names of ``megastar.engine.student.Student``
(tests/dist/test_convert.py). What to know of the loader:

* Stage 3 gives every parameter group the first group's hyperparameters, so none are written here: learning rate, weight
  decay, betas and epsilon stay those that the engine was built with.
* Stage 3 gives all groups one and the same step tensor, which torch's AdamW then counts up once a group. After loading:
  ``for state in optimizer.state.values(): state["step"] = state["step"].clone()``.
* Stages 1 and 2 load ``ema`` as one more state of the optimizer; stage 3 loads the three states that it knows, the
  average by ``engine.optimizer.load_hp_checkpoint_state(folder, "ema", param=p)``.
* A scheduler of DeepSpeed's own is not in it: ``load_lr_scheduler_states=False``.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megastar.checkpoint.atomic_output import byte_bar, settle, staged
from megastar.checkpoint.shard_format import KINDS
from megastar.checkpoint.source import Source, bytes_of, same_bits
from megastar.errors import UserError
from megastar.utils.files import write_atomic

VERSION = "0.19.8"  # DeepSpeed's, whose layout this is; its loader asks for one
HOLDS = ("latest_universal", "global_step*")


def to_universal(source: Source, out: Path, force: bool) -> str:
    """Write the folder ``out``; returns what was written and how it was checked."""
    reader, about = source.reader, source.about
    tag = f"global_step{about['step']}"
    size = bytes_of(reader.shapes) * len(KINDS)
    with staged(out, size + 8192 * len(reader.shapes) * (len(KINDS) + 1), force, HOLDS) as root:
        source.verify()
        zero = root / tag / "zero"
        zero.mkdir(parents=True)
        step = torch.tensor(float(reader.optimizer_step))
        with byte_bar(source.console, "writing", size) as advance:
            for name in reader.shapes:
                (zero / name).mkdir()
                for kind in KINDS:
                    tensor = reader.whole(name, kind)
                    torch.save({"param": tensor}, zero / name / f"{kind}.pt")
                    settle(zero / name / f"{kind}.pt")
                    advance(4 * tensor.numel())
                save_small(step, zero / name / "step.pt")
        save_small(optimizer_state(step, len(reader.shapes)), zero / "optimizer_state.pt")
        states = model_states(source)
        for name in ("mp_rank_00", "zero_pp_rank_0_mp_rank_00"):  # stages 1 and 2, stage 3
            save_small(states, root / tag / f"{name}_model_states.pt")
        write_atomic(root / "latest_universal", tag.encode())
        with byte_bar(source.console, "reading back", size) as advance:
            for name in reader.shapes:
                for kind in KINDS:
                    tensor = reader.whole(name, kind)
                    check(zero / name / f"{kind}.pt", lambda found, wanted=tensor: same_bits(found["param"], wanted))
                    advance(4 * tensor.numel())
    return f"{len(reader.shapes)} parameters x {len(KINDS)} tensors read back and equal to the checkpoint's"


def save_small(what: Any, path: Path) -> None:
    torch.save(what, path)
    settle(path)
    check(path, lambda found: bool(found == what))


def check(path: Path, is_right: Callable[[Any], bool]) -> None:
    """Read a written file back. Raises ``UserError``."""
    try:
        good = is_right(torch.load(path, weights_only=True))
    except (OSError, RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} was written but does not read back ({error}): check the disk") from error
    if not good:
        raise UserError(f"{path} was written but reads back otherwise: check the disk")


def optimizer_state(step: torch.Tensor, groups: int) -> dict[str, Any]:
    """Stage 3 reads ``optimizer_state_dict``, stages 1 and 2 ``param_groups``.

    Those two walk the engine's groups and these in parallel, and would silently skip an engine's surplus group: so
    there are as many here as there are parameters, each without a hyperparameter.
    """
    return {
        "ds_version": VERSION,
        "param_groups": [{} for _ in range(groups)],
        "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": [{}]},
    }


def model_states(source: Source) -> dict[str, Any]:
    step, about = source.about["step"], source.about
    return {
        "module": {},  # a universal load takes the weights from zero/
        "ds_version": VERSION,
        "dp_world_size": about["mesh"]["data"],
        "mp_world_size": 1,  # must be the number of these files
        "global_steps": step,
        "global_samples": step * source.cfg.train.global_batch,
        "skipped_steps": 0,
        "megastar": {k: v for k, v in about.items() if k != "files"},
    }
