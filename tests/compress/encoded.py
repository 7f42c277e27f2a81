"""What the tests of encoding share: options of a method, and errors of a module's code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from reference import reconstructed
from torch import Tensor

from lorazip.adapter import LowRank
from lorazip.compress.encode import ModuleCode
from lorazip.compress.spec import Spec

JOINT = ["jd-full", "jd-diag", "eigenlora", "mean"]
METHODS = ["svd", *JOINT]
DTYPES = ["float32", "float16", "bfloat16"]
MIXED = (8, 3, 8, 1, 5, 8, 2, 8, 4, 8)


def spec(method: str, **options: Any) -> Spec:
    return Spec(method, **{"clusters": None if method == "svd" else 1, **options})


def measured(code: ModuleCode) -> Tensor:
    """err_i of every adapter as the encoder says."""
    return torch.where(code.energies > 0, code.residuals / code.energies.clamp_min(1e-300), code.residuals)


def restored(code: ModuleCode, factors: Sequence[LowRank]) -> Tensor:
    return reconstructed(code, factors[0].B.shape[0], factors[0].A.shape[1])


def distance(one: Tensor, two: Tensor) -> float:
    """The largest ||D^ - D^'|| / ||D^'||."""
    sizes = two.flatten(1).norm(dim=1)
    return float(((one - two).flatten(1).norm(dim=1) / torch.where(sizes > 0, sizes, 1)).max())
