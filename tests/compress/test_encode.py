"""One module from factors to what is stored, against dense float64 arithmetic and on real adapters."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from encoded import DTYPES, METHODS, MIXED, distance, measured, restored, spec
from hypothesis import given
from hypothesis import strategies as st
from reference import (
    compact,
    dense,
    eigenlorax,
    errors,
    hooi,
    modules,
    related,
    stacked,
    steady,
    tails,
    unimodular,
    zoo,
)

from lorazip.adapter import LowRank
from lorazip.compress import allocate, frame
from lorazip.compress import encode as encoding
from lorazip.compress.encode import encode, load, prepare, residuals2
from lorazip.compress.spec import Spec
from lorazip.terms import decode, own_slots, shared_slots

# --- the error is that of what is stored ------------------------------------------------------------------------------


@given(
    modules(),
    st.sampled_from(METHODS),
    st.sampled_from(DTYPES),
    st.sampled_from([{"rank": 2}, {"rank": 5, "clusters": 2}, {"max_error": 0.2}, {"energy": 0.9}]),
)
@steady
def test_the_measured_error_is_the_dense_one(
    factors: list[LowRank], method: str, dtype: str, options: dict[str, Any]
) -> None:
    if "energy" in options and method in ("eigenlora", "mean"):
        options = {"rank": 1}  # held-out energy and means may be undecided
    if method == "svd":
        options = {key: value for key, value in options.items() if key != "clusters"}
    code = encode("m", factors, spec(method, dtype=dtype, **options))
    matrices = stacked(factors, unit=False)
    energies = matrices.square().sum((1, 2))
    wanted = (restored(code, factors) - matrices).square().sum((1, 2))
    # The decoder multiplies in float32, which moves D^ by 1e-7 of its size; nothing else lies between the two numbers.
    found = measured(code)
    roots = (found.sqrt() - (wanted / torch.where(energies > 0, energies, 1)).sqrt()).abs()
    assert (roots <= 3e-6).all()
    assert torch.allclose(code.energies, energies, rtol=1e-11, atol=0)


@pytest.mark.parametrize("scale", [2.0, 16 / 6, -0.7])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_measuring_adds_no_rounding_of_its_own(method: str, dtype: str, scale: float) -> None:
    """Against the decoder's own factors, in exact arithmetic, to 1e-12 of the energy; a scale is no float32 number."""
    factors = related(MIXED, 24, 40, scale=scale)
    code = encode("m", factors, spec(method, rank=4, dtype=dtype))
    slots = shared_slots(code.layout, 24, 40)
    shared = {i: s.decode(p) for i, (s, p) in enumerate(zip(slots, code.shared, strict=True))}
    for i, factor in enumerate(factors):
        own = [
            s.decode([part])
            for s, part in zip(own_slots(code.forms[i], code.layout, 24, 40), code.own[i], strict=True)
        ]
        b, a = decode(code.forms[i], shared, own, 24, 40)
        matrix = dense(factor)
        energy = float(matrix.square().sum())
        wanted = float((b.double() @ a.double() - matrix).square().sum())
        assert abs(float(code.residuals[i]) - wanted) <= 1e-12 * energy
        assert abs(float(code.energies[i]) - energy) <= 1e-12 * energy


def test_measuring_survives_factors_that_cancel() -> None:
    factors = related((4, 3), 30, 40)
    gauge, inverse = unimodular(4, seed=1, size=12)
    assert float(torch.linalg.cond(gauge)) > 1e5
    turned = LowRank((factors[0].B.double() @ gauge).float(), (inverse @ factors[0].A.double()).float(), 2.0)
    code = encode("m", [turned, factors[1]], spec("jd-full", rank=3, dtype="float32"))
    matrix = dense(turned)
    wanted = (restored(code, factors)[0] - matrix).square().sum()
    assert float(code.residuals[0]) == pytest.approx(float(wanted), rel=1e-5)
    assert float(code.energies[0]) == pytest.approx(float(matrix.square().sum()), rel=1e-9)


# --- how good the bases are -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [5, 13, 29])
def test_the_default_method_is_hooi_on_real_adapters(rank: int) -> None:
    found, wanted = [], []
    for module in ("2.v_proj", "8.q_proj", "20.k_proj", "27.v_proj"):
        factors = zoo(module)
        found.append(measured(encode("m", factors, spec("jd-full", rank=rank, dtype="float32"))).mean())
        wanted.append(hooi(compact(factors), rank).mean())
    assert float(sum(found) / sum(wanted)) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_storage_in_16_bits_costs_little(method: str, dtype: str) -> None:
    """float16 rounds a value by 2^-12 of it at most, a tensor by about 1e-7 of its energy; bfloat16 by 64 times that.

    Turning the bases by so little helps some adapters and harms others by more than that, but not their mean: cores are
    fitted to the bases as they are stored.
    """
    factors = zoo("15.k_proj")
    exact = measured(encode("m", factors, spec(method, rank=13, dtype="float32")))
    rounded = measured(encode("m", factors, spec(method, rank=13, dtype=dtype)))
    unit = {"float32": 1e-7, "float16": 1e-7, "bfloat16": 64e-7}[dtype]
    assert float((rounded - exact).mean()) <= 10 * unit
    assert float((rounded - exact).abs().max()) <= 300 * unit


def test_cores_are_fitted_to_the_bases_as_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, tuple[int, int]]] = []
    real = encoding.cores

    def spy(stack: Any, members: Any, pair: Any, asked: Spec, at: tuple[int, int]) -> Any:
        seen.append((pair, at))
        return real(stack, members, pair, asked, at)

    monkeypatch.setattr(encoding, "cores", spy)
    code = encode("m", zoo("20.k_proj"), spec("jd-full", rank=9, clusters=2, dtype="bfloat16"))
    assert [at for _, at in seen] == [(0, 1), (2, 3)]
    for pair, at in seen:
        for side, index in zip((pair.left, pair.right), at, strict=True):
            assert torch.equal(side.T.flatten(), code.shared[index][0].float())


@pytest.mark.parametrize("method", ["svd", "jd-full", "jd-diag", "eigenlora"])
@pytest.mark.parametrize("module", ["3.q_proj", "20.k_proj"])
def test_full_rank_is_lossless(method: str, module: str) -> None:
    """96 = the sum of the ranks; a k_proj has 192 outputs, so 96 columns span all that is there."""
    factors = zoo(module)
    code = encode("m", factors, spec(method, rank=96, dtype="float32"))
    assert float(measured(code).max()) < 1e-10 and float(errors(code, factors).max()) < 1e-10


def test_full_rank_of_grouped_queries_is_lossless() -> None:
    """More rank than outputs: U stops at the width of the module, V goes on."""
    factors = related((6,) * 9, 24, 72)
    for method in ("jd-full", "eigenlora"):
        code = encode("m", factors, spec(method, rank=54, dtype="float32"))
        assert [s.columns for s in code.layout] == [24, 54]
        assert float(errors(code, factors).max()) < 1e-10


def test_eigenlora_is_its_reference() -> None:
    factors = zoo("15.k_proj")
    found = measured(encode("m", factors, spec("eigenlora", rank=13, dtype="float32"))).mean()
    assert float(found) == pytest.approx(float(eigenlorax(compact(factors), 13).mean()), rel=1e-3)


def test_one_adapter_alone() -> None:
    factors = related((5,), 20, 30)
    for method in METHODS:
        code = encode("m", factors, spec(method, rank=5, dtype="float32"))
        assert float(errors(code, factors).max()) < 1e-10
        cut = encode("m", factors, spec(method, rank=2, dtype="float32"))
        assert float(errors(cut, factors)[0]) == pytest.approx(float(tails(dense(factors[0]))[2]), rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_copies_and_zero_matrices(method: str) -> None:
    (one,) = related((3,), 20, 30)
    zero = LowRank(torch.zeros(20, 3), one.A, 1.0)
    factors = [one, one, zero, one]
    options = {} if method == "svd" else {"clusters": 2}
    code = encode("m", factors, spec(method, rank=3, dtype="float32", **options))
    assert code.forms[2] == () and code.own[2] == ()
    assert float(errors(code, factors).max()) < 1e-10
    assert len(code.layout) == (0 if method == "svd" else 2)  # one base, none empty


def test_every_stored_base_is_used() -> None:
    factors = related((4,) * 12, 40, 48, clusters=3, noise=0.3)
    for options in (
        {"rank": 5, "clusters": 5},
        {"max_error": 0.35, "clusters": 4},
        {"max_error": 0.2, "clusters": 3},
    ):
        code = encode("m", factors, Spec("jd-full", **options))
        used = {side for form in code.forms for term in form for side in (term.left, term.right)}
        assert set(range(len(code.layout))) == {side for side in used if isinstance(side, int)}


def test_weights_trained_favour_strong_adapters() -> None:
    plain = related((4, 4, 4), 40, 48, noise=0.5)
    factors = [LowRank(plain[0].B * 100, plain[0].A, 2.0), *plain[1:]]
    unit = measured(encode("m", factors, spec("jd-full", rank=4)))
    trained = measured(encode("m", factors, spec("jd-full", rank=4, weights="trained")))
    assert float(trained[0]) < 1e-3 < float(unit[0])
    assert float(unit.mean()) < float(trained.mean())


# --- gauge, order, strength -------------------------------------------------------------------------------------------


def integers(module: str, ranks: Sequence[int] = (8,) * 12) -> tuple[list[LowRank], list[LowRank]]:
    """Real adapters rounded to integers of few bits, and the same matrices in another gauge: both exact in float32."""
    plain, turned = [], []
    for i, (factor, rank) in enumerate(zip(zoo(module), ranks, strict=True)):
        b = (factor.B[:, :rank].double() / factor.B.abs().max() * 60).round()
        a = (factor.A[:rank].double() / factor.A.abs().max() * 60).round()
        gauge, inverse = unimodular(rank, seed=i, size=2)
        plain.append(LowRank(b.float(), a.float(), 1 / 1024))
        turned.append(LowRank((b @ gauge).float(), (inverse @ a).float(), 1 / 1024))
        assert torch.equal(dense(plain[-1]), dense(turned[-1]))
    return plain, turned


@pytest.mark.parametrize(
    ("method", "options", "rounding"),
    [
        ("svd", {"rank": 4}, 1e-5),
        ("jd-full", {"rank": 13}, 1e-5),
        ("jd-full", {"rank": 5, "clusters": 3}, 1e-5),
        ("jd-full", {"energy": 0.7}, 1e-5),
        ("jd-full", {"max_error": 0.6}, 1e-5),
        ("jd-diag", {"rank": 9}, 1e-5),
        ("eigenlora", {"rank": 13}, 1e-5),
        ("mean", {"rank": 4}, 1e-5),
    ],
)
@pytest.mark.parametrize("module", ["3.q_proj", "20.k_proj"])
def test_gauge_and_order_move_what_is_restored_by_rounding_only(
    module: str, method: str, options: dict[str, Any], rounding: float
) -> None:
    """B -> BG, A -> G^-1 A with G of condition 10^4, and another order of the adapters."""
    plain, turned = integers(module, (8, 5, 8, 8, 3, 8, 8, 8, 6, 8, 8, 8))
    asked = spec(method, dtype="float32", **options)
    wanted = restored(encode("m", plain, asked), plain)
    assert distance(restored(encode("m", turned, asked), plain), wanted) <= rounding
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = [turned[i] for i in order]
    assert distance(restored(encode("m", shuffled, asked), shuffled), wanted[order]) <= rounding


def test_gauge_and_order_matter_little_where_iterations_run_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Large modules. Rounding might decide when a fit stops; here it does not."""
    monkeypatch.setattr(frame, "PRECISE", 0)
    plain, turned = integers("3.q_proj")
    asked = spec("jd-full", rank=13, dtype="float32")
    one, two = encode("m", plain, asked), encode("m", turned[::-1], asked)
    assert distance(restored(two, plain).flip(0), restored(one, plain)) <= 1e-4
    assert torch.allclose(measured(one).mean(), measured(two).mean(), rtol=1e-5)


@pytest.mark.parametrize("size", [1e-20, 1e4])
@pytest.mark.parametrize("method", METHODS)
def test_strength_does_not_matter(method: str, size: float) -> None:
    """One adapter far stronger or weaker than the rest: every one counts alike."""
    factors = related((4, 3, 4, 2), 30, 40)
    changed = [LowRank(f.B * (size if i == 1 else 1), f.A, f.scale) for i, f in enumerate(factors)]
    if method == "mean":  # a mean of matrices of other sizes is another mean
        changed = [LowRank(f.B * size, f.A, f.scale) for f in factors]
    asked = spec(method, rank=5, dtype="float32")
    one, two = measured(encode("m", factors, asked)), measured(encode("m", changed, asked))
    assert torch.allclose(one, two, rtol=1e-3, atol=1e-6)


# --- what is loaded ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [2.0, 0.125, -4.0, 1 / 3, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_loading_is_exact(scale: float, dtype: torch.dtype) -> None:
    factors = [LowRank(f.B.to(dtype), f.A.to(dtype), scale) for f in related((3, 2), 12, 10)]
    stack = load(factors, torch.device("cpu"))
    for i, (first, last) in enumerate(itertools.pairwise(stack.starts)):
        found = stack.left[first:last].double().T @ stack.right[first:last].double()
        assert float((found - dense(factors[i])).abs().max()) <= 1e-14 * float(dense(factors[i]).abs().max())
    assert (stack.left.dtype == torch.float32) == (scale in (2.0, 0.125, -4.0))
    assert stack.right.dtype == torch.float32


def test_an_adapter_of_rank_zero_is_a_zero_matrix() -> None:
    """A zero matrix read back from a bundle has no rows."""
    empty = LowRank(torch.zeros(12, 0), torch.zeros(0, 10), 1.0)
    stack = load([empty, *related((3,), 12, 10)], torch.device("cpu"))
    assert stack.ranks == (1, 3) and not stack.left[0].any()
    assert float(stack.energies[0]) == 0
    code = encode("m", [empty, *related((3,), 12, 10)], Spec("jd-full", rank=2, clusters=1))
    assert code.forms[0] == ()


def test_residuals_of_a_stack_and_itself_are_zero() -> None:
    stack = load(zoo("15.k_proj"), torch.device("cpu"))
    assert (residuals2(stack, stack) <= 1e-14 * stack.energies).all()


def test_a_module_knows_its_original_bytes_and_weights() -> None:
    factors = [
        *related((3, 2), 12, 10, dtype=torch.float16),
        LowRank(torch.zeros(12, 1), torch.ones(1, 10), 1.0),
    ]
    made, _ = prepare("m", factors, Spec("jd-full", rank=2))
    assert made.original_bytes.tolist() == [2 * 3 * 22, 2 * 2 * 22, 4 * 22]
    assert torch.allclose(made.weights[:2] * made.energies[:2], torch.ones(2, dtype=torch.float64))
    assert float(made.weights[2]) == 0
    assert isinstance(made, allocate.Module) and made.most == 6


def test_the_spectrum_is_the_mean_share_of_energy() -> None:
    factors = zoo("15.k_proj")
    code = encode("m", factors, Spec("jd-full", rank=2, clusters=1))
    squares = torch.linalg.svdvals(compact(factors)).square()[:, :8]
    assert torch.allclose(code.spectrum, squares.mean(0), atol=1e-9)
    assert float(code.spectrum.sum()) == pytest.approx(1)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_input_gives_the_same_bytes(method: str) -> None:
    factors = related(MIXED, 24, 40)
    options: dict[str, Any] = {} if method == "svd" else {"clusters": 2}
    one, two = (encode("m", factors, spec(method, rank=4, **options)) for _ in range(2))
    assert one.forms == two.forms and one.layout == two.layout
    for first, second in zip((*one.shared, *one.own), (*two.shared, *two.own), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
