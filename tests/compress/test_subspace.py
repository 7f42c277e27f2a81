"""EigenLoRAx's directions and held-out energies, by brute force."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from reference import compact, eigenlorax, related, stacked, zoo
from torch import Tensor

from lorazip.adapter import LowRank
from lorazip.compress import frame, subspace
from lorazip.compress.encode import load
from lorazip.compress.joint import Pair
from lorazip.compress.lowrank import Stack, canonical

CPU = torch.device("cpu")


def unit(factors: Sequence[LowRank]) -> Stack:
    stack, _ = canonical(load(factors, CPU))
    return stack.scaled(torch.where(stack.energies > 0, stack.energies.rsqrt(), 0))


def projected(matrices: Tensor, pair: Pair) -> Tensor:
    u, v = pair.left.double(), pair.right.double()
    return (matrices - u @ (u.T @ matrices @ v) @ v.T).square().sum((1, 2))


@pytest.mark.parametrize("module", ["3.q_proj", "15.k_proj"])
@pytest.mark.parametrize("directions", [4, 16, 40])
def test_directions_are_those_of_the_reference_on_real_adapters(module: str, directions: int) -> None:
    factors = zoo(module)
    matrices = stacked(factors)
    found = projected(matrices, subspace.fit(unit(factors), directions)).mean()
    assert float(found) == pytest.approx(float(eigenlorax(compact(factors), directions).mean()), rel=1e-3)


@pytest.mark.parametrize(("ranks", "out", "in_"), [((3, 5, 2), 40, 30), ((4,) * 12, 12, 60), ((3,), 20, 10)])
def test_full_rank_leaves_no_error(ranks: tuple[int, ...], out: int, in_: int) -> None:
    """The published code centres the factors and drops their mean, which leaves 0.14 to 0.28 here."""
    factors = related(ranks, out, in_)
    pair = subspace.fit(unit(factors), min(sum(ranks), max(out, in_)))
    assert float(projected(stacked(factors), pair).max()) < 1e-10


def test_few_adapters_are_filled_up_with_orthonormal_pseudo_components() -> None:
    factors = related((2, 3), 40, 8)
    pair = subspace.fit(unit(factors), 12)
    assert pair.left.shape == (40, 12) and pair.right.shape == (8, 8)
    for side in (pair.left, pair.right):
        gram = side.double().T @ side.double()
        assert torch.allclose(gram, torch.eye(len(gram), dtype=torch.float64), atol=1e-5)
    assert float(projected(stacked(factors), pair).max()) < 1e-10
    narrow = Pair(pair.left[:, :5], pair.right)  # the adapters' own span comes first
    assert float(projected(stacked(factors), narrow).max()) < 1e-10


def test_a_common_direction_is_kept() -> None:
    """Nothing is centred: what all adapters have in common is what the first direction is for."""
    random = torch.Generator().manual_seed(0)
    u, v = torch.randn(30, 1, generator=random), torch.randn(1, 20, generator=random)
    factors = []
    for _ in range(6):
        b = torch.cat([10 * u, torch.randn(30, 1, generator=random)], dim=1)
        factors.append(LowRank(b, torch.cat([v, 0.1 * torch.randn(1, 20, generator=random)]), 1.0))
    pair = subspace.fit(unit(factors), 1)
    assert float((pair.left.T @ u / u.norm()).abs()) > 0.999
    assert float(projected(stacked(factors), pair).max()) < 0.02


@pytest.mark.parametrize(("ranks", "out", "in_"), [((3, 1, 4), 20, 30), ((2, 2), 3, 12)])
def test_nested_energies_are_those_of_every_leading_part(ranks: tuple[int, ...], out: int, in_: int) -> None:
    stack, matrices = unit(related(ranks, out, in_)), stacked(related(ranks, out, in_))
    pair = subspace.fit(stack, 9)
    found = subspace.nested_energy(stack, pair)
    a, b = pair.left.shape[1], pair.right.shape[1]
    assert found.shape == (len(ranks), max(a, b))
    for k in range(1, max(a, b) + 1):
        part = Pair(pair.left[:, :k], pair.right[:, :k])
        assert torch.allclose(found[:, k - 1], 1 - projected(matrices, part), atol=1e-5)


@pytest.mark.parametrize("count", [2, 4, 11])
def test_held_out_energy_is_that_of_projections_on_the_others(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(frame, "CHUNK_ELEMENTS", 50)
    monkeypatch.setattr(subspace, "CHUNK_ELEMENTS", 50)
    factors = related((3, 2, 4, 1, 3, 2, 4, 1, 3, 2, 2)[:count], 20, 24, noise=0.2)
    matrices, most = stacked(factors), 12
    fitted, random, mean = subspace.held_out_energy(unit(factors), most)
    assert fitted.shape == random.shape == (most,)
    folds = [list(range(f, count, min(count, 5))) for f in range(min(count, 5))]
    for k in (1, 5, 12):
        total = 0.0
        for fold in folds:
            rest = [f for i, f in enumerate(factors) if i not in fold]
            spanned = min(k, sum(f.A.shape[0] for f in rest))
            vb, va = _directions(stacked(rest), spanned)
            total += float((vb.T @ matrices[fold] @ va).square().sum())
        # Beyond the span of the rest random directions add what they may.
        if k <= min(sum(f.A.shape[0] for i, f in enumerate(factors) if i not in fold) for fold in folds):
            assert float(fitted[k - 1]) == pytest.approx(total / count, abs=2e-3)
        else:
            assert float(fitted[k - 1]) >= total / count - 2e-3
    shares = []
    for fold in folds:
        centre = torch.stack([matrices[i] for i in range(count) if i not in fold]).mean(0)
        shares += [float((matrices[i] * centre).sum() ** 2 / centre.square().sum()) for i in fold]
    assert float(mean) == pytest.approx(sum(shares) / count, rel=1e-3)
    assert (fitted.diff() > -1e-9).all() and (random.diff() > -1e-9).all()
    if count == 11:
        assert float(fitted[5]) > 3 * float(random[5])  # six planted directions


def _directions(matrices: Tensor, count: int) -> tuple[Tensor, Tensor]:
    u, s, vt = torch.linalg.svd(matrices, full_matrices=False)
    left = (u * s.sqrt()[:, None]).permute(1, 0, 2).flatten(1)
    right = (vt.mT * s.sqrt()[:, None]).permute(1, 0, 2).flatten(1)
    return (
        torch.linalg.svd(left, full_matrices=False).U[:, :count],
        torch.linalg.svd(right, full_matrices=False).U[:, :count],
    )
