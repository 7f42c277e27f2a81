"""How many columns the shared bases of one module get: given, by energy, or by a bound on every adapter's error.

With a bound the rank is a trade: wider bases cost bytes for every adapter's core, narrower ones leave more adapters
that must keep factors of their own. The cost counts both, and the least one wins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lorazip.codecs import codec
from lorazip.compress import cluster, subspace
from lorazip.compress.cluster import Clusters
from lorazip.compress.lowrank import Stack
from lorazip.compress.methods import METHODS
from lorazip.compress.spec import Spec
from lorazip.compress.svd import least_ranks
from lorazip.errors import UndecidedError


@dataclass(frozen=True)
class Module:
    """One module of all adapters, ready for fitting.

    Attributes:
        name: dotted module name, for messages.
        stack: balanced factors.
        sigma: (n, r_max) singular values, float64.
        energies: (n,) ||D_i||^2.
        weights: (n,) for the fits.
        original_bytes: (n,) bytes of the original factors as they came.
    """

    name: str
    stack: Stack
    sigma: Tensor
    energies: Tensor
    weights: Tensor
    original_bytes: Tensor

    @property
    def most(self) -> int:
        """The rank from which on a joint basis is lossless."""
        return min(sum(self.stack.ranks), max(self.stack.left.shape[1], self.stack.right.shape[1]))


def fit(module: Module, spec: Spec) -> Clusters | None:
    """The shared bases of one module as the (resolved) spec asks; None when no sharing is cheapest.

    Raises:
        UndecidedError: the energy asked for is not reached.
    """

    def at(rank: int) -> Clusters:
        assert spec.clusters is not None
        method = METHODS[spec.method]
        return cluster.fit(method, module.stack, module.weights, module.energies, rank, spec.clusters)

    if spec.rank is not None:
        return at(spec.rank)
    if spec.energy is not None:
        return at(_energy_rank(module, spec, at))
    assert spec.max_error is not None
    return _cheapest(module, spec, at)


def _energy_rank(module: Module, spec: Spec, at: Callable[[int], Clusters]) -> int:
    """The least rank that captures the share `energy` of sum_i w_i ||D_i||^2."""
    assert spec.energy is not None
    if spec.method == "eigenlora":
        return _held_out_rank(module, spec.energy)

    def captured(rank: int) -> float:
        total = float((module.weights * module.energies).sum())
        return 1 - float((module.weights * at(rank).residuals).sum()) / max(total, 1e-300)

    most = module.most if spec.method != "jd-diag" else sum(module.stack.ranks)
    target = spec.energy - 1e-6  # float32 fits: energies are known to about 1e-7
    best = captured(most)
    if best < target:
        raise UndecidedError(
            f"{module.name}: {spec.method} holds {best:.3f} of the energy at rank {most}, less than the {spec.energy} "
            "asked for (ask for less, or use --max-error, which falls back to own factors)"
        )
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if captured(middle) >= target else (middle, high)
    return high


def _held_out_rank(module: Module, target: float) -> int:
    """EigenLoRAx's K: the least one whose directions hold `target` of adapters they were not fitted to."""
    if len(module.stack) < 2:
        raise UndecidedError(f"{module.name}: held-out energy needs at least two adapters (give --rank)")
    fitted, random, mean = subspace.held_out_energy(module.stack.scaled(module.weights.sqrt()), module.most)
    reached = (fitted >= target).nonzero()
    if len(reached):
        return int(reached[0]) + 1
    raise UndecidedError(
        f"{module.name}: no number of principal directions holds {target} of unseen adapters: {len(fitted)} hold "
        f"{float(fitted[-1]):.3f}, as many random ones {float(random[-1]):.3f}, the mean adapter {float(mean):.3f} "
        "(these adapters share too little; give --rank or --max-error)"
    )


def _cheapest(module: Module, spec: Spec, at: Callable[[int], Clusters]) -> Clusters | None:
    """Search the rank with the least total bytes at the bound; fallbacks are counted at their own least rank.

    A coarse ladder (steps of about 1.4) up to where the bases alone cost more than the best so far, then halving steps
    around the best.
    """
    assert spec.max_error is not None
    fallback = _fallback_bytes(module, spec)
    best_rank, best, best_bytes = 0, None, float(fallback.sum())
    tried: dict[int, float] = {0: best_bytes}

    def attempt(rank: int) -> float:
        nonlocal best_rank, best, best_bytes
        if rank not in tried:
            clusters = at(rank)
            tried[rank], shared = _bytes(module, spec, clusters, fallback)
            if tried[rank] < best_bytes:
                best_rank, best, best_bytes = rank, clusters, tried[rank]
            if shared > best_bytes:
                return float("inf")
        return tried[rank]

    most = module.most if spec.method != "jd-diag" else sum(module.stack.ranks)
    for rank in _ladder(most):
        if attempt(rank) == float("inf"):
            break
    step = max(1, best_rank // 4)
    while best is not None:
        centre = best_rank
        for rank in (centre - step, centre + step):
            if 1 <= rank <= most:
                attempt(rank)
        if best_rank == centre:
            if step == 1:
                break
            step //= 2
    return best


def _ladder(most: int) -> list[int]:
    ranks, rank = [], 1.0
    while rank < most:
        ranks.append(int(rank))
        rank = max(rank + 1, rank * 1.4)
    return [*ranks, most]


def _bytes(module: Module, spec: Spec, clusters: Clusters, fallback: Tensor) -> tuple[float, float]:
    """Total bytes of the module with these bases, and those of the bases alone; a base that nobody uses is free."""
    assert spec.max_error is not None
    held = clusters.residuals <= spec.max_error * module.energies
    size = codec(spec.dtype)
    shared = own = 0.0
    for c, pair in enumerate(clusters.pairs):
        users = [i for i, label in enumerate(clusters.labels) if label == c and held[i]]
        if users:
            shared += sum(p.nbytes for t in (pair.left, pair.right) for p in size.parts(t.shape))
        for i in users:
            shape = core_shape(
                METHODS[spec.method].core, pair.left.shape[1], pair.right.shape[1], module.stack.ranks[i]
            )
            own += sum(p.nbytes for part in shape for p in size.parts(part))
    return shared + own + float(fallback[~held].sum()), shared


def core_shape(kind: str, a: int, b: int, rank: int) -> tuple[tuple[int, ...], ...]:
    """Shapes stored for one adapter's core: full (a, b), or its two factors where they are smaller (same product)."""
    match kind:
        case "scalar":
            return ()
        case "diagonal":
            return ((a,),)
        case _ if rank * (a + b) < a * b:
            return ((rank, a), (rank, b))
        case _:
            return ((a, b),)


def _fallback_bytes(module: Module, spec: Spec) -> Tensor:
    """(n,) bytes of the least-rank own factors at the bound, or of the original where that is less."""
    assert spec.max_error is not None
    out, in_ = module.stack.left.shape[1], module.stack.right.shape[1]
    each = sum(part.nbytes for d in (out, in_) for part in codec(spec.dtype).parts((d,)))
    ranks = least_ranks(module.sigma, spec.max_error * module.energies)
    return torch.minimum(ranks.cpu() * each, module.original_bytes.cpu()).double().to(module.sigma.device)
