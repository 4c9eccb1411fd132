"""Whole objects from S3, through cuts and outages. boto3 does the talking; the retries are here, for its own never
cover the body of an answer.

Endpoint, region and credentials come from where boto3 looks for them (AWS_ENDPOINT_URL_S3, AWS_ACCESS_KEY_ID, ...).
Where it finds no credentials, the requests are unsigned: public buckets need no setting.
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
from typing import Any, BinaryIO

from megastar.data.storage.errors import CacheFull, Stopped
from megastar.data.storage.stall_timer import NEVER, PATIENCE, THREADS, StallTimer, run_in_threads, say_on_main
from megastar.errors import UserError

PART = 8 << 20  # bytes of a ranged GET at least, four times that at most: each costs 3 ms of a core
PAGE = 1000  # objects of one listing: S3's most
_CHUNK = 1 << 20
_GLANCE = 10.0  # seconds
_LONGEST_PAUSE = 10.0  # seconds: so soon after an outage the run goes on
_random = random.Random()  # its own: the pauses must not move anybody's draws


def split_url(url: str) -> tuple[str, str]:
    """s3://bucket/some/prefix -> (bucket, some/prefix). Raises ``UserError``."""
    scheme, _, rest = url.partition("://")
    bucket, _, prefix = rest.partition("/")
    if scheme != "s3" or not bucket:
        raise UserError(f"{url}: must read s3://bucket/prefix")
    return bucket, prefix.strip("/")


class S3Folder:
    """The objects below s3://bucket/prefix. Raises ``UserError`` for a URL or settings that boto3 cannot use.

    Every call waits out cuts and outages of up to ``patience`` seconds; ``say`` takes the lines about them. What no
    retry mends is a ``UserError`` at once.
    """

    def __init__(self, url: str, patience: float = PATIENCE, say: Callable[[str], None] | None = None):
        self.url, self.patience, self.say = url.rstrip("/"), patience, say or say_on_main
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

    def key_of(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def stall(self, name: str, stop: threading.Event = NEVER, say: Callable[[str], None] | None = None) -> StallTimer:
        """The clock of one wait for object ``name``; ``stop`` ends it with ``Stopped``."""
        return StallTimer(self.url_of(name), self.endpoint, self.patience, say or self.say, stop)

    def list(self, stall: StallTimer | None = None) -> list[tuple[str, int, str]]:
        """Name (below the prefix), bytes and ETag of every object, by name. An empty prefix has none."""
        stall, start = stall or self.stall(""), self.key_of("")
        found: list[tuple[str, int, str]] = []
        page: dict[str, Any] = {}

        def ask() -> dict[str, Any]:
            answer = self.client.list_objects_v2(Bucket=self.bucket, Prefix=start, MaxKeys=PAGE, **page)
            stall.moved()
            return answer

        def walk() -> None:
            while True:
                answer = self._patiently("", stall, ask)
                for item in answer.get("Contents", ()):
                    if name := item["Key"][len(start) :]:
                        found.append((name, int(item["Size"]), item["ETag"]))
                if not answer.get("IsTruncated"):
                    return
                page["ContinuationToken"] = answer["NextContinuationToken"]

        run_in_threads([walk], stall)
        return sorted(found)

    def read(
        self,
        name: str,
        start: int = 0,
        end: int | None = None,
        stall: StallTimer | None = None,
        etag: str | None = None,
    ) -> bytes:
        """Bytes ``start`` to ``end`` (None: the last) of an object, of its version ``etag`` (None: whichever is there).

        Raises ``UserError`` when it is no longer that version, or ends before ``end``.
        """
        stall = stall or self.stall(name)
        if etag is None or end is None:
            found: list[tuple[str, int]] = []
            run_in_threads([lambda: found.append(self.head(name, stall))], stall)
            if etag is not None and found[0][0] != etag:
                raise self.changed(name)
            etag, size = found[0]
            end = size if end is None else end
            if end > size:
                raise UserError(
                    f"{self.url_of(name)} has {size} bytes, {end} are asked for: it was cut or changed, upload it again"
                )
        sink = _Memory(end - start)
        jobs = [
            partial(self._part, name, etag, at, min(at + PART, end), sink, stall, start)
            for at in range(start, end, PART)
        ]
        if jobs:
            run_in_threads(jobs, stall)
        return bytes(sink.data)

    def try_get(self, name: str, most: int) -> bytes | None:
        """A small object that may be missing: one attempt, None where it fails, is larger than ``most`` bytes, or does
        not come within seconds: a rank at its end must not wait for it."""
        found: list[bytes] = []

        def ask() -> None:
            with suppress(Exception):  # it is only a help: what ails the store is said when a shard is wanted
                answer = self.client.get_object(Bucket=self.bucket, Key=self.key_of(name))
                with closing(answer["Body"]) as body:
                    if answer["ContentLength"] <= most:
                        found.append(body.read())

        thread = threading.Thread(target=ask, name="s3-try_get", daemon=True)
        thread.start()
        thread.join(_GLANCE)
        return found[0] if found else None

    def put(self, name: str, data: bytes, stall: StallTimer | None = None) -> None:
        """Write a small object whole."""
        stall = stall or self.stall(name)
        job = partial(self.client.put_object, Bucket=self.bucket, Key=self.key_of(name), Body=data)
        run_in_threads([lambda: self._patiently(name, stall, job)], stall)

    def fetch(self, name: str, out: BinaryIO, size: int | None, stall: StallTimer) -> str:
        """Write object ``name`` to ``out``; ``size`` (None: any) is what it must have. Returns its SHA-256.

        Errors are those of ``StallTimer``, and ``UserError`` at once for what no retry mends.
        """
        found: list[tuple[str, int]] = []
        run_in_threads([lambda: found.append(self.head(name, stall))], stall)
        etag, there = found[0]
        if size is not None and there != size:
            raise UserError(
                f"{self.url_of(name)} has {there} bytes, the manifest says {size}: it was cut or changed, upload it again"
            )
        sink = _Sink(out)
        try:
            part = min(max(PART, -(-there // THREADS)), 4 * PART)
            starts = range(0, there, part)
            jobs = [partial(self._part, name, etag, start, min(start + part, there), sink, stall) for start in starts]
            run_in_threads(jobs, stall, sink.hash_some)  # the hash keeps up with the network
            while sink.hash_some():
                pass
            return sink.digest.hexdigest()
        finally:
            sink.close()

    def head(self, name: str, stall: StallTimer | None = None) -> tuple[str, int]:
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
        key = self.key_of(name)
        answer = self.client.get_object(Bucket=self.bucket, Key=key, Range=f"bytes={start}-{end - 1}", **only)
        if not answer.get("ContentRange", "").startswith(f"bytes {start}-"):
            raise UserError(
                f"{self.endpoint} does not answer ranged GETs ({self.url_of(name)}): use an S3 server that does"
            )
        return answer

    def _part(
        self, name: str, etag: str, start: int, end: int, sink: _Sink | _Memory, stall: StallTimer, origin: int = 0
    ) -> None:
        """Bytes ``start`` to ``end``, going on after a cut where it cut; the sink's first byte is ``origin``."""
        at = start

        def once() -> None:
            nonlocal at
            answer = self._get(name, at, end, IfMatch=etag)
            if answer["ETag"] != etag:  # a server that does not know If-Match
                raise self.changed(name)
            body, size = answer["Body"], min(_CHUNK, 1 << 16)
            try:
                while at < end:
                    if stall.over.is_set():
                        raise Stopped
                    asked = time.monotonic()
                    chunk = body.read(min(size, end - at))
                    if not chunk:
                        raise OSError(f"the answer ended {end - at} bytes early")
                    sink.write(chunk, at - origin)
                    at += len(chunk)
                    stall.moved(len(chunk))
                    took = time.monotonic() - asked  # a read returns when it is full: at a crawl, ask for less
                    size = min(2 * size, _CHUNK) if took < 0.1 else max(size // 2, 1 << 12) if took > 1 else size
            finally:
                body.close()

        self._patiently(name, stall, once)

    def _patiently(self, name: str, stall: StallTimer, once: Callable[[], Any]) -> Any:
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
            return f"{url} does not exist at {self.endpoint}: upload the whole folder, or correct the URL"
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
    """A file to which several threads write, and one hashes. A thread that comes late, after ``close``, writes nothing."""

    def __init__(self, out: BinaryIO):
        self._fd: int | None = out.fileno()
        self._lock = threading.Lock()
        self.digest, self._hashed = hashlib.sha256(), 0
        self._pieces: dict[int, int] = {}  # first byte -> end, of what was written and is not hashed

    def hash_some(self) -> bool:
        """Hash the next piece; False where it has not come yet. For one thread."""
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
            except OSError as error:  # the disk's, not the network's
                raise CacheFull(
                    f"the cache cannot be written ({error.strerror}): make room, or name another data.cache"
                ) from error

    def close(self) -> None:
        with self._lock:
            self._fd = None


class _Memory:
    """Bytes to which several threads write."""

    def __init__(self, size: int):
        self.data = bytearray(size)

    def write(self, data: bytes, at: int) -> None:
        self.data[at : at + len(data)] = data
