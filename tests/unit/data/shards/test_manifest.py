"""manifest.json: what is not one, and what cannot be in one."""

import json

import pytest

from megastar.data.shards.manifest import load_manifest
from megastar.errors import UserError
from tests.unit.data.shards.test_shards import write_set

SHARD = {"name": "a.tar", "samples": 9, "bytes": 99999, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 9}, "has format 9, but this version of megastar reads formats 1 and 2"),
        ({"samples": 8}, "declares 8 samples, its shards 9"),
        ({"samples": 0, "shards": []}, "holds no samples: pretokenize again"),
        ({"shards": [{"nonsense": 1}]}, "is not a manifest of token shards"),
        ({"samples": True}, r"is not a manifest of token shards \(TypeError: samples is True, not of type int\)"),
        ({"samples": 9.0}, "samples is 9.0, not of type int"),
        ({"classes": [1]}, "classes must be strings"),
        ({"classes": []}, "names no classes"),
        ({"skipped": ["a"]}, "skipped must contain mappings"),
        ({"made_by": None}, "made_by is None, not of type dict"),
        ({"layout": "zip"}, "has layout 'zip', this version of megastar reads plain and packed"),
        ({"dtype": "O"}, "has codes of dtype 'O', this version of megastar reads uint16, "),
        ({"tokens": 17}, "declares 17 tokens on a grid of 4 x 4"),
        ({"grid": -4}, "declares 16 tokens on a grid of -4 x -4"),
        ({"views": 0}, "declares 0 views of 16 tokens"),
        ({"codebook_size": 0}, "has a codebook of 0, not of 1 to 262144 codes"),
        ({"codebook_size": 262145}, "has a codebook of 262145, not of 1 to 262144 codes"),
        ({"shards": [SHARD | {"name": "../a.tar"}]}, "names a shard '../a.tar': it must be the plain name of a .tar"),
        ({"shards": [SHARD | {"name": "/etc/passwd"}]}, "names a shard '/etc/passwd'"),
        ({"shards": [SHARD | {"name": "a\0.tar"}]}, "names a shard"),
        ({"shards": [SHARD | {"name": ".tar"}]}, "names a shard '.tar'"),
        ({"shards": [SHARD | {"name": "manifest.json"}]}, "names a shard 'manifest.json'"),
        ({"shards": [SHARD | {"samples": 0}, SHARD]}, "names the shard a.tar twice"),
        (
            {"shards": [SHARD | {"sha256": "../../x"}]},
            "records the SHA-256 '../../x' for a.tar, not 64 hexadecimal digits",
        ),
        ({"shards": [SHARD | {"bytes": 10}]}, "declares 9 samples of 96 bytes in the 10 bytes of a.tar"),
        ({"shards": [SHARD | {"bytes": 10**30}]}, "declares 9 samples of 96 bytes in the 1000"),
        ({"shards": [SHARD | {"samples": -9}, SHARD | {"name": "b.tar", "samples": 18}]}, "declares -9 samples"),
    ],
)
def test_bad_manifest(tmp_path, changes, message):
    folder = write_set(tmp_path / "s")
    data = json.loads((folder / "manifest.json").read_text()) | changes
    (folder / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=message):
        load_manifest(folder)


def test_no_manifest(tmp_path):
    with pytest.raises(UserError, match="folder .* does not exist: make it with `megastar pretokenize`"):
        load_manifest(tmp_path / "none")
    with pytest.raises(UserError, match="has no manifest.json: pretokenize has not finished there"):
        load_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{not json")
    with pytest.raises(UserError, match="is not a manifest of token shards"):
        load_manifest(tmp_path)
