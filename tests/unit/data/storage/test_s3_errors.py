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
from megastar.engine.checkpointer.s3_upload import Uploader, check_upload, is_retryable
from megastar.errors import UserError
from megastar.run_dir.events import append_event, read_events
from megastar.utils.redact import redact

URL, ENDPOINT = "s3://bucket/a.tar", "http://store:1"


def answer(status: int, code: str, message: str = "", headers: dict | None = None, **more: str) -> ClientError:
    metadata = {"HTTPStatusCode": status, "HTTPHeaders": headers or {}}
    return ClientError({"Error": {"Code": code, "Message": message, **more}, "ResponseMetadata": metadata}, "GetObject")


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
        (answer(400, "KMS.DisabledException"), "its encryption key (KMS) cannot be used"),
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
        ("s3://bucket/a@b and s3://key:se/cret@b/c", "s3://bucket/a@b and s3://***@b/c"),
        ("s3://bucket/a:b@c", "s3://bucket/a:b@c"), ("file:///a/b@c", "file:///a/b@c"),
        ("http://h:9000/a, by me@here", "http://h:9000/a, by me@here"), ("http://h:9, me@here", "http://h:9, me@here"),
        ("http://[::1]:9 me@here", "http://[::1]:9 me@here"), ("http://HOST:PORT; @ is %40", "http://HOST:PORT; @ is %40"),
        ("megastar sample hf://owner/name@v9: no", "megastar sample hf://owner/name@v9: no"),
        ("hf://us:p4ss@owner/name@v9 and HF://p4ss@owner", "hf://***@owner/name@v9 and HF://***@owner"),
        ("hf://a/b@v1,https://us:p4ss@h and hf://a/b@c/d", "hf://a/b@v1,https://***@h and hf://a/b@c/d"),
        # In these an @ in the path may end a password with a slash.
        ("http://h/a@b", "http://***@b"), ("http://h:9000/a@b", "http://***@b"),
        ("at https://u:12/3@h:9 now", "at https://***@h:9 now"), ("https://u:1?2#3@h/x", "https://***@h/x"),
        ("https://token/with+slash@h", "https://***@h"), ("https://u:p ss@h/b", "https://***@h/b"),
        ("https://u:12a 3@h/b", "https://***@h/b"), ("socks5h://u:a@b@c/d@proxy:1", "socks5h://***@proxy:1"),
        ('{"url": "https://u:12/3@h"}', '{"url": "https://***@h"}'),
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


SECRET = "12/p4ss"
BAD = [f"https://u:{SECRET}@h", "https://u:12#p4ss@h:9", "https://u:12?p4ss@h", "https://u:1 p4ss@h", "u:p4ss@h:9000",
       "https://u:12%p4ss@h", "https://u:p4ss", "https://u:p4ss@a@h", "ftp://u:p4ss@h", "https://u:1\\p4ss@h",
       "https://u:'p4ss\"@h", "https://u:p4ss@h:port", "https://u:12\np4ss@h"]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "url"),
    [("AWS_ENDPOINT_URL_S3", url) for url in BAD]
    + [
        ("AWS_ENDPOINT_URL", BAD[0]),
        ("HTTPS_PROXY", BAD[0]),
        ("HTTPS_PROXY", BAD[3]),
        ("config", BAD[0]),
        ("services", BAD[2]),
    ],
)
@pytest.mark.usefixtures("keys")
def test_an_endpoint_whose_password_is_not_escaped_is_refused_without_its_value(
    monkeypatch, tmp_path, caplog, name, url
):
    for other in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(other, raising=False)
    if name.isupper():
        monkeypatch.setenv(name, url)
    else:
        place = f"endpoint_url = {url}"
        text = (
            f"[default]\nregion = x\n{place}\n"
            if name != "services"
            else f"[default]\nregion = x\nservices = here\n[services here]\ns3 =\n    {place}\n"
        )
        (tmp_path / "config").write_text(text)
        monkeypatch.setenv("AWS_CONFIG_FILE", name := str(tmp_path / "config"))
    for use in (lambda: S3Folder("s3://bucket/p"), lambda: check_upload("s3://bucket/p")):
        with pytest.raises(UserError) as raised:
            use()
        assert name in str(raised.value) and "percent codes (/ as %2F" in str(raised.value)
        assert not any(part in f"{raised.value}{caplog.text}" for part in ("p4ss", "12/", "12#"))
    uploader = Uploader("s3://bucket/p")
    (tmp_path / "step-00000001").mkdir()
    uploader.put(tmp_path / "step-00000001")
    assert "percent codes" in uploader.finish() and "p4ss" not in f"{uploader.problem}{uploader.take_events()}"


@pytest.mark.parametrize(
    "url",
    [
        "https://u:12%2Fp%40ss@h.example:9000/base/path",
        "http://[::1]:9000",
        "https://s3.eu-west-1.amazonaws.com",
        "http://a-b:1/",
    ],
)
@pytest.mark.usefixtures("keys")
def test_endpoints_that_are_urls_are_used(monkeypatch, url):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", url)
    monkeypatch.setenv("HTTP_PROXY", "u:p%20w@proxy:3128")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy")
    assert S3Folder("s3://bucket/p").endpoint == redact(url)


@pytest.mark.usefixtures("keys")
def test_a_proxy_that_is_not_used_for_the_endpoint_is_not_checked(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://store:1")
    monkeypatch.setenv("HTTPS_PROXY", "http://u:1/p4ss@proxy")
    assert S3Folder("s3://bucket/p").endpoint == "http://store:1"
    monkeypatch.setenv("HTTP_PROXY", "http://u:1/p4ss@proxy")
    with pytest.raises(UserError, match="HTTP_PROXY is not a URL"):
        S3Folder("s3://bucket/p")
    monkeypatch.setenv("NO_PROXY", "store")
    assert S3Folder("s3://bucket/p").endpoint == "http://store:1"


# Credentials that expire -------------------------------------------------------------------------------------------
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
