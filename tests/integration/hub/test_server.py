"""hf:// sources and megastar push against a server on loopback."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megastar.tokenizer.io import tokenizer_hash
from megastar.utils.files import sha256
from tests.integration.conftest import ROOT
from tests.integration.hub.conftest import files_of

pytestmark = [pytest.mark.dist, pytest.mark.long]


def test_a_repository_is_a_source_of_every_command(folder, hub, client, world, tmp_path):
    commit = hub.commit("owner/tiny", files_of(folder) | {"evil.py": b"raise SystemExit(9)", "pytorch_model.bin": b"x"})
    hub.branches["owner/tiny"]["v1.0"] = commit
    hub.commit("owner/tiny", {"config.json": b"{}"})  # main is another library's
    source, here = "hf://owner/tiny@v1.0", tmp_path / "here.safetensors"
    done = client("convert", source, "--to", "safetensors", "--out", here)
    assert done.returncode == 0, done.stderr
    assert client("convert", folder, "--to", "safetensors", "--out", tmp_path / "there.safetensors").returncode == 0
    assert here.read_bytes() == (tmp_path / "there.safetensors").read_bytes()
    assert hub.fetched() == {"config.json", "model.safetensors", "tokenizer/tokenizer.safetensors"}
    before = len([r for r in hub.requests if r.startswith("GET")])
    assert client("sample", source, "--per-class", "1", "--out", tmp_path / "a.png").returncode == 0
    assert len([r for r in hub.requests if r.startswith("GET")]) == before  # from the cache
    config = world.write_config(tmp_path / "run.yaml", tmp_path / "run", steps=1, val_every=0, init=source)
    done = client("train", config, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "run/checkpoints/step-00000001/megastar.json").read_text())
    assert manifest["init"]["revision"] == commit and manifest["init"]["file"] == source
    done = client("sample", "hf://owner/tiny", "--out", tmp_path / "b.png")
    assert done.returncode == 2 and "holds a model of another library" in " ".join(done.stderr.split())


def test_one_process_reports_the_source(folder, hub, client, world, tmp_path):
    hub.commit("owner/tiny", files_of(folder))
    source = "hf://owner/tiny"
    config = world.write_config(tmp_path / "run.yaml", tmp_path / "run", steps=1, val_every=0, init=source)
    done = client("train", config, "--nproc", "2")
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count(f" {source}: ") == 1
    own_process = {"HF_HUB_OFFLINE": "1"}
    words = (source, "--per-class", "1", "--npz", tmp_path / "a.npz", "--out", tmp_path / "a.png", "--nproc", "2")
    done = client("sample", *words, **own_process)
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count(f" {source}: ") == 1


def test_weights_in_several_files(folder, whole, hub, client, tmp_path):
    from megastar.checkpoint.hub.convert_to import to_hub_folder

    to_hub_folder(whole, tmp_path / "parts", "run", shard_bytes=60_000)
    hub.commit("owner/parts", files_of(tmp_path / "parts"))
    done = client("convert", "hf://owner/parts", "--to", "hf", "--out", tmp_path / "one")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "one/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_sources_that_are_refused(folder, hub, client, tmp_path):
    commit = hub.commit("owner/tiny", files_of(folder))
    hub.commit("owner/gated", files_of(folder))
    hub.gated.add("owner/gated")
    hub.commit("owner/empty", {"README.md": b"x"})
    hub.commit("owner/half", {k: v for k, v in files_of(folder).items() if k != "model.safetensors"})

    def said(source: str, **env: str) -> str:
        done = client("sample", source, "--out", tmp_path / "grid.png", **env)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        return " ".join(done.stderr.split())

    whole = "error: hf://owner/tiny@v9: owner/tiny has no revision v9: name a branch, a tag or a commit of it"
    assert whole in said("hf://owner/tiny@v9")
    assert "the Hub has no public model owner/none" in said("hf://owner/none")
    assert "owner/gated is gated" in said("hf://owner/gated")
    assert "owner/empty has no config.json" in said("hf://owner/empty")
    assert "has no model.safetensors" in said("hf://owner/half")
    assert "cannot be reached" in said(f"hf://owner/tiny@{commit[:39]}0", HF_HUB_OFFLINE="1")
    for bad in (
        "hf://owner",
        "hf://../../x",
        "hf://owner/na me",
        "hf://owner/tiny@",
        "hf://owner/tiny@../x",
        "hf://a/b/c",
    ):
        assert "is not a repository of the Hub" in said(bad), bad
    assert (
        "could not be fetched" in (text := said("hf://owner/tiny", HF_ENDPOINT="http://127.0.0.1:9"))
        or "cannot be reached" in text
    )
    assert not (tmp_path / "grid.png").exists()


def test_a_connection_that_breaks_while_files_are_fetched(folder, hub, client, tmp_path):
    hub.commit("owner/tiny", files_of(folder))

    def said(**env: str) -> str:
        done = client("sample", "hf://owner/tiny", "--out", tmp_path / "grid.png", **env)
        assert done.returncode == 2 and "Traceback" not in done.stderr and not (tmp_path / "grid.png").exists()
        return " ".join(done.stderr.split())

    for name, how, env in (
        (
            "config.json",
            "close",
            {"HF_HUB_DOWNLOAD_TIMEOUT": "20"},
        ),  # a process of its own, whose stderr the library logs to
        ("model.safetensors", "reset", {}),
    ):
        hub.broken = {f"GET /{name}": how}
        text = said(**env)
        assert f"hf://owner/tiny: {name} could not be fetched (" in text and "try again, or name a local" in text
        assert any(r.startswith("GET") and r.endswith(f"/{name}") for r in hub.requests)
    proxy = {"HF_ENDPOINT": "https://127.0.0.1:9", "HTTPS_PROXY": hub.url, "NO_PROXY": "", "no_proxy": ""}
    assert (
        "config.json could not be fetched (501 Unsupported method ('CONNECT')): check the network, the proxy"
        in said(**proxy)
    )
    hub.broken = {}
    client.env["HF_ENDPOINT"] = hub.url.removeprefix("http://")
    assert "hf://owner/tiny: config.json could not be fetched (" in (text := said()) and "HF_ENDPOINT" in text
    client.env["HF_ENDPOINT"] = hub.url
    assert client("sample", "hf://owner/tiny", "--out", tmp_path / "grid.png").returncode == 0  # the same cache


def test_a_connection_that_breaks_while_a_folder_is_published(folder, hub, client, tmp_path):
    def said(*words: str, answer: str = "") -> str:
        done = client("push", folder, "owner/new", *words, HF_TOKEN="hf_tester", answer=answer)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        return " ".join(done.stderr.split())

    for request, words, answer in (
        ("POST /api/repos/create", ["--yes"], ""),
        ("GET /api/models/owner/new", [], "y"),
        ("POST /commit/main", ["--yes"], ""),
    ):
        for how in ("close", "reset"):
            hub.broken = {request: how}
            text = said(*words, answer=answer)
            assert "owner/new could not be published (" in text and "run the same command again" in text, request
    client.env["HF_ENDPOINT"] = "http://127.0.0.1:9"
    assert "owner/new could not be published ([Errno 111] Connection refused): check" in said("--yes")
    client.env["HF_ENDPOINT"], hub.broken = hub.url, {}
    assert client("push", folder, "owner/new", "--yes", HF_TOKEN="hf_tester").returncode == 0
    assert hub.commits[hub.branches["owner/new"]["main"]] == files_of(folder)


def test_push_publishes_what_can_be_fetched_again(folder, hub, client, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    (source / "notes.txt").write_text("mine alone")
    done = client("push", source, "owner/new", "--yes")
    assert done.returncode == 2 and "HF_TOKEN" in done.stderr and "owner/new" not in hub.branches
    done = client("push", source, "owner/new", HF_TOKEN="hf_tester")
    assert done.returncode == 2 and "pass --yes" in done.stderr and not hub.branches
    done = client("push", source, "owner/new", "--yes", "--private", HF_TOKEN="hf_tester")
    assert done.returncode == 0, done.stderr
    assert "published: " in done.stdout and "model.safetensors" in done.stdout
    assert hub.commits[hub.branches["owner/new"]["main"]] == files_of(folder)
    assert "owner/new" in hub.private
    done = client("convert", "hf://owner/new", "--to", "hf", "--out", tmp_path / "back", HF_TOKEN="hf_tester")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "back/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    done = client("push", source, "owner/new", "--yes", "--revision", "next", HF_TOKEN="hf_tester")
    assert done.returncode == 0 and "next" in hub.branches["owner/new"], done.stderr


def test_a_public_repository_is_not_taken_for_a_private_one(folder, hub, client):
    """huggingface_hub ignores ``private`` for a repository that exists."""
    before = hub.commit("owner/open", {"README.md": b"mine"})
    done = client("push", folder, "owner/open", "--yes", "--private", "--revision", "next", HF_TOKEN="hf_tester")
    assert done.returncode == 2 and "owner/open is not private" in done.stderr, done.stderr
    assert hub.branches["owner/open"] == {"main": before} and not hub.blobs
    hub.commit("owner/closed", {"README.md": b"mine"})
    hub.private.add("owner/closed")
    done = client("push", folder, "owner/closed", "--yes", "--private", HF_TOKEN="hf_tester")
    assert done.returncode == 0 and "model.safetensors" in hub.commits[hub.branches["owner/closed"]["main"]], (
        done.stderr
    )


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("open", [], "an existing public repository: everyone can download it"),
        ("closed", [], "an existing private repository"),
        ("closed", ["--private"], "an existing private repository"),
        ("new", [], "a new public repository: everyone can download it"),
        ("new", ["--private"], "a new private repository"),
    ],
)
def test_the_question_tells_who_can_download(folder, hub, client, name, options, said):
    for existing in ("open", "closed"):
        hub.commit(f"owner/{existing}", {})
    hub.private.add("owner/closed")
    done = client("push", folder, f"owner/{name}", *options, HF_TOKEN="hf_tester", answer="n")
    assert done.returncode == 1 and f"{hub.url}, {said} publish?" in " ".join(done.stdout.split()), done.stdout
    assert "nothing was published" in done.stdout and not hub.blobs
    done = client("push", folder, "owner/open", "--private", HF_TOKEN="hf_tester", answer="y")
    assert done.returncode == 2 and "owner/open is not private" in done.stderr and not hub.blobs


@pytest.mark.parametrize("end", ["Ctrl-D", "closed"])
def test_no_answer_to_the_question_is_no(folder, hub, client, end):
    command = [sys.executable, "-m", "megastar", "push", folder, "owner/new"]
    options = {"cwd": ROOT, "env": client.env | {"HF_TOKEN": "hf_tester"}, "capture_output": True, "timeout": 120}
    if end == "closed":
        done = subprocess.run(["bash", "-c", 'exec "$@" <&-', "bash", *command], **options)
        assert done.returncode == 2 and b"there is no terminal: pass --yes" in done.stderr, done.stderr
    else:
        ours, its = pty.openpty()
        os.write(ours, b"\x04")
        try:
            done = subprocess.run(command, stdin=its, **options)
        finally:
            os.close(ours)
            os.close(its)
        assert done.returncode == 1 and b"publish? [y/N] \nnothing was published\n" in done.stdout, done
    assert not done.stderr.count(b"Traceback") and not hub.branches


def test_a_damaged_folder_is_not_published(folder, hub, client, tmp_path):
    def said(change) -> str:
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(folder, tmp_path / "bad")
        change(tmp_path / "bad")
        done = client("push", tmp_path / "bad", "owner/new", "--yes", HF_TOKEN="hf_tester")
        assert done.returncode == 2 and not hub.branches, done.stdout
        return " ".join(done.stderr.split())

    def flip(path):
        data = bytearray((path / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (path / "model.safetensors").write_bytes(data)

    assert "its SHA-256 differs from config.json's" in said(flip)
    text = said(flip_decoder)
    assert "tokenizer/tokenizer.safetensors is damaged: its SHA-256 differs from config.json's" in text
    assert "has no tokenizer" in said(lambda path: shutil.rmtree(path / "tokenizer"))
    assert "is not the name of a repository" in client("push", folder, "owner", "--yes").stderr


def flip_decoder(path: Path) -> None:
    """Change one bit of the decoder, which the tokenizer's identity does not cover."""
    file = path / "tokenizer/tokenizer.safetensors"
    identity, data = tokenizer_hash(file), bytearray(file.read_bytes())
    size = int.from_bytes(data[:8], "little")
    name, entry = next((n, e) for n, e in json.loads(data[8 : 8 + size]).items() if n.startswith("decoder."))
    data[8 + size + entry["data_offsets"][0]] ^= 1
    file.write_bytes(data)
    assert tokenizer_hash(file) == identity, name


def test_a_damaged_decoder_is_found_wherever_the_folder_goes(folder, hub, client, tmp_path):
    bad = shutil.copytree(folder, tmp_path / "bad")
    flip_decoder(bad)
    hub.commit("owner/bad", files_of(bad))
    for source in (bad, "hf://owner/bad"):
        done = client("convert", source, "--to", "hf", "--out", tmp_path / "out")
        assert done.returncode == 2 and "tokenizer.safetensors is damaged" in done.stderr, done.stderr
        assert not (tmp_path / "out").exists()
    good = folder / "tokenizer/tokenizer.safetensors"
    done = client("convert", bad, "--to", "hf", "--out", tmp_path / "out", "--tokenizer", good)
    assert done.returncode == 0, done.stderr
    data = bytearray((bad / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (bad / "model.safetensors").write_bytes(data)
    done = client("convert", bad, "--to", "hf", "--out", tmp_path / "more", "--tokenizer", good)
    assert done.returncode == 2 and "model.safetensors is damaged" in done.stderr, done.stderr


def test_folders_without_the_hash_of_the_tokenizers_file(folder, hub, client, tmp_path):
    """As older versions wrote them."""
    old = shutil.copytree(folder, tmp_path / "old")
    config = json.loads((old / "config.json").read_text())
    assert config["tokenizer"].pop("file_sha256") == sha256(old / "tokenizer/tokenizer.safetensors")
    (old / "config.json").write_text(json.dumps(config))
    flip_decoder(old)  # not noticed, as before
    assert client("push", old, "owner/old", "--yes", HF_TOKEN="hf_tester").returncode == 0
    done = client("convert", "hf://owner/old", "--to", "hf", "--out", tmp_path / "new")
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "new/config.json").read_text())
    assert config["tokenizer"]["file_sha256"] == sha256(old / "tokenizer/tokenizer.safetensors")


def test_what_needs_no_weights_is_checked_before_they_are_fetched(folder, hub, client, tmp_path):
    hub.commit("owner/tiny", files_of(folder))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("x")
    (tmp_path / "bad.json").write_text("{}")
    hf = ("--to", "hf", "--out", tmp_path / "new")
    for words, said in (
        (("--to", "safetensors", "--out", "/etc/passwd/x"), "/etc/passwd is not a folder"),
        (("--to", "safetensors", "--out", tmp_path / "bad.json"), "exists: choose another path, or pass --force"),
        (("--to", "hf", "--out", tmp_path / "full"), "pass --force"),
        (("--to", "checkpoint", "--data", "2", "--out", tmp_path / "c"), "hf://owner/tiny@main has weights only"),
        ((*hf, "--license", "no licence"), "identifier of the Hub"),
        ((*hf, "--scores", tmp_path / "bad.json"), "scores is missing"),
        ((*hf, "--weights", "student"), "hf://owner/tiny@main has only one set of weights"),
        ((*hf, "--tokenizer", tmp_path / "none.safetensors"), "does not exist"),
        ((*hf, "--image-size", "16"), "leave it out for hf://owner/tiny@main"),
        (("--to", "hf"), "--out is missing"),
    ):
        done = client("convert", "hf://owner/tiny@main", *words)
        assert done.returncode == 2 and said in " ".join(done.stderr.split()), done.stderr
    assert not hub.requests and sorted(p.name for p in tmp_path.iterdir()) == ["bad.json", "full"]


def test_verify_compares_the_hashes_of_a_folder(folder, hub, client, tmp_path):
    """Where it is, and as it was fetched."""

    def verified(source: object) -> tuple[int, str]:
        done = client("convert", "--inspect", "--verify", source)
        return done.returncode, " ".join(done.stdout.split())

    hub.commit("owner/good", files_of(folder))
    for source in (folder, "hf://owner/good"):
        status, text = verified(source)
        assert status == 0 and "complete: SHA-256 matches (weights and tokenizer)" in text
    bad = shutil.copytree(folder, tmp_path / "bad")
    data = bytearray((bad / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (bad / "model.safetensors").write_bytes(data)
    hub.commit("owner/bad", files_of(bad))
    for source in (bad, "hf://owner/bad"):
        status, text = verified(source)
        assert status == 1 and "model.safetensors is damaged: its size or SHA-256" in text and "complete" not in text
        assert client("convert", "--inspect", source).returncode == 0
        done = client("convert", source, "--to", "safetensors", "--out", tmp_path / "w.safetensors")
        assert done.returncode == 2 and "model.safetensors is damaged" in done.stderr
        assert not (tmp_path / "w.safetensors").exists()
    flip_decoder(bad)
    status, text = verified(bad)
    assert status == 1 and text.count(" is damaged") == 2 and "tokenizer/tokenizer.safetensors is damaged" in text
    (bad / "tokenizer/tokenizer.safetensors").unlink()
    status, text = verified(bad)
    assert status == 1 and "tokenizer/tokenizer.safetensors does not exist, although config.json names" in text


def test_tokenizer_arguments_take_the_folder_and_the_repository(folder, hub, client, world, tmp_path):
    hub.commit("owner/tiny", files_of(folder))
    source, file = "hf://owner/tiny@main", folder / "tokenizer/tokenizer.safetensors"
    made = []
    for name, tokenizer in (("a", source), ("b", folder), ("c", file)):
        words = ["pretokenize", world.pictures, "--subset", "train", "--tokenizer", tokenizer, "--out", tmp_path / name]
        done = client(*words, "--shard-size", "64")
        assert done.returncode == 0, done.stderr
        made.append(json.loads((tmp_path / name / "manifest.json").read_text())["tokenizer_sha256"])
    assert set(made) == {tokenizer_hash(world.tokenizer)}
    assert hub.fetched() == {"config.json", "tokenizer/tokenizer.safetensors"}  # no weights
    weights, out = folder / "model.safetensors", tmp_path / "w.safetensors"
    done = client("convert", weights, "--to", "safetensors", "--out", out, "--tokenizer", source)
    assert done.returncode == 0, done.stderr
    assert client("sample", out, "--tokenizer", folder, "--per-class", "1", "--out", tmp_path / "g.png").returncode == 0
    words = ["evaluate", "--tokenizer", source, "--real", world.pictures, "--real-subset", "val"]
    done = client(*words, "--out", tmp_path / "scores.json", "--kid-size", "2")
    assert done.returncode == 0, done.stderr


def test_where_only_a_file_is_taken_the_message_names_it(folder, hub, client, world, tmp_path):
    file = folder / "tokenizer/tokenizer.safetensors"
    for tokenizer, said in (
        (folder, f"data.tokenizer={folder} is a folder: name {file}"),
        (tmp_path, f"data.tokenizer={tmp_path} is a folder: name a tokenizer .safetensors file"),
        ("hf://owner/tiny@v1", "data.tokenizer=hf://owner/tiny@v1 is not a file: run megastar convert"),
    ):
        config = world.write_config(tmp_path / "run.yaml", tmp_path / "run", steps=1, val_every=0)
        done = client("train", config, f"data.tokenizer={tokenizer}")
        assert done.returncode == 2 and said in " ".join(done.stderr.split()), done.stderr
    done = client(
        "train-tokenizer",
        f"init={folder}",
        f"pictures={world.pictures}",
        "subset=train",
        "continuous_steps=0",
        "batch=4",
        f"out={tmp_path / 't'}",
    )
    assert done.returncode == 2 and f"is a folder: name {file}" in " ".join(done.stderr.split()), done.stderr
