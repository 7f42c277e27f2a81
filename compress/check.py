"""Compare a bundle with the originals: the proof that they may be deleted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt

import torch

from lorazip.adapter import Adapter
from lorazip.bundle import Bundle, BundleAdapter
from lorazip.compress.encode import load, residuals2
from lorazip.compress.lowrank import norms2, untangled

# Another machine or device decodes in another order of float32 sums. Decoding in float64 instead moves the root of an
# error by 5e-9 to 4e-8 on the adapters of examples/zoo; this leaves a factor of five.
ROUNDING = 2e-7
DIGITS = 1e-8  # recorded errors have 8 digits


@dataclass(frozen=True)
class Comparison:
    """One adapter against its original.

    Attributes:
        name: of both.
        recorded: error in the manifest; None when the bundle has no such adapter.
        measured: the same, measured now; None when it could not be.
        problems: what differs beyond rounding; empty is good.
    """

    name: str
    recorded: float | None
    measured: float | None
    problems: tuple[str, ...]


def compare(
    bundle: Bundle,
    originals: Sequence[Adapter],
    device: torch.device,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[Comparison]:
    """Recompute err_i of every original from the bundle's bytes, and compare configs and carried tensors.

    One module of all adapters at a time, as in compression.
    """
    known = set(bundle.names)
    pairs = [(o, bundle.adapter(o.name)) for o in originals if o.name in known]
    problems = {o.name: differences(o, stored) for o, stored in pairs}
    whole = [(o, stored) for o, stored in pairs if not problems[o.name]]
    residuals, energies = torch.zeros(2, len(whole), dtype=torch.float64)
    modules = bundle.manifest.modules
    for done, module in enumerate(modules, 1):
        having = [i for i, (original, _) in enumerate(whole) if module.name in original.modules]
        if having:
            # As compression measured it; and what is stored as it was trained cancels as that does.
            first, second = (
                untangled(load([whole[i][side].low_rank(module.name) for i in having], device))
                for side in (0, 1)
            )
            residuals[having] += residuals2(first, second).cpu()
            energies[having] += norms2(first).cpu()
        progress("comparing", done, len(modules))
    measured = torch.where(energies > 0, residuals / energies.clamp_min(1e-300), residuals)
    errors = {original.name: float(error) for (original, _), error in zip(whole, measured, strict=True)}
    return [_compared(o, bundle, errors.get(o.name), problems.get(o.name)) for o in originals]


def _compared(
    original: Adapter, bundle: Bundle, measured: float | None, problems: Sequence[str] | None
) -> Comparison:
    if problems is None:
        return Comparison(original.name, None, None, ("is not in the bundle",))
    recorded = bundle.adapter(original.name).record.error
    found = list(problems)
    if measured is not None and not agree(measured, recorded):
        found.append(
            f"its error is {measured:.6g}, the bundle says {recorded:.6g}: not the adapter that was compressed"
        )
    return Comparison(original.name, recorded, measured, tuple(found))


def agree(measured: float, recorded: float) -> bool:
    """Whether two errors of one adapter differ by rounding only.

    If D^ moves by d, ||D^ - D|| moves by at most ||d||: roots of errors are compared.
    """
    return abs(sqrt(measured) - sqrt(recorded)) <= ROUNDING + DIGITS * sqrt(recorded)


def differences(original: Adapter, stored: BundleAdapter) -> list[str]:
    """What must be equal to the letter."""
    found = []
    if original.config != stored.config:
        keys = {
            k for k in {*original.config, *stored.config} if original.config.get(k) != stored.config.get(k)
        }
        found.append(f"its config differs in {', '.join(sorted(keys)) or 'absent fields'}")
    shapes = {m: (i.out, i.in_) for m, i in original.modules.items()}
    if shapes != {m: (i.out, i.in_) for m, i in stored.modules.items()}:
        found.append("it has other modules or shapes than the bundle's adapter")
    if original.extras != stored.extras:
        found.append("it carries other tensors than the bundle's adapter")
    else:
        for key in original.extras:
            one, two = original.extra(key), stored.extra(key)
            if not torch.equal(one.contiguous().view(torch.uint8), two.contiguous().view(torch.uint8)):
                found.append(f"{key} differs")
    return found
