"""Encoding modules as planned: shared bases, then every adapter's right rows, then its left rows for those.

The right rows are the singular vectors themselves. Their codes decode to conditional means, so what is stored has less
energy than the vector and the loss is orthogonal to it. The left rows are then solved again for the rounded right ones,

    min_U ||D_i - U^T V^||    U = (V^ V^^T)^-1 V^ D_i^T

which makes good for scales and for what rounded rows share, and are rounded in turn. What rounding will leave of row j,
d_j of its energy, is known, and what is stored of it is (1 - d_j) u_j and noise of d_j (1 - d_j) ||u_j||^2. So

    W = (V^ V^^T + diag(d_j / (1 - d_j) ||v^_j||^2))^-1 V^ D_i^T    u_j = w_j / (1 - d_j)

is best, for what lies outside of a shared basis and for what lies inside each by its own d_j. It differs where rounded
right rows nearly depend on each other: there the least squares alone would be large numbers that cancel, and their
noise would not. What is stored is this times the adapter's gain (shrinkage.py). Loadings are fitted last on each side:
to the row less its own rounded part. Several modules are encoded together, because the rows of one rate and width are:
a trellis takes as many steps for ten rows as for sixty, on a GPU as for hundreds. A module of many adapters is encoded
some adapters at a time, because the work space of a row is ten times the row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from lorazip import trellis
from lorazip.adapter import LowRank
from lorazip.codecs import Coded, Integers, codec
from lorazip.compress import encode, svd
from lorazip.compress.allocate import Module
from lorazip.compress.auto import Plan
from lorazip.compress.encode import ModuleCode
from lorazip.compress.joint import Pair
from lorazip.compress.lowrank import Stack
from lorazip.compress.profile import (
    INT8,
    RATES,
    Basis,
    loading_bits,
    remainders,
    row_codec,
    runs,
    whole_numbers,
)
from lorazip.compress.spec import Spec
from lorazip.errors import CodecError
from lorazip.terms import Form, Slot, own_slots

RIDGE = 1e-9
AT_ONCE = 2**22  # numbers of factors that are encoded together, in some 200 MB

Parts = tuple[Tensor, ...]


@dataclass(frozen=True)
class Task:
    """One module to encode: its name, the factors of the adapters that have it, the plan and `curves.directions`.

    Attributes:
        gains: (n,) what each of these adapters is multiplied by (compress/shrinkage.py).
    """

    name: str
    factors: Sequence[LowRank]
    plan: Plan
    directions: Pair
    gains: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.factors[0].B.shape[0], self.factors[0].A.shape[1]


def encode_planned(tasks: Sequence[Task], spec: Spec) -> list[ModuleCode]:
    """Encode some modules as planned: a pure function of factors, options and plans.

    Raises:
        CodecError: a value does not fit its codec.
    """
    try:
        return _encoded(tasks, spec)
    except CodecError as error:
        if len(tasks) > 1:  # one by one, to name the module
            return [code for task in tasks for code in encode_planned([task], spec)]
        raise CodecError(f"{tasks[0].name}: {error}") from error


def _encoded(tasks: Sequence[Task], spec: Spec) -> list[ModuleCode]:
    ready = [_Ready.of(task, spec) for task in tasks]
    for batch in _batches(ready):
        pieces = [_Piece.of(one, adapters) for one, adapters in batch]
        _encode([piece.right for piece in pieces], spec.dtype, unit=True)
        for piece in pieces:
            piece.left.rows = piece.solved()
        _encode([piece.left for piece in pieces], spec.dtype, unit=False)
        for piece in pieces:
            piece.finish()
    return [one.code() for one in ready]


def _batches(ready: Sequence[_Ready]) -> Iterator[list[tuple[_Ready, list[int]]]]:
    """Adapters of modules to encode together, at most AT_ONCE numbers, or one adapter."""
    batch: list[tuple[_Ready, list[int]]] = []
    filled = 0
    for one in ready:
        for i in one.coded:
            size = one.task.plan.profiles[i].rank * sum(one.task.shape)
            if batch and filled + size > AT_ONCE:
                yield batch
                batch, filled = [], 0
            if not batch or batch[-1][0] is not one:
                batch.append((one, []))
            batch[-1][1].append(i)
            filled += size
    if batch:
        yield batch


@dataclass
class _Side:
    """The rows of one side of some adapters of one module while they are encoded.

    Attributes:
        rows: (n, k, d) to be stored; rows beyond an adapter's rank are zero.
        rates: of every adapter's rows.
        loaded: (n,) which adapters have loadings on the basis.
        basis: (b, d) as it decodes; b = 0 without one.
        values: (n, k, d) what is stored decodes to.
        own: for every adapter the parts of its rows, run of equal rates by run.
        loadings: likewise the parts of its loadings, run of equal bits by run.
    """

    rows: Tensor
    rates: list[tuple[float, ...]]
    loaded: Tensor
    basis: Tensor
    values: Tensor = field(init=False)
    own: list[dict[int, Parts]] = field(init=False)
    loadings: list[list[Parts]] = field(init=False)

    def lost(self, dtype: str) -> tuple[Tensor, Tensor]:
        """What rounding will leave of the energy of every row, outside of the basis and inside: (n, k) each.

        Outside by its rate, and next to nothing at 8 bits; inside by the bits of its loadings, whose crest is about 2.
        """
        outside = remainders(torch.zeros(()), dtype)
        inside = torch.tensor([float(whole_numbers(torch.tensor(2.0), loading_bits(rate))) for rate in RATES])
        place = torch.zeros(self.rows.shape[:2], dtype=torch.long)
        for i, each in enumerate(self.rates):
            place[i, : len(each)] = torch.tensor([RATES.index(rate) for rate in each])
        return outside.to(self.rows)[place], inside.to(self.rows)[place]

    def parts(self, i: int) -> Iterator[Tensor]:
        """Of adapter i's tensors, in file order: its rows, then its loadings if it has any."""
        for _, parts in sorted(self.own[i].items()):
            yield from parts
        for parts in self.loadings[i]:
            yield from parts


@dataclass
class _Ready:
    """A module on its way.

    Attributes:
        module, loaded: by `encode.prepare`.
        shared: the parts of its shared tensors.
        bases: both as they decode, (b, out) and (b, in); b = 0 without one.
        coded: the adapters whose rows are to be rounded.
        forms, parts, residuals: of every adapter, filled in as they are encoded.
    """

    task: Task
    dtype: str
    module: Module
    loaded: Stack
    shared: tuple[Parts, ...]
    bases: tuple[Tensor, Tensor]
    coded: list[int]
    forms: list[Form]
    parts: list[Parts]
    residuals: Tensor

    @staticmethod
    def of(task: Task, spec: Spec) -> _Ready:
        module, loaded = encode.prepare(task.name, task.factors, spec)
        shared, bases = _bases(module, task)
        profiles = task.plan.profiles
        coded = [i for i, p in enumerate(profiles) if p.rank and module.energies[i] > 0]
        empty: tuple[list[Form], list[Parts]] = [()] * len(profiles), [()] * len(profiles)
        return _Ready(task, spec.dtype, module, loaded, shared, bases, coded, *empty, loaded.energies.clone())

    def code(self) -> ModuleCode:
        """The module with the errors of what is stored."""
        plan = self.task.plan
        for i, p in enumerate(plan.profiles):
            if p.original and self.module.energies[i] > 0:
                whole = svd.original(self.task.factors[i])
                slots = own_slots(whole.form, (), *self.task.shape)
                self.forms[i] = whole.form
                self.parts[i] = tuple(p for e in whole.stored(slots) for p in e)
                self.residuals[i] = 0
        layout = plan.bases.layout
        return encode.described(
            self.module, self.loaded, layout, self.shared, self.forms, self.parts, self.residuals.cpu()
        )


@dataclass
class _Piece:
    """Some adapters of a module, whose rows are rounded together.

    Attributes:
        part: their balanced rows.
        left, right: what is kept of these.
    """

    of_module: _Ready
    adapters: list[int]
    part: Stack
    left: _Side
    right: _Side

    @staticmethod
    def of(ready: _Ready, adapters: list[int]) -> _Piece:
        part = ready.module.stack.select(adapters)
        profiles = [ready.task.plan.profiles[i] for i in adapters]
        most = max(p.rank for p in profiles)
        device = part.left.device
        inside = torch.tensor([[j < p.rank for j in range(most)] for p in profiles], device=device)
        sides = []
        for side, (rows, rates) in enumerate(
            ((part.left, [p.left for p in profiles]), (part.right, [p.right for p in profiles]))
        ):
            kept = part.pad(rows)[:, :most].float() * inside[..., None]
            on = torch.tensor([p.loaded[side] for p in profiles], dtype=torch.bool, device=device)
            sides.append(_Side(kept, rates, on, ready.bases[side]))
        return _Piece(ready, adapters, part, sides[0], sides[1])

    def solved(self) -> Tensor:
        """The left rows that go best with the right ones as stored, once rounded, times the gains: (n, k, out)."""
        fixed = self.right.values.double()
        gram = fixed @ fixed.mT
        size = gram.diagonal(dim1=1, dim2=2)
        left, right = (self.part.pad(rows).double() for rows in (self.part.left, self.part.right))
        basis = self.left.basis.double()
        inverse = torch.linalg.pinv(basis @ basis.T, hermitian=True)
        inside = _loadings(left, basis, inverse, self.left.loaded) @ basis
        found = torch.zeros_like(self.left.rows)
        for rows, lost in zip((left - inside, inside), self.left.lost(self.of_module.dtype), strict=True):
            lost = lost.double().clamp_max(1 - RIDGE)
            noise = lost / (1 - lost) + RIDGE
            # A row of zeros (beyond the rank, or nothing stored) gets one on the diagonal and so a zero row.
            metric = gram + torch.diag_embed(torch.where(size > 0, noise * size, 1))
            solved = torch.linalg.solve(metric, fixed @ right.mT) @ rows
            found += (solved / (1 - lost)[..., None]).float()
        gains = self.of_module.task.gains[self.adapters]
        return found * gains.to(found)[:, None, None]

    def finish(self) -> None:
        """Hand the module what is stored of these adapters, and their residuals.

        The values of both sides came out of the codecs' own decoders while they were fitted, so that decoding the
        parts again would only repeat it.
        """
        of, k = self.of_module, self.left.values.shape[1]
        for at, i in enumerate(self.adapters):
            of.forms[i] = of.task.plan.profiles[i].form(of.task.plan.bases, of.dtype)
            of.parts[i] = tuple(part for side in (self.left, self.right) for part in side.parts(at))
        stored = Stack(
            self.left.values.flatten(0, 1), self.right.values.flatten(0, 1), (k,) * len(self.adapters)
        )
        of.residuals[self.adapters] = encode.residuals2(of.loaded.select(self.adapters), stored)


def _bases(module: Module, task: Task) -> tuple[tuple[Parts, ...], tuple[Tensor, Tensor]]:
    """The parts of the shared tensors, and both as they decode: (columns, out), (columns, in); columns 0 for none."""
    parts: list[Parts] = []
    decoded = [module.stack.left[:0], module.stack.right[:0]]
    pair, bases = task.directions, task.plan.bases
    for side, (columns, basis) in enumerate(((pair.left, bases.left), (pair.right, bases.right))):
        if basis is not None:
            parts.append(_basis(columns.to(module.stack.left.device), basis))
            slot = Slot((basis.columns, columns.shape[0]), basis.codec)
            decoded[side] = slot.decode(parts[-1]).to(module.stack.left)
    return tuple(parts), (decoded[0], decoded[1])


def _basis(columns: Tensor, basis: Basis) -> Parts:
    """Its parts: directions (d, ...) as rows of unit variance."""
    rows = columns[:, : basis.columns].T * columns.shape[0] ** 0.5
    return codec(basis.codec).encode(rows)


def _encode(sides: Sequence[_Side], dtype: str, unit: bool) -> None:
    """Round the rows of these sides, all of one rate and width together.

    Args:
        unit: rows by a trellis code have no scale: they are brought to unit variance first.
    """
    groups: dict[tuple[float, int], list[tuple[_Side, Tensor, int, slice]]] = {}
    for side in sides:
        inverse = torch.linalg.pinv(side.basis.double() @ side.basis.double().T, hermitian=True)
        apart = side.rows - _loadings(side.rows, side.basis, inverse, side.loaded) @ side.basis
        if unit:
            coded = torch.zeros(apart.shape[:2], dtype=torch.bool)
            for i, each in enumerate(side.rates):
                coded[i, : len(each)] = torch.tensor([0 < rate < INT8 for rate in each])
            size = torch.linalg.vector_norm(apart, dim=2) / apart.shape[2] ** 0.5
            size = torch.where(coded.to(size.device) & (size > 0), size, 1)[..., None]
            side.rows, apart = side.rows / size, apart / size
        side.values = torch.zeros_like(side.rows)
        side.own = [{} for _ in side.rates]
        for i, each in enumerate(side.rates):
            for rate, run in runs(each):
                groups.setdefault((rate, apart.shape[2]), []).append((side, apart, i, run))
    for (rate, _), members in groups.items():
        _round(members, row_codec(rate, dtype, unit))
    for side in sides:
        _load(side)


def _round(members: Sequence[tuple[_Side, Tensor, int, slice]], name: str) -> None:
    """Fill in values and parts of runs of rows by one codec."""
    by = codec(name)
    rows = torch.cat([apart[i, run] for _, apart, i, run in members])
    if isinstance(by, Coded) and by.rate:
        codes, scales, values = by.fitted(rows)
    elif isinstance(by, Coded):
        codes, scales, values = rows[:, :0], rows[:, 0], torch.zeros_like(rows)
    else:
        whole = by.encode(rows)
        values = by.decode(whole, rows.shape).to(rows)
    places = _places(run.stop - run.start for *_, run in members)
    parts = stored(by, codes, scales, places) if isinstance(by, Coded) else _cut(whole, len(rows), places)
    for (side, _, i, run), place, each in zip(members, places, parts, strict=True):
        side.values[i, run] = values[place]
        side.own[i][run.start] = each


def stored(by: Coded, codes: Tensor, scales: Tensor, runs: Sequence[slice]) -> list[Parts]:
    """The parts of runs of rows, codes (n, steps) and scales (n,): packed in one go where rows are whole bytes."""
    if codes.shape[1] * (trellis.RATES[by.rate][0] if by.rate else 1) % 8:
        return [by.store(codes[run], [scales[run]]) for run in runs]
    return _cut(by.store(codes, [scales]), len(codes), runs)


def _places(lengths: Iterable[int]) -> list[slice]:
    """Pieces of these lengths, one after the other."""
    return [slice(*pair) for pair in pairwise([0, *accumulate(lengths)])]


def _cut(parts: Parts, rows: int, runs: Sequence[slice]) -> list[Parts]:
    """The parts of runs of rows out of those of all rows, of which each takes as much as any other."""
    sizes = [len(part) // max(rows, 1) for part in parts]
    return [
        tuple(part[run.start * size : run.stop * size] for part, size in zip(parts, sizes, strict=True))
        for run in runs
    ]


def _loadings(rows: Tensor, basis: Tensor, inverse: Tensor, loaded: Tensor) -> Tensor:
    """(n, k, b) of least squares; zero for adapters without."""
    return ((rows @ basis.T).double() @ inverse).to(rows.dtype) * loaded[:, None, None]


def _load(side: _Side) -> None:
    """Fit loadings to what the rows as stored leave, and round them."""
    side.loadings = [[] for _ in side.rates]
    if not bool(side.loaded.any()):
        return
    inverse = torch.linalg.pinv(side.basis.double() @ side.basis.double().T, hermitian=True)
    fitted = _loadings(side.rows - side.values, side.basis, inverse, side.loaded)
    bits = [tuple(map(loading_bits, each)) for each in side.rates]
    of_row = torch.tensor([[*each, *[0] * (fitted.shape[1] - len(each))] for each in bits])
    with_loadings = side.loaded.nonzero()[:, 0].tolist()
    values, parts = torch.zeros_like(fitted), {}
    for count in sorted({b for i in with_loadings for b in bits[i]}):
        mask = (of_row == count).to(fitted.device) & side.loaded[:, None]
        some, by = fitted[mask], Integers(count)
        whole = by.encode(some)
        values[mask] = by.decode(whole, some.shape).to(values)
        # Row by row in the order of adapters; a basis has columns enough for whole bytes.
        lengths = [run.stop - run.start for i in with_loadings for own, run in runs(bits[i]) if own == count]
        parts[count] = iter(_cut(whole, len(some), _places(lengths)))
    side.values += values @ side.basis
    for i in with_loadings:
        side.loadings[i] = [next(parts[int(count)]) for count, _ in runs(bits[i])]
