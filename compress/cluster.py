"""Several bases for one module: each adapter belongs to the one that fits it best (Compress-then-Serve §3.3).

A first partition, then refit and reassign by error until stable. The loss never rises: every refit starts from the
previous bases, and an adapter moves only to a basis that fits it better.

Where we differ from the paper: its first partition is k-means on the normalised cores of one common fit. A common basis
of few columns does not see most of the clusters, and the partition comes out lopsided, from which refitting cannot
recover: adapters prefer the basis that was fitted to them. We start from what one adapter's own singular vectors hold
of another, ||U_i^T D_j V_i||^2 / ||D_j||^2, which needs no common fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorazip.compress.frame import CHUNK_ELEMENTS
from lorazip.compress.joint import Pair
from lorazip.compress.lowrank import Stack
from lorazip.compress.methods import Method

STABLE = 1e-3  # stop when a round of refits and moves lowers the loss by less than this part of it
PAPER_LOSS = 0.6  # the paper's rule: the least number of clusters with a smaller mean squared relative error
PAPER_RANK = 16
DISTINCT = 1e-6  # of the energy: a seed that adds less repeats an adapter that is a seed already
PROBES = 8  # singular vectors of an adapter that stand for it
SKETCH = 256  # dimensions in which many adapters are compared
EXACT_ROWS = 1024  # with at most so many rows they are compared as they are


@dataclass(frozen=True)
class Clusters:
    """Bases of one module and who uses which.

    Attributes:
        pairs: one shared pair a cluster.
        labels: (n,) index into pairs.
        residuals: (n,) ||D_i - D^_i||^2 before anything is rounded, float64.
    """

    pairs: tuple[Pair, ...]
    labels: tuple[int, ...]
    residuals: Tensor


def fit(
    method: Method,
    stack: Stack,
    weights: Tensor,
    energies: Tensor,
    rank: int,
    count: int,
    overlap: Tensor | None = None,
) -> Clusters:
    """Fit at most `count` bases of `rank` columns to one module; fewer where there are fewer distinct adapters.

    Args:
        method: a joint method.
        stack: n matrices in balanced form.
        weights: (n,) nonnegative.
        energies: (n,) ||D_i||^2.
        overlap: `overlaps(stack, rank)` where it is known already.
    """
    count = min(count, len(stack))
    starts = [[0] * len(stack)]
    if count > 1:
        starts = partitions(overlaps(stack, rank) if overlap is None else overlap, weights * energies, count)
    states = [_State(method, stack, weights, energies, rank, labels) for labels in starts]
    return min(states, key=lambda state: state.loss).settle()


class _State:
    """Bases fitted to a partition, and the error of every adapter on every one of them."""

    def __init__(
        self, method: Method, stack: Stack, weights: Tensor, energies: Tensor, rank: int, labels: list[int]
    ):
        self.method, self.stack, self.weights, self.energies, self.rank = (
            method,
            stack,
            weights,
            energies,
            rank,
        )
        self.labels = labels
        self.pairs: list[Pair] = []
        columns = []
        for c in range(max(labels) + 1):
            self.pairs.append(self._refit(c, None))
            columns.append(self._errors(self.pairs[c]))
        self.errors = torch.stack(columns, dim=1)  # (n, count)

    @property
    def residuals(self) -> Tensor:
        return self.errors[torch.arange(len(self.labels)), torch.tensor(self.labels)]

    @property
    def loss(self) -> float:
        return float((self.weights * self.residuals).sum())

    def settle(self) -> Clusters:
        """Move adapters and refit the bases whose adapters changed, until that hardly helps."""
        loss = self.loss
        while moved := _reassign(self.errors, self.labels):
            for c in sorted(moved):
                self._improve(c)
            previous, loss = loss, self.loss
            if previous - loss <= STABLE * loss:
                break
        return Clusters(tuple(self.pairs), tuple(self.labels), self.residuals)

    def _improve(self, c: int) -> None:
        """Refit one basis to its adapters; not every method's fit minimises this loss, so it may be refused."""
        pair = self._refit(c, self.pairs[c])
        errors = self._errors(pair)
        gain = self.weights * (self.errors[:, c] - errors)
        if float(gain[self._members(c)].sum()) > 0:
            self.pairs[c], self.errors[:, c] = pair, errors

    def _errors(self, pair: Pair) -> Tensor:
        return self.method.residuals(self.stack, pair, self.energies)

    def _members(self, c: int) -> list[int]:
        return [i for i, label in enumerate(self.labels) if label == c]

    def _refit(self, c: int, start: Pair | None) -> Pair:
        members = self._members(c)
        if len(members) == len(self.stack):
            return self.method.fit(self.stack, self.weights, self.rank, start)
        return self.method.fit(self.stack.select(members), self.weights[members], self.rank, start)


def _reassign(errors: Tensor, labels: list[int]) -> set[int]:
    """Move adapters in place to the basis with the least error; returns the clusters whose members changed.

    A cluster is never emptied, and near-ties do not move, so that rounding cannot keep the loop going.
    """
    changed: set[int] = set()
    sizes = [labels.count(c) for c in range(errors.shape[1])]
    table = errors.tolist()
    for i, row in enumerate(table):
        home, target = labels[i], row.index(min(row))
        if row[target] < (1 - 1e-6) * row[home] and sizes[home] > 1:
            labels[i] = target
            sizes[home], sizes[target] = sizes[home] - 1, sizes[target] + 1
            changed |= {home, target}
    return changed


def paper_clusters(method: Method, stack: Stack, weights: Tensor, energies: Tensor, rank: int) -> int:
    """The paper's rule on one (middle) module: the least number of clusters with mean relative error below 0.6.

    Doubling, then bisection; a number that misses is not tried again.
    """
    overlap = overlaps(stack, rank)

    def reaches(count: int) -> bool:
        clusters = fit(method, stack, weights, energies, rank, count, overlap)
        share = clusters.residuals / energies.clamp_min(torch.finfo(torch.float64).tiny)
        return bool(share.mean() < PAPER_LOSS)

    low, high = 0, 1
    while high < len(stack) and not reaches(high):
        low, high = high, min(2 * high, len(stack))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return high


def overlaps(stack: Stack, rank: int) -> Tensor:
    """What the leading singular vectors of D_i (at most `rank`) hold of D_j: ||U_i^T D_j V_i||^2 / ||D_j||^2.

    (n, n) float32, on the CPU.

    Many rows are compared after one random projection of each side: products of vectors change by 1/sqrt(SKETCH) of
    their lengths, which tells related adapters from strangers.

    Args:
        stack: balanced, so that the rows of one adapter are orthogonal.
    """
    stack = stack.scaled(torch.where(stack.energies > 0, stack.energies.rsqrt(), 0))
    left, right = _sketched(stack.left), _sketched(stack.right)
    n, r = len(stack), min(rank, stack.width, PROBES)
    lengths = stack.left.norm(dim=1, keepdim=True)
    unit = torch.where(lengths > 0, 1 / lengths, 0)
    u, v = stack.pad(left * unit)[:, :r], stack.pad(right * unit)[:, :r]  # (n, r, d)
    found, step = [], max(1, CHUNK_ELEMENTS // (n * stack.width * r))
    for first in range(0, n, step):
        some_u, some_v = u[first : first + step], v[first : first + step]
        shape = n, stack.width, len(some_u), r
        # U_i^T left_j^T (c, n, r, r_j) and right_j V_i (c, n, r_j, r)
        one = stack.pad(left @ some_u.flatten(0, 1).T).view(shape).permute(2, 0, 3, 1)
        other = stack.pad(right @ some_v.flatten(0, 1).T).view(shape).permute(2, 0, 1, 3)
        found.append((one @ other).square().sum((2, 3)))
    return torch.cat(found).clamp_max(1).cpu()


def _sketched(rows: Tensor) -> Tensor:
    if rows.shape[0] <= EXACT_ROWS or rows.shape[1] <= SKETCH:
        return rows
    generator = torch.Generator().manual_seed(rows.shape[1])
    sketch: Tensor = torch.randn(rows.shape[1], SKETCH, generator=generator) / SKETCH**0.5
    return rows @ sketch.to(rows)


def partitions(overlap: Tensor, energies: Tensor, count: int) -> list[list[int]]:
    """First partitions to choose from: around seeds, once freely and once into clusters of equal size.

    Seeds are the adapters that together hold most of all (greedily). Real adapters share so little that a basis serves
    the better the fewer it has, so equal sizes win; planted clusters may have any size.

    Args:
        overlap: (n, n) as of `overlaps`.
        energies: (n,) what each adapter counts.
    """
    energies = energies.to(overlap)
    seeds: list[int] = []
    held = torch.zeros(len(overlap))
    while len(seeds) < count:
        gains = (overlap - held).clamp_min(0) @ energies
        best = int(gains.argmax())
        if seeds and float(gains[best]) <= DISTINCT * float(energies.sum()):
            break
        seeds.append(best)
        held = torch.maximum(held, overlap[best])
    ranked = overlap[seeds].flatten().argsort(descending=True, stable=True).tolist()
    even = divmod(len(overlap), len(seeds))
    found = [_fill(ranked, seeds, len(overlap), *sizes) for sizes in (even, (len(overlap), 0))]
    return found[:1] if found[0] == found[1] else found


def _fill(ranked: Sequence[int], seeds: Sequence[int], n: int, size: int, larger: int) -> list[int]:
    """Labels (n,): the strongest overlaps with a seed decide first; clusters get `size`, `larger` of them one more."""
    labels = [-1] * n
    sizes = [1] * len(seeds)
    for c, seed in enumerate(seeds):
        labels[seed] = c
    for place in ranked:
        c, i = divmod(place, n)
        if labels[i] < 0 and sizes[c] < size + (larger > 0):
            labels[i] = c
            sizes[c] += 1
            larger -= sizes[c] > size
    return labels
