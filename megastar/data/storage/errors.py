"""Errors of reading shards."""

from __future__ import annotations

from megastar.errors import UserError


class CacheFull(UserError):
    """The disk of the cache takes no shard: it is full, read-only or lost."""


class OutOfReach(UserError):
    """The store did not answer for as long as it may."""


class Stopped(Exception):
    """The reading was ended from outside."""
