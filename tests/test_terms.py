"""The one form and its decoder: every kind of core and of outer factor, against dense products."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorazip.manifest import pack_term, unpack_term
from lorazip.terms import (
    Core,
    Form,
    Own,
    Shared,
    Slot,
    Term,
    columns,
    decode,
    described,
    own_slots,
    rank,
    renumbered,
    shared_indices,
    shared_slots,
)

OUT, IN = 5, 7
LAYOUT = (
    Shared("left", 3, "float32"),
    Shared("right", 4, "float32"),
    Shared("right", 3, "float16"),
    Shared("left", 4, "float32"),
)
FULL = Term(0, Core("full", "float32"), 1)  # 3 x 4: the core goes to the right
TALL = Term(3, Core("full", "float32"), 2)  # 4 x 3: it goes to the left
DIAGONAL = Term(0, Core("diagonal", "float32"), 2)
FACTORED = Term(0, Core("factored", "float32", 2), 1)
SCALAR = Term(0, Core("scalar", value=-0.5), 2)
OWN = Term(Own(2, "float32"), Core("scalar", value=2.0), Own(2, "float32"))
OWN_LEFT = Term(Own(2, "float32"), Core("full", "float32"), 1)
OWN_RIGHT = Term(0, Core("full", "float32"), Own(2, "float32"))
OWN_FACTORED = Term(Own(3, "float32"), Core("factored", "float32", 1), Own(2, "float32"))
PART_LEFT = Term(Own(2, "float32", 3, "float32"), Core("scalar", value=3.0), Own(2, "float32"))
PART_RIGHT = Term(Own(2, "float32"), Core("full", "float32"), Own(3, "float32", 2, "float32"))
PART_BOTH = Term(
    Own(3, "float32", 0, "float32"), Core("diagonal", "float32"), Own(3, "float32", 1, "float32")
)
PART_FACTORED = Term(Own(4, "float32", 0, "float32"), Core("factored", "float32", 2), 2)
PARTS = [PART_LEFT, PART_RIGHT, PART_BOTH, PART_FACTORED]
TERMS = [FULL, TALL, DIAGONAL, FACTORED, SCALAR, OWN, OWN_LEFT, OWN_RIGHT, OWN_FACTORED, *PARTS]


def numbers(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def filled(form: Form, seed: int = 0) -> tuple[dict[int, Tensor], list[Tensor]]:
    """Random shared and own tensors of a form, as they are stored."""
    shared = {i: numbers(s.shape, seed + i) for i, s in enumerate(shared_slots(LAYOUT, OUT, IN))}
    slots = own_slots(form, LAYOUT, OUT, IN)
    return shared, [numbers(s.shape, seed + 100 + i) for i, s in enumerate(slots)]


def dense(form: Form, shared: dict[int, Tensor], own: list[Tensor]) -> Tensor:
    """sum_t L C R^T written out: stored in file order left, core, right; outer factors one column a row, X then Y."""
    rest = [t.double() for t in own]

    def outer(side: int | Own) -> Tensor:
        if isinstance(side, int):
            return shared[side].double()
        rows = rest.pop(0)
        return rows if side.basis is None else rows + rest.pop(0) @ shared[side.basis].double()

    total = torch.zeros(OUT, IN, dtype=torch.float64)
    for term in form:
        left = outer(term.left)
        core: Any
        match term.core.kind:
            case "full":
                core = rest.pop(0)
            case "diagonal":
                core = torch.diag(rest.pop(0))
            case "factored":
                core = rest.pop(0).T @ rest.pop(0)
            case "scalar":
                core = term.core.value * torch.eye(len(left), dtype=torch.float64)
        right = outer(term.right)
        total += left.T @ core @ right
    assert not rest
    return total


@given(st.lists(st.sampled_from(TERMS), max_size=4), st.integers(0, 1000))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_every_sum_of_terms_is_decoded(terms: list[Term], seed: int) -> None:
    form = tuple(terms)
    shared, own = filled(form, seed)
    used = {i: shared[i] for i in shared_indices(form)}  # the decoder needs no others
    b, a = decode(form, used, own, OUT, IN)
    assert b.shape == (OUT, rank(form, LAYOUT)) and a.shape == (rank(form, LAYOUT), IN)
    assert b.dtype == a.dtype == torch.float32
    assert torch.allclose(b.double() @ a.double(), dense(form, shared, own), atol=1e-4)


@pytest.mark.parametrize("term", TERMS)
def test_every_kind_of_term_alone(term: Term) -> None:
    shared, own = filled((term,))
    b, a = decode((term,), shared, own, OUT, IN)
    assert torch.allclose(b.double() @ a.double(), dense((term,), shared, own), atol=1e-5)


def test_the_empty_form_is_zero() -> None:
    b, a = decode((), {}, [], OUT, IN)
    assert b.shape == (OUT, 0) and a.shape == (0, IN) and rank((), LAYOUT) == 0
    assert not (b @ a).any() and (b @ a).shape == (OUT, IN)


@pytest.mark.parametrize(
    ("term", "shapes"),
    [
        (FULL, [(3, 4)]),
        (DIAGONAL, [(3,)]),
        (FACTORED, [(2, 3), (2, 4)]),
        (SCALAR, []),
        (OWN, [(2, OUT), (2, IN)]),
        (OWN_LEFT, [(2, OUT), (2, 4)]),
        (OWN_RIGHT, [(3, 2), (2, IN)]),
        (OWN_FACTORED, [(3, OUT), (1, 3), (1, 2), (2, IN)]),
        (PART_LEFT, [(2, OUT), (2, 4), (2, IN)]),
        (PART_RIGHT, [(2, OUT), (2, 3), (3, IN), (3, 3)]),
        (PART_BOTH, [(3, OUT), (3, 3), (3,), (3, IN), (3, 4)]),
        (PART_FACTORED, [(4, OUT), (4, 3), (2, 4), (2, 3)]),
    ],
)
def test_own_tensors_lie_in_file_order(term: Term, shapes: list[tuple[int, ...]]) -> None:
    assert [slot.shape for slot in own_slots((term,), LAYOUT, OUT, IN)] == shapes
    both = own_slots((term, term), LAYOUT, OUT, IN)
    assert [slot.shape for slot in both] == shapes * 2


def test_shared_tensors_lie_one_column_a_row() -> None:
    assert [s.shape for s in shared_slots(LAYOUT, OUT, IN)] == [(3, OUT), (4, IN), (3, IN), (4, OUT)]
    assert [s.codec for s in shared_slots(LAYOUT, OUT, IN)] == ["float32", "float32", "float16", "float32"]


def test_the_rank_of_a_form_is_that_of_its_narrowest_factors() -> None:
    assert [rank((term,), LAYOUT) for term in TERMS] == [3, 3, 3, 2, 3, 2, 2, 2, 1, 2, 2, 3, 2]
    assert columns(OWN_FACTORED, LAYOUT) == (3, 2) and columns(FULL, LAYOUT) == (3, 4)
    assert rank((FULL, OWN), LAYOUT) == 5


def test_shared_indices_are_found_and_renumbered() -> None:
    form = (TALL, OWN_LEFT, OWN, FULL)
    assert shared_indices(form) == [0, 1, 2, 3] and shared_indices((OWN,)) == []
    moved = renumbered((TALL, OWN_LEFT), {3: 0, 2: 1, 1: 5})
    assert moved == (Term(0, TALL.core, 1), Term(OWN_LEFT.left, OWN_LEFT.core, 5))
    assert shared_indices((PART_LEFT,)) == [3] and shared_indices((PART_BOTH, PART_RIGHT)) == [0, 1, 2]
    assert renumbered((PART_BOTH, OWN), {0: 7, 1: 4}) == (
        Term(Own(3, "float32", 7, "float32"), PART_BOTH.core, Own(3, "float32", 4, "float32")),
        OWN,
    )


def test_a_side_in_part_shared_is_its_own_rows_and_loadings_on_the_shared_ones() -> None:
    """The formula with numbers: x + S y."""
    shared = {0: torch.tensor([[1.0, 0, 0], [0, 1, 0]])}
    form = (Term(Own(1, "float32", 0, "float32"), Core("scalar", value=2.0), Own(1, "float32")),)
    own = [torch.tensor([[0.0, 0, 5]]), torch.tensor([[3.0, -4]]), torch.tensor([[1.0, 10]])]
    b, a = decode(form, shared, own, 3, 2)
    assert (b @ a).tolist() == [[6, 60], [-8, -80], [10, 100]]


def test_the_codecs_of_rows_and_loadings_are_kept_apart() -> None:
    slots = own_slots((Term(Own(2, "tcq1", 0, "int4"), Core("scalar"), Own(2, "tcq2u")),), LAYOUT, OUT, IN)
    assert slots == [Slot((2, OUT), "tcq1"), Slot((2, 3), "int4"), Slot((2, IN), "tcq2u")]


@pytest.mark.parametrize("term", TERMS)
def test_terms_come_back_from_json(term: Term) -> None:
    packed = json.loads(json.dumps(pack_term(term)))
    assert unpack_term(packed) == term
    sides = [(packed[0], term.left), (packed[2], term.right)]
    for written, side in sides:
        if isinstance(side, Own):
            assert len(written) == (2 if side.basis is None else 4)


def test_forms_are_described_in_a_few_words() -> None:
    assert described(()) == "nothing"
    assert described((OWN,)) == "rank 2 float32"
    assert described((FULL,)) == "core full float32" and described((SCALAR,)) == "core scalar"
    assert described((FULL, OWN)) == "core full float32 + rank 2 float32"
    assert described((PART_LEFT,)) == "rank 2 float32 on shared L"
    assert described((PART_BOTH,)) == "rank 3 float32 on shared L and R"
    mixed = Term(Own(3, "tcq4*2+tcq2"), Core("scalar"), Own(3, "float16*1+tcq3u", 0, "int4"))
    assert described((mixed,)) == "rank 3 tcq/float16 on shared R"


@pytest.mark.parametrize("codec", ["float32", "float16", "bfloat16"])
def test_a_slot_encodes_and_decodes_by_its_codec(codec: str) -> None:
    slot = Slot((3, 4), codec)
    tensor = numbers((3, 4), 0)
    parts = slot.encode(tensor)
    assert (
        sum(p.nbytes for p in slot.parts())
        == sum(p.nbytes for p in parts)
        == 12 * (4 if codec == "float32" else 2)
    )
    assert torch.allclose(slot.decode(parts), tensor, rtol=2**-8)
    with pytest.raises(AssertionError):
        slot.encode(tensor.T)
