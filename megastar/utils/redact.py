"""Secrets in texts that are printed or recorded."""

from __future__ import annotations

import re

# The second form: a password with a slash or a quote in it, which a URL should not have.
_USERINFO = re.compile(r"(\w://)(?:[^/\s\"']*|[^/\s:@]*:(?!\d+/)\S*)@")
_QUERY = re.compile(
    r"([?&](?:X-Amz-[\w-]+|AWSAccessKeyId|Signature|\w*(?:token|secret|password|key)\w*)=)[^&\s\"'<>)]+", re.I
)


def redact(text: object) -> str:
    """``text`` without the users and passwords of URLs and the secret parameters of presigned ones."""
    return _QUERY.sub(r"\1***", _USERINFO.sub(r"\1***@", f"{text}"))
