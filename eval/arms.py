"""The arms of an evaluation: who answers, and which adapter answers which task."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lorazip.adapter import Adapter
from lorazip.bundle import Bundle
from lorazip.compress.check import agree, compare
from lorazip.errors import CheckError, Defect, InputError, UsageError, printable
from lorazip.eval.backend import HasFactors
from lorazip.eval.results import BASE, ORIGINAL, LeftOut
from lorazip.sources import open_adapters

_SCALE = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")  # a bundle has them as they were

Role = Literal["own", "drift"]
_OF_BASE = re.compile(rf"{BASE}(-[0-9]+-shot)?")  # what the base's own arms are called, see `judge.few`


@dataclass(frozen=True)
class Team:
    """The adapters of one arm.

    Attributes:
        name: unique among the arms.
        adapters: by name; only those that are evaluated, once `narrowed`.
        nbytes, original_bytes: on disk, and before compression; the same for adapters that were not compressed.
    """

    name: str
    kind: Literal["original", "bundle"]
    path: str
    adapters: Mapping[str, HasFactors]
    nbytes: int
    original_bytes: int
    bundle: Bundle | None = None

    def directory(self, adapter: str) -> Path | None:
        """Its PEFT directory, if it is one."""
        found = self.adapters[adapter]
        return found.directory if isinstance(found, Adapter) else None


@dataclass(frozen=True, order=True)
class Pair:
    """An adapter, and a task that it answers."""

    task: str
    adapter: str
    role: Role = "own"


def originals(paths: Sequence[str], base: str) -> Team:
    """Uncompressed adapters as an arm.

    Raises:
        InputError: with all defects of all adapters.
    """
    # The base is the user's word here: configs name it by Hub id, and it may lie in a directory.
    adapters = open_adapters(list(paths), base=base).adapters
    nbytes = sum(adapter.nbytes for adapter in adapters)
    return Team(ORIGINAL, "original", " ".join(paths), {a.name: a for a in adapters}, nbytes, nbytes)


def bundles(paths: Sequence[Path]) -> list[Team]:
    """Each bundle as an arm, named by its directory; every byte of them is checked.

    Raises:
        UsageError: two would have one name, or one is missing; BundleError: one is damaged.
    """
    teams: list[Team] = []
    for path in paths:
        bundle = Bundle.open(path)
        bundle.require(bundle.names)
        name = path.resolve().name
        if name in {ORIGINAL, *(team.name for team in teams)} or _OF_BASE.fullmatch(name):
            raise UsageError(f"two arms would be called {printable(name)} (rename the bundle)")
        teams.append(
            Team(
                name,
                "bundle",
                str(path),
                {a.name: a for a in bundle},
                bundle.nbytes,
                bundle.original_bytes,
                bundle,
            )
        )
    return teams


def require_the_same(teams: Sequence[Team], adapters: Sequence[str]) -> None:
    """A bundle's adapters are those originals, compressed: each has the error that the bundle recorded.

    An adapter that was compressed under another's name acts as its factors say, and would only score badly.

    Raises:
        CheckError: naming every adapter that is another than the original of its name.
    """
    given = next((team for team in teams if team.kind == "original"), None)
    if given is None:
        return
    known = [a for name in adapters if isinstance(a := given.adapters[name], Adapter)]
    wrong = []
    for team in teams:
        if team.bundle is None:
            continue
        for original, one in zip(known, compare(team.bundle, known, torch.device("cpu")), strict=True):
            stored = team.adapters[one.name].config
            odd = [key for key in _SCALE if original.config.get(key) != stored.get(key)]
            if odd:
                wrong.append(f"{team.name}/{one.name}: {', '.join(odd)} differ from those of the original")
            elif (
                one.measured is not None
                and one.recorded is not None
                and not agree(one.measured, one.recorded)
            ):
                figures = (
                    f"error against the original is {one.measured:.4g}, the bundle says {one.recorded:.4g}"
                )
                wrong.append(f"{team.name}/{one.name}: its {figures}")
    if wrong:
        raise CheckError("\n".join(f"{each}: it was made from another adapter" for each in wrong))


def read_pairs(path: Path) -> list[Pair]:
    """Pairs from JSON lines: {"task": …, "adapter": …} and, if it is for drift, "role": "drift".

    Raises:
        InputError: the file cannot be read, or a line is not such a pair.
    """
    pairs = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError([Defect(str(path), problem=f"cannot be read: {error}")]) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            pair = Pair(row["task"], row["adapter"], row.get("role", "own"))
            names: list[Any] = [pair.task, pair.adapter]
            good = all(isinstance(name, str) for name in names) and pair.role in ("own", "drift")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            good = False
        if not good:
            remedy = 'a line is {"task": NAME, "adapter": NAME}, and "role": "drift" for an unrelated task'
            raise InputError([Defect(str(path), problem=f"line {number} is no pair", remedy=remedy)])
        pairs.append(pair)
    roles: dict[tuple[str, str], Role] = {}
    for pair in pairs:
        if roles.setdefault((pair.task, pair.adapter), pair.role) != pair.role:
            problem = f"pairs {pair.adapter} with {pair.task} as its own task and as drift"
            raise InputError([Defect(str(path), problem=problem, remedy="leave one of the lines out")])
    return sorted(set(pairs))


def match(
    teams: Sequence[Team], tasks: Sequence[str], asked: Sequence[Pair] | None, drift: Sequence[str]
) -> tuple[list[Pair], list[LeftOut]]:
    """Which pairs are evaluated: those that every arm can answer, so that arms are compared on the same examples.

    Args:
        tasks: names of the tasks that were found.
        asked: the user's pairs; None for adapter X on task X.
        drift: tasks that every adapter answers too, to see whether it drifts from the original there.
    Returns:
        The pairs, sorted; and what was left out, and why.
    Raises:
        InputError: a pair that was asked for cannot be evaluated, or no pair is left.
    """
    everyone = sorted({name for team in teams for name in team.adapters})
    common = [name for name in everyone if all(name in team.adapters for team in teams)]
    known = set(tasks)
    defects = [
        Defect(task, problem="is no task of --tasks", remedy=_some(known))
        for task in drift
        if task not in known
    ]
    if asked is None:
        pairs = [Pair(name, name) for name in common if name in known]
        left = _left_out(teams, everyone, known)
    else:
        pairs, left = list(asked), []
        for pair in pairs:
            missing = [team.name for team in teams if pair.adapter not in team.adapters]
            if missing:
                defects.append(
                    Defect(pair.adapter, problem=f"is not in {', '.join(missing)}", remedy="see --pairs")
                )
            if pair.task not in known:
                defects.append(Defect(pair.task, problem="is no task of --tasks", remedy=_some(known)))
    if defects:
        raise InputError(defects)
    own = {(pair.task, pair.adapter) for pair in pairs}
    adapters = sorted({pair.adapter for pair in pairs})
    pairs += [Pair(t, a, "drift") for t in dict.fromkeys(drift) for a in adapters if (t, a) not in own]
    if not any(pair.role == "own" for pair in pairs):
        if asked is not None:
            raise InputError([Defect("--pairs", problem="names no task as an adapter's own")])
        remedy = "a task is named as its adapter; other pairs: --pairs FILE"
        problem = (
            f"no adapter of all arms has a task of its name; {_some(known)}; adapters: {_names(everyone)}"
        )
        raise InputError([Defect("--tasks", problem=problem, remedy=remedy)])
    return sorted(pairs), left


def _left_out(teams: Sequence[Team], everyone: Sequence[str], known: set[str]) -> list[LeftOut]:
    left = []
    for team in teams:
        missing = [name for name in everyone if name not in team.adapters]
        if missing:
            left.append(LeftOut(_names(missing), len(missing), f"adapters that {team.name} does not have"))
    taskless = [name for name in everyone if name not in known]
    if taskless:
        left.append(LeftOut(_names(taskless), len(taskless), "adapters without a task of their name"))
    return left


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (" …" if len(names) > 10 else "")


def _some(known: set[str]) -> str:
    return "there are " + (_names(sorted(known)) or "none")
