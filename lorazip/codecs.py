"""How the numbers of one tensor are stored: a codec turns it into flat parts and back.

A part is one run of elements of one safetensors dtype. Plain codecs have a single part; a quantised one has its packed
codes and its scales. Plain codecs are listed in `CODECS`; the others have names that say their parameters (`codec`).
Nothing else knows them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import floor, prod
from typing import Protocol

import torch
from torch import Tensor

from lorazip import quantized
from lorazip import trellis as trellises
from lorazip.errors import BundleError, CodecError

# safetensors' names of the dtypes that parts may have, in the order of their streams in a file
DTYPES: dict[str, torch.dtype] = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8,
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A run of `count` elements of safetensors dtype `dtype`."""

    dtype: str
    count: int

    @property
    def nbytes(self) -> int:
        return self.count * DTYPES[self.dtype].itemsize


class Codec(Protocol):
    """Stores tensors of any shape; every method is a pure function."""

    def parts(self, shape: Sequence[int]) -> tuple[Part, ...]:
        """What a tensor of this shape takes."""

    def encode(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The parts' data, flat, on the CPU. Raises CodecError when the values do not fit."""

    def decode(self, parts: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """float32 tensor of this shape."""


@dataclass(frozen=True)
class Plain:
    """Elements as they are, rounded to one floating-point type."""

    dtype: str

    def parts(self, shape: Sequence[int]) -> tuple[Part, ...]:
        return (Part(self.dtype, prod(shape)),)

    def encode(self, tensor: Tensor) -> tuple[Tensor, ...]:
        rounded = tensor.to(DTYPES[self.dtype])
        if not bool(torch.isfinite(rounded).all()):
            raise CodecError(
                f"a value of {float(tensor.abs().max()):.3g} does not fit {self.dtype} "
                "(use --dtype bfloat16 or float32)"
            )
        return (rounded.flatten().cpu(),)

    def decode(self, parts: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        return parts[0].to(torch.float32).reshape(tuple(shape))


@dataclass(frozen=True)
class Integers:
    """Whole numbers of few bits (lorazip/quantized.py), packed, with a bfloat16 scale a group.

    A tensor is a list of rows (one of one dimension is one row). A group is `group` elements of a row, or what is left
    at its end; 0: a whole row; -1: the whole tensor.
    """

    bits: int
    group: int = 0

    def layout(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Rows, their width, and elements a scale."""
        rows, width = prod(shape[:-1]), shape[-1]
        if self.group == -1:
            rows, width = 1, rows * width
        return rows, width, self.group if self.group > 0 else max(width, 1)

    def parts(self, shape: Sequence[int]) -> tuple[Part, ...]:
        rows, width, group = self.layout(shape)
        scales = rows * -(-width // group)
        return Part("U8", quantized.packed_bytes(rows * width, self.bits)), Part("BF16", scales)

    def encode(self, tensor: Tensor) -> tuple[Tensor, ...]:
        rows, width, group = self.layout(tensor.shape)
        if not bool(torch.isfinite(tensor).all()):
            raise CodecError("a value is not finite")
        x = tensor.reshape(rows, width)
        scales = quantized.scales_of(x, self.bits, group)
        return self.store(quantized.levels(x, quantized.spread(scales, group, width), self.bits), [scales])

    def store(self, levels: Tensor, scales: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The parts of given odd levels (rows, width) and their scales, row by row."""
        codes = (levels + (2**self.bits - 1)) / 2
        used = scales[:1] if self.group == -1 else scales
        flat = torch.cat([s.flatten() for s in used]) if used else levels.new_zeros(0)
        return quantized.pack(codes, self.bits).cpu(), flat.to(torch.bfloat16).cpu()

    def decode(self, parts: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        rows, width, group = self.layout(shape)
        codes = quantized.unpack(parts[0], self.bits, rows * width).view(rows, width)
        scales = parts[1].float().view(rows, -(-width // group))
        odd = (2 * codes - (2**self.bits - 1)).float()
        values: Tensor = (odd * quantized.spread(scales, group, width)).reshape(tuple(shape))
        return values


@dataclass(frozen=True)
class Coded:
    """Rows by a trellis code (lorazip/trellis.py), with a bfloat16 scale a row, or without: rows of unit variance.

    Rate 0 stores nothing: rows of zeros.
    """

    rate: float
    scaled: bool = True

    def parts(self, shape: Sequence[int]) -> tuple[Part, ...]:
        rows, width = prod(shape[:-1]), shape[-1]
        if not self.rate:
            return Part("U8", 0), Part("BF16", 0)
        code = trellises.trellis(self.rate)
        nbytes = quantized.packed_bytes(rows * code.steps(width), code.k)
        return Part("U8", nbytes), Part("BF16", rows * self.scaled)

    def encode(self, tensor: Tensor) -> tuple[Tensor, ...]:
        rows = tensor.reshape(prod(tensor.shape[:-1]), tensor.shape[-1]).float()
        if not bool(torch.isfinite(rows).all()):
            raise CodecError("a value is not finite")
        if not self.rate:
            return self.store(rows[:, :0], [])
        codes, scales, _ = self.fitted(rows)
        return self.store(codes, [scales])

    def fitted(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (n, steps), scales (n,) as stored (1 without), and what they decode to (n, d)."""
        code = trellises.trellis(self.rate)
        scales = torch.linalg.vector_norm(rows.double(), dim=1).float() / max(rows.shape[1], 1) ** 0.5
        if not self.scaled:
            scales = torch.ones_like(scales)
        unit = rows / torch.where(scales > 0, scales, 1)[:, None]
        codes = code.encode(unit)
        decoded = code.decode(codes, rows.shape[1])
        if self.scaled:  # the least-squares scale of the path that was found
            best = (unit * decoded).sum(1) / decoded.square().sum(1).clamp_min(1e-30)
            scales = (scales * best).to(torch.bfloat16).float()
        return codes, scales, decoded * scales[:, None]

    def store(self, codes: Tensor, scales: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The parts of codes (n, steps) and scales, row by row."""
        flat = torch.cat([s.flatten() for s in scales]) if scales else codes.new_zeros(0)
        if not self.rate or not self.scaled:
            flat = flat[:0]
        kept = flat.to(torch.bfloat16)
        if not bool(torch.isfinite(kept).all()):
            raise CodecError("a scale does not fit BF16")
        k = trellises.RATES[self.rate][0] if self.rate else 1
        return quantized.pack(codes, k).cpu(), kept.cpu()

    def decode(self, parts: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        rows, width = prod(shape[:-1]), shape[-1]
        if not self.rate:
            return torch.zeros(tuple(shape), device=parts[0].device)
        code = trellises.trellis(self.rate)
        steps = code.steps(width)
        codes = quantized.unpack(parts[0], code.k, rows * steps).view(rows, steps)
        values = code.decode(codes, width)
        if self.scaled:
            values = values * parts[1].float()[:, None]
        return values.reshape(tuple(shape))


Single = Plain | Integers | Coded


@dataclass(frozen=True)
class Mixed:
    """The first `count` rows by one codec, the others by another: some columns of a factor get more bits."""

    first: Single
    count: int
    rest: Single | Mixed

    def split(self, shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of the two pieces."""
        rows = min(self.count, shape[0]) if len(shape) > 1 else 0
        return (rows, *shape[1:]), (shape[0] - rows, *shape[1:])

    def parts(self, shape: Sequence[int]) -> tuple[Part, ...]:
        if len(shape) == 1:
            return self.first.parts(shape)
        one, two = self.split(shape)
        return self.first.parts(one) + self.rest.parts(two)

    def encode(self, tensor: Tensor) -> tuple[Tensor, ...]:
        if tensor.ndim == 1:
            return self.first.encode(tensor)
        return self.first.encode(tensor[: self.count]) + self.rest.encode(tensor[self.count :])

    def decode(self, parts: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        if len(shape) == 1:
            return self.first.decode(parts, shape)
        one, two = self.split(shape)
        count = len(self.first.parts(one))
        return torch.cat([self.first.decode(parts[:count], one), self.rest.decode(parts[count:], two)])


CODECS: dict[str, Plain] = {"float32": Plain("F32"), "float16": Plain("F16"), "bfloat16": Plain("BF16")}
MAX_NAME = 128  # characters of a codec's name
_CODED = re.compile(r"tcq([0-9.]{1,4})(u?)")
_INTEGERS = re.compile(r"int([123468])(?:(t)|g([1-9][0-9]{0,6}))?")
_RATE_NAMES = {"0": 0.0} | {trellises.name(rate): rate for rate in trellises.RATES}
_MIXED = re.compile(r"([^*+]+)\*([1-9][0-9]{0,6})\+(.+)")


def codec(name: str) -> Single | Mixed:
    """The codec of that name, as written in a manifest. Raises BundleError for one this version does not know.

    float32, float16, bfloat16; int4 (a scale for every row), int4g64 (for 64 elements of a row), int4t (for the whole
    tensor); tcq1.5 (a trellis code, a scale for every row), tcq1.5u (without scales), tcq0 (zeros); int4*2+int1 (the
    first two rows by int4, the others by int1).
    """
    found = _known(name) if len(name) <= MAX_NAME else None
    if found is None:
        raise BundleError(f"codec {name[:MAX_NAME]!r} is not known to this version of lorazip (upgrade it)")
    return found


@lru_cache(maxsize=4096)
def _known(name: str) -> Single | Mixed | None:
    if name in CODECS:
        return CODECS[name]
    coded = _CODED.fullmatch(name)
    if coded and coded[1] in _RATE_NAMES and coded[0] != "tcq0u":
        return Coded(_RATE_NAMES[coded[1]], not coded[2])
    whole = _INTEGERS.fullmatch(name)
    if whole and whole[1] in map(str, quantized.BITS):
        return Integers(int(whole[1]), -1 if whole[2] else int(whole[3] or 0))
    mixed = _MIXED.fullmatch(name)
    if mixed is None:
        return None
    first, rest = _known(mixed[1]), _known(mixed[3])
    return Mixed(first, int(mixed[2]), rest) if isinstance(first, Single) and rest is not None else None


@lru_cache(maxsize=4096)
def unstored(name: str, rows: int) -> int:
    """How many of so many rows take no bytes: those by tcq0."""
    found, count = codec(name), 0
    while isinstance(found, Mixed):
        first = min(found.count, rows)
        count += first * _nothing(found.first)
        found, rows = found.rest, rows - first
    return count + rows * _nothing(found)


def _nothing(by: Single) -> bool:
    return isinstance(by, Coded) and not by.rate


def integers(bits: float, rows: int, scope: str = "") -> str:
    """The name of the codec of that many bits a number, for a tensor of so many rows.

    Between two of 1, 2, 3, 4, 6, 8 the first rows get the higher: 2.5 bits for 4 rows are int3*2+int2.

    Args:
        scope: of a scale: "" for a row, "g64", "t" for the tensor.
    """
    low = max(b for b in quantized.BITS if b <= bits)
    high = min(b for b in quantized.BITS if b >= bits)
    count = floor((bits - low) / (high - low) * rows + 0.5) if high > low else 0
    if count in (0, rows):
        return f"int{high if count else low}{scope}"
    return f"int{high}{scope}*{count}+int{low}{scope}"
