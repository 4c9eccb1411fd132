"""pretokenize by several processes, over every source, and finished sets that lost something."""

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megastar.cli import main
from megastar.data.pretokenize import runner
from megastar.data.pretokenize.out_folder import clear, reopen
from megastar.data.pretokenize.runner import PROGRESS, PretokenizeRun
from megastar.data.shards.manifest import Manifest, load_manifest
from megastar.data.shards.reader import ShardSet
from megastar.errors import UserError
from megastar.utils.lockfile import Claims
from megastar.utils.progress_bar import progress_bar
from tests.unit.data.images.test_sources import write_source
from tests.unit.data.pretokenize.test_runner import QUIET, contents, images, notes, run, tokenizer  # noqa: F401

pytestmark = pytest.mark.long

# One process of several; "slow" leaves its first shard unfinished for long.
CHILD = """
import sys, time
from pathlib import Path
from megastar.data.pretokenize import encoding, runner as p
from megastar.utils.logs import configure_logging
_, source, tokenizer, out, speed = sys.argv
if speed == "slow":
    encoding.ViewEncoder.encode = lambda self, crops: time.sleep(600)
p.POLL = 0.05
configure_logging()
p.pretokenize(source, "train", tokenizer, out, shard_size=5, workers=1, device="cpu", batch=20)
"""


def start(*words: object) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", CHILD, *map(str, words)], stdout=subprocess.PIPE, text=True)


def test_three_processes_and_one_killed(images, tokenizer, tmp_path):  # noqa: F811
    """One is killed in its first shard; the other two, started before and after, take it over: the same bytes."""
    run(images, tokenizer, tmp_path / "alone")
    out = tmp_path / "out"
    slow = start(images, tokenizer, out, "slow")
    deadline = time.monotonic() + 120
    while not list(out.glob("shard-*.tmp")):
        assert slow.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    others = [start(images, tokenizer, out, "fast") for _ in range(2)]
    while len(list(out.glob("shard-*.tar"))) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert all(other.poll() is None for other in others)  # they wait for the shard that is being made
    assert not (out / "manifest.json").exists()
    slow.kill()
    printed = [other.communicate(timeout=120)[0].replace("\n", " ") for other in others]
    slow.communicate()
    assert [other.returncode for other in others] == [0, 0], printed
    assert contents(out) == contents(tmp_path / "alone")
    assert sum("out: 23 images x 10 views in 5 shards" in text for text in printed) >= 1


def test_nproc(images, tokenizer, tmp_path):  # noqa: F811
    """The command starts the processes itself."""
    run(images, tokenizer, tmp_path / "alone")
    words = [images, "--subset", "train", "--tokenizer", tokenizer, "--out", tmp_path / "out", "--shard-size", 5]
    words += ["--device", "cpu", "--batch", 20, "--workers", 1, "--nproc", 2]
    command = [sys.executable, "-m", "megastar", "pretokenize", *map(str, words)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    assert re.findall(r"INFO rank (\d) .* in 5 shards", done.stdout) == ["0"]


def test_every_source_gives_the_same_shards(tokenizer, tmp_path):  # noqa: F811
    made = []
    for kind in ("tree", "tar", "class tars", "nested", "list"):
        at = tmp_path / kind
        at.mkdir()
        manifest = run(write_source(kind, at), tokenizer, at / "out", subset=None, crops="center")
        assert manifest.samples == 12
        made.append(contents(at / "out"))
    assert all(m == made[0] for m in made)


def test_webdataset_tars_give_the_same_codes(tokenizer, tmp_path):  # noqa: F811
    """Their keys and numbers of classes are their own; the images and so the codes are the same."""
    from tests.unit.data.images.test_dataset import make_tar
    from tests.unit.data.images.test_sources import CLASSES, PICTURES

    run(write_source("tree", tmp_path), tokenizer, tmp_path / "a", subset=None, crops="center")
    names = list(PICTURES)
    for part in range(2):
        files: dict[str, bytes] = {}
        for name in names[part::2]:
            key, cls = name.split("/")[1].removesuffix(".JPEG"), CLASSES.index(name.split("/")[0])
            files |= {f"{key}.jpg": PICTURES[name], f"{key}.cls": str(cls).encode()}
        (tmp_path / "wds").mkdir(exist_ok=True)
        make_tar(tmp_path / "wds" / f"{part}.tar", files)
    run(tmp_path / "wds", tokenizer, tmp_path / "b", subset=None, crops="center")
    a, b = (codes_by_name(tmp_path / x) for x in "ab")
    assert a.keys() == b.keys() and len(a) == 12
    for name, (codes, label) in a.items():
        np.testing.assert_array_equal(codes, b[name][0])
        assert label == b[name][1]


def codes_by_name(folder: Path) -> dict[str, tuple[np.ndarray, int]]:
    from tests.unit.data.pretokenize.test_runner import source_of

    shards = ShardSet(folder)
    found = {}
    for number, info in enumerate(shards.manifest.shards):
        for k in range(info.samples):
            codes, labels = shards.gather([int(shards.starts[number]) + k], np.zeros((1, 1), np.int64))
            found[source_of(folder / info.name, k).split("/")[-1]] = (codes[0], int(labels[0]))
    return found


# Finished sets -----------------------------------------------------------------------------------------------------
@pytest.fixture
def finished(images, tokenizer, tmp_path) -> Path:  # noqa: F811
    (images / "train" / "a" / "torn.png").write_bytes(b"x")
    run(images, tokenizer, tmp_path / "out")
    return tmp_path / "out"


def test_what_is_lost_is_made_again(images, tokenizer, finished, notes):  # noqa: F811
    before = contents(finished)
    kept = (finished / "shard-00003.tar").stat().st_mtime_ns
    (finished / "shard-00001.tar").unlink()
    os.truncate(finished / "shard-00002.tar", 1000)
    run(images, tokenizer, finished)
    assert "lacks 2 of its shards (shard-00001.tar, shard-00002.tar): writing them" in notes.text
    assert "whose encoder waited" in notes.text and "images/s in this process" in notes.text
    assert contents(finished) == before
    assert (finished / "shard-00003.tar").stat().st_mtime_ns == kept


def test_verify(finished, capsys):
    assert main(["pretokenize", "--verify", "--out", str(finished)]) == 0
    printed = capsys.readouterr().out
    assert "5 shards, 23 samples: all match the manifest" in printed
    data = bytearray((finished / "shard-00001.tar").read_bytes())
    data[1500] ^= 1
    (finished / "shard-00001.tar").write_bytes(data)
    os.truncate(finished / "shard-00003.tar", 1024)
    (finished / "shard-00004.tar").unlink()
    assert main(["pretokenize", "--verify", "--out", str(finished)]) == 2
    printed = capsys.readouterr().out
    assert all(f"shard-0000{i}.tar: " in printed for i in (1, 3, 4)) and "shard-00002" not in printed
    assert "3 of 5 shards are damaged" in printed and "(rm -f shard-00001.tar shard-00003.tar shard-0" in printed


def test_usage(tmp_path):
    for words in (["--out", "x"], ["images", "--out", "x"]):
        with pytest.raises(UserError, match="pretokenize needs SOURCE and --tokenizer"):
            __import__("megastar.commands.pretokenize", fromlist=["main"]).main(words)


def test_twenty_views(images, tokenizer, tmp_path):  # noqa: F811
    """LlamaGen's two sets: the ten crops of the first, then those of the second."""
    for name in ("ten:1.1", "ten:1.5", "ten:1.1+ten:1.5"):
        run(images, tokenizer, tmp_path / name, crops=name)
    both, first, second = (ShardSet(tmp_path / n) for n in ("ten:1.1+ten:1.5", "ten:1.1", "ten:1.5"))
    ids, ten = np.arange(23), np.tile(np.arange(10), (23, 1))
    assert both.manifest.views == 20 and load_manifest(tmp_path / "ten:1.1").views == 10
    np.testing.assert_array_equal(both.gather(ids, ten)[0], first.gather(ids, ten)[0])
    np.testing.assert_array_equal(both.gather(ids, ten + 10)[0], second.gather(ids, ten)[0])
    assert both.manifest.centre_view == first.manifest.centre_view == 4


def test_layouts(images, tokenizer, tmp_path):  # noqa: F811
    plain, packed = (run(images, tokenizer, tmp_path / x, crops="center-flip", layout=x) for x in ("plain", "packed"))
    assert (plain.layout, packed.layout) == ("plain", "packed") and plain.shard_sizes == packed.shard_sizes
    ids, views = np.arange(23), np.tile(np.arange(2), (23, 1))
    one, other = (ShardSet(tmp_path / x).gather(ids, views) for x in ("plain", "packed"))
    np.testing.assert_array_equal(one[0], other[0])
    np.testing.assert_array_equal(one[1], other[1])
    with pytest.raises(UserError, match=r"layout \('plain' there, 'packed' now\)"):
        run(images, tokenizer, tmp_path / "plain", crops="center-flip", layout="packed")
    with pytest.raises(UserError, match="layout 'zip' is unknown: use plain or packed"):
        run(images, tokenizer, tmp_path / "x", layout="zip")


def test_two_settings_at_once_share_no_folder(tmp_path):
    """The first process writes the plan; the other one gets an error."""

    def join(seed: int) -> str:
        made_by = {"shard_size": 5, "seed": seed, "subset": ""}
        template = Manifest(0, ["a"], 4, 16, 1, 8, "center", 16, "", [], made_by=made_by)
        with Claims(out / PROGRESS) as claims:
            barrier.wait()
            try:
                PretokenizeRun(out, template, 10, claims).join()
            except UserError as error:
                return str(error)
        return ""

    for n in range(20):
        out, barrier = tmp_path / str(n), threading.Barrier(2)
        (out / PROGRESS).mkdir(parents=True)
        with ThreadPoolExecutor(2) as pool:
            errors = list(pool.map(join, (0, 1)))
        assert "" in errors and any("holds token shards of other settings: seed" in text for text in errors)


# A task that starts late, when others finish the set ---------------------------------------------------------------
@pytest.mark.parametrize("moment", ["before the folder", "while it lists", "before the space", "before the plan"])
def test_a_late_process_finds_the_set_complete(images, tokenizer, tmp_path, monkeypatch, moment):  # noqa: F811
    """The last shard of others is finished, and .progress renamed, between two steps of this process. The disk has no
    space for the whole set."""
    out, done = tmp_path / "out", tmp_path / "done"
    run(images, tokenizer, done)
    before = contents(done)
    begin_again(done, out)
    late = threading.get_ident()

    def finish(original):
        def step(*a, **k):
            if threading.get_ident() == late and not (out / "manifest.json").exists():
                shutil.copyfile(done / "manifest.json", out / "manifest.json")
                clear(out)
                monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
            return original(*a, **k)

        return step

    where, name = {
        "before the folder": (runner, "check_unrelated_files"),
        "while it lists": (runner, "ImageSet"),
        "before the space": (PretokenizeRun, "check_space"),
        "before the plan": (PretokenizeRun, "join"),
    }[moment]
    monkeypatch.setattr(PretokenizeRun, "write", lambda *_: pytest.fail("a shard was made again"))
    monkeypatch.setattr(where, name, finish(getattr(where, name)))
    assert run(images, tokenizer, out) == load_manifest(done)
    assert contents(out) == before


def test_settings_of_a_late_process_are_compared(images, tokenizer, tmp_path, monkeypatch):  # noqa: F811
    out, done, real = tmp_path / "out", tmp_path / "done", runner.ImageSet
    run(images, tokenizer, done)
    begin_again(done, out)

    def listing(*a, **k):
        if not (out / "manifest.json").exists():
            shutil.copyfile(done / "manifest.json", out / "manifest.json")
            clear(out)
        return real(*a, **k)

    monkeypatch.setattr(runner, "ImageSet", listing)
    with pytest.raises(UserError, match="holds token shards of other settings: seed"):
        run(images, tokenizer, out, seed=1)
    assert load_manifest(out) == load_manifest(done)


def test_a_waiting_process_makes_nothing_when_a_late_one_makes_the_folder_again(images, tokenizer, tmp_path):  # noqa: F811
    done = tmp_path / "done"
    manifest = run(images, tokenizer, done)
    (done / PROGRESS).mkdir()
    with Claims(done / PROGRESS) as claims, progress_bar(QUIET, "x", 23) as bar:
        waiting = PretokenizeRun(done, manifest, 23, claims)
        assert waiting.next(bar) is None
        assert waiting.finish() == load_manifest(done) == manifest
        with pytest.raises(FileNotFoundError):
            waiting.join()


def test_two_starts_drop_the_same_incomplete_record(images, tokenizer, tmp_path, monkeypatch):  # noqa: F811
    out, done = tmp_path / "out", tmp_path / "done"
    run(images, tokenizer, done)
    begin_again(done, out)
    (out / "shard-00002.tar").unlink()
    real = runner.read_record

    def slow(path):
        if path.name == "shard-00002.json" and not (out / "shard-00002.tar").is_file():
            path.unlink(missing_ok=True)  # the other start was faster
        return real(path)

    monkeypatch.setattr(runner, "read_record", slow)
    manifest = run(images, tokenizer, out)
    assert manifest == load_manifest(done) and contents(out) == contents(done)


def test_a_record_that_was_removed_is_named(images, tokenizer, tmp_path):  # noqa: F811
    out, done = tmp_path / "out", tmp_path / "done"
    manifest = run(images, tokenizer, done)
    begin_again(done, out)
    (out / PROGRESS / "shard-00003.json").unlink()
    with (
        Claims(out / PROGRESS) as claims,
        pytest.raises(UserError, match=r"shard-00003.json was removed: run the same"),
    ):
        PretokenizeRun(out, manifest, 23, claims).finish()


def begin_again(done: Path, out: Path) -> None:
    """``out``: the finished set without its manifest, as just before the last step."""
    shutil.copytree(done, out)
    reopen(out, load_manifest(done), [])
    (out / "manifest.json").unlink()
