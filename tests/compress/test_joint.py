"""Joint fits against dense float64 references: HOOI, alternating least squares, eigendecompositions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from reference import (
    best_diagonals,
    compact,
    cp_als,
    diagonal_loss,
    hooi,
    modules,
    related,
    stacked,
    steady,
    zoo,
)
from torch import Tensor

from lorazip.adapter import LowRank
from lorazip.compress import frame, joint
from lorazip.compress.encode import load
from lorazip.compress.frame import Frame, orthonormal
from lorazip.compress.joint import Pair
from lorazip.compress.lowrank import Stack, canonical

CPU = torch.device("cpu")
MIXED = (8, 3, 8, 1, 5, 8, 2, 8, 4, 8)


def balanced(factors: Sequence[LowRank]) -> Stack:
    """Balanced rows, every adapter at norm 1: what a fit with unit weights gets."""
    stack, _ = canonical(load(factors, CPU))
    return stack.scaled(torch.where(stack.energies > 0, stack.energies.rsqrt(), 0))


def projected(matrices: Tensor, pair: Pair) -> Tensor:
    """||D_i - U U^T D_i V V^T||^2 for orthonormal bases, dense (n,)."""
    u, v = pair.left.double(), pair.right.double()
    return (matrices - u @ (u.T @ matrices @ v) @ v.T).square().sum((1, 2))


def is_orthonormal(columns: Tensor) -> bool:
    gram = columns.double().T @ columns.double()
    return bool((gram - torch.eye(len(gram), dtype=torch.float64)).abs().max() < 1e-5)


# --- JD-Full ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["0.q_proj", "12.q_proj", "15.k_proj", "29.v_proj"])
@pytest.mark.parametrize("rank", [4, 13, 40])
def test_jd_full_is_hooi_on_real_adapters(module: str, rank: int) -> None:
    factors = zoo(module)
    matrices = stacked(factors)
    pair = joint.fit_full(balanced(factors), rank)
    assert is_orthonormal(pair.left) and is_orthonormal(pair.right)
    found, wanted = projected(matrices, pair).mean(), hooi(compact(factors), rank).mean()
    assert abs(float(found / wanted) - 1) < 1e-4


@pytest.mark.parametrize(
    ("ranks", "out", "in_", "clusters"),
    [
        (MIXED, 60, 80, 1),  # mixed ranks, both sides reduced to their span
        (MIXED, 24, 72, 3),  # grouped queries: more rows than outputs on one side only
        ((8,) * 25, 64, 64, 1),  # many more rows than dimensions on both
        ((8,) * 30, 192, 384, 2),  # large enough for the block Krylov steps
        ((16,), 40, 30, 1),
        ((2, 2), 5, 5, 1),
    ],
)
@pytest.mark.parametrize("rank", [2, 6, 20])
def test_jd_full_is_hooi_on_generated_stacks(
    ranks: tuple[int, ...], out: int, in_: int, clusters: int, rank: int
) -> None:
    factors = related(ranks, out, in_, clusters=clusters)
    matrices = stacked(factors)
    found = projected(matrices, joint.fit_full(balanced(factors), rank)).mean()
    wanted = hooi(matrices, rank).mean()
    assert float(found - wanted) <= 1e-3 * float(wanted) + 1e-12


def test_float32_iterations_are_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = related((8,) * 30, 192, 384, clusters=2)
    precise = projected(stacked(factors), joint.fit_full(balanced(factors), 12)).mean()
    monkeypatch.setattr(frame, "PRECISE", 0)
    single = projected(stacked(factors), joint.fit_full(balanced(factors), 12)).mean()
    assert float(single / precise) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("fit", [joint.fit_full, joint.fit_diagonal])
@pytest.mark.parametrize(("ranks", "out", "in_"), [(MIXED, 60, 80), (MIXED, 24, 72), ((8,) * 30, 192, 384)])
def test_the_loss_never_rises(
    monkeypatch: pytest.MonkeyPatch, fit: object, ranks: tuple[int, ...], out: int, in_: int
) -> None:
    """One round at a time, each from the bases of the one before."""
    stack = balanced(related(ranks, out, in_))
    matrices = stacked(related(ranks, out, in_))
    random = torch.Generator().manual_seed(0)
    pair = Pair(*(orthonormal(torch.randn(d, 7, generator=random)) for d in (out, in_)))
    monkeypatch.setattr(joint, "ROUNDS", 1 if fit is joint.fit_full else 2)

    def loss(pair: Pair) -> float:
        if fit is joint.fit_full:
            return float(projected(matrices, pair).sum())
        return diagonal_loss(matrices, pair.left.double(), pair.right.double())

    losses = [loss(pair)]
    for _ in range(6):
        pair = fit(stack, 7, pair)  # type: ignore[operator]
        losses.append(loss(pair))
    assert all(after <= before * (1 + 1e-7) for before, after in itertools.pairwise(losses))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(("ranks", "out", "in_"), [((3, 5, 2), 40, 30), ((8,) * 12, 48, 96), ((3,), 9, 7)])
def test_full_rank_is_lossless(ranks: tuple[int, ...], out: int, in_: int) -> None:
    factors = related(ranks, out, in_)
    matrices = stacked(factors)
    rank = min(sum(ranks), max(out, in_))
    assert float(projected(matrices, joint.fit_full(balanced(factors), rank)).max()) < 1e-10
    pair = joint.fit_diagonal(balanced(factors), sum(ranks))
    assert diagonal_loss(matrices, pair.left.double(), pair.right.double()) < 1e-10


def test_more_columns_than_the_module_has_are_not_made() -> None:
    stack = balanced(related((8,) * 12, 12, 60))
    pair = joint.fit_full(stack, 20)
    assert pair.left.shape == (12, 12) and pair.right.shape == (60, 20)


def test_copies_of_one_adapter_cost_one_adapter() -> None:
    factors = related((4,), 40, 30) * 9
    pair = joint.fit_full(balanced(factors), 4)
    assert float(projected(stacked(factors), pair).max()) < 1e-10
    assert is_orthonormal(joint.fit_full(balanced(factors), 12).left)  # more columns than there is to span


def test_zero_adapters_change_nothing() -> None:
    factors = related((4, 3, 4), 40, 30)
    zero = LowRank(torch.zeros(40, 2), torch.randn(2, 30, generator=torch.Generator().manual_seed(0)), 1.0)
    matrices = stacked(factors)
    without = projected(matrices, joint.fit_full(balanced(factors), 5))
    beside = projected(matrices, joint.fit_full(balanced([zero, *factors, zero]), 5))
    assert torch.allclose(without, beside, atol=1e-6)
    nothing = joint.fit_full(balanced([zero, zero]), 3)
    assert bool(nothing.left.isfinite().all() and nothing.right.isfinite().all())


@given(modules())
@steady
def test_any_stack_is_fitted(factors: list[LowRank]) -> None:
    stack, matrices = balanced(factors), stacked(factors)
    for rank in (1, 3):
        found = projected(matrices, joint.fit_full(stack, rank)).sum()
        assert float(found) <= float(hooi(matrices, rank, rounds=1).sum()) * (1 + 1e-6) + 1e-9
        pair = joint.fit_diagonal(stack, rank)
        assert diagonal_loss(matrices, pair.left.double(), pair.right.double()) <= float(
            matrices.square().sum()
        ) * (1 + 1e-9)


def test_a_start_of_fewer_columns_is_widened_and_never_loses() -> None:
    factors = related(MIXED, 60, 80)
    stack, matrices = balanced(factors), stacked(factors)
    narrow = joint.fit_full(stack.select([0, 1]).scaled(torch.ones(2, dtype=torch.float64)), 20)
    assert narrow.left.shape[1] == 11  # two adapters of rank 8 and 3 span no more
    wide = joint.fit_full(stack, 20, narrow)
    assert wide.left.shape == (60, 20) and wide.right.shape == (80, 20)
    assert float(projected(matrices, wide).sum()) <= float(projected(matrices, narrow).sum())


def test_a_start_of_more_columns_is_cut_to_the_rank() -> None:
    stack = balanced(related(MIXED, 60, 80))
    pair = joint.fit_full(stack, 4, joint.fit_full(stack, 9))
    assert pair.left.shape == (60, 4) and pair.right.shape == (80, 4)


def test_the_bases_of_a_few_adapters_serve_as_start_for_others() -> None:
    """An adapter leaves a cluster: the rest spans less than the old bases have columns."""
    factors = related(MIXED, 60, 80)
    old = joint.fit_full(balanced(factors), 20)
    rest = balanced(factors[3:5])
    pair = joint.fit_full(rest, 20, old)
    assert float(projected(stacked(factors[3:5]), pair).max()) < 1e-10


# --- cores and residuals ----------------------------------------------------------------------------------------------


def crooked_pair() -> Pair:
    """Bases that are neither orthonormal nor of full rank, as rounding and zero columns leave them."""
    random = torch.Generator().manual_seed(1)
    left, right = torch.randn(40, 6, generator=random), torch.randn(30, 5, generator=random)
    left[:, 3] = left[:, 1]
    right[:, 4] = 0
    return Pair(left, right)


def test_full_cores_are_the_least_squares_ones_on_any_bases() -> None:
    stack, _ = canonical(load(related((4, 2, 3), 40, 30), CPU))
    matrices = stacked(related((4, 2, 3), 40, 30), unit=False)
    pair = crooked_pair()
    p, q = joint.full_cores(stack, pair)
    assert p.shape == (3, 6, 4) and q.shape == (3, 5, 4)
    u, v = pair.left.double(), pair.right.double()
    wanted = torch.linalg.pinv(u) @ matrices @ torch.linalg.pinv(v).T
    assert torch.allclose(u @ p @ q.mT @ v.T, u @ wanted @ v.T, atol=1e-5)


def test_full_residuals_are_those_of_the_dense_matrices() -> None:
    factors = related((4, 2, 3), 40, 30)
    stack, _ = canonical(load(factors, CPU))
    matrices = stacked(factors, unit=False)
    pair = joint.fit_full(stack, 5)
    found = joint.full_residuals(stack, pair, stack.energies)
    assert torch.allclose(
        found, projected(matrices, pair), rtol=1e-4, atol=1e-6 * float(stack.energies.max())
    )


def test_diagonal_cores_and_residuals_are_the_least_squares_ones() -> None:
    factors = related((4, 2, 3), 40, 30)
    stack, _ = canonical(load(factors, CPU))
    matrices = stacked(factors, unit=False)
    crooked = crooked_pair()
    pair = Pair(crooked.left[:, :5], crooked.right)  # dependent: many diagonals are equally good
    sigma, wanted = (
        joint.diagonal_cores(stack, pair),
        best_diagonals(matrices, pair.left.double(), pair.right.double()),
    )
    terms = torch.einsum("ik,jk->ijk", pair.left.double(), pair.right.double())
    assert torch.allclose(terms @ sigma[0], terms @ wanted[0], atol=1e-5 * float(matrices[0].norm()))
    found = joint.diagonal_residuals(stack, pair, stack.energies)
    dense = (matrices - torch.einsum("ijk,nk->nij", terms, wanted)).square().sum((1, 2))
    assert torch.allclose(found, dense, rtol=1e-5)


def test_diagonal_cores_tell_columns_apart_that_are_nearly_parallel() -> None:
    factors = related((4, 2, 3), 40, 30)
    stack, _ = canonical(load(factors, CPU))
    random = torch.Generator().manual_seed(2)
    left, right = torch.randn(40, 4, generator=random), torch.randn(30, 4, generator=random)
    left[:, 3] = left[:, 0] + 1e-2 * left[:, 3]
    right[:, 3] = right[:, 0] + 1e-2 * right[:, 3]
    found = joint.diagonal_cores(stack, Pair(left, right))
    wanted = best_diagonals(stacked(factors, unit=False), left.double(), right.double())
    assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


# --- JD-Diag ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [2, 5, 9])
@pytest.mark.parametrize(("ranks", "out", "in_"), [((4, 2, 3, 4), 20, 16), ((3,) * 6, 6, 24)])
def test_jd_diag_is_not_worse_than_alternating_least_squares_from_the_same_start(
    ranks: tuple[int, ...], out: int, in_: int, rank: int
) -> None:
    factors = related(ranks, out, in_)
    stack, matrices = balanced(factors), stacked(factors)
    start = joint._diagonal_start(stack, rank)
    begun = diagonal_loss(matrices, start.left.double(), start.right.double())
    pair = joint.fit_diagonal(stack, rank)
    found = diagonal_loss(matrices, pair.left.double(), pair.right.double())
    assert found < begun
    # The reference does as many rounds as ours at most.
    assert found <= 1.01 * cp_als(matrices, start.left.double(), start.right.double(), joint.ROUNDS)


def test_jd_diag_on_real_adapters_beats_its_start() -> None:
    factors = zoo("15.k_proj")
    matrices = stacked(factors)
    stack = balanced(factors)
    start = joint._diagonal_start(stack, 13)
    pair = joint.fit_diagonal(stack, 13)
    losses = [diagonal_loss(matrices, p.left.double(), p.right.double()) / 12 for p in (start, pair)]
    assert losses[1] < 0.9 * losses[0]
    full = float(projected(matrices, joint.fit_full(stack, 13)).mean())
    assert losses[1] > full  # a diagonal core can only do worse than a full one


def test_jd_diag_goes_beyond_the_width_of_a_module() -> None:
    factors = related((3,) * 6, 6, 24)
    pair = joint.fit_diagonal(balanced(factors), 10)
    assert pair.left.shape == (6, 10) and pair.right.shape == (24, 10)
    lengths = torch.cat([pair.left.norm(dim=0), pair.right.norm(dim=0)])
    assert torch.allclose(lengths, torch.ones(20), atol=1e-5)  # the sizes are in the diagonals


def test_copies_are_lossless_with_diagonals_of_one_adapter() -> None:
    factors = related((4,), 20, 16) * 5
    pair = joint.fit_diagonal(balanced(factors), 4)
    assert diagonal_loss(stacked(factors), pair.left.double(), pair.right.double()) < 1e-9


# --- eigenvectors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [40, 300])  # dense, and block Krylov
def test_leading_never_lowers_what_is_captured(size: int) -> None:
    rows = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = rows @ torch.diag(0.97 ** torch.arange(size)).double() @ rows.T
    matrix = (matrix + matrix.T) / 2
    exact = float(torch.linalg.eigvalsh(matrix)[-5:].sum())
    x = orthonormal(torch.randn(size, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    captured = [float((x.T @ matrix @ x).trace())]
    for _ in range(12):
        x, total = joint.leading(lambda y: matrix @ y, x)
        assert total == pytest.approx(float((x.T @ matrix @ x).trace()), rel=1e-9)
        assert is_orthonormal(x)
        captured.append(total)
    assert all(after >= before * (1 - 1e-12) for before, after in itertools.pairwise(captured))
    assert captured[-1] == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize(("count", "width"), [(20, 60), (60, 60), (300, 500), (500, 300)])
def test_principal_directions_hold_what_the_leading_eigenvectors_hold(count: int, width: int) -> None:
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(count, width, generator=random) * 0.95 ** torch.arange(count)[:, None]
    found = joint.principal(Frame.of(rows), 8)
    assert found.shape == (width, 8) and is_orthonormal(found)
    held = float((rows.double() @ found.double()).square().sum())
    exact = float(torch.linalg.svdvals(rows.double())[:8].square().sum())
    assert exact * (1 - 1e-3) <= held <= exact * (1 + 1e-6)


def test_principal_directions_are_filled_up_with_orthonormal_ones() -> None:
    rows = torch.randn(5, 60, generator=torch.Generator().manual_seed(0))
    found = joint.principal(Frame.of(rows), 12)
    assert found.shape == (60, 12) and is_orthonormal(found)
    assert torch.allclose(rows @ found[:, :5] @ found[:, :5].T, rows, atol=1e-4)


def test_the_order_of_rows_does_not_matter() -> None:
    rows = (
        torch.randn(300, 500, generator=torch.Generator().manual_seed(0)) * 0.97 ** torch.arange(300)[:, None]
    )
    one, two = joint.principal(Frame.of(rows), 8), joint.principal(Frame.of(rows.flip(0)), 8)
    assert torch.allclose(one @ one.T, two @ two.T, atol=1e-5)
