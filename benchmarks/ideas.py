#!/usr/bin/env python3
"""What each idea behind `--method auto` gains, from its own predictions (docs/AUTO.md says how near).

    python benchmarks/ideas.py ZOO [--every 6] [--ratio 8 --ratio 16 --ratio 48]

Own tensors and shared bases count, names and headers do not. Every error is brought to just that ratio, as if it fell
in proportion to the bytes: allocations miss a budget by a few parts of a thousand.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorazip import Spec, open_adapters
from lorazip.compress import auto, cluster, curves, encode, planning, pricing
from lorazip.compress.curves import Curve
from lorazip.compress.methods import METHODS
from lorazip.compress.profile import Bases

DTYPE = "float16"
CLUSTERS = (2, 4)
SHARED = 16  # columns of the bases that clusters are found with


@dataclass(frozen=True)
class Zoo:
    """Some modules of all adapters."""

    curves: list[Curve]
    energies: Tensor

    @staticmethod
    def of(path: str, every: int) -> Zoo:
        inputs = open_adapters([path])
        spec = Spec("auto", ratio=8.0, device="cpu")
        curves = [planning.survey(inputs, spec, name) for name in list(inputs.modules)[::every]]
        energies = torch.zeros(len(inputs.adapters), dtype=torch.float64)
        for curve in curves:
            energies[list(curve.having)] += curve.energies
        return Zoo(curves, energies)

    @staticmethod
    def clustered(path: str, every: int, count: int) -> Zoo:
        """The same, the adapters of every module parted as jd-full parts them: a curve and bases for each part."""
        inputs = open_adapters([path])
        spec = Spec("auto", ratio=8.0, device="cpu")
        found = []
        energies = torch.zeros(len(inputs.adapters), dtype=torch.float64)
        for name in list(inputs.modules)[::every]:
            having = [i for i, adapter in enumerate(inputs.adapters) if name in adapter.modules]
            factors = [inputs.adapters[i].low_rank(name) for i in having]
            whole = encode.prepare(name, factors, spec)[0]
            energies[having] += whole.energies
            fitted = cluster.fit(
                METHODS["jd-full"], whole.stack, whole.weights, whole.energies, SHARED, count
            )
            for label in sorted(set(fitted.labels)):
                some = [i for i, own in enumerate(fitted.labels) if own == label]
                part = encode.prepare(name, [factors[i] for i in some], spec)[0]
                found.append(curves.curve(part, [having[i] for i in some]))
        return Zoo(found, energies)

    @property
    def weights(self) -> Tensor:
        return 1 / self.energies / len(self.energies)

    def budget(self, ratio: float) -> float:
        return sum(float(curve.original_bytes.sum()) for curve in self.curves) / ratio


def hidden(zoo: Zoo, *sides: int) -> Zoo:
    """The same adapters without directions to share on these sides."""
    curves = []
    for curve in zoo.curves:
        outside = [o[:, :, :0] if side in sides else o for side, o in enumerate(curve.outside)]
        curves.append(replace(curve, outside=(outside[0], outside[1])))
    return replace(zoo, curves=curves)


def error(zoo: Zoo, ratio: float) -> tuple[float, tuple[Bases, ...], Tensor]:
    """The least mean error when every module of every adapter takes what is best for itself; bases and worth for it."""
    budget = zoo.budget(ratio)
    aim = auto.for_bytes(zoo.curves, zoo.weights, budget, DTYPE)
    bases, worth = auto.settled(zoo.curves, aim, DTYPE)
    return _brought(zoo, bases, worth, budget), bases, worth


def _brought(zoo: Zoo, bases: Sequence[Bases], worth: Tensor, budget: float) -> float:
    taken = sum(float(pricing.basis_bytes(c, b)) for c, b in zip(zoo.curves, bases, strict=True))
    lost = torch.zeros_like(zoo.energies)
    for some in pricing.bunches(zoo.curves):
        found = pricing.priced(some, some.of(bases), worth, DTYPE)
        taken += float(found.nbytes.sum())
        lost.index_add_(0, some.having.flatten(), found.residual.flatten())
    return float((lost * zoo.weights).sum()) * taken / budget


def equal(zoo: Zoo, ratio: float) -> float:
    """Every module of every adapter has the same share of the bytes, instead of what it is worth."""
    total = 0.0
    for curve in zoo.curves:
        one = Zoo([curve], zoo.energies)
        budget = one.budget(ratio)
        bases, worth = auto.settled([curve], auto.for_bytes([curve], one.weights, budget, DTYPE), DTYPE)
        total += _brought(one, bases, worth, budget)
    return total


def listed(zoo: Zoo, ratio: float) -> tuple[float, int]:
    """The error with profiles of the menu alone, as a bundle has them, and how many it has."""
    _, bases, worth = error(zoo, ratio)
    choices = auto.menu(zoo.curves, bases, worth, DTYPE)
    table = auto.tables(zoo.curves, bases, choices, len(zoo.energies), DTYPE)
    shared = sum(pricing.basis_bytes(c, b) for c, b in zip(zoo.curves, bases, strict=True))
    chosen = auto.within_bytes(table, zoo.budget(ratio) - shared, zoo.weights)
    lost = table.residuals.gather(2, chosen[..., None])[..., 0].sum(1)
    return float((lost * zoo.weights).sum()), len(choices)


def main() -> None:
    """Print the table in Markdown."""
    parser = argparse.ArgumentParser(description="Gains of the ideas behind auto.")
    parser.add_argument("zoo")
    parser.add_argument("--every", type=int, default=6, help="every so many modules")
    parser.add_argument("--ratio", type=float, action="append", help="default: 8, 16, 48")
    args = parser.parse_args()
    ratios = args.ratio or [8.0, 16.0, 48.0]
    zoo = Zoo.of(args.zoo, args.every)
    rows = {
        "all": [error(zoo, r)[0] for r in ratios],
        "nothing shared": [error(hidden(zoo, 0, 1), r)[0] for r in ratios],
        "only left sides shared": [error(hidden(zoo, 1), r)[0] for r in ratios],
        "only right sides shared": [error(hidden(zoo, 0), r)[0] for r in ratios],
        **{
            f"{count} clusters a module": [
                error(Zoo.clustered(args.zoo, args.every, count), r)[0] for r in ratios
            ]
            for count in CLUSTERS
        },
        "the same bytes for every module": [equal(zoo, r) for r in ratios],
    }
    menus = [listed(zoo, r) for r in ratios]
    rows[f"with a menu of {', '.join(str(n) for _, n in menus)} profiles"] = [e for e, _ in menus]
    print("| | " + " | ".join(f"{r:g}x" for r in ratios) + " |")
    print("|---|" + "---|" * len(ratios))
    for name, errors in rows.items():
        print(f"| {name} | " + " | ".join(f"{e:.4f}" for e in errors) + " |")


if __name__ == "__main__":
    main()
