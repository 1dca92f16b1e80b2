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
