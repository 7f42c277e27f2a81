"""Profiles become forms; what a form takes is counted here by the lengths that docs/FORMAT.md gives."""

from __future__ import annotations

from functools import cache
from itertools import groupby, pairwise
from math import ceil
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planned import task
from reference import related, stacked, steady, zoo

from lorazip import quantized, trellis
from lorazip.codecs import MAX_NAME, Mixed, codec
from lorazip.compress import pricing, profile
from lorazip.compress.auto import Plan
from lorazip.compress.curves import Curve
from lorazip.compress.joint import Pair
from lorazip.compress.profile import (
    INT8,
    NOTHING,
    RATES,
    WHOLE,
    Bases,
    Basis,
    Profile,
    loading_bits,
)
from lorazip.compress.sides import encode_planned
from lorazip.compress.spec import Spec
from lorazip.terms import Core, Own, own_slots, rank

SIZES = {"float16": 2, "bfloat16": 2, "float32": 4}
OUT, IN = 70, 45
NONE = Pair(torch.zeros(OUT, 0), torch.zeros(IN, 0))
BOTH = Bases(Basis(8, 3), Basis(4, 2))
EVERY = [Bases(), Bases(None, BOTH.right), Bases(BOTH.left, None), BOTH]


@st.composite
def profiles(draw: Any, bases: Bases | None = None, most: int = 5) -> Profile:
    """Any profile that a module with these bases can take."""
    count = draw(st.integers(1, most))
    sides = [tuple(draw(st.lists(st.sampled_from(RATES), min_size=count, max_size=count))) for _ in range(2)]
    there = (bases.left, bases.right) if bases else (1, 1)
    loaded = tuple(bool(basis) and draw(st.booleans()) for basis in there)
    return Profile(sides[0], sides[1], (loaded[0], loaded[1]))


def row_bits(rate: float, width: int, dtype: str, unit: bool) -> tuple[int, int]:
    """Bits of the codes of one row, and bytes that stand beside them: FORMAT.md, "Codecs"."""
    if rate == WHOLE:
        return 0, SIZES[dtype] * width
    if rate == INT8:
        return 8 * width, 2
    if rate == 0:
        return 0, 0
    k, v = trellis.RATES[rate]
    return ceil(width / v) * k, 0 if unit else 2


def side_bytes(rates: tuple[float, ...], width: int, dtype: str, unit: bool, columns: int) -> int:
    """Codes of equal rows are packed together, and so are loadings of equal bits."""
    total = 0
    for rate, same in groupby(rates):
        count = len(list(same))
        bits, beside = row_bits(rate, width, dtype, unit)
        total += ceil(count * bits / 8) + count * beside
    if columns:
        for bits, same in groupby(map(loading_bits, rates)):
            count = len(list(same))
            total += ceil(count * columns * bits / 8) + 2 * count
    return total


# One adapter of rank 5; bytes depend on nothing but its shape.
CURVE = Curve(
    (0,), (OUT, IN), torch.ones(1, 5), (5,), torch.ones(1), (torch.zeros(1, 5, 2),) * 2, NONE,
    (torch.ones(1, 5, 3),) * 2, (torch.ones(1, 5, 2),) * 2,
)  # fmt: skip


def counted(one: Profile, bases: Bases, dtype: str) -> int:
    left = bases.left.columns if bases.left and one.loaded[0] else 0
    right = bases.right.columns if bases.right and one.loaded[1] else 0
    return side_bytes(one.left, OUT, dtype, False, left) + side_bytes(one.right, IN, dtype, True, right)


@steady
@given(st.data(), st.sampled_from(EVERY), st.sampled_from(list(SIZES)))
def test_a_form_takes_what_the_format_says(data: st.DataObject, bases: Bases, dtype: str) -> None:
    one = data.draw(profiles(bases))
    form = one.form(bases, dtype)
    slots = own_slots(form, bases.layout, OUT, IN)
    assert sum(part.nbytes for slot in slots for part in slot.parts()) == counted(one, bases, dtype)
    assert rank(form, bases.layout) == one.rank


@steady
@given(st.data(), st.sampled_from(EVERY), st.sampled_from(list(SIZES)))
def test_prices_are_never_less_than_the_bytes_and_hardly_more(
    data: st.DataObject, bases: Bases, dtype: str
) -> None:
    """A row is priced alone: where rows share their last byte, it costs less."""
    one = data.draw(profiles(bases))
    priced = 0.0
    for side, rates in enumerate((one.left, one.right)):
        basis = (bases.left, bases.right)[side] if one.loaded[side] else None
        table = pricing.side_bytes(CURVE, side, basis, dtype)
        priced += sum(float(table[RATES.index(rate)]) for rate in rates)
    true = counted(one, bases, dtype)
    runs = sum(len(list(groupby(rates))) for rates in (one.left, one.right))
    # Less than a byte for every row of codes and every row of loadings beyond the first of a run.
    assert true <= priced <= true + 2 * (2 * one.rank - runs) * 7 / 8


def test_bytes_of_shared_bases_are_those_of_the_format() -> None:
    for bases in EVERY:
        expected = sum(
            ceil(basis.columns * row_bits(basis.rate, width, "float16", True)[0] / 8)
            for basis, width in ((bases.left, OUT), (bases.right, IN))
            if basis is not None
        )
        assert pricing.basis_bytes(CURVE, bases) == expected
        assert [s.side for s in bases.layout] == ["left"] * bool(bases.left) + ["right"] * bool(bases.right)


def test_loadings_refer_to_the_bases_that_are_there() -> None:
    own = Profile((2.0, 1.0), (3.0, 0.0), (True, True)).form(BOTH, "float16")
    (term,) = own
    assert term.core == Core("scalar")
    assert term.left == Own(2, "tcq2*1+tcq1", 0, "int6*1+int4")
    assert term.right == Own(2, "tcq3u*1+tcq0", 1, "int6*1+int4")
    (term,) = Profile((2.0,), (3.0,), (False, True)).form(EVERY[1], "float16")
    assert term.left == Own(1, "tcq2") and term.right == Own(1, "tcq3u", 0, "int6")
    (term,) = Profile((WHOLE,), (INT8,)).form(BOTH, "bfloat16")
    assert term.left == Own(1, "bfloat16") and term.right == Own(1, "int8")
    assert NOTHING.form(BOTH, "float16") == ()


@steady
@given(st.lists(st.sampled_from(RATES), min_size=1, max_size=60), st.sampled_from(list(SIZES)), st.booleans())
def test_mixtures_name_the_codec_of_every_row(rates: list[float], dtype: str, unit: bool) -> None:
    """Unfolded again, each row has its own codec; runs tells where each begins and ends."""
    name = profile.mixture(profile.row_codec(rate, dtype, unit) for rate in rates)
    unfolded: list[str] = []
    for piece in name.split("+"):
        single, _, count = piece.partition("*")
        unfolded += [single] * (int(count) if count else len(rates) - len(unfolded))
    assert unfolded == [profile.row_codec(rate, dtype, unit) for rate in rates]
    pieces = list(profile.runs(tuple(rates)))
    assert [rate for rate, run in pieces for _ in range(run.start, run.stop)] == rates
    assert all(one[1].stop == two[1].start for one, two in pairwise(pieces))
    if len(name) <= MAX_NAME:
        assert isinstance(codec(name), Mixed) == (len(pieces) > 1)


@steady
@given(st.lists(st.tuples(*[st.sampled_from(RATES)] * 2), min_size=1, max_size=40), st.sampled_from(EVERY))
def test_what_is_nameable_has_codecs_that_every_reader_takes(
    rates: list[tuple[float, float]], bases: Bases
) -> None:
    left, right = zip(*rates, strict=True)
    one = Profile(left, right, (bases.left is not None, bases.right is not None))
    names = [
        name
        for dtype in SIZES
        for term in one.form(bases, dtype)
        for side in (term.left, term.right)
        if isinstance(side, Own)
        for name in (side.codec, side.loadings)
        if name
    ]
    if one.nameable:
        assert all(codec(name) and len(name) <= MAX_NAME for name in names)
    else:  # nothing is refused that is far from too long
        assert max(map(len, names)) > MAX_NAME - 2 * len(rates) - len("bfloat16")


def test_rates_that_change_at_every_row_are_not_nameable_for_ever() -> None:
    def mixed(count: int) -> Profile:
        return Profile((1.5, 2.5) * count, (WHOLE,) * 2 * count)

    assert mixed(2).nameable and Profile((1.5,) * 500, (2.5,) * 500).nameable
    assert not mixed(40).nameable


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("rate", RATES)
def test_what_is_left_of_a_normal_row_is_what_prices_say(rate: float, dtype: str) -> None:
    """Rows of normally distributed numbers through the codec alone."""
    rows = torch.randn(64, 576, generator=torch.Generator().manual_seed(1))
    known = float(profile.remainders(profile.crest(rows).mean(), dtype)[RATES.index(rate)])
    for unit in (False, True):
        by = codec(profile.row_codec(rate, dtype, unit))
        decoded = by.decode(by.encode(rows), rows.shape)
        left = float((decoded - rows).square().sum() / rows.square().sum())
        assert left == pytest.approx(known, rel=0.04)


@pytest.mark.parametrize("width", [192, 576, 4096])
def test_what_eight_bits_leave_goes_by_the_largest_number(width: int) -> None:
    """Row by row: normal ones, flat ones, and some with one number that is far larger than the others."""
    random = torch.Generator().manual_seed(width)
    normal, flat = torch.randn(40, width, generator=random), torch.rand(40, width, generator=random) - 0.5
    odd = torch.randn(40, width, generator=random)
    odd[:, 3] = torch.linspace(8, 40, 40)
    for rows in (normal, flat, odd):
        decoded = codec("int8").decode(codec("int8").encode(rows), rows.shape)
        left = (decoded - rows).square().sum(1) / rows.square().sum(1)
        foreseen = profile.whole_numbers(profile.crest(rows), 8)
        assert torch.allclose(left, foreseen, rtol=0.25)
        assert float(left.mean()) == pytest.approx(float(foreseen.mean()), rel=0.04)


@pytest.mark.parametrize("basis", profile.TWICE)
@pytest.mark.parametrize("rate", RATES[1:-2])
def test_what_is_left_of_the_rounding_error_of_a_basis(rate: float, basis: float) -> None:
    """Coded again, it loses more than other rows, by a few numbers that are large: priced with caution."""
    ratios = []
    for width in (576, 2048):
        rows = torch.randn(96, width, generator=torch.Generator().manual_seed(width))
        by = codec(f"tcq{trellis.name(basis)}u")
        rows = rows - by.decode(by.encode(rows), rows.shape)
        rows /= rows.square().mean(1, keepdim=True).sqrt()
        by = codec(f"tcq{trellis.name(rate)}u")
        left = (by.decode(by.encode(rows), rows.shape) - rows).square().sum() / rows.square().sum()
        ratios.append(float(left) / trellis.DISTORTION[rate])
    assert 0.9 < (1 + profile.TWICE[basis].get(rate, 0.0)) / (sum(ratios) / 2) < 1.4


def test_more_bits_leave_less() -> None:
    left = profile.remainders(torch.tensor([9.0, 20.0]), "float16").tolist()
    assert list(RATES) == sorted(RATES) and all(each == sorted(each, reverse=True) for each in left)
    known = [float(profile.whole_numbers(torch.tensor(2.0), bits)) for bits in (4, 6, 8)]
    assert known == sorted(known, reverse=True)
    assert {loading_bits(rate) for rate in RATES} == {4, 6, 8}


@cache
def unit_rows(side: int) -> torch.Tensor:
    """Singular vectors of twelve adapters on the directions that they have in common, the strongest last, densely."""
    matrices = stacked(zoo("15.q_proj"))
    rows = [torch.linalg.svd(d, full_matrices=False) for d in matrices]
    unit = torch.cat([r.U.T[:8] if side == 0 else r.Vh[:8] for r in rows])
    spread = sum((d @ d.T if side == 0 else d.T @ d) for d in matrices)
    return (unit @ torch.linalg.eigh(spread).eigenvectors).float()


@pytest.mark.parametrize("columns", [4, 8, 16, 32])
@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("side", [0, 1])
def test_loadings_of_real_adapters_lose_what_prices_say(bits: int, side: int, columns: int) -> None:
    """Within a quarter: what loadings lose is a small part of what is lost."""
    loadings = unit_rows(side)[:, -columns:]
    scales = quantized.best_scales(loadings, bits)[:, None]
    lost = (loadings - quantized.levels(loadings, scales, bits) * scales).square().sum(1)
    foreseen = profile.whole_numbers(profile.crest(loadings) * (1 - 1 / columns), bits)
    energy = loadings.square().sum(1)
    assert float(lost.sum()) == pytest.approx(float(foreseen @ energy), rel=0.25)


def test_the_priced_bytes_are_those_of_what_is_encoded() -> None:
    """End to end: parts of real encodings, all adapters of a module on different profiles."""
    factors = related((5, 4, 5, 3, 5, 5, 5), OUT, IN)
    chosen = (
        Profile((4.0, 2.0, 2.0), (2.0, 2.0, 0.5), (True, False)),
        Profile((INT8, 1.0), (WHOLE, 3.0), (False, True)),
        Profile((0.5,) * 5, (0.0,) * 5, (False, True)),
        Profile((1.5,), (2.5,), (True, True)),
        *[NOTHING] * 3,
    )
    (code,) = encode_planned([task("m", factors, Plan(BOTH, chosen))], Spec(ratio=4.0, device="cpu"))
    assert [sum(p.nbytes for p in parts) for parts in code.own] == [
        counted(p, BOTH, "float16") for p in chosen
    ]
    assert sum(p.nbytes for parts in code.shared for p in parts) == sum(
        ceil(b.columns * w * b.rate / 8) for b, w in ((BOTH.left, OUT), (BOTH.right, IN)) if b
    )
