"""What an evaluation found: the records behind results.json, its table and its page.

Everything here is plain data. `Results.document()` is the content of results.json; docs/EVAL.md describes it field by
field, and SCHEMA changes when a field changes its meaning or goes away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

SCHEMA = "lorazip.eval/1"
BASE = "base"
ORIGINAL = "original"
RESULTS, EXAMPLES, REPORT = "results.json", "examples.jsonl", "report.html"

Verdict = Literal["pass", "fail", "undecided"]


@dataclass(frozen=True)
class Interval:
    """An estimate and its interval.

    Attributes:
        estimate: the figure itself, from the data as they are.
        low, high: the bootstrap interval (95 %), low <= estimate <= high.
        n: examples that it rests on.
    """

    estimate: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Arm:
    """One way to answer: the base, the original adapters, a bundle's.

    Attributes:
        name: unique; `base`, `original`, or the bundle's name.
        kind: base, original or bundle.
        path: where its adapters lie, as given; None for the base.
        nbytes: all bytes of it on disk; 0 for the base.
        adapters: how many adapters of it were evaluated.
        ratio: bytes before compression over its own, of all adapters in it, evaluated or not; None for the base.
    """

    name: str
    kind: Literal["base", "original", "bundle"]
    path: str | None
    nbytes: int
    adapters: int
    ratio: float | None


@dataclass(frozen=True)
class Row:
    """The score of one arm on one task by one metric.

    Attributes:
        task, arm, metric: names.
        adapter: the adapter's name, None for the base.
        role: `own` for the task that an adapter is for, `drift` for an unrelated one.
        primary: whether this metric is the one that the task is judged by (exact match, say, and not the token loss).
        score, low, high: mean over the examples and its bootstrap interval. Higher is better, except for `loss`.
        n: examples.
    """

    task: str
    adapter: str | None
    arm: str
    metric: str
    role: Literal["own", "drift"]
    primary: bool
    score: float
    n: int
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """One arm against the original, paired by example, on one task by its primary metric.

    Attributes:
        difference: arm - original, mean and interval; negative is worse.
        fixes, breaks: examples that only the arm, only the original got right (score >= 0.5 counts as right).
        p_value: McNemar's exact test of fixes against breaks; 1 where there are none.
        lift: (arm - base) / (original - base), only where the interval of the denominator excludes zero.
    """

    task: str
    adapter: str
    arm: str
    metric: str
    role: Literal["own", "drift"]
    difference: Interval
    fixes: int
    breaks: int
    p_value: float
    lift: Interval | None


@dataclass(frozen=True)
class Summary:
    """One arm over all tasks of role `own`, by their primary metrics.

    Attributes:
        score: mean over tasks.
        loss: mean token loss over tasks; None where it was not measured.
        kept: sum of the arm's scores over sum of the original's, over the adapters whose original score is at least 10
            points above the base; None for the base, the original, and where there is no such adapter.
        kept_adapters: how many adapters that are.
        lift: (arm - base) / (original - base) of the means over tasks, where the denominator's interval excludes zero.
        difference: arm - original, mean over tasks.
        fixes_per_100, breaks_per_100, p_value: over the pooled examples.
        worst: the comparison with the lowest difference.
        drift: arm - original on the tasks of role `drift`, mean over them; None where there are none.
        agreement: how often the arm gives the original's own answer, mean over tasks; None where it was not asked.
    """

    arm: str
    score: Interval
    loss: Interval | None
    kept: Interval | None
    kept_adapters: int
    lift: Interval | None
    difference: Interval | None
    fixes_per_100: float | None
    breaks_per_100: float | None
    p_value: float | None
    worst: Comparison | None
    drift: Interval | None
    agreement: Interval | None = None


@dataclass(frozen=True)
class Check:
    """One rule of the gate on one arm.

    Attributes:
        rule: `min-retention` (of `kept`) or `max-drop` (of -`difference`).
        threshold: as given.
        value: the figure that was judged, in the rule's own direction; None where it could not be measured (no adapter
            is far enough above the base for `kept`): undecided, and no number of examples would help.
        verdict: by the interval's bounds, or by the estimate alone (`Gate.point`).
        examples_needed: if undecided, about how many examples would decide it, were the estimate right; None where no
            number would (the estimate lies on the threshold).
    """

    arm: str
    rule: Literal["min-retention", "max-drop"]
    threshold: float
    value: Interval | None
    verdict: Verdict
    examples_needed: int | None


@dataclass(frozen=True)
class Gate:
    """The verdict over all checks: fail if one fails, else undecided if one is, else pass."""

    verdict: Verdict
    point: bool
    checks: tuple[Check, ...]


@dataclass(frozen=True)
class Canary:
    """Proof that an adapter acts in the backend as D added to the weights by hand does.

    Attributes:
        effect: largest change of a log-probability that the adapter makes on the prompt, by hand.
        deviation: largest difference of a log-probability between backend and by hand.
        tolerance: what the deviation may be.
        ok: whether it is within.
        problem: what is wrong, in a sentence; empty when ok.
    """

    arm: str
    adapter: str | None
    effect: float
    deviation: float
    tolerance: float
    ok: bool
    problem: str


@dataclass(frozen=True)
class Break:
    """An example that the original got right and the arm did not; shown in the report."""

    task: str
    adapter: str
    arm: str
    prompt: str
    expected: str
    original: str
    found: str


@dataclass(frozen=True)
class LeftOut:
    """What was not evaluated, and why: counted, never silent."""

    what: str
    count: int
    why: str


@dataclass(frozen=True)
class Results:
    """All of an evaluation.

    Attributes:
        settings: what was asked for, with versions; JSON values only.
        cost: model calls made and taken from the cache, tokens, seconds; JSON values only.
        breaks: some examples of what went wrong; see `report`.
    """

    settings: dict[str, Any]
    arms: tuple[Arm, ...]
    rows: tuple[Row, ...]
    comparisons: tuple[Comparison, ...]
    summary: tuple[Summary, ...]
    gate: Gate | None
    canaries: tuple[Canary, ...]
    left_out: tuple[LeftOut, ...]
    breaks: tuple[Break, ...]
    cost: dict[str, Any]

    def document(self) -> dict[str, Any]:
        """The content of results.json, JSON values only."""
        return {"schema": SCHEMA, **asdict(self)}

    def of(self, arm: str) -> Summary:
        """The summary of one arm."""
        return next(s for s in self.summary if s.arm == arm)


def total_verdict(checks: Sequence[Check]) -> Verdict:
    """The worst of the verdicts."""
    found = {check.verdict for check in checks}
    return "fail" if "fail" in found else "undecided" if "undecided" in found else "pass"
