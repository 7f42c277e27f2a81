"""Lagrangian allocation against all combinations of small menus."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorazip.compress import rate


def menus(
    seed: int, groups: int, units: int, candidates: int, *, whole: bool = False
) -> tuple[Tensor, Tensor]:
    """Values and costs (g, u, c); the first candidate costs nothing."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.rand(groups, units, candidates, generator=generator, dtype=torch.float64)
    cost = torch.rand(groups, units, candidates, generator=generator, dtype=torch.float64)
    if whole:
        value, cost = (10 * value).round(), (10 * cost).round()
    cost[..., 0] = 0
    return value, cost


def hull(value: Tensor, cost: Tensor) -> list[int]:
    """The candidates (c,) that some price in [0, inf] would choose, by falling value and rising cost."""
    order = sorted(range(len(value)), key=lambda c: (float(cost[c]), float(value[c])))
    kept: list[int] = []
    for c in order:
        if kept and value[c] >= value[kept[-1]]:
            continue
        while len(kept) > 1 and _slope(value, cost, kept[-2], c) <= _slope(value, cost, kept[-2], kept[-1]):
            kept.pop()
        if kept and cost[c] == cost[kept[-1]]:
            kept.pop()
        kept.append(c)
    return kept


def _slope(value: Tensor, cost: Tensor, a: int, b: int) -> float:
    return float((value[b] - value[a]) / (cost[b] - cost[a]))


def least(value: Tensor, cost: Tensor, limit: float) -> float:
    """The best total value of one group by trying everything."""
    best = float("inf")
    for picks in itertools.product(range(value.shape[1]), repeat=len(value)):
        rows = torch.arange(len(value)), torch.tensor(picks)
        if float(cost[rows].sum()) <= limit:
            best = min(best, float(value[rows].sum()))
    return best


@given(st.integers(0, 10_000), st.floats(0, 1), st.booleans())
def test_within_the_limit_and_one_step_of_the_best(seed: int, share: float, whole: bool) -> None:
    value, cost = menus(seed, 2, 4, 4, whole=whole)
    limit = share * cost.amax(2).sum(1)
    chosen, _ = rate.choose(value, cost, limit)
    assert bool((rate.total(cost, chosen) <= limit).all())
    for g in range(2):
        best = least(value[g], cost[g], float(limit[g]))
        found = float(rate.total(value, chosen)[g])
        steps = [float(v[h].diff().abs().max()) for v, c in zip(value[g], cost[g], strict=True)
                 if len(h := hull(v, c)) > 1]  # fmt: skip
        assert best - 1e-9 <= found <= best + max(steps, default=0.0) + 1e-9


@given(st.integers(0, 10_000), st.floats(0, 3))
def test_what_a_price_chooses_is_the_best_at_its_own_cost(seed: int, price: float) -> None:
    value, cost = menus(seed, 1, 4, 4)
    chosen = (value + price * cost).argmin(2)
    limit = rate.total(cost, chosen)
    again, _ = rate.choose(value, cost, limit + 1e-12)
    assert float(rate.total(value, again)) == pytest.approx(least(value[0], cost[0], float(limit) + 1e-12))


@given(st.integers(0, 10_000), st.integers(1, 9), st.booleans())
def test_hull_holds_what_prices_choose(seed: int, candidates: int, whole: bool) -> None:
    value, cost = (t[0, 0] for t in menus(seed, 1, 1, candidates, whole=whole))
    kept = hull(value, cost)
    v, c = value[kept], cost[kept]
    assert bool((v.diff() < 0).all()) and bool((c.diff() > 0).all())
    slopes = v.diff() / c.diff()
    assert bool((slopes.diff() > 0).all())
    for price in (0.0, 0.01, 0.3, 1.0, 3.0, 100.0):
        assert float((v + price * c).min()) == pytest.approx(float((value + price * cost).min()))


@given(st.integers(0, 10_000))
def test_groups_do_not_see_each_other(seed: int) -> None:
    value, cost = menus(seed, 3, 5, 4)
    limit = cost.amax(2).sum(1) * torch.tensor([0.1, 0.4, 0.9])
    together, _ = rate.choose(value, cost, limit)
    for g in range(3):
        alone, _ = rate.choose(value[g : g + 1], cost[g : g + 1], limit[g : g + 1])
        assert torch.equal(alone[0], together[g])


@given(st.integers(0, 10_000), st.floats(0, 0.9))
def test_more_room_never_loses_more_than_a_step(seed: int, share: float) -> None:
    value, cost = menus(seed, 1, 40, 6)
    top = cost.amax(2).sum(1)
    small, _ = rate.choose(value, cost, share * top)
    large, _ = rate.choose(value, cost, (share + 0.1) * top)
    assert float(rate.total(value, large)) <= float(rate.total(value, small)) + 1.0


def test_a_limit_that_nothing_meets_gets_the_least_cost() -> None:
    value, cost = menus(0, 1, 3, 4)
    cost += 1
    chosen, _ = rate.choose(value, cost, torch.tensor([1.0], dtype=torch.float64))
    assert torch.equal(chosen, cost.argmin(2))


def test_room_for_all_gets_the_least_value() -> None:
    value, cost = menus(1, 2, 5, 4)
    chosen, price = rate.choose(value, cost, torch.tensor([100.0, 100.0], dtype=torch.float64))
    assert torch.equal(chosen, value.argmin(2))
    assert price.tolist() == [0, 0]


def test_missing_candidates_are_never_chosen() -> None:
    value, cost = menus(2, 1, 6, 4)
    value[:, :, 2] = torch.inf
    for share in (0.0, 0.2, 0.5, 1.0):
        chosen, _ = rate.choose(value, cost, share * cost.amax(2).sum(1))
        assert not bool((chosen == 2).any())
