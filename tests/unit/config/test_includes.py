"""Files that a configuration names: method, sections, base."""

from __future__ import annotations

from pathlib import Path

import pytest

from megastar.checkpoint.convert_weights import read_architecture
from megastar.config.load import load_compare_config, load_config, override_config, save_config
from megastar.errors import UserError

ROOT = Path(__file__).resolve().parents[3]


def failure(path, *overrides) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path):
    """A project of small files: a network, two methods, a run that names them."""
    texts = {
        "net.yaml": "name: tiny\nn_layer: 2\nn_head: 2\ndim: 16\n",
        "plain.yaml": "self_guided: {enabled: false}\ntrain: {log_every: 5, keep_last: 7}\n",
        "guided.yaml": "self_guided: {contrastive_block: 2, beta: 0.1, views: 4}\noptim: {lr: 2.0e-3, eps: 1.0e-6}\n",
        "run.yaml": "model: net.yaml\nmethod: guided.yaml\ndata: {shards: x}\nself_guided: {beta: 0.3}\noptim: {lr: 3.0e-3}\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_field_takes_the_value_of_default_method_file_or_override_in_this_order(folder):
    cfg = load_config(folder / "run.yaml", ["optim.lr=4e-3"])
    assert (cfg.optim.beta2, cfg.optim.eps, cfg.self_guided.beta, cfg.optim.lr) == (0.95, 1e-6, 0.3, 4e-3)
    assert (cfg.model.name, cfg.self_guided.contrastive_block, cfg.self_guided.views) == ("tiny", 2, 4)


def test_a_method_given_as_override_replaces_the_files_and_wins_over_its_fields(folder):
    run = folder / "run.yaml"
    cfg = load_config(run, ["method=plain.yaml"])
    assert not cfg.self_guided.enabled and (cfg.train.log_every, cfg.train.keep_last) == (5, 7)
    assert (cfg.self_guided.views, cfg.optim.eps) == (2, 1e-8)  # no trace of guided.yaml
    assert (cfg.self_guided.beta, cfg.optim.lr) == (0.3, 3e-3)  # what the run file sets and plain.yaml does not
    again = load_config(run, ["method=guided.yaml"])
    assert (again.self_guided.beta, again.optim.lr) == (0.1, 2e-3)
    assert load_config(run, ["optim.lr=1", "method=guided.yaml"]).optim.lr == 2e-3  # the later override wins
    assert load_config(run, ["method=guided.yaml", "optim.lr=1"]).optim.lr == 1
    assert load_config(run, ["method=guided.yaml", "method=plain.yaml"]) == cfg
    none = load_config(run, ["method=", "self_guided.enabled=false"])
    assert (none.self_guided.views, none.train.log_every) == (2, 10)


def test_a_method_wins_over_a_configuration_that_holds_every_field(folder):
    save_config(load_config(folder / "run.yaml"), folder / "config.yaml")
    cfg = load_config(folder / "config.yaml", ["method=plain.yaml"])
    assert not cfg.self_guided.enabled and cfg.train.keep_last == 7 and cfg.optim.lr == 3e-3
    changed = override_config(
        load_config(ROOT / "configs/run/star_b_50ep.yaml"), ["method=configs/method/ar.yaml"], "x"
    )
    assert not changed.self_guided.enabled


def test_a_section_holds_a_file_and_what_differs_from_it(folder):
    run = folder / "run.yaml"
    run.write_text("model: {base: net.yaml, dim: 32}\nself_guided:\nmethod: guided.yaml\ndata: {shards: x}\n")
    cfg = load_config(run)
    assert (cfg.model.name, cfg.model.n_layer, cfg.model.dim) == ("tiny", 2, 32)
    assert cfg.self_guided.contrastive_block == 2  # an empty section of the run changes nothing
    assert load_config(run, ["model=net.yaml"]).model.dim == 16
    assert load_config(run, ["model={base: net.yaml, n_head: 4}"]).model.n_head == 4


def test_the_base_of_a_comparison_names_its_files_likewise(folder):
    def load(base, *overrides):
        text = f"pictures: x\nvariants: {{a: {{}}}}\nprobe: {{block: 1}}\nbase: {base}\n"
        (folder / "compare.yaml").write_text(text)
        return load_compare_config(folder / "compare.yaml", overrides).base

    inline = "{run: r, model: {base: net.yaml, dim: 32}, method: guided.yaml, train: {steps: 9}}"
    cfg = load(inline)
    assert (cfg.model.dim, cfg.model.n_layer, cfg.self_guided.beta, cfg.train.steps) == (32, 2, 0.1, 9)
    assert not load(inline, "base.method=plain.yaml").self_guided.enabled
    cfg = load("run.yaml", "base.train.steps=9")
    assert (cfg.model.name, cfg.self_guided.beta, cfg.self_guided.views) == ("tiny", 0.3, 4)
    cfg = load(inline, "base.method=plain.yaml", "base=run.yaml", "base.train.steps=9")  # the later one wins
    assert cfg.self_guided.enabled and cfg.self_guided.views == 4


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("run.yaml", "method: guidid.yaml", "method: guidid.yaml does not exist: did you mean guided.yaml?"),
        ("run.yaml", "method: 5", "method = 5: must be the path of a file, as configs/method/star.yaml"),
        (
            "run.yaml",
            "method: {self_guided: {beta: 1}}",
            "method = {'self_guided': {'beta': 1}}: must be the path of a file, as configs/method/star.yaml",
        ),
        ("run.yaml", "methd: guided.yaml", "unknown key methd: did you mean method?"),
        (
            "run.yaml",
            "self_guided: {method: guided.yaml, enabled: false}",
            "unknown key self_guided.method: did you mean method?",
        ),
        (
            "guided.yaml",
            "method: plain.yaml",
            "guided.yaml: method is not allowed in a method file: set it in the run file",
        ),
        (
            "guided.yaml",
            "model: net.yaml",
            "guided.yaml: model is not allowed in a method file: set it in the run file",
        ),
        ("guided.yaml", "run: there", "guided.yaml: run is not allowed in a method file: set it in the run file"),
        ("guided.yaml", "optim: {betta1: 1}", "guided.yaml: unknown key optim.betta1: did you mean optim.beta1?"),
        ("guided.yaml", "optim: {lr: fast}", "guided.yaml: optim.lr = 'fast': must be a number"),
        ("guided.yaml", "optim: 5", "guided.yaml: optim = 5: is a section; write optim.field: value"),
        ("guided.yaml", "- a", "guided.yaml contains a list instead of sections of `field: value`"),
        ("guided.yaml", "optim: {lr: [1", "guided.yaml line 2 is not YAML ("),
        ("net.yaml", "dimm: 3", "net.yaml: unknown key model.dimm: did you mean model.dim?"),
        ("net.yaml", "base: other.yaml", "net.yaml: base is not allowed in an included file: set it in the run file"),
        ("run.yaml", "model: {base: nett.yaml}", "model.base: nett.yaml does not exist: did you mean net.yaml?"),
        ("run.yaml", "model: {base: [1]}", "model.base = [1]: must be the path of a file, as configs/model/b.yaml"),
    ],
)
def test_wrong_files_in_files(folder, monkeypatch, name, text, message):
    monkeypatch.chdir(folder)
    if name == "run.yaml":
        text = "\n".join([*([] if "model" in text else ["model: net.yaml"]), "data: {shards: x}", text])
        text += "" if "self_guided" in text else "\nself_guided: {contrastive_block: 2}"
    Path(name).write_text(text + "\n")
    found = failure("run.yaml")
    assert found.startswith("run.yaml: ") and message in found and "\n" not in found


def test_a_wrong_method_is_no_problem_where_another_one_replaces_it(folder):
    (folder / "guided.yaml").write_text("method: guided.yaml\n")
    assert load_config(folder / "run.yaml", ["method=plain.yaml"]).train.keep_last == 7
    text = failure(folder / "run.yaml", "method=plain.yml")
    assert text == f"{folder / 'run.yaml'}: method: plain.yml does not exist: check the path"
    assert "method = 5: must be the path of a file" in failure(folder / "run.yaml", "method=5")
    text = failure(folder / "run.yaml", "method=plain.yaml", "model.base=net.yaml")
    assert text.endswith("override 'model.base=net.yaml': give model=FILE, then model.field=value")


def test_convert_reads_the_network_of_a_run_file_from_its_base(folder):
    (folder / "run.yaml").write_text("model: {base: net.yaml, dim: 32}\nmethod: guided.yaml\n")
    model = read_architecture(folder / "run.yaml")
    assert (model.name, model.n_layer, model.dim) == ("tiny", 2, 32)
    assert read_architecture(folder / "net.yaml").dim == 16
    (folder / "run.yaml").write_text("model: nett.yaml\n")
    with pytest.raises(UserError, match=r"run.yaml: model: nett.yaml does not exist: did you mean net.yaml\?"):
        read_architecture(folder / "run.yaml")
