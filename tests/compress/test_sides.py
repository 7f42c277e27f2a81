"""What is encoded as planned, read by the second reader of docs/FORMAT.md and measured densely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import reader
from handmade import MakeAdapter
from hypothesis import given
from hypothesis import strategies as st
from planned import task
from reference import dense, modules, related, steady, unimodular
from torch import Tensor

from lorazip import Bundle, trellis
from lorazip.adapter import LowRank
from lorazip.codecs import Coded
from lorazip.compress import job, sides
from lorazip.compress.auto import Plan
from lorazip.compress.encode import ModuleCode
from lorazip.compress.profile import (
    INT8,
    NOTHING,
    ORIGINAL,
    RATES,
    WHOLE,
    Bases,
    Basis,
    Profile,
    crest,
    remainders,
)
from lorazip.compress.sides import encode_planned
from lorazip.compress.spec import Spec
from lorazip.errors import CodecError
from lorazip.manifest import pack_term
from lorazip.sources import open_adapters

SPEC = Spec(ratio=4.0, device="cpu")
BOTH = Bases(Basis(4, 3), Basis(4, 2))
EVERY = [Bases(), Bases(None, BOTH.right), Bases(BOTH.left, None), BOTH]


@dataclass(frozen=True)
class Parts:
    """Parts of tensors as the streams of a file, for the second reader."""

    parts: Sequence[Tensor]

    def stream(self, dtype: str) -> Any:
        kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}
        found = [part.float().numpy() for part in self.parts if part.dtype == kinds[dtype]]
        return np.concatenate(found) if found else np.zeros(0, np.float32)


def decoded(code: ModuleCode, out: int, in_: int) -> Tensor:
    """All D^ (n, out, in), float64, by the second reader."""
    cursor = reader.Cursor(Parts([part for parts in code.shared for part in parts]))  # type: ignore[arg-type]
    layout = [[s.side, s.columns, s.codec] for s in code.layout]
    shared = [cursor.take(name, columns, out if side == "left" else in_) for side, columns, name in layout]
    cursor.finish()
    found = []
    for form, parts in zip(code.forms, code.own, strict=True):
        cursor = reader.Cursor(Parts(parts))  # type: ignore[arg-type]
        terms = [reader.product(pack_term(t), shared, layout, out, in_, cursor) for t in form]
        cursor.finish()
        found.append(torch.from_numpy(sum(terms, np.zeros((out, in_)))))
    return torch.stack(found)


def encoded(factors: Sequence[LowRank], bases: Bases, profiles: Sequence[Profile]) -> ModuleCode:
    (code,) = encode_planned([task("m", factors, Plan(bases, tuple(profiles)))], SPEC)
    return code


def assert_measured(code: ModuleCode, factors: Sequence[LowRank]) -> None:
    """Residuals and energies are those of the dense matrices, but for the rounding of float32 factors."""
    matrices = torch.stack([dense(f) for f in factors])
    found = (decoded(code, *matrices.shape[1:]) - matrices).square().sum((1, 2)).sqrt()
    norms = matrices.square().sum((1, 2)).sqrt()
    assert torch.allclose(code.energies.sqrt(), norms, rtol=1e-6)
    assert bool(((code.residuals.sqrt() - found).abs() <= 2e-6 * norms).all()), (code.residuals.sqrt(), found)


# --- what is stored is what was measured ------------------------------------------------------------------------------


@st.composite
def plans(draw: Any, factors: Sequence[LowRank], bases: Bases) -> list[Profile]:
    """A profile for every adapter that it can take."""
    found = []
    for factor in factors:
        kind = draw(st.sampled_from(["coded"] * 6 + ["nothing", "original"]))
        if kind != "coded":
            found.append(NOTHING if kind == "nothing" else ORIGINAL)
            continue
        count = draw(st.integers(1, factor.A.shape[0]))
        sides = [tuple(draw(st.sampled_from(RATES)) for _ in range(count)) for _ in range(2)]
        on = [bool(basis) and draw(st.booleans()) for basis in (bases.left, bases.right)]
        found.append(Profile(sides[0], sides[1], (on[0], on[1])))
    return found


@steady
@given(st.data(), modules())
def test_any_profile_of_any_module_is_stored_as_measured(data: st.DataObject, factors: list[LowRank]) -> None:
    """Modules narrower than a block, adapters of zeros, copies, ranks beyond the width, odd scales."""
    profiles = data.draw(plans(factors, Bases()))
    code = encoded(factors, Bases(), profiles)
    assert_measured(code, factors)
    for profile, form, energy in zip(profiles, code.forms, code.energies, strict=True):
        assert bool(form) == (float(energy) > 0 and (profile.original or profile.rank > 0))


@steady
@given(st.data(), st.integers(0, 10_000), st.sampled_from(EVERY), st.sampled_from([(70, 45), (64, 129)]))
def test_sides_on_shared_bases_are_stored_as_measured(
    data: st.DataObject, seed: int, bases: Bases, shape: tuple[int, int]
) -> None:
    """Widths that no block and no step of two divides."""
    factors = related((4, 1, 3, 6, 4, 2, 5), *shape, seed=seed)
    code = encoded(factors, bases, data.draw(plans(factors, bases)))
    assert code.layout == bases.layout
    assert_measured(code, factors)


def test_loadings_take_what_lies_in_the_basis() -> None:
    """Adapters whose right sides all lie in four directions lose nothing of them with loadings and rows of nothing."""
    random = torch.Generator().manual_seed(0)
    four = torch.randn(4, 200, generator=random)
    factors = [
        LowRank(torch.randn(30, 3, generator=random), torch.randn(3, 4, generator=random) @ four, 1.0)
        for _ in range(8)
    ]
    bases = Bases(None, Basis(4, 4))
    loaded, bare = (
        encoded(factors, bases, [Profile((INT8,) * 3, (0.0,) * 3, (False, on))] * 8) for on in (True, False)
    )
    assert float((loaded.residuals / loaded.energies).max()) < 0.02
    assert float((bare.residuals / bare.energies).min()) == 1
    assert_measured(loaded, factors)


def test_loadings_take_the_noise_inside_the_basis_off() -> None:
    """They are fitted after the row is rounded: what is lost in a quarter of all directions is hardly in those."""
    factors = related((4,) * 16, 100, 64, noise=1.0)
    bases = Bases(None, Basis(16, 4))
    code = encoded(factors, bases, [Profile((WHOLE,) * 4, (0.5,) * 4, (False, True))] * 16)
    cursor = reader.Cursor(Parts(code.shared[0]))  # type: ignore[arg-type]
    inside = torch.linalg.qr(torch.from_numpy(cursor.take(code.layout[0].codec, 16, 64)).T).Q
    lost = torch.stack([dense(f) for f in factors]) - decoded(code, 100, 64)
    assert float((lost @ inside).square().sum() / lost.square().sum()) < 0.05
    assert float(lost.square().sum() / code.energies.sum()) > 0.1


def test_right_rows_that_depend_on_each_other_do_no_harm() -> None:
    """Five rows almost in four directions, of four of them nothing but that.

    Left rows by least squares alone would be large numbers that cancel, and half a bit of each would not.
    """
    random = torch.Generator().manual_seed(0)
    four = torch.randn(4, 200, generator=random)
    factors = [
        LowRank(
            torch.randn(60, 5, generator=random),
            torch.randn(5, 4, generator=random) @ four + 0.3 * torch.randn(5, 200, generator=random),
            1.0,
        )
        for _ in range(12)
    ]
    profile = Profile((1.5, 1.5, 1.0, 0.5, 0.5), (1.5, 0.0, 0.0, 0.0, 0.0), (False, True))
    fewer = Profile((1.5, 1.5, 1.0, 0.5), (1.5, 0.0, 0.0, 0.0), (False, True))
    five, three = (encoded(factors, Bases(None, Basis(4, 4)), [one] * 12) for one in (profile, fewer))
    assert_measured(five, factors)
    assert float((five.residuals / three.residuals).max()) < 1.1
    assert float((five.residuals / five.energies).max()) < 0.5


def test_left_rows_of_nothing_but_loadings_are_the_nearest() -> None:
    """What lies outside of their basis is not noise: there least squares on it is best, by the dense formula."""
    factors = related((4,) * 12, 100, 64, planted=4, noise=1.0)
    bases = Bases(Basis(4, 4), Basis(4, 4))
    code = encoded(factors, bases, [Profile((0.0,) * 4, (0.0,) * 4, (True, True))] * 12)
    assert_measured(code, factors)
    cursor = reader.Cursor(Parts([part for parts in code.shared for part in parts]))  # type: ignore[arg-type]
    sides = [
        torch.from_numpy(cursor.take(s.codec, 4, width))
        for s, width in zip(code.layout, (100, 64), strict=True)
    ]
    left, right = (torch.linalg.qr(rows.T).Q for rows in sides)
    for factor, found in zip(factors, decoded(code, 100, 64), strict=True):
        d = dense(factor)
        best = (d - left @ (left.T @ d @ right) @ right.T).square().sum()
        assert float((found - d).square().sum() / best) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("at_once", [1, 1500])
def test_many_adapters_are_encoded_some_at_a_time_and_none_notices(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    tasks, ranks = [], (4, 3, 5, 4, 2, 1)
    for seed, (name, shape) in enumerate({"a": (70, 45), "b": (45, 70)}.items()):
        factors = related(ranks, *shape, seed=seed)
        profiles = (
            Profile((2.0, 1.5), (1.0, 3.0), (True, True)), Profile((INT8, 4.0, 2.0), (WHOLE, 3.0, 0.0)), NOTHING,
            Profile((4.0,), (2.0,)), ORIGINAL, Profile((1.0,), (2.0,), (False, True)),
        )  # fmt: skip
        tasks.append(task(name, factors, Plan(BOTH, profiles)))
    whole = encode_planned(tasks, SPEC)
    monkeypatch.setattr(sides, "AT_ONCE", at_once)
    ready = [sides._Ready.of(one, SPEC) for one in tasks]
    batches = list(sides._batches(ready))
    assert [(one.task.name, i) for batch in batches for one, some in batch for i in some] == [
        (name, i) for name in "ab" for i in (0, 1, 3, 5)
    ]
    # Ranks 2, 3, 1 and 1 of 115 numbers: all of one module, and all but one of the other.
    assert [sum(len(some) for _, some in batch) for batch in batches] == ([1] * 8 if at_once == 1 else [7, 1])
    for together, apart in zip(whole, encode_planned(tasks, SPEC), strict=True):
        assert apart.forms == together.forms and apart.layout == together.layout
        assert torch.allclose(apart.residuals, together.residuals, rtol=1e-3)
        for parts, same in zip(apart.own, together.own, strict=True):
            assert [(p.dtype, p.shape) for p in parts] == [(p.dtype, p.shape) for p in same]


@pytest.mark.parametrize("width", [64, 45, 1])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("rate", trellis.RATES)
def test_runs_of_rows_are_stored_as_they_are_alone(rate: float, scaled: bool, width: int) -> None:
    by = Coded(rate, scaled)
    codes, scales, _ = by.fitted(torch.randn(9, width, generator=torch.Generator().manual_seed(width)))
    runs = [slice(0, 1), slice(1, 4), slice(4, 9)]
    for parts, run in zip(sides.stored(by, codes, scales, runs), runs, strict=True):
        alone = by.store(codes[run], [scales[run]])
        assert len(parts) == len(alone) == 2
        assert all(torch.equal(one, two) for one, two in zip(parts, alone, strict=True))
        assert [p.nbytes for p in parts] == [p.nbytes for p in by.parts((run.stop - run.start, width))]


def test_full_rates_give_the_original_but_for_the_rounding_of_the_type() -> None:
    """Half precision rounds a number by at most 2^-11 of it (bfloat16 2^-9), float32 by 2^-24."""
    factors = related((4, 3, 5), 70, 45)
    full = [Profile((WHOLE,) * f.A.shape[0], (WHOLE,) * f.A.shape[0]) for f in factors]
    for dtype, step in (("float16", 2**-11), ("bfloat16", 2**-9), ("float32", 2**-24)):
        (code,) = encode_planned([task("m", factors, Plan(Bases(), tuple(full)))], replace(SPEC, dtype=dtype))
        assert float((code.residuals / code.energies).sqrt().max()) < 2 * step
        assert_measured(code, factors)


def test_an_original_is_kept_bit_for_bit() -> None:
    factors = related((4, 3), 70, 45, dtype=torch.bfloat16, scale=0.7)
    code = encoded(factors, Bases(), [ORIGINAL] * 2)
    assert code.residuals.tolist() == [0, 0]
    for factor, parts in zip(factors, code.own, strict=True):
        assert torch.equal(parts[0], factor.B.T.flatten()) and torch.equal(parts[1], factor.A.flatten())


def test_more_bits_leave_less_and_nearly_what_is_foreseen() -> None:
    """Long rows, so that the codes reach what they do on average; both sides of one adapter at one rate."""
    factors = related((4,) * 4, 512, 640, noise=1.0)
    found = [torch.linalg.svd(dense(f), full_matrices=False) for f in factors]
    left, right = (
        remainders(crest(torch.cat(rows)).mean(), "float16")
        for rows in ([svd.U.T[:4] for svd in found], [svd.Vh[:4] for svd in found])
    )
    lost = []
    for rate in RATES[1:-1]:
        code = encoded(factors, Bases(), [Profile((rate,) * 4, (rate,) * 4)] * 4)
        share = code.residuals / code.energies
        lost.append(float(share.mean()))
        one, two = (float(side[RATES.index(rate)]) for side in (left, right))
        assert lost[-1] == pytest.approx(1 - (1 - one) * (1 - two * (1 - 4 / 640)), rel=0.05)
    assert lost == sorted(lost, reverse=True)


@pytest.mark.parametrize("strength", [1e-6, 1e4])
def test_strength_changes_nothing(strength: float) -> None:
    """Scales of rows hold any strength: a factor leaves the shares of the error as they are."""
    factors = related((4, 3, 5, 4, 4), 70, 45)
    strong = [replace(f, B=f.B * strength) for f in factors]
    profiles = [
        Profile((2.0,) * 3, (1.5, 1.5, 0.0), (True, True)),
        Profile((INT8,) * 2, (4.0,) * 2),
        Profile((0.5,), (3.0,), (False, True)),
        NOTHING,
        ORIGINAL,
    ]
    one, two = encoded(factors, BOTH, profiles), encoded(strong, BOTH, profiles)
    assert two.forms == one.forms
    assert torch.allclose(two.residuals / two.energies, one.residuals / one.energies, rtol=0.02)
    assert_measured(two, strong)


def test_gauge_and_order_change_errors_only_by_rounding() -> None:
    """A singular vector may change its sign, and so its codes: long rows lose nearly the same either way."""
    factors = related((4, 3, 4, 5, 4, 2), 640, 512)
    profiles = [Profile((2.0,) * 2, (1.0,) * 2, (False, on)) for on in (True, False) * 3]
    code = encoded(factors, BOTH, profiles)
    turned = []
    for i, f in enumerate(factors):
        gauge, inverse = unimodular(f.A.shape[0], i, size=1)
        turned.append(replace(f, B=(f.B.double() @ gauge).float(), A=(inverse @ f.A.double()).float()))
    order = [3, 0, 5, 1, 4, 2]
    other = encoded([turned[i] for i in order], BOTH, [profiles[i] for i in order])
    assert torch.allclose(other.residuals, code.residuals[order], rtol=0.03)
    assert float(other.residuals.sum()) == pytest.approx(float(code.residuals.sum()), rel=0.01)


def test_modules_together_are_those_alone() -> None:
    """Rows of several modules are rounded in one go; none sees the others."""
    shapes = {"a": (70, 45), "b": (45, 70), "c": (64, 45)}
    tasks = []
    for seed, (name, shape) in enumerate(shapes.items()):
        factors = related((4, 3, 4, 5, 4), *shape, seed=seed)
        profiles = (Profile((2.0, 1.5), (1.0, 3.0), (True, True)), *[Profile((4.0,), (2.0,))] * 3, ORIGINAL)
        tasks.append(task(name, factors, Plan(BOTH, profiles)))
    for one, code in zip(tasks, encode_planned(tasks, SPEC), strict=True):
        (alone,) = encode_planned([one], SPEC)
        assert alone.forms == code.forms
        assert torch.allclose(alone.residuals, code.residuals, rtol=1e-3)
        for one, two in zip((*alone.shared, *alone.own), (*code.shared, *code.own), strict=True):
            assert [p.shape for p in one] == [p.shape for p in two]


# --- bundles ----------------------------------------------------------------------------------------------------------


ODD = {"a.q_proj": (70, 130), "b.narrow": (9, 33), "c.thin": (1, 5)}


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of ranks 1 to 7, tiny and huge, without modules, with zeros; three from one random A."""
    make = MakeAdapter(tmp_path_factory.mktemp("odd"))
    for i, name in enumerate(("ant", "bee", "cat")):
        make(f"zoo/{name}", modules=ODD, rank=4, seed=i, a_seed=99)
    make("zoo/elk", modules=ODD, rank={"a.q_proj": 7, "b.narrow": 5, "c.thin": 1}, dtype=torch.bfloat16)
    make("zoo/fox", modules={"b.narrow": ODD["b.narrow"]}, rank=1)
    make("zoo/gnu", modules=ODD, alpha=8e-6)
    make("zoo/hen", modules=ODD, alpha=8e4, rank=2)
    zero = {f"base_model.model.{m}.lora_B.weight": torch.zeros(out, 3) for m, (out, _) in ODD.items()}
    make("zoo/ibis", modules=ODD, rank=3, tensors=zero)
    one = {"base_model.model.a.q_proj.lora_B.weight": torch.zeros(70, 4)}
    return make("zoo/jay", modules=ODD, tensors=one).parent


@pytest.mark.parametrize("options", [{"max_error": 0.3}, {"max_error": 1e-3}, {"ratio": 2.0}], ids=str)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_bundle_holds_what_it_says_for_both_readers(
    odd: Path, tmp_path: Path, options: dict[str, Any], dtype: str
) -> None:
    outcome = job.run([odd], Spec(**options, dtype=dtype, device="cpu"), tmp_path / "b")
    assert outcome.bundle is not None and outcome.bundle.verify() == []
    bundle, other = Bundle.open(tmp_path / "b"), reader.Bundle(tmp_path / "b")
    for i, original in enumerate(open_adapters([str(odd)]).adapters):
        found, stored = other.matrices(original.name), bundle.adapter(original.name)
        assert set(found) == set(stored.modules) == set(original.modules)
        residual = energy = 0.0
        for module in original.modules:
            d = dense(original.low_rank(module))
            d_hat = torch.from_numpy(found[module])
            ours = dense(stored.low_rank(module))
            assert float((ours - d_hat).norm()) <= 1e-6 * float(d.norm())
            residual += float((d_hat - d).square().sum())
            energy += float(d.square().sum())
        expected = residual / energy if energy else residual
        for said in (stored.record.error, float(outcome.adapter_errors[i])):
            assert abs(sqrt(said) - sqrt(expected)) <= 1e-6
        if "max_error" in options:
            assert expected <= options["max_error"]
    assert job.run([odd], Spec(**options, dtype=dtype, device="cpu"), None).predicted


def test_values_that_the_type_cannot_hold_are_named() -> None:
    """Of several modules that are encoded together; nothing else of them is at fault."""
    fine, high = related((4, 3), 70, 45), related((4, 3), 45, 70, scale=1e15)
    plan = Plan(Bases(), (Profile((WHOLE,), (WHOLE,)),) * 2)
    with pytest.raises(CodecError, match=r"b\.k_proj: a value of .* does not fit F16 \(use --dtype"):
        encode_planned([task("a.q_proj", fine, plan), task("b.k_proj", high, plan)], SPEC)
    encode_planned([task("b.k_proj", high, plan)], replace(SPEC, dtype="bfloat16"))
