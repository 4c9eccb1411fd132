"""Which tokenizer belongs to weights: its identity, and where its file is.

The identity is ``tokenizer_hash``, the SHA-256 of encoder and codebook: token shards, checkpoints and weights files record
it. A decoder that was trained further, or a file in another place, keeps it.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from megastar.config.files import find_file
from megastar.errors import UserError
from megastar.tokenizer.io import FORMAT, tokenizer_hash
from megastar.utils.launcher import place_of
from megastar.utils.weights.safetensors_header import read_header

logger = logging.getLogger(__name__)
SHIPPED_TOKENIZER = "assets/tokenizer/emoji64-vq.safetensors"
MOST = 32  # files of a folder that are searched for a tokenizer
SHORT = 12  # digits of a hash in a message


def recorded_identity(provenance: Mapping[str, Any]) -> str:
    """The tokenizer's hash in the provenance of weights or a checkpoint's manifest; empty if there is none."""
    value = provenance.get("tokenizer")
    return value if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else ""


def identity_of(tokenizer: str | Path) -> str:
    """``tokenizer_hash``, computed once for each content of a file. Raises ``UserError``."""
    path = os.path.realpath(tokenizer)
    if not os.path.isfile(path):
        return tokenizer_hash(tokenizer)  # raises
    status = os.stat(path)
    return _identity(path, status.st_mtime_ns, status.st_size, status.st_ino)


@lru_cache(maxsize=64)
def _identity(path: str, *version: int) -> str:
    return tokenizer_hash(path)


def check_identity(what: object, identity: str, tokenizer: str | Path, any_tokenizer: bool = False) -> None:
    """Raise ``UserError`` if ``tokenizer`` is not the one whose codes ``what`` was trained on.

    Where no hash is recorded, or the difference is allowed, a warning says so.
    """
    main = place_of(os.environ).rank == 0  # it reports for all
    if not identity:
        if main:
            logger.warning("%s records no tokenizer hash: that %s made its codes cannot be checked", what, tokenizer)
    elif (found := identity_of(tokenizer)) != identity:
        sentence = f"{what} was trained on codes of the tokenizer {identity[:SHORT]}, but {tokenizer} has the hash {found[:SHORT]}"
        if not any_tokenizer:
            raise UserError(
                f"{sentence}: name the tokenizer of the training with --tokenizer, or allow another one with --any-tokenizer"
            )
        if main:
            logger.warning("%s: decoded with it nevertheless", sentence)


def search_tokenizer(what: object, identity: str, named: Iterable[Path | None], folders: Iterable[Path]) -> Path:
    """The file with the hash ``identity``: one of ``named``, one in ``folders``, or the shipped tokenizer.

    Raises ``UserError`` that lists the files with other hashes.
    """
    others: dict[str, str] = {}
    tried: set[str] = set()
    for path in [*filter(None, named), *_tokenizers_in(folders), *filter(None, [find_file(SHIPPED_TOKENIZER)])]:
        if not os.path.isfile(path) or (real := os.path.realpath(path)) in tried:  # False also for an invalid name
            continue
        tried.add(real)
        try:
            found = identity_of(path)
        except UserError:  # it is damaged, or no tokenizer
            continue
        if found == identity:
            return Path(path)
        others[str(path)] = found[:SHORT]
    seen = "; ".join(f"{path} has {found}" for path, found in list(others.items())[:3])
    raise UserError(
        f"{what} was trained on codes of the tokenizer {identity[:SHORT]}, which is in none of the places that the run "
        f"names{' (' + seen + ')' if seen else ''}: give its file with --tokenizer"
    )


def _tokenizers_in(folders: Iterable[Path]) -> Iterable[Path]:
    for folder in folders:
        try:
            files = sorted(folder.glob("*.safetensors"))[:MOST]
        except OSError:
            continue
        for path in files:
            try:
                if read_header(path)[0].get("format") == FORMAT:
                    yield path
            except (UserError, OSError):
                continue
