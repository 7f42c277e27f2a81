"""The algebra of factored matrices against dense float64 arithmetic."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from reference import dense, modules, related, stacked, steady, unimodular, zoo
from torch import Tensor

from lorazip.adapter import LowRank
from lorazip.compress import frame, lowrank
from lorazip.compress.encode import load
from lorazip.compress.lowrank import Stack, canonical, inner, norms2, untangled

CPU = torch.device("cpu")


def matrices(stack: Stack) -> Tensor:
    """Every D_i of a stack, (n, out, in) float64."""
    rows = [slice(*ends) for ends in itertools.pairwise(stack.starts)]
    return torch.stack([stack.left[r].double().T @ stack.right[r].double() for r in rows])


def close(found: Tensor, wanted: Tensor, share: float) -> bool:
    """Frobenius distance of every matrix within `share` of its norm."""
    distance = (found - wanted).flatten(1).norm(dim=1)
    return bool((distance <= share * wanted.flatten(1).norm(dim=1)).all())


@given(modules())
@steady
def test_rows_and_padded_blocks_turn_into_each_other(factors: list[LowRank]) -> None:
    stack = load(factors, CPU)
    blocks = stack.pad(stack.left)
    assert blocks.shape == (len(factors), max(stack.ranks), stack.left.shape[1])
    assert torch.equal(stack.unpad(blocks), stack.left)
    for block, rank in zip(blocks, stack.ranks, strict=True):
        assert not block[rank:].any()


@given(modules())
@steady
def test_norms_and_products_are_those_of_the_dense_matrices(factors: list[LowRank]) -> None:
    first, second = load(factors, CPU), load(factors[::-1], CPU)
    one, two = stacked(factors, unit=False), stacked(factors[::-1], unit=False)
    size = one.square().sum((1, 2)) + 1e-300
    assert ((norms2(first) - one.square().sum((1, 2))).abs() <= 1e-12 * size).all()
    bound = 1e-12 * (one.norm(dim=(1, 2)) * two.norm(dim=(1, 2))) + 1e-300
    # The Gram matrices' rounding counts against the factors' norms, not the product's.
    factors_size = torch.stack([f.B.double().norm() * f.A.double().norm() * abs(f.scale) for f in factors])
    bound += 1e-14 * factors_size * factors_size.flip(0)
    assert ((inner(first, second) - (one * two).sum((1, 2))).abs() <= bound).all()


@given(modules())
@steady
def test_canonical_is_the_balanced_svd_of_every_dense_matrix(factors: list[LowRank]) -> None:
    stack, sigma = canonical(load(factors, CPU))
    wanted = stacked(factors, unit=False)
    assert stack.left.dtype == stack.right.dtype == torch.float32
    assert close(matrices(stack), wanted, 1e-6)
    values = torch.linalg.svdvals(wanted)
    largest = values[:, :1]
    common = min(values.shape[1], sigma.shape[1])
    assert ((sigma[:, :common] - values[:, :common]).abs() <= 1e-7 * largest).all()
    assert (sigma[:, common:] <= 1e-7 * largest).all()
    assert torch.allclose(stack.energies, wanted.square().sum((1, 2)), rtol=1e-9, atol=1e-300)
    for rows in (stack.left, stack.right):
        gram = stack.pad(rows).double()
        gram = gram @ gram.mT
        off = (gram - torch.diag_embed(sigma)).abs()
        assert (off <= 1e-6 * largest[:, :, None]).all()


@pytest.mark.parametrize("size", [1e-20, 1e-6, 1.0, 1e4])
def test_canonical_keeps_its_digits_at_every_strength(size: float) -> None:
    plain = related([4, 3], 20, 30)
    factors = [LowRank(f.B * size, f.A * size, f.scale) for f in plain]
    stack, sigma = canonical(load(factors, CPU))
    wanted = stacked(factors, unit=False)
    assert close(matrices(stack), wanted, 1e-6)
    assert torch.allclose(sigma[:, :3], torch.linalg.svdvals(wanted)[:, :3], rtol=1e-9, atol=0)


def test_a_zero_matrix_has_zero_rows_and_no_nan() -> None:
    zero = LowRank(torch.zeros(6, 2), torch.randn(2, 5, generator=torch.Generator().manual_seed(0)))
    cancelling = LowRank(
        torch.ones(6, 2), torch.tensor([[1.0], [-1.0]]).expand(2, 5)
    )  # columns that cancel exactly
    stack, sigma = canonical(load([zero, cancelling], CPU))
    assert not sigma[0].any() and not stack.left[:2].any() and not stack.right[:2].any()
    assert (sigma[1] < 1e-7).all() and bool(stack.left.isfinite().all())


@pytest.mark.parametrize("module", ["0.q_proj", "15.k_proj"])
def test_a_change_of_gauge_moves_canonical_rows_by_rounding(module: str) -> None:
    """B -> BG, A -> G^-1 A without any rounding of its own: integers of few bits and an integer G of condition 10^4."""
    plain, turned = [], []
    for i, factor in enumerate(zoo(module)):
        b = (factor.B.double() / factor.B.abs().max() * 60).round()
        a = (factor.A.double() / factor.A.abs().max() * 60).round()
        gauge, inverse = unimodular(len(a), seed=i, size=2)
        assert torch.equal(gauge @ inverse, torch.eye(len(a), dtype=torch.float64))
        plain.append(LowRank(b.float(), a.float(), 2.0))
        turned.append(LowRank((b @ gauge).float(), (inverse @ a).float(), 2.0))
        assert torch.equal(dense(plain[-1]), dense(turned[-1]))  # exact in float32
    condition = max(float(torch.linalg.cond(unimodular(8, seed=i, size=2)[0])) for i in range(12))
    assert condition > 1e4
    (one, sigma), (two, again) = canonical(load(plain, CPU)), canonical(load(turned, CPU))
    assert close(matrices(two), matrices(one), 1e-6)
    assert ((sigma - again).abs() <= 1e-11 * sigma[:, :1]).all()


@pytest.mark.parametrize("condition", [1e4, 1e6])
@pytest.mark.parametrize("shape", [(30, 40), (5, 40)])
def test_factors_that_cancel_are_untangled(condition: float, shape: tuple[int, int]) -> None:
    random = torch.Generator().manual_seed(3)
    out, in_ = shape
    rank = 6
    b = torch.randn(out, rank, generator=random, dtype=torch.float64)
    a = torch.randn(rank, in_, generator=random, dtype=torch.float64)
    q, _ = torch.linalg.qr(torch.randn(rank, rank, generator=random, dtype=torch.float64))
    p, _ = torch.linalg.qr(torch.randn(rank, rank, generator=random, dtype=torch.float64))
    spread = torch.logspace(0, torch.tensor(condition).log10().item(), rank, dtype=torch.float64)
    healthy = related([rank], out, in_)[0]
    bad = LowRank(b @ (q * spread) @ p, p.T @ (q / spread).T @ a)
    left = torch.cat([bad.B.T, healthy.B.double().T * healthy.scale])
    stack = Stack(left, torch.cat([bad.A, healthy.A.double()]), (rank, rank))
    wanted = torch.stack([b @ a, dense(healthy)])
    result, sigma = canonical(stack)
    assert close(matrices(result), wanted, 1e-6)
    assert close(sigma[:, : min(shape)][:, None], torch.linalg.svdvals(wanted)[:, :rank][:, None], 1e-7)
    changed = untangled(stack)
    assert torch.equal(changed.left[rank:], stack.left[rank:])  # a healthy adapter keeps its rows
    assert untangled(changed) is changed
    assert close(matrices(changed), wanted, 1e-9)


def test_work_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = related([3, 5, 1, 4, 2], 30, 20)
    first, other = load(factors, CPU), load(related([2, 2, 6, 1, 3], 30, 20, seed=1), CPU)
    whole = norms2(first), inner(first, other), canonical(first)[1]
    monkeypatch.setattr(lowrank, "CHUNK_ELEMENTS", 200)
    monkeypatch.setattr(frame, "CHUNK_ELEMENTS", 200)
    first = load(factors, CPU)
    assert len(list(first.chunks())) == 5
    for one, two in zip(whole, (norms2(first), inner(first, other), canonical(first)[1]), strict=True):
        assert torch.allclose(one, two, rtol=1e-12)
    assert torch.allclose(
        frame.Frame.of(first.left).work @ frame.Frame.of(first.left).work.T,
        first.left.double() @ first.left.double().T,
        atol=1e-12,
    )


def test_scaling_and_selecting_are_those_of_the_matrices() -> None:
    stack, _ = canonical(load(related([3, 2, 4], 30, 50), CPU))
    wanted = matrices(stack)
    factors = torch.tensor([2.0, 0.0, 0.3], dtype=torch.float64)
    for made, matrix in (
        (stack.scaled(factors), wanted * factors[:, None, None]),
        (stack.select([2, 0]), wanted[[2, 0]]),
        (stack.select([2, 0]).scaled(factors[:2]), wanted[[2, 0]] * factors[:2, None, None]),
    ):
        assert close(matrices(made), matrix, 1e-6)
        assert torch.allclose(made.energies, matrix.square().sum((1, 2)), rtol=1e-6)
        bare = Stack(made.left, made.right, made.ranks)  # knows nothing: computes energies and frames afresh
        assert torch.allclose(made.energies, bare.energies, rtol=1e-6)
        for inherited, fresh in zip(made.frames, bare.frames, strict=True):
            assert torch.allclose(inherited.work @ inherited.work.T, fresh.work @ fresh.work.T, atol=1e-6)
