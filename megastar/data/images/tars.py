"""Images in tars, located by the tar headers. Nothing is unpacked; a tar within a tar is read in place."""

from __future__ import annotations

import os
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from megastar.data.images.companions import Companions, key_and_suffix
from megastar.data.images.findings import Findings
from megastar.data.images.hidden import in_hidden
from megastar.data.images.listing import ListingBuilder, Stamp, is_image, text
from megastar.data.storage.s3_client import S3Folder
from megastar.errors import UserError
from megastar.utils.json_file import shown

_AHEAD = 8 << 20  # bytes of one read from S3 while listing
_MOST_AT_ONCE = 8 << 20  # bytes of an extended header
_COUNTED = 1000  # images between reports
_THREADS = 8  # tars that are listed at once

Report = Callable[[int], None]  # called with the number of images found so far
Count = Callable[[str, int], None]  # called with a tar and the number of images found in it so far
Read = Callable[[int, int], bytes]
Member = tuple[bytes, int, int, str | None]  # name, offset, size, class from a companion


class RemoteTars:
    """Tars below s3://bucket/prefix, or one tar. Reads are pinned to the ETags of the listing."""

    def __init__(self, url: str):
        self.url, parent, last = url.rstrip("/"), *url.rstrip("/").rpartition("/")[::2]
        self.only = last if last.endswith(".tar") else ""
        self.s3 = S3Folder(parent if self.only else url)
        self.etags: dict[str, str] = {}

    def stamps(self, notes: Findings | None = None) -> list[Stamp]:
        """Name, size and ETag of the tars; hidden ones are counted in ``notes``."""
        tars = [(n, s, e) for n, s, e in self.s3.list() if n.endswith(".tar") and (not self.only or n == self.only)]
        hidden = {name for name, _, _ in tars if in_hidden(os.fsencode(name))}
        if notes is not None and hidden:
            notes.count("hidden", min(hidden), len(hidden))
        return [[name, size, etag] for name, size, etag in tars if name not in hidden]

    def pin(self, stamps: Sequence[Stamp]) -> None:
        self.etags = {name: etag for name, _, etag in stamps}

    def read(self, name: str, start: int, end: int) -> bytes:
        """Bytes of a tar, through outages. Raises ``UserError``, also for a tar that has changed."""
        return self.s3.read(name, start, end, self.etags[name])


class LocalTar:
    def __init__(self, path: Path, root: Path):
        self.path, self.where = path, str(path)
        self.name, self.size = path.relative_to(root).as_posix(), path.stat().st_size

    @contextmanager
    def reader(self) -> Iterator[Read]:
        with self.path.open("rb") as f:
            yield lambda start, end: os.pread(f.fileno(), end - start, start)


class RemoteTar:
    def __init__(self, remote: RemoteTars, name: str, size: int):
        self.remote, self.name, self.size = remote, name, size
        self.where = remote.s3.url_of(name)

    @contextmanager
    def reader(self) -> Iterator[Read]:
        """Reads everything in large parts: skipping images between headers would take more requests."""
        at, data = 0, b""

        def read(start: int, end: int) -> bytes:
            nonlocal at, data
            end = min(end, self.size)
            if not at <= start <= end <= at + len(data):
                last = min(self.size, max(end, start + _AHEAD))
                at, data = start, self.remote.read(self.name, start, last) if last > start else b""
            return data[start - at : end - at]

        yield read


class _Part:
    """Bytes ``start`` to ``start + size`` of a tar, as a file for tarfile."""

    def __init__(self, read: Read, start: int, size: int):
        self._read, self._start, self._size, self._at = read, start, size, 0

    def read(self, n: int = -1) -> bytes:
        if not 0 <= n <= _MOST_AT_ONCE:  # tarfile reads whole extended headers, of the size that the tar gives
            raise tarfile.ReadError(f"an extended header of {n} bytes")
        end = min(self._size, self._at + n)
        data = self._read(self._start + self._at, self._start + end) if end > self._at else b""
        self._at += len(data)
        return data

    def seek(self, at: int, whence: int = os.SEEK_SET) -> int:
        self._at = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence] + at
        return self._at

    def tell(self) -> int:
        return self._at


def add_tars(found: ListingBuilder, tars: Sequence[LocalTar | RemoteTar], report: Report) -> None:
    found.files.extend(tar.name for tar in tars)
    label_field = found.findings.label_field
    pool, lock = ThreadPoolExecutor(_THREADS), threading.Lock()
    scanned: dict[str, int] = {}  # images of the tars that are being listed

    def count(where: str, images: int) -> None:
        with lock:
            scanned[where] = images
            total = len(found.keys) + sum(scanned.values())
        report(total)

    def add(part: _Found, number: int) -> None:
        with lock:
            del scanned[part.where]
        for name, offset, size, value in part.members:
            found.add(name, number, offset, size, value)
        found.findings.add(part.findings)
        report(len(found.keys))

    try:
        scan = partial(_whole, label_field=label_field, count=count)
        for number, (tar, part) in enumerate(zip(tars, pool.map(scan, tars), strict=True)):
            add(part, number)
            within = partial(_within, tar, label_field=label_field, count=count)
            for inner in pool.map(within, part.inner):  # a tar of tars
                add(inner, number)
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass
class _Found:
    """Images and tars in a tar."""

    where: str
    members: Iterable[Member]
    inner: list[tuple[bytes, int, int]]  # name, offset, size
    findings: Findings


def _whole(tar: LocalTar | RemoteTar, label_field: str, count: Count) -> _Found:
    stem = os.fsencode(str(PurePosixPath(tar.name).with_suffix("")))
    return _scan(tar, tar.where, 0, tar.size, stem, label_field, count)


def _within(tar: LocalTar | RemoteTar, inner: tuple[bytes, int, int], label_field: str, count: Count) -> _Found:
    name, offset, size = inner
    return _scan(tar, f"{tar.where}:{text(name)}", offset, size, name[: -len(b".tar")], label_field, count)


def _first_bytes(read: Read, at: int, n: int) -> bytes:
    return read(at, at + n)


def _scan(
    tar: LocalTar | RemoteTar, where: str, start: int, size: int, stem: bytes, label_field: str, count: Count
) -> _Found:
    """List the tar at byte ``start``. ``stem`` is the folder of images in its root if none has a folder or companion."""
    found: dict[bytes, tuple[int, int]] = {}  # a member replaces an earlier one of its name, as when tar extracts it
    inner: dict[bytes, tuple[int, int]] = {}
    companions, notes = Companions(label_field), Findings()
    count(where, 0)
    try:
        # typeshed requires more methods of the file than tarfile uses
        with tar.reader() as read, tarfile.open(fileobj=_Part(read, start, size), mode="r:") as archive:  # type: ignore[call-overload]
            at = 0
            while (member := archive.next()) is not None:
                archive.members.clear()  # a million members take a gigabyte
                if not at < archive.offset or member.size < 0:  # older versions of tarfile would loop endlessly
                    raise tarfile.ReadError(f"the size {member.size} of {text(os.fsencode(member.name))}")
                at = archive.offset
                if not member.isreg() or member.issparse():
                    continue
                name = os.fsencode(member.name).removeprefix(b"./")
                if in_hidden(name):
                    notes.count("hidden", f"{text(name)}")
                    continue
                data_at = start + member.offset_data
                kind = found if is_image(name) else inner if name.lower().endswith(b".tar") else None
                if kind is None:
                    if companions.knows(name):
                        reader = partial(_first_bytes, read, data_at)
                        companions.add(name, f"{where}:{text(name)}", member.size, reader)
                    continue
                if name in kind:
                    notes.count("replaced", f"{text(name)}")
                kind[name] = (data_at, member.size)
                if kind is found and len(found) % _COUNTED == 0:
                    count(where, len(found))
            end = archive.offset
            # tarfile ends silently at a broken header or a truncation
            if end + 512 > size or read(start + end, start + end + 512) != bytes(512):
                raise UserError(
                    f"{where} is broken or truncated at byte {end}, after {len(found)} images: copy it again"
                )
    except UserError:
        raise
    except Exception as error:  # tarfile raises a dozen types for broken headers
        raise UserError(f"{where} is not a readable tar ({shown(str(error))}): make or copy it again") from error
    keys = {name: key_and_suffix(name)[0] for name in found}
    value_of = companions.close(Counter(keys.values()), notes)
    bare = bool(found) and not notes.label_from and not any(b"/" in name for name in found)
    if bare:
        notes.tar_names.append(text(stem))
    prefix = stem + b"/" if bare else b""
    members = ((prefix + name, offset, size, value_of(keys[name])) for name, (offset, size) in found.items())
    return _Found(where, members, [(name, *place) for name, place in inner.items()], notes)
