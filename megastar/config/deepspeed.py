"""configs/ds/*.json merged with the run, which sets batch, clipping and dtype. No torch.

The JSON sets the ZeRO stage, offload and communication. Fields of the run that it repeats must agree with the run;
settings that are known to train wrongly are refused.
"""

from __future__ import annotations

import difflib
import json
from typing import Any

from megastar.config.convert import shown
from megastar.config.files import require_file
from megastar.config.schema import RunConfig
from megastar.errors import UserError
from megastar.utils.files import read_regular
from megastar.utils.json_file import parse_json

KNOWN = (
    *("zero_optimization", "tensor_parallel", "aio", "checkpoint", "data_types", "sparse_gradients", "steps_per_print"),
    *("communication_data_type", "seq_parallel_communication_data_type", "gradient_predivide_factor"),
    *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "comms_logger", "flops_profiler", "dump_state"),
    *("prescale_gradients", "wall_clock_breakdown", "memory_breakdown"),
    # fields of the run, allowed if they agree with it
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("bf16", "fp16"),
)
ZERO_PLUS_PLUS = ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights")
SHAPES: tuple[tuple[str, str, type, str], ...] = (  # (name, of the section, type, in words) of what is read here
    *((name, "", dict, "an object") for name in ("zero_optimization", "tensor_parallel", "data_types")),
    *((name, "zero_optimization", dict, "an object") for name in ("offload_param", "offload_optimizer")),
    *((name, "zero_optimization", int, "an integer") for name in ("zero_hpz_partition_size", "mics_shard_size")),
)
REFUSED = {
    "optimizer": "megastar uses its own AdamW or Muon, which also updates the EMA teacher; set the optim section of the run",
    "scheduler": "optim.schedule of the run sets the schedule",
    "elasticity": "it is not supported with this engine",
    "compression_training": "it is not supported with this engine",
    "activation_checkpointing": "set parallel.activation_checkpointing in the run",
    "amp": "set train.dtype in the run",
    "torch_autocast": "set train.dtype in the run",
    "compile": "it is not supported with this engine",
}


def read_deepspeed(name: str) -> dict[str, Any]:
    """The JSON unchanged; a bare word such as zero1 names configs/ds/zero1.json.

    Raises ``UserError`` if it is missing or not a JSON object.
    """
    bare = name and "/" not in name and not name.endswith(".json")
    path = require_file(f"configs/ds/{name}.json" if bare else name, "parallel.deepspeed:")
    data = parse_json(read_regular(path, 1 << 20), f"parallel.deepspeed: {path}")
    if not isinstance(data, dict):
        raise UserError(f"parallel.deepspeed: {path} does not contain a JSON object")
    for name, of_section, kind, what in SHAPES:
        section = data.get(of_section, {}) if of_section else data
        value = section.get(name) if isinstance(section, dict) else None
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            field = f"{of_section}.{name}" if of_section else name
            raise UserError(f"parallel.deepspeed: {path}: {field} = {shown(value)}: must be {what}")
    return data


def deepspeed_problems(cfg: RunConfig) -> list[str]:
    """Problems of the JSON with this run that do not depend on the number of ranks."""
    try:
        data = read_deepspeed(cfg.parallel.deepspeed)
    except UserError as error:
        return [str(error)]
    file, t = cfg.parallel.deepspeed, cfg.train
    out = [f"{file}: {key} is set, but {why}; remove it" for key, why in REFUSED.items() if key in data]
    for key in data:
        if key not in KNOWN and key not in REFUSED:
            close = difflib.get_close_matches(key, KNOWN, 1, 0.6)
            out.append(f"{file}: unknown key {key}" + (f": did you mean {close[0]}?" if close else ": remove it"))
    out += _disagreement(data, file, "train_batch_size", "train.global_batch", t.global_batch)
    out += _disagreement(data, file, "gradient_clipping", "optim.grad_clip", cfg.optim.grad_clip)
    if t.micro_batch:
        out += _disagreement(data, file, "train_micro_batch_size_per_gpu", "train.micro_batch", t.micro_batch)
    tp, section = cfg.parallel.tensor_parallel, data.get("tensor_parallel") or {}
    out += _disagreement(section, file, "autotp_size", "parallel.tensor_parallel", tp)
    if t.dtype != "auto":
        out += _dtype_problems(data, file, t.dtype)
    return out + _zero_problems(data.get("zero_optimization"), file) + _compile_problems(cfg)


def _compile_problems(cfg: RunConfig) -> list[str]:
    """Compiled blocks must not contain collectives."""
    if cfg.train.compile == "on" and cfg.parallel.tensor_parallel > 1:
        return [
            f"train.compile = on with parallel.tensor_parallel {cfg.parallel.tensor_parallel}: compiled blocks must not "
            "contain collectives; use train.compile=auto, or tensor_parallel 1"
        ]
    return []


def deepspeed_config(
    cfg: RunConfig, micro_batch: int, accumulation: int, *, world_size: int, dtype: str
) -> dict[str, Any]:
    """The dict for ``deepspeed.initialize``; ``dtype`` is "bf16" or "fp32", "auto" resolved by the caller.

    ``train_batch_size`` is left out: DeepSpeed checks it against the whole world, tensor ranks included.
    Raises one ``UserError`` with every disagreement between the JSON and the run.
    """
    ranks = world_size // cfg.parallel.tensor_parallel
    assert micro_batch * accumulation * ranks == cfg.train.global_batch, (micro_batch, accumulation, world_size)
    problems = deepspeed_problems(cfg)
    if not problems:
        data, file = read_deepspeed(cfg.parallel.deepspeed), cfg.parallel.deepspeed
        problems += _disagreement(data, file, "train_micro_batch_size_per_gpu", "a micro batch of", micro_batch)
        problems += _disagreement(data, file, "gradient_accumulation_steps", "an accumulation of", accumulation)
        problems += _dtype_problems(data, file, dtype)
    if problems:
        raise UserError("; ".join(dict.fromkeys(problems)))
    merged = {k: v for k, v in data.items() if k not in ("train_batch_size", "fp16", "tensor_parallel")}
    merged.setdefault("steps_per_print", 10**9)  # the engine logs its own metrics
    merged.setdefault("timers", {"throughput": {"enabled": False}})  # it synchronizes the GPU twice per step
    return merged | {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": cfg.optim.grad_clip,
        "bf16": {"enabled": dtype == "bf16"},
        "zero_allow_untested_optimizer": True,
    }


def _disagreement(data: dict[str, Any], file: str, key: str, name: str, value: float) -> list[str]:
    """A field of the run that the JSON repeats must be equal; "auto" is."""
    if data.get(key, "auto") in ("auto", value):
        return []
    return [f"{file} sets {key} {data[key]}, but the run sets {name} {value}: remove it from the JSON"]


def _dtype_problems(data: dict[str, Any], file: str, dtype: str) -> list[str]:
    out = []
    for key in ("bf16", "fp16"):
        section = data.get(key)
        value = section.get("enabled", "auto") if isinstance(section, dict) else section
        if value not in ("auto", None) and bool(value) != (key == dtype):
            out.append(
                f"{file} sets {key}.enabled {json.dumps(value)}, but the run sets train.dtype {dtype}: "
                "remove it from the JSON"
            )
    zero = data.get("zero_optimization")
    if dtype != "bf16" or not isinstance(zero, dict):
        return out
    if zero.get("stage", 0) == 0:
        out.append(f"{file}: ZeRO stage 0 with train.dtype bf16 loses precision (no fp32 masters): use stage 1 to 3")
    if zero.get("stage") == 1 and (data.get("data_types") or {}).get("grad_accum_dtype") == "fp32":
        out.append(
            f"{file}: data_types.grad_accum_dtype fp32 at stage 1 makes DeepSpeed use another optimizer, which "
            "does not update the EMA teacher: use stage 2 or 3"
        )
    return out


def _zero_problems(zero: Any, file: str) -> list[str]:
    if not isinstance(zero, dict):
        return [f"{file}: zero_optimization is missing: give it a stage, as in configs/ds/zero3.json"]
    stage = zero.get("stage")
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        return [f"{file}: zero_optimization.stage = {json.dumps(stage)}: must be 0, 1, 2 or 3"]
    out = []
    wrong = [k for k in ZERO_PLUS_PLUS if zero.get(k)]
    if zero.get("zero_hpz_partition_size", 1) > 1:
        wrong.append("zero_hpz_partition_size")
    # Each keeps a second copy of the weights, which neither the teacher's update nor a checkpoint covers; with
    # tensor parallelism hpZ trains wrongly without an error.
    out += [f"{file}: {key} is not tested with the sharded teacher; remove it" for key in wrong]
    if zero.get("mics_shard_size", -1) > 0:
        out.append(f"{file}: mics_shard_size is set, but MiCS is not supported with this engine; remove it")
    for key in ("offload_param", "offload_optimizer"):
        device = (zero.get(key) or {}).get("device", "none")
        if device != "none" and stage < 3:
            out.append(
                f"{file}: {key} at stage {stage} is not tested: use stage 3, as in configs/ds/zero3_offload.json"
            )
        if device == "nvme":
            out.append(f'{file}: {key} to nvme is not supported with this engine: use "cpu" or "none"')
    return out
