"""Factors of an adapter's own: how many columns, in few bits or in a floating-point type, and what the bound allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lorazip.adapter import LowRank
from lorazip.compress import allocate, quantize, svd
from lorazip.compress.allocate import Module
from lorazip.compress.spec import Spec
from lorazip.compress.svd import OwnFactors
from lorazip.terms import Core, Own, Term


def own_factors(
    module: Module, members: Sequence[int], spec: Spec, factors: Sequence[LowRank]
) -> list[OwnFactors]:
    """Some adapters alone: rank given, by energy, or the least that meets the bound; nothing for a zero matrix.

    Args:
        factors: of all adapters of the module.
    """
    if spec.bits is None:
        return [_plain_factors(module, i, spec, factors[i]) for i in members]
    start = {i: _first_rank(module, i, spec) for i in members if module.energies[i] > 0}
    found = {i: OwnFactors((), ()) for i in members}
    while start:
        ready = _rounded_factors(module, start, spec)
        found.update(ready)
        if spec.max_error is None:
            break
        short = [
            i for i, cut in ready.items()
            if svd.residual(cut, factors[i]) > (1 - svd.MARGIN) * spec.max_error * float(module.energies[i])
        ]  # fmt: skip
        start = {i: start[i] + 1 for i in short}
        plain = [i for i, rank in start.items() if _plain_is_smaller(module, i, rank, spec)]
        unrounded = Spec("svd", max_error=spec.max_error, dtype=spec.dtype, device=spec.device)
        found.update({i: _plain_factors(module, i, unrounded, factors[i]) for i in plain})
        start = {i: rank for i, rank in start.items() if i not in plain}
    return [found[i] for i in members]


def _first_rank(module: Module, i: int, spec: Spec) -> int:
    """The rank given, or the least whose truncation alone leaves out no more than allowed; 1 at least."""
    most = module.stack.ranks[i]
    if spec.rank is not None:
        return min(spec.rank, most)
    # Kept energy is 1 - left-out energy; a hair of slack, for at energy = 1 rounding would count as energy.
    share = 1 - spec.energy + 1e-13 if spec.energy is not None else spec.max_error
    assert share is not None
    allowed = module.sigma.new_tensor([share * float(module.energies[i])])
    return min(most, max(1, int(svd.least_ranks(module.sigma[i : i + 1, :most], allowed))))


def _plain_is_smaller(module: Module, i: int, rank: int, spec: Spec) -> bool:
    """Whether factors that are not rounded to few bits hold the bound in no more bytes than that rank would take."""
    assert spec.max_error is not None
    if rank > module.stack.ranks[i]:
        return True
    out, in_ = module.stack.left.shape[1], module.stack.right.shape[1]
    rounded = allocate.codec_bytes(spec.own_codec(rank), (rank, out), (rank, in_))
    least = int(svd.least_ranks(module.sigma[i : i + 1], spec.max_error * module.energies[i : i + 1]))
    plain = allocate.codec_bytes(spec.dtype, (least, out), (least, in_))
    return min(plain, float(module.original_bytes[i])) <= rounded


def _rounded_factors(module: Module, ranks: Mapping[int, int], spec: Spec) -> dict[int, OwnFactors]:
    """Own factors of given ranks, adapters of one rank at a time."""
    found = {}
    for rank in sorted(set(ranks.values())):
        members = [i for i, r in ranks.items() if r == rank]
        part = module.stack.select(members)
        name = spec.own_codec(rank)
        left, right = quantize.product(part.pad(part.left), part.pad(part.right), rank, (name, name))
        form = (Term(Own(rank, name), Core("scalar"), Own(rank, name)),)
        for at, i in enumerate(members):
            found[i] = OwnFactors(form, (), parts=(left.parts(at), right.parts(at)))
    return found


def _plain_factors(module: Module, i: int, spec: Spec, factor: LowRank) -> OwnFactors:
    """One adapter's own factors in a floating-point type."""
    stack = module.stack
    rows = slice(stack.starts[i], stack.starts[i + 1])
    left, right, sigma = stack.left[rows], stack.right[rows], module.sigma[i, : stack.ranks[i]]
    energy = float(module.energies[i])
    if energy == 0:
        return OwnFactors((), ())
    if spec.rank is not None:
        cut = svd.truncated(left, right, min(spec.rank, stack.ranks[i]), spec.dtype)
        if spec.max_error is None or svd.residual(cut, factor) <= spec.max_error * energy:
            return cut
    if spec.energy is not None:
        # Kept energy is 1 - left-out energy; a hair of slack, for at energy = 1 rounding would count as energy.
        allowed = sigma.new_tensor([(1 - spec.energy + 1e-13) * energy])
        rank = int(svd.least_ranks(sigma[None], allowed))
        return svd.truncated(left, right, max(rank, int(energy > 0)), spec.dtype)
    assert spec.max_error is not None
    return svd.within(left, right, sigma, spec.max_error * energy, factor, spec.dtype)
