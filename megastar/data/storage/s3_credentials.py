"""A boto3 client that finds new credentials when its own have expired."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from typing import Any

from megastar.data.storage.s3_endpoint import check_endpoint

# A store that is not AWS may refuse the checksums that boto3 adds by default.
_CHECKSUMS = {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
EXPIRED = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired")  # a run waits for new ones after these only
_REPLACED = (*EXPIRED, "InvalidAccessKeyId", "InvalidToken", "InvalidClientTokenId")


def error_code(error: BaseException) -> str:
    """The code of an S3 error response, else the empty string."""
    response = getattr(error, "response", None)  # a ClientError's; botocore's errors of a connection have None
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def is_expired(error: BaseException) -> bool:
    return error_code(error) in EXPIRED


class S3Client:
    """``client`` signs with the first credentials that boto3 finds; none: it does not sign.

    ``renew`` replaces it after an error about these credentials. Raises boto3's errors for settings that it cannot use,
    and ``UserError`` for the URL of an endpoint or a proxy with a password that is not escaped.
    """

    def __init__(self, **options: Any):
        self._options, self._lock = options | _CHECKSUMS, threading.Lock()
        self._used = set[tuple[str, ...]]()
        self.generation = 0
        import botocore.session

        self._open(botocore.session.Session())

    def _open(self, session: Any) -> None:
        import boto3
        from botocore import UNSIGNED
        from botocore.config import Config

        check_endpoint(session)
        self.credentials = session.get_credentials()
        self.signed = self.credentials is not None
        options = self._options if self.signed else self._options | {"signature_version": UNSIGNED}
        self.client = boto3.session.Session(botocore_session=session).client("s3", config=Config(**options))

    def renew(self, error: BaseException, generation: int) -> bool:
        """Whether there are other credentials after ``error``, which a request with those of ``generation`` raised."""
        import botocore.session
        from botocore.credentials import CredentialResolver

        if error_code(error) not in _REPLACED or not self.signed:
            return False
        with self._lock:
            if generation != self.generation:  # another thread has found them
                return True
            self._used.add(_values(self.credentials))
            for provider in botocore.session.Session().get_component("credential_provider").providers:
                with suppress(Exception):  # a file that is being written, a missing role
                    if (values := _values(provider.load())) and values not in self._used:
                        session = botocore.session.Session()
                        session.register_component("credential_provider", CredentialResolver([provider]))
                        self._open(session)
                        self.generation += 1
                        return True
        return False

    @property
    def source(self) -> str:
        """Where the credentials are from, for messages."""
        method = getattr(self.credentials, "method", "")
        file = os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")
        places = {
            "env": "the environment (AWS_ACCESS_KEY_ID)",
            "shared-credentials-file": file,
            "iam-role": "the instance role",
            "container-role": "the container's role",
        }
        return places.get(method, method or "unknown origin")


def _values(credentials: Any) -> tuple[str, ...]:
    if credentials is None:
        return ()
    return tuple(credentials.get_frozen_credentials()[:3])
