"""A node's memory, limits and disks, and its way to S3."""

from __future__ import annotations

import fcntl
import os
import resource
import secrets
import shutil
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from megastar.diagnosis.finding import FAILURE, OK, WARNING, Finding

GIB = 2**30
FILES = 1024  # open files that a process may have
SAMPLE = 64 << 20  # bytes that are written to a disk, read from S3
BLOCK = 4 << 20
SLOW_DISK = 50e6  # bytes a second
SLOW_S3 = 50e6
SLOW_NAMES = 0.5  # seconds
ROOM = 20 * GIB  # free space: a checkpoint of XL has about 12


def memory(meminfo: str | None = None) -> list[Finding]:
    """``meminfo``: the text of /proc/meminfo."""
    text = Path("/proc/meminfo").read_text() if meminfo is None else meminfo
    sizes = {line.partition(":")[0]: int(line.split()[1]) * 1024 for line in text.splitlines() if line.endswith("kB")}
    total, free = sizes["MemTotal"], sizes.get("MemAvailable", sizes.get("MemFree", 0))
    said = f"{total / GIB:.0f} GiB"
    if free < 4 * GIB or free < 0.1 * total:
        cure = "end what takes it (see top), or take another node"
        return [Finding("memory", WARNING, f"{said}, only {free / GIB:.1f} available", cure)]
    return [Finding("memory", OK, f"{said}, at least {10 * int(10 * free / total)} % available")]


def cores() -> list[Finding]:
    count, whole = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    return [Finding("cores", OK, f"{count}" + (f" of {whole}, the others are not this job's" if count < whole else ""))]


def shared_memory(folder: Path = Path("/dev/shm")) -> list[Finding]:
    """NCCL's and torch's processes of a node talk through it."""
    cure = "mount it larger (docker run --shm-size=16g, or a tmpfs on /dev/shm)"
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        return [Finding("shared memory", WARNING, f"{folder} cannot be asked ({error.strerror})", cure)]
    said = f"{folder} has {usage.total / GIB:.2g} GiB"
    if usage.free < 32 << 20:
        return [Finding("shared memory", FAILURE, f"{said}, {usage.free / 2**20:.0f} MiB of them free", cure)]
    if usage.free < GIB:
        return [Finding("shared memory", WARNING, f"{said}, {usage.free / 2**20:.0f} MiB of them free", cure)]
    return [Finding("shared memory", OK, said)]


def limits(
    files: int | None = None, locked: int | None = None, infiniband: Path = Path("/sys/class/infiniband")
) -> list[Finding]:
    """Open files, and locked memory where there is InfiniBand. The numbers are soft limits, -1: none."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if files is None else files
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] if locked is None else locked
    found = [Finding("open files", OK, "no limit" if files == -1 else f"{files} at once")]
    if 0 <= files < FILES:
        cure = f"ulimit -n {FILES} or more, in the batch script or limits.conf"
        found = [Finding("open files", WARNING, f"{files} at once", cure)]
    if infiniband.is_dir() and any(infiniband.iterdir()):
        if locked == -1:
            found.append(Finding("locked memory", OK, "no limit"))
        else:
            cure = "ulimit -l unlimited (limits.conf; slurmd.service LimitMEMLOCK=infinity)"
            found.append(Finding("locked memory", WARNING, f"{locked >> 10} KiB: InfiniBand registers more", cure))
    return found


def names(lookup: Callable[..., Any] = socket.getnameinfo) -> list[Finding]:
    """The name of this node's address on the way to rank 0, in the form in which torch's store asks for it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try:
            s.connect((os.environ.get("MASTER_ADDR") or socket.gethostname(), 9))  # sends nothing
        except OSError as error:
            where = os.environ.get("MASTER_ADDR") or socket.gethostname()
            cure = "set MASTER_ADDR to an address that all nodes reach"
            return [Finding("names", WARNING, f"{where} has no address here ({error.strerror or error})", cure)]
        address = s.getsockname()[0]
    began = time.monotonic()
    with suppress(OSError):
        lookup((f"::ffff:{address}", 0, 0, 0), socket.NI_NUMERICSERV)
    seconds = time.monotonic() - began
    if seconds > SLOW_NAMES:
        cure = (
            "let the name server answer for the nodes' addresses, or give them in /etc/hosts as ::ffff:ADDRESS NAME: "
            "the ranks' rendezvous asks for the name of each, one after the other"
        )
        return [Finding("names", WARNING, f"the name of {address} took {seconds:.1f} s", cure)]
    return [Finding("names", OK, "of addresses are found, or not, at once")]


def disk(what: str, folder: Path, sample: int = SAMPLE) -> list[Finding]:
    """Rights, free space, speed of the disk below ``folder``; what is made there for it is removed again."""
    name = f"{what} folder"
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        return [Finding(name, FAILURE, f"{there} is a file, no folder", f"name another folder for the {what}")]
    path = there / f".megastar-doctor-{secrets.token_hex(6)}"
    try:
        write, read = _speed(path, sample)
        usage = shutil.disk_usage(there)
    except OSError as error:
        path.unlink(missing_ok=True) if os.access(there, os.W_OK) else None
        cure = "free some space" if error.errno in (28, 122) else f"give this user the right to write in {there}"
        return [Finding(name, FAILURE, f"{there} cannot be written ({error.strerror})", cure)]
    found = []
    said = f"{folder}: writes {write / 1e6:.0f} MB/s, reads {read / 1e6:.0f} MB/s, {usage.free / GIB:.0f} GiB free"
    if write < SLOW_DISK or read < SLOW_DISK:
        found.append(
            Finding(name, WARNING, f"{said}: slow", "take a faster disk (node-local, or a parallel file system)")
        )
    if usage.free < ROOM:
        found.append(
            Finding(name, WARNING, f"{said}: little room", f"free some space; {ROOM // GIB} GiB hold a checkpoint")
        )
    return found or [Finding(name, OK, said)]


def _speed(path: Path, size: int) -> tuple[float, float]:
    """Bytes a second of writing (with fsync) and of reading back past the page cache, of one file. Raises ``OSError``."""
    block = secrets.token_bytes(BLOCK)
    try:
        with path.open("wb") as f:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the cache and the claims of work lock files
            start = time.perf_counter()
            for _ in range(max(1, size // BLOCK)):
                f.write(block)
            f.flush()
            os.fsync(f.fileno())
            write = f.tell() / (time.perf_counter() - start)
        renamed = path.with_suffix(".renamed")
        path.rename(renamed)  # every checkpoint gets its name so
        renamed.rename(path)
        with path.open("rb", buffering=0) as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            start, n = time.perf_counter(), 0
            while part := f.read(BLOCK):
                n += len(part)
            return write, n / (time.perf_counter() - start)
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
            path.with_suffix(".renamed").unlink(missing_ok=True)


def s3_reading(url: str, sample: int = SAMPLE) -> list[Finding]:
    """List a page of s3://bucket/prefix and read a range of its largest object. Raises ``UserError`` as S3Folder does."""
    from megastar.data.storage.s3_client import PAGE, S3Folder

    folder = S3Folder(url, patience=15.0, report=lambda message: None)
    start = time.perf_counter()
    try:
        page = folder.client.list_objects_v2(Bucket=folder.bucket, Prefix=folder.key_of(""), MaxKeys=PAGE)
    except Exception as error:
        folder.raise_if_permanent(error, "")
        raise
    listed = time.perf_counter() - start
    contents, prefix = page.get("Contents", ()), folder.key_of("")
    objects = {item["Key"][len(prefix) :]: (int(item["Size"]), item["ETag"]) for item in contents}
    name = max(objects, key=lambda n: objects[n][0], default="")
    if not name or not objects[name][0]:
        cure = "correct the prefix, or upload the whole folder"
        return [Finding("S3", WARNING, f"{url} can be listed, but holds nothing to read", cure)]
    start, size, etag = time.perf_counter(), min(sample, objects[name][0]), objects[name][1]
    folder.read(name, 0, size, etag)
    rate = size / (time.perf_counter() - start)
    many = "or more" if page.get("IsTruncated") else "objects"
    said = f"{url}: {len(objects)} {many}, listed in {listed:.2f} s, a range of {size / 1e6:.3g} MB at {rate / 1e6:.0f} MB/s"
    if size == sample and rate < SLOW_S3:  # a small object says nothing about the speed
        return [Finding("S3", WARNING, f"{said}: slow", "look at the network between this node and the endpoint")]
    return [Finding("S3", OK, said)]


def s3_writing(url: str) -> list[Finding]:
    """Put a small object and remove it again. Raises ``UserError`` where that is denied."""
    from megastar.data.storage.s3_client import S3Folder

    folder, name = S3Folder(url, patience=15.0, report=lambda message: None), f".megastar-doctor-{secrets.token_hex(6)}"
    try:
        folder.client.put_object(Bucket=folder.bucket, Key=folder.key_of(name), Body=b"megastar doctor")
    except Exception as error:
        folder.raise_if_permanent(error, name)
        raise
    try:
        folder.client.delete_object(Bucket=folder.bucket, Key=folder.key_of(name))
    except Exception:  # uploads never remove anything
        return [Finding("S3 upload", OK, f"{url} can be written; {name} could not be removed")]
    return [Finding("S3 upload", OK, f"{url} can be written")]
