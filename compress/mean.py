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

    M = left^T right over all rows, in their frames, so M M^T X costs four thin products and M is never formed.

    Args:
        stack: n matrices, not weighted.
        weights: (n,) nonnegative.

    Returns:
        U sqrt(S) and V sqrt(S): D_i is approximated by left right^T.
    """
    share = weights / weights.sum().clamp_min(torch.finfo(torch.float64).tiny)
    left, right = stack.scaled(share).frames
    lw, rw = left.work, right.work
    width = stack.left.shape[1]
    columns = min(rank, lw.shape[1], rw.shape[1])
    generator = torch.Generator().manual_seed(width)
    start = torch.randn(width, columns, generator=generator).to(stack.left)
    x, energy = orthonormal(left.lower(start)), 0.0
    for _ in range(POWER_ROUNDS):
        previous = energy
        x, energy = leading(lambda y: lw.T @ (rw @ (rw.T @ (lw @ y))), x)
        if energy - previous <= 1e-6 * energy:
            break
    v = right.lift(rw.T @ (lw @ x))  # (in, k) = V S
    size = v.norm(dim=0).clamp_min(torch.finfo(v.dtype).tiny)
    return Pair(left.lift(x) * size.sqrt(), v / size.sqrt())


def residuals(stack: Stack, pair: Pair, energies: Tensor) -> Tensor:
    """||D_i - L R^T||^2, (n,), by ||D||^2 - 2 <D, M> + ||M||^2."""
    cross = stack.pad((stack.left @ pair.left).double() * (stack.right @ pair.right).double()).sum((1, 2))
    gram = (pair.left.T @ pair.left).double() * (pair.right.T @ pair.right).double()
    return (energies - 2 * cross + gram.sum()).clamp_min(0)
