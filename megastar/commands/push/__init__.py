"""``megastar push``: publish a folder of ``convert --to hf`` on the Hugging Face Hub."""

from __future__ import annotations

import sys
from pathlib import Path

from megastar.commands._shared.common import Parser
from megastar.errors import UserError

EXAMPLES = """
megastar push demo-hf owner/name                  shows the files and asks
megastar push demo-hf owner/name --private --yes  without a question, for scripts
megastar convert runs/demo/run --to hf --out demo-hf --license apache-2.0      writes such a folder
Log in with hf auth login, or set HF_TOKEN. See docs/hub.md.
"""


def parser() -> Parser:
    p = Parser(
        "push",
        "Publish a folder of megastar convert --to hf on the Hugging Face Hub. The weights and the tokenizer are checked "
        "first; other files in the folder are not sent.",
        EXAMPLES,
    )
    p.add_argument("folder", type=Path, metavar="DIR", help="folder of megastar convert --to hf")
    p.add_argument("repository", metavar="OWNER/NAME", help="repository; created if it does not exist")
    p.add_argument(
        "--private", action="store_true", help="create a private repository; a public one that exists is refused"
    )
    p.add_argument("--revision", help="branch to commit to, created if it does not exist (default: main)")
    p.add_argument("--yes", action="store_true", help="publish without asking")
    return p


def agreed(question: str) -> bool:
    """Whether the answer that is typed is yes; the end of the input (Ctrl-D) is no."""
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        print()
        return False


def main(words: list[str]) -> int:
    a = parser().parse(words)
    from megastar.checkpoint.hub.download import library
    from megastar.checkpoint.hub.publish import check_private, check_repository, is_private, prepare, publish
    from megastar.utils.logs import shared_console

    check_repository(a.repository, a.revision)
    hub = library()
    if not a.yes and not (sys.stdin and sys.stdin.isatty()):  # None where it is closed
        raise UserError("megastar push asks before it publishes, and there is no terminal: pass --yes")
    what = prepare(a.folder)
    console = shared_console()
    for name, size in what.files.items():
        console.print(f"{size / 1e6:10.2f} MB  {name}", markup=False, highlight=False)
    if not a.yes:
        found = is_private(a.repository)
        if a.private and found is not None:
            check_private(a.repository, found)
        kind = "an existing" if found is not None else "a new"
        private = a.private if found is None else found
        visible = (
            f"{kind} {'private' if private else 'public'} repository{'' if private else ': everyone can download it'}"
        )
        where = f"{a.repository} at {hub.constants.ENDPOINT}"
        console.print(f"{what.total / 1e6:.1f} MB to {where}, {visible}", markup=False, highlight=False)
        if not agreed("publish? [y/N] "):
            console.print("nothing was published")
            return 1
    address = publish(what, a.repository, private=a.private, revision=a.revision)
    console.print(f"published: {address}", markup=False, highlight=False, soft_wrap=True)
    return 0
