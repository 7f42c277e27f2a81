"""The gate: by interval, by estimate, and how many examples an undecided rule asks for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from lorazip.errors import UsageError
from lorazip.eval import compare
from lorazip.eval.gate import check_thresholds, gate, judge
from lorazip.eval.results import Check, Interval


def interval(low: float, estimate: float, high: float, n: int = 100) -> Interval:
    return Interval(estimate, low, high, n)


def retention(kept: Interval | None, threshold: float, point: bool = False) -> Check:
    (check,) = judge("a", kept, None, min_retention=threshold, max_drop=None, point=point)
    return check


def drop(difference: Interval | None, threshold: float, point: bool = False) -> Check:
    (check,) = judge("a", None, difference, min_retention=None, max_drop=threshold, point=point)
    return check


# --- verdicts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kept", "verdict", "by_point"),
    [
        (interval(0.96, 0.98, 1.0), "pass", "pass"),
        (interval(0.95, 0.98, 1.0), "pass", "pass"),  # on the threshold is enough
        (interval(0.94, 0.98, 1.0), "undecided", "pass"),
        (interval(0.80, 0.90, 0.95), "undecided", "fail"),  # not all of it is below
        (interval(0.80, 0.90, 0.94), "fail", "fail"),
        (interval(0.90, 0.95, 1.0), "undecided", "pass"),
    ],
)
def test_retention_is_judged_by_its_bounds_or_by_its_estimate(
    kept: Interval, verdict: str, by_point: str
) -> None:
    found = retention(kept, 0.95)
    assert (found.rule, found.threshold, found.value, found.verdict) == ("min-retention", 0.95, kept, verdict)
    assert retention(kept, 0.95, point=True).verdict == by_point


@pytest.mark.parametrize(
    ("difference", "verdict", "by_point"),
    [
        (interval(-0.01, 0.0, 0.01), "pass", "pass"),
        (interval(-0.02, 0.0, 0.01), "pass", "pass"),
        (interval(-0.03, -0.01, 0.01), "undecided", "pass"),
        (interval(-0.06, -0.04, -0.02), "undecided", "fail"),
        (interval(-0.06, -0.04, -0.03), "fail", "fail"),
    ],
)
def test_a_drop_is_a_difference_the_other_way_round(
    difference: Interval, verdict: str, by_point: str
) -> None:
    found = drop(difference, 0.02)
    value = Interval(-difference.estimate, -difference.high, -difference.low, difference.n)
    assert (found.rule, found.value, found.verdict) == ("max-drop", value, verdict)
    assert drop(difference, 0.02, point=True).verdict == by_point


def test_rounding_decides_nothing() -> None:
    lost = 0.5 - 0.52  # -0.020000000000000018
    assert -lost > 0.02
    assert drop(interval(lost, lost, 0.0), 0.02).verdict == "pass"
    share = 0.1 * 3 / 0.3 * 0.95 - 1e-16
    assert retention(interval(share, share, 1.0), 0.95).verdict == "pass"


def test_what_could_not_be_measured_is_undecided_even_by_the_estimate() -> None:
    for point in (False, True):
        assert retention(None, 0.9, point) == Check("a", "min-retention", 0.9, None, "undecided", None)
        assert drop(None, 0.1, point) == Check("a", "max-drop", 0.1, None, "undecided", None)


def test_only_the_rules_that_are_asked_for_are_applied() -> None:
    kept, difference = interval(0.9, 1.0, 1.1), interval(-0.1, 0.0, 0.1)
    both = judge("b", kept, difference, min_retention=0.5, max_drop=0.0, point=False)
    assert [(check.arm, check.rule, check.verdict) for check in both] == [
        ("b", "min-retention", "pass"),
        ("b", "max-drop", "undecided"),
    ]
    assert judge("b", kept, difference, min_retention=None, max_drop=None, point=False) == []


def test_the_worst_check_is_the_verdict() -> None:
    good, open_, bad = (
        retention(interval(low, 1.0 - (low < 0.5), low + 0.5), 0.9) for low in (0.95, 0.6, 0.1)
    )
    assert [good.verdict, open_.verdict, bad.verdict] == ["pass", "undecided", "fail"]
    assert gate([good, good], point=True).verdict == "pass"
    assert gate([good, open_], point=False).verdict == "undecided"
    found = gate(iter([open_, bad, good]), point=False)
    assert found.verdict == "fail" and found.checks == (open_, bad, good) and not found.point
    with pytest.raises(ValueError, match="without checks"):
        gate([], point=False)


# --- how many examples ------------------------------------------------------------------------------------------------


def test_examples_needed_by_hand() -> None:
    # Half-width 0.06 towards the threshold, 0.02 away from it: (0.06 / 0.02)^2 = 9 times as many.
    assert retention(interval(0.91, 0.97, 0.99), 0.95).examples_needed in (900, 901)
    assert retention(interval(0.92, 0.93, 0.99), 0.95).examples_needed in (900, 901)
    assert drop(interval(-0.08, -0.02, 0.0), 0.04).examples_needed in (900, 901)
    assert drop(interval(-0.061, -0.06, 0.0), 0.04).examples_needed in (900, 901)
    assert retention(interval(0.91, 0.97, 0.99), 0.90).examples_needed is None  # decided
    assert retention(interval(0.90, 0.95, 0.99), 0.95).examples_needed is None  # on the threshold
    nearly = retention(interval(0.95 - 2e-9, 0.97, 0.99), 0.95)
    assert nearly.verdict == "undecided" and nearly.examples_needed == 101
    assert retention(interval(0.80, 0.90, 0.95), 0.95).examples_needed == 101  # always more than there are


@pytest.mark.parametrize("share", [0.93, 0.975])
def test_with_the_examples_needed_about_half_of_the_gates_decide(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An arm that keeps `share` of 80 % right answers, against 0.96. The first data make the truth their estimate.

    Half: the bound then lies on the threshold in the mean. 200 repetitions: standard error 0.035.
    """
    monkeypatch.setattr(compare, "RESAMPLES", 1000)

    def judged(arm: Any, original: Any) -> Check:
        kept, _ = compare.kept([arm], [original], [np.zeros_like(original)])
        return retention(kept, 0.96)

    n = 250
    original = (np.arange(n) < 200).astype(float)
    first = judged((np.arange(n) < round(200 * share)).astype(float), original)
    assert first.verdict == "undecided" and first.value is not None and first.examples_needed is not None
    random = np.random.default_rng(1)

    def decided(n: int) -> float:
        verdicts = []
        for _ in range(200):
            original = (random.random(n) < 0.8).astype(float)
            arm = original * (random.random(n) < first.value.estimate)
            verdicts.append(judged(arm, original).verdict != "undecided")
        return float(np.mean(verdicts))

    assert 0.35 < decided(first.examples_needed) < 0.75
    assert decided(4 * first.examples_needed) > 0.9


# --- thresholds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, -0.1, 2.01, math.nan, math.inf])
def test_retention_out_of_range_is_refused(threshold: float) -> None:
    with pytest.raises(UsageError, match=r"^--min-retention .* above 0 and at most 2, not"):
        check_thresholds(threshold, None)


@pytest.mark.parametrize("threshold", [-0.01, 1.0, 2.0, math.nan])
def test_a_drop_out_of_range_is_refused(threshold: float) -> None:
    with pytest.raises(UsageError, match=r"^--max-drop .* at least 0 and below 1"):
        check_thresholds(None, threshold)


@pytest.mark.parametrize(
    ("min_retention", "max_drop"), [(None, None), (2.0, 0.0), (1e-9, 0.999), (0.95, None), (None, 0.02)]
)
def test_thresholds_in_range_are_taken(min_retention: float | None, max_drop: float | None) -> None:
    check_thresholds(min_retention, max_drop)
