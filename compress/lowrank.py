"""Algebra of many factored matrices at once; no D = L R^T is ever formed.

One module of n adapters is a `Stack`: the rows of all left factors under each other and the rows of all right factors
likewise, D_i = left_i^T right_i. Products with a tall thin matrix are then one large GEMM over all adapters, whatever
their ranks; only what has no long side is padded to (n, r_max, ...).

Everything is computed from Gram matrices in float64. Unlike the thin QR that METHODS.md starts from this is all GEMMs,
so it batches over adapters and runs as well on a GPU; float32 factors have 24 bits and the squares fit into 53, so
singular values down to 1e-8 of the largest are right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

CHUNK_ELEMENTS = 8_000_000  # float64 work space of 64 MB


@dataclass(frozen=True)
class Stack:
    """n low-rank matrices of one module, D_i = left_i^T right_i with R = sum of their ranks.

    Attributes:
        left: (R, out) rows are the columns of the left factors, scale folded in.
        right: (R, in).
        ranks: rank of each adapter, in order; rows of adapter i follow those of i - 1.
    """

    left: Tensor
    right: Tensor
    ranks: tuple[int, ...]

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
        return Stack(self.left[rows], self.right[rows], tuple(self.ranks[i] for i in indices))

    def scaled(self, factors: Tensor) -> Stack:
        """D_i -> factors_i D_i, factors (n,) nonnegative, half on each side so that balanced rows stay balanced."""
        roots = self.repeat_rows(factors.sqrt().to(self.left.dtype)[:, None])
        return replace(self, left=self.left * roots, right=self.right * roots)

    def chunks(self) -> Iterator[Stack]:
        """Runs of adapters whose padded float64 copies stay within the work space."""
        longest = max(self.left.shape[1], self.right.shape[1])
        step = max(1, CHUNK_ELEMENTS // (self.width * longest))
        for first in range(0, len(self), step):
            last = min(first + step, len(self))
            rows = slice(self.starts[first], self.starts[last])
            yield Stack(self.left[rows], self.right[rows], self.ranks[first:last])


def grams(stack: Stack) -> tuple[Tensor, Tensor]:
    """left_i left_i^T and right_i right_i^T of every adapter, (n, r_max, r_max) each, float64."""
    pairs = []
    for chunk in stack.chunks():
        left, right = chunk.pad(chunk.left).double(), chunk.pad(chunk.right).double()
        gram = (left @ left.mT, right @ right.mT)
        missing = stack.width - chunk.width
        pairs.append(tuple(torch.nn.functional.pad(g, (0, missing, 0, missing)) for g in gram))
    return torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs])


def norms2(stack: Stack) -> Tensor:
    """||D_i||_F^2 = tr(left_i left_i^T right_i right_i^T), (n,) float64."""
    left, right = grams(stack)
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

    With G_L = left left^T = W_L E_L W_L^T and G_R alike, K = E_L^(1/2) W_L^T W_R E_R^(1/2) has the singular values of D,
    and its singular vectors turn the given rows into singular vectors of D. The result does not depend on the gauge
    (B -> BG, A -> G^-1 A) beyond rounding.

    Returns:
        the stack in balanced form (same ranks), and the singular values (n, r_max) float64, zero where padded.
    """
    gram_left, gram_right = grams(stack)
    half_left, inverse_left = _roots(gram_left)
    half_right, inverse_right = _roots(gram_right)
    x, sigma, yt = torch.linalg.svd(half_left @ half_right.mT)
    root = sigma.sqrt()[:, :, None]
    turn_left = root * (x.mT @ inverse_left)  # (n, r, r), new rows = turn @ old rows
    turn_right = root * (yt @ inverse_right)
    lefts, rights, at = [], [], 0
    for chunk in stack.chunks():
        turn = slice(at, at + len(chunk)), slice(chunk.width), slice(chunk.width)
        lefts.append(chunk.unpad(turn_left[turn].to(stack.left.dtype) @ chunk.pad(chunk.left)))
        rights.append(chunk.unpad(turn_right[turn].to(stack.left.dtype) @ chunk.pad(chunk.right)))
        at += len(chunk)
    return Stack(torch.cat(lefts), torch.cat(rights), stack.ranks), sigma


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


def triangle(rows: Tensor) -> Tensor:
    """T (R, R) lower triangular float64 with T T^T = rows rows^T: the rows in an orthonormal frame of their span.

    For R < d this is the exact reduction of METHODS.md §2 ("QR of the stacked factors") by Cholesky. A ridge near
    rounding keeps dependent rows (copies of one adapter) from failing; it moves D by less than 1e-7 of its size.
    """
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    step = max(1, CHUNK_ELEMENTS // max(1, len(rows)))
    for start in range(0, rows.shape[1], step):
        part = rows[:, start : start + step].double()
        gram.addmm_(part, part.T)
    size = gram.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    ridge = 1e-15
    while True:
        factor, info = torch.linalg.cholesky_ex(
            gram + ridge * size * torch.eye(len(gram), device=gram.device)
        )
        if int(info) == 0:
            return factor
        ridge *= 10


def orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis (d, k) of the span of columns (d, k)."""
    return torch.linalg.qr(columns).Q
