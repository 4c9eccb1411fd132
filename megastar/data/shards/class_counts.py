"""Images per class of a set: counted from the indexes, and told in one line."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from megastar.data.shards.index import stored_labels
from megastar.data.shards.manifest import Manifest
from megastar.data.storage.store import Store
from megastar.utils.json_file import shown

NOT_RECORDED = "source not recorded"


def count_classes(store: Store, m: Manifest) -> list[int] | None:
    """Samples per class, by number, from the manifest or the stored indexes; None where one is missing or broken."""
    if m.class_counts:
        return m.class_counts
    if store.remote:  # an index is an object each
        return None
    counts = np.zeros(len(m.classes), np.int64)
    for info in m.shards:
        labels = stored_labels(store.index(info), info, m.layout, m.expected)
        if labels is None or (len(labels) and not 0 <= labels.min() <= labels.max() < len(counts)):
            return None
        counts += np.bincount(labels, minlength=len(counts))
    return [int(n) for n in counts]


def class_summary(store: Store, m: Manifest) -> str:
    """One line: the number of classes, where they are from, and the smallest and the largest one."""
    source = str(m.made_by.get("class_source", NOT_RECORDED))
    start = f"{len(m.classes)} class{'es' * (len(m.classes) != 1)} ({shown(source, 300)}): "
    counts = count_classes(store, m)
    if counts is None:
        return start + "images per class are not recorded, `megastar data stats` counts them"
    if len(counts) == 1:
        return start + _class(m, counts, 0)
    if min(counts) == max(counts):
        return f"{start}each with {counts[0]} image{'s' * (counts[0] != 1)}"
    smallest, largest = int(np.argmin(counts)), int(np.argmax(counts))
    line = f"{start}smallest {_class(m, counts, smallest)}, largest {_class(m, counts, largest)}"
    empty = counts.count(0)
    return line + (f"; {empty} classes have no images" if empty > 1 else "")


def _class(m: Manifest, counts: Sequence[int], number: int) -> str:
    return f"{shown(m.classes[number])!r} with {counts[number]} image{'s' * (counts[number] != 1)}"


def reasons_in_words(skipped: Sequence[dict[str, str]], most: int = 4) -> str:
    """The reasons of skipped images with their counts, the most frequent first: ``unreadable (2); ...``."""
    kinds: dict[str, list[str]] = {}
    for row in skipped:
        key, reason = str(row.get("picture", "")), str(row.get("reason", ""))
        reason = reason.removeprefix(f"{key}: ")
        kinds.setdefault(re.sub(r"\d+|\(.*", "", reason), []).append(reason)
    ordered = sorted(kinds.values(), key=len, reverse=True)
    words = [f"{shown(rows[0], 120)} ({len(rows)})" for rows in ordered[:most]]
    rest = sum(map(len, ordered[most:]))
    return "; ".join(words) + (f"; other reasons ({rest})" if rest else "")
