"""What the report of an evaluation says, as rows: the arms, the tasks, the examples, the canaries."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lorazip.eval.phrases import (
    NONE,
    differences,
    judged_arms,
    number,
    percent,
    plain,
    points,
    probability,
    signed,
    span,
)
from lorazip.eval.results import (
    BASE,
    ORIGINAL,
    Arm,
    Break,
    Canary,
    Comparison,
    Interval,
    Results,
    Row,
    Summary,
)
from lorazip.units import counted, size, times


@dataclass(frozen=True)
class Cell:
    """A figure and the small print below it: its interval, mostly, and a note."""

    figure: str
    small: str = ""
    note: str = ""


@dataclass(frozen=True)
class Measure:
    """A row of the table of arms: what is measured, what that means, and a cell an arm."""

    name: str
    meaning: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class TaskRow:
    """One adapter on one task by the task's primary metric.

    Attributes:
        others: for each further arm without adapters, see `other_bases`.
        arms: a pair for each judged arm.
    """

    task: str
    adapter: str | None
    metric: str
    base: Row | None
    others: tuple[Row | None, ...]
    original: Row | None
    arms: tuple[tuple[Row | None, Comparison | None], ...]

    @property
    def n(self) -> int:
        """Most examples that any arm was asked."""
        rows = (self.base, self.original, *self.others, *(row for row, _ in self.arms))
        return max((row.n for row in rows if row is not None), default=0)

    @property
    def worst(self) -> float:
        """The lowest difference of an arm to the original; infinite where there is none."""
        found = (pair.difference.estimate for _, pair in self.arms if pair is not None)
        return min((value for value in found if math.isfinite(value)), default=math.inf)


@dataclass(frozen=True)
class CanaryRow:
    """The canaries of one arm: how many hold, and the worst deviation in units of its tolerance."""

    arm: str
    count: int
    held: int
    least_effect: float
    most_deviation: float
    worst_ratio: float


@dataclass(frozen=True)
class Excerpt:
    """A text, shortened: what comes first, what comes last, and how many characters between them are left out."""

    head: str
    tail: str
    cut: int


# The arms


def measures(results: Results) -> list[Measure]:
    """The table of arms, a row a measure."""
    found = {summary.arm: summary for summary in results.summary}
    arms = [(arm, found.get(arm.name)) for arm in results.arms]

    def row(name: str, meaning: str, cell: Callable[[Arm, Summary], Cell]) -> Measure:
        return Measure(name, meaning, tuple(Cell(NONE) if s is None else cell(arm, s) for arm, s in arms))

    return [
        row("Score", "Mean over the tasks, in points of 100.", lambda _, s: _interval(s.score, points)),
        row(
            "Kept",
            "Part of the original’s score, over the adapters whose original is at least 10 points better than the"
            " base. “–” where there is no such adapter.",
            lambda _, s: _interval(s.kept, percent, f"on {counted(s.kept_adapters, 'adapter')}"),
        ),
        row(
            "Lift",
            "Part of the way from the base to the original: (arm − base) / (original − base)."
            " “–” where the original is not surely better than the base.",
            lambda _, s: _interval(s.lift, percent),
        ),
        row(
            "Difference",
            "Arm − original, mean over the tasks, in points.",
            lambda _, s: _interval(s.difference, signed),
        ),
        row(
            "Fixes per 100",
            "Examples that only the arm got right, not the original.",
            lambda _, s: Cell(number(s.fixes_per_100, lambda v: f"{v:.1f}")),
        ),
        row(
            "Breaks per 100",
            "Examples that only the original got right.",
            lambda _, s: Cell(number(s.breaks_per_100, lambda v: f"{v:.1f}")),
        ),
        row(
            "McNemar’s p",
            "How likely fixes and breaks as uneven as these would be by chance.",
            lambda _, s: Cell(probability(s.p_value)),
        ),
        row(
            "Worst adapter",
            "The lowest difference of an adapter to its original, in points.",
            lambda _, s: _worst(s.worst),
        ),
        row(
            "Drift",
            "Arm − original on tasks that the adapters are not for, in points. “–” where there are none.",
            lambda _, s: _interval(s.drift, signed),
        ),
        row(
            "Agreement",
            "Examples with just the original’s own answer, right or wrong. “–” where it was not asked.",
            lambda _, s: _interval(s.agreement, percent),
        ),
        row(
            "Loss",
            "Mean loss of a token of the expected answer; lower is better. “–” where it was not measured.",
            lambda _, s: _interval(s.loss, plain),
        ),
        Measure(
            "Bytes",
            "All files of it on disk.",
            tuple(Cell(size(arm.nbytes), f"{arm.nbytes:,}") if arm.nbytes else Cell(NONE) for arm, _ in arms),
        ),
        Measure(
            "Smaller by",
            "Bytes before compression over its own, of all adapters in it, evaluated or not.",
            tuple(Cell(NONE if arm.ratio is None else times(arm.ratio)) for arm, _ in arms),
        ),
    ]


def _interval(value: Interval | None, say: Callable[[float | None], str], note: str = "") -> Cell:
    if value is None:
        return Cell(NONE)
    return Cell(say(value.estimate), span(value.low, value.high, say), note)


def _worst(pair: Comparison | None) -> Cell:
    if pair is None:
        return Cell(NONE)
    place = "" if pair.task == pair.adapter else f"on {pair.task}"
    return Cell(differences(pair.metric)(pair.difference.estimate), pair.adapter, place)


# The tasks


def other_bases(results: Results) -> list[Arm]:
    """Arms without adapters beside the base: the base with solved examples in its prompts."""
    return [arm for arm in results.arms if arm.kind == "base" and arm.name != BASE]


def task_rows(results: Results, role: str) -> list[TaskRow]:
    """Adapters on tasks of this role, those that lost most first."""
    rows = {(r.task, r.adapter, r.arm): r for r in results.rows if r.primary}
    asked = [row for row in rows.values() if row.role == role and row.adapter is not None]
    if not asked and role == "own":
        asked = list(rows.values())  # of the base alone
    places = {(row.task, row.adapter): row.metric for row in asked}
    pairs = {(c.task, c.adapter, c.arm): c for c in results.comparisons if c.role == role}
    arms = [arm.name for arm in judged_arms(results)]
    found = [
        TaskRow(
            task=task,
            adapter=adapter,
            metric=metric,
            base=rows.get((task, None, BASE)),
            others=tuple(rows.get((task, None, arm.name)) for arm in other_bases(results)),
            original=rows.get((task, adapter, ORIGINAL)),
            arms=tuple(
                (rows.get((task, adapter, arm)), pairs.get((task, adapter or "", arm))) for arm in arms
            ),
        )
        for (task, adapter), metric in places.items()
    ]
    return sorted(found, key=lambda row: (row.worst, row.task, row.adapter or ""))


def labels(rows: Sequence[TaskRow]) -> list[str]:
    """A short name for each row: its task, or its adapter, or both where neither tells them apart."""
    tasks, adapters = {row.task for row in rows}, {row.adapter for row in rows}
    if len(tasks) == len(rows):
        return [row.task for row in rows]
    if len(adapters) == len(rows):
        return [row.adapter or "" for row in rows]
    return [f"{row.adapter}: {row.task}" for row in rows]


# The examples


def shown_breaks(results: Results, most: int) -> dict[str, tuple[list[Break], int]]:
    """Arm -> some examples, from as many tasks as can be, and how many there are in all."""
    found: dict[str, tuple[list[Break], int]] = {}
    for arm in judged_arms(results):
        mine = [item for item in results.breaks if item.arm == arm.name]
        total = sum(pair.breaks for pair in results.comparisons if pair.arm == arm.name)
        seen: dict[tuple[str, str], int] = defaultdict(int)
        turns = []
        for i, item in enumerate(mine):
            turns.append((seen[item.task, item.adapter], i))
            seen[item.task, item.adapter] += 1
        chosen = [mine[i] for _, i in sorted(turns)[:most]]
        if mine or total:
            found[arm.name] = (chosen, max(total, len(mine)))
    return found


def excerpt(text: str, most: int) -> Excerpt:
    """The beginning and, twice as long, the end: of a prompt, the question comes last."""
    if len(text) <= most:
        return Excerpt(text, "", 0)
    head = most // 3
    return Excerpt(text[:head], text[head - most :], len(text) - most)


# The canaries


def canary_rows(results: Results) -> list[CanaryRow]:
    """The canaries by arm, in the order of the arms."""
    by_arm: dict[str, list[Canary]] = {arm.name: [] for arm in results.arms}
    for canary in results.canaries:
        by_arm.setdefault(canary.arm, []).append(canary)
    return [
        CanaryRow(
            arm=arm,
            count=len(group),
            held=sum(canary.ok for canary in group),
            least_effect=_least(canary.effect for canary in group),
            most_deviation=-_least(-canary.deviation for canary in group),
            worst_ratio=-_least(-ratio(canary) for canary in group),
        )
        for arm, group in by_arm.items()
        if group
    ]


def ratio(canary: Canary) -> float:
    """Deviation over tolerance: at most 1 is well; NaN where the deviation is no number."""
    if canary.tolerance > 0 or math.isnan(canary.deviation):
        return canary.deviation / canary.tolerance if canary.tolerance else math.nan
    return math.inf if canary.deviation > 0 else 0.0


def _least(values: Iterable[float]) -> float:
    """The least; NaN if one is."""
    found = list(values)
    return math.nan if any(math.isnan(value) for value in found) else min(found)
