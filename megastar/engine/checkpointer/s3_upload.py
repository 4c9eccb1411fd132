"""Uploads of complete checkpoints to S3 while training continues. boto3 sends and retries the requests.

Credentials, region and endpoint are those that boto3 finds (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL_S3, ...).
"""

from __future__ import annotations

import threading
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from megastar.data.storage.s3_client import split_url
from megastar.data.storage.s3_credentials import S3Client, error_code, is_expired
from megastar.data.storage.s3_endpoint import check_endpoint
from megastar.data.storage.s3_errors import describe, permanent_error
from megastar.errors import UserError
from megastar.run_dir.events import NOT_UPLOADED
from megastar.run_dir.layout import MANIFEST
from megastar.utils.redact import redact

RETRY_FIRST, RETRY_MOST = 5.0, 120.0  # seconds between attempts; doubled from the first to the last
OVER = {"situation": "upload", "over": True}


class Uploader:
    """One upload at a time, in a thread. A newer checkpoint replaces one whose upload has not begun.

    The manifest goes last and then the object ``latest``, so a checkpoint that a reader finds is complete. An outage never
    stops the training: the upload of the newest checkpoint is retried until it succeeds, and ``problem`` holds the last failure
    until then. Nothing in S3 is ever removed.
    """

    def __init__(self, url: str, patience: float = 0.0, only_missing: bool = False):
        """``only_missing``: leave out what an earlier process of this run has uploaded."""
        self.url, self.patience = url, patience  # seconds that ``finish`` waits for an outage to pass
        self.only_missing, self.sent = only_missing, 0  # objects
        self.bucket, self.prefix = split_url(url)
        self.waiting: Path | None = None
        self.current: Path | None = None  # under way
        self.thread: threading.Thread | None = None
        self.lock = threading.Lock()
        self.uploaded: list[str] = []
        self.problem = ""
        self._aws: S3Client | None = None  # of the last attempt
        self._woken = threading.Event()  # something new to upload, or the end of patience
        self._until: float | None = None  # when to stop waiting for the end of an outage; None: never
        self._events: list[tuple[str, dict[str, Any]]] = []

    def put(self, checkpoint: Path) -> None:
        """Upload ``checkpoint`` as soon as the upload under way, if any, has ended."""
        with self.lock:
            self.waiting = checkpoint
            self._woken.set()
            if self.thread is None:
                self.thread = threading.Thread(target=self._work, daemon=True)
                self.thread.start()

    def pending(self) -> set[Path]:
        """The checkpoints that are still read: the one under way, and the next one."""
        with self.lock:
            return {c for c in (self.current, self.waiting) if c is not None}

    def finish(self) -> str:
        """Wait until all uploads are done or given up; returns the last problem, or the empty string."""
        self._until = time.monotonic() + self.patience
        self._woken.set()  # one more attempt, at once
        while thread := self.thread:
            thread.join()
        self._until = None
        return self.problem

    def take_events(self) -> list[tuple[str, dict[str, Any]]]:
        """Messages about an outage and its end since the last call."""
        events, self._events = self._events, []
        return events

    def _work(self) -> None:
        pause = RETRY_FIRST
        while True:
            with self.lock:
                checkpoint, self.waiting = self.waiting, None
                self.current = checkpoint
                if checkpoint is None:
                    self.thread = None
                    return
                self._woken.clear()
            last = self._until is not None and time.monotonic() + pause > self._until
            try:
                self._upload(checkpoint)
                self.uploaded.append(checkpoint.name)
                if self.problem:
                    self._events.append((f"{checkpoint.name} was uploaded to {self.url} after retries", OVER))
                self.problem, pause = "", RETRY_FIRST
                continue
            except Exception as error:  # whatever it is, the run and its local checkpoints are fine
                text = (
                    f"{checkpoint.name}{NOT_UPLOADED}{self.url} ({self._reason(error)}); it is complete in {checkpoint}"
                )
                if not self.problem:
                    self._events.append((text, {"situation": "upload"}))
                self.problem = text
                retryable = is_retryable(error) and (checkpoint / MANIFEST).is_file()
            if last or not retryable:
                continue
            self._woken.wait(pause if self._until is None else min(pause, max(0.0, self._until - time.monotonic())))
            pause = min(2 * pause, RETRY_MOST)
            with self.lock:
                self.waiting = self.waiting or checkpoint

    def _upload(self, checkpoint: Path) -> None:
        retries = {"mode": "standard", "total_max_attempts": 3}
        self._aws = aws = S3Client(
            retries=retries, connect_timeout=10, read_timeout=60
        )  # endpoint and keys may have changed
        while True:
            generation = aws.generation
            try:
                return self._send(checkpoint, aws.client)
            except Exception as error:
                if not aws.renew(cause_of(error), generation):
                    raise

    def _send(self, checkpoint: Path, client: Any) -> None:
        from boto3.s3.transfer import TransferConfig

        parts = TransferConfig(multipart_threshold=64 << 20, multipart_chunksize=64 << 20, max_concurrency=4)
        files = sorted(p for p in checkpoint.iterdir() if p.name != MANIFEST) + [checkpoint / MANIFEST]
        present = self._present(checkpoint, client) if self.only_missing else {}
        for file in files:
            key, size = self._key(f"{checkpoint.name}/{file.name}"), file.stat().st_size
            if present.get(file.name) == size:
                continue
            client.upload_file(str(file), self.bucket, key, Config=parts)
            self.sent += 1
            if (there := self._size(key, client)) != size:
                raise OSError(f"{key} has {there} bytes in S3, {file} has {size}")
        latest = f"{checkpoint.name}\n".encode()
        if not self.only_missing or self._content("latest", client, len(latest)) != latest:
            client.put_object(Bucket=self.bucket, Key=self._key("latest"), Body=latest)
            self.sent += 1

    def _present(self, checkpoint: Path, client: Any) -> dict[str, int]:
        """Name and bytes of the objects of ``checkpoint``. Its manifest, with the hashes of all files, is uploaded last: if
        it differs, the objects may be those of another run, and none counts."""
        manifest = (checkpoint / MANIFEST).read_bytes()
        if self._content(f"{checkpoint.name}/{MANIFEST}", client, len(manifest)) != manifest:
            return {}
        prefix = self._key(f"{checkpoint.name}/")
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        return {o["Key"][len(prefix) :]: int(o["Size"]) for page in pages for o in page.get("Contents", ())}

    def _content(self, name: str, client: Any, most: int) -> bytes | None:
        """An object of up to ``most`` bytes; None for another one or none."""
        from botocore.exceptions import ClientError

        try:
            response = client.get_object(Bucket=self.bucket, Key=self._key(name))
            with closing(response["Body"]) as body:
                return bytes(body.read()) if response["ContentLength"] <= most else None
        except ClientError as error:
            # Credentials that may not list a bucket are denied access to a missing object.
            if error_code(error) in ("NoSuchKey", "404", "AccessDenied"):
                return None
            raise

    def _size(self, key: str, client: Any) -> int:
        """Bytes of an object. The response to a failed HEAD has no error code: a GET of one byte raises that error."""
        from botocore.exceptions import ClientError

        try:
            return int(client.head_object(Bucket=self.bucket, Key=key)["ContentLength"])
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] not in (400, 403):
                raise
            response = client.get_object(Bucket=self.bucket, Key=key, Range="bytes=0-0")
            response["Body"].close()
            return int(response.get("ContentRange", f"/{response['ContentLength']}").rpartition("/")[2])

    def _reason(self, error: Exception) -> str:
        """The text of an error, with advice if another attempt cannot succeed."""
        from botocore.exceptions import ClientError

        cause, source = cause_of(error), self._aws.source if self._aws else ""
        if self._aws and isinstance(cause, ClientError):
            endpoint = redact(self._aws.client.meta.endpoint_url)
            if message := permanent_error(cause, self.url, self.bucket, endpoint, source):
                return message
        return describe(cause if is_expired(cause) else error, source)

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name


def check_upload(url: str) -> None:
    """Raise ``UserError`` for a ``train.upload`` whose endpoint or proxy is not a URL, before the run starts."""
    if not url:
        return
    import botocore.session
    from botocore.exceptions import BotoCoreError

    with suppress(BotoCoreError):  # a missing profile: the upload reports it, and the run continues
        check_endpoint(botocore.session.Session())


def cause_of(error: BaseException) -> BaseException:
    """boto3's error that caused the error of a transfer; otherwise the error itself."""
    from botocore.exceptions import ClientError, NoCredentialsError

    found: BaseException | None = error
    while found is not None and not isinstance(found, (ClientError, NoCredentialsError)):
        found = found.__cause__ or found.__context__
    return found or error


def is_retryable(error: BaseException) -> bool:
    """Whether another attempt can succeed: not after a refusal, such as wrong credentials or a missing bucket."""
    from botocore.exceptions import ClientError, NoCredentialsError

    cause = cause_of(error)
    if isinstance(cause, ClientError):
        return not permanent_error(cause, "", "", "", "")
    return not isinstance(cause, (NoCredentialsError, UserError))
