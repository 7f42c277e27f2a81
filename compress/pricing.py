"""Rates, ranks and bases at a price: reverse water-filling with what real codes reach (METHODS.md §5).

A row of unit energy of which rho lies outside the shared basis keeps, at rate R and with loadings,

    d = rho LEFT(R) (1 - b / width) + (1 - rho) LOADINGS

(loadings are fitted after the row was rounded, so they take the noise inside the b shared directions off), and a
component of singular value s, whose left factor is fitted to the rounded right one, loses

    s^2 (1 - (1 - d_left) (1 - d_right))

LEFT hardly depends on the adapter, so bytes and errors of every choice are known without encoding anything. With
`worth` mu_i bytes for a unit of residual of adapter i, every component takes the rates of least mu s^2 (...) + bytes by
itself; a module takes the bases of least total. Every such choice is best among all of its own bytes (Everett 1963).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lorazip.codecs import codec
from lorazip.compress.curves import SIZES, Curve
from lorazip.compress.profile import (
    LEFT,
    LOADINGS,
    RATES,
    Bases,
    Basis,
    Profile,
    loading_bits,
    row_bytes,
)
from lorazip.trellis import DISTORTION

BASIS_RATES = (2, 3, 4)
LOADED = ((False, False), (False, True), (True, False), (True, True))


def leftover(curve: Curve, side: int, basis: Basis | None) -> Tensor:
    """d of every singular vector at every rate: (n, r, rates) with loadings, (1, 1, rates) without a basis."""
    rates = torch.tensor(LEFT)
    if basis is None:
        return rates[None, None]
    width = curve.shape[side]
    held = (1 - curve.outside[side][:, :, SIZES.index(basis.columns)]) * (1 - DISTORTION[basis.rate])
    loadings = torch.tensor([LOADINGS[loading_bits(rate)] for rate in RATES])
    own = rates * torch.where(rates < 1, 1 - basis.columns / width, 1)
    return (1 - held)[:, :, None] * own + held[:, :, None] * loadings


def side_bytes(curve: Curve, side: int, basis: Basis | None, dtype: str) -> Tensor:
    """Bytes of one row of a side at every rate, its loadings included: (rates,)."""
    return _side_bytes(curve.shape[side], side, basis, dtype)


@cache
def _side_bytes(width: int, side: int, basis: Basis | None, dtype: str) -> Tensor:
    own = [float(row_bytes(rate, width, dtype, unit=side == 1)) for rate in RATES]
    if basis is not None:
        own = [
            size + sum(p.nbytes for p in codec(f"int{loading_bits(rate)}").parts((1, basis.columns)))
            for size, rate in zip(own, RATES, strict=True)
        ]
    return torch.tensor(own)


def basis_bytes(curve: Curve, bases: Bases) -> int:
    """Bytes of a module's shared tensors."""
    sides = ((bases.left, curve.shape[0]), (bases.right, curve.shape[1]))
    return sum(part.nbytes for b, width in sides if b for part in codec(b.codec).parts((b.columns, width)))


@dataclass(frozen=True)
class Priced:
    """What a worth chooses in one module.

    Attributes:
        cost: (n,) worth times residual plus bytes.
        residual, nbytes: (n,).
        rates: (n, r) indices: left rate times len(RATES) plus right rate; -1: the component is left out.
        loaded: (n,) index into LOADED.
    """

    cost: Tensor
    residual: Tensor
    nbytes: Tensor
    rates: Tensor
    loaded: Tensor


def priced(
    curve: Curve, bases: Bases, worth: Tensor, dtype: str, flags: Sequence[int] | None = None
) -> Priced:
    """The best profile of every adapter that has the module.

    Args:
        worth: (adapters,) bytes for a unit of residual.
        flags: which of LOADED to try; None for all that the bases allow.
    """
    mu = worth[list(curve.having)][:, None].float()
    energy = curve.sigma.square().float()
    if flags is None:
        flags = [i for i, on in enumerate(LOADED) if (bases.left or not on[0]) and (bases.right or not on[1])]
    found = [_priced(curve, bases, mu, energy, dtype, LOADED[i]) for i in flags]
    costs = torch.stack([one.cost for one in found])
    best = costs.argmin(0)
    rows = torch.arange(len(best))

    def pick(name: str) -> Tensor:
        return torch.stack([getattr(one, name) for one in found])[best, rows]

    return Priced(pick("cost"), pick("residual"), pick("nbytes"), pick("rates"), torch.tensor(flags)[best])


def _priced(
    curve: Curve, bases: Bases, mu: Tensor, energy: Tensor, dtype: str, loaded: tuple[bool, bool]
) -> Priced:
    used = [basis if on else None for basis, on in zip((bases.left, bases.right), loaded, strict=True)]
    left, right = (leftover(curve, side, basis) for side, basis in enumerate(used))
    sizes = [side_bytes(curve, side, basis, dtype) for side, basis in enumerate(used)]
    nbytes = (sizes[0][:, None] + sizes[1]).flatten()  # (rates^2,)
    left, right = left[..., :, None], right[..., None, :]
    lost = (left + right - left * right).flatten(
        -2
    )  # (n or 1, r or 1, rates^2), as exact where little is lost
    value = mu * energy  # (n, r)
    least, at = (value[..., None] * lost + nbytes).min(2)
    kept = least < value
    share = torch.where(kept, lost.expand(*energy.shape, -1).gather(2, at[..., None])[..., 0], 1)
    residual = (energy * share).double().sum(1)
    taken = (nbytes[at] * kept).sum(1)
    at = torch.where(kept, at, -1)
    return Priced(torch.where(kept, least, value).sum(1), residual, taken.double(), at, at)


def profile(rates: Sequence[int], loaded: int) -> Profile:
    """The profile of one adapter's row of `Priced.rates`."""
    pairs = [divmod(at, len(RATES)) for at in rates if at >= 0]
    return (
        Profile(
            tuple(RATES[left] for left, _ in pairs), tuple(RATES[right] for _, right in pairs), LOADED[loaded]
        )
        if pairs
        else Profile()
    )


def best_bases(curve: Curve, worth: Tensor, dtype: str, start: Bases) -> Bases:
    """The bases of least total cost, one side after the other, from those of an earlier round."""
    best = start
    least = _total(curve, best, worth, dtype)
    for side in (1, 0):
        for option in _options(curve, side):
            tried = Bases(best.left, option) if side else Bases(option, best.right)
            cost = _total(curve, tried, worth, dtype)
            if cost < least:
                best, least = tried, cost
    return best


def _options(curve: Curve, side: int) -> list[Basis | None]:
    sizes = SIZES[: curve.outside[side].shape[2]]
    return [None, *(Basis(columns, rate) for columns in sizes for rate in BASIS_RATES)]


def _total(curve: Curve, bases: Bases, worth: Tensor, dtype: str) -> float:
    both = LOADED.index((bases.left is not None, bases.right is not None))
    flags = list(dict.fromkeys((0, both)))
    return float(priced(curve, bases, worth, dtype, flags).cost.double().sum()) + basis_bytes(curve, bases)
