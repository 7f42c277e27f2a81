"""One adapter on its way: what goes in, the folder of its stages, and what each of them came to.

A stage's result is named by a digest of all that it depends on, the digest of the stage before among it. It is found
again by that name, so a killed job goes on where it stopped, and a changed option redoes what depends on it and nothing
else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorazip.errors import LorazipError, TargetError
from lorazip.eval.backend import HasFactors
from lorazip.files import write_bytes
from lorazip.transfer.recipe import Recipe

STATE = "state.json"
STAGES = ("probe", "synthesise", "filter", "label", "train", "evaluate", "gate")


@dataclass
class Move:
    """One transfer of a job.

    Attributes:
        name: of the adapter, unique in the job.
        recipe: its own.
        adapter: what is moved.
        digest: of the adapter's effect.
        seeds, prompts: the texts that the recipe names.
        work: folder of its stages.
        output: where the result goes.
        failed: why it stopped; None while all is well.
    """

    name: str
    recipe: Recipe
    adapter: HasFactors
    digest: str
    seeds: list[str]
    prompts: list[str]
    work: Path
    output: Path
    failed: LorazipError | None = None
    fresh: set[str] = field(default_factory=set)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Errors that a user is meant to read end this transfer, not the job."""
        try:
            yield
        except LorazipError as error:
            self.failed = error

    def figures(self, stage: str, key: str) -> dict[str, Any] | None:
        """What a stage came to under this key; None where it has to be done."""
        found = self._state().get(stage)
        return found["figures"] if isinstance(found, dict) and found.get("key") == key else None

    def done(self, stage: str, key: str, figures: dict[str, Any]) -> None:
        """Keep what a stage came to. Its files are on disk already."""
        state = self._state() | {stage: {"key": key, "figures": figures}}
        write_bytes(self.work / STATE, (json.dumps(state, indent=1) + "\n").encode())
        self.fresh.add(stage)

    def known(self, stage: str) -> dict[str, Any]:
        """What a stage came to, that this run has brought up to date."""
        found: dict[str, Any] = self._state()[stage]["figures"]
        return found

    def _state(self) -> dict[str, Any]:
        try:
            found = json.loads((self.work / STATE).read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise TargetError(f"{self.work / STATE} cannot be read: {error} (delete the folder)") from error
        return found if isinstance(found, dict) else {}

    def write(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        """Rows as JSON lines in the folder."""
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_bytes(self.work / name, data.encode("utf-8", "surrogatepass"))

    def read(self, name: str) -> list[dict[str, Any]]:
        """Rows that `write` wrote. Raises TargetError."""
        try:
            text = (self.work / name).read_bytes().decode("utf-8", "surrogatepass")
            return [json.loads(line) for line in text.split("\n") if line]
        except (OSError, ValueError) as error:
            raise TargetError(f"{self.work / name} cannot be read: {error} (delete the folder)") from error


def pending(moves: Iterable[Move], stage: str, key: Callable[[Move], str]) -> list[Move]:
    """Those that go on and whose stage has to be done; one whose key cannot be made fails."""
    found = []
    for move in alive(moves):
        with move.guarded():
            if move.figures(stage, key(move)) is None:
                found.append(move)
    return found


def alive(moves: Iterable[Move]) -> list[Move]:
    """Those that go on."""
    return [move for move in moves if move.failed is None]
