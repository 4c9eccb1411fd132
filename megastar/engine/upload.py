"""Copies of complete checkpoints in S3, made while training goes on. boto3 does the talking and the retries.

Credentials, region and endpoint come from where boto3 looks for them (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL_S3, ...).
"""

from __future__ import annotations

import threading
from pathlib import Path

from megastar.data.s3 import split_url
from megastar.engine.state_files import MANIFEST


class Uploader:
    """One upload at a time, in a thread. A newer checkpoint replaces one that still waits its turn.

    The manifest goes last and then the object ``latest``, so what a reader finds complete is complete. An outage never
    stops the training: ``problem`` holds the last failure until an upload succeeds. Nothing in S3 is ever removed.
    """

    def __init__(self, url: str):
        self.url = url
        self.bucket, self.prefix = split_url(url)
        self.waiting: Path | None = None
        self.thread: threading.Thread | None = None
        self.lock = threading.Lock()
        self.uploaded: list[str] = []
        self.problem = ""

    def put(self, checkpoint: Path) -> None:
        """Upload ``checkpoint`` as soon as the upload under way, if any, has ended."""
        with self.lock:
            self.waiting = checkpoint
            if self.thread is None:
                self.thread = threading.Thread(target=self._work, daemon=True)
                self.thread.start()

    def finish(self) -> str:
        """Wait for what was put; returns the last problem, or the empty string."""
        while thread := self.thread:
            thread.join()
        return self.problem

    def _work(self) -> None:
        while True:
            with self.lock:
                checkpoint, self.waiting = self.waiting, None
                if checkpoint is None:
                    self.thread = None
                    return
            try:
                self._upload(checkpoint)
                self.problem = ""
                self.uploaded.append(checkpoint.name)
            except Exception as error:  # whatever it is, the run and its local checkpoints are fine
                self.problem = (
                    f"{checkpoint.name} was not uploaded to {self.url} ({error}); it is whole in {checkpoint}"
                )

    def _upload(self, checkpoint: Path) -> None:
        import boto3
        from boto3.s3.transfer import TransferConfig
        from botocore.config import Config

        patient = Config(retries={"mode": "adaptive", "max_attempts": 10}, connect_timeout=10, read_timeout=60)
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
