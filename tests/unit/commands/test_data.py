"""megastar data: what it says of a good set, which shards it names in a bad one, one sentence for each mistake."""

import json
import math
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megastar import cli
from megastar.data.shards.manifest import Manifest, load_manifest
from megastar.data.shards.sample_parser import LAYOUTS
from megastar.data.shards.stats import count
from megastar.data.shards.verify import verify
from megastar.data.shards.writer import open_writer
from megastar.sampling.sampler import decode_images
from megastar.tokenizer.io import load_tokenizer, tokenizer_hash
from megastar.utils.files import sha256
from tests.loaders import make_loader
from tests.unit.commands.test_cli import error
from tests.unit.data.shards.test_shards import VIEWS, T, V, sample, write_set

TOKENIZER = Path(__file__).resolve().parents[3] / "assets/tokenizer/emoji64-vq.safetensors"
SIZES = (5, 0, 4)


@pytest.fixture(params=LAYOUTS)
def folder(request, tmp_path) -> Path:
    return write_set(tmp_path / "s", SIZES, request.param)


def run(capsys, *words: object) -> str:
    assert cli.main([str(w) for w in ("data", *words)]) == 0
    return capsys.readouterr().out


# inspect -----------------------------------------------------------------------------------------------------------
def test_inspect(folder, capsys):
    text = run(capsys, "inspect", folder, "--samples", 2)
    size = sum(s.bytes for s in load_manifest(folder).shards)
    for part in ("9", "0 to 5", f"{size / 1e3:.1f} kB", "4: a, b, c, d", "center-flip", "4 x 4", "ab" * 32):
        assert part in text
    assert "a/picture.1  class 1 b" in text and "a/picture.2" not in text
    about = json.loads(run(capsys, "inspect", folder, "--json"))
    assert (about["samples"], about["shards"], about["bytes"], about["views"]) == (9, 3, size, VIEWS)
    assert about["layout"] == load_manifest(folder).layout and about["class_names"] == list("abcd")
    data = json.loads((folder / "manifest.json").read_text()) | {"classes": ["\x1b[31mred", "b", "c", "d"]}
    (folder / "manifest.json").write_text(json.dumps(data))
    assert r"\x1b[31mred" in (text := run(capsys, "inspect", folder)) and "\x1b" not in text
    assert about["first"][4] == {"id": 4, "source": "a/picture.4", "class": 0, "class_name": "a"}


# verify ------------------------------------------------------------------------------------------------------------
def test_a_good_set(folder, capsys):
    assert verify(folder) == []
    assert run(capsys, "verify", folder) == "3 shards, 9 samples: all match the manifest\n"


def test_every_broken_shard_is_named(tmp_path, capsys):
    folder = write_set(tmp_path / "s", (5, 4, 3, 2, 6, 2))
    shard = [folder / f"shard-{n:05d}.tar" for n in range(6)]
    shard[0].unlink()
    os.truncate(shard[1], shard[1].stat().st_size - 512)
    for number, at in ((2, 512 * 3 + 200), (4, 512 * 2 + 3)):  # a bit of a code, and one of a header
        content = bytearray(shard[number].read_bytes())
        content[at] ^= 1
        shard[number].write_bytes(content)
    data = json.loads((folder / "manifest.json").read_text())
    data["shards"][5] |= {"samples": 3}  # an honest hash of a shard that lacks a sample
    (folder / "manifest.json").write_text(json.dumps(data | {"samples": 23}))
    found = verify(folder)
    assert {p.shard for p in found} == {p.name for p in shard} - {shard[3].name}
    reasons = {p.shard: p.reason for p in found}
    assert "is missing though the manifest lists it" in reasons[shard[0].name]
    assert "it was truncated or changed" in reasons[shard[1].name]
    assert f"has SHA-256 {sha256(shard[2])}, the manifest records" in reasons[shard[2].name]
    assert [p.reason for p in found if p.shard == shard[4].name][1].endswith("copy it again or pretokenize again")
    assert "holds 2 samples, the manifest records 3" in reasons[shard[5].name]
    assert cli.main(["data", "verify", str(folder)]) == 1
    out = capsys.readouterr().out
    assert all(p.name in out for p in shard if p != shard[3]) and "5 of 6 shards are damaged" in out
    assert cli.main(["data", "verify", str(folder), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["broken"] == 5 and [p["shard"] for p in report["problems"]] == [p.shard for p in found]


def test_a_failing_disk_and_an_empty_shard_are_named(tmp_path, monkeypatch):
    folder = write_set(tmp_path / "s", (2, 3))
    data = json.loads((folder / "manifest.json").read_text())
    (folder / "none.tar").touch()
    data["shards"].append({"name": "none.tar", "samples": 0, "bytes": 0, "sha256": sha256(folder / "none.tar")})
    (folder / "manifest.json").write_text(json.dumps(data))

    def failing(f):
        if f.name.endswith("shard-00001.tar"):
            raise OSError(5, "Input/output error")
        return sha256(Path(f.name))

    monkeypatch.setattr("megastar.data.storage.store.sha256_of", failing)
    assert list(map(str, verify(folder))) == [
        "shard-00001.tar: cannot be read (Input/output error): check the disk or copy it again",
        "none.tar: is empty: it was truncated or changed",
    ]


def test_codes_and_classes_out_of_range(folder, capsys):
    expected = [sample(i) for i in range(9)]
    data = json.loads((folder / "manifest.json").read_text()) | {"codebook_size": 45, "classes": list("abc")}
    (folder / "manifest.json").write_text(json.dumps(data))
    reasons = [p.reason for p in verify(folder) if p.shard == "shard-00000.tar"]
    bad = [i for i in range(5) if expected[i][0].max() >= 45]
    code = next(int(c) for c in expected[bad[0]][0].ravel() if c >= 45)
    assert reasons == [
        "sample 3 has class 3, outside 0 to 2 (1 such samples)",
        f"sample {bad[0]} has code {code}, outside the codebook of 45 ({len(bad)} such samples)",
    ]
    assert "holds code" in error(capsys, "data", "stats", str(folder))
    data |= {"codebook_size": V}
    (folder / "manifest.json").write_text(json.dumps(data))
    assert "shard-00000.tar, sample 3 of" in (text := error(capsys, "data", "stats", str(folder)))
    assert "has class 3, outside 0 to 2: find all such samples with `megastar data verify" in text


# stats -------------------------------------------------------------------------------------------------------------
def test_counts_are_those_of_a_plain_loop(folder, capsys):
    found = count(folder)
    codes, classes = Counter(), Counter()
    for i in range(9):
        codes.update(sample(i)[0].ravel().tolist())
        classes[sample(i)[1]] += 1
    assert found.codes.tolist() == [codes[c] for c in range(V)] and found.codes.sum() == 9 * VIEWS * T
    assert found.classes.tolist() == [classes[c] for c in range(4)] and found.labels.tolist() == [
        i % 4 for i in range(9)
    ]
    entropy = -sum(n / (9 * VIEWS * T) * math.log2(n / (9 * VIEWS * T)) for n in codes.values())
    assert found.entropy == pytest.approx(entropy) and found.perplexity == pytest.approx(2**entropy)
    assert found.usage == len(codes) / V and found.duplicates == []
    text = run(capsys, "stats", folder)
    assert f"{len(codes)} of {V} used" in text and "min 2, median 2, max 3" in text
    report = json.loads(run(capsys, "stats", folder, "--json", "--top", 3))
    assert [c["code"] for c in report["codes"]["most_used"]] == [
        c for c, _ in sorted(codes.items(), key=lambda x: (-x[1], x[0]))
    ][:3]
    assert report["classes"]["largest"][0] == {"class": "0 a", "samples": 3}
    assert report["uses_of_each_code"] == found.codes.tolist()


def emoji_set(folder, samples: int = 12) -> Path:
    """Codes of the shipped tokenizer; the sample i + 6 repeats i."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 2048, (6, 2, 64))
    folder.mkdir()
    with open_writer(folder / "shard-00000.tar") as writer:
        for i in range(samples):
            writer.add(f"{i}", codes[i % 6], i % 3, f"{i}")
    manifest = Manifest(
        samples=samples, classes=["cat", "dog", "bird"], grid=8, tokens=64, views=2, codebook_size=2048,
        crops="center-flip", image_size=64, tokenizer_sha256=tokenizer_hash(TOKENIZER), shards=[writer.info()],
    )  # fmt: skip
    (folder / "manifest.json").write_text(manifest.to_json())
    return folder


def test_duplicates_and_the_sheet(tmp_path, capsys):
    folder = emoji_set(tmp_path / "s")
    assert count(folder).duplicates == [[i, i + 6] for i in range(6)]
    sheet = tmp_path / "sheet.png"
    text = run(capsys, "stats", folder, "--tokenizer", TOKENIZER, "--sheet", sheet, "--per-class", 3, "--rows", 2)
    assert "12 in 6 groups" in text and str(sheet) in text
    with Image.open(sheet) as picture:
        rows = (picture.height - 4) // 66
        pixels = np.asarray(picture.convert("RGB"))
        assert json.loads(picture.text["megastar"])["view"] == 0
    assert rows == 2  # first and last class: cat and bird
    left = pixels.shape[1] - 3 * 66
    cells = [pixels[2:66, left + 66 * c : left + 66 * c + 64] for c in range(3)]  # of the cat: 0, 3, and 6, which is 0
    codes = np.random.default_rng(0).integers(0, 2048, (6, 2, 64))[[0, 3, 0], 0]
    expected = decode_images(load_tokenizer(TOKENIZER), torch.from_numpy(codes))
    assert all(np.array_equal(a, b) for a, b in zip(cells, expected, strict=True))


# index -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_of_another_writer_from_index_to_batch(tmp_path, capsys, layout):
    """Tars alone, as another program leaves them."""
    folder = write_set(tmp_path / "s", SIZES, layout)
    for path in [folder / "manifest.json", *folder.glob("*.idx")]:
        path.unlink()
    if layout == "plain":  # of webdataset's own writer
        wds = pytest.importorskip("webdataset")
        for number, first in ((0, 0), (2, SIZES[0])):
            with wds.TarWriter(str(folder / f"shard-{number:05d}.tar")) as writer:
                for i in range(first, first + SIZES[number]):
                    writer.write({"__key__": f"{i:06d}", "npy": sample(i)[0], "cls": sample(i)[1]})
    (tmp_path / "names.txt").write_text("cat\ndog\nbird\nfox\n")
    words = ("--codebook-size", V, "--classes", tmp_path / "names.txt", "--layout", layout, "--crops", "center-flip")
    text = run(capsys, "index", folder, *words)
    assert "4 x 4" in text and "not recorded" in text and len(list(folder.glob("*.idx"))) == 3
    about = json.loads(run(capsys, "inspect", folder, "--json"))
    assert (about["samples"], about["class_names"], about["layout"], about["crops"]) == (
        9, ["cat", "dog", "bird", "fox"], layout, "center-flip",
    )  # fmt: skip
    assert run(capsys, "verify", folder) == "3 shards, 9 samples: all match the manifest\n"
    loader = make_loader(
        folder, seed=0, global_batch=9, views=VIEWS, class_dropout_prob=0.0, num_classes=4, vocab_size=V, tokens=T
    )
    batch = loader.batch(0)
    for i, codes, label in zip(batch["ids"].tolist(), batch["codes"], batch["labels"].tolist(), strict=True):
        assert sorted(map(tuple, codes.tolist())) == sorted(map(tuple, sample(i)[0].tolist())) and label == sample(i)[1]
    assert sorted(batch["ids"].tolist()) == list(range(9))
    loader.close()


# Mistakes ----------------------------------------------------------------------------------------------------------
def test_mistakes_are_one_sentence(tmp_path, capsys):
    folder = emoji_set(tmp_path / "s")
    assert error(capsys, "data", "inspcet", "x") == "unknown action 'inspcet' of megastar data: did you mean inspect?"
    assert "does not exist: make it with `megastar pretokenize`" in error(
        capsys, "data", "verify", str(tmp_path / "no")
    )
    assert "--sheet and --tokenizer must be given together" in error(
        capsys, "data", "stats", str(folder), "--sheet", "x.png"
    )
    text = error(capsys, "data", "verify", str(folder), "--patience=-1")
    assert "argument --patience: '-1' is not a number from 0 to 1000000000; see megastar data verify" in text
    data = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(data | {"tokenizer_sha256": "0" * 64}))
    words = ("data", "stats", str(folder), "--tokenizer", str(TOKENIZER), "--sheet", str(tmp_path / "x.png"))
    assert "come from another tokenizer (SHA-256 000000000000..." in error(capsys, *words)
    (folder / "manifest.json").write_text(json.dumps(data | {"tokenizer_sha256": "", "codebook_size": 512}))
    assert "has 2048 codes on a 8 x 8 grid" in error(capsys, *words)
    assert not (tmp_path / "x.png").exists()
    index = ("data", "index", str(folder), "--classes", str(tmp_path / "none.txt"))
    assert "none.txt does not exist: name a file with one class name per line" in error(capsys, *index)


def test_help_of_each_action(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["data"])
    overview = capsys.readouterr().out
    assert end.value.code == 0
    for action in ("inspect", "verify", "stats", "index"):
        assert f"megastar data {action} " in overview
        with pytest.raises(SystemExit) as end:
            cli.main(["data", action, "--help"])
        text = capsys.readouterr().out
        assert end.value.code == 0 and f"megastar data {action} s3://" in text and "examples:" in text
