"""What one rank alone finds out at the start ends all of them, with its sentence."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megastar.data.shards.reader import ShardSet
from megastar.utils.files import sha256
from tests import forker
from tests.integration.conftest import environment
from tests.unit.data.shards.test_shards import T, V, write_set


@pytest.mark.dist
def test_a_validation_set_that_one_rank_cannot_read(tmp_path):
    write_set(tmp_path / "train", (8, 8))
    folder = write_set(tmp_path / "val", (8,))
    with (folder / "shard-00000.tar").open("r+b") as f:  # sample 2 is the second rank's
        f.seek(int(ShardSet(folder).index(0).offsets[2]))
        f.write(np.full(T, V, "<u2").tobytes())
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["sha256"] = sha256(folder / "shard-00000.tar")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    config = tmp_path / "run.yaml"
    config.write_text(f"""
run: {tmp_path / "run"}
model: {{name: tiny, n_layer: 1, n_head: 2, dim: 16, multiple_of: 16, vocab_size: {V}, num_classes: 4, image_tokens: {T}}}
data: {{shards: {tmp_path / "train"}, val_shards: {folder}}}
self_guided: {{contrastive_block: 1, projector_dim: 8}}
train: {{global_batch: 8, micro_batch: 2, steps: 2, dtype: fp32, val_every: 1, val_images: 8}}
""")
    done = forker.run(["-m", "megastar", "train", str(config)], environment(), 2)
    sentence = f"sample 2 of {folder} holds code {V}, outside the codebook of {V}"
    # The one rank may be ended before it has spoken, but the other says the whole of it.
    assert done.returncode == 2 and sentence in done.stderr, done.stderr
    assert "Connection" not in done.stderr and "Traceback" not in done.stderr, done.stderr
