"""Bounds on the error of a module's adapters: kept by all, at the least rank, by fallbacks where bases cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from encoded import DTYPES, JOINT, METHODS, measured, spec
from hypothesis import given
from hypothesis import strategies as st
from reference import dense, errors, modules, nbytes, related, steady, tails, zoo

from lorazip.adapter import LowRank
from lorazip.compress import cluster
from lorazip.compress.encode import encode
from lorazip.compress.spec import Spec
from lorazip.errors import CodecError


@pytest.mark.parametrize("bound", [0.5, 0.05, 1e-3, 1e-6, 0.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_every_adapter_keeps_the_bound(method: str, dtype: str, bound: float) -> None:
    for factors in (
        related((4, 3, 4, 2), 24, 40, noise=0.1, scale=16 / 6),
        related((3, 3), 24, 40, dtype=torch.bfloat16),
        [LowRank(f.B * 1e-20, f.A, f.scale) for f in related((3, 2), 24, 40)],
        [
            LowRank(f.B * 1e4, f.A * 1e4, f.scale) for f in related((3, 2), 24, 40)
        ],  # more than float16 can hold
    ):
        code = encode("m", factors, spec(method, max_error=bound, dtype=dtype))
        assert float(measured(code).max()) <= bound
        assert float(errors(code, factors).max()) <= bound + 1e-12


@given(
    modules(),
    st.sampled_from(METHODS),
    st.sampled_from(DTYPES),
    st.sampled_from([0.3, 0.01, 1e-7]),
    st.booleans(),
)
@steady
def test_every_module_keeps_the_bound(
    factors: list[LowRank], method: str, dtype: str, bound: float, ranked: bool
) -> None:
    options: dict[str, Any] = {"rank": 2} if ranked else {}
    code = encode("m", factors, spec(method, max_error=bound, dtype=dtype, **options))
    assert float(measured(code).max()) <= bound


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", METHODS)
def test_the_last_resort_is_the_original_bit_for_bit(method: str, dtype: torch.dtype) -> None:
    factors = [LowRank(f.B.to(dtype), f.A.to(dtype), 0.7) for f in related((4, 3), 24, 32)]
    code = encode("m", factors, spec(method, max_error=0.0, dtype="float16"))
    assert not code.residuals.any() and code.layout == ()
    for factor, form, own in zip(factors, code.forms, code.own, strict=True):
        (term,) = form
        assert term.core.value == 0.7
        assert own[0].dtype == own[1].dtype == dtype
        assert torch.equal(own[0].view(-1, 24).T, factor.B) and torch.equal(own[1].view(-1, 32), factor.A)


@pytest.mark.parametrize("method", JOINT)
def test_a_fallback_is_the_least_rank_that_keeps_the_bound(method: str) -> None:
    """A given rank beats the bound only in that fallbacks fill the difference."""
    factors, bound = zoo("3.q_proj"), 0.2
    code = encode("m", factors, spec(method, rank=6, max_error=bound))
    alone = measured(encode("m", factors, spec(method, rank=6)))
    assert [bool(error > bound) for error in alone] == list(code.fallbacks)
    assert sum(code.fallbacks) > 0 and (not code.layout or code.layout[0].columns == 6)
    for factor, form, fell in zip(factors, code.forms, code.fallbacks, strict=True):
        if fell:
            (term,) = form
            # float16 rounds by about 1e-7 of the energy: no adapter here is that near to the bound
            assert term.left.columns == int((tails(dense(factor)) > bound).sum())


def test_a_rank_and_a_bound_of_svd() -> None:
    factors, bound = zoo("3.q_proj"), 0.2
    code = encode("m", factors, spec("svd", rank=2, max_error=bound))
    for factor, form in zip(factors, code.forms, strict=True):
        least = int((tails(dense(factor)) > bound).sum())
        assert form[0].left.columns == max(2, least)  # type: ignore[union-attr]
    assert not any(code.fallbacks)  # svd shares nothing that could be fallen back from


@pytest.mark.parametrize("method", JOINT)
def test_with_a_bound_what_the_codec_cannot_hold_falls_back(method: str) -> None:
    """Matrices of norm 10^13 on a given rank: bases or cores overflow float16, and so would truncated factors."""
    factors = [LowRank(f.B * 1e6, f.A * 1e6, f.scale) for f in related((3, 3), 24, 40, noise=0.01)]
    code = encode("m", factors, spec(method, rank=6, max_error=0.5, dtype="float16"))
    assert all(code.fallbacks) and code.layout == () and not code.residuals.any()
    assert code.own[0][0].dtype == torch.float32


def test_a_base_that_all_have_left_is_not_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    planted = related((4,) * 4, 40, 48, noise=0.01)
    random = torch.Generator().manual_seed(0)
    strangers = [
        LowRank(torch.randn(40, 9, generator=random), torch.randn(9, 48, generator=random)) for _ in range(4)
    ]
    monkeypatch.setattr(cluster, "partitions", lambda *given: [[0] * 4 + [1] * 4])  # it is the first of two
    code = encode("m", [*strangers, *planted], Spec("jd-full", rank=6, clusters=2, max_error=0.1))
    assert code.fallbacks == (True,) * 4 + (False,) * 4 and len(code.layout) == 2
    assert {(form[0].left, form[0].right) for form in code.forms[4:]} == {(0, 1)}
    assert float(errors(code, [*strangers, *planted]).max()) <= 0.1


def test_the_bound_costs_less_than_svd_where_adapters_share() -> None:
    factors = related((4,) * 12, 40, 48, noise=0.1)
    joint, own = (encode("m", factors, spec(m, max_error=0.1)) for m in ("jd-full", "svd"))
    assert nbytes(joint) < 0.5 * nbytes(own)


@pytest.mark.parametrize("energy", [0.5, 0.9, 1.0])
def test_svd_by_energy_takes_the_least_rank(energy: float) -> None:
    factors = related((4, 3), 24, 40, scale=1.5)
    code = encode("m", factors, spec("svd", energy=energy, dtype="float32"))
    for factor, form in zip(factors, code.forms, strict=True):
        assert form[0].left.columns == int((1 - tails(dense(factor)) < energy - 1e-14).sum())  # type: ignore[union-attr]


@pytest.mark.parametrize("seed", [3, 5])
def test_all_of_the_energy_is_not_all_of_the_rows(seed: int) -> None:
    """32 columns of rank 16: what the rest adds is rounding."""
    random = torch.Generator().manual_seed(seed)
    b = torch.randn(200, 16, generator=random) @ torch.randn(16, 32, generator=random)
    factor = LowRank(b, torch.randn(32, 300, generator=random), 1.0)
    code = encode("m", [factor], spec("svd", energy=1.0, dtype="float32"))
    assert code.forms[0][0].left.columns == 16  # type: ignore[union-attr]
    assert float(errors(code, [factor])[0]) < 1e-12


def test_a_value_that_the_codec_cannot_hold_is_named_without_a_bound() -> None:
    factors = [LowRank(f.B * 1e4, f.A * 1e4, f.scale) for f in related((3, 2), 24, 40)]
    with pytest.raises(CodecError, match=r"^model\.q: a value of .* does not fit F16"):
        encode("model.q", factors, Spec("jd-full", rank=4, clusters=1))
    assert (
        float(
            measured(encode("model.q", factors, Spec("jd-full", rank=5, clusters=1, dtype="bfloat16"))).max()
        )
        < 1e-3
    )
