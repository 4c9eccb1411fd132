"""A set of plain `webdataset` writers on a real S3 server: indexed there, then trained on through the cache."""

from __future__ import annotations

import pytest

from megastar.config.schema import DataConfig
from megastar.data.shards.import_webdataset import index_webdataset
from megastar.data.shards.manifest import load_manifest
from megastar.errors import UserError
from tests.integration.helpers.s3 import client_of
from tests.loaders import make_loader
from tests.unit.data.shards.test_import_webdataset import CLASSES, T, V, foreign
from tests.unit.data.test_loader import same, take

pytestmark = pytest.mark.dist


def test_a_foreign_set_on_s3(s3, use_s3, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = foreign(tmp_path / "f", dtype="int32")
    client, url = client_of(s3), "s3://codes/foreign"
    for path in folder.iterdir():
        client.upload_file(str(path), "codes", f"foreign/{path.name}")
    use_s3(s3)
    data = DataConfig(cache=str(tmp_path / "cache"), patience=60)
    made = index_webdataset(url, codebook_size=V, data=data)
    assert load_manifest(url, data) == made == index_webdataset(folder, codebook_size=V)
    kept = {o["Key"].rpartition("/")[2] for o in client.list_objects_v2(Bucket="codes", Prefix="foreign/")["Contents"]}
    assert kept == {p.name for p in folder.iterdir()} >= {"train-000.idx", "train-001.idx"}
    assert index_webdataset(url, codebook_size=V, data=data) == made  # a second time, over its own manifest
    settings = {"seed": 0, "global_batch": 4, "views": 2, "class_dropout_prob": 0.1, "num_classes": CLASSES}
    settings |= {"vocab_size": V, "tokens": T}
    here, there = make_loader(folder, **settings), make_loader(url, data=data, **settings)
    assert all(same(a, b) for a, b in zip(take(here, 6), take(there, 6), strict=True))
    with pytest.raises(UserError, match=r"s3://codes/none contains no .tar"):
        index_webdataset("s3://codes/none", codebook_size=V, data=data)
