"""The consoles of the package. They print strings as data: no markup, no highlighting, no control characters."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from megastar.utils.printable import printable

_INNER_LINE = re.compile(r"(?<=[^\n])\n(?=[^\n ])")  # a further line that is not indented


class PlainConsole(Console):
    """Prints strings as they are: ``[red]`` is text, not a style; styles come with ``Text`` and ``style=``.

    Control characters are printed as escapes, in every renderable, and so are characters that the stream's encoding
    lacks. A newline in a string passed to ``print`` is escaped unless the next line is indented: print a ``Text``
    where several lines are meant.
    """

    def __init__(self, **options: Any):
        super().__init__(**{"markup": False, "highlight": False, "emoji": False} | options)

    def print(self, *objects: Any, **options: Any) -> None:
        """``rich``'s ``print`` for data."""
        super().print(*(_INNER_LINE.sub(r"\\n", o) if isinstance(o, str) else o for o in objects), **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """A string as ``Text``, escaped here so that tables measure the escapes."""
        return super().render_str(printable(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        encoding = self.encoding
        for segment in super().render(renderable, options):
            text, style, control = segment
            if not control:
                shown = printable(text)
                if not shown.isascii() and not encoding.startswith("utf"):
                    shown = shown.encode(encoding, "backslashreplace").decode(encoding)
                segment = segment if shown == text else Segment(shown, style)
            yield segment
