"""Open all adapters of a job, check them against each other, and list every defect before anything is written."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from lorazip.adapter import Adapter, open_adapter
from lorazip.errors import Defect, InputError, UsageError, printable
from lorazip.locate import Source, find, resolve

__all__ = ["Inputs", "Source", "examine", "open_adapters", "resolve"]

_T = TypeVar("_T")
_LEAVE_OUT = "leave it out, or compress it with the adapters of its own base"


@dataclass(frozen=True)
class Inputs:
    """The adapters of one job.

    Attributes:
        adapters: sorted by name; at least one.
        skipped: the defects of the adapters that were left out; empty without skip_bad.
        base: the base model of all of them.
        revision: its revision, or None for the default one.
    """

    adapters: tuple[Adapter, ...]
    skipped: tuple[Defect, ...]
    base: str
    revision: str | None

    @cached_property
    def modules(self) -> dict[str, tuple[int, int]]:
        """The union of the adapted modules: name -> (out, in), sorted."""
        return shapes(self.adapters)

    def fingerprint(self) -> str:
        """sha256 (hex) of the lines "module out in" of `modules`: which shapes a base must have to fit."""
        return fingerprint(self.modules)


def shapes(adapters: Sequence[Adapter]) -> dict[str, tuple[int, int]]:
    """The union of the adapters' modules: name -> (out, in), sorted by name."""
    union = {m: (info.out, info.in_) for adapter in adapters for m, info in adapter.modules.items()}
    return dict(sorted(union.items()))


def fingerprint(modules: dict[str, tuple[int, int]]) -> str:
    """sha256 (hex) over the sorted lines "module out in", each ended by a newline."""
    lines = sorted(f"{module} {out} {in_}\n" for module, (out, in_) in modules.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def open_adapters(
    paths: Sequence[str],
    *,
    base: str | None = None,
    skip_bad: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Inputs:
    """Open and check the adapters that the paths name; all their factors are read once.

    Args:
        paths: what the user named, see `resolve`.
        base: the base model of all of them, if their configs disagree or do not name it.
        skip_bad: leave adapters with defects out instead of refusing the job.
        progress: called with (adapters read, adapters in all) after each.
    Raises:
        InputError: with all defects of all inputs; with skip_bad only if no adapter is left.
    """
    if isinstance(paths, str):  # a text is a sequence of texts too: its letters would be taken for paths
        paths = [paths]
    if base is not None and (not base.strip() or not base.isprintable()):
        raise UsageError(f"base {printable(base)!r} is not the name of a model (is a variable unset?)")
    adapters, defects = examine(paths, base=base, progress=progress)
    if not adapters or (defects and not skip_bad):
        raise InputError(defects)
    configs = Counter(_base_of(adapter) for adapter in adapters)
    (named, revision), _ = configs.most_common(1)[0]
    if len({rev for _, rev in configs}) > 1 or (base is not None and base != named):
        revision = None  # the user said which base; no revision speaks for all of them
    return Inputs(tuple(adapters), tuple(defects), base or named, revision)


def examine(
    paths: Sequence[str],
    *,
    base: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Adapter], list[Defect]]:
    """Open what can be opened, and list what cannot.

    Args:
        paths: see `resolve`.
        base: see `open_adapters`.
        progress: see `open_adapters`.
    Returns:
        The adapters without any defect, sorted by name, and all defects of the others, sorted.
    """
    sources, unresolved = find(paths)
    adapters: list[Adapter] = []
    defects: list[Defect] = []
    for done, source in enumerate(sources, 1):
        try:
            adapter = open_adapter(source.directory, source.name)
            adapters.append(adapter)
            defects += adapter.not_finite()
        except InputError as error:
            defects += error.defects
        if progress is not None:
            progress(done, len(sources))
    defects += _shape_conflicts(adapters)
    if base is None:
        defects += _base_conflicts(adapters)
    bad = {defect.adapter for defect in defects}
    return [adapter for adapter in adapters if adapter.name not in bad], sorted({*unresolved, *defects})


def _shape_conflicts(adapters: Sequence[Adapter]) -> list[Defect]:
    """One defect for every adapter with a module of another shape than most adapters have there."""
    votes: dict[str, Counter[tuple[int, int]]] = defaultdict(Counter)
    for adapter in adapters:
        for module, info in adapter.modules.items():
            votes[module][info.out, info.in_] += 1
    usual = {module: _majority(counts) for module, counts in votes.items() if len(counts) > 1}
    defects = []
    for adapter in adapters:
        odd = [m for m, info in adapter.modules.items() if m in usual and usual[m] != (info.out, info.in_)]
        if not odd:
            continue
        info, most = adapter.modules[odd[0]], usual[odd[0]]
        others = f"most adapters have {most[0]} x {most[1]}" if most else "no shape has a majority"
        more = f", and {len(odd) - 1} more modules differ" if len(odd) > 1 else ""
        problem = f"is {info.out} x {info.in_}, {others}{more}: another base model?"
        defects.append(Defect(adapter.name, odd[0], "", problem, _LEAVE_OUT))
    return defects


def _base_conflicts(adapters: Sequence[Adapter]) -> list[Defect]:
    """One defect for every adapter that names another base model than most, or none."""
    named = (_base_of(adapter) for adapter in adapters)
    usual = _majority(Counter(base for base in named if base[0]))
    defects = []
    for adapter in adapters:
        own = _base_of(adapter)
        if not own[0]:
            problem, remedy = "its config does not name the base model", "name it: --base MODEL"
        elif usual is None:
            problem, remedy = (
                f"its base is {_label(own)}, the others disagree",
                "if all are one model: --base MODEL",
            )
        elif own != usual:
            problem = f"its base is {_label(own)}, most adapters have {_label(usual)}"
            remedy = f"if both are the same model: --base {usual[0]}; else leave it out"
        else:
            continue
        defects.append(Defect(adapter.name, "", "", problem, remedy))
    return defects


def _base_of(adapter: Adapter) -> tuple[str, str | None]:
    revision = adapter.config.get("revision")
    return adapter.config.get("base_model_name_or_path") or "", None if revision in ("", "main") else revision


def _label(base: tuple[str, str | None]) -> str:
    return base[0] if base[1] is None else f"{base[0]} at revision {base[1]}"


def _majority(counts: Counter[_T]) -> _T | None:
    """The value that more adapters have than any other, or None if two tie."""
    ranked = counts.most_common(2)
    return None if not ranked or (len(ranked) == 2 and ranked[0][1] == ranked[1][1]) else ranked[0][0]
