"""Algebra of many factored matrices at once; no D = L R^T is ever formed.

One module of n adapters is a `Stack`: the rows of all left factors under each other and the rows of all right factors
likewise, D_i = left_i^T right_i. Products with a tall thin matrix are then one large GEMM over all adapters, whatever
their ranks; only what has no long side is padded to (n, r_max, ...).

Everything is computed from Gram matrices in float64. Unlike thin QRs this is all GEMMs, so it batches over adapters and
runs as well on a GPU; float32 factors have 24 bits and the squares fit into 53, so singular values down to 1e-8 of the
largest are right. Only factors that nearly cancel, ||B|| ||A|| far above ||BA||, need a QR first (`untangled`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lorazip.compress.frame import CHUNK_ELEMENTS, Frame

CANCELLING = 100.0  # from ||B||^2 ||A||^2 = CANCELLING r ||BA||^2 on, Gram matrices lose too many digits
NOTHING = 1e-29  # of ||B||^2 ||A||^2: the square of some roundings of float64


@dataclass(frozen=True)
class Stack:
    """n low-rank matrices of one module, D_i = left_i^T right_i with R = sum of their ranks.

    Attributes:
        left: (R, out) rows are the columns of the left factors.
        right: (R, in).
        ranks: rank of each adapter, in order; rows of adapter i follow those of i - 1.
        known: (n,) ||D_i||^2 float64 where they are known already.
        source: the stack of which this one is a scaling, and the (n,) factors: frames are taken from there.
    """

    left: Tensor
    right: Tensor
    ranks: tuple[int, ...]
    known: Tensor | None = field(default=None, repr=False)
    source: tuple[Stack, Tensor] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.ranks)

    @cached_property
    def width(self) -> int:
        """The largest rank r_max: the padded size of per-adapter blocks."""
        return max(self.ranks)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First row of each adapter, and R at the end."""
        starts = [0]
        for rank in self.ranks:
            starts.append(starts[-1] + rank)
        return tuple(starts)

    @cached_property
    def energies(self) -> Tensor:
        """||D_i||^2, (n,) float64."""
        return norms2(self) if self.known is None else self.known

    @cached_property
    def grams(self) -> tuple[Tensor, Tensor]:
        """left_i left_i^T and right_i right_i^T of every adapter, (n, r_max, r_max) each, float64."""
        pairs = []
        for chunk in self.chunks():
            left, right = chunk.pad(chunk.left).double(), chunk.pad(chunk.right).double()
            missing = self.width - chunk.width
            pairs.append([torch.nn.functional.pad(x @ x.mT, (0, missing, 0, missing)) for x in (left, right)])
        lefts, rights = zip(*pairs, strict=True)
        return torch.cat(lefts), torch.cat(rights)

    @cached_property
    def frames(self) -> tuple[Frame, Frame]:
        """The two sides as the iterations see them."""
        if self.source is None:
            return Frame.of(self.left), Frame.of(self.right)
        stack, factors = self.source
        roots = self.repeat_rows(factors.sqrt()[:, None])
        return stack.frames[0].scaled(roots), stack.frames[1].scaled(roots)

    @cached_property
    def _slots(self) -> Tensor | None:
        """(R,) place of every row in the flattened (n, r_max) grid; None when all ranks are equal."""
        if min(self.ranks) == self.width:
            return None
        places = [i * self.width + j for i, rank in enumerate(self.ranks) for j in range(rank)]
        return torch.tensor(places, device=self.left.device)

    def pad(self, rows: Tensor) -> Tensor:
        """(R, k) -> (n, r_max, k), zeros where an adapter has fewer rows."""
        n, k = len(self), rows.shape[1]
        if self._slots is None:
            return rows.reshape(n, self.width, k)
        grid = rows.new_zeros(n * self.width, k)
        return grid.index_copy_(0, self._slots, rows).view(n, self.width, k)

    def unpad(self, blocks: Tensor) -> Tensor:
        """(n, r_max, k) -> (R, k), the inverse of `pad`."""
        rows = blocks.reshape(-1, blocks.shape[-1])
        return rows if self._slots is None else rows[self._slots]

    def repeat_rows(self, values: Tensor) -> Tensor:
        """(n, k) one row an adapter -> (R, k) the same at every row of its factors."""
        ranks = torch.tensor(self.ranks, device=values.device)
        return values.repeat_interleave(ranks, dim=0)

    def select(self, indices: Sequence[int]) -> Stack:
        """The sub-stack of these adapters, in this order (rows are copied)."""
        rows = torch.cat([torch.arange(self.starts[i], self.starts[i + 1]) for i in indices])
        rows = rows.to(self.left.device)
        known = None if self.known is None else self.known[list(indices)]
        return Stack(self.left[rows], self.right[rows], tuple(self.ranks[i] for i in indices), known)

    def scaled(self, factors: Tensor) -> Stack:
        """D_i -> factors_i D_i, factors (n,) nonnegative, half on each side so that balanced rows stay balanced."""
        roots = self.repeat_rows(factors.sqrt().to(self.left.dtype)[:, None])
        known = None if self.known is None else self.known * factors.square()
        return Stack(self.left * roots, self.right * roots, self.ranks, known, (self, factors))

    def chunks(self) -> Iterator[Stack]:
        """Runs of adapters whose padded float64 copies stay within the work space."""
        longest = max(self.left.shape[1], self.right.shape[1])
        step = max(1, CHUNK_ELEMENTS // (self.width * longest))
        for first in range(0, len(self), step):
            last = min(first + step, len(self))
            rows = slice(self.starts[first], self.starts[last])
            yield Stack(self.left[rows], self.right[rows], self.ranks[first:last])


def norms2(stack: Stack) -> Tensor:
    """||D_i||_F^2 = tr(left_i left_i^T right_i right_i^T), (n,) float64."""
    left, right = stack.grams
    return (left * right).sum((1, 2)).clamp_min(0)


def inner(first: Stack, second: Stack) -> Tensor:
    """<D_i, E_i>_F of two stacks with the same adapters, (n,) float64."""
    totals = []
    for a, b in zip(_split(first, second), _split(second, first), strict=True):
        left = a.pad(a.left).double() @ b.pad(b.left).double().mT  # (c, r_a, r_b)
        right = a.pad(a.right).double() @ b.pad(b.right).double().mT
        totals.append((left * right).sum((1, 2)))
    return torch.cat(totals)


def _split(stack: Stack, other: Stack) -> Iterator[Stack]:
    """Chunks of one stack at boundaries that depend on both, so that two stacks are split alike."""
    longest = max(stack.left.shape[1], stack.right.shape[1])
    step = max(1, CHUNK_ELEMENTS // (max(stack.width, other.width) * longest))
    for first in range(0, len(stack), step):
        last = min(first + step, len(stack))
        rows = slice(stack.starts[first], stack.starts[last])
        yield Stack(stack.left[rows], stack.right[rows], stack.ranks[first:last])


def canonical(stack: Stack) -> tuple[Stack, Tensor]:
    """Balanced thin SVD of every D_i: left rows sqrt(s_j) u_j, right rows sqrt(s_j) v_j, s descending.

    With G_L = left left^T = W_L E_L W_L^T and G_R alike, K = E_L^(1/2) W_L^T W_R E_R^(1/2) has D's singular values,
    and its singular vectors turn the given rows into singular vectors of D. The result does not depend on the gauge
    (B -> BG, A -> G^-1 A) beyond rounding.

    Returns:
        the stack in balanced form (same ranks, float32), and the singular values (n, r_max) float64, zero where padded.
    """
    stack = untangled(stack)
    half_left, inverse_left = _roots(stack.grams[0])
    half_right, inverse_right = _roots(stack.grams[1])
    x, sigma, yt = torch.linalg.svd(half_left @ half_right.mT)
    root = sigma.sqrt()[:, :, None]
    turn_left = root * (x.mT @ inverse_left)  # (n, r, r), new rows = turn @ old rows
    turn_right = root * (yt @ inverse_right)
    lefts, rights, at = [], [], 0
    for chunk in stack.chunks():
        turn = slice(at, at + len(chunk)), slice(chunk.width), slice(chunk.width)
        lefts.append(chunk.unpad(turn_left[turn].to(chunk.left.dtype) @ chunk.pad(chunk.left)).float())
        rights.append(chunk.unpad(turn_right[turn].to(chunk.right.dtype) @ chunk.pad(chunk.right)).float())
        at += len(chunk)
    return Stack(torch.cat(lefts), torch.cat(rights), stack.ranks, sigma.square().sum(1)), sigma


def untangled(stack: Stack) -> Stack:
    """The same matrices with rows that do not cancel; the same stack where none do.

    Factors in a bad gauge are large where their product is small. Their left^T = Q T gives D_i = Q (T right), which has
    no such cancellation. That takes float64 rows. Trained adapters hardly ever need it.
    """
    left, right = stack.grams
    sizes = left.diagonal(dim1=1, dim2=2).sum(1) * right.diagonal(dim1=1, dim2=2).sum(1)
    tangled = (sizes > CANCELLING * stack.width * stack.energies).nonzero()[:, 0].tolist()
    if not tangled:
        return stack
    rows_left, rows_right = stack.left.double(), stack.right.double()
    for i in tangled:
        rows = slice(stack.starts[i], stack.starts[i + 1])
        q, t = torch.linalg.qr(rows_left[rows].T)
        missing = stack.ranks[i] - len(t)  # more rows than dimensions: the rest is zero
        product = t @ rows_right[rows]
        if float(product.square().sum()) < NOTHING * float(sizes[i]):
            product = torch.zeros_like(product)  # what is left of factors that cancel is their rounding
        rows_right[rows] = torch.nn.functional.pad(product, (0, 0, 0, missing))
        rows_left[rows] = torch.nn.functional.pad(q.T, (0, 0, 0, missing))
    return Stack(rows_left, rows_right, stack.ranks)


def _roots(gram: Tensor) -> tuple[Tensor, Tensor]:
    """E^(1/2) W^T and its pseudo-inverse's transpose E^(-1/2) W^T of Gram matrices W E W^T, (n, r, r).

    Directions below 1e-15 of the largest eigenvalue are rounding of the Gram matrix: they get zero in both.
    """
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(-1), vectors.flip(-1)
    kept = values > 1e-15 * values[:, :1].clamp_min(torch.finfo(gram.dtype).tiny)
    roots = torch.where(kept, values, 0).sqrt()[:, :, None]
    inverse = torch.where(kept[:, :, None], 1 / roots, 0)
    return roots * vectors.mT, inverse * vectors.mT
