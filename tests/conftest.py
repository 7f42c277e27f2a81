"""The fixture that nearly all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from handmade import MakeAdapter

# Before anything imports huggingface_hub: no test asks the network.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture
def make_adapter(tmp_path: Path) -> MakeAdapter:
    """Write small PEFT adapters below tmp_path: `make_adapter("zoo/a", rank=2)`."""
    return MakeAdapter(tmp_path)
