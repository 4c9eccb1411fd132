"""Completion of commands, options and fields in a shell, by argcomplete (optional): docs/command_line.md."""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

VARIABLE = "_ARGCOMPLETE"  # set by the shell function that argcomplete installs
RUN = ("schema", "RunConfig")
FIELDS = {  # command -> module of megastar.config and class of its configuration
    **dict.fromkeys(("train", "demo", "elastic", "plan"), RUN),
    "train-tokenizer": ("schema", "TokenizerTrainConfig"),
    "compare": ("comparison", "CompareConfig"),
}


def complete(commands: Mapping[str, tuple[str, str]]) -> None:
    """Print the completions of the shell's line and exit; returns if argcomplete is not installed."""
    try:
        import argcomplete
    except ImportError:
        return
    line = os.environ.get("COMP_LINE", "").split()
    argcomplete.autocomplete(parser_of(commands, line[1] if len(line) > 1 else ""), always_complete_options="long")


def parser_of(commands: Mapping[str, tuple[str, str]], typed: str) -> argparse.ArgumentParser:
    """All commands, and the options of the command ``typed``; the modules of other commands are not imported."""
    whole = argparse.ArgumentParser("megastar", allow_abbrev=False)
    whole.add_argument("-V", "--version", action="store_true")
    below = whole.add_subparsers()
    for name, (module_name, help) in commands.items():
        if name != typed:
            below.add_parser(name, help=help)
            continue
        module = importlib.import_module(f"megastar.commands.{module_name}")
        if name == "data":
            actions = below.add_parser(name, help=help).add_subparsers()
            for action, what in module.ACTIONS.items():
                actions.add_parser(action, help=what, parents=[module.parser(action)], add_help=False)
            continue
        own = module.parser()
        for action in own._actions:
            if action.dest == "items" and name in FIELDS:
                action.completer = overrides(*FIELDS[name])
        below.add_parser(name, help=help, parents=[own], add_help=False)
    return whole


def overrides(module: str, schema: str) -> Callable[..., Iterable[str]]:
    """Completes the fields of a configuration, the choices of a field that has some, and files."""

    def complete_item(prefix: str, **more: Any) -> list[str]:
        import argcomplete

        from megastar.config.override import choices_of, names_of

        config = getattr(importlib.import_module(f"megastar.config.{module}"), schema)
        name, equals, typed = prefix.partition("=")
        if equals and "/" not in name:
            found = [f"{name}={choice}" for choice in choices_of(config, name) if choice.startswith(typed)]
            files = argcomplete.completers.FilesCompleter()
            return found or [f"{name}={path}" for path in files(typed)]
        fields = [f"{field}=" for field in names_of(config) if field.startswith(prefix)]
        return [*fields, *argcomplete.completers.FilesCompleter()(prefix)]

    return complete_item
