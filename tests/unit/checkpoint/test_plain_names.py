"""Names in a checkpoint's files must not lead out of the folder that is written."""

import json
from pathlib import Path

import pytest

from megastar.run_dir import checkpoint_dir
from tests.checkpoints import write_checkpoint
from tests.unit.checkpoint.test_convert import CFG, refused, step_of


@pytest.fixture
def run(tmp_path) -> Path:
    write_checkpoint(tmp_path / "run", CFG, 1, 1)
    return tmp_path / "run"


@pytest.mark.parametrize(
    "name", ["../../../../escape", "/tmp/megastar-escape", "a/b", "..", ".hidden", "a\\b", "a\nb", ""]
)
def test_a_parameter_whose_name_is_a_path_is_refused(run, tmp_path, capsys, name):
    path = step_of(run) / "megastar.json"
    manifest = json.loads(path.read_text())
    manifest["parameters"][name] = [0]  # no file needs to hold it
    path.write_text(json.dumps(manifest))
    assert "megastar.json is damaged: " in refused([run, "--to", "universal", "--out", tmp_path / "u" / "v"], capsys)
    assert not Path("/tmp/megastar-escape").exists() and not (tmp_path / "u").exists()


@pytest.mark.parametrize("step", ["1/../../../escape", -1, 1.5])
def test_a_step_that_is_no_number_is_refused(run, tmp_path, capsys, step):
    path = step_of(run) / "megastar.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"step": step}))
    assert "megastar" in refused([run, "--to", "universal", "--out", tmp_path / "u" / "v"], capsys)
    assert not (tmp_path / "u").exists() and not (tmp_path / "escape").exists()


def test_the_pointer_to_the_newest_checkpoint_names_one_beside_it(run, tmp_path):
    (tmp_path / "elsewhere").symlink_to(step_of(run))
    folder = step_of(run).parent
    (folder / "latest").write_text(f"{tmp_path / 'elsewhere'}\n")
    assert checkpoint_dir.latest(folder) == step_of(run)
