"""An adapter is stored as strong as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planned import spec
from reference import ZOO, steady

from lorazip.adapter import Adapter
from lorazip.bundle import BundleAdapter
from lorazip.compress import job, shrinkage


@steady
@given(st.integers(0, 10**6), st.integers(0, 12), st.floats(1, 1.3))
def test_what_a_stretched_projection_leaves(seed: int, rank: int, gain: float) -> None:
    """By an orthogonal projection of a vector, whatever it keeps."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randn(12, generator=generator, dtype=torch.float64)
    kept = torch.linalg.qr(torch.randn(12, rank, generator=generator, dtype=torch.float64)).Q
    stored = kept @ (kept.T @ whole)
    plain, energy, by = (
        (whole - stored).square().sum(),
        whole.square().sum(),
        torch.tensor(gain, dtype=torch.float64),
    )
    found = shrinkage.stretched(plain, energy, by)
    assert float(found) == pytest.approx(float((whole - by * stored).square().sum()), abs=1e-9)
    assert float(shrinkage.unstretched(found, energy, by)) == pytest.approx(float(plain), abs=1e-9)


@given(st.floats(0, 0.99))
def test_what_a_bound_allows_is_the_bound_once_it_is_stretched(bound: float) -> None:
    lost = torch.tensor([shrinkage.allowed(bound)], dtype=torch.float64)
    found = shrinkage.stretched(lost, torch.ones(1), shrinkage.gains(lost))
    assert float(found) == pytest.approx(bound, abs=3e-6)  # a gain has five digits


def test_gains_end() -> None:
    lost = torch.tensor([0, 0.04, 0.1, 0.5, 1.0], dtype=torch.float64)
    assert shrinkage.gains(lost).tolist() == [1, 1.04167, 1.11111, 1.2, 1]


@pytest.mark.parametrize("ratio", [4.0, 24.0, 64.0])
def test_real_adapters_are_as_strong_along_themselves(tmp_path: Path, ratio: float) -> None:
    """<D^, D> / ||D||^2 by the factors that the bundle decodes to: 1, or what the largest gain reaches."""
    outcome = job.run([ZOO], spec(ratio=ratio), tmp_path / "b")
    assert outcome.bundle is not None
    for adapter, error in zip(outcome.inputs.adapters, outcome.adapter_errors.tolist(), strict=True):
        lost = shrinkage.unstretched(torch.tensor(error), torch.ones(()), torch.tensor(shrinkage.GAIN))
        expected = min(1.0, shrinkage.GAIN * (1 - float(lost)))
        assert _along(adapter, outcome.bundle[adapter.name]) == pytest.approx(expected, abs=0.004)


def _along(adapter: Adapter, stored: BundleAdapter) -> float:
    inner = energy = 0.0
    for module in adapter.modules:
        one, two = adapter.low_rank(module), stored.low_rank(module)
        b, a = one.scale * one.B.double(), one.A.double()
        inner += float(((b.T @ two.B.double()) * (a @ two.A.double().T)).sum())
        energy += float(((b.T @ b) * (a @ a.T)).sum())
    return inner / energy
