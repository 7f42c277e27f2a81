"""How `--method auto` stores an adapter in one module: bits of every row of its factors, loadings on shared bases.

    D_i = sum_j u_j v_j^T        u_j = S y_j + x_j, v_j likewise

S are columns that a module's adapters share (one basis a side), y_j an adapter's loadings on them in whole numbers of
few bits, x_j its own row by a trellis code of any rate, 0 included. Without loadings an adapter has factors of its own;
with loadings and rate 0 on one side it shares that side; with both it shares and keeps a residual. Sides and rows are
free of each other, so that this one form holds independent, one-sided, joint storage and all between.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor

from lorazip import trellis
from lorazip.codecs import MAX_NAME, codec
from lorazip.terms import Core, Form, Layout, Own, Shared, Term

INT8 = 8.0
WHOLE = 16.0  # a floating-point type
RATES = (0.0, *trellis.RATES, INT8, WHOLE)  # bits a number of an own row
# What is left of the energy of a row at the rates of a trellis, and at 0
CODED = (1.0, *trellis.DISTORTION.values())
# How much more than of normal numbers is left of a basis's rounding error, by the basis's rate and that of a row which
# codes it again: both turn numbers alike, so that those beyond the code's reach stay so. Of rows of 576 and 2048
# numbers; a few rows make most of it, and the largest three are a quarter above the mean of many.
TWICE: dict[float, dict[float, float]] = {
    2: {3: 0.05, 4: 0.12, 5: 0.25},
    3: {2: 0.05, 2.5: 0.09, 3: 0.13, 4: 0.38, 5: 1.2},
    4: {1.5: 0.07, 2: 0.11, 2.5: 0.19, 3: 0.33, 4: 0.95, 5: 2.8},
}
# What whole numbers leave, in units of crest / (3 (2^bits - 1)^2): the scale of least error is not quite the largest's
WHOLE_NUMBERS = {4: 0.91, 6: 0.96, 8: 0.985}


@dataclass(frozen=True)
class Basis:
    """The columns of one side that a module's adapters share, and their bits a number."""

    columns: int
    rate: float

    @property
    def codec(self) -> str:
        return f"tcq{trellis.name(self.rate)}u"


@dataclass(frozen=True)
class Bases:
    """What a module shares: a basis a side, or none."""

    left: Basis | None = None
    right: Basis | None = None

    @property
    def layout(self) -> Layout:
        left = (Shared("left", self.left.columns, self.left.codec),) if self.left else ()
        return left + ((Shared("right", self.right.columns, self.right.codec),) if self.right else ())


@dataclass(frozen=True)
class Profile:
    """Rates of the rows of both sides, the strongest first, and whether a side has loadings.

    Attributes:
        left, right: bits a number, of the same length; empty: D = 0.
        loaded: loadings on the module's left, right basis.
        original: the adapter's own factors bit for bit, nothing else counts then.
    """

    left: tuple[float, ...] = ()
    right: tuple[float, ...] = ()
    loaded: tuple[bool, bool] = (False, False)
    original: bool = False

    @property
    def rank(self) -> int:
        return len(self.left)

    def form(self, bases: Bases, dtype: str) -> Form:
        """The terms in a module with these bases; not for the original."""
        if not self.rank:
            return ()
        places = iter(range(2))
        left, right = (next(places) if basis else None for basis in (bases.left, bases.right))
        return (
            Term(
                _side(self.left, left if self.loaded[0] else None, dtype, unit=False),
                Core("scalar"),
                _side(self.right, right if self.loaded[1] else None, dtype, unit=True),
            ),
        )

    @property
    def nameable(self) -> bool:
        """Whether the names of its codecs are short enough."""
        sides = (_side(rates, 0, "bfloat16", True) for rates in (self.left, self.right))
        return all(max(len(side.codec), len(side.loadings)) <= MAX_NAME for side in sides)


@lru_cache(maxsize=2**14)  # asked for by every adapter in every module, a few hundred are different
def _side(rates: tuple[float, ...], basis: int | None, dtype: str, unit: bool) -> Own:
    own = mixture(row_codec(rate, dtype, unit) for rate in rates)
    if basis is None:
        return Own(len(rates), own)
    return Own(len(rates), own, basis, mixture(f"int{loading_bits(rate)}" for rate in rates))


NOTHING = Profile()
ORIGINAL = Profile(original=True)


def row_codec(rate: float, dtype: str, unit: bool) -> str:
    """The codec of an own row; `unit`: without a scale, where the code has such a form."""
    if rate == WHOLE:
        return dtype
    if rate == INT8:
        return "int8"
    return f"tcq{trellis.name(rate)}{'u' if unit and rate else ''}"


def remainders(crest: Tensor, dtype: str) -> Tensor:
    """What is left of the energy of own rows at every rate: (..., rates).

    Args:
        crest: of these rows (...).
        dtype: the floating-point type, whose rounding leaves 0.045 eps^2 of normally distributed numbers.
    """
    coded = torch.tensor(CODED).expand(*crest.shape, -1)
    floating = torch.tensor(0.045 * torch.finfo(getattr(torch, dtype)).eps ** 2).expand(*crest.shape, 1)
    return torch.cat([coded, whole_numbers(crest, 8)[..., None].float(), floating], -1)


def crest(rows: Tensor) -> Tensor:
    """d max x^2 / ||x||^2 of rows (n, d), (n,): the square of the crest factor; 0 for a row of zeros."""
    most, size = (torch.linalg.vector_norm(rows, ord, dim=1) for ord in (torch.inf, 2))
    found: Tensor = (most / size.clamp_min(1e-30)).square() * rows.shape[1]
    return found


def whole_numbers(crest: Tensor, bits: int) -> Tensor:
    """What so many bits leave of the energy of rows of this crest.

    2^bits - 1 steps reach from the largest number to its negative, and an error even within a step is a twelfth of its
    square: crest / (3 (2^bits - 1)^2).
    """
    steps: int = 2**bits - 1
    return crest * (WHOLE_NUMBERS[bits] / (3 * steps**2))


def loading_bits(rate: float) -> int:
    """Bits of loadings beside an own row of that rate: their error is to be small beside the row's."""
    return 4 if rate <= 1 else 6 if rate <= 3 else 8


def mixture(names: Iterator[str]) -> str:
    """The codec of a tensor whose rows have these codecs."""
    runs = [(name, len(list(same))) for name, same in groupby(names)]
    return "+".join([*(f"{name}*{count}" for name, count in runs[:-1]), runs[-1][0]])


def runs(rates: tuple[float, ...]) -> Iterator[tuple[float, slice]]:
    """Equal rates in a row, and where they stand."""
    at = 0
    for rate, same in groupby(rates):
        count = len(list(same))
        yield rate, slice(at, at + count)
        at += count


def row_bytes(rate: float, width: int, dtype: str, unit: bool) -> int:
    """Bytes of one own row alone."""
    return sum(part.nbytes for part in codec(row_codec(rate, dtype, unit)).parts((1, width)))
