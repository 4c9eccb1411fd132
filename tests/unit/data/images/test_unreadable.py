"""Images that are whole, and cannot be read by this process: they are not skipped."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from PIL import Image

from megastar.data.images import dataset
from megastar.data.images.dataset import ImageSet
from megastar.data.images.decoding import decode
from megastar.errors import UserError
from tests.unit.data.images.test_dataset import make_folder, png


@pytest.mark.parametrize("tar", [False, True])
def test_what_this_user_may_not_read_is_not_skipped(tmp_path, monkeypatch, tar):
    """Of a job array, the node that may not open the tar would else skip all images, and be the fastest."""
    source = make_folder(tmp_path / "tree", {"cat/0.png": png()})
    if tar:
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            archive.add(source / "cat", "cat")
        source = tmp_path / "a.tar"
    images = ImageSet(source)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(dataset, "open_regular", refuse)
    name = "a.tar" if tar else "cat/0.png"
    with pytest.raises(UserError, match=rf"{name} cannot be read \(Permission denied\): make it readable here"):
        images.read(0)


def test_an_image_is_not_skipped_for_lack_of_memory(monkeypatch):
    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", full)
    with pytest.raises(UserError, match="x: no memory is left to decode it"):
        decode(png(), "x")
