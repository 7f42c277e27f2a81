"""One module from factors to stored form, against dense float64 references and on real adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import dense_error, hooi_errors, truncation_errors
from torch import Tensor

from lorazip.adapter import LowRank
from lorazip.compress.encode import ModuleCode, encode
from lorazip.compress.spec import Spec
from lorazip.sources import open_adapters
from lorazip.terms import decode, own_slots, shared_slots

ZOO = Path(__file__).parents[2] / "examples" / "zoo"
MODULES = ("model.layers.3.self_attn.q_proj", "model.layers.20.self_attn.k_proj")


@pytest.fixture(scope="module")
def zoo() -> dict[str, list[LowRank]]:
    adapters = open_adapters([str(ZOO)]).adapters
    return {module: [a.low_rank(module) for a in adapters] for module in MODULES}


def dense(factor: LowRank) -> Tensor:
    return factor.scale * factor.B.double() @ factor.A.double()


def restored(code: ModuleCode, out: int, in_: int) -> list[Tensor]:
    """Every D^ from the stored parts alone, as a reader has it."""
    slots = shared_slots(code.layout, out, in_)
    shared = {i: s.decode(p) for i, (s, p) in enumerate(zip(slots, code.shared, strict=True))}
    found = []
    for form, own in zip(code.forms, code.own, strict=True):
        parts, tensors = iter(own), []
        for slot in own_slots(form, code.layout, out, in_):
            tensors.append(slot.decode([next(parts) for _ in slot.parts()]))
        b, a = decode(form, shared, tensors, out, in_)
        found.append(b.double() @ a.double())
    return found


def generated(ranks: Sequence[int], out: int, in_: int, seed: int = 0) -> list[LowRank]:
    g = torch.Generator().manual_seed(seed)
    return [
        LowRank(torch.randn(out, r, generator=g) / out, torch.randn(r, in_, generator=g), 2.0) for r in ranks
    ]


def errors(code: ModuleCode) -> Tensor:
    return code.residuals / code.energies


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("rank", [4, 13, 40])
def test_jd_full_is_as_good_as_hooi_on_real_adapters(
    zoo: dict[str, list[LowRank]], module: str, rank: int
) -> None:
    ours = errors(encode(module, zoo[module], Spec(rank=rank, clusters=1, dtype="float32"))).mean()
    reference = sum(hooi_errors([dense(f) for f in zoo[module]], rank)) / 12
    assert float(ours) <= 1.001 * reference + 1e-9


@pytest.mark.parametrize(
    ("out", "in_", "ranks"), [(40, 60, [2, 7, 3, 5]), (20, 90, [8] * 6), (50, 50, [1] * 9)]
)
def test_jd_full_is_as_good_as_hooi_on_mixed_ranks(out: int, in_: int, ranks: list[int]) -> None:
    factors = generated(ranks, out, in_)
    ours = errors(encode("m", factors, Spec(rank=6, clusters=1, dtype="float32"))).mean()
    reference = sum(hooi_errors([dense(f) for f in factors], 6)) / len(ranks)
    assert float(ours) == pytest.approx(reference, rel=0.01)


@pytest.mark.parametrize("method", ["jd-full", "jd-diag", "eigenlora", "svd"])
def test_full_rank_is_lossless(zoo: dict[str, list[LowRank]], method: str) -> None:
    clusters = None if method == "svd" else 1
    for module in MODULES:
        code = encode(module, zoo[module], Spec(method, rank=96, clusters=clusters, dtype="float32"))
        assert float(errors(code).max()) < 1e-10


@pytest.mark.parametrize("method", ["svd", "jd-full", "jd-diag", "eigenlora", "mean"])
def test_the_measured_error_is_that_of_what_is_stored(zoo: dict[str, list[LowRank]], method: str) -> None:
    module = MODULES[0]
    code = encode(module, zoo[module], Spec(method, rank=5, clusters=None if method == "svd" else 2))
    for factor, matrix, error in zip(zoo[module], restored(code, 576, 576), errors(code), strict=True):
        assert float(error) == pytest.approx(dense_error(dense(factor), matrix), rel=1e-6, abs=1e-12)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), condition=st.floats(1, 1e4), clusters=st.integers(1, 3))
def test_gauge_and_order_change_nothing_but_rounding(seed: int, condition: float, clusters: int) -> None:
    factors = generated([4, 3, 4, 2, 4], 30, 40, seed)
    g = torch.Generator().manual_seed(seed + 1)
    turned = []
    for f in factors:
        r = f.A.shape[0]
        q = torch.linalg.qr(torch.randn(r, r, generator=g, dtype=torch.float64)).Q
        gauge = q * torch.logspace(0, float(torch.tensor(condition).log10()), r, dtype=torch.float64)
        b, a = f.B.double() @ gauge, torch.linalg.solve(gauge, f.A.double())
        turned.append(LowRank(b.float(), a.float(), f.scale))
    spec = Spec(rank=4, clusters=clusters, dtype="float32")
    straight = encode("m", factors, spec)
    other = encode("m", turned[::-1], spec)
    assert torch.allclose(errors(straight), errors(other).flip(0), atol=2e-3)
    if clusters == 1:
        pairs = zip(restored(straight, 30, 40), restored(other, 30, 40)[::-1], strict=True)
        assert max(dense_error(one, two) for one, two in pairs) < 1e-4


@pytest.mark.parametrize("method", ["svd", "jd-full", "jd-diag", "eigenlora", "mean"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("bound", [0.5, 0.05, 1e-7])
def test_every_adapter_keeps_the_bound(
    zoo: dict[str, list[LowRank]], method: str, dtype: str, bound: float
) -> None:
    module = MODULES[1]
    factors = zoo[module][:6]
    spec = Spec(method, max_error=bound, clusters=None if method == "svd" else 1, dtype=dtype)
    code = encode(module, factors, spec)
    assert float(errors(code).max()) <= bound
    for factor, matrix in zip(factors, restored(code, 192, 576), strict=True):
        assert dense_error(dense(factor), matrix) <= bound * (1 + 1e-6)


def test_a_fallback_is_the_least_rank_that_keeps_the_bound(zoo: dict[str, list[LowRank]]) -> None:
    module, bound = MODULES[0], 0.03
    code = encode(module, zoo[module], Spec("mean", max_error=bound, clusters=1))
    for factor, form in zip(zoo[module], code.forms, strict=True):
        # float16 rounds by about 1e-7 of the energy: no adapter here is that near to the bound
        least = int((truncation_errors(dense(factor)) > bound).sum())
        (term,) = form
        assert not isinstance(term.left, int)
        assert term.left.columns == least


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_last_resort_is_the_original_bit_for_bit(dtype: torch.dtype) -> None:
    factors = [LowRank(f.B.to(dtype), f.A.to(dtype), 0.7) for f in generated([4, 4], 24, 32)]
    code = encode("m", factors, Spec(max_error=0.0, clusters=1, dtype="float16"))
    for factor, form, own in zip(factors, code.forms, code.own, strict=True):
        assert form[0].core.value == 0.7
        assert torch.equal(own[0].view(4, 24).T, factor.B) and own[0].dtype == dtype
        assert torch.equal(own[1].view(4, 32), factor.A)


def test_copies_and_zero_adapters() -> None:
    (one,) = generated([3], 20, 30)
    zero = LowRank(torch.zeros(20, 3), one.A, 1.0)
    code = encode("m", [one, one, zero, one], Spec(rank=3, clusters=2, dtype="float32"))
    assert code.forms[2] == ()
    matrices = restored(code, 20, 30)
    assert not matrices[2].any()
    assert max(dense_error(dense(one), matrices[i]) for i in (0, 1, 3)) < 1e-10


def test_planted_clusters_are_found() -> None:
    g = torch.Generator().manual_seed(3)
    factors = []
    bases = [(torch.randn(40, 3, generator=g), torch.randn(3, 50, generator=g)) for _ in range(3)]
    for i in range(12):
        u, v = bases[i % 3]
        factors.append(LowRank(u @ torch.randn(3, 3, generator=g), torch.randn(3, 3, generator=g) @ v, 1.0))
    code = encode("m", factors, Spec(rank=3, clusters=3, dtype="float32"))
    assert float(errors(code).max()) < 1e-9
    used = [form[0].left for form in code.forms]
    assert [used[i] == used[j] for i in range(12) for j in range(12)] == [
        i % 3 == j % 3 for i in range(12) for j in range(12)
    ]
