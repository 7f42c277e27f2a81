"""How the numbers of one tensor are stored: a codec turns it into flat parts and back.

A part is one run of elements of one safetensors dtype. Plain codecs have a single part; a quantised one has its packed
codes and its scales. Adding a codec is one class and one line in `CODECS`; nothing else knows them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from lorazip.errors import BundleError, CodecError

# safetensors' names of the dtypes that parts may have, in the order of their streams in a file
DTYPES: dict[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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


CODECS: dict[str, Codec] = {"float32": Plain("F32"), "float16": Plain("F16"), "bfloat16": Plain("BF16")}


def codec(name: str) -> Codec:
    """The codec of that name, as written in a manifest. Raises BundleError for one this version does not know."""
    try:
        return CODECS[name]
    except KeyError:
        raise BundleError(f"codec {name!r} is not known to this version of lorazip (upgrade it)") from None
