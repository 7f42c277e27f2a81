"""Own factors of one adapter: its truncated SVD, or its original factors bit for bit.

The stack is balanced (`canonical`), so the leading k rows of an adapter are its best approximation of rank k, and the
error of leaving out the rest is the sum of the squares of their singular values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorazip.adapter import LowRank
from lorazip.errors import CodecError
from lorazip.terms import Core, Form, Own, Term, own_slots


@dataclass(frozen=True)
class OwnFactors:
    """One adapter's own term of one module, as stored."""

    form: Form
    tensors: tuple[Tensor, ...]  # as stored, before the codec


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
    """The adapter's B and A as they were trained, in their own type; the scale goes into the form exactly."""
    dtype = str(factor.B.dtype).removeprefix("torch.")
    rank = factor.A.shape[0]
    term = Term(Own(rank, dtype), Core("scalar", value=factor.scale), Own(rank, dtype))
    return OwnFactors((term,), (factor.B.T, factor.A))


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
    rank = int(least_ranks(sigma[None], torch.tensor([allowed]).to(sigma)))
    while rank <= left.shape[0]:
        cut = truncated(left, right, rank, dtype)
        if nbytes(cut.form, out, in_) >= nbytes(whole.form, out, in_):
            break
        try:
            stored = [
                slot.decode(slot.encode(t))
                for slot, t in zip(own_slots(cut.form, (), out, in_), cut.tensors, strict=True)
            ]
        except CodecError:
            break  # too large for the codec: only the original type holds it
        rounding = _rounding(left[:rank], right[:rank], stored) if rank else 0.0
        if float(sigma[rank:].square().sum()) + rounding <= allowed:
            return cut
        rank += 1
    return whole


def _rounding(left: Tensor, right: Tensor, stored: list[Tensor]) -> float:
    """||L R^T - L^ R^^T||^2 of one adapter with the rounded rows, which adds to the error of the cut."""
    a, b = left.double(), right.double()
    c, d = (t.to(left.device).double() for t in stored)
    rows, cols = torch.cat([a, -c]), torch.cat([b, d])
    return float(((rows @ rows.T) * (cols @ cols.T)).sum().clamp_min(0))
