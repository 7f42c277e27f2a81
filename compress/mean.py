"""The mean adapter: one shared matrix in place of all adapters, the baseline that every comparison needs."""

from __future__ import annotations

import torch
from torch import Tensor

from lorazip.compress.frame import orthonormal
from lorazip.compress.joint import Pair, leading
from lorazip.compress.lowrank import Stack

POWER_ROUNDS = 20


def fit(stack: Stack, weights: Tensor, rank: int) -> Pair:
    """The leading `rank` singular triplets of M = sum_i w_i D_i / sum_i w_i, which minimises sum_i w_i ||D_i - M||^2.

    M = left^T right over all rows, so M M^T X costs four thin products and M is never formed.

    Args:
        stack: n matrices, not weighted.
        weights: (n,) nonnegative.

    Returns:
        U sqrt(S) and V sqrt(S): D_i is approximated by left right^T.
    """
    share = weights / weights.sum().clamp_min(torch.finfo(torch.float64).tiny)
    scaled_stack = stack.scaled(share)
    left, right = scaled_stack.left, scaled_stack.right
    columns = min(rank, left.shape[0], left.shape[1], right.shape[1])
    generator = torch.Generator().manual_seed(left.shape[1])
    x = orthonormal(torch.randn(left.shape[1], columns, generator=generator).to(left))
    energy = 0.0
    for _ in range(POWER_ROUNDS):
        previous = energy
        x, energy = leading(lambda y: left.T @ (right @ (right.T @ (left @ y))), x)
        if energy - previous <= 1e-6 * energy:
            break
    scaled = right.T @ (left @ x)  # (in, k) = V S
    size = scaled.norm(dim=0).clamp_min(torch.finfo(scaled.dtype).tiny)
    return Pair(x * size.sqrt(), scaled / size.sqrt())


def residuals(stack: Stack, pair: Pair, energies: Tensor) -> Tensor:
    """||D_i - L R^T||^2, (n,), by ||D||^2 - 2 <D, M> + ||M||^2."""
    cross = stack.pad((stack.left @ pair.left).double() * (stack.right @ pair.right).double()).sum((1, 2))
    gram = (pair.left.T @ pair.left).double() * (pair.right.T @ pair.right).double()
    return (energies - 2 * cross + gram.sum()).clamp_min(0)
