"""What is known before encoding, against dense singular value decompositions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import dense, related, stacked, steady, unimodular, zoo
from torch import Tensor

from lorazip.adapter import LowRank
from lorazip.compress.curves import LEAST, SIZES, Curve, curve, directions
from lorazip.compress.encode import prepare
from lorazip.compress.spec import Spec

SPEC = Spec(ratio=4.0, device="cpu")


def made(factors: Sequence[LowRank], having: Sequence[int] | None = None) -> Curve:
    module, _ = prepare("m", factors, SPEC)
    return curve(module, range(len(factors)) if having is None else having)


def left_out(factors: Sequence[LowRank], sizes: int) -> list[list[Tensor]]:
    """For both sides and every adapter (rank, sizes): the energy of its singular vectors outside of the leading ones.

    The directions are eigenvectors of the sum of D D^T (D^T D) over adapters of norm 1.
    """
    found = []
    for side in range(2):
        matrices = [d if side == 0 else d.T for d in stacked(factors)]
        leading = torch.linalg.eigh(torch.stack([d @ d.T for d in matrices]).sum(0)).eigenvectors.flip(1)
        rows = [torch.linalg.svd(d).U.T[: f.A.shape[0]] for d, f in zip(matrices, factors, strict=True)]
        bases = [leading[:, :size] for size in SIZES[:sizes]]
        found.append([torch.stack([1 - (r @ b).square().sum(1) for b in bases], 1) for r in rows])
    return found


@pytest.mark.parametrize("ranks", [(4,) * 9, (3, 5, 2, 4, 1, 4, 3, 5, 6, 5)], ids=["equal", "mixed"])
def test_outside_is_the_energy_outside_of_the_leading_directions(ranks: tuple[int, ...]) -> None:
    factors = related(ranks, 48, 40, noise=0.2)
    found = made(factors)
    assert found.shape == (48, 40) and found.ranks == ranks
    for side, expected in enumerate(left_out(factors, sizes=2)):
        outside = found.outside[side]
        assert outside.shape == (len(ranks), max(ranks), 2) and outside.dtype == torch.float32
        for mine, theirs in zip(outside, expected, strict=True):
            assert torch.allclose(mine[: len(theirs)].double(), theirs, atol=1e-4)


def test_outside_on_real_adapters() -> None:
    """Their rows span 96 of 192 and 576 dimensions; six of them share a start, so that much is in common."""
    factors = zoo("15.k_proj")
    found = made(factors)
    for side, expected in enumerate(left_out(factors, sizes=3)):
        assert found.outside[side].shape == (12, 8, 3)
        assert torch.allclose(found.outside[side].double(), torch.stack(expected), atol=1e-4)
    assert float(found.outside[1].min()) < 0.1 < float(found.outside[1].mean())


def test_more_directions_leave_less() -> None:
    for outside in made(related((4,) * 20, 80, 72, noise=0.5)).outside:
        assert outside.shape[2] == 3
        assert bool((outside.diff(dim=2) <= 1e-6).all())
        assert bool((outside >= 0).all()) and bool((outside <= 1).all())


@pytest.mark.parametrize(
    ("ranks", "out", "in_", "sizes"),
    [
        ((4,) * 3, 80, 80, (0, 0)),  # 12 rows: 3 directions
        ((4,) * 4, 80, 80, (1, 1)),
        ((8,) * 16, 80, 40, (3, 2)),  # a quarter of the dimensions: 20 and 10
        ((8,) * 40, 300, 20, (5, 1)),
        ((8,) * 80, 400, 280, (5, 5)),  # 160 rows and 70 dimensions, but 64 at most
        ((1,), 80, 80, (0, 0)),
    ],
)
def test_a_quarter_of_rows_and_dimensions_is_tried(
    ranks: tuple[int, ...], out: int, in_: int, sizes: tuple[int, int]
) -> None:
    found = made(related(ranks, out, in_))
    assert tuple(outside.shape[2] for outside in found.outside) == sizes


def test_directions_are_nested_and_orthonormal() -> None:
    module, _ = prepare("m", related((8,) * 16, 60, 50, noise=0.5), SPEC)
    pair = directions(module)
    assert (pair.left.shape, pair.right.shape) == ((60, 15), (50, 12))
    for side in (pair.left, pair.right):
        assert torch.allclose(side.T @ side, torch.eye(side.shape[1]), atol=1e-5)


def test_singular_values_and_bytes() -> None:
    factors = [
        *related((3, 5), 20, 30, scale=0.7),
        *related((2,), 20, 30, dtype=torch.bfloat16),
    ]
    found = made(factors, having=[2, 4, 7])
    assert found.having == (2, 4, 7) and found.ranks == (3, 5, 2)
    for mine, factor in zip(found.sigma, factors, strict=True):
        values = torch.linalg.svdvals(dense(factor))
        assert torch.allclose(mine, torch.cat([values[: factor.A.shape[0]], torch.zeros(5)])[:5], rtol=1e-6)
    energies = torch.stack([dense(f).square().sum() for f in factors])
    assert torch.allclose(found.energies, energies, rtol=1e-6)
    assert found.original_bytes.tolist() == [50 * 3 * 4, 50 * 5 * 4, 50 * 2 * 2]


@pytest.mark.parametrize("count", range(1, LEAST))
def test_fewer_than_three_share_nothing(count: int) -> None:
    found = made(related((8,) * count, 64, 64))
    assert [outside.shape for outside in found.outside] == [(count, 8, 0)] * 2


def test_zero_adapters_hold_nothing_and_change_nothing() -> None:
    factors = related((4,) * 8, 48, 40)
    zero = LowRank(torch.zeros(48, 4), torch.randn(4, 40, generator=torch.Generator().manual_seed(3)), 1.0)
    one, two = made(factors), made([*factors, zero, zero])
    assert torch.equal(two.sigma[8:], torch.zeros(2, 4, dtype=torch.float64))
    for alone, together in zip(one.outside, two.outside, strict=True):
        assert torch.allclose(alone, together[:8], atol=1e-4)
        assert bool((together[8:] == 1).all())
    for outside in made([zero] * 5).outside:
        assert outside.shape == (5, 4, 0)


@steady
@given(st.integers(0, 10_000))
def test_gauge_and_order_change_nothing_but_rounding(seed: int) -> None:
    factors = related((4, 3, 4, 4, 2, 4, 4), 48, 40, noise=0.4, seed=seed)
    found = made(factors)
    turned = []
    for i, f in enumerate(factors):
        gauge, inverse = unimodular(f.A.shape[0], seed + i, size=1)
        b, a = (f.B.double() @ gauge).float(), (inverse @ f.A.double()).float()
        turned.append(replace(f, B=b, A=a))
    order = torch.randperm(len(factors), generator=torch.Generator().manual_seed(seed)).tolist()
    other = made([turned[i] for i in order])
    ranks = [factors[i].A.shape[0] for i in order]
    assert torch.allclose(other.sigma, found.sigma[order], rtol=1e-4, atol=1e-5)
    for one, two in zip(found.outside, other.outside, strict=True):
        for mine, theirs, rank, values in zip(one[order], two, ranks, found.sigma[order], strict=True):
            # Vectors of nearly equal singular values turn into each other: what they hold together stays.
            weight = values[:rank, None].float() / float(values[0])
            assert torch.allclose((mine[:rank] * weight).sum(0), (theirs[:rank] * weight).sum(0), atol=2e-3)


def test_strength_does_not_weigh() -> None:
    """Every adapter has the same say in the directions, however strong it is."""
    factors = related((4,) * 8, 48, 40, noise=0.4)
    strong = [replace(f, scale=f.scale * 100.0 ** (i % 3)) for i, f in enumerate(factors)]
    for one, two in zip(made(factors).outside, made(strong).outside, strict=True):
        assert torch.allclose(one, two, atol=1e-4)
