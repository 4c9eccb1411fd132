"""Commands in the README and the quickstart parse, links resolve, the index lists every page, the citation has our version."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
import yaml

from megastar.cli import COMMANDS
from megastar.commands._shared.common import config_and_overrides
from megastar.config.load import load_config, load_tokenizer_config
from megastar.version import __version__

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md")), *DOCS]
FENCE = re.compile(r"^```.*?^```$", re.S | re.M)


def commands() -> list[str]:
    text = "\n".join(page.read_text() for page in (README, ROOT / "docs" / "getting_started.md"))
    blocks = re.findall(r"```sh\n(.*?)```", text, re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return list(dict.fromkeys(line for line in lines if line.startswith("megastar ")))


@pytest.mark.parametrize("line", commands())
def test_a_documented_command_parses(line):
    words = shlex.split(line, comments=True)[1:]
    module = importlib.import_module(f"megastar.commands.{COMMANDS[words[0]][0]}")
    action = [words.pop(1)] if words[0] == "data" else []
    args = module.parser(*action).parse_intermixed_args(words[1:])
    if words[0] in ("train", "train-tokenizer"):
        path, overrides = config_and_overrides(args.items)
        cfg = (load_config if words[0] == "train" else load_tokenizer_config)(path, overrides)
        if words[0] == "train-tokenizer":
            assert cfg.pictures == "photos"
        elif "run=runs/mine" in overrides:
            assert "num_classes" in cfg.model.unset  # taken from the shards


def test_the_readme_has_at_most_200_lines():
    assert len(README.read_text().splitlines()) <= 200


def test_batch_scripts_of_the_documentation_exist():
    scripts = re.findall(r"\bslurm/\w+\.sh", "".join(page.read_text() for page in PAGES))
    assert scripts
    assert sorted({script for script in scripts if not (ROOT / script).is_file()}) == []


def anchors(page: Path) -> set[str]:
    """The fragments of a page's headings, as GitHub forms them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page):
    links = re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text()))
    broken = []
    for link in links:
        path, _, fragment = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if "://" not in link and not (target.exists() and (not fragment or fragment in anchors(target))):
            broken.append(link)
    assert broken == []


def test_the_index_lists_every_page_once():
    text = (ROOT / "docs" / "README.md").read_text()
    listed = re.findall(r"^\d+\. \[([\w.]+)\]\(\1\)", text, re.M)
    assert sorted(listed) == sorted(page.name for page in DOCS if page.name != "README.md")
    assert re.findall(r"^(\d+)\. ", text, re.M) == [str(i + 1) for i in range(len(listed))]


def test_the_readme_names_every_package():
    packages = {p.parent.name for p in (ROOT / "megastar").glob("*/__init__.py")}
    tree = re.search(r"^megastar/\n((?:  .*\n)+)", README.read_text(), re.M)
    assert tree
    assert packages <= set(re.findall(r"^  (\w+)/ ", tree[1], re.M))


def test_the_citation_and_the_changelog_have_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"title", "message", "authors"} <= citation.keys()
    assert all({"type", "title", "authors"} <= reference.keys() for reference in citation["references"])
    assert citation["version"] == __version__
    newest = re.search(r"^## \[(\S+)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest and newest.groups() == (__version__, citation["date-released"])
