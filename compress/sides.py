"""Encoding one module as planned: shared bases, then every adapter's right rows, then its left rows for those.

The right rows are the singular vectors themselves. Their codes decode to conditional means, so what is stored has less
energy than the vector and the loss is orthogonal to it. The left rows are then solved again for the rounded right ones,

    min_U ||D_i - U^T V^||    U = (V^ V^^T)^-1 V^ D_i^T

which makes good for scales and for what rounded rows share, and are rounded in turn. Loadings are fitted last on each
side: to the row less its own rounded part. Rows of one rate of all adapters are encoded together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorazip import quantized
from lorazip.adapter import LowRank
from lorazip.codecs import Coded, Integers, codec
from lorazip.compress import curves, encode, svd
from lorazip.compress.allocate import Module
from lorazip.compress.auto import Plan
from lorazip.compress.encode import ModuleCode
from lorazip.compress.lowrank import Stack
from lorazip.compress.profile import INT8, Basis, Profile, loading_bits, row_codec, runs
from lorazip.compress.spec import Spec
from lorazip.compress.svd import OwnFactors
from lorazip.errors import CodecError
from lorazip.terms import Slot

RIDGE = 1e-9

Parts = tuple[Tensor, ...]


def encode_planned(name: str, factors: Sequence[LowRank], spec: Spec, plan: Plan) -> ModuleCode:
    """Encode one module as planned: a pure function of the factors, the options and the plan.

    Raises:
        CodecError: a value does not fit its codec.
    """
    module, loaded = encode.prepare(name, factors, spec)
    try:
        shared, bases = _bases(module, plan)
        own = [OwnFactors((), ())] * len(plan.profiles)
        coded = [i for i, p in enumerate(plan.profiles) if p.rank and module.energies[i] > 0]
        for i, p in enumerate(plan.profiles):
            if p.original and module.energies[i] > 0:
                own[i] = svd.original(factors[i])
        if coded:
            profiles = [plan.profiles[i] for i in coded]
            stored = _rows(module.stack.select(coded), profiles, bases, spec.dtype)
            for i, p, (left, right) in zip(coded, profiles, stored, strict=True):
                own[i] = OwnFactors(p.form(plan.bases, spec.dtype), (), parts=(*left, *right))
        return encode.measured(module, loaded, plan.bases.layout, shared, own)
    except CodecError as error:
        raise CodecError(f"{name}: {error}") from error


def _bases(module: Module, plan: Plan) -> tuple[tuple[Parts, ...], tuple[Tensor | None, Tensor | None]]:
    """The parts of the shared tensors, and both as they decode: (columns, out) and (columns, in), or None."""
    parts: list[Parts] = []
    decoded: list[Tensor | None] = [None, None]
    if plan.bases.layout:
        pair = curves.directions(module)
        for side, (columns, basis) in enumerate(
            ((pair.left, plan.bases.left), (pair.right, plan.bases.right))
        ):
            if basis is not None:
                parts.append(_basis(columns, basis))
                slot = Slot((basis.columns, columns.shape[0]), basis.codec)
                decoded[side] = slot.decode(parts[-1]).to(columns)
    return tuple(parts), (decoded[0], decoded[1])


def _basis(columns: Tensor, basis: Basis) -> Parts:
    """Its parts: directions (d, ...) as rows of unit variance."""
    rows = columns[:, : basis.columns].T * columns.shape[0] ** 0.5
    return codec(basis.codec).encode(rows)


@dataclass
class _Side:
    """The rows of one side of some adapters while they are encoded.

    Attributes:
        rows: (n, k, d) to be stored; rows beyond an adapter's rank are zero.
        values: (n, k, d) what is stored decodes to.
        own: for every adapter the parts of its rows, run of equal rates by run.
        loadings: likewise the parts of its loadings.
    """

    rows: Tensor
    values: Tensor = field(init=False)
    own: list[list[Parts]] = field(init=False)
    loadings: list[list[Parts]] = field(init=False)

    def __post_init__(self) -> None:
        self.values = torch.zeros_like(self.rows)
        self.own = [[] for _ in self.rows]
        self.loadings = [[] for _ in self.rows]

    def parts(self, i: int) -> list[Parts]:
        """Of adapter i's tensors: its rows, then its loadings if there are any."""
        tensors = [self.own[i], self.loadings[i]]
        return [tuple(p for parts in tensor for p in parts) for tensor in tensors if tensor]


def _rows(
    stack: Stack, profiles: Sequence[Profile], bases: tuple[Tensor | None, Tensor | None], dtype: str
) -> list[tuple[list[Parts], list[Parts]]]:
    """The parts of the left and of the right tensors of every adapter."""
    most = max(p.rank for p in profiles)
    left, right = stack.pad(stack.left).float(), stack.pad(stack.right).float()
    inside = torch.tensor([[j < p.rank for j in range(most)] for p in profiles], device=left.device)[..., None]
    second = _Side(right[:, :most] * inside)
    _encode(second, [p.right for p in profiles], [p.loaded[1] for p in profiles], bases[1], dtype, unit=True)
    fixed = second.values.double()
    gram = fixed @ fixed.mT
    size = gram.diagonal(dim1=1, dim2=2)
    # A row of zeros (beyond the rank, or nothing stored) gets one on the diagonal and so a zero row.
    gram = gram + torch.diag_embed(torch.where(size > 0, RIDGE * size, 1))
    solved = torch.linalg.solve(gram, fixed @ right.double().mT) @ left.double()
    first = _Side(solved.float())
    _encode(first, [p.left for p in profiles], [p.loaded[0] for p in profiles], bases[0], dtype, unit=False)
    return [(first.parts(i), second.parts(i)) for i in range(len(profiles))]


def _encode(
    side: _Side,
    rates: Sequence[tuple[float, ...]],
    loaded: Sequence[bool],
    basis: Tensor | None,
    dtype: str,
    unit: bool,
) -> None:
    """Round the rows of one side, all of one rate at a time.

    Args:
        rates: of every adapter's rows.
        loaded: which adapters have loadings on the basis (columns, d).
        unit: rows by a trellis code have no scale: they are brought to unit variance first.
    """
    if basis is None:
        basis = side.rows.new_zeros(0, side.rows.shape[2])
    inverse = torch.linalg.pinv(basis.double() @ basis.double().T, hermitian=True)
    groups: dict[tuple[float, bool], list[tuple[int, slice]]] = {}
    for i, each in enumerate(rates):
        for rate, run in runs(each):
            groups.setdefault((rate, loaded[i]), []).append((i, run))
    done: dict[tuple[int, int], Parts] = {}
    shape = *side.rows.shape[:2], len(basis)
    loadings, scales = side.rows.new_zeros(shape), side.rows.new_zeros(shape[:2])
    for (rate, on), members in groups.items():
        rows = torch.cat([side.rows[i, run] for i, run in members])
        values, own, rest = _round(rows, rate, dtype, unit, given=(basis, inverse) if on else None)
        at = 0
        for i, run in members:
            end = at + run.stop - run.start
            side.values[i, run] = values[at:end]
            done[i, run.start] = own(at, end)
            if rest is not None:
                loadings[i, run], scales[i, run] = rest[0][at:end], rest[1][at:end]
            at = end
    for i, start in sorted(done):
        side.own[i].append(done[i, start])
    for i, each in enumerate(rates):
        for bits, run in runs(tuple(map(loading_bits, each))) if loaded[i] else ():
            side.loadings[i].append(Integers(bits).store(loadings[i, run], [scales[i, run]]))


Store = Callable[[int, int], Parts]  # first row, end -> the parts of a run


def _round(
    rows: Tensor, rate: float, dtype: str, unit: bool, given: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Store, tuple[Tensor, Tensor] | None]:
    """Rows (m, d) of one rate.

    Args:
        given: the basis (b, d) and the inverse of its Gram matrix (b, b).

    Returns:
        what they decode to; what is stored of a run of them; and levels (m, b) and scales (m,) of their loadings.
    """
    apart = rows
    if given is not None:
        apart = rows - _loadings(rows, *given) @ given[0]
    if unit and 0 < rate < INT8:
        size = torch.linalg.vector_norm(apart, dim=1, keepdim=True) / apart.shape[1] ** 0.5
        size = torch.where(size > 0, size, 1)
        rows, apart = rows / size, apart / size
    values, own = _stored(apart, row_codec(rate, dtype, unit))
    if given is None:
        return values, own, None
    fitted, bits = _loadings(rows - values, *given), loading_bits(rate)
    scales = quantized.best_scales(fitted, bits)
    levels = quantized.levels(fitted, scales[:, None], bits)
    return values + (levels * scales[:, None]) @ given[0], own, (levels, scales)


def _loadings(rows: Tensor, basis: Tensor, inverse: Tensor) -> Tensor:
    """(m, b) of least squares."""
    return ((rows @ basis.T).double() @ inverse).to(rows.dtype)


def _stored(rows: Tensor, name: str) -> tuple[Tensor, Store]:
    """What rows decode to, and their parts, run by run."""
    by = codec(name)
    if not isinstance(by, Coded):
        values = by.decode(by.encode(rows), rows.shape).to(rows)
        return values, lambda at, end: by.encode(rows[at:end])
    if not by.rate:
        return torch.zeros_like(rows), lambda at, end: by.store(rows[:0, :0], [])
    codes, scales, values = by.fitted(rows)
    return values, lambda at, end: by.store(codes[at:end], [scales[at:end]])
