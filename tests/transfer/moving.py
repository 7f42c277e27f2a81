"""What the tests of whole transfers share: two tiny bases, a recipe, runs that are stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tiny

from lorazip.eval import session
from lorazip.transfer import assess, job, recipe_table

SEEDS = ("kzwqma", "plovec", "trinqa", "zubbel", "mocarf", "dinfet")


SETTINGS: dict[str, dict[str, Any]] = {
    "inputs": {"count": 72, "shots": 3, "definition": "spell"},
    "filter": {"kind": "none"},
    "label": {"new_tokens": 24},
    "train": {"epochs": 2, "learning_rates": [1e-2], "batch": 2, "held_out": 0.2},
    "gate": {"shots": 2},
}


@dataclass(frozen=True)
class Place:
    """Two bases, an adapter of the first, seeds, and a labelled task of the adapter."""

    source: Path
    target: Path
    adapter: Path
    seeds: Path
    tests: Path

    def tables(self, **more: dict[str, Any]) -> dict[str, Any]:
        tables: dict[str, Any] = {
            "source": {"base": str(self.source), "adapter": str(self.adapter), "template": tiny.TEMPLATE},
            "target": {"base": str(self.target)},
            "inputs": {"seeds": str(self.seeds)},
        }
        for name, table in [*SETTINGS.items(), *more.items()]:
            tables[name] = tables.get(name, {}) | table
        return tables


def run(
    place: Place, output: Path, *, tables: dict[str, Any] | None = None, **options: Any
) -> list[job.Moved]:
    engine = session.engine("hf", "float32", "cpu")
    options = {"accept_worse": True} | options
    table = options.pop("table", None)
    parsed = recipe_table.recipes_of(tables or place.tables(), table)
    found = job.move(parsed, output, engine=engine, many=table is not None, **options)
    if table is None and found[0].error is not None:
        raise found[0].error
    return found


def with_training(place: Place, folder: Path) -> tuple[Path, list[dict[str, Any]]]:
    """The labelled task with a train split, and its rows."""
    rows = [json.loads(line) for line in place.tests.read_text().splitlines()]
    for row in rows[:8]:
        row["split"] = "train"
    (folder / "ant.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "ant.jsonl", rows


class Stopped(BaseException):
    """A kill: nothing may catch it."""


def stopping(when: Callable[[str, int], bool]) -> Callable[..., None]:
    def progress(what: str, done: int, total: int, note: str = "") -> None:
        if when(what, done):
            raise Stopped

    return progress


def refusing(judge: Callable[..., assess.Judged]) -> Callable[..., assess.Judged]:
    return lambda measure, scored: replace(judge(measure, scored), refused="it is a test")
