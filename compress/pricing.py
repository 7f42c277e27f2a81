"""Rates, ranks and bases at a price: reverse water-filling with what real codes reach (METHODS.md §5).

A row of unit energy of which rho lies outside the shared basis keeps, at rate R and with loadings,

    d = rho LEFT(R) (1 - b / width) + (1 - rho) LOADINGS

(loadings are fitted after the row was rounded, so they take the noise inside the b shared directions off), and a
component of singular value s, whose left factor is fitted to the rounded right one, loses

    s^2 (1 - (1 - d_left) (1 - d_right))

LEFT hardly depends on the row, and that of whole numbers (8 bits, loadings) on its largest number alone. So bytes and
errors of every choice are known without encoding anything. With `worth` mu_i bytes for a unit of residual of adapter i,
every component takes the rates of least mu s^2 (...) + bytes by itself; a module takes the bases of least total. Every
such choice is best among all of its own bytes (Everett 1963).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache

import torch
from torch import Tensor

from lorazip.codecs import codec
from lorazip.compress.curves import SIZES, Curve
from lorazip.compress.profile import (
    RATES,
    TWICE,
    Bases,
    Basis,
    Profile,
    loading_bits,
    remainders,
    row_bytes,
    whole_numbers,
)
from lorazip.trellis import DISTORTION

BASIS_RATES = (2, 3, 4)
PRICES = 2**21  # of a bunch at a time: modules, adapters, rows and pairs of rates
# Of the cost, what a basis must save: the little that is left of rows near a basis is coded worse than priced.
MARGIN = 0.005
LOADED = ((False, False), (False, True), (True, False), (True, True))


@dataclass(frozen=True)
class Bunch:
    """Modules that are alike, so that they are priced together: of one shape, as many adapters, as many rows.

    Attributes:
        places: of all curves, which they are.
        having: (m, n) the adapters that have them.
        energy: (m, n, r) float32, squares of the singular values.
        outside: `Curve.outside` of both sides, (m, n, r, sizes).
        crest, loaded: likewise, (m, n, r, 1 + sizes) and (m, n, r, sizes).
    """

    places: tuple[int, ...]
    curves: tuple[Curve, ...]
    having: Tensor
    energy: Tensor
    outside: tuple[Tensor, Tensor]
    crest: tuple[Tensor, Tensor]
    loaded: tuple[Tensor, Tensor]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.curves[0].shape

    def of(self, each: Sequence[Bases]) -> list[Bases]:
        """Those of these modules, out of one for every curve."""
        return [each[place] for place in self.places]


def bunches(curves: Sequence[Curve]) -> list[Bunch]:
    """All modules, those that are alike together."""
    alike: dict[tuple[object, ...], list[int]] = {}
    for place, c in enumerate(curves):
        sizes = [outside.shape[2] for outside in c.outside]
        alike.setdefault((c.shape, c.sigma.shape, *sizes), []).append(place)
    found = []
    for places in alike.values():
        each = max(1, PRICES // max(1, curves[places[0]].sigma.numel() * len(RATES) ** 2))
        for at in range(0, len(places), each):
            some = [curves[place] for place in places[at : at + each]]
            found.append(
                Bunch(
                    tuple(places[at : at + each]),
                    tuple(some),
                    torch.tensor([c.having for c in some]),
                    torch.stack([c.sigma.square().float() for c in some]),
                    _stacked([c.outside for c in some]),
                    _stacked([c.crest for c in some]),
                    _stacked([c.loaded for c in some]),
                )
            )
    return found


def _stacked(sides: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    left, right = zip(*sides, strict=True)
    return torch.stack(left), torch.stack(right)


def leftover(
    bunch: Bunch, side: int, used: Sequence[Basis | None], dtype: str, *, usual: bool = False
) -> Tensor:
    """d of every singular vector at every rate: (m, n, r, rates).

    Args:
        used: of every module, the basis on which there are loadings.
        usual: rows of a module alike but for what they have on its basis: (m, 1, 1, rates) where no module has one.
    """
    width = bunch.shape[side]
    there = bunch.energy > 0
    place = torch.tensor([SIZES.index(b.columns) + 1 if b else 0 for b in used]).view(-1, 1, 1, 1)
    crest = bunch.crest[side].gather(3, place.expand(*there.shape, 1))[..., 0]
    ranks = there.sum(2)[..., None, None].float()
    if usual:
        crest = ((crest * there).sum((1, 2)) / there.sum((1, 2)).clamp_min(1))[:, None, None]
        ranks = ranks.mean(1, keepdim=True)
    coded = remainders(crest, dtype)
    if not usual:
        coded[..., -1] = (coded[..., -1] + _underflow(bunch, width, dtype)).clamp_max(1)
    # Left rows are fitted to the right ones as stored, and make good what of these errors they can reach.
    good = ranks / width if side == 1 else torch.zeros(())
    if not any(used):
        return torch.where(coded < 1, coded * (1 - good), 1)
    noise = torch.tensor([DISTORTION[b.rate] if b else 1.0 for b in used]).view(-1, 1, 1)
    columns = torch.tensor([b.columns if b else 0 for b in used]).view(-1, 1, 1, 1)
    twice = [[TWICE[b.rate].get(rate, 0.0) if b else 0.0 for rate in RATES] for b in used]
    known = (place - 1).clamp_min(0).expand(*there.shape, 1)
    inside = 1 - bunch.outside[side].gather(3, known)[..., 0]
    held = inside * (1 - noise)
    again = inside * noise / (1 - held).clamp_min(1e-30)  # of what is coded, the share that a basis left
    own = torch.where(coded < 1, coded * (1 - good - columns / width), 1)
    own = own * (1 + torch.tensor(twice)[:, None, None] * again.square()[..., None])
    loaded = bunch.loaded[side].gather(3, known)[..., 0]
    if side == 1:
        reached = (held * there).sum(2, keepdim=True) / columns[..., 0].clamp_min(1)
        loaded = loaded * (1 - reached.clamp_max(1))
    loadings = torch.stack([whole_numbers(loaded, loading_bits(rate)) for rate in RATES], -1)
    return (1 - held)[..., None] * own.clamp_max(1) + held[..., None] * loadings


def _underflow(bunch: Bunch, width: int, dtype: str) -> Tensor:
    """What a floating-point type leaves of rows of very small numbers, whose least step is absolute: (m, n, r).

    The factors are balanced, so that a row's energy is its singular value.
    """
    info = torch.finfo(getattr(torch, dtype))
    weight = torch.tensor([c.weight for c in bunch.curves])[:, None, None]
    size = (bunch.energy / weight).sqrt().clamp_min(1e-30)
    return width * (info.smallest_normal * info.eps) ** 2 / 12 / size


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
    """What a worth chooses in the modules of a bunch.

    Attributes:
        cost: (m, n) worth times residual plus bytes.
        residual, nbytes: (m, n).
        rates: (m, n, r) indices: left rate times len(RATES) plus right rate; -1: the component is left out.
        loaded: (m, n) index into LOADED.
    """

    cost: Tensor
    residual: Tensor
    nbytes: Tensor
    rates: Tensor
    loaded: Tensor


def priced(bunch: Bunch, bases: Sequence[Bases], worth: Tensor, dtype: str, *, usual: bool = False) -> Priced:
    """The best profile of every adapter in every module.

    Args:
        bases: of each module.
        worth: (adapters,) bytes for a unit of residual.
        usual: try no loadings and all that the bases allow; not one side alone. Enough to find a worth or bases.
    """
    mu = worth[bunch.having][..., None].float()
    most = [LOADED.index((b.left is not None, b.right is not None)) for b in bases]
    found = []
    flags = [0] if usual else range(len(LOADED))
    for tried in [*([flag] * len(most) for flag in flags), *([most] if usual and any(most) else [])]:
        possible = torch.tensor([_possible(b, i) for b, i in zip(bases, tried, strict=True)])
        if bool(possible.any()):
            one = _priced(bunch, bases, mu, dtype, tried, usual)
            found.append(replace(one, cost=torch.where(possible[:, None], one.cost, torch.inf)))
    best = torch.stack([one.cost for one in found]).argmin(0)[None]

    def pick(name: str) -> Tensor:
        each = torch.stack([getattr(one, name) for one in found])
        at = best[..., None].expand(-1, -1, -1, each.shape[3]) if each.dim() == 4 else best
        return each.gather(0, at)[0]

    return Priced(*(pick(field.name) for field in fields(Priced)))


def _possible(bases: Bases, flag: int) -> bool:
    left, right = LOADED[flag]
    return (bases.left is not None or not left) and (bases.right is not None or not right)


def _priced(
    bunch: Bunch, bases: Sequence[Bases], mu: Tensor, dtype: str, flags: Sequence[int], usual: bool
) -> Priced:
    used = [
        [
            (b.left, b.right)[side] if LOADED[flag][side] else None
            for b, flag in zip(bases, flags, strict=True)
        ]
        for side in (0, 1)
    ]
    first, second = (leftover(bunch, side, each, dtype, usual=usual) for side, each in enumerate(used))
    sizes = [
        torch.stack([_side_bytes(bunch.shape[side], side, basis, dtype) for basis in each])
        for side, each in enumerate(used)
    ]
    nbytes = (sizes[0][:, :, None] + sizes[1][:, None, :]).flatten(1)  # (m, rates^2)
    first, second = first[..., :, None], second[..., None, :]
    # (m, n, r, rates^2), or ones for n and r; as exact where little is lost as where much is
    lost = (first + second - first * second).flatten(-2)
    value = mu * bunch.energy  # (m, n, r)
    least, at = torch.addcmul(nbytes[:, None, None], value[..., None], lost).min(3)
    kept = least < value
    share = lost.expand(*value.shape, -1).gather(3, at[..., None])[..., 0]
    residual = (bunch.energy * torch.where(kept, share, 1)).double().sum(2)
    taken = (nbytes.gather(1, at.flatten(1)).view_as(at) * kept).sum(2)
    return Priced(
        torch.where(kept, least, value).sum(2),
        residual,
        taken.double(),
        torch.where(kept, at, -1),
        torch.tensor(flags)[:, None].expand(-1, value.shape[1]),
    )


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


def best_bases(bunch: Bunch, worth: Tensor, dtype: str, start: Sequence[Bases]) -> list[Bases]:
    """The bases of least total cost of each module, one side after the other, from those of an earlier round."""
    best = list(start)
    least = _total(bunch, best, worth, dtype)
    for side in (1, 0):
        for option in _options(bunch, side):
            tried = [Bases(b.left, option) if side else Bases(option, b.right) for b in best]
            cost = _total(bunch, tried, worth, dtype)
            better = cost < least
            best = [new if is_ else old for new, old, is_ in zip(tried, best, better.tolist(), strict=True)]
            least = torch.where(better, cost, least)
    return best


def _options(bunch: Bunch, side: int) -> list[Basis | None]:
    sizes = SIZES[: bunch.outside[side].shape[3]]
    return [None, *(Basis(columns, rate) for columns in sizes for rate in BASIS_RATES)]


def _total(bunch: Bunch, bases: Sequence[Bases], worth: Tensor, dtype: str) -> Tensor:
    """(m,) the cost of modules with these bases, a side without one at a discount."""
    own = priced(bunch, bases, worth, dtype, usual=True).cost.double().sum(1)
    shared = [float(basis_bytes(bunch.curves[0], b)) for b in bases]
    alone = [(1 - MARGIN) ** [b.left, b.right].count(None) for b in bases]
    return (own + own.new_tensor(shared)) * own.new_tensor(alone)
