"""Choosing one encoding for every unit so that a sum stays within a limit: Lagrangian allocation (METHODS.md §5).

    min sum_u f(u, c_u)    so that    sum_u g(u, c_u) <= G

A unit is a module of an adapter, c_u one of its candidate encodings. With a budget f are errors and g bytes; with a
bound on errors f are bytes and g errors, and every adapter is a group with a limit of its own. For a price p each unit
takes the least f + p g by itself, a point on its lower convex hull; every such choice is the best of all that take
no more than its own sum (Everett 1963; Shoham and Gersho 1988 for bits). Bisection finds the price. What is left of the
limit, less than one step of one unit, goes greedily to the moves that gain most for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 100  # of the bisection, by when both ends are neighbours in float64 or their choices agree
FILLS = 400  # moves that use up what is left of a limit


def choose(value: Tensor, cost: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """The candidates of least total value whose total cost is within the limit of their group.

    Args:
        value: (g, u, c) of each group, unit and candidate; infinite where a unit has no such candidate.
        cost: (g, u, c), finite.
        limit: (g,).

    Returns:
        candidates (g, u), and the price (g,) of a unit of cost at which they were found. Where a limit cannot be met,
        the candidates of least cost.
    """
    high = _highest_price(value, cost)
    low = torch.zeros_like(high)
    best = _at(value, cost, high)
    free = _at(value, cost, low)
    fits = total(cost, free) <= limit
    best, high = torch.where(fits[:, None], free, best), torch.where(fits, low, high)
    for step in range(STEPS):
        # Prices span many orders: their logarithm is halved, once the low end has left zero.
        middle = torch.where(low > 0, (low * high).sqrt(), high * (1e-3 if step < STEPS // 2 else 0.5))
        tried = _at(value, cost, middle)
        fits = total(cost, tried) <= limit
        best, high = torch.where(fits[:, None], tried, best), torch.where(fits, middle, high)
        low = torch.where(fits, low, middle)
        if bool((high <= low * (1 + 1e-12)).all()):
            break
    return _filled(value, cost, limit, best), high


def total(of: Tensor, chosen: Tensor) -> Tensor:
    """The sum over units of a (g, u, c) table at the chosen candidates (g, u): (g,)."""
    picked: Tensor = of.gather(2, chosen[..., None])[..., 0].sum(1)
    return picked


def _at(value: Tensor, cost: Tensor, price: Tensor) -> Tensor:
    """(g, u) the candidates of least value + price cost; of equal ones the first in the table."""
    return (value + price[:, None, None] * cost).argmin(2)


def _highest_price(value: Tensor, cost: Tensor) -> Tensor:
    """(g,) a price at which every unit takes its least cost: above it no saved value is worth the least extra cost."""
    finite = torch.where(value.isfinite(), value, 0)
    span = (finite.amax(2) - finite.amin(2)).amax(1)
    above = cost - cost.amin(2, keepdim=True)
    step = torch.where(above > 0, above, torch.inf).amin((1, 2))
    step = torch.where(step.isfinite(), step, 1)
    return 2 * span.clamp_min(1e-300) / step


def _filled(value: Tensor, cost: Tensor, limit: Tensor, chosen: Tensor) -> Tensor:
    """Spend what is left of the limits, one move of one unit at a time, the most value for its cost first."""
    chosen = chosen.clone()
    rows = torch.arange(len(chosen), device=chosen.device)
    for _ in range(FILLS):
        slack = limit - total(cost, chosen)
        at = chosen[..., None]
        less = value.gather(2, at) - value  # (g, u, c) value that the move saves
        more = cost - cost.gather(2, at)
        allowed = (less > 0) & (more <= slack[:, None, None])
        rate = torch.where(allowed, less / more.clamp_min(1e-300), -torch.inf).flatten(1)
        best = rate.argmax(1)
        moving = rate[rows, best] > 0
        if not bool(moving.any()):
            break
        unit, candidate = best // value.shape[2], best % value.shape[2]
        chosen[rows[moving], unit[moving]] = candidate[moving]
    return chosen
