"""The advice of S3 errors, secrets in them, and credentials that expire."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from botocore.exceptions import ClientError, ConnectionClosedError, EndpointConnectionError

from megastar.config.load import load_config
from megastar.data.storage import s3_client
from megastar.data.storage.errors import StoreUnreachable
from megastar.data.storage.s3_client import S3Folder
from megastar.data.storage.s3_credentials import S3Client
from megastar.data.storage.s3_errors import permanent_error
from megastar.engine.checkpointer.s3_upload import is_retryable
from megastar.errors import UserError
from megastar.run_dir.events import append_event, read_events
from megastar.utils.redact import redact

URL, ENDPOINT = "s3://bucket/a.tar", "http://store:1"


def answer(status: int, code: str, message: str = "", headers: dict | None = None, **more: str) -> ClientError:
    metadata = {"HTTPStatusCode": status, "HTTPHeaders": headers or {}}
    return ClientError({"Error": {"Code": code, "Message": message, **more}, "ResponseMetadata": metadata}, "GetObject")


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (answer(403, "RequestTimeTooSkewed", "too large"), "the clock of this machine is wrong: set it"),
        (answer(403, "SignatureDoesNotMatch"), "correct AWS_SECRET_ACCESS_KEY"),
        (answer(403, "InvalidAccessKeyId"), "correct AWS_ACCESS_KEY_ID"),
        (answer(400, "InvalidToken"), "correct or unset AWS_SESSION_TOKEN"),
        (answer(403, "InvalidObjectState"), "is archived (Glacier): restore it"),
        (answer(403, "SecondLevelDomainForbidden", "Please use virtual hosted style"), "set addressing_style = virtual"),
        (answer(400, "InvalidRequest", "use virtual-host style"), "set addressing_style = virtual"),
        (answer(400, "KMS.DisabledException"), "the key of its encryption (KMS) cannot be used"),
        (answer(400, "AuthorizationHeaderMalformed", Region="eu-west-1"), "set AWS_DEFAULT_REGION=eu-west-1"),
        (answer(301, "PermanentRedirect", headers={"x-amz-bucket-region": "eu-1"}, Endpoint="b.s3.eu-1.x"), "set AWS_DEFAULT_REGION=eu-1, or AWS_ENDPOINT_URL_S3=https://b.s3.eu-1.x"),
        (answer(501, "NotImplemented", "Transfer-Encoding"), "the server does not implement the request"),
        (answer(405, "MethodNotAllowed"), "the server does not allow the request"),
        (answer(403, "AccessDenied"), "use credentials that may read it (those used are from ~/keys)"),
        (answer(400, "InvalidArgument", "why"), "(InvalidArgument, why): correct the URL, the region"),
    ],
)  # fmt: skip
def test_the_advice_fits_the_error(error, advice):
    assert advice in permanent_error(error, URL, "bucket", ENDPOINT, "~/keys") and not is_retryable(error)


@pytest.mark.parametrize(("status", "code"), [(400, "ExpiredToken"), (403, "ExpiredToken"), (503, "SlowDown"), (500, "X"), (429, "X")])  # fmt: skip
def test_errors_that_pass_by_themselves_are_waited_for(status, code):
    error = answer(status, code)
    assert permanent_error(error, URL, "bucket", ENDPOINT, "") == "" and is_retryable(error)


def test_secrets_are_not_shown(monkeypatch, tmp_path):
    for text, safe in (
        ("https://user:p4ss@host:1/b?x=1", "https://***@host:1/b?x=1"),
        ("to https://us:p@ss@h/b", "to https://***@h/b"),
        ('"http://h/b?X-Amz-Signature=ab12&X-Amz-Credential=AK%2F1&n=2"', '"http://h/b?X-Amz-Signature=***&X-Amz-Credential=***&n=2"'),
        ("http://h/?AWSAccessKeyId=AK&Signature=s%3D", "http://h/?AWSAccessKeyId=***&Signature=***"),
        ("s3://bucket/a@b and http://h/a@b", "s3://bucket/a@b and http://h/a@b"),
        ("http://h:9000/a@b", "http://h:9000/a@b"), ("s3://bucket/a:b@c", "s3://bucket/a:b@c"),
        ("at https://user:pa/ss@host:9, gone", "at https://***@host:9, gone"),
        ("at https://user:it's@host", "at https://***@host"),
    ):  # fmt: skip
        assert redact(text) == safe
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://user:p4ss@127.0.0.1:9")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    said: list[str] = []
    folder = S3Folder("s3://bucket/p", patience=0.0, report=said.append)
    assert folder.endpoint == "http://***@127.0.0.1:9"
    error = EndpointConnectionError(endpoint_url="http://user:p4ss@127.0.0.1:9/bucket?X-Amz-Signature=p4ss")
    timer = folder.timer("a.tar", threading.Event())
    timer.failed(folder.describe(error))
    with pytest.raises(UserError) as raised:
        timer._progress_at -= 100
        timer.tick()
    assert "p4ss" not in str(raised.value) and "Could not connect" in str(raised.value)
    append_event(tmp_path, "warning", 1, f"{error}", command="megastar train data.shards=http://user:p4ss@h/x")
    assert "p4ss" not in str(read_events(tmp_path))


# Credentials that expire -------------------------------------------------------------------------------------------
@pytest.fixture
def keys(tmp_path, monkeypatch) -> Path:
    """A credentials file with the key OLD."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "credentials"
    values = {"AWS_SHARED_CREDENTIALS_FILE": path, "AWS_CONFIG_FILE": "/dev/null", "AWS_EC2_METADATA_DISABLED": "true"}
    values |= {"AWS_ENDPOINT_URL_S3": ENDPOINT, "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    write_key(path, "OLD")
    return path


def write_key(path: Path, key: str) -> None:
    path.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = s\n")


def key_of(aws: S3Client) -> str:
    return aws.credentials.access_key


def test_new_credentials_are_found_in_a_file(keys):
    aws, expired = S3Client(), answer(400, "ExpiredToken")
    assert key_of(aws) == "OLD" and aws.source == str(keys)
    assert not aws.renew(expired, 0)  # the same ones
    assert not aws.renew(answer(403, "AccessDenied"), 0)
    write_key(keys, "NEW")
    assert aws.renew(expired, 0) and key_of(aws) == "NEW" and aws.generation == 1
    assert aws.renew(expired, 0) and aws.generation == 1  # of a request with the old ones
    assert not aws.renew(expired, 1)
    write_key(keys, "OLD")
    assert not aws.renew(expired, 1)  # which have expired


def test_a_file_is_used_when_those_of_the_environment_have_expired(keys, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "ENV")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    aws = S3Client()
    assert key_of(aws) == "ENV" and "environment" in aws.source
    assert aws.renew(answer(403, "ExpiredToken"), 0) and key_of(aws) == "OLD"


def test_expired_credentials_are_waited_for_and_named(keys, monkeypatch):
    monkeypatch.setattr(s3_client, "_LONGEST_PAUSE", 0.05)
    folder = S3Folder("s3://bucket/p", patience=120.0, report=lambda _: None)

    def request() -> str:
        if key_of(folder.aws) == "OLD":
            raise answer(400, "ExpiredToken", "The provided token has expired.")
        return "done"

    threading.Timer(0.3, write_key, (keys, "NEW")).start()
    assert folder._call("a", folder.timer("a"), request) == "done"
    write_key(keys, "OLD")
    folder = S3Folder("s3://bucket/p", patience=0.5, report=lambda _: None)
    with pytest.raises(
        StoreUnreachable, match=rf"last error: the credentials from {keys} have expired \(ExpiredToken\)"
    ):
        folder._call("a", folder.timer("a"), request)


def test_broken_connections_are_retried(keys, monkeypatch):
    folder, left = S3Folder("s3://bucket/p", patience=120.0, report=lambda _: None), [1, 2]

    def request() -> str:
        if left:
            raise ConnectionClosedError(endpoint_url=ENDPOINT, request=None, error=OSError(left.pop()))
        return "done"

    assert folder._call("a", folder.timer("a"), request) == "done"


def test_checksums_are_left_to_the_server(keys):
    config = S3Client().client.meta.config
    assert config.request_checksum_calculation == config.response_checksum_validation == "when_required"


def test_capitals_in_a_configuration(tmp_path):
    cfg = load_config(None, ["data.shards=S3://b/x", "data.val_shards=S3://b/y", "train.upload=S3://b/z", "run=r"])
    assert cfg.data.shards == "S3://b/x"
