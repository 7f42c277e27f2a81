"""Joint diagonalization of many adapters of one module (Compress-then-Serve, arXiv 2407.00066 §3).

    JD-Full   min sum_i ||D_i - U S_i V^T||_F^2   U, V orthonormal, S_i = U^T D_i V full: Tucker-2 of the stacked tensor
    JD-Diag   the same with S_i diagonal and U, V free: a canonical polyadic decomposition

Weights are folded into the stack (`Stack.scaled`) before either fit. Where we differ from the paper's code: alternating
exact updates instead of a fixed number of eigenvalue iterations, a start that does not depend on the gauge, stopping on
the relative decrease of the loss, and a separate rank for each side where a module is narrower than the rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lorazip.compress.frame import Frame, orthonormal
from lorazip.compress.lowrank import Stack

DENSE = 128  # below this size a full eigendecomposition is cheaper than a block Krylov step
TOLERANCE = 1e-6  # stop when a round lowers the loss by less than this part of it
ROUNDS = 100


@dataclass(frozen=True)
class Pair:
    """The shared bases of one module (of one cluster): left (out, a), right (in, b)."""

    left: Tensor
    right: Tensor


def leading(apply: Callable[[Tensor], Tensor], start: Tensor) -> tuple[Tensor, float]:
    """The k leading eigenvectors of a symmetric positive semidefinite operator on dimension d.

    Exact where d is small or k is near d; else one Rayleigh-Ritz step in span[X, HX, H^2 X] from X = start, which never
    lowers the captured trace, so the alternation around it still never raises its loss.

    Args:
        apply: X (d, m) -> H X.
        start: (d, k) orthonormal.

    Returns:
        (d, k) orthonormal, descending, and the sum of the k eigenvalues.
    """
    d, k = start.shape
    if d <= DENSE or 3 * k >= d:
        basis = torch.eye(d, dtype=start.dtype, device=start.device)
        small = apply(basis)
    else:
        basis, images = start, apply(start)
        for _ in range(2):
            # The QR leaves the columns that are orthonormal already as they are, up to their sign.
            new = orthonormal(torch.cat([basis, images[:, -k:]], dim=1))[:, -k:]
            basis, images = torch.cat([basis, new], dim=1), torch.cat([images, apply(new)], dim=1)
        small = basis.T @ images
    values, vectors = torch.linalg.eigh((small + small.T).double() / 2)
    top = vectors[:, -k:].flip(1).to(start.dtype)
    return (top if len(small) == d else basis @ top), float(values[-k:].sum())


def _principal(frame: Frame, columns: int) -> Tensor:
    """The `columns` leading right singular vectors of the frame's rows, in the frame: (d', columns), columns <= d'.

    The Krylov path starts from random directions of the module's own space, seeded by its size: a start taken from the
    rows would depend on the order of the adapters.
    """
    work, width = frame.work, frame.rows.shape[1]
    generator = torch.Generator().manual_seed(width)
    start = torch.randn(width, columns, generator=generator).to(frame.rows)
    x, energy = orthonormal(frame.lower(start)), 0.0
    for _ in range(ROUNDS):
        previous = energy
        x, energy = leading(lambda y: work.T @ (work @ y), x)
        if energy - previous <= 1e-4 * energy:
            break
    return x


def principal(frame: Frame, columns: int) -> Tensor:
    """The `columns` leading right singular vectors of the frame's rows (R, d), as (d, columns) orthonormal.

    Where there are fewer rows than that, random directions orthogonal to them fill up.
    """
    width = frame.rows.shape[1]
    within = min(columns, frame.work.shape[1])
    found = frame.lift(_principal(frame, within))
    if within == columns:
        return orthonormal(found)
    more = torch.randn(width, columns - within, generator=torch.Generator().manual_seed(width)).to(found)
    return orthonormal(torch.cat([found, more], dim=1))


def leading_directions(stack: Stack, columns: int) -> Pair:
    """The leading left and right singular vectors of the stacked D_i (Tucker's HOSVD), at most `columns` of each side.

    Nested: the first c columns are the leading c. Where the adapters span less than that, there are fewer.

    Args:
        stack: n weighted matrices in balanced form.
    """
    left, right = (_first(frame, columns, None) for frame in stack.frames)
    return Pair(orthonormal(stack.frames[0].lift(left)), orthonormal(stack.frames[1].lift(right)))


def fit_full(stack: Stack, rank: int, start: Pair | None = None) -> Pair:
    """Fit one shared orthonormal pair to all adapters of a module (JD-Full, arXiv 2407.00066 §3.1, alternating).

    U <- the leading left singular vectors of [D_1 V ... D_n V], V <- those of [D_1^T U ...], until a round lowers the
    loss by less than 1e-6 of it. The loss never rises. From the top singular vectors of [D_1 ... D_n] (Tucker's HOSVD)
    unless a start is given.

    Args:
        stack: n weighted matrices in balanced form (`canonical`).
        rank: columns of U and V; U has min(rank, out), V min(rank, in), or what the adapters span where that is less.
        start: a pair to continue from, of any number of columns.
    """
    left, right = stack.frames
    u = _first(left, rank, None if start is None else start.left)
    v = _first(right, rank, None if start is None else start.right)
    total = float(stack.energies.sum())
    loss = total
    for _ in range(ROUNDS):
        previous = loss
        u, _ = leading(_half(stack, left.work, right.work @ v), u)
        v, captured = leading(_half(stack, right.work, left.work @ u), v)
        loss = total - captured
        if previous - loss <= TOLERANCE * max(loss, 1e-9 * total):
            break
    return Pair(orthonormal(left.lift(u)), orthonormal(right.lift(v)))


def _first(frame: Frame, rank: int, start: Tensor | None) -> Tensor:
    """(d', columns) to begin with: the start's directions, then the leading ones of the stacked D_i, or their span."""
    columns = min(rank, frame.work.shape[1])
    # Balanced rows have squared length s_j, so rows times their length are s_j u_j: the stacked D's own factor.
    lengthened = frame.scaled(frame.work.norm(dim=1, keepdim=True))
    if start is None:
        return _principal(lengthened, columns)
    given = orthonormal(frame.lower(start))[:, :columns]
    if given.shape[1] == columns:
        return given
    return orthonormal(torch.cat([given, _principal(lengthened, columns)], dim=1))[:, :columns]


def _half(stack: Stack, rows: Tensor, fixed: Tensor) -> Callable[[Tensor], Tensor]:
    """X -> H X with H = sum_i F_i^T F_i, F_i = fixed_i^T rows_i: (R, d') rows and (R, b) other side times its basis."""
    blocks = stack.pad(fixed)

    def apply(x: Tensor) -> Tensor:
        own = blocks.to(x.dtype)
        inner = own @ (own.mT @ stack.pad(rows.to(x.dtype) @ x))
        return rows.T.to(x.dtype) @ stack.unpad(inner)

    return apply


def full_cores(stack: Stack, pair: Pair) -> tuple[Tensor, Tensor]:
    """Least-squares cores of every adapter for given bases, in factored form S_i = P_i Q_i^T.

    The bases may be rounded or not orthonormal: P_i = U^+ left_i^T and Q_i = V^+ right_i^T minimise ||D_i - U S V^T||.

    Returns:
        P (n, a, r_max) and Q (n, b, r_max), float64.
    """
    left = stack.pad((stack.left @ pair.left).double()).mT
    right = stack.pad((stack.right @ pair.right).double()).mT
    return _gram_inverse(pair.left) @ left, _gram_inverse(pair.right) @ right


def full_residuals(stack: Stack, pair: Pair, energies: Tensor) -> Tensor:
    """||D_i - U S_i V^T||^2 with the least-squares S_i and orthonormal bases, (n,); energies are ||D_i||^2 (n,)."""
    left = stack.pad(stack.left @ pair.left).double()  # (n, r, a)
    right = stack.pad(stack.right @ pair.right).double()
    captured = ((left @ left.mT) * (right @ right.mT)).sum((1, 2))
    return (energies - captured).clamp_min(0)


def _gram_inverse(columns: Tensor) -> Tensor:
    gram = columns.double().T @ columns.double()
    inverse: Tensor = torch.linalg.pinv(gram, hermitian=True)
    return inverse


def fit_diagonal(stack: Stack, rank: int, start: Pair | None = None) -> Pair:
    """Fit U (out, rank), V (in, rank) with diagonal cores by alternating least squares (JD-Diag, arXiv 2407.00066).

    From a JD-Full fit, turned by the singular vectors of its mean core; where more columns are asked for than a module
    has rows or columns, the strongest own components fill up, so that rank = sum of the ranks is lossless.
    """
    if start is None:
        start = _diagonal_start(stack, min(rank, sum(stack.ranks)))
    left, right = stack.frames
    u, v = left.lower(start.left).double(), right.lower(start.right).double()
    lw, rw = left.work.double(), right.work.double()
    lu, rv = lw @ u, rw @ v
    total = float(stack.energies.sum())
    loss = total
    for _ in range(ROUNDS):
        previous = loss
        sigma, loss = _diagonals(stack, lu, rv, u, v, total)
        if previous - loss <= TOLERANCE * max(loss, 1e-9 * total):
            break
        rows = stack.repeat_rows(sigma)
        moment = sigma.T @ sigma
        u = _unit(_normal_solve(lw.T @ (rv * rows), moment * (v.T @ v)))
        lu = lw @ u
        v = _unit(_normal_solve(rw.T @ (lu * rows), moment * (u.T @ u)))
        rv = rw @ v
    return Pair(left.lift(u).to(stack.left.dtype), right.lift(v).to(stack.left.dtype))


def _unit(columns: Tensor) -> Tensor:
    """Columns at unit length: what they lose goes to the diagonals, so that U and V stay balanced."""
    lengths: Tensor = columns.norm(dim=0).clamp_min(1e-30)
    return columns / lengths


def diagonal_cores(stack: Stack, pair: Pair) -> Tensor:
    """sigma_i = [(U^T U) o (V^T V)]^+ diag(U^T D_i V), (n, k) float64."""
    sigma, _ = _diagonals(stack, stack.left @ pair.left, stack.right @ pair.right, pair.left, pair.right, 0.0)
    return sigma


def diagonal_residuals(stack: Stack, pair: Pair, energies: Tensor) -> Tensor:
    """||D_i - U diag(sigma_i) V^T||^2 with the least-squares sigma_i, (n,)."""
    moments = _moments(stack, stack.left @ pair.left, stack.right @ pair.right)
    captured = (moments * diagonal_cores(stack, pair)).sum(1)
    return (energies - captured).clamp_min(0)


def _moments(stack: Stack, left: Tensor, right: Tensor) -> Tensor:
    """diag(U^T D_i V) from left @ U and right @ V (R, k): (n, k)."""
    return stack.pad(left.double() * right.double()).sum(1)


def _diagonals(
    stack: Stack, left: Tensor, right: Tensor, u: Tensor, v: Tensor, total: float
) -> tuple[Tensor, float]:
    moments = _moments(stack, left, right)
    gram = (u.double().T @ u.double()) * (v.double().T @ v.double())
    sigma = moments @ torch.linalg.pinv(gram, hermitian=True, rtol=1e-12)
    return sigma, total - float((moments * sigma).sum())


def _normal_solve(target: Tensor, gram: Tensor) -> Tensor:
    """target @ gram^-1 with a ridge near rounding: columns of U may be dependent (METHODS.md §2)."""
    size = gram.diagonal().mean().clamp_min(1e-300)
    solved: Tensor = torch.linalg.solve(gram + 1e-10 * size * torch.eye(len(gram)).to(gram), target.T)
    return solved.T


def _diagonal_start(stack: Stack, rank: int) -> Pair:
    both = min(rank, stack.left.shape[1], stack.right.shape[1])
    pair = fit_full(stack, both)
    p, q = full_cores(stack, pair)
    x, _, yt = torch.linalg.svd((p @ q.mT).mean(0), full_matrices=False)
    left = pair.left @ x.to(pair.left.dtype)
    right = pair.right @ yt.T.to(pair.left.dtype)
    missing = rank - left.shape[1]
    if rank == sum(stack.ranks):
        return Pair(stack.left.T, stack.right.T)  # every own component has its column: lossless
    if missing > 0:
        strongest = stack.left.norm(dim=1).argsort(descending=True, stable=True)[:missing]
        left = torch.cat([left, stack.left[strongest].T], dim=1)
        right = torch.cat([right, stack.right[strongest].T], dim=1)
    return Pair(left, right)
