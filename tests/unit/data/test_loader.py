"""The loader: the same rows on any number of ranks and after a resume; what does not fit is refused in a sentence."""

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from megastar.config.schema import ModelConfig
from megastar.data.loader import TokenLoader, check_manifest, validation_batches
from megastar.data.order import OrderSpec, sample_ids
from megastar.data.prefetch import GaveUp
from megastar.data.shards.manifest import load_manifest
from megastar.data.shards.reader import ShardSet
from megastar.data.views import draw_label_drop, draw_views
from megastar.errors import UserError
from tests.loaders import make_loader
from tests.unit.data.shards.test_shards import VIEWS, T, V, sample, write_set

SIZES = (7, 6, 8, 5)  # 26 samples: batches of 8 run over the ends of epochs


@pytest.fixture
def folder(tmp_path):
    return write_set(tmp_path / "s", SIZES)


def loader(folder, **changes) -> TokenLoader:
    settings = {
        "seed": 1,
        "global_batch": 8,
        "views": 2,
        "class_dropout_prob": 0.3,
        "num_classes": 4,
        "vocab_size": V,
        "tokens": T,
        "window": 2,
    }
    return make_loader(folder, **(settings | changes))


def take(source: TokenLoader, n: int) -> list[dict]:
    batches = iter(source)
    rows = [next(batches) for _ in range(n)]
    batches.close()
    return rows


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)


def test_rows_are_what_order_and_draws_say(folder):
    spec = OrderSpec(1, SIZES, 2)
    for step, batch in enumerate(take(loader(folder), 8)):  # over two epoch ends
        ids, epochs = sample_ids(spec, step * 8, 8)
        views = draw_views(1, epochs, ids, VIEWS, 2)
        dropped = draw_label_drop(1, epochs, ids, 0.3)
        assert batch["step"] == step
        assert batch["ids"].tolist() == ids.tolist() and batch["epochs"].tolist() == epochs.tolist()
        assert batch["codes"].shape == (8, 2, T) and batch["codes"].dtype == torch.int64
        for row, i in enumerate(ids):
            codes, label = sample(i)
            np.testing.assert_array_equal(batch["codes"][row].numpy(), codes[views[row]])
            assert batch["true_labels"][row] == label
            assert batch["labels"][row] == (4 if dropped[row] else label)


@pytest.mark.parametrize(("world", "accumulation"), [(2, 1), (4, 2), (1, 4), (8, 1)])
def test_batch_k_is_independent_of_ranks_and_accumulation(folder, world, accumulation):
    whole = take(loader(folder), 5)
    parts = [
        take(loader(folder, rank=r, world=world, accumulation=accumulation), 5 * accumulation) for r in range(world)
    ]
    for step in range(5):
        micros = range(step * accumulation, (step + 1) * accumulation)
        for key in ("codes", "labels", "true_labels", "ids", "epochs"):
            joined = torch.cat([parts[r][m][key] for m in micros for r in range(world)])
            assert torch.equal(joined, whole[step][key]), key
        assert all(parts[r][m]["step"] == step for m in micros for r in range(world))


def test_resume_is_exact(folder):
    straight = take(loader(folder, accumulation=2), 12)
    first = loader(folder, accumulation=2)
    batches = iter(first)
    for _ in range(6):
        next(batches)
    state = first.state_dict()
    assert state == {"samples": 24}
    second = loader(folder, accumulation=2, start_step=99)
    second.load_state_dict(state)
    assert all(same(a, b) for a, b in zip(take(second, 6), straight[6:], strict=True))
    assert all(
        same(a, b) for a, b in zip(take(loader(folder, accumulation=2, start_step=3), 6), straight[6:], strict=True)
    )
    next(batches)  # in the middle of step 3: a resume begins it again
    assert first.state_dict() == {"samples": 24}
    first.close()
    third = loader(folder, global_batch=12)
    third.load_state_dict(state)  # a whole number of its batches
    assert third.step == 2
    for state, message in [
        ({"samples": 20}, "is at 20 samples, inside a batch of 12: continue with the global batch it was saved"),
        ({"step": 3}, "{'step': 3} is not a state of the loader: it must be {'samples': N}"),
        ({"samples": -12}, "is not a state"),
    ]:
        with pytest.raises(UserError, match=message):
            third.load_state_dict(state)


def test_the_state_is_right_at_every_batch_whatever_is_read_ahead(folder):
    straight = take(loader(folder, accumulation=2), 30)
    source = loader(folder, accumulation=2, prefetch=7)
    for taken, batch in enumerate(source, 1):
        assert same(batch, straight[taken - 1])
        again = loader(folder, accumulation=2, prefetch=1)
        again.load_state_dict(json.loads(json.dumps(source.state_dict())))
        assert same(take(again, 1)[0], straight[taken // 2 * 2])
        if taken == 14:
            break
    assert source.state_dict() == {"samples": 7 * 8}
    assert all(same(a, b) for a, b in zip(take(source, 6), straight[14:], strict=False))  # it goes on there itself


def test_every_batch_before_a_broken_shard_comes(tmp_path):
    folder = write_set(tmp_path / "s", (16,) * 6)
    spec = OrderSpec(1, (16,) * 6, 2)
    ids = np.concatenate([sample_ids(spec, k * 4, 4)[0] for k in range(24)])
    good = int(np.argmax(ids // 16 == 5)) // 4  # batches before the first that needs the last shard
    assert good % 8 != 1  # it fails in the middle of what is read together
    straight = take(loader(folder, global_batch=4), good)
    (folder / "shard-00005.tar").unlink()
    source, got = loader(folder, global_batch=4), []
    with pytest.raises(UserError, match="shard-00005.tar is missing"):
        for batch in source:
            got.append(batch)
    assert len(got) == good and all(same(a, b) for a, b in zip(got, straight, strict=True))
    assert source.state_dict() == {"samples": 4 * good}


# Nothing is left behind ----------------------------------------------------------------------------------------
def holdings(folder: Path) -> Counter[str]:
    """Threads, open files, maps of shards, files: what a loader could leave behind."""
    gc.collect()
    found = Counter(f"thread {t.name} {t.ident}" for t in threading.enumerate())
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found[f"open file {os.readlink(fd)}"] += 1
    found["maps"] = Path("/proc/self/maps").read_text().count(str(folder))
    found.update(map(str, folder.rglob("*")))
    # Those of a store remain for as long as it exists.
    return Counter({name: count for name, count in found.items() if "/dev/shm/megastar" not in name})


def added(folder: Path, before: Counter[str]) -> Counter[str]:
    """What exists now and did not before. What earlier tests left may go at any time."""
    return holdings(folder) - before


def test_nothing_is_left_behind_however_the_iteration_ends(folder):
    take(loader(folder), 1)
    before = holdings(folder)

    def consume(source: TokenLoader) -> None:
        for n, _ in enumerate(source):
            if n == 2:
                new = added(folder, before)
                assert sum(name.startswith("thread ") for name in new) == 3 and new["maps"]
                raise ZeroDivisionError

    def leave(source: TokenLoader) -> None:
        for _ in source:
            break

    with pytest.raises(ZeroDivisionError):
        consume(loader(folder))
    assert not added(folder, before)
    leave(loader(folder))
    assert not added(folder, before)
    source = loader(folder)
    batches, other = iter(source), iter(source)  # the second ends the first's reading
    next(batches)
    next(other)
    with pytest.raises(StopIteration):
        next(batches)
    next(other)
    source.close()
    source.close()  # twice is no error
    with pytest.raises(StopIteration):
        next(other)
    del batches, other
    assert not added(folder, before)
    (folder / "shard-00001.tar").rename(folder / "away")
    with pytest.raises(UserError, match="shard-00001.tar is missing"):
        take(loader(folder), 4)
    (folder / "away").rename(folder / "shard-00001.tar")
    assert not added(folder, before)


LEAVER = """
import sys
from tests.unit.data.test_loader import loader
source = loader(sys.argv[1], prefetch=2)
batches = iter(source)
next(batches)
if sys.argv[2] == "raise":
    raise SystemExit(3)
print("here", flush=True)
if sys.argv[2] == "wait":
    import time
    time.sleep(60)
"""


@pytest.mark.parametrize(("how", "status"), [("end", 0), ("raise", 3), ("wait", -signal.SIGKILL)])
def test_a_process_may_end_in_the_middle(folder, tmp_path, how, status):
    before = sorted(map(str, tmp_path.rglob("*")))
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[3])}
    with subprocess.Popen(
        [sys.executable, "-c", LEAVER, str(folder), how],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        if how == "wait":
            assert process.stdout.readline() == b"here\n"
            process.kill()
        _, errors = process.communicate(timeout=300)  # it imports torch first
    assert process.returncode == status and errors == b""
    assert sorted(map(str, tmp_path.rglob("*"))) == before


def test_waiting_is_counted_and_can_be_given_up(folder):
    source = loader(folder)
    read, gate = source.shards.gather, threading.Event()

    def slow(*arguments):
        assert gate.wait(60)
        return read(*arguments)

    def give_up() -> bool:
        """True at the fourth call: the three before it were 0.1 s apart."""
        asked.append(time.perf_counter())
        if len(asked) == 4:
            gate.set()  # closing waits for what is being read
        return len(asked) == 4

    source.shards.gather, asked = slow, []
    batches, begun = source.batches(give_up), time.perf_counter()
    with pytest.raises(GaveUp):
        next(batches)
    assert 0.2 < asked[3] - asked[0] <= source.waited() <= time.perf_counter() - begun
    assert source.waited() == 0
    assert source.state_dict() == {"samples": 0}
    assert next(iter(source))["step"] == 0
    source.close()


# What does not fit ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch": 9, "world": 2}, "global batch 9 cannot be divided among 2 ranks x 1 accumulation steps: make it a multiple of 2"),
        ({"accumulation": 3}, "global batch 8 cannot be divided among 1 ranks x 3"),
        ({"global_batch": 32}, "holds 26 samples, fewer than one global batch of 32"),
        ({"views": 4}, "4 views are requested, the shards store 3"),
        ({"vocab_size": 20}, "the shards have 50 codes, model.vocab_size is 20"),
        ({"tokens": 64}, "the shards have 16 tokens per image, a grid of 4, model.image_tokens is 64"),
        ({"num_classes": 3}, "the shards have 4 classes, model.num_classes is 3"),
        ({"window": 0}, "window 0 must be at least 1"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit(folder, changes, message):
    with pytest.raises(UserError, match=message):
        loader(folder, **changes)


def test_missing_and_empty_folder(tmp_path):
    with pytest.raises(UserError, match="does not exist: make it with `megastar pretokenize`"):
        loader(tmp_path / "none")
    with pytest.raises(UserError, match="has no manifest.json"):
        loader(tmp_path)


def test_code_outside_the_vocabulary(tmp_path):
    folder = write_set(tmp_path / "s", SIZES, codebook_size=45)  # the samples hold codes up to 49
    with pytest.raises(
        UserError, match=r"shard-0000\d.tar, sample \d of .* holds code 4[5-9], outside the codebook of 45"
    ):
        take(loader(folder, vocab_size=45), 4)


def test_class_outside_the_range(tmp_path):
    folder = write_set(tmp_path / "s", SIZES, classes=["a", "b"])  # the samples have classes 0 to 3
    with pytest.raises(UserError, match=r"sample \d of .* has class [23], outside 0 to 1: find all such"):
        take(loader(folder, num_classes=2), 4)


def test_manifest_of_another_tokenizer_and_all_else_at_once(folder):
    manifest = load_manifest(folder)
    fits = ModelConfig(vocab_size=V, image_tokens=T, num_classes=4)
    check_manifest(manifest, fits, "ab" * 32, 3)
    check_manifest(manifest, fits, None, 3)
    with pytest.raises(
        UserError, match=r"made with another tokenizer \(SHA-256 abababababab..., data.tokenizer is cdcdcdcdcdcd"
    ):
        check_manifest(manifest, fits, "cd" * 32, 3)
    with pytest.raises(UserError) as error:
        check_manifest(manifest, ModelConfig(vocab_size=1, image_tokens=4, num_classes=1), "cd" * 32, 5)
    assert str(error.value).count(";") == 4


# Validation ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n_images", [1000, 26, 17, 16, 8, 4])
@pytest.mark.parametrize(("world", "batch"), [(1, 5), (2, 4), (4, 1), (3, 8)])
def test_validation_covers_the_first_samples_once(folder, n_images, world, batch):
    ranks = [validation_batches(ShardSet(folder), n_images, batch, r, world) for r in range(world)]
    assert len({len(r) for r in ranks}) == 1  # ZeRO gathers on all ranks
    rows = [row for r in ranks for row in r]
    assert all(1 <= len(row["ids"]) <= batch for row in rows)
    ids = sorted(torch.cat([row["ids"] for row in rows]).tolist())
    assert ids == list(range(len(ids))) and 0 <= min(26, n_images) - len(ids) < world
    for row in rows:
        assert row["codes"].shape == (len(row["ids"]), 1, T)
        for i, codes, label in zip(row["ids"].tolist(), row["codes"], row["labels"], strict=True):
            assert label == sample(i)[1]
            np.testing.assert_array_equal(codes[0].numpy(), sample(i)[0][0])  # center-flip: the centre first


def test_more_ranks_than_validation_images(folder):
    with pytest.raises(UserError, match="3 validation images of .* are fewer than 4 ranks"):
        validation_batches(ShardSet(folder), 3, 8, 0, 4)
