"""Files that are whole or not there."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megastar.checkpoint.atomic_output import staged
from megastar.errors import UserError
from megastar.sampling.grid import save_grid
from megastar.sampling.npz import save_npz
from megastar.utils.files import (
    append_line,
    atomic_file,
    check_output,
    remove_dead_temporaries,
    temporary_path,
    write_atomic,
    write_output,
)


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write_output(pipe, b"page")
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


def test_an_output_is_checked_before_the_work(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "pipe").touch()
    os.remove(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe")
    for path, words, folder in (
        (tmp_path, "--out .* is a folder: name the file to write", False),
        (tmp_path / "file", "--out .* is not a folder: name another place", True),
        (tmp_path / "file/x.json", "file is not a folder: name another place", False),
        (tmp_path / "file/a/b", "file is not a folder: name another place", True),
        (tmp_path / ("x" * 240), "cannot be written .File name too long.", False),
        (tmp_path / ("x" * 300), "cannot be written .File name too long.", False),
        (Path("/proc/x.json"), "--out /proc/x.json cannot be written", False),
        (tmp_path / "link", "--out .*link would overwrite the input .*file: name another file", False),
    ):
        with pytest.raises(UserError, match=words):
            check_output(path, "--out", [tmp_path / "file", None, "not there"], folder)
    for path in (tmp_path / "a/b/c.json", tmp_path / "new", tmp_path / "pipe", Path("/dev/null")):
        check_output(path, "--out", [tmp_path / "file"])
    check_output(tmp_path / "file", "--out")
    check_output(tmp_path, "--out", folder=True)
    assert sorted(os.listdir(tmp_path)) == ["file", "link", "pipe"] and (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_is_noticed_before_the_work(tmp_path, monkeypatch):
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for folder in (False, True):
        with pytest.raises(UserError, match="--out .* cannot be written .No space left on device.: free space or"):
            check_output(tmp_path / "x", "--out", folder=folder)
    assert not os.listdir(tmp_path)


def test_temporary_files_of_killed_processes_are_removed(tmp_path):
    child = subprocess.Popen(["true"])
    child.wait()
    host = socket.gethostname()
    dead, mine = tmp_path / f"a.json.{host}.{child.pid}-01234567.tmp", temporary_path(tmp_path / "a.json")
    others = [tmp_path / f"a.json.elsewhere.{child.pid}-01234567.tmp", tmp_path / "notes.tmp", mine]
    for path in (dead, *others):
        path.touch()
    remove_dead_temporaries(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(others)
