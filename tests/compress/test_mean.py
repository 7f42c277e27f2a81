"""The mean adapter: the weighted mean of the dense matrices, truncated."""

from __future__ import annotations

import pytest
import torch
from reference import related, stacked, truncated_svd, zoo
from torch import Tensor

from lorazip.adapter import LowRank
from lorazip.compress import mean
from lorazip.compress.encode import load
from lorazip.compress.lowrank import canonical

CPU = torch.device("cpu")


def weighted_mean(matrices: Tensor, weights: Tensor) -> Tensor:
    return (weights[:, None, None] * matrices).sum(0) / weights.sum()


@pytest.mark.parametrize("rank", [1, 3, 9])
@pytest.mark.parametrize(("out", "in_"), [(30, 40), (12, 50), (160, 200)])
def test_the_pair_is_the_truncated_weighted_mean(rank: int, out: int, in_: int) -> None:
    factors = related((4, 2, 3, 4), out, in_)
    stack, _ = canonical(load(factors, CPU))
    weights = torch.tensor([1.0, 0.5, 3.0, 0.0], dtype=torch.float64)
    pair = mean.fit(stack, weights, rank)
    centre = weighted_mean(stacked(factors, unit=False), weights)
    found = pair.left.double() @ pair.right.double().T
    best = truncated_svd(centre, rank)
    slack = 1e-5 * float(centre.norm())
    assert float((found - centre).norm()) <= float((best - centre).norm()) * (1 + 1e-4) + slack
    assert pair.left.shape == (out, min(rank, 13, out)) and pair.right.shape == (in_, min(rank, 13, out))
    assert torch.allclose(pair.left.norm(dim=0), pair.right.norm(dim=0), rtol=1e-4, atol=1e-6)


def test_residuals_are_those_of_the_dense_matrices() -> None:
    factors = zoo("15.k_proj")
    stack, _ = canonical(load(factors, CPU))
    pair = mean.fit(stack, torch.ones(12, dtype=torch.float64), 8)
    dense = (stacked(factors, unit=False) - pair.left.double() @ pair.right.double().T).square().sum((1, 2))
    assert torch.allclose(mean.residuals(stack, pair, stack.energies), dense, rtol=1e-5)


def test_full_rank_is_the_mean_itself_and_no_other_matrix_is_nearer() -> None:
    factors = related((2, 3), 20, 24)
    stack, _ = canonical(load(factors, CPU))
    weights = torch.tensor([2.0, 1.0], dtype=torch.float64)
    pair = mean.fit(stack, weights, 5)
    matrices = stacked(factors, unit=False)
    best = (weights[:, None, None] * (matrices - weighted_mean(matrices, weights)).square()).sum()
    assert float((weights * mean.residuals(stack, pair, stack.energies)).sum()) == pytest.approx(
        float(best), rel=1e-5
    )


def test_adapters_that_cancel_and_adapters_of_zero_have_a_mean_of_zero() -> None:
    (one,) = related((3,), 20, 24)
    opposite = LowRank(-one.B, one.A, one.scale)
    zero = LowRank(torch.zeros(20, 3), one.A, 1.0)
    for factors in ([one, opposite], [zero, zero]):
        stack, _ = canonical(load(factors, CPU))
        for weights in (torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)):
            pair = mean.fit(stack, weights, 3)
            found = pair.left @ pair.right.T
            assert float(found.norm()) <= 1e-5 * float(stack.energies.max().sqrt() + 1e-30)
