"""Own factors of one adapter: its truncated SVD, or its original factors bit for bit.

The stack is balanced (`canonical`), so the leading k rows of an adapter are its best approximation of rank k, and the
error of leaving out the rest is the sum of the squares of their singular values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorazip.adapter import LowRank
from lorazip.errors import CodecError
from lorazip.terms import Core, Form, Own, Slot, Term, own_slots

CANCELLED = 1e-6  # of ||left||^2 ||right||^2: below it a sum of Gram matrices has too few digits left
MARGIN = 1e-9  # of a bound, so that the rounding of float64 sums cannot cross it


@dataclass(frozen=True)
class OwnFactors:
    """One adapter's own term of one module, as stored."""

    form: Form
    tensors: tuple[Tensor, ...]  # as stored, before the codec
    exact: bool = False  # the original bit for bit: its error is zero, whatever the decoder rounds
    parts: tuple[tuple[Tensor, ...], ...] | None = None  # already as stored, in place of `tensors`

    def stored(self, slots: Sequence[Slot]) -> list[tuple[Tensor, ...]]:
        """The parts of every tensor. Raises CodecError for what does not fit its codec."""
        if self.parts is not None:
            return list(self.parts)
        return [slot.encode(tensor) for slot, tensor in zip(slots, self.tensors, strict=True)]


def least_ranks(sigma: Tensor, allowed: Tensor) -> Tensor:
    """The least k with sum_{j > k} sigma_j^2 <= allowed, (n,) long; sigma (n, r) descending, allowed (n,)."""
    tails = sigma.square().flip(1).cumsum(1).flip(1)  # tails[:, k] = what rank k leaves out
    return (tails > allowed[:, None]).sum(1)


def truncated(left: Tensor, right: Tensor, rank: int, dtype: str) -> OwnFactors:
    """The leading `rank` rows of balanced factors left (r, out), right (r, in)."""
    if rank == 0:
        return OwnFactors((), ())
    term = Term(Own(rank, dtype), Core("scalar"), Own(rank, dtype))
    return OwnFactors((term,), (left[:rank], right[:rank]))


def original(factor: LowRank) -> OwnFactors:
    """The adapter's B and A as they were trained, in their own types; the scale goes into the form exactly."""
    rank = factor.A.shape[0]
    left, right = (Own(rank, str(t.dtype).removeprefix("torch.")) for t in (factor.B, factor.A))
    return OwnFactors(
        (Term(left, Core("scalar", value=factor.scale), right),), (factor.B.T, factor.A), exact=True
    )


def nbytes(form: Form, out: int, in_: int) -> int:
    """Bytes of the own tensors of a form that refers to nothing shared."""
    return sum(part.nbytes for slot in own_slots(form, (), out, in_) for part in slot.parts())


def within(
    left: Tensor, right: Tensor, sigma: Tensor, allowed: float, factor: LowRank, dtype: str
) -> OwnFactors:
    """The cheapest own factors whose error is at most `allowed`: a truncated SVD as stored, else the original.

    Args:
        left, right: (r, out), (r, in) balanced rows of this adapter.
        sigma: (r,) its singular values, float64.
        allowed: bound on ||D^ - D||^2.
        factor: the original.
        dtype: codec of the truncated factors; its rounding counts.
    """
    whole = original(factor)
    out, in_ = factor.B.shape[0], factor.A.shape[1]
    rank = int(least_ranks(sigma[None], sigma.new_tensor([allowed])))
    while rank <= left.shape[0]:
        cut = truncated(left, right, rank, dtype)
        if nbytes(cut.form, out, in_) >= nbytes(whole.form, out, in_):
            break
        if residual(cut, factor) <= (1 - MARGIN) * allowed:
            return cut
        rank += 1
    return whole


def residual(cut: OwnFactors, factor: LowRank) -> float:
    """||D^ - D||^2 of one adapter's truncated factors as stored; infinite where the codec cannot hold them."""
    out, in_ = factor.B.shape[0], factor.A.shape[1]
    device = cut.tensors[0].device if cut.tensors else factor.A.device
    slots = own_slots(cut.form, (), out, in_)
    rows, cols = [factor.B.T.to(device).double() * factor.scale], [factor.A.to(device).double()]
    try:
        stored = [slot.decode(parts) for slot, parts in zip(slots, cut.stored(slots), strict=True)]
    except CodecError:
        return float("inf")
    if stored:
        rows.append(-stored[0].to(device).double())
        cols.append(stored[1].to(device).double())
    left, right = torch.cat(rows), torch.cat(cols)
    found = float(((left @ left.T) * (right @ right.T)).sum())
    if found < CANCELLED * float(left.square().sum() * right.square().sum()):
        # The Gram matrices' digits are used up; of left^T = Q T the norm of T right has all of its own.
        found = float((torch.linalg.qr(left.T)[1] @ right).square().sum())
    return found
