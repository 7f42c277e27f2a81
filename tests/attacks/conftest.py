"""Fixtures of the attacks: a process that forks commands with faults, and two small sets of adapters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import SHAPES
from handmade import MakeAdapter
from nursery import Nursery


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    forking = Nursery()
    yield forking
    forking.close()


@pytest.fixture
def zoo(make_adapter: MakeAdapter) -> Path:
    """Two small adapters of two modules, so that a command has few steps."""
    for name in ("ant", "bee"):
        make_adapter(f"zoo/{name}", modules=SHAPES, rank=2)
    return make_adapter.root / "zoo"


@pytest.fixture
def more(make_adapter: MakeAdapter) -> Path:
    """Two adapters to add; one has a module that no other has."""
    make_adapter("more/cat", modules=SHAPES, rank=2)
    make_adapter("more/dog", modules={**SHAPES, "model.layers.0.mlp.up_proj": (32, 24)}, rank=2)
    return make_adapter.root / "more"
