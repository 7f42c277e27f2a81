"""The registry: what a method of compression must supply. A new one is a file of its own and a line in `METHODS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lorazip.compress import joint, mean, subspace
from lorazip.compress.joint import Pair
from lorazip.compress.lowrank import Stack
from lorazip.terms import CoreKind

Fit = Callable[[Stack, Tensor, int, Pair | None], Pair]  # balanced stack, weights (n,), rank, start
Residuals = Callable[[Stack, Pair, Tensor], Tensor]  # balanced stack, pair, energies (n,) -> (n,)


@dataclass(frozen=True)
class Method:
    """A joint method: shared bases for a module, and what an adapter keeps of its own.

    Attributes:
        fit: the shared pair for weighted adapters.
        residuals: ||D_i - D^_i||^2 (n,) of every adapter on a pair, with the best core.
        core: what an adapter keeps: "full" (stored factored where that is smaller), "diagonal", or "scalar" (nothing).
        refit: bases are those of least error, so that rounding may solve for them again; else they are to be kept.
    """

    fit: Fit
    residuals: Residuals
    core: CoreKind
    refit: bool = True


def _weighted(fit: Callable[[Stack, int, Pair | None], Pair]) -> Fit:
    """A fit that knows no weights, on sqrt(w_i) D_i."""
    return lambda stack, weights, rank, start: fit(stack.scaled(weights.sqrt()), rank, start)


METHODS: dict[str, Method] = {
    "jd-full": Method(_weighted(joint.fit_full), joint.full_residuals, "full"),
    "jd-diag": Method(_weighted(joint.fit_diagonal), joint.diagonal_residuals, "diagonal"),
    "eigenlora": Method(_weighted(subspace.fit), joint.full_residuals, "full", refit=False),
    "mean": Method(
        lambda stack, weights, rank, start: mean.fit(stack, weights, rank), mean.residuals, "scalar"
    ),
}
NAMES = ("svd", *METHODS, "auto")  # svd shares nothing, and auto what pays: neither is a fit of one basis
