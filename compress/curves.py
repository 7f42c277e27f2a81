"""What is known of a module before anything is encoded: singular values, and how much of them its adapters share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from lorazip.compress import joint
from lorazip.compress.allocate import Module
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
        weight: how much the module's residual counts; sigma is of sqrt(weight) D.
    """

    having: tuple[int, ...]
    shape: tuple[int, int]
    sigma: Tensor
    ranks: tuple[int, ...]
    original_bytes: Tensor
    outside: tuple[Tensor, Tensor]
    directions: Pair
    weight: float = 1.0

    @property
    def energies(self) -> Tensor:
        """weight ||D_i||^2 (n,)."""
        return self.sigma.square().sum(1)


def curve(module: Module, having: Sequence[int], weight: float = 1.0) -> Curve:
    """The curve of a module, whose residual counts `weight` times."""
    stack = module.stack
    pair = directions(module)
    outside = []
    for rows, basis in ((stack.left, pair.left), (stack.right, pair.right)):
        energy = rows.square().sum(1)
        held = (rows @ basis).square_().cumsum(1) / energy.clamp_min(1e-30)[:, None]
        sizes = [size for size in SIZES if size <= basis.shape[1]]
        share = (1 - held[:, [size - 1 for size in sizes]]).clamp(0, 1)
        outside.append(stack.pad(share).cpu())
    shape = stack.left.shape[1], stack.right.shape[1]
    return Curve(
        tuple(having),
        shape,
        module.sigma.cpu() * weight**0.5,
        stack.ranks,
        module.original_bytes.cpu().double(),
        (outside[0], outside[1]),
        Pair(pair.left.cpu(), pair.right.cpu()),
        weight,
    )


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
