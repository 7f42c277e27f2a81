"""Principal subspaces of many adapters (EigenLoRAx, arXiv 2502.04700 §3), with the corrections of METHODS.md §3.

Per module and side, the K principal directions of all adapters' factors, V_B (out, K) and V_A (in, K); an adapter is
its loadings on them, D_i = V_B (L_B L_A^T) V_A^T. Unlike the published code the factors are those of the balanced thin
SVD of D_i, with the scale in (raw factors change with a meaningless gauge), and nothing is centred (the code drops the
mean).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorazip.compress.joint import Pair, full_cores, principal
from lorazip.compress.lowrank import Stack, norms2

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
    """Energy captured by the first K directions of each side, for every K at once: (n, max(a, b)).

    The directions are nested, so the energies of a core's leading K x K blocks are two cumulative sums.
    """
    p, q = full_cores(stack, pair)
    sums = (p @ q.mT).square().cumsum(1).cumsum(2)
    a, b = sums.shape[1:]
    index = torch.arange(max(a, b), device=sums.device)
    return sums[:, index.clamp_max(a - 1), index.clamp_max(b - 1)]


def held_out_energy(stack: Stack, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """How much of an unseen adapter the directions of the others hold, and what a random subspace would hold.

    Five folds (or n when fewer); every adapter is projected on directions fitted without it.

    Returns:
        mean captured share of ||D_i||^2 for K = 1..most, of the fitted and of a random subspace of the same K, each
        (most,); and the share that the mean of the other adapters explains, a scalar.
    """
    n = len(stack)
    energies = norms2(stack).clamp_min(torch.finfo(torch.float64).tiny)
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
            share = torch.nn.functional.pad(share, (0, most - share.shape[1]), mode="replicate")
            total += share.sum(0)
        mean += _mean_share(rest, out, energies[fold])
    return fitted / n, random / n, mean / n


def _mean_share(rest: Stack, out: Stack, energies: Tensor) -> Tensor:
    """Sum over the held-out adapters of <D_i, M>^2 / (||D_i||^2 ||M||^2), M the mean of the rest."""
    cross_left = (out.left @ rest.left.T).double()
    cross_right = (out.right @ rest.right.T).double()
    products = (cross_left * cross_right).sum(1, keepdim=True)  # (R_out, 1): summed over the rest
    along = out.pad(products).sum((1, 2))
    own = ((rest.left @ rest.left.T).double() * (rest.right @ rest.right.T).double()).sum()
    return (along.square() / (energies * own.clamp_min(torch.finfo(torch.float64).tiny))).sum()
