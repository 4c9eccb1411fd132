"""Files that are whole or not there."""

from __future__ import annotations

import os
import stat
import threading

import numpy as np
import pytest
from PIL import Image

from megastar.checkpoint.atomic_output import staged
from megastar.errors import UserError
from megastar.sampling.grid import save_grid
from megastar.sampling.npz import save_npz
from megastar.utils.files import append_line, atomic_file, write_atomic


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write_atomic(pipe, b"page")
    reader.join(10)
    assert read == [b"page"] and stat.S_ISFIFO(pipe.stat().st_mode) and os.listdir(tmp_path) == ["pipe"]


@pytest.mark.parametrize("kind", ["a device or pipe", "a folder"])
def test_other_outputs_refuse_what_a_rename_would_replace(tmp_path, kind):
    out = tmp_path / "out"
    if kind == "a folder":
        out.mkdir()
    else:
        os.mkfifo(out)

    def convert():
        with staged(out, 0, force=True):
            raise AssertionError("not refused")

    grid, pixels = Image.new("RGB", (2, 2)), np.zeros((1, 2, 2, 3), np.uint8)
    for write in (
        convert,
        lambda: save_npz(out, pixels.shape, [pixels], np.zeros(1)),
        lambda: save_grid(grid, out),
        lambda: atomic_file(out).__enter__(),
    ):
        with pytest.raises(UserError, match=f"{out} is {kind}: name the file to write"):
            write()
    assert os.listdir(tmp_path) == ["out"] and not out.is_file()


def test_a_failed_write_leaves_the_former_file(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, b"first")
    with pytest.raises(TypeError):
        write_atomic(path, "text")
    assert path.read_bytes() == b"first" and os.listdir(tmp_path) == ["file"]


def test_a_line_is_appended_below_one_that_was_cut(tmp_path):
    path = tmp_path / "lines"
    path.write_text('{"a"')
    append_line(path, "{}")
    assert path.read_text() == '{"a"\n{}\n'
