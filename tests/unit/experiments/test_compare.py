"""megastar compare without training: planned runs, rejected configurations, stored results."""

from __future__ import annotations

import io
import re
import resource
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from megastar.cli import main
from megastar.config.load import load_compare_config, save_config
from megastar.data.loader import TokenLoader, open_shards
from megastar.engine.context import Context
from megastar.engine.student import Student
from megastar.engine.train_step import hidden_mask, losses
from megastar.errors import UserError
from megastar.experiments.comparison import Comparison
from megastar.experiments.evaluation import Evaluation
from megastar.experiments.job_queue import Attempt, Job
from megastar.experiments.plan import check_folder, check_order, encoder_of, is_trained, order_digest, plan_runs
from megastar.run_dir.checkpoint_dir import MANIFEST, name_of
from megastar.run_dir.lease import hold
from megastar.sampling.distributed import labels_like
from tests.unit.data.shards.test_shards import VIEWS, T, V, write_set

SMALL = """
out: {out}
pictures: pictures
seeds: [0, 1]
weights: [ema]
variants:
  ar: {{label: "AR | $1$", overrides: [self_guided.enabled=false]}}
  star: {{label: "ST-AR [red]"}}
probe: {{block: 1, positions: 2}}
curve: {{every: 4}}
base:
  model: {{name: tiny, n_layer: 2, n_head: 2, dim: 32, multiple_of: 16, vocab_size: 64, num_classes: 3, image_tokens: 16}}
  self_guided: {{contrastive_block: 1, projector_dim: 16}}
  train: {{global_batch: 4, steps: 8, epochs: 0, save_every: 4, val_every: 0, dtype: fp32}}
"""


def small(folder: Path, *overrides: str):
    file = folder / "compare.yaml"
    file.write_text(SMALL.format(out=folder / "out"))
    return load_compare_config(file, overrides)


@pytest.fixture(scope="module")
def shipped():
    cfg = load_compare_config("configs/run/compare_emoji.yaml")
    return cfg, {run.name: run for run in plan_runs(cfg, 0)}


# Which runs --------------------------------------------------------------------------------------------------------
def test_the_shipped_comparison_is_fair(shipped):
    cfg, runs = shipped
    of = {v: [r.seed for r in runs.values() if r.variant == v] for v in cfg.variants}
    assert [len(of[v]) for v in ("ar", "ar2", "star")] == [3, 3, 3]
    assert [of[v] for v in ("mim", "mim_step", "mim_view")] == [[0]] * 3
    assert [r.seed for r in runs.values()] == sorted(r.seed for r in runs.values())  # one run of each variant first
    assert len({(r.images, r.steps) for r in runs.values()}) == 1
    assert {v: runs[f"{v}-seed0"].sequences // runs[f"{v}-seed0"].images for v in of} == {
        "ar": 1, "ar2": 2, "star": 2, "mim": 2, "mim_step": 2, "mim_view": 2,
    }  # fmt: skip
    assert len({r.folder for r in runs.values()}) == len(runs)
    for run in runs.values():
        assert run.cfg.train.seed == run.seed and run.cfg.data.shards == f"{cfg.out}/codes/train"


def test_ablations_keep_the_masks_and_lose_only_their_term(shipped):
    _, runs = shipped
    batch = {"ids": torch.arange(3), "epochs": torch.zeros(3, dtype=torch.int64)}
    masks = {
        v: hidden_mask(runs[f"{v}-seed0"].cfg, batch, 2, torch.device("cpu"))
        for v in ("star", "mim", "mim_step", "mim_view")
    }
    for mask in masks.values():
        assert mask is not None and torch.equal(mask.end, masks["star"].end)
    terms = {v: runs[f"{v}-seed0"].cfg.self_guided for v in masks}
    assert {v: (g.alpha, g.step_loss, g.view_loss) for v, g in terms.items()} == {
        "star": (1.0, True, True), "mim": (1.0, False, False), "mim_step": (1.0, True, False), "mim_view": (1.0, False, True),
    }  # fmt: skip


def test_runs_of_one_seed_start_from_the_same_weights(shipped):
    """As engine/build.py makes them: the seed, then the student."""
    _, runs = shipped
    weights = {}
    for name, run in runs.items():
        torch.manual_seed(run.cfg.train.seed)
        weights[name] = Student(run.cfg).transformer.state_dict()
    for name, run in runs.items():
        theirs = weights[f"ar-seed{run.seed}"]
        assert all(torch.equal(value, theirs[key]) for key, value in weights[name].items()), name
    assert not torch.equal(weights["ar-seed0"]["tok_embeddings.weight"], weights["ar-seed1"]["tok_embeddings.weight"])


def test_runs_of_one_seed_see_the_same_images(tmp_path):
    """The digest covers what the loader returns, and a difference is an error."""
    folder = write_set(tmp_path / "s", (7, 6, 8, 5))
    cfg = small(
        tmp_path,
        f"base.model.image_tokens={T}",
        f"base.model.vocab_size={V}",
        "base.model.num_classes=4",
        "base.data.window=2",
    )
    runs = [replace_shards(run, folder) for run in plan_runs(cfg, 0)]
    digests = check_order(runs)
    assert digests["ar-seed0"] == digests["star-seed0"] != digests["ar-seed1"]
    seen = {}
    for run in runs[:2]:
        loader = TokenLoader(open_shards(folder, run.cfg.data), run.cfg)
        rows = [next(iter(loader)) for _ in range(run.steps)]
        seen[run.name] = [(r["ids"].tolist(), r["labels"].tolist(), r["codes"][:, 0].tolist()) for r in rows]
    assert seen["ar-seed0"] == seen["star-seed0"]
    other = replace(runs[1], cfg=replace(runs[1].cfg, data=replace(runs[1].cfg.data, window=1)))
    assert order_digest(other) != digests["star-seed0"]
    with pytest.raises(UserError, match="star-seed0 would train on other images than ar-seed0, or in another order"):
        check_order([runs[0], other])
    assert VIEWS >= 2


def replace_shards(run, folder):
    return replace(run, cfg=replace(run.cfg, data=replace(run.cfg.data, shards=str(folder))))


# The baseline's crops ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("crops", [1, 2])
def test_the_baseline_of_many_crops_is_next_token_loss_on_each(tmp_path, crops):
    cfg = small(tmp_path).base
    cfg.self_guided.enabled, cfg.self_guided.baseline_views = False, crops
    for dropout in ("token", "resid", "ffn"):
        setattr(cfg.model, f"{dropout}_dropout_p", 0.0)
    torch.manual_seed(0)
    student = Student(cfg)
    torch.nn.init.normal_(student.transformer.output.weight, std=0.1)  # it starts at zero: all losses would be equal
    codes, labels = torch.randint(0, 64, (3, crops, 16)), torch.tensor([0, 3, 1])
    context = Context(0, 1, torch.device("cpu"), torch.float32)
    loss, parts = losses(cfg, SimpleNamespace(student=student), context, {"codes": codes, "labels": labels}, 0)
    if crops == 1:
        assert torch.equal(loss, student(labels, codes[:, 0]).loss)  # as it was before the field existed
    each = []
    for view in range(crops):
        logits = student.transformer(labels, codes[:, view, :-1]).logits.double()
        each += [-logits.log_softmax(-1)[b, t, codes[b, view, t]] for b in range(3) for t in range(16)]
    assert loss.item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-6)
    assert parts.keys() == {"loss", "loss_ar"}


# What is refused -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("out=", "out is empty: name a folder"),
        ("pictures=", "pictures is empty: name a folder or a tar"),
        ("variants=", "variants is empty: name at least one"),
        ("seeds=[]", "seeds is empty: give at least one"),
        ("seeds=[0,1,0]", "seeds = [0, 1, 0]: a seed occurs twice; list each seed once"),
        ("seeds=[-1]", "seeds = -1: must be at least 0"),
        ("variants.star.seeds=[2,2]", "variants.star.seeds = [2, 2]: a seed occurs twice; list each seed once"),
        ("variants={'a/../b':{}}", "variants.a/../b: use only a-z, 0-9 and _ in a name"),
        ("variants.star.label='AR | $1$'", "variants: two variants have the label 'AR | $1$'"),
        ('variants.star.label="a\\nb"', "variants.star.label = 'a\\nb': must be one line"),
        ("variants.star.kind=best", "variants.star.kind = best: must be main or ablation"),
        ("variants.star.overides=[]", "unknown key variants.star.overides: did you mean variants.star.overrides?"),
        ("probe.positons=4", "unknown key probe.positons: did you mean probe.positions?"),
        ("weights=[best]", "weights = ['best']: must contain one or more of ema, student, each once"),
        ("score.against=[test,test]", "score.against = ['test', 'test']: must contain one or more of train, val, test, each once"),
        ("base.train.steps=0", "base.train.steps is 0: give the number of steps, the same for all variants"),
        ("curve.every=3", "curve.every = 3: must be a multiple of base.train.save_every 4"),
        ("probe.block=3", "probe.block = 3: must be at most base.model.n_layer 2"),
        ("probe.positions=17", "probe.positions = 17: must be at most base.model.image_tokens 16"),
        ("base.model.n_head=3", "base: "),
    ],
)  # fmt: skip
def test_mistakes_are_told(tmp_path, override, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        small(tmp_path, override)


@pytest.mark.parametrize(
    ("overrides", "gpus", "sentence"),
    [
        (["variants.star.overrides=[train.seed=3]"], 0, "variants.star.overrides contains train.seed=3, which the comparison sets itself: remove it"),
        (["variants.star.overrides=[self_guided.alfa=3]"], 0, "variant star: unknown key self_guided.alfa"),
        (["variants.star.overrides=[train.steps=12]"], 0, "variant star trains on 48 images, ar on 32: use equal train.steps"),
        (["variants.star.overrides=[train.steps=16,train.global_batch=2]"], 0, "trains on 16 steps, ar on 8"),
        (["variants.star.overrides=[train.save_every=3]"], 0, "variant star: train.save_every = 3 must divide curve.every 4"),
        (["nproc=4"], 2, "nproc = 4: there are 2 GPUs and each process of a run needs one; reduce nproc"),
    ],
)  # fmt: skip
def test_unfair_variants_are_told(tmp_path, overrides, gpus, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        plan_runs(small(tmp_path, *overrides), gpus)


def test_the_codes_store_the_features_of_one_encoder(tmp_path):
    aligned = "variants.{}.overrides=[repa.enabled=true,repa.encoder={}]"
    assert encoder_of(plan_runs(small(tmp_path), 0)) == ("", "")
    assert encoder_of(plan_runs(small(tmp_path, "variants.a.overrides=[repa.enabled=true]"), 0)) == ("efflite0", "")
    with pytest.raises(UserError, match="variants a and b: repa.encoder and encoder_weights .* use one encoder"):
        plan_runs(small(tmp_path, aligned.format("a", "efflite0"), aligned.format("b", "mine:encoder")), 0)


def test_the_comparison_of_methods_has_each_of_them():
    runs = {run.name: run.cfg for run in plan_runs(load_compare_config("configs/compare/methods_emoji.yaml"), 0)}
    found = {
        name.partition("-")[0]: (c.self_guided.enabled, c.repa.active, c.token_order.kind) for name, c in runs.items()
    }
    assert len(runs) == 20 and found["star_repa"] == (True, True, "raster") and found["repa"] == (False, True, "raster")
    assert found["random"] == (False, False, "random") and found["star"] == (True, False, "raster")
    assert runs["star_r35-seed0"].self_guided.mask_ratio == 0.35 and runs["star_k16-seed0"].self_guided.positions == 16


def test_the_command_tells_mistakes_in_one_sentence(tmp_path, capsys, monkeypatch):
    small(tmp_path)
    with monkeypatch.context() as launched:
        launched.setenv("RANK", "0")
        launched.setenv("WORLD_SIZE", "2")
        assert main(["compare", str(tmp_path / "compare.yaml")]) == 2
        assert "megastar compare starts its runs itself (nproc, jobs)" in capsys.readouterr().err
    for words, message in (
        ([], "name a configuration such as configs/run/compare_emoji.yaml"),
        ([str(tmp_path / "compare.yaml"), "--evaluate", "star"], "--evaluate star: the runs are ar-seed0, star-seed0"),
        (["--redraw", str(tmp_path)], "results.json cannot be read"),
        (["--redraw", str(tmp_path), "jobs=2"], "reads everything from that folder: leave out jobs=2"),
        (["--redraw", str(tmp_path), "--dry-run"], "not allowed with argument"),
    ):
        assert main(["compare", *words]) == 2 and message in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "compare.yaml"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "4 runs, 1 at a time, 128 images and 192 sequences in total" in printed and "star-seed1" in printed
    assert max(map(len, printed.splitlines()[:8])) <= 80 and not (tmp_path / "out").exists()


# What is kept --------------------------------------------------------------------------------------------------------
def trained(run, step: int, text: str = "") -> None:
    """The parts of a checkpoint that a comparison reads."""
    folder = run.folder / "checkpoints" / name_of(step)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).write_text(text or f"{run.name} {step}")
    save_config(run.cfg, run.folder / "config.yaml")


def test_another_configuration_in_the_same_folder_is_refused(tmp_path):
    cfg = small(tmp_path)
    first = plan_runs(cfg, 0)[0]
    save_config(cfg, Path(cfg.out) / "compare.yaml")
    trained(first, 4)
    for same in ("jobs=2", "probe.epochs=3", "seeds=[0,1,2]", "base.train.log_every=2", "curve.every=0"):
        again = small(tmp_path, same)
        check_folder(again, plan_runs(again, 0))
    for other, sentence in (
        ("base.optim.lr=0.5", "ar-seed0 contains a run with another configuration (optim.lr: 0.0001 -> 0.5): choose another out"),
        ("base.train.steps=12", "train.steps: 8 -> 12"),
        ("pictures=elsewhere", "contains a comparison with other data (pictures: pictures -> elsewhere): choose another out"),
    ):  # fmt: skip
        again = small(tmp_path, other)
        with pytest.raises(UserError, match=re.escape(sentence)):
            check_folder(again, plan_runs(again, 0))


def test_two_comparisons_do_not_share_a_folder(tmp_path):
    with hold(tmp_path, "megastar compare", "out"):
        again = hold(tmp_path, "megastar compare", "out")
        with pytest.raises(UserError, match="is in use by megastar compare"), again:
            pass
    with hold(tmp_path, "megastar compare", "out"):  # it is free again
        pass


def test_results_are_kept_under_what_they_depend_on(measured, tmp_path):
    run = plan_runs(measured.cfg, 0)[0]
    assert all(measured.file(part) is None for part in measured.parts(run))  # not trained yet
    trained(run, 4)
    trained(run, 8)
    parts = measured.parts(run)
    assert [(p.what, p.step, p.curve) for p in parts] == [
        ("probe", 8, False), ("score", 8, False), ("score", 4, True), ("score", 8, True),
    ]  # fmt: skip
    files = [measured.file(part) for part in parts]
    assert len(set(files)) == 4 and measured.missing(run) == parts
    files[0].parent.mkdir(parents=True)
    files[0].write_text('{"accuracy": [0.5]}')
    assert measured.read(parts[0]) == {"accuracy": [0.5]} and measured.missing(run) == parts[1:]
    files[0].write_text('{"accu')  # a disk that was full, on another file system than ours
    assert measured.missing(run) == parts

    def keys(*overrides):
        return [Evaluation(small(tmp_path, "base.data.tokenizer=tokenizer.bin", *overrides)).file(p) for p in parts]

    assert keys("jobs=7", "curve.probe=true") == files
    changed = [a == b for a, b in zip(keys("probe.epochs=2"), files, strict=True)]
    assert changed == [False, True, True, True]
    changed = [a == b for a, b in zip(keys("sample.seed=2"), files, strict=True)]
    assert changed == [True, False, False, False]
    trained(run, 8, "of another training")
    changed = [a == b for a, b in zip(keys(), files, strict=True)]
    assert changed == [False, False, True, False]


def test_the_key_of_a_result_stays(measured, tmp_path):
    """Results of hours are found again by later versions: change VERSION when their meaning changes, and this."""
    run = plan_runs(measured.cfg, 0)[0]
    trained(run, 8)
    probe = measured.parts(run)[0]
    assert measured.file(probe).name == "ar-seed0-00000008-ema-probe-fb3d569bba578a74.json"


def test_what_is_done_is_not_done_again(measured, tmp_path):
    cfg = measured.cfg
    runs = plan_runs(cfg, 0)
    comparison = Comparison(cfg, runs, 0, "megastar compare", Console(quiet=True))
    assert not is_trained(runs[0]) and comparison.next_job(runs[0]).stage == "train"
    trained(runs[0], 4)
    assert comparison.next_job(runs[0]).stage == "train"
    trained(runs[0], 8)
    job = comparison.next_job(runs[0])
    assert (job.stage, job.total, job.done()) == ("evaluate", 4, 0)
    comparison.evaluation.folder.mkdir(parents=True)
    for i, part in enumerate(comparison.evaluation.missing(runs[0])):
        assert job.done() == i
        comparison.evaluation.file(part).write_text("{}")
    assert comparison.next_job(runs[0]) is None
    shutil.rmtree(runs[0].folder)  # someone removes the run: it is made again
    assert comparison.next_job(runs[0]).stage == "train"


def test_a_full_disk_stops_no_run(measured):
    """A warning is printed, and the following job starts."""
    runs = plan_runs(measured.cfg, 0)
    console = Console(file=io.StringIO(), width=200)
    comparison = Comparison(measured.cfg, runs, 0, "megastar compare", console)
    comparison.digests = dict.fromkeys(comparison.by_name, "")
    trained(runs[0], 8)
    trained(runs[0], 4)
    (runs[0].folder / "checkpoints" / "latest").write_text(name_of(8))
    job = Job(runs[0].name, "train", [], Path("log"), 8)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        follows = comparison.job_ended(Attempt(job, 0, 1.0, 1.0, interrupted=False))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [f.stage for f in follows] == ["evaluate"] and not comparison.failed
    assert f"cannot write to {comparison.out}: File too large" in console.file.getvalue()
    assert not list(comparison.out.glob("*.tmp")) and not (comparison.out / "times.json").exists()


def test_a_missing_checkpoint_is_an_error_with_remedy(measured):
    with pytest.raises(UserError, match=r"step-00000008 does not exist: train ar-seed0 to its end first; if.*remove"):
        measured.run(plan_runs(measured.cfg, 0)[0], Console(quiet=True))


def test_sampled_labels_are_as_frequent_as_in_the_split():
    pool = [0] * 6 + [1] * 3 + [2]
    labels = labels_like(pool, 20, 0)
    assert np.bincount(labels).tolist() == [12, 6, 2]
    assert labels_like(pool, 7, 0) == labels[:7] and labels_like(pool, 20, 1) != labels


def test_each_job_has_its_own_gpus_if_there_are_enough(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def gpus_of_jobs(gpus, *overrides):
        cfg = small(tmp_path, *overrides)
        found = Comparison(cfg, plan_runs(cfg, gpus), gpus, "", Console(quiet=True)).environments()
        return [e.get("CUDA_VISIBLE_DEVICES") for e in found]

    assert gpus_of_jobs(4, "jobs=2", "nproc=2") == ["0,1", "2,3"]
    assert gpus_of_jobs(3, "jobs=2", "nproc=2") == ["0,1", "2,0"]  # two runs share, no run has one twice
    assert gpus_of_jobs(1, "jobs=3") == ["0", "0", "0"]
    assert gpus_of_jobs(0, "jobs=9") == [None] * 4  # no more places than runs
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-a")
    assert gpus_of_jobs(2, "jobs=2") == ["5", "GPU-a"]
