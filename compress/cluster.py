"""Several bases for one module: each adapter belongs to the one that fits it best (Compress-then-Serve §3.3).

k-means on the normalised flattened cores of one common JD-Full fit, then refit and reassign by error until stable. The
loss never rises: every refit starts from the previous bases, and an adapter moves only to a basis that fits it better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from lorazip.compress import joint
from lorazip.compress.joint import Pair
from lorazip.compress.lowrank import Stack
from lorazip.compress.methods import Method

STABLE = 1e-3  # stop when a round of refits and moves lowers the loss by less than this part of it
PAPER_LOSS = 0.6  # the paper's rule: the least number of clusters with a smaller mean squared relative error
PAPER_RANK = 16


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
    start: Clusters | None = None,
) -> Clusters:
    """Fit `count` bases of `rank` columns to one module.

    Args:
        method: a joint method.
        stack: n matrices in balanced form.
        weights: (n,) nonnegative.
        energies: (n,) ||D_i||^2.
        start: bases of the same count and rank to continue from.
    """
    n = len(stack)
    count = min(count, n)
    if start is not None:
        labels, pairs = list(start.labels), list(start.pairs)
    else:
        labels = _kmeans(stack, weights, rank, count) if count > 1 else [0] * n
        pairs = [_refit(method, stack, weights, labels, c, rank, None) for c in range(count)]
    loss = float("inf")
    while True:
        errors = torch.stack([method.residuals(stack, pair, energies) for pair in pairs], dim=1)  # (n, count)
        moved = _reassign(errors, labels, count)
        current = errors[torch.arange(n), torch.tensor(labels)]
        previous, loss = loss, float((weights * current).sum())
        if count == 1 or not moved or previous - loss <= STABLE * loss:
            return Clusters(tuple(pairs), tuple(labels), current)
        for c in moved:
            pairs[c] = _refit(method, stack, weights, labels, c, rank, pairs[c])


def paper_clusters(method: Method, stack: Stack, weights: Tensor, energies: Tensor, rank: int) -> int:
    """The paper's rule on one (middle) module: the least number of clusters with mean relative error below 0.6.

    Doubling, then bisection; a number that misses is not tried again.
    """

    def reaches(count: int) -> bool:
        clusters = fit(method, stack, weights, energies, rank, count)
        share = clusters.residuals / energies.clamp_min(torch.finfo(torch.float64).tiny)
        return bool(share.mean() < PAPER_LOSS)

    low, high = 0, 1
    while high < len(stack) and not reaches(high):
        low, high = high, min(2 * high, len(stack))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return high


def _refit(
    method: Method,
    stack: Stack,
    weights: Tensor,
    labels: Sequence[int],
    c: int,
    rank: int,
    start: Pair | None,
) -> Pair:
    members = [i for i, label in enumerate(labels) if label == c]
    if len(members) == len(stack):
        return method.fit(stack, weights, rank, start)
    return method.fit(stack.select(members), weights[members], rank, start)


def _reassign(errors: Tensor, labels: list[int], count: int) -> set[int]:
    """Move adapters in place to the basis with the least error; returns the clusters whose members changed.

    A cluster is never emptied, and near-ties do not move, so that rounding cannot keep the loop going.
    """
    changed: set[int] = set()
    best = errors.argmin(1).tolist()
    for i, target in enumerate(best):
        home = labels[i]
        better = float(errors[i, target]) < (1 - 1e-6) * float(errors[i, home])
        if target != home and better and labels.count(home) > 1:
            labels[i] = target
            changed |= {home, target}
    return changed


def _kmeans(stack: Stack, weights: Tensor, rank: int, count: int) -> list[int]:
    """Labels from Lloyd's k-means on normalised cores, started farthest-first so that the order does not matter."""
    pair = joint.fit_full(stack.scaled(weights.sqrt()), rank)
    p, q = joint.full_cores(stack, pair)
    features = (p @ q.mT).flatten(1)
    features = torch.nn.functional.normalize(features, dim=1).cpu()
    seeds = [int((features @ features.mean(0)).argmax())]
    distance = (features - features[seeds[0]]).square().sum(1)
    while len(seeds) < count:
        seeds.append(int(distance.argmax()))
        distance = torch.minimum(distance, (features - features[seeds[-1]]).square().sum(1))
    if float(distance.max()) == 0 and len(set(seeds)) < count:  # fewer distinct adapters than clusters
        return [i % count for i in range(len(stack))]
    _, labels = kmeans2(features.numpy(), features[seeds].numpy(), iter=20, minit="matrix", missing="warn")
    return _no_empty([int(label) for label in labels], seeds)


def _no_empty(labels: list[int], seeds: Sequence[int]) -> list[int]:
    """Lloyd's iterations may empty a cluster: give it its seed back."""
    for c, seed in enumerate(seeds):
        if c not in labels and labels.count(labels[seed]) > 1:
            labels[seed] = c
    return labels
