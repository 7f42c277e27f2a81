"""`--method auto` over all modules: a pass for the curves, one choice for all, and another where a bound is missed.

The plan is a pure function of factors and options. A module's shard is named by its plan too, so a resumed run takes
only shards of the same choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lorazip.compress import auto, encode, shards
from lorazip.compress.assemble import SizeSink, assemble, module_errors
from lorazip.compress.auto import Curve, Noise, Plan
from lorazip.compress.encode import ModuleCode
from lorazip.compress.shards import Shard
from lorazip.compress.spec import Spec
from lorazip.errors import UndecidedError
from lorazip.sources import Inputs
from lorazip.terms import Form

SAMPLED = 4  # modules in which rounding is measured
LONG = 1.2345678e-05  # an error of as many digits as a manifest writes at most


@dataclass(frozen=True)
class Choice:
    """The plans of all modules, and what they were chosen from.

    Attributes:
        chosen: (n, m) candidates.
        attempt: how often a bound was missed.
    """

    curves: tuple[Curve, ...]
    table: auto.Tables
    chosen: torch.Tensor
    attempt: int = 0

    @property
    def plans(self) -> list[Plan]:
        """Module by module."""
        return auto.plans(self.table, self.curves, self.chosen)


def survey(inputs: Inputs, spec: Spec, name: str, sampled: bool) -> tuple[Curve, auto.Samples]:
    """The curve of one module, and where it is sampled, how much its rounding costs."""
    having = [i for i, adapter in enumerate(inputs.adapters) if name in adapter.modules]
    module, _ = encode.prepare(name, [inputs.adapters[i].low_rank(name) for i in having], spec)
    return auto.curve(module, having), auto.noise(module) if sampled else {}


def choose(inputs: Inputs, spec: Spec, surveyed: Sequence[tuple[Curve, auto.Samples]]) -> Choice:
    """What the predicted curves say.

    Raises:
        UndecidedError: the budget is smaller than an empty bundle.
    """
    curves = tuple(curve for curve, _ in surveyed)
    noise: Noise = auto.averaged([samples for _, samples in surveyed])
    table = auto.tables(curves, noise, len(inputs.adapters), spec.dtype)
    if spec.max_error is not None:
        return Choice(curves, table, auto.within_errors(table, spec.max_error * table.energies))
    originals = sum(adapter.nbytes for adapter in inputs.adapters)
    budget = spec.budget if spec.ratio is None else int(originals / spec.ratio)
    assert budget is not None
    sized = auto.for_budget(
        table, curves, budget, _weights(table, spec), lambda plans: _size(inputs, spec, plans)
    )
    return Choice(curves, table, sized)


def _weights(table: auto.Tables, spec: Spec) -> torch.Tensor:
    """(n,) what an adapter's residual counts: its share of its own energy, or of all energy."""
    energies = table.energies if spec.weights == "unit" else table.energies.mean().expand_as(table.energies)
    return torch.where(energies > 0, 1 / energies.clamp_min(1e-300), 0) / len(energies)


def _size(inputs: Inputs, spec: Spec, plans: Sequence[Plan]) -> int:
    """Bytes of the bundle of these plans; not less than it will have, for no error has more digits."""
    predicted = []
    for (name, (out, in_)), plan in zip(inputs.modules.items(), plans, strict=True):
        having = [adapter for adapter in inputs.adapters if name in adapter.modules]
        forms: list[Form] = [
            auto.form(choice, adapter.low_rank(name)) if choice == auto.ORIGINAL else auto.form(choice, None)
            for choice, adapter in zip(plan, having, strict=True)
        ]
        ones = torch.ones(len(plan), dtype=torch.float64)
        code = ModuleCode((), (), tuple(forms), (), LONG * ones, ones, (False,) * len(plan), ones[:1])
        predicted.append(shards.describe(code, out, in_))
    return assemble(inputs, spec, predicted, SizeSink(), lambda what, done, total: None)


def repaired(inputs: Inputs, spec: Spec, choice: Choice, encoded: Sequence[Shard]) -> Choice | None:
    """Another choice for adapters whose measured error is above the bound; None when there are none."""
    if spec.max_error is None:
        return None
    measured, _ = module_errors(inputs, encoded)
    found = auto.repaired(choice.table, choice.chosen, measured, spec.max_error, choice.attempt)
    if found is None:
        return None
    if choice.attempt > auto.REPAIRS:
        raise UndecidedError(f"no storage holds the error {spec.max_error} (ask for more)")
    return Choice(choice.curves, *found, choice.attempt + 1)
