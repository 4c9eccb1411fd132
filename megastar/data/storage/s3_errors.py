"""What an error response of an S3 server means, and what to do."""

from __future__ import annotations

from typing import Any

from megastar.data.storage.s3_credentials import EXPIRED, error_code
from megastar.utils.redact import redact

_RETRIED = (*EXPIRED, "RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "TooManyRequests")
_ADVICE = {
    "RequestTimeTooSkewed": "the clock of this machine is wrong: set it (chronyc tracking, timedatectl), not the credentials",
    "RequestExpired": "the clock of this machine is wrong: set it (chronyc tracking, timedatectl), not the credentials",
    "SignatureDoesNotMatch": "the secret key does not belong to the access key: correct AWS_SECRET_ACCESS_KEY, or remove a proxy that changes requests",
    "InvalidAccessKeyId": "the server does not know the access key: correct AWS_ACCESS_KEY_ID, or the endpoint (AWS_ENDPOINT_URL_S3)",
    "InvalidToken": "the session token does not belong to the access key: correct or unset AWS_SESSION_TOKEN",
    "InvalidObjectState": "the object is archived (Glacier): restore it (aws s3api restore-object) or copy it to the standard storage class",
    "SecondLevelDomainForbidden": "the server expects the bucket in the host name: set addressing_style = virtual in the s3 section of ~/.aws/config (AWS_CONFIG_FILE)",
    "RequestLimitExceeded": "the account sends too many requests: ask its administrator",
    "NotImplemented": "the server does not implement the request: use another S3 server, or correct the endpoint (AWS_ENDPOINT_URL_S3)",
    "MethodNotAllowed": "the server does not allow the request: correct the endpoint (AWS_ENDPOINT_URL_S3), which may be a website's",
    "AccountProblem": "the account of these credentials is suspended: ask its administrator",
    "InvalidPayer": "the account of these credentials is suspended: ask its administrator",
}
_ADVICE["PathStyleRequestNotAllowed"] = _ADVICE["SecondLevelDomainForbidden"]
_KEYS = ("SignatureDoesNotMatch", "InvalidAccessKeyId", "InvalidToken")
_REGION = (
    "PermanentRedirect",
    "TemporaryRedirect",
    "Redirect",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
)


def permanent_error(error: Any, url: str, bucket: str, endpoint: str, source: str) -> str:
    """The message for a response that a retry does not change, else the empty string.

    ``source`` names the origin of the credentials; empty: the request was not signed.
    """
    found, metadata = error.response["Error"], error.response["ResponseMetadata"]
    code, status = found["Code"], metadata["HTTPStatusCode"]
    text = redact(" ".join(f"{found.get('Message', '')}".split()))[:200]
    if code in _RETRIED or status in (408, 429) or (status >= 500 and status != 501 and code != "NotImplemented"):
        return ""
    if code == "NoSuchBucket":
        return f"bucket {bucket} of {url} does not exist at {endpoint}: correct the URL, or the endpoint (AWS_ENDPOINT_URL_S3)"
    if status == 404:
        return f"{url} does not exist at {endpoint}: upload the whole folder, or correct the URL"
    if status == 412:
        return changed(url)
    region = found.get("Region") or metadata.get("HTTPHeaders", {}).get("x-amz-bucket-region", "")
    if code in _REGION or region:
        where = f"AWS_DEFAULT_REGION={region}" if region else "AWS_DEFAULT_REGION to its region"
        at = f", or AWS_ENDPOINT_URL_S3=https://{redact(found['Endpoint'])}" if found.get("Endpoint") else ""
        return f"{endpoint} rejects the request for {url} ({code}, {text}): the bucket is in another region: correct the region, set {where}{at}"
    advice = _ADVICE.get(code, "")
    if code.startswith("KMS."):
        advice = "its encryption key (KMS) cannot be used: enable it, or let these credentials use it (kms:Decrypt)"
    if "virtual host" in text.lower().replace("-", " "):
        advice = _ADVICE["SecondLevelDomainForbidden"]
    if advice and code in _KEYS:
        return f"{endpoint} denies access to {url} ({code}): use credentials that may read it (those used are from {source}); {advice}"
    if advice:
        return f"{endpoint} rejects the request for {url} ({code}{f', {text}' if text else ''}): {advice}"
    if status in (401, 403):
        if source:
            return f"{endpoint} denies access to {url} ({code}): use credentials that may read it (those used are from {source})"
        return f"{endpoint} denies access to {url} ({code}) and no credentials were found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    return f"{endpoint} rejects the request for {url} ({code}, {text}): correct the URL, the region (AWS_DEFAULT_REGION) or the endpoint (AWS_ENDPOINT_URL_S3)"


def changed(url: str) -> str:
    return f"{url} changed while it was read: restore it, or start a new run on shards that do not change"


def describe(error: BaseException, source: str) -> str:
    """The text of an error after which the request is tried again."""
    if (code := error_code(error)) in EXPIRED:
        return f"the credentials from {source} have expired ({code}): put new ones there"
    return redact(" ".join(f"{error}".split()))[:300] or type(error).__name__
