"""Codebooks above 65,536: int32 shards, written, read, verified and indexed; smaller ones keep uint16."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image
from rich.console import Console

from megastar.commands.data import main as data_command
from megastar.config.schema import ModelConfig, TokenizerConfig
from megastar.data.dataset import TokenDataset
from megastar.data.loader import check_manifest, validation_batches
from megastar.data.pretokenize.runner import pretokenize
from megastar.data.shards.import_webdataset import index_webdataset
from megastar.data.shards.manifest import Manifest, load_manifest
from megastar.data.shards.reader import ShardSet
from megastar.data.shards.sample_parser import LAYOUTS, code_type
from megastar.data.shards.stats import count
from megastar.data.shards.verify import verify
from megastar.data.shards.writer import open_writer
from megastar.errors import UserError
from megastar.tokenizer.io import save_tokenizer
from megastar.tokenizer.vq import VQModel, to_images
from tests.loaders import make_loader

VIEWS, T, V = 3, 16, 1 << 18


def codes_of(i: int) -> np.ndarray:
    codes = np.random.default_rng(i).integers(0, V, (VIEWS, T))
    codes[0, :3] = [0, 65536, V - 1]
    return codes


def write(folder, layout="plain", dtype="int32", sizes=(5, 0, 4), **changes):
    folder.mkdir()
    shards, i = [], 0
    for number, size in enumerate(sizes):
        with open_writer(folder / f"shard-{number:05d}.tar", layout, dtype) as writer:
            for _ in range(size):
                writer.add(f"{i:09d}", codes_of(i), i % 4, f"a/{i}")
                i += 1
        shards.append(writer.info())
    fields = {"classes": list("abcd"), "grid": 4, "tokens": T, "views": VIEWS, "codebook_size": V, "crops": "center-flip",
              "image_size": 32, "tokenizer_sha256": "", "layout": layout, "dtype": dtype}  # fmt: skip
    (folder / "manifest.json").write_text(Manifest(samples=i, shards=shards, **fields | changes).to_json())
    return folder


def test_the_type_follows_the_codebook():
    assert [code_type(n) for n in (2, 65536, 65537, V)] == ["uint16", "uint16", "int32", "int32"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_reader_returns_the_codes(tmp_path, layout, capsys):
    folder = write(tmp_path / "s", layout)
    assert load_manifest(folder).dtype == "int32" and verify(folder) == []
    every = np.stack([codes_of(i) for i in range(9)])
    for resident in (0, 1 << 30):
        shards = ShardSet(folder, resident=resident)
        codes, labels = shards.gather(np.arange(9)[::-1], np.tile([2, 0], (9, 1)))
        assert codes.dtype == np.int32 and labels.tolist() == [i % 4 for i in range(9)][::-1]
        np.testing.assert_array_equal(codes, every[::-1][:, [2, 0]])
        np.testing.assert_array_equal(shards.read(2, 1)[0], every[6])
    assert torch.equal(TokenDataset(folder)[7]["codes"], torch.from_numpy(every[7]))
    loader = make_loader(
        folder, seed=0, global_batch=4, views=2, class_dropout_prob=0.0, num_classes=4, vocab_size=V, tokens=T
    )
    batches = iter(loader)
    for batch in (next(batches), next(batches)):
        assert batch["codes"].dtype == torch.int64
        for row, i in zip(batch["codes"].tolist(), batch["ids"].tolist(), strict=True):
            assert all(view in every[i].tolist() for view in row)
    batches.close()
    (batch,) = validation_batches(loader.shards, 4, 4, 0, 1)
    assert all(
        row.tolist()[0] == every[i][0].tolist() for row, i in zip(batch["codes"], batch["ids"].tolist(), strict=True)
    )
    found = count(folder)
    np.testing.assert_array_equal(found.codes, np.bincount(every.ravel(), minlength=V))
    for action in ("inspect", "verify", "stats"):
        assert data_command([action, str(folder)]) == 0
    assert "int32" in capsys.readouterr().out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_webdataset_reads_int32(tmp_path, layout):
    folder = write(tmp_path / "s", layout, sizes=(4,))
    rows = [r["codes.npy"] for r in wds.WebDataset(str(folder / "shard-00000.tar"), shardshuffle=False).decode()]
    np.testing.assert_array_equal(np.concatenate(rows).reshape(4, VIEWS, T), np.stack([codes_of(i) for i in range(4)]))
    assert rows[0].dtype == np.int32


def test_a_model_with_another_vocabulary_is_refused(tmp_path):
    manifest = load_manifest(write(tmp_path / "s"))
    check_manifest(manifest, ModelConfig(vocab_size=V, image_tokens=T), None, 2)
    with pytest.raises(
        UserError, match="the shards have 262144 codes, model.vocab_size is 16384: change the configuration"
    ):
        check_manifest(manifest, ModelConfig(image_tokens=T), None, 2)


@pytest.mark.parametrize("wrong", [-1, -(2**31), 100_000])
def test_codes_outside_the_codebook_are_found(tmp_path, wrong):
    folder = write(tmp_path / "s", codebook_size=V)
    data = json.loads((folder / "manifest.json").read_text()) | {"codebook_size": 100_000}
    tar = bytearray((folder / "shard-00000.tar").read_bytes())
    at = tar.index(np.array([0, 65536, V - 1], "<i4").tobytes())
    tar[at : at + 12] = np.array([0, 65536, wrong], "<i4").tobytes()
    from hashlib import sha256

    (folder / "shard-00000.tar").write_bytes(tar)
    data["shards"][0]["sha256"] = sha256(tar).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(data))
    (folder / "shard-00000.idx").unlink()
    with pytest.raises(UserError, match="outside the codebook of 100000"):
        ShardSet(folder).gather([0], np.array([[0]]))
    assert any("outside the codebook of 100000" in str(problem) for problem in verify(folder))


@pytest.mark.parametrize("dtype", ["int32", "uint32", "int64", "uint16"])
def test_sets_of_other_programs(tmp_path, dtype):
    folder = tmp_path / "f"
    folder.mkdir()
    made = [np.minimum(codes_of(i), np.iinfo(dtype).max).astype(dtype) for i in range(5)]
    with wds.TarWriter(str(folder / "a.tar")) as writer:
        for i, codes in enumerate(made):
            writer.write({"__key__": f"{i:03d}", "npy": codes, "cls": i % 4})
    assert index_webdataset(folder, codebook_size=V).dtype == dtype and verify(folder) == []
    codes, _ = ShardSet(folder).gather(np.arange(5), np.tile(np.arange(VIEWS), (5, 1)))
    assert codes.dtype == np.int32
    np.testing.assert_array_equal(codes, np.stack(made))
    with pytest.raises(UserError, match="outside the codebook of 60000"):
        index_webdataset(folder, codebook_size=60000)


def test_pretokenize_writes_int32_for_a_large_codebook(tmp_path):
    network = {
        "image_size": 16,
        "channels": 4,
        "channel_multipliers": [1, 2],
        "res_blocks": 1,
        "norm_groups": 2,
        "z_channels": 8,
    }
    torch.manual_seed(0)
    model = VQModel(TokenizerConfig(**network, quantizer="lfq", codebook_size=V, codebook_embed_dim=18)).eval()
    save_tokenizer(model, tmp_path / "t.safetensors", {}, torch.float32)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        (tmp_path / "images" / "abc"[i]).mkdir(parents=True)
        Image.fromarray(image).save(tmp_path / "images" / "abc"[i] / f"{i}.png")
    made = pretokenize(
        tmp_path / "images", None, tmp_path / "t.safetensors", tmp_path / "out", crops="center-flip", workers=1, device="cpu",
        console=Console(quiet=True),
    )  # fmt: skip
    assert (made.dtype, made.codebook_size) == ("int32", V) and load_manifest(tmp_path / "out") == made
    codes, labels = ShardSet(tmp_path / "out").gather(np.arange(3), np.zeros((3, 1), np.int64))
    with torch.no_grad():
        wanted = model.encode(to_images(torch.from_numpy(pixels[labels]))).numpy()
    assert (codes[:, 0] == wanted).mean() > 0.99 and codes.max() > 65535
