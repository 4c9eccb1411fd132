"""Signed values in the ranks' key-value store: only ranks of the same launch can write them (docs/security.md)."""

from __future__ import annotations

import hmac
import logging
from typing import Any

MAC_BYTES = 32

logger = logging.getLogger(__name__)


class SignedStore:
    """Signs what it writes to ``store`` with the launch's ``secret``, and ignores what is not signed for its key."""

    def __init__(self, store: Any, secret: bytes):
        self.store, self.secret = store, secret
        self.forged: set[str] = set()  # keys that held a foreign value when they were last read
        self._warned = False

    def set(self, key: str, value: str | bytes) -> None:
        raw = value.encode() if isinstance(value, str) else value
        self.store.set(key, self._mac(key, raw) + raw)

    def delete_key(self, key: str) -> None:
        self.store.delete_key(key)

    def check(self, keys: list[str]) -> bool:
        return bool(self.store.check(keys))

    def get_all(self, keys: list[str]) -> dict[str, bytes]:
        """The values of existing ``keys`` that a rank of this launch has written."""
        found = {}
        for key, signed in zip(keys, map(bytes, self.store.multi_get(keys)), strict=True):
            mac, raw = signed[:MAC_BYTES], signed[MAC_BYTES:]
            if hmac.compare_digest(mac, self._mac(key, raw)):
                found[key] = raw
                self.forged.discard(key)
                continue
            self.forged.add(key)
            if not self._warned:
                self._warned = True
                logger.warning(
                    "ignoring a value of %s in the ranks' store that no rank of this run has written: another process "
                    "uses its port, see docs/security.md", key,
                )  # fmt: skip
        return found

    def _mac(self, key: str, raw: bytes) -> bytes:
        return hmac.digest(self.secret, f"{key}\n".encode() + raw, "sha256")
