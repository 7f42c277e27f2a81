"""One adapter on its way: what goes in, the folder of its stages, and what each of them came to.

A stage's result is named by a digest of all that it depends on, the digest of the stage before among it. It is found
again by that name, so a killed job goes on where it stopped, and a changed option redoes what depends on it. A file of
rows has that name in its first line: of two runs with other options the second may have been killed between the file
and the word that the stage is done.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lorazip.errors import LorazipError, TargetError
from lorazip.eval.backend import HasFactors
from lorazip.eval.backend import digest as effect
from lorazip.files import write_bytes
from lorazip.transfer import discriminator
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
        spared: stages whose rows nobody will read in this run, for what was made of them is there.
        current: stages that this run did, or found done.
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
    spared: set[str] = field(default_factory=set)
    current: set[str] = field(default_factory=set)

    @cached_property
    def judge(self) -> str:
        """Digest of its discriminator's effect: another may lie at the same place in a later run."""
        return effect(discriminator.read(Path(self.recipe.filter.discriminator)).adapter)

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
        self.current.add(stage)

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

    def write(self, name: str, key: str, rows: Iterable[dict[str, Any]]) -> None:
        """Rows as JSON lines in the folder, after a line with their key."""
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ({"key": key}, *rows))
        write_bytes(self.work / name, data.encode("utf-8", "surrogatepass"))

    def holds(self, name: str, key: str) -> bool:
        """Whether `write` wrote rows of this key, and nothing since."""
        try:
            with (self.work / name).open("rb") as file:
                return bool(json.loads(file.readline(1024)) == {"key": key})
        except (OSError, ValueError):
            return False

    def read(self, name: str, key: str) -> list[dict[str, Any]]:
        """Rows that `write` wrote. Raises TargetError."""
        path, rows = self.work / name, []
        try:
            rows = [
                json.loads(line)
                for line in path.read_bytes().decode("utf-8", "surrogatepass").split("\n")
                if line
            ]
        except (OSError, ValueError) as error:
            raise self.damaged(name, str(error)) from error
        if not rows or rows[0] != {"key": key} or not all(isinstance(row, dict) for row in rows):
            raise self.damaged(name, "it holds other rows than were written")
        return rows[1:]

    def damaged(self, name: str, why: str) -> TargetError:
        """A file of rows is not what was written; without it the next run makes it again."""
        return TargetError(f"{self.work / name} cannot be read: {why} (delete it, and run again)")


def pending(
    moves: Iterable[Move], stage: str, key: Callable[[Move], str], file: str | None = None
) -> list[Move]:
    """Those that go on and whose stage has to be done; one whose key cannot be made fails.

    Args:
        file: of its rows; where these are gone or others, the stage is done again, unless it is spared.
    """
    found = []
    for move in alive(moves):
        with move.guarded():
            name = key(move)
            done = move.figures(stage, name) is not None
            if not done or not (file is None or stage in move.spared or move.holds(file, name)):
                found.append(move)
            else:
                move.current.add(stage)
    return found


def alive(moves: Iterable[Move]) -> list[Move]:
    """Those that go on."""
    return [move for move in moves if move.failed is None]
