"""What is wrong with the evaluations of a run is told in one sentence before it starts."""

from __future__ import annotations

import numpy as np
import pytest

from megastar.config.load import load_config
from megastar.config.schema import RunConfig, TokenizerConfig
from megastar.engine.evaluation.checks import check_evaluation
from megastar.engine.input_pipeline.data_checks import open_data
from megastar.errors import UserError
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
