"""DeepSpeed's universal format, written without DeepSpeed (layout: deepspeed/checkpoint/ds_to_universal.py, 0.19.8).

OUT/latest_universal                          the tag, global_step400
OUT/global_step400/zero/NAME/fp32.pt          {"param": whole tensor, fp32}; also exp_avg.pt, exp_avg_sq.pt, ema.pt;
                                              of a weight that Muon updates momentum_buffer.pt instead of the moments
OUT/global_step400/zero/NAME/step.pt          optimizer steps, a tensor
OUT/global_step400/zero/optimizer_state.pt    what stage 3 and stages 1 and 2 look for, both in one file
OUT/global_step400/*_model_states.pt          global_steps and the run's manifest (client_state["megastar"]), no weights

``engine.load_checkpoint(OUT)`` with ``checkpoint: {load_universal: true}`` reads it at ZeRO stages 1, 2 and 3, at any
number of data and of AutoTP ranks, for a module with the names of ``megastar.engine.student.Student``
(tests/dist/test_convert.py). Notes on the loader:

* Stage 3 gives every parameter group the first group's hyperparameters, so none are written here: learning rate, weight
  decay, betas and epsilon remain those that the engine was built with.
* Stage 3 shares one step tensor between all groups, which torch's AdamW then increments once per group. After loading:
  ``for state in optimizer.state.values(): state["step"] = state["step"].clone()``.
* Stages 1 and 2 load ``ema`` as an additional optimizer state; stage 3 loads only its three known states; load the
  average with ``engine.optimizer.load_hp_checkpoint_state(folder, "ema", param=p)``.
* It contains no DeepSpeed scheduler: ``load_lr_scheduler_states=False``.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megastar.checkpoint.atomic_output import READS_BACK, settle, staged
from megastar.checkpoint.source import Source, same_bits, stored_elements
from megastar.errors import UserError
from megastar.utils.files import is_plain_name, write_atomic
from megastar.utils.progress_bar import progress_bar

VERSION = "0.19.8"  # DeepSpeed version of this layout; its loader requires one
HOLDS = ("latest_universal", "global_step*")


def to_universal(source: Source, out: Path, force: bool) -> str:
    """Write the folder ``out``; returns what was written and how it was checked."""
    reader, step = source.reader, source.manifest["step"]
    if type(step) is not int or step < 0:
        raise UserError(f"{source.folder}: step = {step!r:.100} in its manifest is not a number of steps: restore it")
    for name in reader.shapes:
        if not is_plain_name(name):  # it names a folder
            raise UserError(
                f"{source.folder}: its manifest names a parameter {name[:100]!r}, not a plain name: restore it"
            )
    tag = f"global_step{step}"
    size, files = 4 * stored_elements(reader), sum(len(reader.kinds(name)) + 1 for name in reader.shapes)
    with staged(out, size + 8192 * files, force, HOLDS) as root:
        source.verify()
        zero = root / tag / "zero"
        zero.mkdir(parents=True)
        updates = torch.tensor(float(reader.optimizer_step))
        with progress_bar(source.console, "writing", size, bytes=True, transient=True) as bar:
            for name in reader.shapes:
                (zero / name).mkdir()
                for kind in reader.kinds(name):
                    tensor = reader.whole(name, kind)
                    torch.save({"param": tensor}, zero / name / f"{kind}.pt")
                    settle(zero / name / f"{kind}.pt")
                    bar.advance(4 * tensor.numel())
                save_small(updates, zero / name / "step.pt")
        save_small(optimizer_state(updates, len(reader.shapes)), zero / "optimizer_state.pt")
        states = model_states(source)
        for name in ("mp_rank_00", "zero_pp_rank_0_mp_rank_00"):  # stages 1 and 2, stage 3
            save_small(states, root / tag / f"{name}_model_states.pt")
        write_atomic(root / "latest_universal", tag.encode())
        with progress_bar(source.console, "reading back", size, bytes=True, transient=True) as bar:
            for name in reader.shapes:
                for kind in reader.kinds(name):
                    tensor = reader.whole(name, kind)
                    check(zero / name / f"{kind}.pt", partial(holds, tensor))
                    bar.advance(4 * tensor.numel())
    count = len(reader.shapes)
    each = (
        f"{count} parameters x {files // count - 1}" if files % count == 0 else f"{count} parameters, {files - count}"
    )
    return f"{each} tensors read back and equal to the source"


def holds(tensor: torch.Tensor, found: dict[str, torch.Tensor]) -> bool:
    return same_bits(found["param"], tensor)


def save_small(content: Any, path: Path) -> None:
    torch.save(content, path)
    settle(path)
    check(path, lambda found: bool(found == content))


def check(path: Path, is_right: Callable[[Any], bool]) -> None:
    """Read a written file back. Raises ``UserError``."""
    try:
        good = is_right(torch.load(path, weights_only=True))
    except (OSError, RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} {READS_BACK} ({error})") from error
    if not good:
        raise UserError(f"{path} {READS_BACK}")


def optimizer_state(step: torch.Tensor, groups: int) -> dict[str, Any]:
    """Stage 3 reads ``optimizer_state_dict``, stages 1 and 2 ``param_groups``.

    Stages 1 and 2 iterate over the engine's groups and these in parallel and silently skip surplus groups of the engine,
    so there is one group per parameter here, each without hyperparameters.
    """
    return {
        "ds_version": VERSION,
        "param_groups": [{} for _ in range(groups)],
        "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": [{}]},
    }


def model_states(source: Source) -> dict[str, Any]:
    step, manifest = source.manifest["step"], source.manifest
    return {
        "module": {},  # a universal load reads the weights from zero/
        "ds_version": VERSION,
        "dp_world_size": manifest["mesh"]["data"],
        "mp_world_size": 1,  # must be the number of these files
        "global_steps": step,
        "global_samples": step * source.cfg.train.global_batch,
        "skipped_steps": 0,
        "megastar": {k: v for k, v in manifest.items() if k != "files"},
    }
