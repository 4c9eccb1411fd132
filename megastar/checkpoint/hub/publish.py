"""`megastar push`: publish a folder in the Hub's layout. Nothing else in the folder is sent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megastar.checkpoint.find_tokenizer import SHORT, identity_of
from megastar.checkpoint.hub import layout
from megastar.checkpoint.hub.download import REPOSITORY, REVISION, library, reason_of
from megastar.checkpoint.hub.reader import check_undamaged, read_folder, tokenizer_in
from megastar.errors import UserError


@dataclass(frozen=True)
class Publication:
    """The files of ``folder`` that are published, with their sizes."""

    folder: Path
    files: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.files.values())


def check_repository(name: str, revision: str | None = None) -> None:
    """Raise ``UserError`` for a name that is no owner/name."""
    if not REPOSITORY.fullmatch(name) or ".." in name:
        raise UserError(f"{name[:200]} is not the name of a repository: give owner/name")
    if revision is not None and not REVISION.fullmatch(revision):
        raise UserError(f"--revision {revision[:200]} is not the name of a branch")


def prepare(folder: Path) -> Publication:
    """The content of a complete folder. Raises ``UserError`` for a damaged one, or a tokenizer of other weights."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: name one that megastar convert --to hf wrote")
    _, provenance, _ = read_folder(folder)
    check_undamaged(folder, "convert it again")
    tokenizer = tokenizer_in(folder)
    if tokenizer is None:
        raise UserError(f"{folder} has no tokenizer: write it again with megastar convert --to hf")
    if (found := identity_of(tokenizer)) != provenance.get("tokenizer"):
        raise UserError(
            f"{tokenizer} has the hash {found[:SHORT]}, but {layout.CONFIG} records {str(provenance.get('tokenizer'))[:SHORT]}: "
            "convert the weights again"
        )
    names = [layout.CONFIG, *layout.read_config(folder)["weights"], layout.INDEX, layout.PREPROCESSOR, layout.CARD]
    names += [f"{layout.TOKENIZER}/{name}" for name in (layout.CONFIG, layout.TOKENIZER_FILE)]
    return Publication(folder, {n: (folder / n).stat().st_size for n in names if (folder / n).is_file()})


def is_private(repository: str) -> bool | None:
    """Whether ``repository`` is private; None if it does not exist or the token may not see it. Raises ``UserError``."""
    hub = library()
    try:
        return bool(hub.HfApi(library_name="megastar").repo_info(repository, repo_type="model").private)
    except hub.errors.RepositoryNotFoundError:
        return None
    except Exception as error:  # those of httpx, of its Xet client and of the disk have no common base
        raise _failed(repository, error) from error


def check_private(repository: str, found: bool | None) -> None:
    """Raise ``UserError`` unless ``found``, of ``is_private``, is True."""
    if not found:
        raise UserError(
            f"{repository} is not private, and --private applies only to a repository that is created: nothing was published; make it "
            "private in its settings on the Hub, name another repository, or leave out --private"
        )


def publish(what: Publication, repository: str, *, private: bool = False, revision: str | None = None) -> str:
    """Create ``repository`` where it does not exist, and commit the files; the address. Raises ``UserError``, before any
    commit if it has to be ``private`` and is not."""
    hub = library()
    api = hub.HfApi(library_name="megastar")
    try:
        api.create_repo(repository, repo_type="model", private=private, exist_ok=True)
        if private:  # which the Hub ignores for a repository that exists
            check_private(repository, is_private(repository))
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        files = [
            hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(what.folder / name)) for name in what.files
        ]
        message = "Weights written by megastar convert --to hf"
        done = api.create_commit(repository, files, commit_message=message, revision=revision)
    except UserError:
        raise
    except Exception as error:  # as in is_private
        raise _failed(repository, error) from error
    return str(getattr(done, "commit_url", "") or repository)


def _failed(repository: str, error: Exception) -> UserError:
    return UserError(
        f"{repository} could not be published ({reason_of(error)}): check HF_TOKEN (it needs write access), the network and "
        "HF_ENDPOINT if it is set, and run the same command again"
    )
