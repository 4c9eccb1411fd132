"""``hf://owner/name[@revision]``: fetch the files of a folder in the Hub's layout into huggingface_hub's cache.

Only the files that config.json names are fetched, none that is executed or unpickled. HF_HOME, HF_ENDPOINT, HF_TOKEN and
HF_HUB_OFFLINE are those of huggingface_hub.
"""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Callable
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megastar.checkpoint.hub.layout import CONFIG, INDEX, TOKENIZER, TOKENIZER_FILE, is_hub_folder, read_config
from megastar.errors import UserError
from megastar.utils.files import sha256

SCHEME = "hf://"
REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
logger = logging.getLogger(__name__)


def is_hub_source(source: object) -> bool:
    """Whether ``source`` is an address hf://..., well formed or not."""
    return isinstance(source, str) and source.lower().startswith(SCHEME)


def local_source(source: str | Path) -> Path:
    """The path ``source``, or the local folder of a hf:// source, which is fetched. Raises ``UserError``."""
    return fetch_folder(source) if isinstance(source, str) and is_hub_source(source) else Path(source)


def parse_source(source: str) -> tuple[str, str]:
    """owner/name and revision ("" for the default branch). Raises ``UserError``."""
    repository, mark, revision = source[len(SCHEME) :].partition("@")
    good = REPOSITORY.fullmatch(repository) and ".." not in source
    if not good or (mark and not REVISION.fullmatch(revision)):
        raise UserError(
            f"{source[:200]} is not a repository of the Hub: give hf://owner/name or hf://owner/name@revision"
        )
    return repository, revision


def library() -> Any:
    """The module huggingface_hub. Raises ``UserError`` if it is not installed."""
    if find_spec("huggingface_hub") is None:
        raise UserError("hf:// sources and megastar push need huggingface_hub: run pip install 'megastar[hub]'")
    for name in ("constants", "errors"):  # the package imports its modules on demand only
        importlib.import_module(f"huggingface_hub.{name}")
    return importlib.import_module("huggingface_hub")


@lru_cache(maxsize=64)
def fetch_folder(source: str) -> Path:
    """The local folder of the snapshot that ``source`` names, with the files that are needed: once in a process, so that
    all of its parts read the same commit. Raises ``UserError``."""
    repository, revision = parse_source(source)
    hub = library()
    get = partial(_fetch, hub, source, repository)
    folder = Path(get(CONFIG, revision or None)).parent
    content = read_config(folder, source)
    commit = folder.name  # the other files are of the same commit, whatever the branch does meanwhile
    names = list(content["weights"])
    for name in [*([INDEX] if len(names) > 1 else []), *names]:
        get(name, commit)
    if content.get("tokenizer"):
        _fetch_tokenizer(get, source, commit, content)
    logger.info("%s: %s", source, folder)
    return folder


@lru_cache(maxsize=64)
def fetch_tokenizer(source: str) -> Path:
    """The tokenizer's file of a hf:// source, without the weights. Raises ``UserError``."""
    repository, revision = parse_source(source)
    get = partial(_fetch, library(), source, repository)
    config = Path(get(CONFIG, revision or None))
    content = read_config(config.parent, source)
    if not content.get("tokenizer"):
        raise _no_tokenizer(source)
    return _fetch_tokenizer(get, source, config.parent.name, content)


def _fetch_tokenizer(get: Callable[[str, str], str], source: str, commit: str, content: dict[str, Any]) -> Path:
    file = Path(get(f"{TOKENIZER}/{TOKENIZER_FILE}", commit))
    if content["tokenizer"].get("file_sha256", whole := sha256(file)) != whole:
        raise UserError(
            f"{source}: {file} is damaged: its SHA-256 differs from {CONFIG}'s; remove it to fetch it again; if it "
            "is still damaged, name another revision"
        )
    return file


def local_tokenizer(source: str | Path) -> str:
    """The path of the tokenizer's file that an argument names: of hf://owner/name the one that is fetched, of a folder in
    the Hub's layout the one in it; any other path is returned as it is. Raises ``UserError``."""
    if isinstance(source, str) and is_hub_source(source):
        return str(fetch_tokenizer(source))
    if not is_hub_folder(Path(source)):
        return str(source)
    file = Path(source) / TOKENIZER / TOKENIZER_FILE
    recorded = read_config(Path(source)).get("tokenizer", {}).get("file_sha256")
    if not file.is_file():
        raise _no_tokenizer(source)
    if recorded is not None and sha256(file) != recorded:
        raise UserError(f"{file} is damaged: its SHA-256 differs from {CONFIG}'s; copy or download the folder again")
    return str(file)


def _no_tokenizer(source: object) -> UserError:
    return UserError(
        f"{source} has no tokenizer: name the file of one, or a folder that megastar convert --to hf wrote"
    )


def _fetch(hub: Any, source: str, repository: str, name: str, revision: str | None) -> str:
    errors = hub.errors
    at = f"revision {revision} of {repository}" if revision else repository
    try:
        path: str = hub.hf_hub_download(repository, name, revision=revision)
        return path
    except errors.GatedRepoError as error:
        problem = f"{repository} is gated: accept its terms on the Hub, and set HF_TOKEN"
        raise UserError(f"{source}: {problem}") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(
            f"{source}: {repository} has no revision {revision}: name a branch, a tag or a commit of it"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{source}: the Hub has no public model {repository}: correct the name, or set HF_TOKEN for a private one"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"{source}: {name} is not in the local cache and the Hub cannot be reached ({reason_of(error.__cause__ or error)}): "
            "fetch it once on a machine with access, or name a local folder"
        ) from error
    except errors.EntryNotFoundError as error:
        raise UserError(
            f"{source}: {at} has no {name}: it is not a folder that megastar convert --to hf wrote"
        ) from error
    except (errors.HFValidationError, ValueError) as error:
        raise UserError(f"{source}: {reason_of(error)}: correct the name") from error
    except Exception as error:  # those of httpx, of its Xet client and of the disk have no common base
        raise UserError(
            f"{source}: {name} could not be fetched ({reason_of(error)}): check the network, the proxy and HF_ENDPOINT if "
            "they are set, and try again, or name a local folder"
        ) from error


def reason_of(error: BaseException) -> str:
    """The message of ``error`` in one line, or its type where it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__
