"""Fixtures of the tests of whole evaluations and of bench."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import tiny
from evaluating import NAMES, RIGHT, N
from handmade import MakeAdapter
from serving import MODULES, STUB, make_base

import lorazip
from lorazip.eval import serve


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four adapters, a task for each, a bundle that loses nothing and one that loses most, and a filled cache."""
    root = tmp_path_factory.mktemp("world")
    tiny.make_base(root / "base")
    adapters = tiny.make_adapters(root / "zoo", NAMES)
    tiny.make_tasks(root / "tasks", root / "base", adapters, N, RIGHT / N)
    everything = lorazip.Spec("svd", rank=8, dtype="float32")
    lorazip.compress([str(root / "zoo")], everything, root / "whole")
    lorazip.compress([str(root / "zoo")], lorazip.Spec("jd-full", rank=2), root / "poor")
    return root


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, three adapters of different ranks, a bundle of them."""
    root = tmp_path_factory.mktemp("shop")
    make_base(root / "model")
    make = MakeAdapter(root)
    make("adapters/ant", modules=MODULES)
    make("adapters/bee", modules=MODULES, rank=2, use_rslora=True)
    make("adapters/cat", modules=MODULES, rank=9)
    lorazip.compress([str(root / "adapters")], lorazip.Spec(), root / "team.lorazip")
    return root


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replace the worker; returns the log of what it was asked."""
    (tmp_path / "stub.py").write_text(STUB)
    log = tmp_path / "log"
    log.touch()
    monkeypatch.setenv("STUB_LOG", str(log))
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "40")
    monkeypatch.setattr(serve, "WORKER", (sys.executable, "-S", str(tmp_path / "stub.py")))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "here")
    return log
