"""Fixtures of the attacks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from nursery import Nursery


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """Runs commands in processes that fail at a chosen step."""
    forking = Nursery()
    yield forking
    forking.close()
