"""Whole numbers of few bits with a scale a group: rounding, and packing into bytes without gaps.

    x ~ s q        q odd, |q| < 2^bits: -1, 1 for 1 bit; -3, -1, 1, 3 for 2 bits

Odd levels are symmetric and lose none to a zero, which at 1 to 3 bits is worth more than it costs
(docs/QUANTIZATION.md). The scale is the one of least squared error, kept as bfloat16, which holds any strength; the
levels are chosen after it was rounded. s q is exact in float32, so that every device decodes the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = (1, 2, 3, 4, 6, 8)
# The best s / rms for normally distributed numbers; the search begins below it (heavy tails need more).
_NORMAL = {1: 0.7979, 2: 0.4978, 3: 0.2930, 4: 0.1676, 6: 0.0521, 8: 0.0154}
_STARTS = 10  # scales tried
_NEAR = (0.9, 1.0, 1.1)  # tried around a scale that is known to be good
_STEPS = 2  # of Lloyd's iteration from the best of them


def levels(x: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The odd numbers nearest to x / scales, at most 2^bits - 1, in the type of x; scales broadcast, 0 counts as 1."""
    most = 2**bits - 1
    steps = x / torch.where(scales > 0, scales, 1)
    return (steps / 2).floor_().mul_(2).add_(1).clamp_(-most, most)


def best_scales(x: Tensor, bits: int, near: Tensor | None = None) -> Tensor:
    """The scale of least squared error of each group.

    Lloyd's iteration (levels for a scale, then s = <x, q> / <q, q>) from the best of several scales.

    Args:
        x: (..., m) groups in the last dimension.
        near: (...) scales to begin with, if good ones are known.

    Returns:
        (...) float32 numbers of bfloat16, 0 for groups of zeros.
    """
    top = x.abs().amax(-1, keepdim=True)
    y = (x / torch.where(top > 0, top, 1)).float()  # squares of very small numbers would vanish
    if bits == 1:
        found = y.abs().mean(-1, keepdim=True)
    else:
        found = _search(y, bits, None if near is None else (near[..., None] / top.clamp_min(1e-38)).float())
    kept: Tensor = (found * top).to(torch.bfloat16).float()[..., 0]
    return kept


def _search(y: Tensor, bits: int, near: Tensor | None) -> Tensor:
    if near is None:
        most = 1 / (2**bits - 1)  # the largest number on the outermost level
        least = (0.7 * _NORMAL[bits] * y.square().mean(-1, keepdim=True).sqrt()).clamp(1e-6, most)
        starts = [least * (most / least) ** (i / (_STARTS - 1)) for i in range(_STARTS)]
    else:
        starts = [(near * factor).clamp_min(1e-6) for factor in _NEAR]
    best: Tensor = starts[0]
    gain = torch.zeros_like(best)
    for start in starts:
        refined, explained = _refined(y, start, bits)
        best = torch.where(explained > gain, refined, best)
        gain = torch.maximum(gain, explained)
    for _ in range(_STEPS):
        best, _ = _refined(y, best, bits)
    return best


def _refined(y: Tensor, scales: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """<y, q> / <q, q> for the levels q at these scales, and how much of ||y||^2 that explains."""
    q = levels(y, scales, bits)
    along, size = (q * y).sum(-1, keepdim=True), q.square().sum(-1, keepdim=True)
    return along / size, along.square() / size


def groups(x: Tensor, group: int) -> list[Tensor]:
    """Rows (..., d) cut into groups: (..., d // group, group), and (..., 1, rest) where something is left."""
    whole = x.shape[-1] // group * group
    full = x[..., :whole].reshape(*x.shape[:-1], whole // group, group)
    return ([full] if whole else []) + ([x[..., None, whole:]] if whole < x.shape[-1] else [])


def scales_of(x: Tensor, bits: int, group: int, near: Tensor | None = None) -> Tensor:
    """The best scales of rows (..., d), a scale for every `group` elements of a row: (..., ceil(d / group))."""
    found, at = [], 0
    for piece in groups(x, group):
        count = piece.shape[-2]
        found.append(best_scales(piece, bits, None if near is None else near[..., at : at + count]))
        at += count
    return torch.cat(found, -1) if found else x.new_zeros(*x.shape[:-1], 0)


def spread(scales: Tensor, group: int, width: int) -> Tensor:
    """The scale of every element of rows of that width: (..., groups) -> (..., width)."""
    if scales.shape[-1] == 1:
        return scales.expand(*scales.shape[:-1], width)
    return scales.repeat_interleave(group, -1)[..., :width]


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes 0 .. 2^bits - 1 (count,) -> bytes: code i in the bits from i * bits on, the lowest bit of a byte first.

    Eight codes are `bits` bytes, put together in a 64-bit word; the last bits of the last byte are zero.
    """
    count = codes.numel()
    eights = torch.nn.functional.pad(codes.flatten().long(), (0, -count % 8)).view(-1, 8)
    words = (eights << (torch.arange(8, device=codes.device) * bits)).sum(1)
    octets = words[:, None] >> (torch.arange(bits, device=codes.device) * 8)
    return (octets & 255).to(torch.uint8).flatten()[: packed_bytes(count, bits)]


def unpack(octets: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: (count,) int64."""
    padded = torch.nn.functional.pad(octets.long(), (0, -len(octets) % bits)).view(-1, bits)
    words = (padded << (torch.arange(bits, device=octets.device) * 8)).sum(1)
    codes = words[:, None] >> (torch.arange(8, device=octets.device) * bits)
    found: Tensor = (codes & (2**bits - 1)).flatten()[:count]
    return found


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of so many packed codes."""
    return -(-count * bits // 8)
