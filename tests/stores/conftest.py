"""What all tests of stores share: how many examples hypothesis tries, and that no test leaves a writer open."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import pytest
import strategies
from hypothesis import settings

# `pytest --hypothesis-profile=thorough` takes minutes instead of seconds.
settings.register_profile("quick", deadline=None, max_examples=40)
settings.register_profile("thorough", deadline=None, max_examples=1000)
settings.load_profile("quick")


@pytest.fixture(autouse=True)
def close_writers() -> Iterator[None]:
    """Otherwise writers close at exit, when the folders of their runs are gone."""
    yield
    while strategies.opened:
        with suppress(Exception):
            strategies.opened.pop().close()
