"""configs/run: a file holds only what differs, and neighbours differ only where the method does."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml

from megastar.config.comparison import CompareConfig, VariantConfig
from megastar.config.deepspeed import read_deepspeed
from megastar.config.load import diff_configs, load_compare_config, load_config, load_tokenizer_config, resolve_batch
from megastar.config.schema import RunConfig
from megastar.config.sections.evaluation import EvaluationConfig
from megastar.config.sections.optim import MuonConfig
from megastar.config.sections.repa import RepaConfig
from megastar.config.sections.token_order import TokenOrderConfig
from megastar.parallel.budget import GIB, Zero
from megastar.parallel.cost import make_plan
from megastar.parallel.gpus import GPUS, Machine

ROOT = Path(__file__).resolve().parents[3]
FILES = sorted((ROOT / "configs" / "run").glob("*.yaml"))
COMPARISONS = [p for p in FILES if p.stem.startswith("compare_")]
RUNS = [p for p in FILES if p not in COMPARISONS]
HEADER = ("# command:", "# hardware:", "# hours:", "# expected:")


def flat(tree: dict, prefix: str = "") -> dict:
    """Dotted names -> values."""
    out = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def run(name: str) -> RunConfig:
    return load_config(f"configs/run/{name}.yaml")


def differing(a: str, b: str) -> set[str]:
    return {d.split(":")[0] for d in diff_configs(run(a), run(b))}


def test_the_papers_runs_are_there():
    wanted = {f"{m}_{s}_{e}ep" for m in ("ar", "star") for s in ("b", "l", "xl") for e in (50, 300)}
    assert {p.stem for p in RUNS} >= wanted | {"star_xxl", "star_3b", "demo"}


LATER = {
    "train.compile": "auto",
    "train.deterministic": False,
    "faults.join_timeout": 600.0,
    "faults.memory_every": 0,
    "faults.memory_copies": 1,
    "model.head": "full",
    "model.head_factors": [],
    "self_guided.negatives": "auto",
    "parallel.teacher_features": "keep",
    "optim.name": "adamw",
    "optim.layer_decay": 1.0,
    "train.init_weights": "",
    "train.init_classes": "same",
    "train.init_class_map": "",
    "train.init_resize": False,
    "train.init_any_tokenizer": False,
    "train.init_any_order": False,
    "model.target_position": "none",
    "train.freeze_blocks": 0,
    **{f"eval.{name}": value for name, value in dataclasses.asdict(EvaluationConfig()).items()},
    "train.trackers": ["tensorboard"],
    "train.profile.start": 10,
    "train.profile.steps": 0,
    "train.profile.ranks": [0],
    **{f"optim.muon.{name}": value for name, value in dataclasses.asdict(MuonConfig()).items()},
    **{f"repa.{name}": value for name, value in dataclasses.asdict(RepaConfig()).items()},
    **{f"token_order.{name}": value for name, value in dataclasses.asdict(TokenOrderConfig()).items()},
}  # defaults that later versions changed or added

# Of comparisons.
LATER_COMPARISONS = {"sample.parallel_steps": 0, "sample.schedule": "cosine", "sample.token_order": "auto"}

NEW = {"star_b_384", "star_b_512", "random_b_300ep", "random_emoji"}  # files of later versions


def test_every_file_resolves_to_the_configuration_of_version_0_1_0():
    """The fixture was written by the code of 0.1.0 from its run files, which held every field."""
    recorded = json.loads((ROOT / "tests/data/resolved_runs.json").read_text())
    for kind, paths, load in (("runs", RUNS, load_config), ("comparisons", COMPARISONS, load_compare_config)):
        common = recorded[kind].pop("common")
        assert set(recorded[kind]) == {p.stem for p in paths} - NEW
        for path in paths:
            if path.stem in NEW:
                continue
            resolved = flat(dataclasses.asdict(load(path)))
            prefix = "" if kind == "runs" else "base."
            expected = common | recorded[kind][path.stem] | {prefix + name: value for name, value in LATER.items()}
            expected |= LATER_COMPARISONS if prefix else {}
            for name in resolved.keys() | expected.keys():  # as JSON: 1 is not 1.0, nor true
                assert json.dumps(resolved[name]) == json.dumps(expected[name]), (path.stem, name)


def repeated(fields: dict, schema: object, data: dict) -> list[str]:
    """Fields of ``data`` that are equal to what ``fields``, on top of the schema's defaults, hold already."""
    below = flat(dataclasses.asdict(schema)) | flat(fields)
    return [name for name, value in flat(data).items() if below.get(name, ...) == value]


def repeated_in_run(data: dict) -> list[str]:
    """``data`` holds a run as in YAML: its files for model and method, and what differs from them."""
    model, method = data.pop("model"), data.pop("method")
    assert re.fullmatch(r"configs/method/\w+\.yaml", method)
    special = {} if isinstance(model, str) else model
    path = model if isinstance(model, str) else special.pop("base")
    assert re.fullmatch(r"configs/model/\w+\.yaml", path)
    fields = yaml.safe_load((ROOT / method).read_text()) | {"model": yaml.safe_load((ROOT / path).read_text())}
    return repeated(fields, RunConfig(), data | {"model": special})


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.stem)
def test_a_run_file_holds_what_differs_and_says_what_to_expect(path):
    text = path.read_text()
    for word in HEADER:
        assert word in text, word
    data = yaml.safe_load(text)
    method = path.stem.partition("_")[0]
    assert data["method"] == f"configs/method/{method if method in ('ar', 'random') else 'star'}.yaml"
    assert path.stem == "demo" or data["run"] in (f"runs/{path.stem}", f"runs/{path.stem}/run")
    assert repeated_in_run(data) == []


@pytest.mark.parametrize("path", [p for p in RUNS if p.stem.startswith(("ar_", "star_"))], ids=lambda p: p.stem)
def test_a_header_holds_what_the_plan_estimates(path):
    text, cfg = path.read_text(), load_config(path)
    gpus = int(re.search(r"^# hardware: (\d+) GPUs of 80 GB, not measured$", text, re.M)[1])
    own, need, other, others, _, command = re.search(
        r"^# split:    ZeRO (\d): (\d+) GiB per GPU \(ZeRO (\d): (\d+)\), (.*); estimated by\n# +(megastar plan .*)$",
        text,
        re.M,
    ).groups()
    assert command == f"megastar plan configs/run/{path.name} --gpus {gpus}"  # H100s, in nodes of eight
    machine = Machine("h100", GPUS["h100"], gpus, 8)

    def plan(stage):
        zero = Zero.read(read_deepspeed(f"configs/ds/zero{stage}.json"))
        return make_plan(cfg, machine, zero, 1, cfg.parallel.activation_checkpointing, "bf16")

    assert cfg.parallel.deepspeed == f"configs/ds/zero{own}.json" and {own, other} == {"1", "3"}
    assert [f"{plan(z).need / GIB:.0f}" for z in (own, other)] == [need, others]
    seconds = plan(own).seconds
    hours = cfg.train.epochs * 5004 * seconds / 3600
    shown = f"{hours:.0f}" if hours >= 9.5 else f"{hours:.1f}"
    assert f"# hours:    {shown} on H100s by that plan ({seconds:.3f} s per step); not measured\n" in text


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda p: p.stem)
def test_a_comparison_holds_what_differs_and_reports_the_test_split(path):
    text = path.read_text()
    for word in HEADER:
        assert word in text, word
    assert f"megastar compare configs/run/{path.name}\n" in text
    data = yaml.safe_load(text)
    assert repeated_in_run(data.pop("base")) == []
    assert [name for v in data.pop("variants").values() for name in repeated({}, VariantConfig(), v)] == []
    assert repeated({}, CompareConfig(), data) == []
    cfg = load_compare_config(path)
    assert cfg.out == f"runs/{path.stem}" and cfg.probe.score_on == "test" and cfg.base.run == ""
    main = [name for name, v in cfg.variants.items() if v.kind == "main"]
    assert main == ["ar", "ar2", "star"] and all(len(cfg.variants[m].seeds or cfg.seeds) >= 3 for m in main)


@pytest.mark.parametrize("size", ["b", "l", "xl"])
@pytest.mark.parametrize("epochs", [50, 300])
def test_star_differs_from_ar_only_in_the_method(size, epochs):
    changed = differing(f"ar_{size}_{epochs}ep", f"star_{size}_{epochs}ep")
    assert {"run", "self_guided.enabled"} <= changed <= {"run", "self_guided.enabled", "self_guided.contrastive_block"}


@pytest.mark.parametrize("method", ["ar", "star"])
def test_lengths_and_sizes_differ_only_there(method):
    for size in ("b", "l", "xl"):
        changed = differing(f"{method}_{size}_50ep", f"{method}_{size}_300ep")
        assert changed == {"run", "train.epochs", "train.keep_every"}
    sizes = {"model.name", "model.n_layer", "model.n_head", "model.dim"}
    for one, other in (("b", "l"), ("l", "xl")):
        changed = differing(f"{method}_{one}_50ep", f"{method}_{other}_50ep")
        assert changed <= {"run", "self_guided.contrastive_block"} | sizes
    if method == "star":
        for large in ("star_xxl", "star_3b"):
            changed = differing("star_xl_50ep", large)
            assert changed <= {"run", "self_guided.contrastive_block", "parallel.deepspeed"} | sizes


@pytest.mark.parametrize(
    ("name", "block", "epochs"),
    [
        ("star_b_50ep", 6, 50),
        ("star_l_300ep", 18, 300),
        ("star_xl_300ep", 18, 300),
        ("star_xxl", 24, 50),
        ("star_3b", 12, 50),
    ],
)
def test_values_of_the_paper(name, block, epochs):
    cfg = run(name)
    s, o, m = cfg.self_guided, cfg.optim, cfg.model
    assert (s.contrastive_block, cfg.train.epochs, cfg.train.steps) == (block, epochs, 0)
    assert (s.alpha, s.beta, s.mask_ratio, s.views, s.positions, s.temperature) == (1.0, 0.5, 0.25, 2, 4, 0.2)
    assert (s.teacher_decay, s.teacher_warmup, s.projector_dim) == (0.9999, False, 2048)
    assert (o.lr, o.scale_lr, o.beta1, o.beta2, o.weight_decay, o.grad_clip) == (1e-4, True, 0.9, 0.95, 0.05, 1.0)
    assert (o.schedule, o.warmup_steps, cfg.train.global_batch, cfg.train.dtype) == ("constant", 0, 256, "bf16")
    assert (m.vocab_size, m.num_classes, m.image_tokens, m.class_dropout_prob) == (16384, 1000, 256, 0.1)
    assert (m.token_dropout_p, m.resid_dropout_p, m.ffn_dropout_p) == (0.1, 0.1, 0.1)
    for world in (8, 16, 32):
        assert resolve_batch(cfg.train, 1, world) == (256 // world, 1)


def test_batch_scripts_train_files_that_exist():
    tokenizer = ROOT / "slurm/train_tokenizer.sh"
    load_tokenizer_config(tokenizer.read_text().split("\ntrain_tokenizer ")[1].split()[0])
    scripts = sorted(set((ROOT / "slurm").glob("train_*.sh")) - {tokenizer})
    assert [s.stem for s in scripts] == ["train_3b", "train_b", "train_l", "train_xl", "train_xxl"]
    for script in scripts:
        text = script.read_text()
        nodes = int(text.split("--nodes=")[1].split()[0])
        tasks = int(text.split("--ntasks-per-node=")[1].split()[0])
        default = text.split("\ntrain ")[1].split()[0]
        cfg = load_config(default)
        resolve_batch(cfg.train, cfg.parallel.tensor_parallel, nodes * tasks)
    for path in (ROOT / "configs/run").glob("*.yaml"):
        for script, config in re.findall(r"sbatch (slurm/\S+) (\S+)", path.read_text()):
            assert config == f"configs/run/{path.name}" and (ROOT / script).is_file()
