"""From scores, example by example, to rows, comparisons with the original, a summary of every arm, and the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorazip.errors import UsageError
from lorazip.eval import arms, compare
from lorazip.eval import gate as gates
from lorazip.eval.arms import Pair, Team
from lorazip.eval.results import BASE, ORIGINAL, Comparison, Gate, Interval, Row, Summary
from lorazip.eval.spec import AGREEMENT, EvalSpec


@dataclass(frozen=True)
class Cell:
    """One arm's scores on one task by one metric, example by example; `adapter` is None for the base."""

    arm: str
    task: str
    adapter: str | None
    role: arms.Role
    metric: str
    bounded: bool
    primary: bool
    scores: tuple[float, ...]


def few(shots: int) -> str:
    """The name of the arm that is the base with solved examples before each question."""
    return f"{BASE}-{shots}-shot"


Judged = tuple[tuple[Row, ...], tuple[Comparison, ...], tuple[Summary, ...], Gate | None]


def judge(cells: Sequence[Cell], pairs: Sequence[Pair], teams: Sequence[Team], spec: EvalSpec) -> Judged:
    """Rows, comparisons with the original, a summary of every arm, and the gate's verdict."""
    rows = tuple(_row(cell) for cell in cells)
    table = _Table(cells)
    names = list(dict.fromkeys(cell.arm for cell in cells))
    compared = [
        team.name for team in teams if team.name != ORIGINAL and any(t.name == ORIGINAL for t in teams)
    ]
    comparisons = tuple(table.comparison(arm, pair) for arm in compared for pair in pairs)
    summary = tuple(table.summary(arm, pairs, [c for c in comparisons if c.arm == arm]) for arm in names)
    if not spec.gated:
        return rows, comparisons, summary, None
    checks = [
        check
        for one in summary
        if one.arm in compared
        for check in gates.judge(
            one.arm,
            one.kept,
            one.difference,
            min_retention=spec.min_retention,
            max_drop=spec.max_drop,
            point=spec.point,
        )
    ]
    if not checks:
        raise UsageError("the gate has nothing to compare (give --adapters and at least one --bundle)")
    return rows, comparisons, summary, gates.gate(checks, point=spec.point)


def _row(cell: Cell) -> Row:
    found = compare.mean(cell.scores, cell.bounded)
    return Row(
        cell.task, cell.adapter, cell.arm, cell.metric, cell.role, cell.primary,
        found.estimate, found.n, found.low, found.high,
    )  # fmt: skip


class _Table:
    """The cells by arm, task and adapter."""

    def __init__(self, cells: Sequence[Cell]):
        self._primary = {(c.arm, c.task, c.adapter): c for c in cells if c.primary}
        self._agreed = {(c.arm, c.task, c.adapter): c for c in cells if c.metric == AGREEMENT}
        self._loss = {(c.arm, c.task, c.adapter): c for c in cells if c.metric == "loss"}
        self._bare = list(dict.fromkeys(c.arm for c in cells if c.adapter is None))

    def of(self, arm: str, pair: Pair) -> Cell:
        """One arm's cell of the primary metric; bare arms have no adapter."""
        return self._primary.get((arm, pair.task, pair.adapter)) or self._primary[arm, pair.task, None]

    def base(self, pair: Pair) -> Cell:
        """The base at its best: zero-shot or, where it was asked, few-shot."""
        found = [self._primary[arm, pair.task, None] for arm in self._bare]
        return max(found, key=lambda cell: sum(cell.scores))

    def comparison(self, arm: str, pair: Pair) -> Comparison:
        own, original, base = self.of(arm, pair), self.of(ORIGINAL, pair), self.base(pair)
        fixes, breaks, p_value = compare.flips(own.scores, original.scores)
        return Comparison(
            pair.task,
            pair.adapter,
            arm,
            own.metric,
            pair.role,
            compare.difference([own.scores], [original.scores], own.bounded),
            fixes,
            breaks,
            p_value,
            compare.lift([own.scores], [original.scores], [base.scores], own.bounded),
        )

    def summary(self, arm: str, pairs: Sequence[Pair], compared: Sequence[Comparison]) -> Summary:
        own = [pair for pair in pairs if pair.role == "own"]
        cells = [self.of(arm, pair) for pair in own]
        bounded = all(cell.bounded for cell in cells)
        rows = [cell.scores for cell in cells]
        # Tasks of lm-evaluation-harness have no token loss; a mean over the others would be another figure.
        found = [self._loss.get((arm, p.task, p.adapter)) or self._loss.get((arm, p.task, None)) for p in own]
        losses = [cell.scores for cell in found if cell is not None]
        kept: Interval | None = None
        chosen: list[int] = []
        lift = difference = drift = None
        fixes = breaks = p_value = None
        if compared:
            originals = [self.of(ORIGINAL, pair).scores for pair in own]
            bases = [self.base(pair).scores for pair in own]
            if bounded:
                kept, chosen = compare.kept(rows, originals, bases)
            lift = compare.lift(rows, originals, bases, bounded)
            difference = compare.difference(rows, originals, bounded)
            better, worse, p_value = compare.flips(sum(rows, ()), sum(originals, ()))
            n = sum(map(len, rows))
            fixes, breaks = 100 * better / n, 100 * worse / n
            away = [pair for pair in pairs if pair.role == "drift"]
            if away:
                cells = [self.of(arm, pair) for pair in away]
                drift = compare.difference(
                    [cell.scores for cell in cells],
                    [self.of(ORIGINAL, pair).scores for pair in away],
                    all(cell.bounded for cell in cells),
                )
        mine = [c for c in compared if c.role == "own"]
        agreed = [one.scores for p in own if (one := self._agreed.get((arm, p.task, p.adapter))) is not None]
        return Summary(
            arm,
            compare.macro(rows, bounded),
            compare.macro(losses, bounded=False) if len(losses) == len(own) else None,
            kept,
            len({own[i].adapter for i in chosen}),
            lift,
            difference,
            fixes,
            breaks,
            p_value,
            min(mine, key=lambda c: c.difference.estimate) if mine else None,
            drift,
            compare.macro(agreed) if agreed else None,
        )
