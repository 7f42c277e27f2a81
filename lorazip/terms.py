"""The one form of everything stored, and its only decoder.

    D_i = sum_t L_t C_t R_t^T

per adapter i and module. L (out, a) and R (in, b) are shared by several adapters, or the adapter's own, or in part
both: an own matrix plus own loadings on shared columns. C (a, b) is full, diagonal, a product of two thin factors, or a
number (1 for the identity). Every method of compression only encodes into this form; reading a bundle needs this file
and nothing of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lorazip.codecs import Part, codec

Side = Literal["left", "right"]
CoreKind = Literal["full", "diagonal", "factored", "scalar"]


@dataclass(frozen=True)
class Shared:
    """A tensor of a module that several adapters refer to by its index: (out, columns) or (in, columns)."""

    side: Side
    columns: int
    codec: str


@dataclass(frozen=True)
class Own:
    """An outer factor that belongs to one adapter: (out, columns) or (in, columns).

    With a basis it is X + S Y: X own, S (out or in, c) the shared tensor of that index, Y (c, columns) own loadings.
    """

    columns: int
    codec: str
    basis: int | None = None
    loadings: str = ""  # their codec


@dataclass(frozen=True)
class Core:
    """C (a, b): full (a, b); diagonal (a,); factored P (a, rank) times Q (b, rank)^T; scalar value times identity."""

    kind: CoreKind
    codec: str = ""
    rank: int = 0
    value: float = 1.0


@dataclass(frozen=True)
class Term:
    """L C R^T; an int is an index into the module's shared tensors."""

    left: int | Own
    core: Core
    right: int | Own


Form = tuple[Term, ...]  # () is D = 0
Layout = tuple[Shared, ...]  # the shared tensors of one module


@dataclass(frozen=True)
class Slot:
    """One stored tensor: its shape as stored and its codec. Outer factors are stored transposed, one column a row."""

    shape: tuple[int, ...]
    codec: str

    def parts(self) -> tuple[Part, ...]:
        return codec(self.codec).parts(self.shape)

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        return codec(self.codec).decode(parts, self.shape)

    def encode(self, tensor: Tensor) -> tuple[Tensor, ...]:
        assert tuple(tensor.shape) == self.shape, (tuple(tensor.shape), self.shape)
        return codec(self.codec).encode(tensor)


def shared_slots(layout: Layout, out: int, in_: int) -> list[Slot]:
    """The stored tensors behind a module's layout, in file order."""
    return [Slot((s.columns, out if s.side == "left" else in_), s.codec) for s in layout]


def own_slots(form: Form, layout: Layout, out: int, in_: int) -> list[Slot]:
    """The adapter's own stored tensors of one module, in file order: term by term, left, core, right."""
    return [slot for term in form for slot in _term_slots(term, layout, out, in_)]


def _term_slots(term: Term, layout: Layout, out: int, in_: int) -> Iterator[Slot]:
    a, b = columns(term, layout)
    if isinstance(term.left, Own):
        yield from _outer_slots(term.left, layout, out)
    match term.core.kind:
        case "full":
            yield Slot((a, b), term.core.codec)
        case "diagonal":
            yield Slot((a,), term.core.codec)
        case "factored":
            yield Slot((term.core.rank, a), term.core.codec)
            yield Slot((term.core.rank, b), term.core.codec)
        case "scalar":
            yield from ()
    if isinstance(term.right, Own):
        yield from _outer_slots(term.right, layout, in_)


def _outer_slots(own: Own, layout: Layout, width: int) -> Iterator[Slot]:
    yield Slot((own.columns, width), own.codec)
    if own.basis is not None:
        yield Slot((own.columns, layout[own.basis].columns), own.loadings)


def columns(term: Term, layout: Layout) -> tuple[int, int]:
    """Columns a of L and b of R."""
    left = term.left.columns if isinstance(term.left, Own) else layout[term.left].columns
    right = term.right.columns if isinstance(term.right, Own) else layout[term.right].columns
    return left, right


def rank(form: Form, layout: Layout) -> int:
    """Columns of the product factors that `decode` returns."""
    return sum(
        term.core.rank if term.core.kind == "factored" else min(columns(term, layout)) for term in form
    )


def described(form: Form) -> str:
    """A few words for how an adapter stores a module: "rank 2 int3", "core full int4", "nothing"."""
    words = []
    for term in form:
        if isinstance(term.left, Own) and isinstance(term.right, Own):
            shared = [side for side, own in (("L", term.left), ("R", term.right)) if own.basis is not None]
            # Of a trellis code the rates differ from row to row: they would make hundreds of kinds.
            codecs = dict.fromkeys(
                re.sub(r"tcq[0-9.]+u?|\*[0-9]+", lambda m: "tcq" if m[0][0] == "t" else "", name)
                for own in (term.left, term.right)
                for name in (own.codec.split("+") if "tcq" in own.codec else [own.codec])
            )
            words.append(
                f"rank {min(term.left.columns, term.right.columns)} {'/'.join(codecs)}"
                + (f" on shared {' and '.join(shared)}" if shared else "")
            )
        else:
            words.append(f"core {term.core.kind} {term.core.codec}".strip())
    return " + ".join(words) or "nothing"


def shared_indices(form: Form) -> list[int]:
    """The module's shared tensors that a form refers to, sorted."""
    sides = [side for term in form for side in (term.left, term.right)]
    indices = {side.basis if isinstance(side, Own) else side for side in sides}
    return sorted(index for index in indices if index is not None)


def renumbered(form: Form, place: Mapping[int, int]) -> Form:
    """The form with its shared indices renumbered."""

    def side(factor: int | Own) -> int | Own:
        if isinstance(factor, int):
            return place[factor]
        return factor if factor.basis is None else replace(factor, basis=place[factor.basis])

    return tuple(Term(side(t.left), t.core, side(t.right)) for t in form)


def decode(
    form: Form, shared: Mapping[int, Tensor], own: Sequence[Tensor], out: int, in_: int
) -> tuple[Tensor, Tensor]:
    """Product factors of one adapter's module: D = B A.

    Args:
        form: the adapter's terms for this module.
        shared: the module's decoded shared tensors by index (those that the form refers to), as stored:
            (columns, out) or (columns, in), float32.
        own: the adapter's decoded own tensors in the order of `own_slots`, float32.

    Returns:
        B (out, r) and A (r, in), float32, r = `rank(form, layout)`; r = 0 for the empty form.
    """
    tensors = iter(own)
    lefts, rights = [torch.zeros(0, out)], [torch.zeros(0, in_)]
    for term in form:
        left = _outer(term.left, shared, tensors)  # (a, out)
        core = [next(tensors) for _ in range({"factored": 2, "scalar": 0}.get(term.core.kind, 1))]
        right = _outer(term.right, shared, tensors)  # (b, in)
        match term.core.kind:
            case "full" if core[0].shape[0] <= core[0].shape[1]:
                right = core[0] @ right
            case "full":
                left = core[0].T @ left
            case "diagonal":
                right = core[0][:, None] * right
            case "factored":
                left, right = core[0] @ left, core[1] @ right
            case "scalar":
                left = left * term.core.value
        lefts.append(left)
        rights.append(right)
    device = lefts[-1].device
    return torch.cat([x.to(device) for x in lefts]).T, torch.cat([x.to(device) for x in rights])


def _outer(side: int | Own, shared: Mapping[int, Tensor], own: Iterator[Tensor]) -> Tensor:
    """L^T or R^T as stored."""
    if isinstance(side, int):
        return shared[side]
    rows = next(own)
    if side.basis is None:
        return rows
    basis = shared[side.basis]
    return rows.to(basis.device) + next(own).to(basis.device) @ basis
