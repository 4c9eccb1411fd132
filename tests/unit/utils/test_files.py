"""Files that are whole or not there."""

from __future__ import annotations

import os
import stat
import threading

import pytest

from megastar.utils.files import append_line, write_atomic


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write_atomic(pipe, b"page")
    reader.join(10)
    assert read == [b"page"] and stat.S_ISFIFO(pipe.stat().st_mode) and os.listdir(tmp_path) == ["pipe"]


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
