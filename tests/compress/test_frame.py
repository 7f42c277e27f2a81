"""The reduced space of one side: exact where rows are fewer than dimensions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorazip.compress import frame
from lorazip.compress.frame import Frame, orthonormal


def rows(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_a_frame_keeps_lengths_and_angles() -> None:
    given = rows(12, 40)
    made = Frame.of(given)
    assert made.work.shape == (12, 12) and made.work.dtype == torch.float64
    wanted = given.double() @ given.double().T
    assert torch.allclose(made.work @ made.work.T, wanted, rtol=1e-12, atol=1e-12)


def test_lifting_is_an_isometry_onto_the_span() -> None:
    given = rows(12, 40)
    made = Frame.of(given)
    x = orthonormal(rows(12, 5, seed=1).double())
    lifted = made.lift(x)
    assert lifted.shape == (40, 5)
    assert torch.allclose(lifted.T @ lifted, torch.eye(5), atol=1e-5)
    assert torch.allclose(made.lower(lifted), x, atol=1e-6)
    assert torch.allclose(given @ lifted, (made.work @ x).float(), atol=1e-5)


def test_lowering_projects_on_the_span() -> None:
    given = rows(12, 40)
    made = Frame.of(given)
    x = rows(40, 3, seed=2)
    basis = orthonormal(given.double().T)
    assert torch.allclose(made.lift(made.lower(x)).double(), basis @ (basis.T @ x.double()), atol=1e-5)


def test_many_rows_are_left_alone() -> None:
    given = rows(40, 40)
    made = Frame.of(given)
    x = rows(40, 3, seed=1)
    assert made.triangle is None and torch.equal(made.work, given.double())
    assert torch.equal(made.lift(made.lower(x)), x)


def test_large_frames_run_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame, "PRECISE", 100)
    reduced, whole = Frame.of(rows(12, 40)), Frame.of(rows(40, 40))
    assert reduced.work.dtype == whole.work.dtype == reduced.lower(rows(40, 2)).dtype == torch.float32
    assert reduced.triangle is not None and reduced.triangle.dtype == torch.float64


@pytest.mark.parametrize("sizes", [(1e-20, 1.0), (1e-10, 1e4)])
def test_adapters_of_any_strength_share_a_frame(sizes: tuple[float, float]) -> None:
    """The ridge is relative to every row: a weak adapter keeps its digits beside a strong one."""
    given = rows(10, 40)
    given[:5] *= sizes[0]
    given[5:] *= sizes[1]
    made = Frame.of(given)
    weak = made.work[:5] @ made.work[:5].T
    wanted = given[:5].double() @ given[:5].double().T
    assert (weak - wanted).norm() <= 1e-10 * wanted.norm()
    x = orthonormal(made.lower(given[:5].T / sizes[0]))
    found = (given[:5] / sizes[0]).double() @ made.lift(x).double()
    assert torch.allclose(found @ found.T, wanted / sizes[0] ** 2, rtol=1e-4, atol=1e-4)


def test_copies_and_zero_rows_do_not_fail() -> None:
    given = rows(4, 40)
    given = torch.cat([given, given, torch.zeros(3, 40), 2 * given[:1]])
    made = Frame.of(given)
    wanted = given.double() @ given.double().T
    assert torch.allclose(made.work @ made.work.T, wanted, atol=1e-12)
    assert bool(made.lift(torch.eye(len(given), dtype=torch.float64)).isfinite().all())
    zero = Frame.of(torch.zeros(3, 40))
    assert not zero.work.any() and not zero.lift(torch.eye(3, dtype=torch.float64)).any()


def test_scaling_rows_keeps_the_basis() -> None:
    given, factors = rows(6, 40), torch.tensor([[1.0], [0.5], [3.0], [0.0], [1.0], [2.0]])
    made = Frame.of(given).scaled(factors)
    scaled = (given * factors).double()
    assert torch.allclose(made.work @ made.work.T, scaled @ scaled.T, atol=1e-12)
    x = rows(40, 2, seed=3)
    assert torch.equal(made.lower(x), Frame.of(given).lower(x))


def test_a_nearly_singular_gram_matrix_gets_a_larger_ridge() -> None:
    """Thousands of nearly equal rows: the rounding of their Gram matrix exceeds the first ridge."""
    base = rows(1, 2000)
    given = base + 1e-9 * rows(400, 2000, seed=1)
    made = Frame.of(given)
    wanted = given.double() @ given.double().T
    assert (made.work @ made.work.T - wanted).norm() <= 1e-10 * wanted.norm()
