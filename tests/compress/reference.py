"""Independent float64 references that form D densely; nothing of lorazip is used here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def hooi(matrices: Sequence[Tensor], rank: int, rounds: int = 30) -> tuple[Tensor, Tensor]:
    """Tucker-2 of matrices (out, in) of unit norm by higher-order orthogonal iteration from the HOSVD: U, V."""
    unit = [m.double() / m.double().norm() for m in matrices]
    u = leading(unit, rank)
    v = leading([m.T for m in unit], rank)
    for _ in range(rounds):
        u = leading([m @ v for m in unit], rank)
        v = leading([m.T @ u for m in unit], rank)
    return u, v


def leading(blocks: Sequence[Tensor], rank: int) -> Tensor:
    """The leading left singular vectors of the blocks side by side."""
    wide = torch.cat(list(blocks), 1)
    return torch.linalg.eigh(wide @ wide.T)[1][:, -min(rank, len(wide)) :]


def hooi_errors(matrices: Sequence[Tensor], rank: int) -> list[float]:
    """Squared relative error of each matrix on the common HOOI bases."""
    u, v = hooi(matrices, rank)
    return [float(1 - (u.T @ m.double() @ v).norm() ** 2 / m.double().norm() ** 2) for m in matrices]


def truncation_errors(matrix: Tensor) -> Tensor:
    """Squared relative error of the best approximation of rank 0, 1, 2, ..."""
    squares = torch.linalg.svdvals(matrix.double()).square()
    tails = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
    return tails / squares.sum()


def dense_error(matrix: Tensor, approximation: Tensor) -> float:
    """||D^ - D||^2 / ||D||^2."""
    return float((approximation.double() - matrix.double()).square().sum() / matrix.double().square().sum())
