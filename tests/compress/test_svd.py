"""An adapter's own factors: the least truncated SVD that keeps a bound, else the original."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import dense, related, tails, truncated_svd, zoo
from torch import Tensor

from lorazip.adapter import LowRank
from lorazip.compress import svd
from lorazip.compress.encode import load
from lorazip.compress.lowrank import canonical
from lorazip.compress.svd import OwnFactors
from lorazip.terms import Core, Own, Term, own_slots


def balanced(factor: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    stack, sigma = canonical(load([factor], torch.device("cpu")))
    return stack.left, stack.right, sigma[0]


def stored(factors: OwnFactors, factor: LowRank) -> Tensor:
    """The dense matrix of what is stored, float64."""
    out, in_ = factor.B.shape[0], factor.A.shape[1]
    total = torch.zeros(out, in_, dtype=torch.float64)
    tensors = [
        s.encode(t)[0].view(s.shape)
        for s, t in zip(own_slots(factors.form, (), out, in_), factors.tensors, strict=True)
    ]
    for term in factors.form:
        total += term.core.value * tensors[0].double().T @ tensors[1].double()
    return total


def within(factor: LowRank, bound: float, dtype: str = "float32") -> OwnFactors:
    left, right, sigma = balanced(factor)
    return svd.within(left, right, sigma, bound * float(sigma.square().sum()), factor, dtype)


def test_least_ranks_by_brute_force() -> None:
    sigma = torch.tensor(
        [[3.0, 2.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64
    )
    for share in (0.0, 0.05, 0.25, 0.3, 0.75, 1.0):
        allowed = share * sigma.square().sum(1)
        wanted = [
            next(k for k in range(5) if float(row[k:].square().sum()) <= float(limit))
            for row, limit in zip(sigma, allowed, strict=True)
        ]
        assert svd.least_ranks(sigma, allowed).tolist() == wanted


@pytest.mark.parametrize("rank", [0, 1, 3, 8])
def test_truncated_factors_are_the_best_of_their_rank(rank: int) -> None:
    factor = zoo("15.k_proj")[0]
    left, right, _ = balanced(factor)
    cut = svd.truncated(left, right, rank, "float32")
    matrix = dense(factor)
    found = stored(cut, factor)
    assert float((found - truncated_svd(matrix, rank)).norm()) <= 1e-5 * float(matrix.norm())
    assert svd.nbytes(cut.form, *matrix.shape) == 4 * rank * sum(matrix.shape)
    assert cut.form == (
        () if rank == 0 else (Term(Own(rank, "float32"), Core("scalar"), Own(rank, "float32")),)
    )


@pytest.mark.parametrize(
    "types", [(torch.float32, torch.float32), (torch.bfloat16,) * 2, (torch.float16, torch.float32)]
)
@pytest.mark.parametrize("scale", [2.0, 16 / 6, 0.7, -1.5])
def test_an_original_is_kept_bit_for_bit(types: tuple[Any, Any], scale: float) -> None:
    (plain,) = related((3,), 7, 9)
    factor = LowRank(plain.B.to(types[0]), plain.A.to(types[1]), scale)
    kept = svd.original(factor)
    assert kept.exact and kept.form[0].core == Core("scalar", value=scale)
    slots = own_slots(kept.form, (), 7, 9)
    parts = [s.encode(t)[0].view(s.shape) for s, t in zip(slots, kept.tensors, strict=True)]
    assert parts[0].dtype == types[0] and parts[1].dtype == types[1]
    assert torch.equal(parts[0].T, factor.B) and torch.equal(parts[1], factor.A)
    assert svd.nbytes(kept.form, 7, 9) == factor.B.nbytes + factor.A.nbytes


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("bound", [0.5, 0.1, 0.01])
def test_the_least_rank_that_keeps_the_bound_is_taken(dtype: str, bound: float) -> None:
    for factor in zoo("3.q_proj")[:4]:
        kept = within(factor, bound, dtype)
        matrix = dense(factor)
        error = float((stored(kept, factor) - matrix).square().sum() / matrix.square().sum())
        assert error <= bound
        least = int((tails(matrix) > bound).sum())
        cheaper = (
            least * sum(matrix.shape) * (4 if dtype == "float32" else 2) < factor.A.nbytes + factor.B.nbytes
        )
        assert kept.exact != cheaper
        assert kept.form[0].left.columns == (least if cheaper else 8)  # type: ignore[union-attr]


def test_rounding_counts() -> None:
    """A bound just above the truncation's own error: the codec's rounding needs one more rank."""
    (factor,) = related((6,), 30, 40)
    share = float(tails(dense(factor))[3])
    exact = within(factor, share * (1 + 1e-7), "float32")
    rounded = within(factor, share * (1 + 1e-7), "bfloat16")
    assert exact.form[0].left.columns == 3  # type: ignore[union-attr]
    assert rounded.form[0].left.columns == 4  # type: ignore[union-attr]


@pytest.mark.parametrize("bound", [0.0, 1e-9])
def test_what_no_truncation_holds_is_the_original(bound: float) -> None:
    (plain,) = related((4,), 30, 40)
    for dtype in (torch.float32, torch.float16):
        assert within(LowRank(plain.B.to(dtype), plain.A.to(dtype), 0.7), bound, "float16").exact


def test_the_original_is_taken_where_it_is_not_larger() -> None:
    """bfloat16 factors against truncated ones in float32: rank 2 of 4 costs as much as the original."""
    (plain,) = related((4,), 30, 40)
    factor = LowRank(plain.B.bfloat16(), plain.A.bfloat16(), 2.0)
    share = tails(dense(factor))
    assert within(factor, float(share[2]) * 1.01, "float32").exact
    assert not within(factor, float(share[1]) * 1.01, "float32").exact


def test_values_that_the_codec_cannot_hold_are_kept_as_they_are() -> None:
    (plain,) = related((2,), 6, 8)
    factor = LowRank(plain.B * 1e10, plain.A, 1.0)
    assert svd.residual(svd.truncated(*balanced(factor)[:2], 1, "float16"), factor) == float("inf")
    assert within(factor, 0.5, "float16").exact
    assert not within(factor, 0.5, "bfloat16").exact


def test_a_zero_matrix_costs_nothing() -> None:
    factor = LowRank(torch.zeros(6, 2), torch.ones(2, 8), 1.0)
    kept = within(factor, 0.1)
    assert kept.form == () and kept.tensors == () and svd.residual(kept, factor) == 0


@pytest.mark.parametrize("scale", [2.0, 1 / 3])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_residual_is_that_of_what_is_stored(scale: float, dtype: str) -> None:
    (plain,) = related((5,), 30, 40)
    factor = LowRank(plain.B.half(), plain.A.half(), scale)
    left, right, _ = balanced(factor)
    for rank in (0, 2, 5):
        cut = svd.truncated(left, right, rank, dtype)
        wanted = float((stored(cut, factor) - dense(factor)).square().sum())
        assert svd.residual(cut, factor) == pytest.approx(
            wanted, abs=1e-12 * float(dense(factor).square().sum())
        )
