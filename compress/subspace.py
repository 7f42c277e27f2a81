"""Principal subspaces of many adapters (EigenLoRAx, arXiv 2502.04700 §3), with the corrections of METHODS.md §3.

Per module and side, the K principal directions of all adapters' factors, V_B (out, K) and V_A (in, K); an adapter is
its loadings on them, D_i = V_B (L_B L_A^T) V_A^T. Unlike the published code the factors are those of the balanced thin
SVD of D_i, with the scale in (raw factors change with a meaningless gauge), and nothing is centred (the code drops the
mean).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorazip.compress.frame import CHUNK_ELEMENTS
from lorazip.compress.joint import Pair, principal
from lorazip.compress.lowrank import Stack

FOLDS = 5


def fit(stack: Stack, rank: int, start: Pair | None = None) -> Pair:
    """The `rank` principal directions of both sides; V_B has min(rank, out) columns, V_A min(rank, in).

    Asked for more directions than the adapters span, random orthonormal ones fill up (the paper's pseudo-components:
    room for tasks that the few adapters at hand do not span). The fit is direct, so `start` is not used.

    Args:
        stack: n weighted matrices in balanced form; their rows are the factors to be stacked.
    """
    left, right = stack.frames
    return Pair(
        principal(left, min(rank, stack.left.shape[1])),
        principal(right, min(rank, stack.right.shape[1])),
    )


def nested_energy(stack: Stack, pair: Pair) -> Tensor:
    """Energy captured by the first K directions of each side (all, where a side has fewer), (n, max(a, b)) for all K.

    The directions are nested: with p_k = left_i u_k, the energy is <sum_{k<=K} p_k p_k^T, sum_{k<=K} q_k q_k^T>.
    """
    left, right = (stack.left @ pair.left).double(), (stack.right @ pair.right).double()  # (R, a), (R, b)
    most = max(left.shape[1], right.shape[1])
    found = []
    for i in range(len(stack)):  # one at a time: K blocks of (r, r) each
        rows = slice(stack.starts[i], stack.starts[i + 1])
        sums = []
        for side in (left[rows].T, right[rows].T):
            outer = (side[:, :, None] * side[:, None, :]).cumsum(0)
            sums.append(torch.cat([outer, outer[-1:].expand(most - len(outer), -1, -1)]))
        found.append((sums[0] * sums[1]).sum((1, 2)))
    return torch.stack(found)


def held_out_energy(stack: Stack, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """How much of an unseen adapter the directions of the others hold, and what a random subspace would hold.

    Five folds (or n when fewer); every adapter is projected on directions fitted without it.

    Returns:
        mean captured share of ||D_i||^2 for K = 1..most, of the fitted and of a random subspace of the same K, each
        (most,); and the share that the mean of the other adapters explains, a scalar.
    """
    n = len(stack)
    energies = stack.energies.clamp_min(torch.finfo(torch.float64).tiny)
    fitted = torch.zeros(most, dtype=torch.float64, device=stack.left.device)
    random = torch.zeros_like(fitted)
    mean = torch.zeros((), dtype=torch.float64, device=stack.left.device)
    generator = torch.Generator().manual_seed(n)
    folds = [list(range(f, n, min(n, FOLDS))) for f in range(min(n, FOLDS))]
    for fold in folds:
        rest = stack.select([i for i in range(n) if i not in set(fold)])
        out = stack.select(fold)
        chance = Pair(
            *(
                torch.linalg.qr(torch.randn(d, min(most, d), generator=generator)).Q.to(stack.left)
                for d in (stack.left.shape[1], stack.right.shape[1])
            )
        )
        for total, pair in ((fitted, fit(rest, most)), (random, chance)):
            share = nested_energy(out, pair) / energies[fold, None]
            total[: share.shape[1]] += share.sum(0)
            total[share.shape[1] :] += share[:, -1:].sum()
        mean += _mean_share(rest, out, energies[fold])
    return fitted / n, random / n, mean / n


def _mean_share(rest: Stack, out: Stack, energies: Tensor) -> Tensor:
    """Sum over the held-out adapters of <D_i, M>^2 / (||D_i||^2 ||M||^2), M the sum of the rest."""
    along = out.pad(_against(out, rest)[:, None]).sum((1, 2))
    own = _against(rest, rest).sum().clamp_min(torch.finfo(torch.float64).tiny)
    return (along.square() / (energies * own)).sum()


def _against(first: Stack, second: Stack) -> Tensor:
    """Per row of the first stack its part of <D_i, sum_j E_j>, (R,) float64; never more than a block of R x R."""
    step = max(1, CHUNK_ELEMENTS // len(second.left))
    found = []
    for start in range(0, len(first.left), step):
        rows = slice(start, start + step)
        cross = (first.left[rows] @ second.left.T).double() * (first.right[rows] @ second.right.T).double()
        found.append(cross.sum(1))
    return torch.cat(found)
