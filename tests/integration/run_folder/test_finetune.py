"""Fine-tuning the shipped weights on parts of the emoji: fewer classes, new classes, a finer grid; and what is refused."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file

from megastar.checkpoint.find_weights import SHIPPED_TOKENIZER, SHIPPED_WEIGHTS, find_weights
from megastar.data.pretokenize.runner import pretokenize
from megastar.tokenizer.io import load_tokenizer, save_tokenizer, tokenizer_hash
from tests.integration.conftest import ROOT, megastar

pytestmark = pytest.mark.long

STEPS = 24  # of the run from random weights; the others have half of them
CLASSES = ("food-drink", "smileys-emotion", "travel-places")
DESIGNS = ("noto", "fluent3d", "emojione")


def images(folder: Path, designs: bool) -> Path:
    """48 training and 16 validation images of each of three classes: those of the weights, or the designs."""
    wanted = {(s, c): n for s, n in (("train", 48), ("val", 16)) for c in (DESIGNS if designs else CLASSES)}
    with tarfile.open(ROOT / "assets/emoji64/emoji64.tar") as tar:
        for member in tar:
            split, *rest = member.name.split("/")
            if not member.isfile() or len(rest) != 2 or designs and rest[0] not in CLASSES:
                continue
            name = rest[1].partition("__")[2].removesuffix(".webp") if designs else rest[0]
            if wanted.get((split, name), 0):
                wanted[split, name] -= 1
                out = folder / split / name / rest[1]
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_bytes(tar.extractfile(member).read())
    assert not any(wanted.values()), wanted
    return folder


def codes(pictures: Path, tokenizer: Path, out: Path) -> Path:
    for split in ("train", "val"):
        pretokenize(
            pictures, split, tokenizer, out / split, crops="center-flip", workers=1, device="cpu",
            console=Console(quiet=True),
        )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    """Codes of three of the nine classes."""
    folder = tmp_path_factory.mktemp("few")
    return codes(images(folder / "images", False), ROOT / SHIPPED_TOKENIZER, folder / "codes")


@pytest.fixture(scope="module")
def designs(tmp_path_factory) -> Path:
    """Codes of three classes that the weights do not know."""
    folder = tmp_path_factory.mktemp("designs")
    return codes(images(folder / "images", True), ROOT / SHIPPED_TOKENIZER, folder / "codes")


@pytest.fixture(scope="module")
def finer(tmp_path_factory, few) -> Path:
    """Codes of the same images in 96 pixels, 12 x 12 tokens: the same tokenizer, which is convolutional."""
    folder = tmp_path_factory.mktemp("finer")
    model = load_tokenizer(ROOT / SHIPPED_TOKENIZER)
    model.config.image_size = 96
    save_tokenizer(model, folder / "t96.safetensors", {})
    assert tokenizer_hash(folder / "t96.safetensors") == tokenizer_hash(ROOT / SHIPPED_TOKENIZER)
    return codes(few.parent / "images", folder / "t96.safetensors", folder / "codes")


def words(shards: Path, run: Path, steps: int, *more: str, tokens: int = 64) -> list[str]:
    tokenizer = shards.parent / "t96.safetensors" if tokens != 64 else SHIPPED_TOKENIZER
    return [
        "train", "configs/run/demo.yaml", "method=configs/method/ar.yaml", f"run={run}", "model.num_classes=3",
        f"model.image_tokens={tokens}", f"data.shards={shards}/train", f"data.val_shards={shards}/val",
        f"data.tokenizer={tokenizer}", f"train.steps={steps}", "train.global_batch=12", "train.val_images=48",
        f"train.val_every={steps}", f"train.save_every={steps}", "train.dtype=fp32", "train.threads=1",
        "optim.warmup_steps=4", "parallel.deepspeed=zero1", *more,
    ]  # fmt: skip


def loss(run: Path) -> float:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["val_loss_ar"] for row in rows if "val_loss_ar" in row][-1]


INIT = f"train.init={SHIPPED_WEIGHTS}"


@pytest.mark.parametrize("case", ["few", *(pytest.param(c, marks=pytest.mark.slow) for c in ("designs", "finer"))])
def test_half_of_the_steps_from_the_shipped_weights_beat_all_from_random_ones(request, tmp_path, case):
    shards = request.getfixturevalue(case)
    tokens = 144 if case == "finer" else 64
    classes = ["train.init_classes=fresh"] if case == "designs" else ["train.init_classes=map"]
    more = [*classes, *(["train.init_resize=true"] if case == "finer" else [])]
    megastar(*words(shards, tmp_path / "scratch", STEPS, tokens=tokens))
    done = megastar(*words(shards, tmp_path / "tuned", STEPS // 2, INIT, *more, tokens=tokens))
    assert loss(tmp_path / "tuned") < loss(tmp_path / "scratch")
    if case != "designs":
        assert "3 of 3 class embeddings are taken" in done.stdout + done.stderr


def test_weights_of_a_run_start_another_one_whose_frozen_blocks_keep_them(few, tmp_path):
    """The tokenizer is found again from the run's record, and frozen weights are equal to the last bit."""
    (tmp_path / "map.yaml").write_text("food-drink: 3\nsmileys-emotion: smileys-emotion\ntravel-places: null\n")
    first = words(few, tmp_path / "a", 2, INIT, "train.init_classes=map", f"train.init_class_map={tmp_path}/map.yaml")
    megastar(*first)
    megastar(
        *words(few, tmp_path / "b", 2, f"train.init={tmp_path}/a", "train.freeze_blocks=6", "optim.layer_decay=0.8")
    )
    a, b = (find_weights(tmp_path / run, "ema") for run in "ab")
    assert a.identity == b.identity == tokenizer_hash(ROOT / SHIPPED_TOKENIZER)
    assert Path(b.tokenizer_file()).samefile(ROOT / SHIPPED_TOKENIZER)
    before, after = load_file(a.file), load_file(b.file)
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed == {"norm.weight", "output.weight"}
    assert b.provenance["init"]["checkpoint"] == "step-00000002"


@pytest.mark.parametrize("dry_run", [True, False])
def test_what_a_start_refuses_a_dry_run_refuses_too(few, finer, tmp_path, dry_run):
    (tmp_path / "bad.yaml").write_text("food-drink: pizza\n")
    other = load_tokenizer(ROOT / SHIPPED_TOKENIZER)
    other.quantize.embedding.weight.data += 1
    save_tokenizer(other, tmp_path / "other.safetensors", {})
    for more, sentence in (
        ([], "has 9 classes, model.num_classes is 3: set train.init_classes=fresh"),
        (
            ["train.init_classes=map", f"train.init_class_map={tmp_path}/bad.yaml"],
            "the old class 'pizza' does not exist",
        ),
        (
            ["train.init_classes=fresh", "model.dim=128"],
            "is of another network than this run's model: dim 256, not 128",
        ),
    ):
        done = megastar(*words(few, tmp_path / "run", 2, INIT, *more), *["--dry-run"] * dry_run, check=False)
        assert done.returncode == 2 and sentence in done.stderr, done.stderr[-2000:]
    fresh = [INIT, "train.init_classes=fresh"]
    done = megastar(*words(finer, tmp_path / "run", 2, *fresh, tokens=144), *["--dry-run"] * dry_run, check=False)
    assert done.returncode == 2 and "set train.init_resize=true to continue on another grid" in done.stderr
    assert not (tmp_path / "run").exists()
