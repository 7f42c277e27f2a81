"""The choice of `--method auto` over all modules and adapters (METHODS.md §5).

1. A worth of residual in bytes is found at which all modules together take the bytes (or every adapter loses the
   energy) that were asked for; modules take the bases that are best at it, and the worth is found again.
2. Around that worth every module of every adapter says which profile it would take. The best of them become the menu:
   a bundle lists its forms once, so that few of them cost hardly any bytes.
3. From the menu's predicted bytes and residuals `rate.choose` picks, exactly to the budget or bound.
4. What was encoded is measured; where an adapter then misses its bound, the predictions of its modules are corrected by
   what was measured and it chooses again.

Residuals and bounds here are those of projections, before adapters are made as strong as they were (shrinkage.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from itertools import islice

import torch
from torch import Tensor

from lorazip.compress import pricing, rate
from lorazip.compress.curves import Curve
from lorazip.compress.pricing import LOADED
from lorazip.compress.profile import NOTHING, ORIGINAL, RATES, WHOLE, Bases, Basis, Profile
from lorazip.errors import UndecidedError

MENU = 250  # profiles at most, besides those of floating-point numbers
LISTED = 120  # bytes that a profile costs by being there: its form, and that others' numbers grow longer
OFFERS = 2000  # profiles that it is chosen from
AGAIN = 32  # offers that are looked at together
SAMPLE = 400  # modules of adapters that the menu is made for
AROUND = (0.6, 1.6)  # times the worth found: where profiles are asked for
ROUNDS = 2  # of bases and worth
STEPS = 24  # of a search for a worth
TRIES = 8  # plans whose bytes are counted to meet a budget
REPAIRS = 8  # rounds of choosing again before an adapter that misses its bound is stored as it was


@dataclass(frozen=True)
class Plan:
    """How one module is stored: its bases, and the profile of every adapter that has it."""

    bases: Bases
    profiles: tuple[Profile, ...]

    @property
    def digest(self) -> str:
        """A name for the plan."""
        return sha256(repr(self).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Tables:
    """Bytes and residuals of every adapter, module and profile, (n, m, c); infinite residuals where there is none."""

    menu: list[Profile]
    bases: tuple[Bases, ...]
    nbytes: Tensor
    residuals: Tensor
    energies: Tensor  # (n,)


Aim = Callable[[Sequence[Bases]], Tensor]  # bases of all modules -> worth (n,)


def for_bytes(curves: Sequence[Curve], weights: Tensor, budget: float, dtype: str) -> Aim:
    """The worth, in proportion to `weights`, at which all own and shared tensors take about `budget` bytes."""
    bunches = pricing.bunches(curves)

    def aim(bases: Sequence[Bases]) -> Tensor:
        shared = sum(pricing.basis_bytes(c, b) for c, b in zip(curves, bases, strict=True))

        def over(scale: Tensor) -> Tensor:
            taken = shared + sum(
                float(pricing.priced(some, some.of(bases), scale * weights, dtype, usual=True).nbytes.sum())
                for some in bunches
            )
            return torch.tensor(taken > budget)

        return _bisected(over, torch.tensor(1.0, dtype=torch.float64)) * weights

    return aim


def for_errors(curves: Sequence[Curve], adapters: int, allowed: Tensor, dtype: str) -> Aim:
    """The worth of every adapter at which its residuals sum to about `allowed` (n,)."""
    energies = torch.zeros(adapters, dtype=torch.float64)
    for c in curves:
        energies[list(c.having)] += c.energies
    unit = torch.where(energies > 0, 1 / energies.clamp_min(1e-300), 1)
    bunches = pricing.bunches(curves)

    def aim(bases: Sequence[Bases]) -> Tensor:
        def over(scale: Tensor) -> Tensor:
            total = torch.zeros(adapters, dtype=torch.float64)
            for some in bunches:
                found = pricing.priced(some, some.of(bases), scale * unit, dtype, usual=True)
                total.index_add_(0, some.having.flatten(), found.residual.flatten())
            return total <= allowed

        return _bisected(over, torch.ones(adapters, dtype=torch.float64)) * unit

    return aim


def _bisected(over: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """The scale at which `over`, false below and true above, turns; within a few per cent, several at a time."""
    low, high = torch.full_like(start, -30.0), torch.full_like(start, 90.0)  # powers of two
    for _ in range(STEPS):
        middle = (low + high) / 2
        above = over(2.0**middle)
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        if float((high - low).max()) < 0.05:
            break
    return 2.0 ** ((low + high) / 2)


def settled(curves: Sequence[Curve], aim: Aim, dtype: str) -> tuple[tuple[Bases, ...], Tensor]:
    """Bases of every module and the worth (n,) that go with each other."""
    bases = [Bases()] * len(curves)
    bunches = pricing.bunches(curves)
    for _ in range(ROUNDS):
        worth = aim(bases)
        for some in bunches:
            best = pricing.best_bases(some, worth, dtype, some.of(bases))
            for place, each in zip(some.places, best, strict=True):
                bases[place] = each
    return tuple(bases), aim(bases)


def menu(curves: Sequence[Curve], bases: Sequence[Bases], worth: Tensor, dtype: str) -> list[Profile]:
    """The profiles that together serve best around that worth: nothing first, the original last.

    Some units (modules of adapters) at several worths are customers, and what units would take by themselves is on
    offer. Greedily the offer that saves all customers most is taken, as long as it saves more than listing it costs.
    """
    wanted: Counter[Profile] = Counter()
    for factor in AROUND:
        for some in pricing.bunches(curves):
            found = pricing.priced(some, some.of(bases), factor * worth, dtype)
            rates_of, loaded_of = found.rates.flatten(0, 1).tolist(), found.loaded.flatten().tolist()
            units = Counter(zip(map(tuple, rates_of), loaded_of, strict=True))
            for (rates, loaded), count in units.items():
                wanted[pricing.profile(rates, loaded)] += count
    most = (p for p, _ in wanted.most_common() if p.rank and p.nameable)
    offers = [NOTHING, *islice(most, OFFERS - 1)]
    table = _Rates.of(offers)
    step = -(-sum(len(c.having) for c in curves) // SAMPLE)
    costs, at = [], 0
    for c, b in zip(curves, bases, strict=True):
        rows = list(range(-at % step, len(c.having), step))
        at += len(c.having)
        residuals, nbytes = _predicted(c, b, table, dtype, rows)
        mu = worth[[c.having[i] for i in rows]][:, None]
        costs += [_worth(residuals, factor * mu) + nbytes for factor in AROUND]
    whole = torch.cat(costs) * (step / len(AROUND))  # (customers, offers)
    chosen = _served(whole.T.contiguous())
    widest = max(max(c.ranks) for c in curves)
    plain = [Profile((WHOLE,) * r, (WHOLE,) * r) for r in range(1, widest + 1)] if widest <= MENU else []
    return [*dict.fromkeys([*(offers[i] for i in chosen), *plain]), ORIGINAL]


def _worth(residuals: Tensor, weights: Tensor) -> Tensor:
    """Their product; what cannot be stays infinite where the weight is 0, that of an adapter of zeros."""
    return torch.where(residuals.isfinite(), weights * residuals, torch.inf)


def _served(whole: Tensor) -> list[int]:
    """The offers that serve best together, the first one among them: at most MENU, each worth its listing.

    What an offer saves only shrinks as others are taken, so that what it saved before bounds it now. Those of the
    greatest bounds are looked at again, until the best of them is above all other bounds (Minoux 1978).

    Args:
        whole: (offers, customers) what an offer costs a customer.
    """
    served, chosen = whole[0], [0]
    bounds = (served - whole).clamp_min(0).sum(1)
    while len(chosen) < MENU:
        fresh = torch.zeros(len(whole), dtype=torch.bool)
        while bool((stale := bounds.masked_fill(fresh, -1)).max() > bounds.masked_fill(~fresh, -1).max()):
            some = stale.topk(min(AGAIN, len(stale))).indices
            bounds[some] = (served - whole[some]).clamp_min(0).sum(1)
            fresh[some] = True
        best = int(bounds.masked_fill(~fresh, -1).argmax())
        if float(bounds[best]) <= LISTED:
            break
        chosen.append(best)
        served = torch.minimum(served, whole[best])
    return chosen


@dataclass(frozen=True)
class _Rates:
    """Some profiles, none of them the original, as tensors.

    Attributes:
        sides: (2, r, c) index of each row's rate; len(RATES) beyond the rank.
        ranks: (c,).
        loaded: (c,) index into LOADED.
    """

    sides: Tensor
    ranks: Tensor
    loaded: Tensor

    @staticmethod
    def of(profiles: Sequence[Profile]) -> _Rates:
        most = max(p.rank for p in profiles)
        place = {rate: i for i, rate in enumerate(RATES)}
        out = [len(RATES)]
        sides = [
            [[place[r] for r in rates] + out * (most - len(rates)) for rates in (p.left, p.right)]
            for p in profiles
        ]
        return _Rates(
            torch.tensor(sides, dtype=torch.long).view(len(profiles), 2, most).permute(1, 2, 0),
            torch.tensor([p.rank for p in profiles]),
            torch.tensor([LOADED.index(p.loaded) for p in profiles]),
        )


def _predicted(
    curve: Curve, bases: Bases, table: _Rates, dtype: str, rows: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Residuals (n, c), infinite where an adapter has no such profile, and bytes (c,) of profiles for some adapters.

    Args:
        rows: places in the curve.
    """
    (one,) = pricing.bunches([curve])
    squares = curve.sigma[list(rows)].square()
    ranks = torch.tensor(curve.ranks)[list(rows)]
    most = min(squares.shape[1], table.sides.shape[1])
    residuals = torch.full((len(rows), len(table.ranks)), torch.inf, dtype=torch.float64)
    nbytes = torch.zeros(len(table.ranks), dtype=torch.float64)

    @cache
    def kept(side: int, basis: Basis | None) -> Tensor:
        """Of a row's energy at every rate, and 0 beyond the rank: (rows, most, 1 + rates)."""
        left = pricing.leftover(one, side, [basis], dtype)[0, list(rows), :most].double()
        return torch.nn.functional.pad(1 - left, (0, 1))

    for index, loaded in enumerate(LOADED):
        used = [b if on else None for b, on in zip((bases.left, bases.right), loaded, strict=True)]
        mine = ((table.loaded == index) & (table.ranks <= most)).nonzero()[:, 0]
        if not len(mine) or any(on and b is None for on, b in zip(loaded, used, strict=True)):
            continue
        captured = squares[:, :most, None]
        for side, basis in enumerate(used):
            at = table.sides[side, :most][:, mine]
            captured = captured * kept(side, basis).gather(2, at.expand(len(rows), -1, -1))
            sizes = torch.nn.functional.pad(pricing.side_bytes(curve, side, basis, dtype), (0, 1))
            nbytes[mine] += sizes[at].sum(0).double()
        left = (squares.sum(1, keepdim=True) - captured.sum(1)).clamp_min(0)
        residuals[:, mine] = torch.where(ranks[:, None] < table.ranks[mine], torch.inf, left)
    return residuals, nbytes


def tables(
    curves: Sequence[Curve], bases: tuple[Bases, ...], choices: list[Profile], adapters: int, dtype: str
) -> Tables:
    """Predict every profile of a menu."""
    nbytes = torch.zeros(adapters, len(curves), len(choices), dtype=torch.float64)
    residuals = torch.full_like(nbytes, torch.inf)
    residuals[..., 0] = 0  # a module that an adapter lacks
    energies = torch.zeros(adapters, dtype=torch.float64)
    coded = _Rates.of(choices[:-1])
    for m, (each, shared) in enumerate(zip(curves, bases, strict=True)):
        rows = list(each.having)
        energies[rows] += each.energies
        found, sizes = _predicted(each, shared, coded, dtype, range(len(rows)))
        residuals[rows, m] = torch.nn.functional.pad(found, (0, 1))
        nbytes[rows, m, :-1] = sizes
        nbytes[rows, m, -1] = each.original_bytes
    return Tables(choices, bases, nbytes, residuals, energies)


def within_bytes(table: Tables, budget: float, weights: Tensor) -> Tensor:
    """(n, m) profiles of least sum_i w_i residual_i whose own tensors take at most so many bytes."""
    value = _worth(table.residuals, weights[:, None, None]).flatten(0, 1)[None]
    chosen, _ = rate.choose(value, table.nbytes.flatten(0, 1)[None], value.new_tensor([budget]))
    return chosen.view(table.nbytes.shape[:2])


def within_errors(table: Tables, allowed: Tensor) -> Tensor:
    """(n, m) profiles of least bytes, every adapter's residuals at most `allowed` (n,)."""
    there = table.residuals.isfinite()
    value = torch.where(there, table.nbytes, torch.inf)
    chosen, _ = rate.choose(value, torch.where(there, table.residuals, 1e300), allowed)
    return chosen


def plans(table: Tables, curves: Sequence[Curve], chosen: Tensor) -> list[Plan]:
    """The choices module by module; a basis that nobody uses is not stored."""
    found = []
    for m, (each, bases) in enumerate(zip(curves, table.bases, strict=True)):
        profiles = tuple(table.menu[int(chosen[i, m])] for i in each.having)
        used = [any(p.loaded[side] for p in profiles) for side in (0, 1)]
        found.append(Plan(Bases(bases.left if used[0] else None, bases.right if used[1] else None), profiles))
    return found


def for_budget(
    table: Tables,
    curves: Sequence[Curve],
    budget: int,
    weights: Tensor,
    size: Callable[[Sequence[Plan]], int],
) -> Tensor:
    """The least mean error whose bundle has at most `budget` bytes, bases, headers and manifest counted.

    Args:
        size: bytes of the bundle of these plans.
    Raises:
        UndecidedError: not even a bundle of nothing is so small.
    """
    chosen = torch.zeros(table.nbytes.shape[:2], dtype=torch.long)
    least = size(plans(table, curves, chosen))
    if least > budget:
        raise UndecidedError(
            f"{budget} bytes are too few: names, configs and headers alone take {least} (allow more bytes)"
        )
    best, best_loss = chosen, float("inf")
    shared = sum(pricing.basis_bytes(c, b) for c, b in zip(curves, table.bases, strict=True))
    around = float(least + shared)  # bytes of the bundle that are not own tensors
    for _ in range(TRIES):
        tried = within_bytes(table, budget - around, weights)
        own = float(table.nbytes.gather(2, tried[..., None]).sum())
        nbytes = size(plans(table, curves, tried))
        loss = float((table.residuals.gather(2, tried[..., None])[..., 0].sum(1) * weights).sum())
        if nbytes <= budget and loss < best_loss:
            best, best_loss = tried, loss
        if 0 <= budget - nbytes <= 1e-3 * budget:
            break
        around = nbytes - own if nbytes - own != around else around + max(1.0, nbytes - budget)
    return best


def corrected(table: Tables, chosen: Tensor, measured: Tensor) -> Tables:
    """The tables after what was chosen was measured: a unit that erred once errs alike in its other profiles.

    Args:
        chosen: (n, m).
        measured: (n, m) residuals, NaN where an adapter lacks the module.
    """
    predicted = table.residuals.gather(2, chosen[..., None])[..., 0]
    known = ~measured.isnan() & (predicted > 0) & (measured > 0)
    factor = torch.where(known, measured / predicted.clamp_min(1e-300), 1)
    return replace(table, residuals=table.residuals * factor[..., None])


def repaired(
    table: Tables, chosen: Tensor, measured: Tensor, allowed: Tensor, attempt: int
) -> tuple[Tables, Tensor] | None:
    """Choose again for adapters that miss the bound; None when all meet it.

    Args:
        measured: (n, m) residuals of what is stored.
        allowed: (n,) what their sums may be.
        attempt: 0, 1 ...: later ones aim lower.
    """
    missed = measured.nansum(1) > allowed
    if not bool(missed.any()):
        return None
    table = corrected(table, chosen, measured)
    again = within_errors(table, (1 - 0.004 * attempt) * allowed)
    if attempt >= REPAIRS:
        again = torch.where(measured.isnan(), 0, len(table.menu) - 1)
    return table, torch.where(missed[:, None], again, chosen)
