"""Pictures on a real S3 server: the same shards as from the folder, outages waited out, a change found."""

from __future__ import annotations

import threading
import time

import pytest
from rich.console import Console

from megastar.data.pretokenize.runner import pretokenize
from megastar.errors import UserError
from tests.integration.helpers.s3 import client_of
from tests.unit.data.images.test_sources import write_source
from tests.unit.data.pretokenize.test_runner import contents, tokenizer  # noqa: F401

SETTINGS = {"crops": "center", "shard_size": 5, "device": "cpu", "workers": 2, "console": Console(quiet=True)}


@pytest.fixture
def tars(s3, tmp_path, request):
    """(URL of a folder of class tars, the folder): a prefix for each test."""
    folder = write_source("class tars", tmp_path)
    client = client_of(s3)
    for path in folder.iterdir():
        client.upload_file(str(path), "public", f"{request.node.name}/train/{path.name}")
    return f"s3://public/{request.node.name}/train", folder


@pytest.mark.parametrize("cut", [False, True])
def test_the_same_shards_from_s3(tars, tokenizer, tmp_path, relay, use_s3, cut):  # noqa: F811
    """Also when the relay cuts connections in the middle of the answers."""
    url, folder = tars
    use_s3(relay.endpoint)
    if cut:
        relay.cuts, relay.limit = 3, 300
    pretokenize(folder, None, tokenizer, tmp_path / "local", **SETTINGS)
    manifest = pretokenize(url, None, tokenizer, tmp_path / "remote", **SETTINGS)
    assert manifest.samples == 12 and contents(tmp_path / "local") == contents(tmp_path / "remote")
    assert not cut or relay.cuts == 0


def test_one_tar(tars, tokenizer, tmp_path, s3, use_s3):  # noqa: F811
    url, folder = tars
    use_s3(s3)
    here = pretokenize(folder / "n00000002.tar", None, tokenizer, tmp_path / "local", **SETTINGS)
    there = pretokenize(f"{url}/n00000002.tar", None, tokenizer, tmp_path / "remote", **SETTINGS)
    assert here == there and there.classes == ["n00000002"] and there.samples == 4


def test_an_outage_is_waited_out(tars, tokenizer, tmp_path, weed, use_s3):  # noqa: F811
    url, folder = tars
    use_s3(weed.endpoint)
    weed.kill()
    timer = threading.Timer(2, weed.start)
    timer.start()
    start = time.monotonic()
    manifest = pretokenize(url, None, tokenizer, tmp_path / "remote", **SETTINGS)
    timer.join()
    assert manifest.samples == 12 and time.monotonic() - start > 2


def test_a_tar_that_changes_is_found(tars, tokenizer, tmp_path, s3, use_s3):  # noqa: F811
    from megastar.data.images.dataset import ImageSet

    url, folder = tars
    use_s3(s3)
    cache = tmp_path / "pictures.npz"
    pictures = ImageSet(url, cache=cache)
    key = f"{url.removeprefix('s3://public/')}/n00000001.tar"
    client_of(s3).put_object(Bucket="public", Key=key, Body=(folder / "n00000002.tar").read_bytes())
    with pytest.raises(UserError, match=r"n00000001.tar changed while it was read"):
        pictures.read(0)
    assert ImageSet(url, cache=cache)[0].key == "n00000001/n00000002_0"  # listed anew


def test_what_is_not_there(tokenizer, tmp_path, s3, use_s3):  # noqa: F811
    use_s3(s3)
    with pytest.raises(UserError, match=r"no images in s3://public/nothing"):
        pretokenize("s3://public/nothing", None, tokenizer, tmp_path / "a", **SETTINGS)
    with pytest.raises(UserError, match=r"bucket none of s3://none/x.* does not exist"):
        pretokenize("s3://none/x", None, tokenizer, tmp_path / "a", **SETTINGS)


def test_hidden_objects_are_ignored_and_counted(tars, s3, request, use_s3):
    from megastar.data.images.dataset import ImageSet

    url, folder = tars
    use_s3(s3)
    for name in ("._n00000001.tar", "__MACOSX/n00000001.tar"):
        client_of(s3).put_object(Bucket="public", Key=f"{request.node.name}/train/{name}", Body=b"side")
    found = ImageSet(url)
    assert found.digest() == ImageSet(folder).digest()
    assert found.notes == ["hidden and system files and folders, ignored: 2, for example '._n00000001.tar'"]
