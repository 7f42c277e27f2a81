"""Several bases for one module: planted clusters, monotone refinement, the paper's rule."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from reference import hooi, modules, related, stacked, steady, zoo
from torch import Tensor

from lorazip.adapter import LowRank
from lorazip.compress import cluster
from lorazip.compress.cluster import Clusters
from lorazip.compress.encode import load
from lorazip.compress.lowrank import Stack, canonical
from lorazip.compress.methods import METHODS

JD = METHODS["jd-full"]


def prepared(factors: Sequence[LowRank]) -> tuple[Stack, Tensor, Tensor]:
    """Balanced stack, unit weights, energies."""
    stack, _ = canonical(load(factors, torch.device("cpu")))
    return stack, torch.where(stack.energies > 0, 1 / stack.energies, 0), stack.energies


def fitted(factors: Sequence[LowRank], rank: int, count: int, method: str = "jd-full") -> Clusters:
    return cluster.fit(METHODS[method], *prepared(factors), rank, count)


def mean_error(factors: Sequence[LowRank], clusters: Clusters) -> float:
    """Mean squared relative error on the clusters' bases, dense."""
    total = 0.0
    for matrix, label in zip(stacked(factors), clusters.labels, strict=True):
        u, v = clusters.pairs[label].left.double(), clusters.pairs[label].right.double()
        total += float((matrix - u @ (u.T @ matrix @ v) @ v.T).square().sum())
    return total / len(factors)


def same_partition(labels: Sequence[int], wanted: Sequence[int]) -> bool:
    pairs = set(zip(labels, wanted, strict=True))
    return len(pairs) == len(set(labels)) == len(set(wanted))


@pytest.mark.parametrize("noise", [0.1, 0.35])
@pytest.mark.parametrize(("n", "count"), [(12, 3), (40, 4), (50, 10)])
def test_planted_clusters_are_found(noise: float, n: int, count: int) -> None:
    factors = related((4,) * n, 64, 96, clusters=count, noise=noise)
    assert same_partition(fitted(factors, 6, count).labels, [i % count for i in range(n)])


def test_planted_clusters_of_different_sizes_are_found() -> None:
    everything = related((4,) * 60, 64, 96, clusters=3, noise=0.2)
    wanted = [0] * 15 + [1] * 6 + [2] * 4
    supply = [iter(everything[c::3]) for c in range(3)]
    factors = [next(supply[c]) for c in wanted]
    assert same_partition(fitted(factors, 6, 3).labels, wanted)


def test_more_columns_than_one_cluster_spans_do_not_hide_it() -> None:
    """Two adapters of rank 2 span 4 columns; the basis of 8 must take in whoever joins."""
    factors = related((2,) * 9, 40, 50, clusters=3, planted=2, noise=0.02)
    found = fitted(factors, 8, 3)
    assert same_partition(found.labels, [i % 3 for i in range(9)])
    assert all(pair.left.shape[1] == 6 for pair in found.pairs)


def test_clusters_of_real_adapters_are_better_than_chance_and_than_one_basis() -> None:
    factors = zoo("15.k_proj")
    found = mean_error(factors, fitted(factors, 8, 3))
    assert found < 0.75 * mean_error(factors, fitted(factors, 8, 1))
    random = torch.Generator().manual_seed(0)
    matrices = stacked(factors)
    chance = []
    for _ in range(3):
        order = torch.randperm(12, generator=random)
        chance.append(sum(float(hooi(matrices[order[c::3]], 8, rounds=5).sum()) for c in range(3)) / 12)
    assert found <= 1.01 * min(chance)


@pytest.mark.parametrize("method", ["jd-full", "jd-diag", "eigenlora", "mean"])
def test_the_loss_never_rises(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """From a bad partition: after every move and after every refit."""
    factors = related((4, 3) * 12, 40, 50, clusters=4)
    stack, weights, energies = prepared(factors)
    losses: list[float] = []
    reassign = cluster._reassign

    def spy(errors: Tensor, labels: list[int]) -> set[int]:
        def loss() -> float:
            return float((weights * errors[torch.arange(len(labels)), torch.tensor(labels)]).sum())

        losses.append(loss())
        moved = reassign(errors, labels)
        losses.append(loss())
        return moved

    monkeypatch.setattr(cluster, "_reassign", spy)
    monkeypatch.setattr(cluster, "STABLE", 0.0)
    bad = [(i // 5) % 4 for i in range(24)]
    monkeypatch.setattr(cluster, "partitions", lambda *given: [list(bad)])
    result = cluster.fit(METHODS[method], stack, weights, energies, 5, 4)
    assert len(losses) >= 4 or method == "eigenlora"
    losses.append(float((weights * result.residuals).sum()))
    assert all(after <= before * (1 + 1e-7) for before, after in itertools.pairwise(losses))
    assert losses[-1] < losses[0] or method == "eigenlora"  # whose members all prefer the bases at home


def test_adapters_move_where_they_fit_better_but_never_leave_a_cluster_empty() -> None:
    errors = torch.tensor([[0.5, 0.9], [0.6, 0.1], [0.2, 0.3], [0.2, 0.2 - 1e-9]], dtype=torch.float64)
    labels = [0, 0, 1, 0]
    assert cluster._reassign(errors, labels) == {0, 1}
    assert labels == [0, 1, 0, 0]  # the last one hardly prefers the other: it stays
    alone = [0, 0, 1, 0]
    assert cluster._reassign(errors[:, [0, 0]], alone) == set() and alone == [0, 0, 1, 0]
    lonely = [1, 0, 0, 0]
    assert cluster._reassign(torch.tensor([[0.1, 0.9]] * 4), lonely) == set() and lonely == [1, 0, 0, 0]


def test_residuals_and_labels_belong_to_the_pairs_returned() -> None:
    factors = related((4, 3) * 6, 40, 50, clusters=3)
    stack, weights, energies = prepared(factors)
    result = cluster.fit(JD, stack, weights, energies, 5, 3)
    for i, label in enumerate(result.labels):
        own = JD.residuals(stack, result.pairs[label], energies)[i]
        assert float(result.residuals[i]) == pytest.approx(float(own), rel=1e-9)
        for pair in result.pairs:
            assert float(JD.residuals(stack, pair, energies)[i]) >= float(own) * (1 - 1e-3)


def test_the_order_of_adapters_does_not_matter() -> None:
    factors = related((4,) * 30, 64, 96, clusters=3, noise=0.5)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0)).tolist()
    one, two = fitted(factors, 6, 5), fitted([factors[i] for i in order], 6, 5)
    assert same_partition(two.labels, [one.labels[i] for i in order])
    assert torch.allclose(two.residuals, one.residuals[order], rtol=1e-3)


def test_copies_do_not_fill_clusters() -> None:
    one, other = related((4, 4), 40, 50)
    found = fitted([one, one, other, one, other, one], 4, 5)
    assert len(found.pairs) == 2 and same_partition(found.labels, [0, 0, 1, 0, 1, 0])
    assert mean_error([one, one, other, one, other, one], found) < 1e-10
    assert len(fitted([one] * 4, 4, 3).pairs) == 1


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_small_and_empty_modules(count: int) -> None:
    factors = related((2, 1, 3), 12, 10)
    found = fitted(factors, 3, count)
    assert len(found.pairs) <= min(count, 3) and set(found.labels) == set(range(len(found.pairs)))
    assert len(fitted(factors[:1], 3, count).pairs) == 1
    zero = LowRank(torch.zeros(12, 2), torch.ones(2, 10), 1.0)
    nothing = fitted([zero, zero], 3, count)
    assert not nothing.residuals.any()
    beside = fitted([zero, *factors, zero], 3, count)
    assert torch.allclose(beside.residuals[1:4].sum(), found.residuals.sum(), rtol=0.5, atol=1e-5)


@given(modules())
@steady
def test_any_module_is_clustered(factors: list[LowRank]) -> None:
    for count in (2, 3):
        found = fitted(factors, 2, count)
        assert len(found.labels) == len(factors)
        assert set(found.labels) == set(range(len(found.pairs)))
        one = fitted(factors, 2, 1)
        assert mean_error(factors, found) <= mean_error(factors, one) * (1 + 1e-6) + 1e-9


# --- the first partition ----------------------------------------------------------------------------------------------


def dense_overlaps(factors: Sequence[LowRank], rank: int) -> Tensor:
    matrices = stacked(factors)
    u, _, vt = torch.linalg.svd(matrices, full_matrices=False)
    found = torch.zeros(len(factors), len(factors), dtype=torch.float64)
    for i, factor in enumerate(factors):
        if not matrices[i].any():
            continue
        r = min(rank, factor.A.shape[0])
        found[i] = (u[i, :, :r].T @ matrices @ vt[i, :r].T).square().sum((1, 2))
    return found


@pytest.mark.parametrize("rank", [1, 3, 20])
def test_overlaps_are_those_of_the_dense_matrices(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    factors = [*related((4, 2, 9, 4), 20, 30), LowRank(torch.zeros(20, 2), torch.ones(2, 30), 1.0)]
    factors[1] = LowRank(factors[1].B * 1e-20, factors[1].A, 2.0)  # strength does not matter
    monkeypatch.setattr(cluster, "CHUNK_ELEMENTS", 300)
    stack, _, _ = prepared(factors)
    found = cluster.overlaps(stack, rank)
    assert torch.allclose(found.double(), dense_overlaps(factors, min(rank, cluster.PROBES)), atol=1e-5)


def test_a_sketch_tells_relatives_from_strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "EXACT_ROWS", 10)
    factors = related((6,) * 12, 400, 500, clusters=3, noise=0.2)
    stack, _, _ = prepared(factors)
    found = cluster.overlaps(stack, 6)
    related_ones = [float(found[i, j]) for i in range(12) for j in range(12) if i % 3 == j % 3]
    strangers = [float(found[i, j]) for i in range(12) for j in range(12) if i % 3 != j % 3]
    assert min(related_ones) > 10 * max(strangers)


def test_partitions_have_equal_or_free_sizes() -> None:
    """Three relatives of one seed, one of the other: equal sizes move the weakest relative."""
    overlap = torch.tensor(
        [
            [1.0, 0.9, 0.8, 0.7, 0.1, 0.0],
            [0.9, 1.0, 0.5, 0.5, 0.0, 0.0],
            [0.8, 0.5, 1.0, 0.5, 0.0, 0.0],
            [0.7, 0.5, 0.5, 1.0, 0.2, 0.0],
            [0.1, 0.0, 0.0, 0.2, 1.0, 0.9],
            [0.0, 0.0, 0.0, 0.0, 0.9, 1.0],
        ]
    )
    even, free = cluster.partitions(overlap, torch.ones(6), 2)
    assert free == [0, 0, 0, 0, 1, 1]
    assert even == [0, 0, 0, 1, 1, 1]
    assert sorted(cluster.partitions(overlap, torch.ones(6), 6)[0]) == [0, 1, 2, 3, 4, 5]


def test_sizes_differ_by_one_at_most() -> None:
    random = torch.Generator().manual_seed(0)
    overlap = torch.rand(23, 23, generator=random)
    overlap.fill_diagonal_(1.0)
    for count in (2, 3, 7, 23):
        even = cluster.partitions(overlap, torch.ones(23), count)[0]
        sizes = [even.count(c) for c in range(count)]
        assert sum(sizes) == 23 and max(sizes) - min(sizes) <= 1


# --- the paper's rule -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("clusters", "noise", "rank"), [(1, 0.2, 6), (4, 0.2, 6), (6, 0.4, 6), (8, 0.4, 6)])
def test_the_papers_rule_is_the_least_number_with_an_error_below_its_bound(
    clusters: int, noise: float, rank: int
) -> None:
    factors = related((4,) * 24, 48, 64, clusters=clusters, noise=noise)
    stack, weights, energies = prepared(factors)
    found = cluster.paper_clusters(JD, stack, weights, energies, rank)
    by_count = {k: mean_error(factors, fitted(factors, rank, k)) for k in range(1, found + 1)}
    assert by_count.pop(found) < cluster.PAPER_LOSS
    assert all(error >= cluster.PAPER_LOSS for error in by_count.values())


def test_the_papers_rule_ends_at_one_cluster_an_adapter() -> None:
    """Adapters of more rank than the bases that share nothing: no number of clusters reaches the bound."""
    random = torch.Generator().manual_seed(0)
    factors: list[Any] = [
        LowRank(torch.randn(40, 12, generator=random), torch.randn(12, 40, generator=random))
        for _ in range(5)
    ]
    assert cluster.paper_clusters(JD, *prepared(factors), 1) == 5
