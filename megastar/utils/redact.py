"""Secrets in texts that are printed or recorded."""

from __future__ import annotations

import re

_USERINFO = re.compile(r"(\w://)[^/\s\"']*@")
_QUERY = re.compile(
    r"([?&](?:X-Amz-[\w-]+|AWSAccessKeyId|Signature|\w*(?:token|secret|password|key)\w*)=)[^&\s\"'<>)]+", re.I
)


def redact(text: object) -> str:
    """``text`` without the users and passwords of URLs and the secret parameters of presigned ones."""
    return _QUERY.sub(r"\1***", _USERINFO.sub(r"\1***@", f"{text}"))
