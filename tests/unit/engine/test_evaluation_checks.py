"""What is wrong with the evaluations of a run is told in one sentence before it starts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megastar.config.load import load_config
from megastar.config.schema import RunConfig, TokenizerConfig
from megastar.engine.evaluation.checks import check_evaluation
from megastar.engine.input_pipeline.data_checks import open_data
from megastar.errors import UserError
from megastar.run_dir.evaluations import append_evaluation
from megastar.tokenizer.io import save_tokenizer, tokenizer_hash
from megastar.tokenizer.vq import VQModel
from tests.unit.data.shards.test_shards import T, V, write_set


@pytest.fixture
def run(tmp_path):
    """Makes the configuration of a run on token shards from its overrides."""
    pytest.importorskip("efficientnet_lite_pytorch")
    tokenizer = tmp_path / "t.safetensors"
    save_tokenizer(VQModel(TokenizerConfig(16, 8, [1, 1, 1], 1, 8, V, 4, norm_groups=4)), tokenizer, {})
    shards = write_set(tmp_path / "train", (7, 6), tokenizer_sha256=tokenizer_hash(tokenizer))
    fits = [f"model.vocab_size={V}", f"model.image_tokens={T}", "model.num_classes=4", "train.global_batch=8"]
    fits += [f"data.shards={shards}", f"data.tokenizer={tokenizer}", f"run={tmp_path / 'run'}", "eval.samples=4"]

    def make(*overrides: str) -> RunConfig:
        return load_config(None, [*fits, *overrides])

    return make


def test_a_subset_of_an_npz_is_refused(run, tmp_path):
    reference = tmp_path / "real.npz"
    np.savez(reference, np.zeros((6, 16, 16, 3), np.uint8))
    cfg = run("eval.every=2", f"eval.against={reference}")
    check_evaluation(cfg, open_data(cfg))
    cfg = run("eval.every=2", f"eval.against={reference}", "eval.against_subset=train")
    with pytest.raises(UserError, match="real.npz: an .npz has no top-level folders, so the subset train cannot"):
        check_evaluation(cfg, open_data(cfg))
    np.savez(reference, mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(UserError, match="real.npz: an .npz has no top-level folders, so the subset train cannot"):
        check_evaluation(cfg, open_data(cfg))
    cfg = run("eval.every=2")  # the training shards, decoded
    check_evaluation(cfg, open_data(cfg))


def test_thresholds_without_evaluations_are_refused(run):
    never = run("eval.thresholds=[50.0,20.0]")  # loads, as configurations of old runs do
    sentence = (
        r"eval.thresholds = \[50.0, 20.0\]: no score is compared with them, since eval.every is 0: set eval.every, or"
    )
    for data in (None, open_data(never)):
        with pytest.raises(UserError, match=sentence):
            check_evaluation(never, data)
    check_evaluation(run(), None)
    check_evaluation(run("eval.thresholds=[50.0]", "eval.every=2"), None)
    inert = run(
        "eval.metric=fid", "eval.inception=x.pth", "eval.against=x.npz"
    )  # for `eval.every=0` in front of a debugger
    check_evaluation(inert, None)
    score = {
        "step": 2,
        "epoch": 0.5,
        "metric": "FD-EffLite0",
        "value": 60.0,
        "samples": 4,
        "cfg_scale": 1.0,
        "weights": "ema",
    }
    score |= {"against": "train", "key": "ab", "rollbacks": 0, "seconds": 1.0, "time": "2026-01-01T00:00:00+00:00"}
    Path(never.run).mkdir()
    append_evaluation(Path(never.run), score)  # switched off after a score, which `megastar status` still compares
    check_evaluation(never, None)
