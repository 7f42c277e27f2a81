"""What is stored of an adapter is weaker than the adapter, and is made as strong again.

Codes of few bits decode to conditional means, and components are left out. So with e of the energy lost, D^ is a
projection of D: <D^, D> = ||D^||^2 = (1 - e) ||D||^2. That is the least error for the bytes, but the adapter acts as if
its alpha were smaller, and tasks notice that more than the error (docs/AUTO.md has what was measured). Stored is g D^,

    ||g D^ - D||^2 / ||D||^2 = e + (1 - e) (g - 1)^2

With g = 1 / (1 - e) its part along D is D itself, <g D^, D> = ||D||^2, and the error e / (1 - e).
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

GAIN: Final = 1.2  # at most: beyond, what is added along D costs more than the shrinking did
DIGITS: Final = 5  # of a gain, so that sums in another order give the same one


def gains(lost: Tensor) -> Tensor:
    """g of adapters that lose these shares of their energy (n,); 1 where nothing is stored."""
    found = (1 / (1 - lost).clamp_min(1 / GAIN)).round(decimals=DIGITS)
    return torch.where(lost < 1, found, 1)


def stretched(residual: Tensor, energy: Tensor, gain: Tensor) -> Tensor:
    """||g D^ - D||^2 where a projection leaves `residual` of `energy`."""
    return residual + (energy - residual) * (gain - 1).square()


def unstretched(residual: Tensor, energy: Tensor, gain: Tensor) -> Tensor:
    """What the projection leaves where g D^ leaves `residual` of `energy`: the inverse of `stretched`."""
    more = (gain - 1).square()
    return (residual - energy * more) / (1 - more)


def allowed(error: float) -> float:
    """The share of an adapter's energy that may be lost so that its error is at most this one."""
    most = (GAIN - 1) ** 2
    return max(error / (1 + error), (error - most) / (1 - most))
