"""Secrets in texts that are printed or recorded."""

from __future__ import annotations

import re

# A password may contain anything, although a URL should have it escaped: all up to the last @ before white space is hidden;
# after "user:" and something that is no port, up to the next @ HOST.
_USERINFO = re.compile(
    r"(?<![a-z0-9+.-])((?!s3:|file:|hf:)[a-z][a-z0-9+.-]*://)"
    r"(?:\S*@|[^\s/@:\[\]]+:(?!\d{1,5}(?![^\s/\"'?#),.;>\]]))[^@\n]{0,80}@(?=[\w\[]))",
    re.I,
)
# In a path of s3:// an @ is common, and in hf://owner/name@revision it is no secret; user and password are not usual: only
# those in front of the bucket or the owner are hidden.
_PATH_USERINFO = re.compile(r"(\w://)(?:[^/\s\"']*|[^/\s:@]*:(?!\d+/)\S*)@")
_QUERY = re.compile(
    r"([?&](?:X-Amz-[\w-]+|AWSAccessKeyId|Signature|\w*(?:token|secret|password|key)\w*)=)[^&\s\"'<>)]+", re.I
)


def redact(text: object) -> str:
    """``text`` without the users and passwords of URLs, escaped or not, and the secret parameters of presigned ones.

    An @ in the path of a URL other than s3://, file:// and hf:// counts as the end of a password.
    """
    return _QUERY.sub(r"\1***", _PATH_USERINFO.sub(r"\1***@", _USERINFO.sub(r"\1***@", f"{text}")))
