"""Checks of a node: memory, limits, name lookup, disks, and its connection to S3."""

from __future__ import annotations

import errno
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
from typing import TYPE_CHECKING, Any

from megastar.diagnosis.finding import FAILURE, OK, WARNING, Finding, cancelled
from megastar.errors import UserError
from megastar.utils.files import existing_parent

if TYPE_CHECKING:
    from megastar.data.storage.s3_client import S3Folder

GIB = 2**30
FILES = 1024  # minimum limit of open files
SAMPLE = 64 << 20  # bytes written to a disk or read from S3
BLOCK = 4 << 20
SLOW_DISK = 50e6  # bytes a second
SLOW_S3 = 50e6
SLOW_NAMES = 0.5  # seconds
ROOM = 20 * GIB  # minimum free space; a checkpoint of XL has about 12


def memory(meminfo: str | None = None) -> list[Finding]:
    """``meminfo``: the text of /proc/meminfo."""
    text = Path("/proc/meminfo").read_text() if meminfo is None else meminfo
    sizes = {line.partition(":")[0]: int(line.split()[1]) * 1024 for line in text.splitlines() if line.endswith("kB")}
    total, free = sizes["MemTotal"], sizes.get("MemAvailable", sizes.get("MemFree", 0))
    size = f"{total / GIB:.0f} GiB"
    if free < 4 * GIB or free < 0.1 * total:
        remedy = "end the processes that use it (see top), or use another node"
        return [Finding("memory", WARNING, f"{size}, only {free / GIB:.1f} GiB available", remedy)]
    return [Finding("memory", OK, f"{size}, at least {10 * int(10 * free / total)} % available")]


def cores() -> list[Finding]:
    count, whole = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    return [Finding("cores", OK, f"{count} of {whole} available to this job" if count < whole else f"{count}")]


def shared_memory(folder: Path = Path("/dev/shm")) -> list[Finding]:
    """NCCL and torch use it for communication within a node."""
    remedy = "increase it (docker run --shm-size=16g, or a tmpfs on /dev/shm)"
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        return [Finding("shared memory", WARNING, f"{folder} is not available ({error.strerror})", remedy)]
    text = f"{folder} has {usage.total / GIB:.2g} GiB"
    if usage.free < GIB:
        level = FAILURE if usage.free < 32 << 20 else WARNING
        return [Finding("shared memory", level, f"{text}, only {usage.free / 2**20:.0f} MiB free", remedy)]
    return [Finding("shared memory", OK, text)]


def limits(
    files: int | None = None, locked: int | None = None, infiniband: Path = Path("/sys/class/infiniband")
) -> list[Finding]:
    """Open files, and locked memory if there is InfiniBand. The numbers are soft limits, -1: unlimited."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if files is None else files
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] if locked is None else locked
    found = [Finding("open files", OK, "unlimited" if files == -1 else f"at most {files}")]
    if 0 <= files < FILES:
        remedy = f"ulimit -n {FILES} or more, in the batch script or limits.conf"
        found = [Finding("open files", WARNING, f"at most {files}", remedy)]
    if infiniband.is_dir() and any(infiniband.iterdir()):
        if locked == -1:
            found.append(Finding("locked memory", OK, "unlimited"))
        else:
            remedy = "ulimit -l unlimited (limits.conf; slurmd.service LimitMEMLOCK=infinity)"
            found.append(Finding("locked memory", WARNING, f"{locked >> 10} KiB: InfiniBand needs more", remedy))
    return found


def name_lookup(lookup: Callable[..., Any] = socket.getnameinfo) -> list[Finding]:
    """Look up the name of this node's address on the route to rank 0, in the form used by torch's store."""
    host = os.environ.get("MASTER_ADDR") or socket.gethostname()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try:
            s.connect((host, 9))  # sends nothing
        except OSError as error:
            remedy = "set MASTER_ADDR to an address that all nodes can reach"
            return [Finding("names", WARNING, f"{host} does not resolve ({error.strerror or error})", remedy)]
        address = s.getsockname()[0]
    start = time.monotonic()
    with suppress(OSError):
        lookup((f"::ffff:{address}", 0, 0, 0), socket.NI_NUMERICSERV)
    seconds = time.monotonic() - start
    if seconds > SLOW_NAMES:
        remedy = (
            "configure reverse DNS for the nodes' addresses, or add them to /etc/hosts as ::ffff:ADDRESS NAME: torch's "
            "rendezvous looks up the name of every rank, one after the other"
        )
        return [Finding("names", WARNING, f"looking up the name of {address} took {seconds:.1f} s", remedy)]
    return [Finding("names", OK, "the lookup of addresses is fast")]


def disk(what: str, folder: Path, sample: int = SAMPLE) -> list[Finding]:
    """Write permission, free space and speed of the disk of ``folder``; the files written to measure it are removed."""
    name = f"{what} folder"
    existing = existing_parent(folder)
    if not existing.is_dir():
        return [Finding(name, FAILURE, f"{existing} is a file, not a folder", f"choose another folder for the {what}")]
    path = existing / f".megastar-doctor-{secrets.token_hex(6)}"
    try:
        write, read = _speed(path, sample)
        usage = shutil.disk_usage(existing)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space" if full else f"give this user write permission for {existing}"
        return [Finding(name, FAILURE, f"cannot write to {existing} ({error.strerror})", remedy)]
    found = []
    text = f"{folder}: writes {write / 1e6:.0f} MB/s, reads {read / 1e6:.0f} MB/s, {usage.free / GIB:.0f} GiB free"
    if write < SLOW_DISK or read < SLOW_DISK:
        remedy = "use a faster disk (node-local, or a parallel file system)"
        found.append(Finding(name, WARNING, f"{text}: slow", remedy))
    if usage.free < ROOM:
        remedy = f"free some space: a checkpoint may need {ROOM // GIB} GiB"
        found.append(Finding(name, WARNING, f"{text}: little space", remedy))
    return found or [Finding(name, OK, text)]


def _speed(path: Path, size: int) -> tuple[float, float]:
    """Bytes/s of writing one file (with fsync) and of reading it bypassing the page cache. Raises ``OSError``."""
    block = secrets.token_bytes(BLOCK)
    try:
        with path.open("wb") as f:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the shard cache and claims use locks
            start = time.perf_counter()
            for _ in range(max(1, size // BLOCK)):
                if cancelled.is_set():
                    raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
                f.write(block)
            f.flush()
            os.fsync(f.fileno())
            write = f.tell() / (time.perf_counter() - start)
        renamed = path.with_suffix(".renamed")
        path.rename(renamed)  # as checkpoints are published
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


def s3_read(url: str, sample: int = SAMPLE) -> list[Finding]:
    """List a page of s3://bucket/prefix and read a range of its largest object. Raises ``UserError`` like S3Folder."""
    from megastar.data.storage.s3_client import PAGE, S3Folder

    folder = S3Folder(url, patience=15.0, report=lambda message: None)
    start = time.perf_counter()
    try:
        page = folder.client.list_objects_v2(Bucket=folder.bucket, Prefix=folder.key_of(""), MaxKeys=PAGE)
    except Exception as error:
        folder.raise_if_permanent(error, "")
        raise _unavailable(folder, error, "listed") from error
    listed = time.perf_counter() - start
    contents, prefix = page.get("Contents", ()), folder.key_of("")
    objects = {item["Key"][len(prefix) :]: (int(item["Size"]), item["ETag"]) for item in contents}
    name = max(objects, key=lambda n: objects[n][0], default="")
    if not name or not objects[name][0]:
        remedy = "correct the prefix, or upload the whole folder"
        return [Finding("S3", WARNING, f"{url} can be listed, but contains no object to read", remedy)]
    start, size, etag = time.perf_counter(), min(sample, objects[name][0]), objects[name][1]
    folder.read(name, 0, size, etag)
    rate = size / (time.perf_counter() - start)
    count = f"{len(objects)} objects" + (" or more" if page.get("IsTruncated") else "")
    text = f"{url}: {count}, listed in {listed:.2f} s, a range of {size / 1e6:.3g} MB at {rate / 1e6:.0f} MB/s"
    if size == sample and rate < SLOW_S3:  # the rate of a small object means nothing
        return [Finding("S3", WARNING, f"{text}: slow", "check the network between this node and the endpoint")]
    return [Finding("S3", OK, text)]


def _unavailable(folder: S3Folder, error: Exception, what: str) -> UserError:
    from megastar.data.storage.s3_credentials import is_expired

    found = folder.describe(error)
    if is_expired(error):  # it ends with what to do
        return UserError(f"{folder.url} cannot be {what}: {found}")
    return UserError(f"{folder.url} cannot be {what} at {folder.endpoint} ({found}): check that it is up")


def s3_write(url: str) -> list[Finding]:
    """Put a small object and remove it. Raises ``UserError`` if that is denied."""
    from megastar.data.storage.s3_client import S3Folder

    folder, name = S3Folder(url, patience=15.0, report=lambda message: None), f".megastar-doctor-{secrets.token_hex(6)}"
    try:
        folder.client.put_object(Bucket=folder.bucket, Key=folder.key_of(name), Body=b"megastar doctor")
    except Exception as error:
        folder.raise_if_permanent(error, name)
        raise _unavailable(folder, error, "written") from error
    try:
        folder.client.delete_object(Bucket=folder.bucket, Key=folder.key_of(name))
    except Exception:  # an upload never needs to remove an object
        return [Finding("S3 upload", OK, f"{url} is writable; {name} could not be removed")]
    return [Finding("S3 upload", OK, f"{url} is writable")]
