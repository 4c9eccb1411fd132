"""Every command of the README parses, and every file that it links is there."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from megastar.cli import COMMANDS
from megastar.commands._common import config_and_overrides
from megastar.config.load import load_config, load_tokenizer_config

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README, re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("megastar ")]


@pytest.mark.parametrize("line", commands())
def test_a_command_of_the_readme_parses(line):
    words = shlex.split(line, comments=True)[1:]
    module = importlib.import_module(f"megastar.commands.{COMMANDS[words[0]][0]}")
    action = [words.pop(1)] if words[0] == "data" else []
    args = module.parser(*action).parse_intermixed_args(words[1:])
    if words[0] in ("train", "train-tokenizer"):
        path, overrides = config_and_overrides(args.items)
        cfg = (load_config if words[0] == "train" else load_tokenizer_config)(path, overrides)
        if words[0] == "train-tokenizer":
            assert cfg.pictures == "photos"
        elif "demo" in path:
            assert cfg.model.num_classes == 3


def test_the_readme_links_to_files_that_exist():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
