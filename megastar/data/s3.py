"""Whole objects from S3, through cuts and outages. boto3 does the talking; the retries are here, for its own never
cover the body of an answer.

Endpoint, region and credentials come from where boto3 looks for them (AWS_ENDPOINT_URL_S3, AWS_ACCESS_KEY_ID, ...).
Where it finds no credentials, the requests are unsigned: public buckets need no setting.
"""

from __future__ import annotations

import http.client
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, BinaryIO

from megastar.errors import UserError

PART = 8 << 20  # bytes of a ranged GET
THREADS = 8  # GETs at once of one object
SAY_EVERY = 10.0  # seconds between the lines of a stall
_CHUNK = 1 << 20
_LONGEST_PAUSE = 10.0  # seconds: so soon after an outage the run goes on
_random = random.Random()  # its own: the pauses must not move anybody's draws


def split_url(url: str) -> tuple[str, str]:
    """s3://bucket/some/prefix -> (bucket, some/prefix). Raises ``UserError``."""
    scheme, _, rest = url.partition("://")
    bucket, _, prefix = rest.partition("/")
    if scheme != "s3" or not bucket:
        raise UserError(f"{url}: must read s3://bucket/prefix")
    return bucket, prefix.strip("/")


class Stopped(Exception):
    """The reading was ended from outside."""


class Stall:
    """How long ``what`` has not moved: says so every ten seconds, and ends the wait after ``patience`` seconds.

    ``say`` takes each line; ``stop`` ends the wait with ``Stopped``.
    """

    def __init__(self, what: str, endpoint: str, patience: float, say: Callable[[str], None], stop: threading.Event):
        self.what, self.endpoint, self.patience, self.say, self.stop = what, endpoint, patience, say, stop
        self.over = threading.Event()  # for the threads that work for this wait
        self.problem, self.moves = "", 0
        self._moved = self._said = time.monotonic()
        self._lock = threading.Lock()

    def moved(self) -> None:
        """Bytes came."""
        with self._lock:
            idle, told = time.monotonic() - self._moved, self._said > self._moved
            self.problem, self.moves = "", self.moves + 1
            self._moved = self._said = time.monotonic()
        if told:
            self.say(f"{self.what} comes again from {self.endpoint} after {idle:.0f} s")

    def failed(self, error: object) -> None:
        """An attempt brought nothing."""
        self.problem = " ".join(f"{error}".split())[:300] or type(error).__name__

    def tick(self) -> None:
        """Call it every fraction of a second. Raises ``UserError`` or ``Stopped`` when the wait is over."""
        if self.stop.is_set():
            raise Stopped
        now = time.monotonic()
        idle = now - self._moved
        if self.problem and idle >= self.patience:
            raise UserError(
                f"{self.what} did not come from {self.endpoint} for {idle:.0f} s (data.patience = {self.patience:g}), the last error: {self.problem}: once the store answers, run the same command again"
            )
        if idle >= SAY_EVERY and now - self._said >= SAY_EVERY:
            self._said = now
            self.say(
                f"stalled for {idle:.0f} s: {self.what} does not come from {self.endpoint} ({self.problem or 'no answer yet'}); trying until data.patience = {self.patience:g} s"
            )


class S3Folder:
    """The objects below s3://bucket/prefix. Raises ``UserError`` for a URL or settings that boto3 cannot use."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self.bucket, self.prefix = split_url(url)
        import boto3
        from botocore import UNSIGNED
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        options: dict[str, Any] = {
            "retries": {"total_max_attempts": 1, "mode": "standard"},  # ours know when bytes came
            "connect_timeout": 10,
            "read_timeout": 20,
            "max_pool_connections": 4 * THREADS,
            "response_checksum_validation": "when_required",  # a range has no checksum to compare
        }
        try:
            session = boto3.session.Session()
            self.signed = session.get_credentials() is not None
            if not self.signed:
                options["signature_version"] = UNSIGNED
            self.client = session.client("s3", config=Config(**options))
        except (BotoCoreError, ValueError) as error:
            raise UserError(f"{url} cannot be read ({error}): correct the AWS_... settings") from error
        self.endpoint = self.client.meta.endpoint_url

    def url_of(self, name: str) -> str:
        return f"{self.url}/{name}"

    def fetch(self, name: str, out: BinaryIO, size: int | None, stall: Stall) -> None:
        """Write object ``name`` to ``out``; ``size`` (None: any) is what it must have. Errors are those of ``Stall``,
        and ``UserError`` at once for what no retry mends."""
        found: list[tuple[str, int]] = []
        together([lambda: found.append(self.look(name, stall))], stall)
        etag, there = found[0]
        if size is not None and there != size:
            raise UserError(
                f"{self.url_of(name)} has {there} bytes, the manifest says {size}: it was cut or changed, upload it again"
            )
        sink = _Sink(out)
        try:
            starts = range(0, there, PART)
            jobs = [partial(self._part, name, etag, start, min(start + PART, there), sink, stall) for start in starts]
            together(jobs, stall)
        finally:
            sink.close()

    def list(self, stall: Stall) -> Sequence[tuple[str, int, str]]:
        """(name, bytes, ETag) of every object below the prefix. Errors as ``fetch``."""
        found: list[tuple[str, int, str]] = []
        below = f"{self.prefix}/" if self.prefix else ""

        def once() -> None:
            found.clear()
            for page in self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=below):
                found.extend((o["Key"][len(below) :], o["Size"], o["ETag"]) for o in page.get("Contents", ()))
                stall.moved()

        together([lambda: self._patiently("", stall, once)], stall)
        return found

    def read(self, name: str, start: int, end: int, stall: Stall, etag: str) -> bytes:
        """Bytes ``start`` to ``end`` of the object that has this ETag. Errors as ``fetch``."""
        sink = _Memory(start, end)
        together([partial(self._part, name, etag, start, end, sink, stall)], stall)
        return bytes(sink.data)

    def look(self, name: str, stall: Stall | None = None) -> tuple[str, int]:
        """ETag and bytes of an object. A GET of one byte: the answer to a HEAD does not say why it fails.

        Without ``stall`` one attempt, whose error comes out as it is.
        """
        from botocore.exceptions import ClientError

        def once() -> tuple[str, int]:
            try:
                answer = self._get(name, 0, 1)
            except ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] == 416:  # an empty object has no first byte
                    return "", 0
                raise
            answer["Body"].read()
            return answer["ETag"], int(answer["ContentRange"].rpartition("/")[2])

        return self._patiently(name, stall, once) if stall else once()

    def _get(self, name: str, start: int, end: int, **only: str) -> dict[str, Any]:
        key = f"{self.prefix}/{name}" if self.prefix else name
        answer = self.client.get_object(Bucket=self.bucket, Key=key, Range=f"bytes={start}-{end - 1}", **only)
        if not answer.get("ContentRange", "").startswith(f"bytes {start}-"):
            raise UserError(
                f"{self.endpoint} does not answer ranged GETs ({self.url_of(name)}): use an S3 server that does"
            )
        return answer

    def _part(self, name: str, etag: str, start: int, end: int, sink: _Sink | _Memory, stall: Stall) -> None:
        """Bytes ``start`` to ``end``, going on after a cut where it cut."""
        at = start

        def once() -> None:
            nonlocal at
            answer = self._get(name, at, end, IfMatch=etag)
            if answer["ETag"] != etag:  # a server that does not know If-Match
                raise self.changed(name)
            body = answer["Body"]
            try:
                while at < end:
                    if stall.over.is_set():
                        raise Stopped
                    chunk = body.read(min(_CHUNK, end - at))
                    if not chunk:
                        raise OSError(f"the answer ended {end - at} bytes early")
                    sink.write(chunk, at)
                    at += len(chunk)
                    stall.moved()
            finally:
                body.close()

        self._patiently(name, stall, once)

    def _patiently(self, name: str, stall: Stall, once: Callable[[], Any]) -> Any:
        """``once``, until it returns; what may pass is noted and waited out, what will not is raised."""
        failures = 0
        while not stall.over.is_set():
            moves = stall.moves
            try:
                return once()
            except Exception as error:
                stall.failed(self.passing(error, name))
            failures = 1 if stall.moves > moves else failures + 1
            pause = min(_LONGEST_PAUSE, 0.1 * 2 ** min(failures, 10))
            stall.over.wait(pause * _random.uniform(0.5, 1.0))
        raise Stopped

    def passing(self, error: Exception, name: str) -> Exception:
        """An error that may pass; raises a ``UserError`` in place of one that will not, and any other as it is."""
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, ParamValidationError
        from botocore.parsers import ResponseParserError
        from urllib3.exceptions import HTTPError

        if isinstance(error, ClientError):
            if sentence := self._refusal(error, name):
                raise UserError(sentence) from error
        elif isinstance(error, (ParamValidationError, NoCredentialsError)):
            reason = " ".join(str(error).split())
            raise UserError(f"{self.url_of(name)} cannot be asked for ({reason}): correct the URL") from error
        elif not isinstance(error, (BotoCoreError, HTTPError, ResponseParserError, OSError, http.client.HTTPException)):
            raise error
        return error

    def _refusal(self, error: Any, name: str) -> str:
        """The sentence for an answer that will stay the same, else the empty string."""
        code, status = error.response["Error"]["Code"], error.response["ResponseMetadata"]["HTTPStatusCode"]
        url = self.url_of(name)
        if code == "NoSuchBucket":
            return f"bucket {self.bucket} of {url} does not exist at {self.endpoint}: correct the URL, or the endpoint (AWS_ENDPOINT_URL_S3)"
        if status == 404:
            return (
                f"{url} does not exist at {self.endpoint}: upload the whole folder of token shards, or correct the URL"
            )
        if status in (401, 403):
            if self.signed:
                return f"{self.endpoint} denies access to {url} ({code}): use credentials that may read it"
            return f"{self.endpoint} denies access to {url} ({code}) and no credentials were found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        if status == 412:
            return str(self.changed(name))
        if status < 500 and status not in (408, 429) and code not in ("RequestTimeout", "SlowDown", "Throttling"):
            return f"{self.endpoint} refuses {url} ({code}, {error.response['Error'].get('Message', '')}): correct the URL, the region (AWS_DEFAULT_REGION) or the endpoint (AWS_ENDPOINT_URL_S3)"
        return ""

    def changed(self, name: str) -> UserError:
        return UserError(
            f"{self.url_of(name)} was changed while it was read: restore it, or start a new run on shards that stay"
        )


class _Sink:
    """A file to which several threads write. A thread that comes late, after ``close``, writes nothing."""

    def __init__(self, out: BinaryIO):
        self._fd: int | None = out.fileno()
        self._lock = threading.Lock()

    def write(self, data: bytes, at: int) -> None:
        with self._lock:
            if self._fd is None:
                raise Stopped
            view = memoryview(data)
            try:
                while view:
                    n = os.pwrite(self._fd, view, at)
                    view, at = view[n:], at + n
            except OSError as error:  # the disk's, not the network's
                raise UserError(
                    f"the cache cannot be written ({error.strerror}): make room, or name another data.cache"
                ) from error

    def close(self) -> None:
        with self._lock:
            self._fd = None


class _Memory:
    """Bytes ``start`` to ``end``, for one thread."""

    def __init__(self, start: int, end: int):
        self.start, self.data = start, bytearray(end - start)

    def write(self, data: bytes, at: int) -> None:
        self.data[at - self.start : at - self.start + len(data)] = data


def together(jobs: Sequence[Callable[[], None]], stall: Stall) -> None:
    """Run the jobs in threads; the first error ends them all and comes out. Here only the clock is watched.

    The threads are daemons: one that hangs in a read holds nobody up.
    """
    todo, errors = deque(jobs), list[BaseException]()

    def work() -> None:
        while not stall.over.is_set():
            try:
                job = todo.popleft()
            except IndexError:
                return
            try:
                job()
            except BaseException as error:
                errors.append(error)
                return

    threads = [threading.Thread(target=work, name="s3-get", daemon=True) for _ in range(min(THREADS, len(jobs)))]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive() and not errors:
                stall.tick()
                thread.join(0.05)
        if errors:
            raise errors[0]
    except BaseException:
        stall.over.set()
        raise
