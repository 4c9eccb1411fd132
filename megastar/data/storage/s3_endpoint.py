"""Checks the URLs of the S3 endpoint and of a proxy before anything parses them.

A password with an unescaped ``/``, ``#``, ``?`` or space ends up in the host, port or path of a URL, and from there in
messages of boto3 and urllib3.
"""

from __future__ import annotations

import os
import re
import urllib.request
from collections.abc import Iterator
from typing import Any

from megastar.errors import UserError

_USERINFO = r"(?:(?:[\w.~!$&'()*+,;=:-]|%[0-9A-Fa-f]{2})*@)?"
_HOST = r"(?:[\w.-]+|\[[0-9A-Fa-f:.]+(?:%25[\w.-]+)?\])(?::\d{1,5})?"
_REST = r"(?:[/?#][^@\s\"'<>\\^`{|}]*)?"
_ENDPOINT = re.compile(rf"https?://{_USERINFO}{_HOST}{_REST}", re.I)
_PROXY = re.compile(rf"(?:[a-z][a-z0-9+.-]*://)?{_USERINFO}{_HOST}{_REST}", re.I)


def check_endpoint(session: Any) -> None:
    """Raise ``UserError``, without the value, if the endpoint that the botocore ``session`` finds for S3, or a proxy to
    it, is not a URL with an escaped user and password."""
    name, url = next(_configured(session), ("", ""))
    _check(name, url, _ENDPOINT, "http(s)://HOST[:PORT]")
    scheme, _, rest = (url or "https://s3.amazonaws.com").partition("://")
    if urllib.request.proxy_bypass(re.split("[/?#]", rest)[0].rpartition("@")[2]):
        return
    found = urllib.request.getproxies()
    for key in (scheme.lower(), "all"):
        if key in found:
            _check(f"{key.upper()}_PROXY", found[key], _PROXY, "http://HOST:PORT")
            return


def _check(name: str, url: str, form: re.Pattern[str], example: str) -> None:
    if url and not form.fullmatch(url):
        raise UserError(
            f"{name} is not a URL of the form {example}; its value is not shown, because it may contain a password: write "
            "special characters of a user or password as percent codes (/ as %2F, # as %23, ? as %3F, @ as %40, % as %25, "
            "a space as %20)"
        )


def _configured(session: Any) -> Iterator[tuple[str, str]]:
    """(name, URL) of the settings of the endpoint, in botocore's order; the first one is used."""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        if url := os.environ.get(name):
            yield name, url
    profile, full = session.get_scoped_config(), session.full_config
    services = full.get("services", {}).get(profile.get("services", ""), {}).get("s3", {})
    for section in (services, profile):
        if isinstance(section, dict) and (url := section.get("endpoint_url")):
            yield f"endpoint_url in {os.environ.get('AWS_CONFIG_FILE', '~/.aws/config')}", str(url)
