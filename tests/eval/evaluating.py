"""What the tests of whole evaluations share: how one is asked for, and what of it is compared."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import lorazip
from lorazip.base import load_tokenizer
from lorazip.cli import main
from lorazip.eval import job
from lorazip.eval.backend import Greedy, Written
from lorazip.eval.results import Results
from lorazip.eval.session import Engine
from lorazip.eval.spec import EvalSpec
from lorazip.eval.transformers_backend import TransformersBackend

NAMES = ("ant", "bee", "cat", "dog")
N, RIGHT = 24, 18  # examples of a task, and how many the original gets right
CPU = torch.device("cpu")
ENGINE = Engine("hf", torch.float32, CPU)
SPEC = EvalSpec(template=tiny.TEMPLATE)


def evaluate(world: Path, spec: EvalSpec = SPEC, **changes: Any) -> Results:
    """By the library; answers are kept in a cache of the module."""
    arguments: dict[str, Any] = {
        "adapters": [str(world / "zoo")],
        "bundles": [world / "whole", world / "poor"],
        "cache": world / "cache",
        "backend": ENGINE,
        "spec": spec,
    }
    arguments |= changes
    sources = arguments.pop("tasks", [str(world / "tasks")])
    return job.evaluate(str(arguments.pop("base", world / "base")), sources, **arguments)


def command(world: Path, *options: str | Path | int, bundles: Sequence[str] = ("whole", "poor")) -> int:
    """By the command line; returns its exit code."""
    arguments = ["eval", "--backend", "hf", "--base", world / "base", "--tasks", world / "tasks", "--adapters",
                 world / "zoo", "--cache", world / "cache", "--template", tiny.TEMPLATE]  # fmt: skip
    for bundle in bundles:
        arguments += ["--bundle", world / bundle]
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in (*arguments, *options)])
    assert isinstance(end.value.code, int)
    return end.value.code


def scores(found: Results, metric: str, arm: str) -> dict[tuple[str, str | None], float]:
    return {(r.task, r.adapter): r.score for r in found.rows if (r.metric, r.arm) == (metric, arm)}


def written(world: Path, calls: Sequence[Greedy]) -> list[Written]:
    """What originals and the poor bundle's adapters write, asked without cache or session."""
    members = [tiny.acting(a, "poor") for a in lorazip.Bundle.open(world / "poor")]
    actings = [*(tiny.opened(world / "zoo" / name) for name in NAMES), *members]
    tokenizer = load_tokenizer(world / "base")
    backend = TransformersBackend(world / "base", tokenizer, actings, dtype=torch.float32, device=CPU)
    found = dict(backend.run(calls))
    return [one for i in range(len(calls)) if isinstance(one := found[i], Written)]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def examples(world: Path, name: str) -> list[dict[str, Any]]:
    """Those that are scored."""
    return [row for row in lines(world / "tasks" / f"{name}.jsonl") if row["split"] == "test"]


KILLED_SPEC = dataclasses.replace(SPEC, limit=6, agreement=True, new_tokens=8)


def sessions_saved(n: int) -> None:
    """Keep answers more often, so that a small run has much to lose."""
    from lorazip.eval import session

    session.SAVED = n


def assert_same(found: Any, wanted: Any, close: float = 1e-4) -> None:
    """But for the cost and for rounding: what is asked again is asked in other batches; padding moves last bits."""
    if isinstance(wanted, dict):
        assert set(found) == set(wanted)
        for name in set(wanted) - {"cost"}:
            assert_same(found[name], wanted[name])
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other)
    else:
        assert found == (pytest.approx(wanted, abs=close) if isinstance(wanted, float) else wanted)
