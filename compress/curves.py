"""What is known of a module before anything is encoded: singular values, and how much of them its adapters share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorazip.compress import joint, profile
from lorazip.compress.allocate import Module
from lorazip.compress.frame import CHUNK_ELEMENTS
from lorazip.compress.joint import Pair

SIZES = (4, 8, 16, 32, 64)  # columns of a basis that are tried
LEAST = 3  # adapters from which on sharing can pay


@dataclass(frozen=True)
class Curve:
    """One module.

    Attributes:
        having: the adapters that have it.
        shape: (out, in).
        sigma: (n, r_max) singular values of those, float64.
        ranks: rank of each.
        original_bytes: (n,) of the original factors.
        outside: for the left and the right side, what of each singular vector's unit energy lies outside of the first
            SIZES[s] shared directions: (n, r_max, sizes) float32; fewer sizes where the module has fewer directions.
        directions: these, on the CPU.
        crest: for both sides, `profile.crest` of a row, and of what of it lies outside of the first SIZES[s] shared
            directions: (n, r_max, 1 + sizes) float32.
        loaded: for both sides, that of its loadings on these, times 1 - 1 / SIZES[s], for the largest loading is
            rounded to itself: (n, r_max, sizes) float32.
        weight: how much the module's residual counts; sigma is of sqrt(weight) D.
    """

    having: tuple[int, ...]
    shape: tuple[int, int]
    sigma: Tensor
    ranks: tuple[int, ...]
    original_bytes: Tensor
    outside: tuple[Tensor, Tensor]
    directions: Pair
    crest: tuple[Tensor, Tensor]
    loaded: tuple[Tensor, Tensor]
    weight: float = 1.0

    @property
    def energies(self) -> Tensor:
        """weight ||D_i||^2 (n,)."""
        return self.sigma.square().sum(1)


def curve(module: Module, having: Sequence[int], weight: float = 1.0) -> Curve:
    """The curve of a module, whose residual counts `weight` times."""
    stack = module.stack
    pair = directions(module)
    outside, crest, loaded = [], [], []
    for rows, basis in ((stack.left, pair.left), (stack.right, pair.right)):
        energy = rows.square().sum(1)
        sizes = [size for size in SIZES if size <= basis.shape[1]]
        loadings = rows @ basis
        held = loadings.square().cumsum(1) / energy.clamp_min(1e-30)[:, None]
        share = (1 - held[:, [size - 1 for size in sizes]]).clamp(0, 1)
        outside.append(stack.pad(share).cpu())
        step = max(1, CHUNK_ELEMENTS // rows.shape[1])
        own = [
            _crests(*some, basis, sizes)
            for some in zip(torch.split(rows, step), torch.split(loadings, step), strict=True)
        ]
        crest.append(stack.pad(torch.cat(own)).float().cpu())
        each = [profile.crest(loadings[:, :size]) * (1 - 1 / size) for size in sizes]
        loaded.append(stack.pad(torch.stack(each, 1) if each else loadings[:, :0]).float().cpu())
    shape = stack.left.shape[1], stack.right.shape[1]
    return Curve(
        tuple(having),
        shape,
        module.sigma.cpu() * weight**0.5,
        stack.ranks,
        module.original_bytes.cpu().double(),
        (outside[0], outside[1]),
        Pair(pair.left.cpu(), pair.right.cpu()),
        (crest[0], crest[1]),
        (loaded[0], loaded[1]),
        weight,
    )


def _crests(rows: Tensor, loadings: Tensor, basis: Tensor, sizes: Sequence[int]) -> Tensor:
    """`Curve.crest` of some rows (k, d): (k, 1 + sizes)."""
    found, apart, at = [profile.crest(rows)], rows, 0
    for size in sizes:
        apart = apart - loadings[:, at:size] @ basis[:, at:size].T
        found, at = [*found, profile.crest(apart)], size
    return torch.stack(found, 1)


def directions(module: Module) -> Pair:
    """The nested shared directions of both sides: (out, at most 64) and (in, at most 64); none for few adapters.

    A quarter of a side's dimensions at most, and of the adapters' rows: what is left would hardly be less.
    """
    stack = module.stack
    if len(stack) < LEAST or float(module.energies.sum()) == 0:
        return Pair(
            stack.left.new_zeros(stack.left.shape[1], 0), stack.right.new_zeros(stack.right.shape[1], 0)
        )
    # Only frames are looked at, and those come from the source: scaled rows would be one more copy of them all.
    weighted = replace(stack, source=(stack, module.weights.sqrt()))
    pair = joint.leading_directions(weighted, max(SIZES))
    most = sum(stack.ranks) // 4
    left, right = (side[:, : min(most, side.shape[0] // 4)] for side in (pair.left, pair.right))
    return Pair(left, right)
