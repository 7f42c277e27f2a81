"""What the user asks of a compression run, checked once."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from lorazip import quantized
from lorazip.codecs import CODECS, integers
from lorazip.compress.methods import NAMES
from lorazip.devices import find_device
from lorazip.errors import UsageError

Weights = Literal["unit", "strength", "trained"]
# Options that are recorded only where they are used.
LATER = ("bits", "core_bits", "basis_bits", "group", "ratio", "budget", "calibrate", "prompts")


@dataclass(frozen=True)
class Spec:
    """Options of `lorazip compress`, as in its --help.

    Attributes:
        method: one of svd, jd-full, jd-diag, eigenlora, mean, auto.
        rank: columns of the shared bases (svd: of each adapter); None to let the other options decide.
        energy: least share of ||D||^2 to keep, 0 < energy <= 1 (eigenlora: of held-out adapters).
        max_error: bound on every adapter's err_i; what the method cannot hold is stored as the adapter's own factors.
        clusters: number of bases a module, or None for the paper's rule.
        weights: "unit" gives every adapter the same say in every module, "trained" one by its energy ||D_i||^2,
            "strength" (auto) one by its norm ||D_i||, between the two: stronger adapters change the model more.
        dtype: float16, bfloat16 or float32, for all that is stored in no fewer bits.
        bits: 1 to 8 a number for own factors, bases and cores; between two of 1, 2, 3, 4, 6, 8 the first columns get
            more than the rest.
        core_bits, basis_bits: other bits for cores (1, 2, 3, 4, 6 or 8) and shared bases.
        group: numbers that have a scale in common; None for a column of a factor, or a whole core.
        device: "auto", "cpu" or "cuda" (or "cuda:1").
        ratio: auto: bytes of the originals over those of the bundle, at least.
        budget: auto: bytes of the bundle, at most.
        calibrate: auto: the base model, to weigh modules by what their errors cost it; with ratio or budget.
        prompts: calibrate: a file of texts to do so on; None for the built-in ones.
    """

    method: str = "auto"
    rank: int | None = None
    energy: float | None = None
    max_error: float | None = None
    clusters: int | None = None
    weights: Weights = "unit"
    dtype: str = "float16"
    device: str = "auto"
    bits: float | None = None
    core_bits: int | None = None
    basis_bits: float | None = None
    group: int | None = None
    ratio: float | None = None
    budget: int | None = None
    calibrate: str | None = None
    prompts: str | None = None

    def __post_init__(self) -> None:
        counts = (
            ("rank", self.rank),
            ("clusters", self.clusters),
            ("core-bits", self.core_bits),
            ("budget", self.budget),
        )
        for name, value in (*counts, ("group", self.group)):
            if value is not None and type(value) is not int:
                raise UsageError(f"{name} must be a whole number, not {value!r}")
        numbers = ("energy", self.energy), ("max-error", self.max_error), ("ratio", self.ratio)
        for name, number in (*numbers, ("bits", self.bits), ("basis-bits", self.basis_bits)):
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
        if self.weights not in ("unit", "strength", "trained"):
            raise UsageError(f"weights must be unit, strength or trained, not {self.weights!r}")
        if self.weights == "strength" and self.method != "auto":
            raise UsageError("weights strength is for --method auto (unit and trained are for all)")
        if self.dtype not in CODECS:
            raise UsageError(f"dtype must be one of {', '.join(CODECS)}, not {self.dtype!r}")
        self._check_bits()
        self._check_auto()
        self.torch_device()

    def _check_bits(self) -> None:
        for name, bits in (("bits", self.bits), ("basis-bits", self.basis_bits)):
            if bits is not None and not 1 <= bits <= max(quantized.BITS):
                raise UsageError(f"{name} must be from 1 to {max(quantized.BITS)}, not {bits}")
        if self.core_bits is not None and self.core_bits not in quantized.BITS:
            known = ", ".join(map(str, quantized.BITS))
            raise UsageError(f"core-bits must be one of {known}, not {self.core_bits}")
        if self.method == "svd" and (self.core_bits, self.basis_bits) != (None, None):
            raise UsageError("svd has no cores and no shared bases (give --bits)")
        if self.group is not None:
            if not 8 <= self.group < 10_000_000:
                raise UsageError(f"group must be at least 8 and below 10000000, not {self.group}")
            if (self.bits, self.core_bits, self.basis_bits) == (None, None, None):
                raise UsageError("group is the number of numbers with one scale: give it with bits")

    def _check_auto(self) -> None:
        aims = {"max-error": self.max_error, "ratio": self.ratio, "budget": self.budget}
        if self.method != "auto":
            if (self.ratio, self.budget) != (None, None):
                raise UsageError("ratio and budget are for --method auto")
            if (self.calibrate, self.prompts) != (None, None):
                raise UsageError("calibrate and prompts are for --method auto")
            return
        if self.calibrate is not None and (self.ratio, self.budget) == (None, None):
            raise UsageError("calibrate spends given bytes where they count: give --ratio or --budget")
        if self.prompts is not None and self.calibrate is None:
            raise UsageError("prompts are for --calibrate")
        if sum(aim is not None for aim in aims.values()) > 1:
            raise UsageError("auto takes one of --max-error, --ratio and --budget")
        for name in ("rank", "energy", "clusters", "bits", "core_bits", "basis_bits"):
            if getattr(self, name) is not None:
                raise UsageError(f"auto decides {name.replace('_', '-')} by itself (leave it out)")
        if self.ratio is not None and not 1 <= self.ratio < float("inf"):
            raise UsageError(f"ratio must be at least 1, not {self.ratio}")
        if self.budget is not None and self.budget < 1:
            raise UsageError(f"budget must be at least 1 byte, not {self.budget}")

    def alone(self) -> Spec:
        """What an adapter that the method cannot hold within the bound is stored by: its own factors."""
        return Spec(
            "svd",
            max_error=self.max_error,
            dtype=self.dtype,
            device=self.device,
            bits=self.bits,
            group=self.group if self.bits is not None else None,
        )

    def own_codec(self, columns: int) -> str:
        """The codec of an adapter's own factors of so many columns."""
        return self._codec(self.bits, columns)

    def basis_codec(self, columns: int) -> str:
        """The codec of shared bases of so many columns."""
        return self._codec(self.bits if self.basis_bits is None else self.basis_bits, columns)

    def core_codec(self) -> str:
        """The codec of cores: small, so all of one has one scale and the same bits."""
        bits = self.bits if self.core_bits is None else self.core_bits
        if bits is None:
            return self.dtype
        return integers(
            min(b for b in quantized.BITS if b >= bits), 1, "t" if self.group is None else f"g{self.group}"
        )

    def _codec(self, bits: float | None, columns: int) -> str:
        if bits is None:
            return self.dtype
        return integers(bits, columns, "" if self.group is None else f"g{self.group}")

    def torch_device(self) -> torch.device:
        """The device to compute on. Raises UsageError for one that is not there."""
        return find_device(self.device)

    def recorded(self) -> dict[str, object]:
        """What a bundle records: everything that its bytes depend on, not the device.

        Most are left out where they are not used: a lorazip that does not know them can then add to such bundles.
        """
        used = {k: v for k, v in asdict(self).items() if v is not None or k not in LATER}
        for key in ("calibrate", "prompts"):  # a path of this machine tells nobody anything
            if isinstance(value := used.get(key), str) and Path(value).exists():
                used[key] = _content(Path(value).resolve())
        return {key: value for key, value in used.items() if key != "device"}


def _content(path: Path) -> str:
    """NAME@DIGEST: another content is another job. Of a base model its config, and its files by name and size."""
    found = hashlib.sha256()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file())
        found.update(repr([(file.name, file.stat().st_size) for file in files]).encode())
        told = path / "config.json"
    else:
        told = path
    if told.is_file():
        found.update(told.read_bytes())
    return f"{path.name}@{found.hexdigest()[:12]}"
