"""`--method auto` over all modules: a pass for the curves, one choice for all, and another where a bound is missed.

The plan is a pure function of factors and options. A module's shard is named by its plan too, so a resumed run takes
only shards of the same choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from lorazip.adapter import LowRank
from lorazip.compress import auto, curves, encode, shards, shrinkage
from lorazip.compress.assemble import SizeSink, assemble, module_errors
from lorazip.compress.auto import Plan
from lorazip.compress.curves import Curve
from lorazip.compress.encode import ModuleCode
from lorazip.compress.profile import ORIGINAL
from lorazip.compress.shards import Shard
from lorazip.compress.sides import Task
from lorazip.compress.spec import Spec
from lorazip.compress.svd import original
from lorazip.errors import UndecidedError
from lorazip.sources import Inputs
from lorazip.terms import Form

CAUTION = 0.995  # of a bound: most adapters then meet it in the first round
LONG = 1.2345678e-05  # an error of as many digits as a manifest writes at most


@dataclass(frozen=True)
class Choice:
    """The plans of all modules, and what they were chosen from.

    Attributes:
        chosen: (n, m) profiles.
        gains: (n,) what each adapter is multiplied by as it is stored.
        attempt: how often a bound was missed.
    """

    curves: tuple[Curve, ...]
    table: auto.Tables
    chosen: torch.Tensor
    gains: torch.Tensor
    attempt: int = 0

    @staticmethod
    def of(curves: tuple[Curve, ...], table: auto.Tables, chosen: torch.Tensor) -> Choice:
        """With the gains for what is chosen."""
        weights = torch.tensor([c.weight for c in curves])
        lost = (_picked(table.residuals, chosen) / weights).sum(1)
        energies = torch.zeros_like(lost)
        for each in curves:
            energies[list(each.having)] += each.energies / each.weight
        return Choice(curves, table, chosen, shrinkage.gains(lost / energies.clamp_min(1e-300)))

    @cached_property
    def plans(self) -> list[Plan]:
        """Module by module."""
        return auto.plans(self.table, self.curves, self.chosen)

    def task(self, place: int, name: str, factors: Sequence[LowRank]) -> Task:
        """The module of that place and name, to be encoded."""
        each = self.curves[place]
        return Task(name, factors, self.plans[place], each.directions, self.gains[list(each.having)])


def survey(inputs: Inputs, spec: Spec, name: str, weight: float = 1.0) -> Curve:
    """The curve of one module; see `curves.curve`."""
    having = [i for i, adapter in enumerate(inputs.adapters) if name in adapter.modules]
    factors = [inputs.adapters[i].low_rank(name) for i in having]
    # A name for the rows as loaded would keep them until the end.
    module = encode.prepare(name, factors, spec)[0]
    return curves.curve(module, having, weight)


def choose(inputs: Inputs, spec: Spec, surveyed: Sequence[Curve]) -> Choice:
    """What the predicted curves say.

    Raises:
        UndecidedError: the budget is smaller than an empty bundle.
    """
    found = tuple(surveyed)
    count = len(inputs.adapters)
    energies = torch.zeros(count, dtype=torch.float64)
    for each in found:
        energies[list(each.having)] += each.energies
    weights = weights_of(energies, spec)
    allowed = shrinkage.allowed(spec.max_error or 0) * energies
    originals = sum(adapter.nbytes for adapter in inputs.adapters)
    budget = int(originals / spec.ratio) if spec.ratio is not None else spec.budget or 0
    if spec.max_error is not None:
        aim = auto.for_errors(found, count, allowed, spec.dtype)
    else:
        aim = auto.for_bytes(found, weights, 0.95 * budget, spec.dtype)
    bases, worth = auto.settled(found, aim, spec.dtype)
    table = auto.tables(found, bases, auto.menu(found, bases, worth, spec.dtype), count, spec.dtype)
    if spec.max_error is not None:
        return Choice.of(found, table, auto.within_errors(table, CAUTION * allowed))
    chosen = auto.for_budget(table, found, budget, weights, lambda plans: _size(inputs, spec, plans))
    return Choice.of(found, table, chosen)


def weights_of(energies: torch.Tensor, spec: Spec) -> torch.Tensor:
    """(n,) what an adapter's residual counts: by its own energy, the mean of all, or the root of their product."""
    power = {"unit": 1.0, "strength": 0.5, "trained": 0.0}[spec.weights]
    each = energies**power * energies.mean() ** (1 - power)
    return torch.where(energies > 0, 1 / each.clamp_min(1e-300), 0) / len(energies)


def _size(inputs: Inputs, spec: Spec, plans: Sequence[Plan]) -> int:
    """Bytes of the bundle of these plans; not less than it will have, for no error has more digits."""
    found = []
    for name, plan in zip(inputs.modules, plans, strict=True):
        ones = torch.ones(len(plan.profiles), dtype=torch.float64)
        found.append(_described(inputs, spec, name, plan, LONG * ones, ones, ones[:1]))
    return assemble(inputs, spec, found, SizeSink(), lambda what, done, total: None)


def foreseen(inputs: Inputs, spec: Spec, choice: Choice) -> list[Shard]:
    """The modules as they are predicted to come out: what a dry run shows."""
    found = []
    residuals = _picked(choice.table.residuals, choice.chosen)
    for m, (name, plan, curve) in enumerate(zip(inputs.modules, choice.plans, choice.curves, strict=True)):
        shares = curve.sigma.square() / curve.energies.clamp_min(1e-300)[:, None]
        own = residuals[list(curve.having), m] / curve.weight
        energies = curve.energies / curve.weight
        gains = choice.gains[list(curve.having)]
        exact = torch.tensor([p == ORIGINAL for p in plan.profiles])
        own = torch.where(exact, own, shrinkage.stretched(own, energies, gains))
        found.append(_described(inputs, spec, name, plan, own, energies, shares.mean(0)))
    return found


def _described(
    inputs: Inputs,
    spec: Spec,
    name: str,
    plan: Plan,
    residuals: torch.Tensor,
    energies: torch.Tensor,
    spectrum: torch.Tensor,
) -> Shard:
    """A module without its tensors."""
    having = [adapter for adapter in inputs.adapters if name in adapter.modules]
    forms: list[Form] = [
        original(adapter.low_rank(name)).form if p == ORIGINAL else p.form(plan.bases, spec.dtype)
        for p, adapter in zip(plan.profiles, having, strict=True)
    ]
    fallbacks = (False,) * len(forms)
    code = ModuleCode(plan.bases.layout, (), tuple(forms), (), residuals, energies, fallbacks, spectrum)
    return shards.describe(code, *inputs.modules[name])


def repaired(inputs: Inputs, spec: Spec, choice: Choice, encoded: Sequence[Shard]) -> Choice | None:
    """Another choice for adapters whose measured error is above the bound; None when there are none."""
    if spec.max_error is None:
        return None
    measured, energies = module_errors(inputs, encoded)
    total = energies.nansum(1)
    allowed = shrinkage.unstretched(spec.max_error * total, total, choice.gains)
    measured = shrinkage.unstretched(measured, energies, choice.gains[:, None])
    found = auto.repaired(choice.table, choice.chosen, measured, allowed, choice.attempt)
    if found is None:
        return None
    if choice.attempt > auto.REPAIRS:
        raise UndecidedError(f"no storage holds the error {spec.max_error} (ask for more)")
    table, chosen = found
    return replace(choice, table=table, chosen=chosen, attempt=choice.attempt + 1)


def _picked(figures: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Of (n, m, c), those of the profiles chosen: (n, m)."""
    return figures.gather(2, chosen[..., None])[..., 0]
