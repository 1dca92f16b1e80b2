"""What tests of analyses share."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context

import pytest


@pytest.fixture(scope="session")
def processes() -> Iterator[Executor]:
    """Two processes of their own, started once: each takes seconds to import everything."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        yield pool
