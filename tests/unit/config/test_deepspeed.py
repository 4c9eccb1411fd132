"""The DeepSpeed JSON merged with the run: one place for batch, clip and dtype."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megastar.config.deepspeed import deepspeed_config, deepspeed_problems
from megastar.config.load import load_config
from megastar.config.schema import RunConfig
from megastar.errors import UserError

ROOT = Path(__file__).resolve().parents[3]


def run_with(tmp_path, content, **train) -> RunConfig:
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    cfg = RunConfig()
    cfg.parallel.deepspeed = str(path)
    for name, value in train.items():
        setattr(cfg.train, name, value)
    return cfg


def zero(stage=3, **more):
    return {"zero_optimization": {"stage": stage, **more}}


def test_the_shipped_file_says_nothing_of_the_run():
    cfg = RunConfig()
    cfg.parallel.deepspeed = "configs/ds/zero3.json"
    merged = deepspeed_config(cfg, 16, 2, world_size=8, dtype="bf16")
    said = json.loads((ROOT / cfg.parallel.deepspeed).read_text())
    assert merged["zero_optimization"] == said["zero_optimization"]
    assert merged["train_micro_batch_size_per_gpu"] == 16 and merged["gradient_accumulation_steps"] == 2
    assert merged["gradient_clipping"] == 1.0 and merged["bf16"] == {"enabled": True}
    assert "train_batch_size" not in merged  # DeepSpeed would check it against the tensor ranks too
    assert not {"bf16", "fp16", "gradient_clipping", "train_batch_size", "train_micro_batch_size_per_gpu"} & said.keys()


def test_agreeing_values_and_auto_pass(tmp_path):
    content = zero() | {
        "train_batch_size": 256,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": False},
        "wall_clock_breakdown": True,
    }
    cfg = run_with(tmp_path, content, dtype="fp32")
    merged = deepspeed_config(cfg, 32, 4, world_size=2, dtype="fp32")
    assert merged["bf16"] == {"enabled": False} and "fp16" not in merged and merged["wall_clock_breakdown"] is True


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            zero() | {"train_batch_size": 512},
            "sets train_batch_size 512, but the run sets train.global_batch 256: remove it from the JSON",
        ),
        (zero() | {"gradient_clipping": 0.5}, "sets gradient_clipping 0.5, but the run sets optim.grad_clip 1.0"),
        (
            zero() | {"train_micro_batch_size_per_gpu": 4},
            "sets train_micro_batch_size_per_gpu 4, but the run sets train.micro_batch 8",
        ),
        (zero() | {"bf16": {"enabled": False}}, "sets bf16.enabled false, but the run sets train.dtype bf16"),
        (zero() | {"fp16": {"enabled": True}}, "sets fp16.enabled true, but the run sets train.dtype bf16"),
        (
            zero() | {"tensor_parallel": {"autotp_size": 2}},
            "sets autotp_size 2, but the run sets parallel.tensor_parallel 1",
        ),
        (
            zero() | {"optimizer": {"type": "Adam"}},
            "optimizer is set, but megastar uses its own AdamW or Muon, which also updates the EMA teacher",
        ),
        (zero() | {"scheduler": {}}, "scheduler is set, but optim.schedule of the run sets the schedule; remove it"),
        (zero() | {"elasticity": {}}, "elasticity is set, but it is not supported with this engine; remove it"),
        ({"zero_optimisation": {"stage": 3}}, "unknown key zero_optimisation: did you mean zero_optimization?"),
        ({}, "zero_optimization is missing: give it a stage, as in configs/ds/zero3.json"),
        (zero(4), "zero_optimization.stage = 4: must be 0, 1, 2 or 3"),
        (zero(0), "ZeRO stage 0 with train.dtype bf16 loses precision (no fp32 masters): use stage 1 to 3"),
        (zero(mics_shard_size=4), "mics_shard_size is set, but MiCS is not supported with this engine; remove it"),
        (
            zero(offload_param={"device": "nvme"}),
            'offload_param to nvme is not supported with this engine: use "cpu" or',
        ),
        ("{", "is not JSON ("),
        ("[]", "does not contain a JSON object"),
    ],
)
def test_each_disagreement_has_its_sentence(tmp_path, content, message):
    cfg = run_with(tmp_path, content, micro_batch=8)
    problems = deepspeed_problems(cfg)
    assert any(message in p and str(tmp_path / "ds.json") in p for p in problems), problems
    with pytest.raises(UserError) as caught:
        deepspeed_config(cfg, 8, 16, world_size=2, dtype="bf16")
    assert message in str(caught.value)


@pytest.mark.parametrize("key", ["zero_quantized_weights", "zero_quantized_gradients", "zero_hpz_partition_size"])
def test_what_keeps_weights_in_a_second_place_is_refused(tmp_path, key):
    (problem,) = deepspeed_problems(run_with(tmp_path, zero(**{key: 2 if "hpz" in key else True})))
    assert f"{key} is not tested with the sharded teacher; remove it" in problem


@pytest.mark.parametrize("stage", [1, 2])
def test_offload_needs_stage_3(tmp_path, stage):
    offload = {"offload_optimizer": {"device": "cpu"}}
    (problem,) = deepspeed_problems(run_with(tmp_path, zero(stage, **offload)))
    assert f"offload_optimizer at stage {stage} is not tested: use stage 3" in problem
    assert deepspeed_problems(run_with(tmp_path, zero(3, **offload))) == []
    assert deepspeed_problems(run_with(tmp_path, zero(stage, offload_optimizer={"device": "none"}))) == []


def test_what_only_the_started_run_knows(tmp_path):
    cfg = run_with(tmp_path, zero() | {"gradient_accumulation_steps": 2, "train_micro_batch_size_per_gpu": 64})
    assert deepspeed_problems(cfg) == []
    with pytest.raises(UserError, match="sets gradient_accumulation_steps 2, but the run sets an accumulation of 1"):
        deepspeed_config(cfg, 64, 1, world_size=4, dtype="bf16")
    with pytest.raises(UserError, match="sets train_micro_batch_size_per_gpu 64, but the run sets a micro batch of 32"):
        deepspeed_config(cfg, 32, 2, world_size=4, dtype="bf16")
    auto = run_with(tmp_path, zero(0), dtype="auto")
    assert deepspeed_problems(auto) == []
    assert deepspeed_config(auto, 64, 1, world_size=4, dtype="fp32")["zero_optimization"]["stage"] == 0
    with pytest.raises(UserError, match="ZeRO stage 0 with train.dtype bf16"):
        deepspeed_config(auto, 64, 1, world_size=4, dtype="bf16")


def test_compiled_blocks_are_refused_where_they_contain_collectives(tmp_path):
    assert deepspeed_problems(run_with(tmp_path, zero(3), compile="on")) == []
    cfg = run_with(tmp_path, zero(1), compile="on")
    cfg.parallel.tensor_parallel = 2
    (problem,) = deepspeed_problems(cfg)
    assert problem.startswith("train.compile = on with parallel.tensor_parallel 2")
    cfg.train.compile = "auto"
    assert deepspeed_problems(cfg) == []


@pytest.mark.parametrize(
    ("value", "kept"), [("true", "on"), ("false", "off"), ("on", "on"), ("off", "off"), ("auto", "auto")]
)
def test_compile_was_a_boolean(value, kept):
    assert load_config("configs/run/demo.yaml", [f"train.compile={value}"]).train.compile == kept


def test_problems_of_the_json_come_with_the_others(tmp_path):
    cfg = run_with(tmp_path, zero() | {"gradient_clipping": 2.0})
    with pytest.raises(UserError) as caught:
        load_config("configs/run/demo.yaml", [f"parallel.deepspeed={cfg.parallel.deepspeed}", "train.steps=-1"])
    assert "2 problems" in str(caught.value)
    assert "gradient_clipping 2.0" in str(caught.value) and "train.steps = -1: must be at least 0" in str(caught.value)
