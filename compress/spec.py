"""What the user asks of a compression run, checked once."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

import torch

from lorazip.codecs import CODECS
from lorazip.compress.methods import NAMES
from lorazip.devices import find_device
from lorazip.errors import UsageError

Weights = Literal["unit", "trained"]


@dataclass(frozen=True)
class Spec:
    """Options of `lorazip compress`, as in its --help.

    Attributes:
        method: one of svd, jd-full, jd-diag, eigenlora, mean.
        rank: columns of the shared bases (svd: of each adapter); None to let the other options decide.
        energy: least share of ||D||^2 to keep, 0 < energy <= 1 (eigenlora: of held-out adapters).
        max_error: bound on every adapter's err_i; what the method cannot hold is stored as the adapter's own factors.
        clusters: number of bases a module, or None for the paper's rule.
        weights: "unit" gives every adapter the same say in every module, "trained" as its own norm has it.
        dtype: float16, bfloat16 or float32, for all that is stored.
        device: "auto", "cpu" or "cuda" (or "cuda:1").
    """

    method: str = "jd-full"
    rank: int | None = None
    energy: float | None = None
    max_error: float | None = None
    clusters: int | None = None
    weights: Weights = "unit"
    dtype: str = "float16"
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, value in (("rank", self.rank), ("clusters", self.clusters)):
            if value is not None and type(value) is not int:
                raise UsageError(f"{name} must be a whole number, not {value!r}")
        for name, number in (("energy", self.energy), ("max-error", self.max_error)):
            if number is not None and (isinstance(number, bool) or not isinstance(number, int | float)):
                raise UsageError(f"{name} must be a number, not {number!r}")
        if self.method not in NAMES:
            raise UsageError(f"method must be one of {', '.join(NAMES)}, not {self.method!r}")
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"rank must be at least 1, not {self.rank}")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError(f"energy must be above 0 and at most 1, not {self.energy}")
        if self.max_error is not None and not 0 <= self.max_error < 1:
            raise UsageError(f"max-error must be at least 0 and below 1, not {self.max_error}")
        if self.energy is not None and (self.rank is not None or self.max_error is not None):
            raise UsageError("energy decides the rank: give it without rank and max-error")
        if self.clusters is not None and self.clusters < 1:
            raise UsageError(f"clusters must be at least 1, not {self.clusters}")
        if self.clusters is not None and self.method == "svd":
            raise UsageError("svd shares nothing, so it has no clusters")
        if self.weights not in ("unit", "trained"):
            raise UsageError(f"weights must be unit or trained, not {self.weights!r}")
        if self.dtype not in CODECS:
            raise UsageError(f"dtype must be one of {', '.join(CODECS)}, not {self.dtype!r}")
        self.torch_device()

    def torch_device(self) -> torch.device:
        """The device to compute on. Raises UsageError for one that is not there."""
        return find_device(self.device)

    def recorded(self) -> dict[str, object]:
        """What a bundle records: everything that its bytes depend on, not the device."""
        return {key: value for key, value in asdict(self).items() if key != "device"}
