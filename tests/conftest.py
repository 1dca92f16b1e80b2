"""Settings that must be there before torch and transformers are imported, and the S3 server that several tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

pytest.register_assert_rewrite("places_contract")

import s3_server  # noqa: E402

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(scope="session")
def s3() -> Iterator[int]:
    """The port of an S3 server with an empty bucket `s3_server.BUCKET`."""
    with s3_server.moto() as port:
        yield port


@pytest.fixture(scope="session")
def through(s3: int) -> Iterator[s3_server.Traffic]:
    """A proxy in front of the server, for `traffic`."""
    with s3_server.proxy(s3) as traffic:
        yield traffic


@pytest.fixture
def traffic(through: s3_server.Traffic) -> s3_server.Traffic:
    """What goes through the proxy, from here on, and what is to fail."""
    through.clear()
    return through


@pytest.fixture
def s3_environment(s3: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the environment says of the server."""
    said = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3}", "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1"}
    keys = {"AWS_ACCESS_KEY_ID": s3_server.KEY, "AWS_SECRET_ACCESS_KEY": s3_server.SECRET}
    for name, value in (said | keys).items():
        monkeypatch.setenv(name, value)
