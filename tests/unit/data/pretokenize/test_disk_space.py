"""pretokenize compares the size of codes and features with the free space before it encodes an image."""

from __future__ import annotations

import re
import shutil
from types import SimpleNamespace

import pytest
import torch

from megastar.data.pretokenize import runner
from megastar.data.shards.manifest import load_manifest
from megastar.errors import UserError
from tests.unit.data.pretokenize.test_runner import images, run, tokenizer  # noqa: F401

ENCODER = "tests.unit.data.pretokenize.test_disk_space:narrow"
CODES, FEATURES = 2 * 64 * 2, 2 * 64 * 3 * 2  # bytes of an image: 2 crops of 8 x 8 tokens, with 3 features each


def narrow(pixels: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(pixels), 64, 3)


@pytest.fixture
def disk(monkeypatch):
    """Sets the free bytes of all disks."""

    def free(count: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=count))

    return free


@pytest.mark.parametrize("layout", ["plain", "packed"])
def test_a_set_that_does_not_fit_is_refused_before_work(images, tokenizer, tmp_path, disk, monkeypatch, layout):  # noqa: F811
    out = tmp_path / "out"
    options = {"crops": "center-flip", "layout": layout, "features": ENCODER}
    disk(23 * (CODES + FEATURES) - 1)
    with monkeypatch.context() as broken:
        broken.setattr(runner.PretokenizeRun, "write", lambda *_: pytest.fail("an image was encoded"))
        sentence = f"the codes and features of 23 images need 23.6 kB and {out} has 23.6 kB free: free space, choose another --out"
        with pytest.raises(UserError, match=re.escape(sentence)) as error:
            run(images, tokenizer, out, **options)
    assert "narrower features" in str(error.value) and "\n" not in str(error.value)
    disk(23 * CODES - 1)
    with pytest.raises(UserError, match=r"the codes of 23 images need 5\.9 kB") as error:
        run(images, tokenizer, out, crops="center-flip", layout=layout)
    assert "features" not in str(error.value)
    disk(23 * (CODES + FEATURES))  # the refusals have bound the folder to no settings
    assert run(images, tokenizer, out, **options).samples == 23
    written = sum(path.stat().st_size for path in out.glob("shard-*.tar"))
    assert written > 23 * (CODES + FEATURES)  # the payload alone: a set is not refused that fits


def test_what_is_there_already_is_not_counted(images, tokenizer, tmp_path, disk):  # noqa: F811
    out = tmp_path / "out"
    options = {"crops": "center-flip", "features": ENCODER}
    run(images, tokenizer, out, **options)
    (out / "shard-00001.tar").unlink()
    disk(5 * (CODES + FEATURES) - 1)
    with pytest.raises(UserError, match=f"the codes and features of 5 images that are not in {out} yet need 5.1 kB"):
        run(images, tokenizer, out, **options)
    (out / "shard-00001.tar.1-00000000.tmp").write_bytes(b"x")  # of a process that writes this shard
    assert run(images, tokenizer, out, **options).samples == 23
    disk(0)
    assert run(images, tokenizer, out, **options) == load_manifest(out)  # a complete set needs nothing
