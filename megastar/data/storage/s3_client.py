"""Whole objects and ranges from S3, through broken connections and outages. Requests go through boto3; retries are made
here, because boto3's own never cover the body of a response.

Endpoint, region and credentials come from where boto3 looks for them (AWS_ENDPOINT_URL_S3, AWS_ACCESS_KEY_ID, ...).
Without credentials the requests are unsigned, so public buckets need no setting.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import random
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from typing import Any, BinaryIO, TypeVar

from megastar.data.storage.errors import CacheFull, Stopped
from megastar.data.storage.s3_credentials import S3Client
from megastar.data.storage.s3_errors import changed, describe, permanent_error
from megastar.data.storage.stall_timer import NEVER, PATIENCE, THREADS, StallTimer, log_on_first_rank, run_in_threads
from megastar.errors import UserError
from megastar.utils.redact import redact

T = TypeVar("T")
PART = 8 << 20  # minimum bytes of a ranged GET (the maximum is four times that): each costs 3 ms of a core
PAGE = 1000  # objects of one listing: S3's maximum
_CHUNK = 1 << 20
_TRY_GET_TIMEOUT = 10.0  # seconds
_LONGEST_PAUSE = 10.0  # seconds between retries
_random = random.Random()  # independent of the global generator, whose state belongs to the caller


def split_url(url: str) -> tuple[str, str]:
    """s3://bucket/some/prefix -> (bucket, some/prefix). Raises ``UserError``."""
    scheme, _, rest = url.partition("://")
    bucket, _, prefix = rest.partition("/")
    if scheme.lower() != "s3" or not bucket:
        raise UserError(f"{url}: must have the form s3://bucket/prefix")
    return bucket, prefix.strip("/")


class S3Folder:
    """The objects below s3://bucket/prefix. Raises ``UserError`` for a URL or settings that boto3 cannot use.

    Every call retries through broken connections and outages of up to ``patience`` seconds; ``report`` is called with
    the messages about them. Permanent errors raise ``UserError`` at once.
    """

    def __init__(self, url: str, patience: float = PATIENCE, report: Callable[[str], None] = log_on_first_rank):
        self.url, self.patience, self.report = url.rstrip("/"), patience, report
        self.bucket, self.prefix = split_url(url)
        from botocore.exceptions import BotoCoreError

        retries = {"total_max_attempts": 1, "mode": "standard"}
        try:
            self.aws = S3Client(retries=retries, connect_timeout=10, read_timeout=20, max_pool_connections=4 * THREADS)
        except (BotoCoreError, ValueError) as error:
            raise UserError(f"{url} cannot be opened ({redact(error)}): correct the AWS_... settings") from error
        self.signed = self.aws.signed
        self.endpoint = redact(self.client.meta.endpoint_url)

    @property
    def client(self) -> Any:
        return self.aws.client

    def url_of(self, name: str) -> str:
        return f"{self.url}/{name}"

    def key_of(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def timer(
        self, name: str, stop: threading.Event = NEVER, report: Callable[[str], None] | None = None
    ) -> StallTimer:
        """The stall timer of one wait for object ``name``; ``stop`` ends the wait with ``Stopped``."""
        return StallTimer(self.url_of(name), self.endpoint, self.patience, report or self.report, stop)

    def list(self) -> list[tuple[str, int, str]]:
        """Name (below the prefix), bytes and ETag of every object, sorted by name. Empty for an empty prefix."""
        timer, start = self.timer(""), self.key_of("")
        found: list[tuple[str, int, str]] = []
        page: dict[str, Any] = {"IsTruncated": True}
        token: dict[str, str] = {}

        def next_page() -> dict[str, Any]:
            return dict(self.client.list_objects_v2(Bucket=self.bucket, Prefix=start, MaxKeys=PAGE, **token))

        while page["IsTruncated"]:
            page = {"IsTruncated": False, **self._call("", timer, next_page)}
            found += [(n, int(o["Size"]), o["ETag"]) for o in page.get("Contents", ()) if (n := o["Key"][len(start) :])]
            token = {"ContinuationToken": page.get("NextContinuationToken", "")}
        return sorted(found)

    def read(self, name: str, start: int, end: int, etag: str) -> bytes:
        """Bytes ``start`` to ``end`` of version ``etag`` of an object. Raises ``UserError`` if it has changed."""
        sink, timer = _MemorySink(start, end), self.timer(name)
        starts = range(start, end, PART)
        jobs = [partial(self._read_part, name, etag, at, min(at + PART, end), sink, timer) for at in starts]
        run_in_threads(jobs, timer)
        return bytes(sink.data)

    def try_get(self, name: str, max_bytes: int) -> bytes | None:
        """A small optional object, in one attempt. None if that fails, takes more than ten seconds (it may run at the
        exit of a rank), or the object is larger than ``max_bytes``."""
        found: list[bytes] = []

        def get() -> None:
            with suppress(Exception):  # a problem of the store is reported when a shard is read
                response = self.client.get_object(Bucket=self.bucket, Key=self.key_of(name))
                with closing(response["Body"]) as body:
                    if response["ContentLength"] <= max_bytes:
                        found.append(body.read())

        thread = threading.Thread(target=get, name="s3-try_get", daemon=True)
        thread.start()
        thread.join(_TRY_GET_TIMEOUT)
        return found[0] if found else None

    def put(self, name: str, data: bytes) -> None:
        """Write a small object."""
        key = self.key_of(name)
        self._call(name, self.timer(name), lambda: self.client.put_object(Bucket=self.bucket, Key=key, Body=data))

    def fetch(self, name: str, out: BinaryIO, size: int | None, timer: StallTimer) -> str:
        """Write object ``name`` to ``out`` and return its SHA-256; ``size`` is its expected size (None: any).

        Raises the errors of ``StallTimer``, and ``UserError`` at once for permanent errors.
        """
        etag, found = self._call(name, timer, lambda: self.head(name))
        if size is not None and found != size:
            raise UserError(
                f"{self.url_of(name)} has {found} bytes, the manifest records {size}: it was truncated or changed, upload it again"
            )
        sink = _FileSink(out)
        try:
            part = min(max(PART, -(-found // THREADS)), 4 * PART)
            starts = range(0, found, part)
            jobs = [partial(self._read_part, name, etag, at, min(at + part, found), sink, timer) for at in starts]
            run_in_threads(jobs, timer, sink.hash_some)  # hashing overlaps with the download
            while sink.hash_some():
                pass
            return sink.digest.hexdigest()
        finally:
            sink.close()

    def head(self, name: str) -> tuple[str, int]:
        """ETag and bytes of an object, in one attempt. A GET of one byte: the error of a HEAD has no reason."""
        from botocore.exceptions import ClientError

        try:
            response = self._get(name, 0, 1)
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] == 416:  # an empty object has no first byte
                return "", 0
            raise
        response["Body"].read()
        return response["ETag"], int(response["ContentRange"].rpartition("/")[2])

    def _get(self, name: str, start: int, end: int, **condition: str) -> dict[str, Any]:
        key, span = self.key_of(name), f"bytes={start}-{end - 1}"
        response: dict[str, Any] = self.client.get_object(Bucket=self.bucket, Key=key, Range=span, **condition)
        if not response.get("ContentRange", "").startswith(f"bytes {start}-"):
            if response.get("ContentType", "").startswith("text/html"):
                raise UserError(
                    f"{self.endpoint} answers with a web page for {self.url_of(name)}: a proxy or login page is in between; correct AWS_ENDPOINT_URL_S3 or NO_PROXY"
                )
            raise UserError(
                f"{self.endpoint} does not support ranged GETs ({self.url_of(name)}): use an S3 server that does"
            )
        return response

    def _read_part(
        self, name: str, etag: str, start: int, end: int, sink: _FileSink | _MemorySink, timer: StallTimer
    ) -> None:
        """Write bytes ``start`` to ``end`` to the sink; a retry continues where the connection broke."""
        at = start

        def attempt() -> None:
            nonlocal at
            response = self._get(name, at, end, IfMatch=etag)
            if response["ETag"] != etag:  # a server that ignores If-Match
                raise self.changed(name)
            with closing(response["Body"]) as body:
                size = min(_CHUNK, 1 << 16)
                while at < end:
                    if timer.cancelled.is_set():
                        raise Stopped
                    began = time.monotonic()
                    chunk = body.read(min(size, end - at))
                    if not chunk:
                        raise OSError(f"the response ended {end - at} bytes early")
                    sink.write(chunk, at)
                    at += len(chunk)
                    timer.progress(len(chunk))
                    seconds = time.monotonic() - began  # a read returns when it is full: ask for less when it is slow
                    size = min(2 * size, _CHUNK) if seconds < 0.1 else max(size // 2, 1 << 12) if seconds > 1 else size

        self._with_retries(name, timer, attempt)

    def _call(self, name: str, timer: StallTimer, request: Callable[[], T]) -> T:
        """The result of ``request``, with retries, in a thread that the timer watches."""
        found: list[T] = []
        run_in_threads([lambda: found.append(self._with_retries(name, timer, request))], timer)
        timer.progress()
        return found[0]

    def _with_retries(self, name: str, timer: StallTimer, request: Callable[[], T]) -> T:
        """Call ``request`` until it succeeds, or raises a permanent error."""
        failures = 0
        while not timer.cancelled.is_set():
            before, generation = timer.progress_count, self.aws.generation
            try:
                return request()
            except Exception as error:
                if self.aws.renew(error, generation):
                    continue
                self.raise_if_permanent(error, name)
                timer.failed(self.describe(error))
            failures = 1 if timer.progress_count > before else failures + 1
            pause = min(_LONGEST_PAUSE, 0.1 * 2 ** min(failures, 10))
            timer.cancelled.wait(pause * _random.uniform(0.5, 1.0))
        raise Stopped

    def raise_if_permanent(self, error: Exception, name: str) -> None:
        """Return if a retry after ``error`` may succeed. Otherwise raise a ``UserError`` that explains the error, or
        the error itself if it is not one of a store."""
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, ParamValidationError, SSLError
        from botocore.parsers import ResponseParserError
        from urllib3.exceptions import HTTPError

        url, source = self.url_of(name), self.aws.source if self.signed else ""
        if isinstance(error, ClientError):
            if message := permanent_error(error, url, self.bucket, self.endpoint, source):
                raise UserError(message) from error
        elif isinstance(error, (ParamValidationError, NoCredentialsError)):
            raise UserError(f"{url} cannot be requested ({self.describe(error)}): correct the URL") from error
        elif isinstance(error, SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
            raise UserError(
                f"the certificate of {self.endpoint} cannot be verified ({self.describe(error)}): name its authority in AWS_CA_BUNDLE"
            ) from error
        elif not isinstance(error, (BotoCoreError, HTTPError, ResponseParserError, OSError, http.client.HTTPException)):
            raise error

    def describe(self, error: Exception) -> str:
        """The text of an error, without secrets."""
        return describe(error, self.aws.source)

    def changed(self, name: str) -> UserError:
        return UserError(changed(self.url_of(name)))


class _FileSink:
    """A file written by several threads and hashed by one. Writes after ``close`` raise ``Stopped``."""

    def __init__(self, out: BinaryIO):
        self._fd: int | None = out.fileno()
        self._lock = threading.Lock()
        self.digest, self._hashed = hashlib.sha256(), 0
        self._pieces: dict[int, int] = {}  # first byte -> end, of what is written and not yet hashed

    def hash_some(self) -> bool:
        """Hash the next piece; False if it is not there yet. Call it from one thread."""
        end = self._pieces.pop(self._hashed, 0)
        if not end:
            return False
        assert self._fd is not None
        self.digest.update(os.pread(self._fd, end - self._hashed, self._hashed))
        self._hashed = end
        return True

    def write(self, data: bytes, at: int) -> None:
        with self._lock:
            if self._fd is None:
                raise Stopped
            view, end = memoryview(data), at
            try:
                while view:
                    n = os.pwrite(self._fd, view, end)
                    view, end = view[n:], end + n
                self._pieces[at] = end
            except OSError as error:  # of the disk, not of the network
                raise CacheFull(
                    f"the cache cannot be written ({error.strerror}): free some space, or set another data.cache"
                ) from error

    def close(self) -> None:
        with self._lock:
            self._fd = None


class _MemorySink:
    """Bytes ``start`` to ``end`` of an object, written by several threads."""

    def __init__(self, start: int, end: int):
        self.start, self.data = start, bytearray(end - start)

    def write(self, data: bytes, at: int) -> None:
        self.data[at - self.start : at - self.start + len(data)] = data
