"""A repeated `megastar sample --npz` of a finished file: nothing is sampled again, and the grid is drawn from the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megastar import cli
from megastar.sampling import distributed
from megastar.sampling.distributed import SamplingPipeline
from tests.unit.sampling.test_distributed import alone, files, networks, words

__all__ = ["alone", "files", "networks"]  # fixtures


def test_the_grid_of_a_finished_npz_is_written_later(files, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    npz, one, parts = tmp_path / "a.npz", tmp_path / "one.png", tmp_path / "a.npz.parts"
    what = ["--count", 11, "--batch", 3, "--per-class", 2, "--npz", npz]
    plain, killed = distributed.join_parts, RuntimeError("killed")

    def join(*arguments):
        plain(*arguments)
        raise killed

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(distributed, "join_parts", join)  # between the .npz and the grid
        cli.main(words(files, *what))
    assert npz.is_file() and parts.is_dir() and not Path("samples.png").exists()
    whole = npz.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(SamplingPipeline, "sample_chunk", None)  # nothing is sampled again
        assert cli.main(words(files, *what)) == 0
        assert Path("samples.png").is_file() and not parts.exists() and npz.read_bytes() == whole
        assert cli.main(words(files, *what, "--out", one)) == 0
    wanted = tmp_path / "wanted.png"  # that of an uninterrupted command
    assert cli.main(words(files, *what[:-1], tmp_path / "b.npz", "--out", wanted)) == 0
    for path in (Path("samples.png"), one):
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(wanted)))

    before = Path("samples.png").stat().st_ino
    capsys.readouterr()
    assert cli.main(words(files, *what)) == 0 and Path("samples.png").stat().st_ino == before
    assert "is already complete" in " ".join(capsys.readouterr().out.split())
    for damaged, sentence in (
        (whole[:900], "a.npz is not a readable .npz"),
        (
            make_npz(tmp_path, (11, 8, 8, 3)),
            "a.npz: arr_0 is uint8 (11, 8, 8, 3), expected uint8 (11, 16, 16, 3): remove it",
        ),
        (make_npz(tmp_path, (11, 16, 16, 3), flipped=True), "a.npz is not a readable .npz"),
    ):
        npz.write_bytes(damaged)
        assert cli.main(words(files, *what, "--out", one)) == 2
        assert sentence in " ".join(capsys.readouterr().err.split())


def make_npz(folder: Path, shape: tuple[int, ...], flipped: bool = False) -> bytes:
    """An .npz of black images; ``flipped``: compressed, with a wrong byte in the data."""
    (np.savez_compressed if flipped else np.savez)(folder / "black.npz", arr_0=np.zeros(shape, np.uint8))
    data = bytearray((folder / "black.npz").read_bytes())
    if flipped:
        data[60:70] = b"\xff" * 10
    return bytes(data)
