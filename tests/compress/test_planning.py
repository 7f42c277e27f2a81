"""What an adapter's residual counts in the choice of auto."""

from __future__ import annotations

import pytest
import torch

from lorazip.compress import planning
from lorazip.compress.spec import Spec
from lorazip.errors import UsageError


@pytest.mark.parametrize(("weights", "power"), [("unit", 1.0), ("strength", 0.5), ("trained", 0.0)])
def test_weights_fall_with_the_energy_as_asked(weights: str, power: float) -> None:
    """w_i / w_j = (E_j / E_i)^power: all count alike, by their norm, by their energy; a zero adapter counts nothing."""
    energies = torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64)
    found = planning.weights_of(energies, Spec("auto", ratio=8.0, weights=weights, device="cpu"))  # type: ignore[arg-type]
    assert float(found[1] / found[0]) == pytest.approx(4.0**power)
    assert float(found[2]) == 0


def test_strength_is_for_auto() -> None:
    with pytest.raises(UsageError, match="strength"):
        Spec("svd", rank=2, weights="strength", device="cpu")
