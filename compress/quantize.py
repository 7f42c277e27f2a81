"""Rounding that knows the product: few bits for factors so that D stays near, not the factors (docs/QUANTIZATION.md).

    min ||L^T R - L^^T R^||_F    over L^, R^ of few bits

Factors are fixed only up to a gauge, and rounding one leaves the other free. Four things follow, all of which pay:
1. gauge: balanced singular rows are turned by an orthogonal matrix whose entries all have the same size. Then every row
   carries the same energy, which one number of bits serves best: (sum s)^2 / r instead of sum s^2.
2. least squares: once one factor is rounded, the other is solved again for the whole D.
3. feedback: in the metric H = R^ R^^T of the fixed factor, the error of each rounded row moves to the rows that are
   left (Babai's nearest plane; GPTQ, arXiv 2210.17323, and QuIP's LDLQ, 2307.13304, do this along the input dimension).
   Turned rows are strongly correlated in H, so this is where most of the gain lies.
4. sweeps: each row is rounded again with all the others fixed, which never raises the error.
Repeated a few times from the last rounding; the best round is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import pi

import torch
from torch import Tensor

from lorazip import quantized
from lorazip.codecs import Integers, Mixed, codec
from lorazip.compress import joint
from lorazip.compress.frame import CHUNK_ELEMENTS
from lorazip.compress.joint import Pair
from lorazip.compress.lowrank import Stack
from lorazip.terms import CoreKind

ROUNDS = 3
SWEEPS = 2
RIDGE = 1e-9  # of the mean of a metric's diagonal


@dataclass(frozen=True)
class Rounded:
    """n tensors of one shape (k, d) as a codec of integers holds them.

    Attributes:
        codec: its name.
        levels: (n, k, d) odd numbers, float32.
        scales: for each of the k rows (n, groups).
    """

    codec: str
    levels: Tensor
    scales: tuple[Tensor, ...]

    @property
    def values(self) -> Tensor:
        """(n, k, d) float32."""
        pairs = zip(pieces(self.codec, len(self.scales)), self.scales, strict=True)
        width = self.levels.shape[2]
        rows = [quantized.spread(s, c.group if c.group > 0 else width, width) for (c, _), s in pairs]
        return self.levels * torch.stack(rows, 1)

    def parts(self, i: int) -> tuple[Tensor, ...]:
        """What is stored of tensor i."""
        found: tuple[Tensor, ...] = ()
        for c, first, count in runs(self.codec, len(self.scales)):
            rows = slice(first, first + count)
            found += c.store(self.levels[i][rows], [s[i] for s in self.scales[rows]])
        return found

    def where(self, mask: Tensor, other: Rounded) -> Rounded:
        """This one where the mask (n,) says so, else the other."""
        scales = zip(self.scales, other.scales, strict=True)
        return Rounded(
            self.codec,
            torch.where(mask[:, None, None], self.levels, other.levels),
            tuple(torch.where(mask[:, None], s, o) for s, o in scales),
        )

    @staticmethod
    def cat(several: Sequence[Rounded]) -> Rounded:
        """All their tensors, in order."""
        scales = zip(*(r.scales for r in several), strict=True)
        return replace(
            several[0],
            levels=torch.cat([r.levels for r in several]),
            scales=tuple(torch.cat(row) for row in scales),
        )


def runs(name: str, rows: int) -> list[tuple[Integers, int, int]]:
    """The codecs of a tensor of so many rows, each with its first row and their number (0 behind the last row)."""
    found: list[tuple[Integers, int, int]] = []
    rest, at = codec(name), 0
    while isinstance(rest, Mixed):
        count = min(rest.count, rows - at)
        assert isinstance(rest.first, Integers), name
        found.append((rest.first, at, count))
        rest, at = rest.rest, at + count
    assert isinstance(rest, Integers), name
    return [*found, (rest, at, rows - at)]


def pieces(name: str, rows: int) -> list[tuple[Integers, int]]:
    """For each of a tensor's rows its codec, and the first row that has the same one."""
    return [(c, first) for c, first, count in runs(name, rows) for _ in range(count)]


def gauge(name: str, rows: int) -> Tensor:
    """An orthogonal (rows, rows) that spreads energy evenly over the rows of each codec, float64."""
    starts = [start for _, start in pieces(name, rows)]
    turn = torch.zeros(rows, rows, dtype=torch.float64)
    for start in dict.fromkeys(starts):
        end = start + starts.count(start)
        turn[start:end, start:end] = _flat(end - start)
    return turn


def _flat(size: int) -> Tensor:
    """Hadamard's matrix where the size is a power of two, else the cosine transform, whose entries differ little."""
    if size & (size - 1) == 0:
        matrix: Tensor = torch.ones(1, 1, dtype=torch.float64)
        while len(matrix) < size:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        matrix /= size**0.5
        return matrix
    row = torch.arange(size, dtype=torch.float64)
    cosines: Tensor = torch.cos(pi / size * (row[None] + 0.5) * row[:, None]) * (2 / size) ** 0.5
    cosines[0] /= 2**0.5
    return cosines


def rounded(target: Tensor, metric: Tensor, name: str) -> Rounded:
    """Round T to Q so that tr((T - Q)^T H (T - Q)) is small.

    Row j is rounded after the errors of the rows before it moved to it: the best T' of the rest for fixed errors E is
    T + H_rr^-1 H_rf E. Then every row is rounded again, SWEEPS times, for the others as they are.

    Args:
        target: T (n, k, d).
        metric: H (n, k, k), positive semidefinite.
        name: a codec of integers.
    """
    codecs = pieces(name, target.shape[1])
    target = target.float()
    width = target.shape[2]
    metric = _ridged(metric.double())
    error = torch.zeros_like(target)
    levels: list[Tensor] = []
    scales: list[Tensor] = []

    def take(j: int, row: Tensor, near: Tensor | None) -> None:
        c, first = codecs[j]
        if c.group == -1:
            if near is None and j == first:
                same = [i for i, (_, start) in enumerate(codecs) if start == first]
                near = quantized.best_scales(target[:, same].flatten(1), c.bits)[:, None]
            scale = scales[first] if near is None else near
        else:
            scale = quantized.scales_of(row, c.bits, c.group or width, near)
        spread = quantized.spread(scale, c.group if c.group > 0 else width, width)
        level = quantized.levels(row, spread, c.bits)
        levels[j : j + 1], scales[j : j + 1] = [level], [scale]
        error[:, j] = target[:, j] - level * spread

    for j in range(len(codecs)):
        row = target[:, j]
        if j:
            moved = torch.linalg.solve(metric[:, j:, j:], metric[:, j:, :j])[:, :1]  # (n, 1, j)
            row = row + (moved.to(row.dtype) @ error[:, :j])[:, 0]
        take(j, row, None)
    shares = (metric / metric.diagonal(dim1=1, dim2=2)[:, :, None]).float()  # H_jk / H_jj
    for _ in range(SWEEPS if len(codecs) > 1 else 0):
        for j in range(len(codecs)):
            row = target[:, j] - error[:, j] + (shares[:, j : j + 1] @ error)[:, 0]
            take(j, row, scales[j])
    return Rounded(name, torch.stack(levels, 1), tuple(scales))


def _ridged(metric: Tensor) -> Tensor:
    size = metric.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-200)
    eye = torch.eye(metric.shape[1], dtype=metric.dtype, device=metric.device)
    return metric + RIDGE * size[:, None, None] * eye


def product(left: Tensor, right: Tensor, rank: int, names: tuple[str, str]) -> tuple[Rounded, Rounded]:
    """Round the leading `rank` rows of balanced factors so that their product is near all of left^T right.

    Args:
        left, right: (n, r, out), (n, r, in).
        names: codecs of the left and of the right factor.
    """
    step = max(1, CHUNK_ELEMENTS // (left.shape[1] * (left.shape[2] + right.shape[2])))
    chunks = zip(torch.split(left, step), torch.split(right, step), strict=True)
    lefts, rights = zip(*(_product(a, b, rank, names) for a, b in chunks), strict=True)
    return Rounded.cat(lefts), Rounded.cat(rights)


def _product(left: Tensor, right: Tensor, rank: int, names: tuple[str, str]) -> tuple[Rounded, Rounded]:
    left, right = left.float(), right.float()
    turn = gauge(names[0], rank).to(left)
    moving = turn @ right[:, :rank]
    grams = _gram(left, left), _gram(right, right)
    energy = (grams[0] * grams[1]).sum((1, 2))
    best: tuple[Tensor, Rounded, Rounded] | None = None
    for _ in range(ROUNDS):
        one = rounded(*_solved(moving, right, left), names[0])
        two = rounded(*_solved(one.values, left, right), names[1])
        moving = two.values
        cross = (_gram(one.values, left) * _gram(moving, right)).sum((1, 2))
        own = (_gram(one.values, one.values) * _gram(moving, moving)).sum((1, 2))
        error = energy - 2 * cross + own
        if best is None:
            best = error, one, two
        else:
            better = error < best[0]
            best = torch.minimum(error, best[0]), one.where(better, best[1]), two.where(better, best[2])
    assert best is not None
    return best[1:]


def _gram(one: Tensor, two: Tensor) -> Tensor:
    return one.double() @ two.double().mT


def _solved(fixed: Tensor, beside: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """argmin_X ||other^T beside - X^T fixed||, (n, k, d), and its metric fixed fixed^T (n, k, k)."""
    metric = _gram(fixed, fixed)
    mix = torch.linalg.solve(_ridged(metric), _gram(fixed, beside))
    return mix.to(other.dtype) @ other, metric


def bases(
    stack: Stack,
    weights: Tensor,
    pair: Pair,
    core: CoreKind,
    names: tuple[str, str],
    core_name: str | None = None,
    refit: bool = True,
) -> tuple[Rounded, Rounded]:
    """Round the shared bases of some adapters so that sum_i w_i ||D_i - U^ C_i V^^T||^2 is small.

    As for `product`: gauge (where cores are full: they take any), least squares over all adapters, feedback in the
    metric sum_i w_i C_i V^^T V^ C_i^T. Cores are fitted again in every round, and rounded as they will
    be, so that the bases make good for that.

    Args:
        stack: balanced adapters.
        weights: (n,).
        pair: U (out, a), V (in, b).
        core_name: codec of full cores if it is one of integers.
        refit: solve for the bases again; else only their rounding is chosen by the metric, and they stay what they are.
    """
    if core == "scalar":  # all have the same matrix
        return product(pair.left.T[None], pair.right.T[None], pair.left.shape[1], names)
    u, v = pair.left.T, pair.right.T
    if core == "full":
        u, v = (gauge(n, len(x)).to(x) @ x for n, x in zip(names, (u, v), strict=True))
    flipped = Stack(stack.right, stack.left, stack.ranks, stack.known)
    best: tuple[float, Rounded, Rounded] | None = None
    given = u[None], v[None]
    fitted = _cores(stack, u, v, core, None)
    for _ in range(ROUNDS):
        target, metric = _side(stack, weights, v, fitted, core)
        one = rounded(target if refit else given[0], metric, names[0])
        u = one.values[0]
        target, metric = _side(flipped, weights, u, fitted[::-1], core)
        two = rounded(target if refit else given[1], metric, names[1])
        v = two.values[0]
        fitted = _cores(stack, u, v, core, core_name)
        loss = float((weights * _residuals(stack, u, v, fitted, core)).sum())
        if best is None or loss < best[0]:
            best = loss, one, two
    assert best is not None
    return best[1:]


def _cores(stack: Stack, u: Tensor, v: Tensor, kind: CoreKind, name: str | None) -> tuple[Tensor, Tensor]:
    """The cores of bases u (a, out), v (b, in) as P (n, a, r) Q (n, b, r)^T; diagonal ones as P (n, a, 1) and ones."""
    pair = Pair(u.T, v.T)
    if kind == "diagonal":
        sigma = joint.diagonal_cores(stack, pair)[..., None]
        return sigma, torch.ones_like(sigma)
    p, q = joint.full_cores(stack, pair)
    if name is None:
        return p, q
    (_, a, rank), b = p.shape, q.shape[1]
    if rank * (a + b) < a * b:
        left, right = product(p.mT, q.mT, rank, (name, name))
        return left.values.mT.double(), right.values.mT.double()
    eye = torch.eye(b, dtype=p.dtype, device=p.device).expand(len(p), b, b)
    return cores(p @ q.mT, u, name).values.double(), eye


def cores(full: Tensor, u: Tensor, name: str) -> Rounded:
    """Round cores (n, a, b) in the metric of the left basis u (a, out)."""
    metric = (u.double() @ u.double().T).expand(len(full), -1, -1)
    return rounded(full, metric, name)


def _side(
    stack: Stack, weights: Tensor, v: Tensor, fitted: tuple[Tensor, Tensor], core: CoreKind
) -> tuple[Tensor, Tensor]:
    """The best other basis (1, a, out) for v (b, in) and cores P_i Q_i^T, and its metric (1, a, a).

    With C_i = P_i Q_i^T: H = sum_i w_i C_i V^T V C_i^T and H^-1 sum_i w_i C_i V^T D_i^T.
    """
    p, q = fitted
    along = (stack.right @ v.T).double()  # (R, b): every row of an adapter on V
    gram = v.double() @ v.double().T
    if core == "diagonal":
        sigma = (p * q)[..., 0]
        metric = (sigma.T @ (weights[:, None] * sigma)) * gram
        mix = along * stack.repeat_rows(weights[:, None] * sigma)
    else:
        heavy = p * weights[:, None, None]
        metric = (heavy @ (q.mT @ gram @ q) @ p.mT).sum(0)
        mix = stack.unpad((heavy @ (q.mT @ stack.pad(along).mT)).mT)  # (R, a)
    solved = torch.linalg.solve(_ridged(metric[None])[0], mix.T)
    return (solved.to(stack.left.dtype) @ stack.left)[None], metric[None]


def _residuals(stack: Stack, u: Tensor, v: Tensor, fitted: tuple[Tensor, Tensor], core: CoreKind) -> Tensor:
    """||D_i - U P_i Q_i^T V^T||^2, (n,)."""
    p, q = fitted
    grams = u.double() @ u.double().T, v.double() @ v.double().T
    left, right = (stack.left @ u.T).double(), (stack.right @ v.T).double()
    if core == "diagonal":
        sigma = (p * q)[..., 0]
        cross = (stack.pad(left * right).sum(1) * sigma).sum(1)
        own = ((sigma @ (grams[0] * grams[1])) * sigma).sum(1)
    else:
        cross = ((stack.pad(left) @ p) * (stack.pad(right) @ q)).sum((1, 2))
        own = ((p.mT @ grams[0] @ p) * (q.mT @ grams[1] @ q)).sum((1, 2))
    return (stack.energies - 2 * cross + own).clamp_min(0)
