"""Errors of reading shards."""

from __future__ import annotations

from megastar.errors import UserError


class CacheFull(UserError):
    """The disk of the cache cannot take a shard: it is full, read-only or failing."""


class StoreUnreachable(UserError):
    """The store sent nothing for as long as ``data.patience`` allows."""


class Stopped(Exception):
    """The caller cancelled the read."""
