"""Hostile and damaged weights, tokenizers and LlamaGen files."""

from __future__ import annotations

import json
import random
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.fuzz import DEEP, GIB, Tally, byte_variants, dumps, json_variants, odd_files
from tests.integration.fuzz.conftest import Box
from tests.integration.fuzz.test_checkpoint import join_header, split_header
from tests.unit.encoders.test_dinov2 import random_state as dinov2_state
from tests.unit.encoders.test_dinov3 import random_state as dinov3_state

WEIGHTS = [
    ["convert", "--inspect", "weights.safetensors"],
    ["sample", "weights.safetensors", "--tokenizer", "tokenizer.safetensors", "--count", "1", "--device", "cpu"],
    ["convert", "weights.safetensors", "--to", "llamagen", "--out", "o.pt"],
    ["convert", "--inspect", "--verify", "weights.safetensors"],
]
TOKENIZER = [
    ["convert", "--inspect", "tokenizer.safetensors"],
    ["sample", "weights.safetensors", "--tokenizer", "tokenizer.safetensors", "--count", "1", "--device", "cpu"],
    ["data", "index", "codes", "--tokenizer", "tokenizer.safetensors"],
    ["convert", "tokenizer.safetensors", "--to", "llamagen", "--out", "o.pt"],
]
# Values of the fields of both architectures.
FIELDS: dict[str, list[Any]] = {
    "num_classes": [10**12, -1, 0], "n_layer": [10**7, "x", -1, True, 2.0], "vocab_size": [10**12], "dim": [10**9, 3],
    "n_head": [10**6, 0, 7], "image_tokens": [10**10, 10, 4], "multiple_of": [10**12, 0], "evil": [1], "norm_eps": ["x"],
    "image_size": [10**12, 10**6, 60000, 0, 17], "channels": [10**9, 0, 7], "res_blocks": [10**9], "z_channels": [10**12],
    "channel_multipliers": [[], [1] * 10**5, [10**12], [0, 1, 2], "x", [1, 2, True]], "codebook_size": [10**12, 1],
    "codebook_embed_dim": [10**12], "norm_groups": [3, 10**9, 0], "dropout": [float("nan"), 2.0, 10**400],
    "rope_base": [1e400], "quantizer": ["lfq", "fsq", "ibq", "x", 5], "fsq_levels": [[2] * 6, [1], [2] * 17, [10**9] * 4, "x"],
    "target_position": ["rotary", "embedding", "x", 5, ["rotary"]],
    "head": ["factorised", "x", 5], "head_factors": [[2, 3], [1], [2] * 17, [10**9] * 4, "x"],
}  # fmt: skip
PROVENANCE: list[Any] = [
    [], "[/]", None, {"classes": ["a"]}, {"classes": 5}, {"classes": [1, None]}, {"step": "[/]"}, {"step": 10**30},
    {"null_class": 5, "downsample": "x", "weights": []}, {"null_class": False, "downsample": 10**30},
    {"classes": ["[/]", "\x1b]0;x\x07<script>"] + ["c"] * 3}, {"tokenizer": 5}, {"tokenizer": "f" * 64}, {"command": [1]},
    {"token_order": 5}, {"token_order": {"kind": [], "permuted_share": "x"}}, {"token_order": {"permuted_share": -1e300}},
]  # fmt: skip


def test_weights(box: Box) -> None:
    tally, rng = Tally("weights"), random.Random("weights")
    path = box.path / "weights.safetensors"
    header, data = split_header(path.read_bytes())
    whole = json.loads(header["__metadata__"]["megastar"])

    def with_content(text: str | bytes) -> bytes:
        plain = text if isinstance(text, str) else text.decode(errors="replace")
        metadata = header["__metadata__"] | {"megastar": plain}
        return join_header(json.dumps(header | {"__metadata__": metadata}).encode(), data)

    variants = [
        (f"{n} = {v!s:.20}", with_content(dumps(whole | {"model": whole["model"] | {n: v}})))
        for n, v in pairs(whole["model"])
    ]
    variants += [(f"provenance {p!s:.20}", with_content(json.dumps(whole | {"provenance": p}))) for p in PROVENANCE]
    variants += [(label, with_content(text)) for label, text in json_variants(whole, rng, 24)]
    variants += [(label, join_header(text, data)) for label, text in json_variants(header, rng, 16)]
    variants += [(label, text) for label, text in byte_variants(path.read_bytes(), rng, 16)]
    variants += [("deep", with_content(DEEP)), ("list", with_content("[1]")), ("no JSON", with_content("{"))]
    variants += [("2^63", struct.pack("<Q", 2**63) + b"{}"), ("spaces", join_header(b" " * 60_000_000, b""))]
    try_all(box, tally, path, variants, WEIGHTS)


def test_tokenizer(box: Box) -> None:
    tally, rng = Tally("tokenizer"), random.Random("tokenizer")
    path = box.path / "tokenizer.safetensors"
    header, data = split_header(path.read_bytes())
    config = json.loads(header["__metadata__"]["config"])

    def with_metadata(**fields: str) -> bytes:
        return join_header(json.dumps(header | {"__metadata__": header["__metadata__"] | fields}).encode(), data)

    variants = [(f"{n} = {v!s:.20}", with_metadata(config=dumps(config | {n: v}).decode())) for n, v in pairs(config)]
    variants += [(f"provenance {p!s:.20}", with_metadata(provenance=json.dumps(p))) for p in PROVENANCE[:4]]
    variants += [(label, join_header(text, data)) for label, text in json_variants(header, rng, 24)]
    variants += [(label, text) for label, text in byte_variants(path.read_bytes(), rng, 16)]
    variants += [("deep", with_metadata(config=DEEP)), ("list", with_metadata(config="[1]"))]
    try_all(box, tally, path, variants, TOKENIZER)


def pairs(fields: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(name, value) for name, found in FIELDS.items() if name in fields or name == "evil" for value in found]


def try_all(box: Box, tally: Tally, path: Path, variants: list[tuple[str, bytes]], commands: list[list[str]]) -> None:
    for i, (label, content) in enumerate(variants):
        box.variant(path, content)
        box.run(tally, label, *commands[0 if i % 2 else i // 2 % len(commands)])
    for kind, make in odd_files().items():
        box.instead(path, make)
        box.run(tally, f"a {kind}", *commands[0])
        box.instead(path, make)
        box.run(tally, f"a {kind}", *commands[1])
    tally.check()


def test_llamagen(box: Box) -> None:
    tally, rng = Tally("LlamaGen's .pt"), random.Random("pt")
    convert = ["convert", "weights.safetensors", "--to", "llamagen", "--out", "whole.pt"]
    box.run(tally, "whole", *convert)
    model = torch.load(box.path / "whole.pt", weights_only=True)["model"]
    whole = (box.path / "whole.pt").read_bytes()
    (box.path / "model.yaml").write_text(
        "{n_layer: 3, n_head: 2, dim: 16, multiple_of: 16, vocab_size: 64, num_classes: 5, image_tokens: 16}"
    )
    extra = {"config": (box.path / "model.yaml").read_bytes()}
    target = box.path / "x.pt"
    first = "cls_embedding.embedding_table.weight"
    loop: dict[str, Any] = {}
    loop["model"] = loop

    contents: dict[str, Any] = {
        "object": {"model": Path("x")}, "no dictionary": [1], "loop": loop, "number for a name": {"model": model | {1: torch.zeros(2)}},
        "text for a tensor": {"model": model | {"a.b": "x"}}, "no weights": {}, "tensor": torch.zeros(3),
        "repeated elements": {"model": model | {first: torch.zeros(1).expand(3_000_000_001, 16)}},
        "all repeated": {"model": {n: torch.zeros(1).expand(t.shape) for n, t in model.items()}},
        "one dimension": {"model": model | {first: torch.zeros(4)}}, "integers": {"model": {n: t.long() for n, t in model.items()}},
        "sparse": {"model": model | {first: model[first].to_sparse()}}, "scalar": {"model": model | {first: torch.tensor(1.0)}},
        "steps": {"model": model, "steps": "x"}, "provenance": {"model": model, "megastar": {"classes": 5}},
        "unusual provenance": {"model": model, "megastar": {"x": torch.zeros(2)}}, "many blocks": {"model": model | {"layers.999999999.x": torch.zeros(1)}},
        "complex": {"model": model | {first: model[first].to(torch.complex64)}}, "freqs": {"model": model | {"freqs_cis": torch.tensor(1.0)}},
        "two sets": {"model": model, "ema": model}, "a set of other things": {"model": model, "ema": {"a.b": [1]}, "args": {"num_classes": -1}},
        "names of sets": {"\x1b]0;x\n": model, "[/]": model}, "sets in sets": {"": {"": {"": {"": {"": model}}}}, "module": model},
        "NaN": {"model": model | {first: model[first] * float("nan")}}, "equal names": {"model": model | {"module." + first: model[first]}},
        "classes": {"model": model, "args": {"num_classes": 10**30, "image_size": 384, "downsample_size": 1}},
        "tokenizer without widths": {"model": {"quantize.embedding.weight": torch.zeros(4, 4), "encoder.conv_in.weight": torch.zeros(0, 3)}},
    }  # fmt: skip

    def go(label: str) -> None:
        for words in (
            ["convert", "--inspect", "x.pt"],
            ["convert", "x.pt", "--config", "model.yaml", "--to", "safetensors", "--out", "o.safetensors"],
            *(
                [["sample", "x.pt", "--tokenizer", "tokenizer.safetensors", "--device", "cpu"]]
                if "set" in label
                else []
            ),
        ):
            (box.path / "model.yaml").write_bytes(extra["config"])
            box.run(tally, label, *words)

    for label, content in contents.items():
        box.fresh()
        torch.save(content, target)
        go(label)
    for legacy in ("repeated elements", "object"):
        box.fresh()
        torch.save(contents[legacy], target, _use_new_zipfile_serialization=False)
        go(f"{legacy}, older format")
    box.fresh()
    with (
        zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("x/data.pkl", "w", force_zip64=True) as member,
    ):
        for _ in range(2 * GIB >> 20):
            member.write(bytes(1 << 20))
    go("2 GiB of zeros, compressed")
    for label, data in [("text", b"hello"), ("empty", b""), *byte_variants(whole, rng, 24)]:
        box.variant(box.path / "weights.safetensors", b"")
        target.write_bytes(data)
        go(label)
    for kind, make in odd_files().items():
        box.fresh()
        make(target)
        box.run(tally, f"a {kind}", "convert", "--inspect", "x.pt")
    tally.check()


@pytest.mark.parametrize("name", ["dinov2", "dinov3"])
def test_dino(box: Box, name: str) -> None:
    """The files of FD-DINOv2 and of DINOv3, pickled and as safetensors: bytes, shapes and objects of other kinds."""
    tally, rng = Tally(name), random.Random(name)
    if name == "dinov2":
        state = dinov2_state(dim=64, blocks=1, grid=4)
        command = ["evaluate", "made.npz", "--real", "real.npz", "--allow-few", "--device", "cpu", "--dinov2"]
        own = [
            ("pos_embed", torch.zeros(1, 2, 64)), ("pos_embed", torch.zeros(1, 0, 64)), ("register_tokens", torch.zeros(1, 500, 64)),
            ("patch_embed.proj.weight", torch.zeros(63, 3, 14, 14)), ("storage_tokens", torch.zeros(1, 4, 64)),
        ]  # fmt: skip
    else:
        state = dinov3_state(dim=64, blocks=1)
        command = [
            *("pretokenize", "photos", "--tokenizer", "tokenizer.safetensors", "--out", "new", "--crops", "center"),
            *("--device", "cpu", "--features", "dinov3", "--feature-weights"),
        ]
        periods, mask = "rope_embed.periods", "blocks.0.attn.qkv.bias_mask"
        own = [
            (periods, torch.zeros(16)), (periods, torch.zeros(0)), (periods, torch.ones(2**16)), (periods, torch.ones(())),
            (periods, torch.full((16,), 1e-38)), (periods, torch.ones(16, dtype=torch.complex64)), (mask, torch.ones(5)),
            (mask, torch.full((192,), float("nan"))), (mask, torch.ones(192, dtype=torch.int64)), ("pos_embed", torch.zeros(1)),
            ("storage_tokens", torch.zeros(1, 500, 64)), ("storage_tokens", torch.zeros(())), ("stages.0", torch.zeros(1)),
            ("blocks.0.attn.qkv.bias", torch.ones(192, dtype=torch.int64)), ("layer.0.attention.q_proj.bias", torch.zeros(())),
            ("patch_embed.proj.weight", torch.zeros(63, 3, 16, 16)), ("blocks.0.mlp.w1.weight", torch.zeros(4, 64)),
        ]  # fmt: skip
    for file, write in (("w.pth", torch.save), ("w.safetensors", save_file)):
        words, path = [*command, file], box.whole / file
        write(state, path)
        whole = path.read_bytes()
        path.unlink()
        for label, data in byte_variants(whole, rng, 40):
            box.variant(box.path / file, data)
            box.run(tally, label, *words)
        shapes: list[tuple[str, torch.Tensor]] = [
            *own, ("cls_token", torch.zeros(())), ("patch_embed.proj.weight", torch.zeros(64, 3, 14, 0)),
            ("blocks.999.norm1.weight", torch.zeros(64)), ("x", torch.zeros(1)),
            ("norm.weight", torch.full((64,), float("nan"))), ("norm.weight", torch.full((64,), 3e38)),
        ]  # fmt: skip
        for key, tensor in shapes:
            box.fresh()
            write(state | {key: tensor}, box.path / file)
            box.run(tally, f"{key} {tuple(tensor.shape)}", *words)
        for kind, make in odd_files().items():
            box.instead(box.path / file, make)
            box.run(tally, f"a {kind}", *words)
    for label, content in (
        ("list", [1]),
        ("text", "x"),
        ("path", Path("x")),
        ("nested", {"model": {"model": {"a": 1}}}),
        ("sparse", state | {"norm.weight": torch.ones(64).to_sparse()}),
        ("float8", {k: v.to(torch.float8_e4m3fn) for k, v in state.items()}),
    ):
        box.fresh()
        torch.save(content, box.path / "w.pth")
        box.run(tally, label, *command, "w.pth")
    tally.check()


def test_dinov3_in_two_files(box: Box) -> None:
    """The index and a part: bytes, values, names of other files, and objects of other kinds."""
    tally, rng = Tally("index of weights"), random.Random("index of weights")
    command = [
        *("pretokenize", "photos", "--tokenizer", "tokenizer.safetensors", "--out", "new", "--crops", "center"),
        *("--device", "cpu", "--features", "dinov3", "--feature-weights", "w.safetensors.index.json"),
    ]
    state, parts = dinov3_state(dim=64, blocks=1), ("w-00001-of-00002.safetensors", "w-00002-of-00002.safetensors")
    names = sorted(state)
    held = {parts[0]: names[::2], parts[1]: names[1::2]}
    contents = {part: {name: state[name].contiguous() for name in of_part} for part, of_part in held.items()}
    index = {"metadata": {"total_size": 1}, "weight_map": {name: part for part in parts for name in held[part]}}

    def case(label: str, file: str = "", data: bytes = b"") -> None:
        box.fresh()
        for part, tensors in contents.items():
            save_file(tensors, box.path / part)
        (box.path / command[-1]).write_text(json.dumps(index))
        if file:
            (box.path / file).write_bytes(data)
        outcomes.append(box.run(tally, label, *command).kind)

    outcomes: list[str] = []
    case("whole")
    assert outcomes == ["tolerated"]
    part = (box.path / parts[0]).read_bytes()
    for label, data in [*json_variants(index, rng, 60), *byte_variants(json.dumps(index).encode(), rng, 24)]:
        case(label, command[-1], data)
    for label, data in byte_variants(part, rng, 24):
        case(label, parts[0], data)
    for other in ("../w-00001-of-00002.safetensors", "/etc/passwd", "real.npz", "w.safetensors.index.json", "photos"):
        changed = {"weight_map": index["weight_map"] | {"norm.weight": other}}
        case(f"norm.weight in {other}", command[-1], json.dumps(changed).encode())
        assert outcomes[-1] == "sentence"
    for kind, make in odd_files().items():
        box.fresh()
        make(box.path / command[-1])
        box.run(tally, f"a {kind}", *command)
    tally.check()
