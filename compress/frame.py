"""The space of one side of a module where iterations run: the span of all adapters' rows, where that is smaller.

n adapters of rank r have n r rows in d dimensions. Where that is clearly less than d, everything that a fit needs of
the rows is their triangle ("QR of the stacked factors", METHODS.md §2): exact, and much smaller.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1_000_000  # of float64 work space: small enough to stay in the cache
PRECISE = (
    2**19
)  # elements up to which iterations run in float64: rounding then does not even decide when they stop


@dataclass(frozen=True)
class Frame:
    """One side of a stack in the space where iterations run.

    With clearly fewer rows than dimensions that is the span of the rows ("QR of the stacked factors", METHODS.md §2;
    exact, and much smaller): rows = diag(lengths) T Q^T with T lower triangular, Q (d, R) orthonormal and never formed.
    Else it is the module's own space.

    Attributes:
        rows: (R, d) the rows of the stack.
        lengths: (R, 1) their norms, 1 for zero rows.
        triangle: T (R, R) float64, or None where nothing is reduced.
        work: (R, d') the rows in the frame.
    """

    rows: Tensor
    lengths: Tensor
    triangle: Tensor | None
    work: Tensor

    @staticmethod
    def of(rows: Tensor) -> Frame:
        """The frame of the span of rows (R, d).

        T comes from a Cholesky of the Gram matrix of the rows at unit length (adapters may differ in strength by any
        factor). A ridge near rounding keeps dependent rows, copies of one adapter, from failing.
        """
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64)
        lengths = torch.where(norms > 0, norms, 1)
        if 4 * rows.shape[0] > 3 * rows.shape[1]:
            return Frame(rows, lengths, None, rows.double() if rows.numel() <= PRECISE else rows)
        unit = _gram(rows) / (lengths * lengths.T)
        identity = torch.eye(len(unit), dtype=unit.dtype, device=unit.device)
        ridge = 1e-15
        while True:
            triangle, info = torch.linalg.cholesky_ex(unit + ridge * identity)
            if int(info) == 0:
                break
            ridge *= 10
        work = norms * triangle
        return Frame(rows, lengths, triangle, work if work.numel() <= PRECISE else work.to(rows.dtype))

    def scaled(self, factors: Tensor) -> Frame:
        """The frame of factors * rows, factors (R, 1): the same basis."""
        return replace(self, work=self.work * factors.to(self.work.dtype))

    def lift(self, x: Tensor) -> Tensor:
        """(d', k) -> (d, k): back to the module's space."""
        if self.triangle is None:
            return x.to(self.rows.dtype)
        solved = torch.linalg.solve_triangular(self.triangle.T, x.double(), upper=True) / self.lengths
        lifted: Tensor = self.rows.T @ solved.to(self.rows.dtype)
        return lifted

    def lower(self, x: Tensor) -> Tensor:
        """(d, k) -> (d', k): the part of x in the frame."""
        if self.triangle is None:
            return x.to(self.work.dtype)
        inner = (self.rows @ x).double() / self.lengths
        lowered: Tensor = torch.linalg.solve_triangular(self.triangle, inner, upper=False)
        return lowered.to(self.work.dtype)


def _gram(rows: Tensor) -> Tensor:
    """The lower half of rows rows^T (R, R), float64, block by block; a Cholesky reads no more."""
    count, step = len(rows), max(1, len(rows) // 8)
    gram = torch.zeros(count, count, dtype=torch.float64, device=rows.device)
    width = max(1, CHUNK_ELEMENTS // max(1, count))
    for first in range(0, rows.shape[1], width):
        part = rows[:, first : first + width].double()
        for start in range(0, count, step):
            end = min(start + step, count)
            gram[start:end, :end].addmm_(part[start:end], part[:end].T)
    return gram


def orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis (d, k) of the span of columns (d, k)."""
    basis: Tensor = torch.linalg.qr(columns).Q
    return basis
