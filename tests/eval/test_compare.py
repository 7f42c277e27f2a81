"""Intervals against closed forms, scipy, and how often they hold the truth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binom, bootstrap, norm

from lorazip.eval import compare
from lorazip.eval.results import Interval

Rows = list[NDArray[np.float64]]
Z = float(norm.ppf(0.975))


def right(k: int, n: int) -> NDArray[np.float64]:
    """k right answers of n."""
    return (np.arange(n) < k).astype(float)


def coin(random: np.random.Generator, chances: Sequence[float], n: int) -> Rows:
    return [(random.random(n) < p).astype(float) for p in chances]


def half(interval: Interval) -> float:
    return (interval.high - interval.low) / 2


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer resamples, for tests that repeat: the noise of an end is then about 0.05 half-widths."""
    monkeypatch.setattr(compare, "RESAMPLES", 2000)


def coverage(repetitions: int, truth: float, interval: Callable[[], Interval | None]) -> float:
    """The share of intervals that hold the truth."""
    found = [interval() for _ in range(repetitions)]
    return float(np.mean([one is not None and one.low <= truth <= one.high for one in found]))


# --- one mean ---------------------------------------------------------------------------------------------------------


def test_an_unbounded_mean_is_scipys_bootstrap() -> None:
    scores = np.random.default_rng(1).exponential(size=400)
    ours = compare.mean(scores, bounded=False)
    theirs = bootstrap((scores,), np.mean, method="percentile", n_resamples=10_000, random_state=2)
    assert ours.estimate == pytest.approx(scores.mean()) and ours.n == 400
    tolerance = 0.04 * half(ours)
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=tolerance)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=tolerance)


@pytest.mark.parametrize(("k", "n"), [(10, 10), (0, 10), (50, 50), (1000, 1000), (7, 10), (85, 100)])
def test_a_bounded_mean_resamples_the_data_and_one_best_and_one_worst_example(k: int, n: int) -> None:
    """The number of right draws is then binomial, with chance (k + 1) / (n + 2)."""
    found = compare.mean(right(k, n))
    low, high = binom.ppf([0.025, 0.975], n - 1, (k + 1) / (n + 2)) / (n - 1)
    step = 1.01 / (n - 1)  # a quantile may move by one value by chance
    assert found.low == pytest.approx(min(low, k / n), abs=step if 0 < k < n else 1e-12)
    assert found.high == pytest.approx(max(high, k / n), abs=step if 0 < k < n else 1e-12)
    assert found.estimate == pytest.approx(k / n)


@pytest.mark.parametrize("n", [10, 30, 100])
def test_the_interval_of_a_share_holds_the_truth(n: int, quick: None) -> None:
    """Exact: every number of right answers, weighted by its chance. 0.95 is the aim, no share may be far below."""
    intervals = [compare.mean(right(k, n)) for k in range(n + 1)]
    low, high = (np.array([getattr(one, end) for one in intervals]) for end in ("low", "high"))
    shares = np.linspace(0.005, 0.995, 199)
    held = (low <= shares[:, None]) & (shares[:, None] <= high)
    exact = (binom.pmf(np.arange(n + 1), n, shares[:, None]) * held).sum(axis=1)
    assert exact.min() > 0.9
    assert 0.945 < exact.mean() < 0.985


def test_rounding_does_not_push_an_estimate_out_of_its_interval() -> None:
    scores = [0.1] * 3
    assert np.mean(scores) > np.mean(scores[:2])  # what is drawn are two of them
    found = compare.mean(scores, bounded=False)
    assert found.low <= found.estimate <= found.high


# --- the mean over tasks ----------------------------------------------------------------------------------------------


def test_tasks_weigh_alike_whatever_their_size() -> None:
    found = compare.macro([right(1, 2), right(1, 10), right(30, 100)])
    assert found.estimate == pytest.approx((0.5 + 0.1 + 0.3) / 3) and found.n == 112


def test_the_interval_of_a_mean_over_tasks_is_the_normal_one_where_examples_are_many() -> None:
    random = np.random.default_rng(3)
    rows = [random.normal(shift, 1 + shift, size=500 + 100 * shift) for shift in range(4)]
    found = compare.macro(rows, bounded=False)
    error = math.sqrt(sum(float(row.var(ddof=1)) / len(row) for row in rows)) / 4
    assert found.high - found.estimate == pytest.approx(Z * error, rel=0.05)
    assert found.estimate - found.low == pytest.approx(Z * error, rel=0.05)


def test_pseudo_examples_neither_vanish_nor_take_over() -> None:
    """All right: the rule of three, 1 - 3/n, for all examples together. A pair for each task would give 0.90."""
    found = compare.macro([np.ones(10)] * 100)
    assert found.estimate == found.high == 1
    assert 1 - 5 / 1000 < found.low < 1 - 2 / 1000


def test_a_small_task_is_as_uncertain_beside_a_large_one() -> None:
    """Ten right answers may be 0.7 of the truth, and weigh half: 0.85 at most. Pooled, they would not show."""
    assert compare.macro([np.ones(1000), np.ones(10)]).low < 0.86


@pytest.mark.parametrize(
    ("chance", "tasks", "n"), [(0.98, 20, 10), (0.5, 20, 10), (0.9, 45, 20), (0.5, 100, 2)]
)
def test_the_interval_over_tasks_holds_the_truth(chance: float, tasks: int, n: int, quick: None) -> None:
    """With n draws instead of n - 1, tasks of two examples would give 0.83. 300 repetitions: error 0.013."""
    random = np.random.default_rng(4)
    assert 0.9 <= coverage(300, chance, lambda: compare.macro(coin(random, [chance] * tasks, n))) < 0.995


# --- pairs ------------------------------------------------------------------------------------------------------------


def pairs(random: np.random.Generator, fix: float, wrong: float, tasks: int, n: int) -> tuple[Rows, Rows]:
    """Arm and original (right with 0.6), of which a share `fix` and `wrong` of all examples flips."""
    arm, original = [], coin(random, [0.6] * tasks, n)
    for row in original:
        chance = random.random(n)
        arm.append(np.where(row > 0, chance >= wrong / 0.6, chance < fix / 0.4).astype(float))
    return arm, original


def test_a_difference_is_paired() -> None:
    """Its error is that of the differences: (fix + break - difference²) / n, far below that of two unpaired means."""
    arm, original = pairs(np.random.default_rng(5), 0.02, 0.03, 4, 1000)
    found = compare.difference(arm, original)
    gaps = np.concatenate(arm) - np.concatenate(original)
    assert found.estimate == pytest.approx(gaps.mean()) and found.n == 4000
    assert half(found) == pytest.approx(Z * gaps.std() / math.sqrt(4000), rel=0.06)


def test_arms_that_agree_everywhere_are_not_certainly_alike() -> None:
    found = compare.difference([right(6, 10)] * 10, [right(6, 10)] * 10)
    assert found.estimate == 0
    assert -0.05 < found.low < -0.02 and 0.02 < found.high < 0.05


@pytest.mark.parametrize(
    ("fix", "wrong", "tasks", "n"), [(0.03, 0.05, 10, 30), (0.01, 0.01, 20, 10), (0.1, 0.2, 1, 50)]
)
def test_the_interval_of_a_difference_holds_the_truth(
    fix: float, wrong: float, tasks: int, n: int, quick: None
) -> None:
    random = np.random.default_rng(6)

    def interval() -> Interval:
        return compare.difference(*pairs(random, fix, wrong, tasks, n))

    assert coverage(300, fix - wrong, interval) >= 0.9


def test_flips_by_hand() -> None:
    arm = [1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0.5, 0.49]
    original = [0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0.9, 0.0]
    assert compare.flips(arm, original) == (1, 7, pytest.approx(2 * (1 + 8) / 2**8))
    assert compare.flips([1, 0], [1, 0]) == (0, 0, 1.0)
    assert compare.flips([1, 0], [0, 1]) == (1, 1, 1.0)


# --- what is kept, and the lift ---------------------------------------------------------------------------------------


def test_kept_and_lift_by_hand() -> None:
    arm, original, base = (
        [right(3, 10), right(20, 40), right(9, 10)],
        [right(5, 10), right(30, 40), right(9, 10)],
        [right(1, 10), right(10, 40), right(9, 10)],
    )
    found, tasks = compare.kept(arm, original, base)
    assert tasks == [0, 1] and found is not None
    assert found.estimate == pytest.approx((0.3 + 0.5) / (0.5 + 0.75)) and found.n == 50
    lift = compare.lift(arm, original, base)
    assert lift is not None and lift.n == 60
    assert lift.estimate == pytest.approx((0.3 + 0.5 + 0.9 - 1.25) / (0.5 + 0.75 + 0.9 - 1.25))


def test_exactly_ten_points_above_the_base_are_enough() -> None:
    original = [right(k, 10) for k in range(1, 11)]
    base = [right(k - 1, 10) for k in range(1, 11)]  # 0.3 - 0.2 is less than 0.1 in floating point
    assert compare.kept(original, original, base)[1] == list(range(10))
    assert compare.kept([right(10, 1000)], [right(99, 1000)], [np.zeros(1000)]) == (None, [])


def test_identical_arms_keep_all_but_not_for_certain() -> None:
    original, base = [right(8, 10)] * 20, [right(1, 10)] * 20
    found, _ = compare.kept(original, original, base)
    lift = compare.lift(original, original, base)
    for ratio in (found, lift):
        assert ratio is not None and ratio.estimate == 1
        assert 0.95 < ratio.low < 1 < ratio.high < 1.05
    at_base = compare.lift(base, original, base)
    assert at_base is not None and at_base.estimate == pytest.approx(0) and at_base.low < 0 < at_base.high


def test_the_interval_of_a_ratio_is_that_of_the_delta_method_where_examples_are_many() -> None:
    """var(ȳ/x̄) ≈ var(y - r x) / (n x̄²)."""
    random = np.random.default_rng(7)
    arm, original = pairs(random, 0.05, 0.1, 1, 3000)
    base = [original[0] * (random.random(3000) < 0.4)]
    found, _ = compare.kept(arm, original, base)
    lift = compare.lift(arm, original, base)
    assert found is not None and lift is not None
    for ratio, y, x in ((found, arm[0], original[0]), (lift, arm[0] - base[0], original[0] - base[0])):
        error = (y - ratio.estimate * x).std() / math.sqrt(3000) / x.mean()
        assert half(ratio) == pytest.approx(Z * error, rel=0.06)


@pytest.mark.parametrize(("tasks", "n"), [(10, 30), (2, 100)])
def test_the_intervals_of_ratios_hold_the_truth(tasks: int, n: int, quick: None) -> None:
    """Original 0.6; the arm keeps 0.57; the base has 0.6 * 0.2 = 0.12."""
    random = np.random.default_rng(8)

    def arms() -> tuple[Rows, Rows, Rows]:
        arm, original = pairs(random, 0.02, 0.05, tasks, n)
        return arm, original, [row * (random.random(n) < 0.2) for row in original]

    assert 0.9 <= coverage(300, 0.57 / 0.6, lambda: compare.kept(*arms())[0]) < 0.995
    assert 0.9 <= coverage(300, (0.57 - 0.12) / (0.6 - 0.12), lambda: compare.lift(*arms())) < 0.995


def test_a_denominator_that_may_be_zero_gives_a_wide_interval_and_a_finite_one() -> None:
    """One right answer of ten: one resample in six has none."""
    found, _ = compare.kept([right(1, 10)], [right(1, 10)], [np.zeros(10)])
    assert found is not None and found.low == 0 and 3 < found.high < math.inf
    # Original - base is barely certain: some resamples have no difference, or one of the other sign.
    lift = compare.lift([right(5, 20)], [right(7, 20)], [np.zeros(20)])
    assert lift is not None and -math.inf < lift.low < 5 / 7 < lift.high < math.inf


def test_no_lift_where_original_and_base_may_be_equal() -> None:
    arm, base = [right(12, 20)], [right(9, 20)]
    assert compare.lift(arm, [right(10, 20)], base) is None
    assert compare.lift(arm, base, base) is None


def test_the_lift_of_a_loss_that_falls() -> None:
    random = np.random.default_rng(9)
    base = random.uniform(2, 3, size=50)
    original, arm = base - random.uniform(0.9, 1.1, size=50), base - random.uniform(0.7, 0.9, size=50)
    lift = compare.lift([arm], [original], [base], bounded=False)
    assert lift is not None and lift.estimate == pytest.approx((base - arm).mean() / (base - original).mean())
    assert 0.75 < lift.low < lift.estimate < lift.high < 0.85


# --- properties -------------------------------------------------------------------------------------------------------

SCORES = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1))


@st.composite
def three_arms(draw: st.DrawFn) -> tuple[Rows, Rows, Rows]:
    sizes = draw(st.lists(st.integers(1, 8), min_size=1, max_size=4))
    rows = [[np.array(draw(st.lists(SCORES, min_size=n, max_size=n))) for n in sizes] for _ in range(3)]
    return rows[0], rows[1], rows[2]


@settings(max_examples=40, deadline=None)
@given(three_arms())
def test_estimates_lie_in_their_intervals_and_the_order_of_tasks_and_examples_is_nothing(
    arms: tuple[Rows, Rows, Rows],
) -> None:
    def everything(arm: Rows, original: Rows, base: Rows) -> list[Interval | None]:
        return [
            compare.macro(arm),
            compare.macro(arm, bounded=False),
            compare.difference(arm, original),
            compare.kept(arm, original, base)[0],
            compare.lift(arm, original, base),
        ]

    found = everything(*arms)
    for one in found:
        if one is not None:
            assert math.isfinite(one.low) and one.low <= one.estimate <= one.high < math.inf
    turned: Any = [[row[::-1] for row in reversed(rows)] for rows in arms]
    for one, other in zip(found, everything(*turned), strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert (other.low, other.high) == pytest.approx((one.low, one.high), rel=1e-9, abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(2, 40))
def test_swapping_arms_turns_everything_round(seed: int, tasks: int, n: int) -> None:
    arm, original = pairs(np.random.default_rng(seed), 0.1, 0.2, tasks, n)
    there, back = compare.difference(arm, original), compare.difference(original, arm)
    assert back.estimate == pytest.approx(-there.estimate, abs=1e-12)
    near = 1.01 / (tasks * max(n - 1, 1)) + 0.05 * half(
        there
    )  # a step of a discrete distribution, and chance
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low), abs=near)
    fixes, breaks, p_value = compare.flips(np.concatenate(arm), np.concatenate(original))
    assert compare.flips(np.concatenate(original), np.concatenate(arm)) == (breaks, fixes, p_value)


def test_the_same_data_give_the_same_interval() -> None:
    rows = [np.random.default_rng(10).random(30)]
    assert compare.macro(rows) == compare.macro(rows)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compare.macro([]), "no task"),
        (lambda: compare.mean([]), "task 0: there is no example"),
        (lambda: compare.mean([0.5, math.nan]), "task 0: a score is not a finite number"),
        (lambda: compare.mean([0.5, math.inf], bounded=False), "task 0: a score is not a finite number"),
        (lambda: compare.macro([[1.0], [1.5]]), "task 1: a bounded score lies outside"),
        (lambda: compare.macro([[[1.0]]]), r"task 0: .* not of shape \(1, 1\)"),
        (lambda: compare.difference([[1.0, 0.0]], [[1.0]]), r"task 0: \[2, 1\] scores are not paired"),
        (lambda: compare.difference([[1.0]], []), r"arms of \[1, 0\] tasks are not paired"),
        (lambda: compare.flips([1.0], [1.0, 0.0]), "not paired by example"),
        (lambda: compare.kept([[1.0]], [[1.0]], [[1.0, 0.0]]), r"\[1, 1, 2\] scores are not paired"),
        (lambda: compare.lift([], [], []), "no task"),
    ],
)
def test_what_is_no_comparison_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
