"""The batches of the tokenizer's training: functions of the step, in parts that make up the batch of one process."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from megastar.config.schema import TokenizerConfig, TokenizerTrainConfig
from megastar.data.images.dataset import ImageSet, random_crop
from megastar.engine.tokenizer.batches import Batches, HeldOut
from megastar.errors import UserError
from megastar.parallel.replicas import Replicas


def folder_of_pictures(tmp_path, count=6):
    for i in range(count):
        path = tmp_path / "pictures" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 16, 3), 40 * i, np.uint8)).save(path)
    return tmp_path / "pictures"


def test_tokenizer_batches_are_a_function_of_the_step(tmp_path):
    pictures = ImageSet(folder_of_pictures(tmp_path))
    cfg = TokenizerTrainConfig(tokenizer=TokenizerConfig(image_size=8), batch=2)
    with Batches(pictures, cfg) as one:
        first = [one(step) for step in range(6)]
    with Batches(pictures, cfg) as other:  # a resumed run starts in the middle
        assert all((other(step) == first[step]).all() for step in (4, 5, 2))
    assert first[0].shape == (2, 8, 8, 3)
    for epoch in (first[:3], first[3:]):  # no picture is left out of a pass
        assert sorted({int(x[0, 0, 0]) for batch in epoch for x in batch}) == [0, 40, 80, 120, 160, 200]


def test_tokenizer_batches_step_over_a_broken_picture(tmp_path):
    folder = folder_of_pictures(tmp_path)
    (folder / "class0" / "2.png").write_bytes(b"no picture")
    cfg = TokenizerTrainConfig(tokenizer=TokenizerConfig(image_size=8), batch=6)
    with Batches(ImageSet(folder), cfg) as batches:
        colours = sorted(int(x[0, 0, 0]) for x in batches(0))
        assert batches.broken == {"class0/2"}
    assert colours == [0, 40, 120, 160, 160, 200]
    for path in folder.rglob("*.png"):
        path.write_bytes(b"")
    with (
        Batches(ImageSet(folder), cfg) as batches,
        pytest.raises(UserError, match=r"no image of .* can be read: check the files"),
    ):
        batches(0)


def test_the_parts_of_ranks_make_up_the_batch_of_one_process(tmp_path):
    """Which is that of earlier releases: one stream of random numbers crops the images of a batch in turn."""
    folder = tmp_path / "noise"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(13):
        Image.fromarray(rng.integers(0, 256, (20 + i, 24, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    pictures = ImageSet(folder, choice=None)
    cfg = TokenizerTrainConfig(tokenizer=TokenizerConfig(image_size=8), batch=4, seed=3)
    for step in (0, 2, 3, 7):
        epoch, k = divmod(step, 3)
        chosen = np.random.default_rng([3, epoch]).permutation(13)[4 * k : 4 * k + 4]
        draws = np.random.default_rng([3, step, 1])
        wanted = np.stack([random_crop(pictures.read(i), 8, draws, cfg.max_scale) for i in chosen.tolist()])
        for world in (1, 2, 4):
            parts = []
            for rank in range(world):
                with Batches(pictures, cfg, Replicas(rank, world)) as batches:
                    parts.append(batches(step))
            assert all(len(p) == 4 // world for p in parts)
            assert np.array_equal(torch.cat(parts).numpy(), wanted)


def test_a_wait_for_a_slow_image_ends_with_a_stop_signal(tmp_path, monkeypatch):
    pictures = ImageSet(folder_of_pictures(tmp_path))
    cfg = TokenizerTrainConfig(tokenizer=TokenizerConfig(image_size=8), batch=2)
    with Batches(pictures, cfg) as batches:
        first = batches(0)
        batches.ahead = {1: batches.maker.submit(lambda: __import__("time").sleep(2))}
        assert batches.wait(1, lambda: True) is None
        assert torch.equal(batches(0), first)


@pytest.mark.parametrize("world", [1, 2, 4, 9])
def test_held_out_images_are_read_once_over_all_ranks(tmp_path, caplog, world):
    folder = folder_of_pictures(tmp_path, 7)
    (folder / "class0" / "2.png").write_bytes(b"no picture")
    parts = [HeldOut(ImageSet(folder), 8, Replicas(rank, world)) for rank in range(world)]
    found = [list(part.batches(2)) for part in parts]
    colours = [int(x[0, 0, 0]) for part in found for batch in part for x in batch]
    assert sorted(colours) == [0, 40, 120, 160, 200, 240]
    assert len({part.rounds(2) for part in parts}) == 1 and max(map(len, found)) <= parts[0].rounds(2)
    assert sum("1 images cannot be read, they are not scored: class0/2" in r.getMessage() for r in caplog.records) == 1
    assert [int(x[0, 0, 0]) for x in parts[-1].first(3)] == colours[:3]
