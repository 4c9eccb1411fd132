"""Files that commands write at their end are checked before the work."""

from __future__ import annotations

from pathlib import Path

import pytest

from megastar import cli
from megastar.commands.elastic import write_status

WORDS = ("elastic", "--nodes", "1:1", "--hosts", "127.0.0.1", "--index", "0", "--status-file")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("", "is a folder: name the file to write"),
        ("file/status", "file is not a folder: name another place"),
        ("run.yaml", "would overwrite the input"),
        ("x" * 250, "cannot be written (File name too long)"),
    ],
)
def test_the_status_file_of_elastic_is_checked_before_agents_start(tmp_path, capsys, name, problem):
    (tmp_path / "file").touch()
    config = tmp_path / "run.yaml"
    config.write_text(f"run: {tmp_path / 'run'}\ndata: {{shards: x}}\n")
    assert cli.main([*WORDS, str(tmp_path / name), str(config)]) == 2
    said = capsys.readouterr().err
    assert f"--status-file {tmp_path / name}".rstrip("/") in said and problem in said
    assert {p.name for p in tmp_path.iterdir()} == {"file", "run.yaml"}


def test_the_status_is_written_or_reported(tmp_path, capsys):
    write_status(tmp_path / "new" / "status", 86)
    assert (tmp_path / "new" / "status").read_text() == "86\n"
    (tmp_path / "file").touch()
    write_status(tmp_path / "file" / "status", 86)  # the folder was replaced while the run went on
    said = capsys.readouterr().err
    assert "cannot be written" in said and "the exit status is 86" in said


def test_a_folder_whose_tables_are_drawn_again_is_checked(capsys):
    folder = Path("/proc/self")  # nobody can write there
    assert cli.main(["compare", "--redraw", str(folder)]) == 2
    assert f"--redraw {folder} cannot be written" in capsys.readouterr().err
