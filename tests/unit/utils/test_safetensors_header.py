"""Files of tensors whose folder has a name that is not UTF-8."""

import os

import pytest
import torch
from safetensors.torch import load_file, save

from megastar.utils.weights.safetensors_header import open_tensors, read_header, utf8_name


@pytest.mark.parametrize("folder", [b"plain", b"\xff\xfe"])
def test_tensors_in_a_folder_of_any_name(tmp_path, folder):
    path = tmp_path / os.fsdecode(folder) / "a.safetensors"
    path.parent.mkdir()
    path.write_bytes(save({"a": torch.arange(3)}))
    file = open_tensors(path)
    assert file.get_tensor("a").tolist() == [0, 1, 2] and set(read_header(path)[1]) == {"a"}
    with utf8_name(path) as name:
        assert load_file(name)["a"].tolist() == [0, 1, 2]
