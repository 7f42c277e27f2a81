"""Groups of adapters that were trained from one shared random A ("shared-init groups").

LoRA's A starts at random and moves little from there, B starts at zero. Adapters that started from the same A therefore
keep nearly the same row space of A, and compress together better than others (METHODS.md §2, Limits). Factors are only
defined up to B -> BG, A -> G^-1 A, so row spaces are compared, not entries: with Q_i (r_i, d) an orthonormal basis of
the row space of A_i,

    overlap_ij = ||Q_i Q_j^T||_F^2 / min(r_i, r_j)

is the mean squared cosine of the principal angles. Independent random row spaces give max(r_i, r_j) / d on average;
`excess` puts this at 0 and equal row spaces at 1.

One module of an adapter is enough. Measured on 45 trained adapters (rank 8, 60 steps of AdamW at 1e-3; 90 modules with
d = 576; 25 of the adapters share their start), over all modules and pairs: at least 0.797 where the start is shared, at
most 0.058 where it is not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from lorazip.adapter import Adapter

THRESHOLD = (
    0.4  # of the excess: near the middle of what was measured; longer training lowers its first number
)
NOISE = 1e-6  # of the largest eigenvalue of A A^T: below it lies the rounding of 16-bit factors
MAX_COLUMNS = 2048  # of A that are looked at: a random start is random on every subset of its columns
BLOCK = 512  # rows of one product: a work space of a few times 512 R numbers, R being the sum of all ranks


def shared_init_groups(adapters: Sequence[Adapter]) -> list[list[str]]:
    """Find the adapters that started from the same A.

    One module decides, the middle one of those that most adapters have; adapters without it are compared on the middle
    one of those that most of them have, and so on. Adapters i and j belong together if excess_ij reaches `THRESHOLD`;
    groups are the connected components of that.

    Returns:
        Groups of at least two names, each sorted, in the order of their first names.
    """
    parent = {adapter.name: adapter.name for adapter in adapters}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    pending = [adapter for adapter in adapters if adapter.modules]
    while pending:
        module = _middle(pending)
        # Adapters that another module has judged take part again: the late ones may belong to their groups.
        having = [adapter for adapter in adapters if module in adapter.modules]
        close = excess([adapter.low_rank(module).A for adapter in having]) >= THRESHOLD
        for i, j in close.triu(1).nonzero().tolist():
            first, second = sorted((root(having[i].name), root(having[j].name)))
            parent[second] = first
        pending = [adapter for adapter in pending if module not in adapter.modules]
    groups: dict[str, list[str]] = {}
    for name in sorted(parent):
        groups.setdefault(root(name), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _middle(adapters: Sequence[Adapter]) -> str:
    """The middle one, by name, of the modules that most of these adapters have."""
    counts = Counter(module for adapter in adapters for module in adapter.modules)
    most = max(counts.values())
    names = sorted(module for module, count in counts.items() if count == most)
    return names[len(names) // 2]


def excess(factors: Sequence[Tensor]) -> Tensor:
    """How much more than by chance the row spaces of the factors overlap, (n, n) float64, symmetric.

    Args:
        factors: A_i (r_i, d), any floating type.
    Returns:
        (overlap - c) / (1 - c) with c = max(r_i, r_j) / d: about 0 for independent random row spaces, 1 where one
        contains the other; 0 where that says nothing (A is zero, or its row space is the whole space).
    """
    step = -(-factors[0].shape[1] // MAX_COLUMNS)
    bases = [_row_basis(factor[:, ::step]) for factor in factors]
    width = bases[0].shape[1]
    ranks = torch.tensor([len(basis) for basis in bases], dtype=torch.float64)
    overlap = _squares(bases) / torch.minimum(ranks[:, None], ranks).clamp_min(1)
    chance = torch.maximum(ranks[:, None], ranks) / width
    told = (chance < 1) & (ranks[:, None] > 0) & (ranks > 0)
    return torch.where(told, (overlap - chance) / (1 - chance).clamp_min(1 / width), 0)


def _row_basis(factor: Tensor) -> Tensor:
    """An orthonormal basis (rank, d) float32 of the row space of A (r, d): E^(-1/2) W^T A with A A^T = W E W^T."""
    rows = factor.double()
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    kept = values > NOISE * values[-1:].clamp_min(torch.finfo(torch.float64).tiny)
    turn: Tensor = vectors[:, kept] / values[kept].sqrt()  # (r, rank)
    return (turn.T @ rows).float()


def _squares(bases: Sequence[Tensor]) -> Tensor:
    """||Q_i Q_j^T||_F^2 of all pairs, (n, n) float64: the upper half of one product of all rows, in blocks."""
    sizes = torch.tensor([len(basis) for basis in bases])
    starts = [0, *sizes.cumsum(0).tolist()]
    n, rows = len(bases), torch.cat(list(bases))
    owner = torch.arange(n).repeat_interleave(sizes)
    total = torch.zeros(n, n, dtype=torch.float64)
    step = max(1, BLOCK // max(1, int(sizes.max())))
    for first in range(0, n, step):
        last = min(first + step, n)
        start, stop = starts[first], starts[last]
        square = (rows[start:stop] @ rows[start:].T).square_()  # (rows of the block, rows from the block on)
        sums = torch.zeros(last - first, len(rows) - start).index_add_(0, owner[start:stop] - first, square)
        total[first:last, first:].index_add_(1, owner[start:] - first, sums.double())
    # Below its diagonal blocks total is empty.
    return total.triu() + total.triu(1).T
