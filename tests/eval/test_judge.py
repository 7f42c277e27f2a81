"""From scores to verdicts: every number here is worked out by hand; intervals are tested in test_compare.py."""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, cast

import pytest

from lorazip.errors import UsageError
from lorazip.eval.arms import Pair, Team
from lorazip.eval.judge import Cell, Judged, few, judge
from lorazip.eval.results import Comparison, Row, Summary
from lorazip.eval.spec import EvalSpec

N = 20


def right(n: int) -> tuple[float, ...]:
    """The first n of N examples are right."""
    return (1.0,) * n + (0.0,) * (N - n)


def cell(
    arm: str,
    task: str,
    adapter: str | None,
    scores: tuple[float, ...],
    role: Literal["own", "drift"] = "own",
    metric: str = "exact_match",
) -> Cell:
    return Cell(arm, task, adapter, role, metric, metric != "loss", metric != "loss", scores)


def team(name: str) -> Team:
    return Team(name, "original" if name == "original" else "bundle", name, cast(Any, {}), 1, 1)


TEAMS = [team("original"), team("small"), team("baseline")]
PAIRS = [Pair("a", "ant"), Pair("b", "bee"), Pair("c", "cat"), Pair("facts", "ant", "drift")]
# How many of 20 each arm gets right on its tasks. cat is 1 of 20, 5 points, above the best of the base: not enough.
COUNTS: Mapping[str, list[int]] = {
    "base": [2, 0, 10, 12],
    "base-2-shot": [1, 8, 4, 13],
    "original": [12, 16, 11, 12],
    "small": [9, 15, 0, 10],
    "baseline": [12, 16, 11, 12],
}


def cells(counts: Mapping[str, list[int]] = COUNTS, pairs: list[Pair] = PAIRS) -> list[Cell]:
    made = []
    for arm, numbers in counts.items():
        for number, pair in zip(numbers, pairs, strict=True):
            adapter = None if arm in ("base", "base-2-shot") else pair.adapter
            made.append(cell(arm, pair.task, adapter, right(number), pair.role))
            # A loss of 1 nat for every wrong answer.
            losses = tuple(1 - score for score in right(number))
            made.append(cell(arm, pair.task, adapter, losses, pair.role, "loss"))
    return made


@cache
def judged(**options: Any) -> Judged:
    return judge(cells(), PAIRS, TEAMS, EvalSpec(**options))


def summary(found: Judged, arm: str) -> Summary:
    return next(s for s in found[2] if s.arm == arm)


def comparison(found: Judged, arm: str, task: str) -> Comparison:
    return next(c for c in found[1] if (c.arm, c.task) == (arm, task))


def test_a_row_is_a_cells_mean() -> None:
    rows = judged()[0]
    assert len(rows) == 2 * 5 * 4
    row = next(r for r in rows if (r.arm, r.task, r.metric) == ("small", "a", "exact_match"))
    assert row == Row("a", "ant", "small", "exact_match", "own", True, 9 / 20, N, row.low, row.high)
    assert 0.2 < row.low < 9 / 20 < row.high < 0.7
    loss = next(r for r in rows if (r.arm, r.task, r.metric) == ("base", "b", "loss"))
    assert (loss.adapter, loss.score, loss.primary, loss.low, loss.high) == (None, 1.0, False, 1.0, 1.0)


def test_comparisons_are_paired_by_example() -> None:
    found = judged()[1]
    assert [(c.arm, c.task, c.adapter, c.role) for c in found] == [
        (arm, p.task, p.adapter, p.role) for arm in ("small", "baseline") for p in PAIRS
    ]
    one = comparison(judged(), "small", "a")
    assert one.difference.estimate == pytest.approx((9 - 12) / 20)
    assert (one.difference.n, one.fixes, one.breaks, one.p_value) == (N, 0, 3, 0.25)  # 2 / 2^3
    assert one.lift is not None
    assert one.lift.estimate == pytest.approx((9 - 2) / (12 - 2))  # the base at its best is zero-shot here
    two = comparison(judged(), "small", "b")
    assert two.lift is not None
    assert two.lift.estimate == pytest.approx((15 - 8) / (16 - 8))  # and few-shot here
    assert comparison(judged(), "small", "c").lift is None  # 11 against 10 of 20 is nothing certain
    same = comparison(judged(), "baseline", "b")
    assert (same.difference.estimate, same.fixes, same.breaks, same.p_value) == (0, 0, 0, 1)


def test_fixes_and_breaks_are_other_examples() -> None:
    flipped = [
        cell("base", "a", None, right(0)), cell("base", "a", None, right(0), metric="loss"),
        cell("original", "a", "ant", right(10)), cell("original", "a", "ant", right(0), metric="loss"),
        cell("small", "a", "ant", right(10)[::-1]), cell("small", "a", "ant", right(0), metric="loss"),
    ]  # fmt: skip
    one = judge(flipped, PAIRS[:1], TEAMS[:2], EvalSpec())[1][0]
    assert (one.difference.estimate, one.fixes, one.breaks, one.p_value) == (0, 10, 10, 1)


def test_a_summary_is_over_own_tasks() -> None:
    small = summary(judged(), "small")
    assert small.score.estimate == pytest.approx((9 + 15 + 0) / 60)
    assert small.score.n == 3 * N
    assert small.loss is not None
    assert small.loss.estimate == pytest.approx(1 - 24 / 60)
    assert small.difference is not None
    assert small.difference.estimate == pytest.approx((24 - 39) / 60)
    assert (small.fixes_per_100, small.breaks_per_100) == (0, pytest.approx(100 * 15 / 60))
    assert small.p_value == pytest.approx(2 / 2**15)
    assert small.worst is not None
    assert (small.worst.task, small.worst.difference.estimate) == ("c", pytest.approx(-11 / 20))
    assert small.lift is not None
    assert small.lift.estimate == pytest.approx((24 - 20) / (39 - 20))  # best bases: 2, 8 and 10
    assert small.drift is not None
    assert small.drift.estimate == pytest.approx(-2 / 20)


def test_kept_is_of_adapters_that_are_worth_ten_points() -> None:
    """cat, which lost everything, is 5 points above the base; drift tasks are nobody's own."""
    found = judged()
    small, same = summary(found, "small"), summary(found, "baseline")
    assert small.kept is not None and same.kept is not None
    assert small.kept.estimate == pytest.approx((9 + 15) / (12 + 16))
    assert (small.kept_adapters, small.kept.n) == (2, 2 * N)
    assert same.kept.estimate == 1


def test_few_shot_can_take_an_adapter_out_of_kept() -> None:
    """Zero-shot alone, bee is 80 points above the base; ten points are measured from the base at its best."""
    counts = {**COUNTS, "base-2-shot": [1, 15, 4, 13]}
    small = summary(judge(cells(counts), PAIRS, TEAMS, EvalSpec()), "small")
    assert small.kept is not None
    assert (small.kept_adapters, small.kept.estimate) == (1, pytest.approx(9 / 12))
    counts = {**COUNTS, "base-2-shot": [10, 14, 10, 20]}  # just ten points below ant and bee
    assert summary(judge(cells(counts), PAIRS, TEAMS, EvalSpec()), "small").kept_adapters == 2
    none = summary(judge(cells({**COUNTS, "base": [20] * 4}), PAIRS, TEAMS, EvalSpec()), "small")
    assert (none.kept, none.kept_adapters) == (None, 0)


def test_drift_tasks_move_nothing_but_drift() -> None:
    ruined = judge(cells({**COUNTS, "small": [9, 15, 0, 0]}), PAIRS, TEAMS, EvalSpec())
    plain, other = summary(judged(), "small"), summary(ruined, "small")
    assert other.drift is not None
    assert other.drift.estimate == pytest.approx(-12 / 20)
    fields = [name for name in vars(plain) if name != "drift"]
    assert {n: getattr(plain, n) for n in fields} == {n: getattr(other, n) for n in fields}
    own = [pair for pair in PAIRS if pair.role == "own"]
    alone = judge([c for c in cells() if c.role == "own"], own, TEAMS, EvalSpec())
    assert summary(alone, "small").drift is None
    assert summary(alone, "small").kept == plain.kept


@pytest.mark.parametrize("arm", ["base", "base-2-shot", "original"])
def test_base_and_original_are_compared_with_nothing(arm: str) -> None:
    one = summary(judged(), arm)
    assert one.score.estimate == pytest.approx(sum(COUNTS[arm][:3]) / 60)
    assert (one.kept, one.kept_adapters, one.lift, one.difference, one.worst, one.drift) == (
        None,
        0,
        *[None] * 4,
    )
    assert (one.fixes_per_100, one.breaks_per_100, one.p_value) == (None, None, None)


def test_an_arm_whose_name_begins_like_the_base_is_none() -> None:
    assert [s.arm for s in judged()[2]] == list(COUNTS)
    assert summary(judged(), "baseline").difference is not None
    assert few(2) == "base-2-shot"


def test_the_order_of_cells_and_pairs_changes_nothing() -> None:
    random.seed(0)
    mixed, pairs = cells(), PAIRS[:]
    random.shuffle(mixed)
    random.shuffle(pairs)
    found, expected = judge(mixed, pairs, TEAMS, EvalSpec()), judged()
    assert set(found[0]) == set(expected[0])
    assert set(found[1]) == set(expected[1])
    assert set(found[2]) == set(expected[2])


def test_a_base_answers_a_task_of_two_adapters_once() -> None:
    pairs = [Pair("a", "ant"), Pair("a", "bee")]
    some = [
        c
        for arm, adapter, n in (("base", None, 5), ("original", "ant", 10), ("original", "bee", 20))
        for c in (cell(arm, "a", adapter, right(n)), cell(arm, "a", adapter, right(N - n), metric="loss"))
    ]
    found = judge(some, pairs, TEAMS[:1], EvalSpec())
    assert len(found[0]) == 6
    assert summary(found, "base").score.estimate == 5 / 20
    assert summary(found, "original").score.estimate == 15 / 20
    assert found[1] == ()


# --- the gate ---------------------------------------------------------------------------------------------------------


def test_the_gate_judges_every_bundle_and_nothing_else() -> None:
    gate = judged(min_retention=0.8, max_drop=0.3, point=True)[3]
    assert gate is not None
    found = {(c.arm, c.rule): (c.value.estimate, c.verdict) for c in gate.checks if c.value is not None}
    assert found == {
        ("small", "min-retention"): (pytest.approx(24 / 28), "pass"),  # 0.857
        ("small", "max-drop"): (pytest.approx(15 / 60), "pass"),
        ("baseline", "min-retention"): (1, "pass"),
        ("baseline", "max-drop"): (0, "pass"),
    }
    assert (gate.verdict, gate.point) == ("pass", True)
    for options in ({"min_retention": 0.86}, {"max_drop": 0.24}):
        failed = judged(point=True, **options)[3]
        assert failed is not None
        assert failed.verdict == "fail"
        assert {c.arm: c.verdict for c in failed.checks} == {"small": "fail", "baseline": "pass"}
    unsure = judged(min_retention=0.86)[3]
    assert unsure is not None
    assert unsure.verdict == "undecided"  # 40 examples do not tell 0.857 from 0.86


def test_without_thresholds_there_is_no_gate() -> None:
    assert judged()[3] is None


def test_kept_that_cannot_be_measured_is_undecided() -> None:
    gate = judge(cells({**COUNTS, "base": [20] * 4}), PAIRS, TEAMS, EvalSpec(min_retention=0.5))[3]
    assert gate is not None
    assert gate.verdict == "undecided"
    assert all(c.value is None and c.examples_needed is None for c in gate.checks)


@pytest.mark.parametrize("teams", [TEAMS[:1], TEAMS[1:]])
def test_a_gate_without_a_pair_to_compare_is_refused(teams: list[Team]) -> None:
    names = {"base", *(one.name for one in teams)}
    some = [c for c in cells() if c.arm in names]
    with pytest.raises(UsageError, match="the gate has nothing to compare"):
        judge(some, PAIRS, teams, EvalSpec(max_drop=0.1))
    assert judge(some, PAIRS, teams, EvalSpec())[1] == ()
