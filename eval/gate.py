"""The gate: is an arm good enough, by its interval and not by its luck.

Each rule is turned into a margin m, above zero where the rule holds: kept - threshold, or threshold - drop. Its
interval decides: pass if all of it is at or above zero, fail if all of it is below, else undecided. Half-widths shrink
like 1/√n, so with n · (half-width / |m|)² examples the bound on the deciding side would lie on the threshold,
were the estimate right: with so many the gate decides in about half of all repetitions, with more in more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

from lorazip.errors import UsageError
from lorazip.eval.results import Check, Gate, Interval, Verdict, total_verdict

_ROUNDING = 1e-9  # a drop of 2 points by rounding more than 2 points is one of 2 points


def check_thresholds(min_retention: float | None, max_drop: float | None) -> None:
    """Refuse thresholds that every arm or no arm can meet.

    Raises:
        UsageError: min_retention is not in (0, 2], or max_drop not in [0, 1).
    """
    if min_retention is not None and not 0 < min_retention <= 2:
        raise UsageError(f"--min-retention is a share above 0 and at most 2, not {min_retention}")
    if max_drop is not None and not 0 <= max_drop < 1:
        raise UsageError(
            f"--max-drop is a share of all answers, at least 0 and below 1 (0.02 is 2 points), not {max_drop}"
        )


def judge(
    arm: str,
    kept: Interval | None,
    difference: Interval | None,
    *,
    min_retention: float | None,
    max_drop: float | None,
    point: bool,
) -> list[Check]:
    """Apply the rules that were asked for to one arm.

    Args:
        kept: see `compare.kept`; None where no adapter is far enough above the base. Then the rule is undecided.
        difference: arm - original, mean over tasks; None where they could not be compared.
        min_retention: the least `kept`, None not to ask.
        max_drop: the largest -`difference`, None not to ask.
        point: judge by the estimates alone.
    """
    checks = []
    if min_retention is not None:
        margin = kept and _shifted(kept, -min_retention)
        checks.append(_check(arm, "min-retention", min_retention, kept, margin, point))
    if max_drop is not None:
        drop = difference and _negative(difference)
        margin = difference and _shifted(difference, max_drop)
        checks.append(_check(arm, "max-drop", max_drop, drop, margin, point))
    return checks


def gate(checks: Iterable[Check], *, point: bool) -> Gate:
    """The verdict over the checks of all arms.

    Raises:
        ValueError: there is no check. A gate that asks nothing must not pass.
    """
    checks = tuple(checks)
    if not checks:
        raise ValueError("a gate without checks decides nothing")
    return Gate(total_verdict(checks), point, checks)


def _check(
    arm: str,
    rule: Literal["min-retention", "max-drop"],
    threshold: float,
    value: Interval | None,
    margin: Interval | None,
    point: bool,
) -> Check:
    if margin is None:
        return Check(arm, rule, threshold, value, "undecided", None)
    low, high = (margin.estimate, margin.estimate) if point else (margin.low, margin.high)
    verdict: Verdict = "pass" if low >= -_ROUNDING else "fail" if high < -_ROUNDING else "undecided"
    needed = _examples_needed(margin) if verdict == "undecided" else None
    return Check(arm, rule, threshold, value, verdict, needed)


def _examples_needed(margin: Interval) -> int | None:
    """About how many examples would decide an undecided margin, were its estimate right; None if it is zero."""
    if abs(margin.estimate) <= _ROUNDING:
        return None
    half = margin.estimate - margin.low if margin.estimate > 0 else margin.high - margin.estimate
    return max(math.ceil(margin.n * (half / margin.estimate) ** 2), margin.n + 1)


def _shifted(value: Interval, by: float) -> Interval:
    return Interval(value.estimate + by, value.low + by, value.high + by, value.n)


def _negative(value: Interval) -> Interval:
    return Interval(-value.estimate, -value.high, -value.low, value.n)
