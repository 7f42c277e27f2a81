"""Independent float64 references that form D densely, and the matrices that the tests compress.

Nothing here uses lorazip's mathematics: a stored module is decoded by its own few lines, and every method is written
out as its paper has it. Slow, and meant for small matrices.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from lorazip.adapter import LowRank, open_adapter

ZOO = Path(__file__).parents[2] / "examples" / "zoo"
steady = settings(derandomize=True, deadline=None, max_examples=25)


# --- matrices ---------------------------------------------------------------------------------------------------------


def dense(factor: LowRank) -> Tensor:
    """D = scale B A (out, in), float64."""
    return factor.scale * factor.B.double() @ factor.A.double()


def stacked(factors: Sequence[LowRank], *, unit: bool = True) -> Tensor:
    """All D_i (n, out, in), float64; with `unit` each at norm 1 (zero matrices stay)."""
    matrices = torch.stack([dense(f) for f in factors])
    norms = matrices.norm(dim=(1, 2), keepdim=True)
    return matrices / torch.where(norms > 0, norms, 1) if unit else matrices


def compact(factors: Sequence[LowRank]) -> Tensor:
    """`stacked(factors)` turned into the span of all B and of all A: (n, R, R') has every norm and singular value."""
    left = torch.linalg.qr(torch.cat([f.B.double() for f in factors], dim=1)).Q
    right = torch.linalg.qr(torch.cat([f.A.double().T for f in factors], dim=1)).Q
    matrices = torch.stack([f.scale * (left.T @ f.B.double()) @ (f.A.double() @ right) for f in factors])
    return matrices / matrices.norm(dim=(1, 2), keepdim=True)


@functools.cache
def zoo(module: str) -> tuple[LowRank, ...]:
    """One module of the twelve real adapters of examples/zoo, sorted by name: "15.k_proj"."""
    layer, name = module.split(".")
    folders = sorted(path for path in ZOO.iterdir() if path.is_dir())
    adapters = [open_adapter(path, path.name) for path in folders]
    return tuple(a.low_rank(f"model.layers.{layer}.self_attn.{name}") for a in adapters)


def related(
    ranks: Sequence[int],
    out: int,
    in_: int,
    *,
    planted: int = 6,
    noise: float = 0.3,
    clusters: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    scale: float = 2.0,
) -> list[LowRank]:
    """Adapters with a planted common subspace per cluster (i mod clusters) and noise, of strengths 0.3 to 3."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    bases = [(normal(out, planted) / out**0.5, normal(planted, in_) / in_**0.5) for _ in range(clusters)]
    made = []
    for i, rank in enumerate(ranks):
        left, right = bases[i % clusters]
        strength = 10 ** (float(torch.rand((), generator=random)) - 0.5)
        b = (1 - noise) * left @ normal(planted, rank) + noise * normal(out, rank) / out**0.5 * planted**0.5
        a = (1 - noise) * normal(rank, planted) @ right + noise * normal(rank, in_) / in_**0.5 * planted**0.5
        made.append(LowRank((strength * b).to(dtype), a.to(dtype), scale))
    return made


def unimodular(rank: int, seed: int, size: int = 4) -> tuple[Tensor, Tensor]:
    """An integer G (rank, rank) with an integer inverse, and that inverse, float64: a gauge without any rounding."""
    random = torch.Generator().manual_seed(seed)
    entries = torch.randint(-size, size + 1, (2, rank, rank), generator=random).double()
    eye = torch.eye(rank, dtype=torch.float64)
    lower, upper = entries[0].tril(-1) + eye, entries[1].triu(1) + eye
    gauge = lower @ upper
    inverse = torch.linalg.solve_triangular(upper, eye, upper=True) @ torch.linalg.solve_triangular(
        lower, eye, upper=False
    )
    return gauge, inverse.round()


@st.composite
def modules(draw: Any, most: int = 5) -> list[LowRank]:
    """One module of a few small adapters: mixed ranks (beyond the width too), types, scales, copies, zeros."""
    out, in_ = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    factors: list[LowRank] = []
    for _ in range(draw(st.integers(1, most))):
        kind = draw(st.sampled_from(["random", "random", "random", "zero", "copy", "dependent"]))
        rank = draw(st.integers(1, 6))
        if kind == "copy" and factors:
            factors.append(factors[-1])
            continue
        b = torch.randn(out, rank, generator=random) * draw(st.sampled_from([1.0, 1e-3, 30.0]))
        a = torch.randn(rank, in_, generator=random)
        if kind == "zero":
            b = torch.zeros_like(b)
        if kind == "dependent":
            b = b[:, :1].expand(out, rank)
        factors.append(
            LowRank(b.to(dtype), a.to(dtype), draw(st.sampled_from([2.0, 1.0, 0.7, 16 / 6, -0.3])))
        )
    return factors


# --- methods ----------------------------------------------------------------------------------------------------------


def truncated_svd(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation of that rank."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vt[:rank]


def tails(matrix: Tensor) -> Tensor:
    """Squared relative error of the best approximation of rank 0, 1, 2, ..."""
    squares = torch.linalg.svdvals(matrix).square()
    return torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)]) / squares.sum()


def _top(symmetric: Tensor, columns: int) -> Tensor:
    return torch.linalg.eigh(symmetric).eigenvectors[:, -columns:]


def hooi(matrices: Tensor, rank: int, rounds: int = 100, tolerance: float = 1e-12) -> Tensor:
    """Tucker-2 by higher-order orthogonal iteration from the HOSVD: ||D_i - U U^T D_i V V^T||^2 (n,)."""
    a, b = min(rank, matrices.shape[1]), min(rank, matrices.shape[2])
    v = _top(torch.einsum("nij,nik->jk", matrices, matrices), b)
    energies = matrices.square().sum((1, 2))
    loss = float(energies.sum())
    for _ in range(rounds):
        half = matrices @ v
        u = _top(torch.einsum("nij,nkj->ik", half, half), a)
        half = u.T @ matrices
        v = _top(torch.einsum("nij,nik->jk", half, half), b)
        residuals = energies - (half @ v).square().sum((1, 2))
        previous, loss = loss, float(residuals.sum())
        if previous - loss <= tolerance * previous:
            break
    return residuals.clamp_min(0)


def best_diagonals(matrices: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Least-squares sigma (n, k) of D_i ~ U diag(sigma_i) V^T, by the dense design matrix."""
    design = torch.einsum("ik,jk->ijk", u, v).reshape(-1, u.shape[1])
    return torch.linalg.lstsq(design, matrices.flatten(1).T, driver="gelsd").solution.T


def diagonal_loss(matrices: Tensor, u: Tensor, v: Tensor) -> float:
    """sum_i ||D_i - U diag(sigma_i) V^T||^2 with the best sigma_i."""
    sigma = best_diagonals(matrices, u, v)
    return float((matrices - torch.einsum("ik,nk,jk->nij", u, sigma, v)).square().sum())


def cp_als(matrices: Tensor, u: Tensor, v: Tensor, rounds: int) -> float:
    """Canonical polyadic decomposition by alternating dense least squares from (U, V); the loss after `rounds`."""
    for _ in range(rounds):
        sigma = best_diagonals(matrices, u, v)
        design = torch.einsum("nk,jk->njk", sigma, v).reshape(-1, v.shape[1])
        u = torch.linalg.lstsq(
            design, matrices.permute(0, 2, 1).reshape(-1, len(u)), driver="gelsd"
        ).solution.T
        design = torch.einsum("nk,ik->nik", sigma, u).reshape(-1, u.shape[1])
        v = torch.linalg.lstsq(design, matrices.reshape(-1, len(v)), driver="gelsd").solution.T
        u, v = u / u.norm(dim=0).clamp_min(1e-30), v / v.norm(dim=0).clamp_min(1e-30)
    return diagonal_loss(matrices, u, v)


def eigenlorax(matrices: Tensor, directions: int) -> Tensor:
    """EigenLoRAx with the corrections of METHODS.md §3: sum of residuals' squares per adapter (n,).

    Balanced thin SVD of every D_i, uncentred principal directions of the stacked factors, projection.
    """
    u, s, vt = torch.linalg.svd(matrices, full_matrices=False)
    left = (u * s.sqrt()[:, None]).permute(1, 0, 2).flatten(1)  # (out, n r)
    right = (vt.mT * s.sqrt()[:, None]).permute(1, 0, 2).flatten(1)
    vb = torch.linalg.svd(left, full_matrices=False).U[:, :directions]
    va = torch.linalg.svd(right, full_matrices=False).U[:, :directions]
    return (matrices - vb @ (vb.T @ matrices @ va) @ va.T).square().sum((1, 2))


# --- what is stored ---------------------------------------------------------------------------------------------------


def _read(parts: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    """The next part as a matrix; plain codecs have one part a tensor."""
    return parts.pop(0).double().reshape(shape)


def reconstructed(code: Any, out: int, in_: int) -> Tensor:
    """All D^_i (n, out, in) of an encoded module in exact arithmetic (float64), straight from the stored parts."""
    shared = []
    for description, parts in zip(code.layout, code.shared, strict=True):
        width = out if description.side == "left" else in_
        shared.append(_read(list(parts), (description.columns, width)).T)
    found = []
    for form, own in zip(code.forms, code.own, strict=True):
        parts = list(own)
        total = torch.zeros(out, in_, dtype=torch.float64)
        for term in form:
            sides = []
            for side, width in ((term.left, out), (term.right, in_)):
                if isinstance(side, int):
                    sides.append(shared[side])
                    continue
                sides.append(torch.empty(width, side.columns))  # its place; filled below, in file order
            a, b = sides[0].shape[1], sides[1].shape[1]
            if not isinstance(term.left, int):
                sides[0] = _read(parts, (a, out)).T
            match term.core.kind:
                case "full":
                    core = _read(parts, (a, b))
                case "diagonal":
                    core = torch.diag(_read(parts, (a,)))
                case "factored":
                    core = _read(parts, (term.core.rank, a)).T @ _read(parts, (term.core.rank, b))
                case "scalar":
                    core = term.core.value * torch.eye(a, dtype=torch.float64)
            if not isinstance(term.right, int):
                sides[1] = _read(parts, (b, in_)).T
            total += sides[0] @ core @ sides[1].T
        assert not parts
        found.append(total)
    return torch.stack(found)


def errors(code: Any, factors: Sequence[LowRank]) -> Tensor:
    """||D^_i - D_i||^2 / ||D_i||^2 of an encoded module (n,), dense; 0 for zero matrices that are stored as zero."""
    matrices = stacked(factors, unit=False)
    residuals = (reconstructed(code, *matrices.shape[1:]) - matrices).square().sum((1, 2))
    energies = matrices.square().sum((1, 2))
    return torch.where(energies > 0, residuals / torch.where(energies > 0, energies, 1), residuals)


def nbytes(code: Any) -> int:
    """Bytes of all stored parts."""
    return sum(part.nbytes for parts in (*code.shared, *code.own) for part in parts)
