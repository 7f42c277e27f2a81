"""How many columns the shared bases of one module get: given, by energy, or by a bound on every adapter's error.

With a bound the rank is a trade: wider bases cost bytes for every adapter's core, narrower ones leave more adapters
that must keep factors of their own. The cost counts both, and the least one wins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

HELD_OUT = 64  # principal directions that are tried at first
STEP = 1.25  # between the ranks that are tried at first
NEAR = 3  # all ranks so close to a small best one are tried: bytes do not fall and rise smoothly
# Share of the energy of D that a factor loses in so many bits (docs/QUANTIZATION.md, r = 2 to 8 without the truncation)
ROUNDING = {1: 0.15, 2: 0.05, 3: 0.015, 4: 0.004, 6: 3e-4, 8: 2e-5}
FINE = 0.02  # of the best rank: steps that would change the bytes by less than that are not taken


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
    low, high = 0, 1  # doubling first: fits of few columns are cheap
    while (best := captured(high)) < target:
        if high >= most:
            raise UndecidedError(
                f"{module.name}: {spec.method} holds {best:.3f} of the energy at rank {most}, less than the "
                f"{spec.energy} asked for (ask for less, or use --max-error, which falls back to own factors)"
            )
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if captured(middle) >= target else (middle, high)
    return high


def _held_out_rank(module: Module, target: float) -> int:
    """EigenLoRAx's K: the least one whose directions hold `target` of adapters they were not fitted to."""
    kept = (module.energies > 0).nonzero()[:, 0].tolist()  # zero matrices have no energy to hold
    if len(kept) < 2:
        raise UndecidedError(f"{module.name}: held-out energy needs at least two adapters (give --rank)")
    stack = module.stack.select(kept).scaled(module.weights[kept].sqrt())
    most = min(HELD_OUT, module.most)
    while True:  # few directions first: fits of many are costly
        fitted, random, mean = subspace.held_out_energy(stack, most)
        reached = (fitted >= target).nonzero()
        if len(reached):
            return int(reached[0]) + 1
        if most == module.most:
            break
        most = min(4 * most, module.most)
    raise UndecidedError(
        f"{module.name}: no number of principal directions holds {target} of unseen adapters: {len(fitted)} hold "
        f"{float(fitted[-1]):.3f}, as many random ones {float(random[-1]):.3f}, the mean adapter {float(mean):.3f} "
        "(these adapters share too little; give --rank or --max-error)"
    )


def _cheapest(module: Module, spec: Spec, at: Callable[[int], Clusters]) -> Clusters | None:
    """Search the rank with the least total bytes at the bound; fallbacks are counted at their own least rank.

    A ladder of ranks, then halving steps around the best. A rank is only tried where bases and cores that held every
    adapter could beat the best; this least cost grows with the rank, so the ladder ends where it no longer can.
    """
    fallback = _fallback_bytes(module, spec)
    best_rank, best, best_bytes = 0, None, float(fallback.sum())
    tried = {0}

    def promising(rank: int) -> bool:
        return _least_bytes(module, spec, rank, fallback) < best_bytes

    def attempt(rank: int) -> None:
        nonlocal best_rank, best, best_bytes
        if rank in tried or not promising(rank):
            return
        tried.add(rank)
        clusters = at(rank)
        cost = _bytes(module, spec, clusters, fallback)
        if cost < best_bytes:
            best_rank, best, best_bytes = rank, clusters, cost

    most = module.most if spec.method != "jd-diag" else sum(module.stack.ranks)
    for rank in _ladder(most):
        if not promising(rank):
            break
        attempt(rank)
    step = max(NEAR, int(best_rank * (STEP - 1) / 2))
    while best is not None and step > FINE * best_rank:
        centre = best_rank
        for rank in (centre - step, centre + step):
            if 1 <= rank <= most:
                attempt(rank)
        if best_rank == centre:
            step = step // 2 if step > NEAR else step - 1
    return best


def _ladder(most: int) -> list[int]:
    ranks, rank = [], 1.0
    while rank < most:
        ranks.append(int(rank))
        rank = max(rank + 1, rank * STEP)
    return [*ranks, most]


def _least_bytes(module: Module, spec: Spec, rank: int, fallback: Tensor) -> float:
    """What one pair of bases of this rank costs at least, if it held every adapter that it is cheaper for."""
    out, in_ = module.stack.left.shape[1], module.stack.right.shape[1]
    match METHODS[spec.method].core:
        case "full":
            a, b = min(rank, out), min(rank, in_)
        case "diagonal":
            a = b = rank
        case _:
            a = b = min(rank, out, in_)
    shared = _basis_bytes(spec, (a, out), (b, in_))
    return shared + float(torch.minimum(_core_bytes(module, spec, a, b), fallback).sum())


def _bytes(module: Module, spec: Spec, clusters: Clusters, fallback: Tensor) -> float:
    """Total bytes of the module with these bases; a base that nobody uses is free."""
    assert spec.max_error is not None
    # Energies of float32 fits are known to about 1e-7. What is held in the end is measured in float64, as it is stored.
    bases = spec.bits if spec.basis_bits is None else spec.basis_bits
    lost = 2 * _rounding(bases) + _rounding(spec.bits if spec.core_bits is None else spec.core_bits)
    held = clusters.residuals + lost * module.energies <= (spec.max_error + 1e-7) * module.energies
    held &= module.energies > 0
    labels = torch.tensor(clusters.labels, device=held.device)
    total = fallback.clone()
    shared = 0.0
    for c, pair in enumerate(clusters.pairs):
        users = held & (labels == c)
        if bool(users.any()):
            shared += _basis_bytes(spec, pair.left.T.shape, pair.right.T.shape)
            total[users] = _core_bytes(module, spec, pair.left.shape[1], pair.right.shape[1])[users]
    return shared + float(total.sum())


def _basis_bytes(spec: Spec, *shapes: Sequence[int]) -> int:
    return sum(codec_bytes(spec.basis_codec(shape[0]), shape) for shape in shapes)


def codec_bytes(name: str, *shapes: Sequence[int]) -> int:
    """Bytes of tensors of these shapes."""
    return sum(part.nbytes for shape in shapes for part in codec(name).parts(shape))


def _core_bytes(module: Module, spec: Spec, a: int, b: int) -> Tensor:
    """(n,) bytes of every adapter's core between bases of a and b columns."""
    kind, ranks = METHODS[spec.method].core, module.stack.ranks
    known = {rank: codec_bytes(spec.core_codec(), *core_shape(kind, a, b, rank)) for rank in set(ranks)}
    return module.energies.new_tensor([float(known[rank]) for rank in ranks])


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
    ranks = least_ranks(module.sigma, spec.max_error * module.energies)
    cut = ranks.double() * codec_bytes(spec.dtype, (out,), (in_,))
    cut = torch.minimum(cut, module.original_bytes.to(cut))
    left = spec.max_error - 2 * _rounding(spec.bits)
    if spec.bits is None or left <= 0:
        return cut
    ranks = least_ranks(module.sigma, left * module.energies)
    sizes = [codec_bytes(spec.own_codec(r), (r, out), (r, in_)) if r else 0 for r in ranks.tolist()]
    return torch.minimum(cut, cut.new_tensor(sizes))


def _rounding(bits: float | None) -> float:
    """The share of energy that rounding one tensor to so many bits costs, about; geometric between the known ones.

    Only for choosing: what is stored is measured.
    """
    if bits is None:
        return 0.0
    low = max(b for b in ROUNDING if b <= bits)
    high = min(b for b in ROUNDING if b >= bits)
    share = (bits - low) / (high - low) if high > low else 0.0
    return float(ROUNDING[low] ** (1 - share) * ROUNDING[high] ** share)
