"""The public API: what ``import megastar`` loads, and the checks, orders and shapes of ``Model``."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import megastar
from megastar.checkpoint import find_weights
from megastar.config.load import as_run_config
from megastar.config.schema import ModelConfig, RunConfig, TokenizerConfig
from megastar.evaluation.linear_probe import probe_features
from megastar.model.transformer import Transformer
from megastar.sampling.sampler import decode_images, sample_seeds
from megastar.tokenizer.io import save_tokenizer
from megastar.tokenizer.vq import VQModel
from tests.checkpoints import save_model
from tests.sampling import sample_tokens

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["circle", "square", "stroke"]
MODEL = ModelConfig(
    name="tiny", n_layer=2, n_head=2, dim=16, multiple_of=16, vocab_size=32, num_classes=3, image_tokens=16
)
TOKENIZER = TokenizerConfig(
    image_size=16, channels=8, channel_multipliers=[1, 2, 2], res_blocks=1, z_channels=8, codebook_size=32,
    codebook_embed_dim=4, norm_groups=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("api")
    torch.manual_seed(0)
    network = Transformer(MODEL)
    network.output.weight.data.normal_()  # its initial zeros make every code equally likely
    save_model(folder / "weights.safetensors", network.state_dict(), MODEL, {"classes": NAMES})
    save_tokenizer(VQModel(TOKENIZER), folder / "tokenizer.safetensors", {}, torch.float32)
    return {"source": folder / "weights.safetensors", "tokenizer": folder / "tokenizer.safetensors"}


@pytest.fixture(scope="module")
def model(files) -> megastar.Model:
    return megastar.load(**files, device="cpu")


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)


# The package -------------------------------------------------------------------------------------------------------
def test_import_loads_nothing_large():
    code = "import sys, megastar; megastar.UserError, dir(megastar), megastar.__version__\n"
    code += "assert not {'torch', 'numpy', 'yaml', 'omegaconf', 'rich'} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_type_checkers_see_what_is_imported_late():
    tree = ast.parse((ROOT / "megastar" / "__init__.py").read_text())
    (branch,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {a.name: n.module for n in branch.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert seen == megastar._SOURCES
    assert sorted({*seen, "__version__"}) == sorted(megastar.__all__) == dir(megastar)


def test_names_lead_to_their_objects():
    assert megastar.load.__module__ == megastar.Model.__module__ == "megastar.api"
    assert megastar.RunConfig is RunConfig
    with pytest.raises(AttributeError, match="module 'megastar' has no attribute 'lod'"):
        megastar.lod  # noqa: B018
    assert (ROOT / "megastar" / "py.typed").is_file()


def test_setup_knows_the_version():
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-1] == megastar.__version__


def test_a_run_is_configured_by_object_path_or_dict(tmp_path):
    sections = {"model": "configs/model/nano.yaml", "data": {"shards": "codes"}, "train": {"steps": 3}}
    from_dict = as_run_config(sections)
    assert isinstance(from_dict, RunConfig) and from_dict.model.name == "nano" and from_dict.train.steps == 3
    assert sections["model"] == "configs/model/nano.yaml"  # the caller's dict is left as it is
    (tmp_path / "run.yaml").write_text("{model: configs/model/nano.yaml, data: {shards: codes}, train: {steps: 3}}")
    same = [as_run_config(tmp_path / "run.yaml"), as_run_config(str(tmp_path / "run.yaml")), as_run_config(from_dict)]
    assert all(asdict(other) == asdict(from_dict) for other in same)
    from_dict.train.steps = -1
    for bad, message in (
        (from_dict, "configuration: train.steps = -1"),
        (
            {"data": {"shards": "codes"}, "train": {"step": 3}},
            r"configuration: unknown key train.step: did you mean train.steps\?",
        ),
        (3, "configuration 3: give a RunConfig, the path of a YAML file, or a dict of its sections"),
    ):
        with pytest.raises(megastar.UserError, match=message):
            as_run_config(bad)


# Loading -----------------------------------------------------------------------------------------------------------
def test_what_a_model_tells(model, files):
    assert model.classes == NAMES and model.num_classes == 3 and model.image_size == 16 and model.config == MODEL
    assert repr(model) == "<megastar.Model tiny: 3 classes, 16 x 16 images of 16 tokens, cpu>"
    half = megastar.load(**files, device="cpu", dtype="bf16")
    assert next(half.transformer.parameters()).dtype == torch.bfloat16
    assert next(half.tokenizer.parameters()).dtype == torch.float32
    assert half.features(np.zeros((1, 16), int), block=1).dtype == np.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "nowhere.safetensors"}, "weights nowhere.safetensors do not exist"),
        ({"tokenizer": "nowhere.safetensors"}, "tokenizer nowhere.safetensors does not exist"),
        (
            {"tokenizer": None},
            "weights.safetensors records no tokenizer, so the one of its codes is not known: give it with --tokenizer",
        ),
        ({"weights": "teacher"}, "weights 'teacher' is unknown: a run has ema and student"),
        ({"dtype": "int8"}, "dtype 'int8' is unknown: use auto, bf16, fp32, fp16"),
        ({"device": "abacus"}, "device 'abacus' is unknown: use auto, cpu, cuda or cuda:1"),
    ],
)
def test_what_cannot_be_loaded(files, changes, message):
    with pytest.raises(megastar.UserError, match=message):
        megastar.load(**files | changes)


def test_an_installation_without_the_shipped_weights(monkeypatch):
    monkeypatch.setattr(find_weights, "SHIPPED_WEIGHTS", "assets/weights/lost.safetensors")
    with pytest.raises(megastar.UserError, match="lost.safetensors are not in this installation: name a run folder or"):
        megastar.load()


# Sampling ----------------------------------------------------------------------------------------------------------
def test_images_come_class_by_class_and_depend_on_the_seed(model):
    drawn = model.sample(["stroke", 0], n=2, seed=3, batch=3, top_k=20, top_p=0.9, temperature=0.8, cfg_scale=2.0)
    assert drawn.shape == (4, 16, 16, 3) and drawn.dtype == np.uint8
    options = {"top_k": 20, "top_p": 0.9, "temperature": 0.8, "cfg_scale": 2.0}
    codes = sample_tokens(model.transformer, [2, 2, 0, 0], seeds=sample_seeds(3, 4), batch=3, **options)
    assert np.array_equal(drawn, decode_images(model.tokenizer, codes))
    assert np.array_equal(drawn[:2], model.sample("stroke", n=2, seed=3, **options))
    assert not np.array_equal(drawn[:2], model.sample("stroke", n=2, seed=4, **options))


def test_a_repeated_request_uses_the_sampler_again_and_another_one_does_not(model):
    first = model.sample(0, n=2)
    sampler = model._sampler
    assert np.array_equal(model.sample(0, n=2), first) and model._sampler is sampler
    guided = model.sample(0, n=2, cfg_scale=8.0)
    assert model._sampler is not sampler and not np.array_equal(guided, first)


@pytest.mark.parametrize(
    "classes",
    [[1, 2], (1, "stroke"), np.array([1, 2], np.int32), torch.tensor([1, 2]), ["square", "2"], list(np.arange(1, 3))],
)
def test_ways_to_name_classes(model, classes):
    assert np.array_equal(model.sample(classes), model.sample([1, 2]))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"classes": "sqare"}, r"class 'sqare' is unknown: did you mean square\?"),
        ({"classes": [0, 3]}, r"class 3 is outside 0..2, the classes of these weights"),
        ({"classes": -1}, r"class -1 is outside 0..2"),
        ({"classes": 1.5}, "class 1.5 is a float: give a class by its number or name"),
        ({"classes": np.zeros((1, 2), int)}, r"class \[0, 0\] is a list"),
        ({"classes": []}, "no classes are given: name at least one"),
        ({"n": 0}, "n is 0: sample at least 1 image of each class"),
        ({"seed": -1}, "seed -1 must be an integer from 0"),
        ({"batch": 0}, "batch 0 must be at least 1"),
        ({"cfg_scale": 0.5}, "cfg_scale 0.5 must be at least 1"),
        ({"temperature": 0}, "temperature 0 must be above 0"),
        ({"top_p": 1.5}, "top_p 1.5 must be above 0"),
        ({"top_k": -1}, "top_k -1 must be 0"),
    ],
)
def test_what_cannot_be_sampled(model, request_, message):
    with pytest.raises(megastar.UserError, match=message):
        model.sample(**{"classes": 0} | request_)


# Codes and features ------------------------------------------------------------------------------------------------
def test_codes_are_the_tokenizers(model, images):
    codes = model.encode(images)
    assert codes.shape == (5, 16) and codes.dtype == np.int64
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    assert np.array_equal(codes, model.tokenizer.encode(pixels).numpy())
    decoded = model.decode(codes)
    assert decoded.shape == images.shape and decoded.dtype == np.uint8
    assert np.array_equal(decoded, decode_images(model.tokenizer, torch.from_numpy(codes)))


def test_tensors_lists_and_pil_images_go_in(model, images):
    codes = model.encode(images)
    for same in (torch.from_numpy(images), list(images), [Image.fromarray(i) for i in images], images[::-1][::-1]):
        assert np.array_equal(model.encode(same), codes)
    for same in (torch.from_numpy(codes), codes.astype(np.uint16), codes.tolist()):
        assert np.array_equal(model.decode(same), model.decode(codes))


def test_no_images_are_no_error(model, images):
    assert model.encode(images[:0]).shape == (0, 16)
    assert model.decode(np.empty((0, 16), int)).shape == (0, 16, 16, 3)
    assert model.features(images[:0], block=1).shape == (0, 16, 16)


def test_features_are_those_of_the_probe(model, images):
    codes = model.encode(images)
    features = model.features(images, block=2, batch=2)
    assert features.shape == (5, 16, 16) and features.dtype == np.float32
    np.testing.assert_allclose(features, model.features(codes, block=2), rtol=1e-4, atol=1e-5)
    places = [1, 8, 16]
    probe = probe_features(model.transformer, codes, block=2, positions=places)
    np.testing.assert_allclose(features[:, [p - 1 for p in places]], probe, rtol=1e-4, atol=1e-5)
    changed = codes.copy()
    changed[:, 7] = (changed[:, 7] + 1) % 32  # position t has seen the first t codes
    differs = np.abs(model.features(changed, block=2) - model.features(codes, block=2)).max((0, 2)) > 1e-6
    assert differs.tolist() == [False] * 8 + [True] * 8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: m.encode(x[0]), r"images have shape \(16, 16, 3\): this model takes \(N, 16, 16, 3\), height x"),
        (lambda m, x: m.encode(x.transpose(0, 3, 1, 2)), r"images have shape \(5, 3, 16, 16\)"),
        (lambda m, x: m.encode(x[:, :8]), r"images have shape \(5, 8, 16, 3\)"),
        (lambda m, x: m.encode(x / 255), "images have dtype float64: give uint8 pixels from 0 to 255"),
        (lambda m, x: m.encode([x[0], x[0, :8]]), "images have different shapes: give one array"),
        (lambda m, x: m.decode(np.zeros((2, 15), int)), r"codes have shape \(2, 15\): this model takes \(N, 16\)"),
        (lambda m, x: m.decode(np.zeros((2, 16))), "codes have dtype float64: give integers"),
        (
            lambda m, x: m.decode(np.full((2, 16), 32)),
            "codes range from 32 to 32: the codebook of this model has codes 0 to 31",
        ),
        (lambda m, x: m.decode(np.full((2, 16), -1)), "codes range from -1 to -1"),
        (lambda m, x: m.features(x, block=0), "block 0 is outside 1..2, the blocks of this model"),
        (lambda m, x: m.features(x, block=3), "block 3 is outside 1..2"),
        (lambda m, x: m.features(np.full((2, 16), 32), block=1), "codes range from 32 to 32"),
        (lambda m, x: m.features(x[0], block=1), r"images have shape \(16, 16, 3\)"),
    ],
)
def test_input_that_does_not_fit(model, images, call, message):
    with pytest.raises(megastar.UserError, match=message):
        call(model, images)
