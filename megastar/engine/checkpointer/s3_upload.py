"""Copies of complete checkpoints in S3, made while training goes on. boto3 does the talking and the retries.

Credentials, region and endpoint come from where boto3 looks for them (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL_S3, ...).
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from megastar.data.storage.s3_client import split_url
from megastar.run_dir.layout import MANIFEST

RETRY_FIRST, RETRY_MOST = 5.0, 120.0  # seconds between tries; doubled from the first to the last
OVER = {"situation": "upload", "over": True}


class Uploader:
    """One upload at a time, in a thread. A newer checkpoint replaces one that still waits its turn.

    The manifest goes last and then the object ``latest``, so what a reader finds complete is complete. An outage never
    stops the training: the newest checkpoint is tried again until it is there, and ``problem`` holds the last failure
    until then. Nothing in S3 is ever removed.
    """

    def __init__(self, url: str, patience: float = 0.0):
        self.url, self.patience = url, patience  # seconds that ``finish`` waits for an outage to pass
        self.bucket, self.prefix = split_url(url)
        self.waiting: Path | None = None
        self.thread: threading.Thread | None = None
        self.lock = threading.Lock()
        self.uploaded: list[str] = []
        self.problem = ""
        self._woken = threading.Event()  # something new to upload, or the end of patience
        self._until: float | None = None  # when an outage is waited for no longer; None: without end
        self._news: list[tuple[str, dict[str, Any]]] = []

    def put(self, checkpoint: Path) -> None:
        """Upload ``checkpoint`` as soon as the upload under way, if any, has ended."""
        with self.lock:
            self.waiting = checkpoint
            self._woken.set()
            if self.thread is None:
                self.thread = threading.Thread(target=self._work, daemon=True)
                self.thread.start()

    def finish(self) -> str:
        """Wait for what was put; returns the last problem, or the empty string."""
        self._until = time.monotonic() + self.patience
        self._woken.set()  # one more try, at once
        while thread := self.thread:
            thread.join()
        self._until = None
        return self.problem

    def news(self) -> list[tuple[str, dict[str, Any]]]:
        """Sentences about an outage, and about its end, since this was last asked."""
        news, self._news = self._news, []
        return news

    def _work(self) -> None:
        pause = RETRY_FIRST
        while True:
            with self.lock:
                checkpoint, self.waiting = self.waiting, None
                if checkpoint is None:
                    self.thread = None
                    return
                self._woken.clear()
            last = self._until is not None and time.monotonic() + pause > self._until
            try:
                self._upload(checkpoint)
                self.uploaded.append(checkpoint.name)
                if self.problem:
                    self._news.append((f"{checkpoint.name} was uploaded to {self.url} after all", OVER))
                self.problem, pause = "", RETRY_FIRST
                continue
            except Exception as error:  # whatever it is, the run and its local checkpoints are fine
                text = f"{checkpoint.name} was not uploaded to {self.url} ({error}); it is whole in {checkpoint}"
                if not self.problem:
                    self._news.append((text, {"situation": "upload"}))
                self.problem = text
                passes = may_pass(error) and (checkpoint / MANIFEST).is_file()
            if last or not passes:
                continue
            self._woken.wait(pause if self._until is None else min(pause, max(0.0, self._until - time.monotonic())))
            pause = min(2 * pause, RETRY_MOST)
            with self.lock:
                self.waiting = self.waiting or checkpoint

    def _upload(self, checkpoint: Path) -> None:
        import boto3
        from boto3.s3.transfer import TransferConfig
        from botocore.config import Config

        patient = Config(retries={"mode": "standard", "total_max_attempts": 3}, connect_timeout=10, read_timeout=60)
        client = boto3.client("s3", config=patient)
        parts = TransferConfig(multipart_threshold=64 << 20, multipart_chunksize=64 << 20, max_concurrency=4)
        files = sorted(p for p in checkpoint.iterdir() if p.name != MANIFEST) + [checkpoint / MANIFEST]
        for file in files:
            key = self._key(f"{checkpoint.name}/{file.name}")
            client.upload_file(str(file), self.bucket, key, Config=parts)
            there = client.head_object(Bucket=self.bucket, Key=key)["ContentLength"]
            if there != file.stat().st_size:
                raise OSError(f"{key} has {there} bytes there, {file.stat().st_size} here")
        client.put_object(Bucket=self.bucket, Key=self._key("latest"), Body=f"{checkpoint.name}\n".encode())

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name


def may_pass(error: BaseException | None) -> bool:
    """Whether it is worth while to try again: not after a refusal, such as wrong credentials or no such bucket."""
    from botocore.exceptions import ClientError, NoCredentialsError

    while error is not None:
        if isinstance(error, NoCredentialsError):
            return False
        if isinstance(error, ClientError):
            status = error.response["ResponseMetadata"].get("HTTPStatusCode", 500)
            return status >= 500 or status in (408, 429)
        error = error.__cause__ or error.__context__
    return True
