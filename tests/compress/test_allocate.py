"""Ranks by energy and by bound, against trying every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from reference import errors, hooi, nbytes, related, stacked, zoo

from lorazip.adapter import LowRank
from lorazip.compress import allocate, cluster
from lorazip.compress.allocate import Module
from lorazip.compress.encode import ModuleCode, encode, prepare
from lorazip.compress.methods import METHODS
from lorazip.compress.spec import Spec
from lorazip.errors import UndecidedError

JOINT = ["jd-full", "jd-diag", "eigenlora", "mean"]


def module(factors: Sequence[LowRank], spec: Spec) -> Module:
    return prepare("m", factors, spec)[0]


def every_cost(made: Module, spec: Spec, most: int) -> dict[int, float]:
    """Predicted bytes of every rank up to `most`; rank 0 shares nothing."""
    fallback = allocate._fallback_bytes(made, spec)
    costs = {0: float(fallback.sum())}
    for rank in range(1, most + 1):
        assert spec.clusters is not None
        clusters = cluster.fit(
            METHODS[spec.method], made.stack, made.weights, made.energies, rank, spec.clusters
        )
        costs[rank] = allocate._bytes(made, spec, clusters, fallback)
        assert allocate._least_bytes(made, spec, rank, fallback) <= costs[rank] or costs[rank] == costs[0]
    return costs


def shared_rank(code: ModuleCode) -> int:
    return max((s.columns for s in code.layout), default=0)


# --- a bound on every error -------------------------------------------------------------------------------------------

CASES: list[tuple[str, dict[str, Any], dict[str, Any], int]] = [
    # what, adapters, options, ranks to try
    ("all share", {"noise": 0.1}, {"max_error": 0.2}, 25),
    ("some fall back", {"noise": 0.35}, {"max_error": 0.35}, 30),
    ("nearly lossless", {"noise": 0.05}, {"max_error": 0.002}, 60),
    ("clusters", {"noise": 0.15, "clusters": 3}, {"max_error": 0.2, "clusters": 3}, 20),
    ("too few clusters", {"noise": 0.15, "clusters": 3}, {"max_error": 0.2, "clusters": 2}, 25),
    ("float32", {"noise": 0.2}, {"max_error": 0.2, "dtype": "float32"}, 25),
    ("trained weights", {"noise": 0.2}, {"max_error": 0.2, "weights": "trained"}, 25),
    ("eigenlora", {"noise": 0.1}, {"max_error": 0.2, "method": "eigenlora"}, 25),
    ("jd-diag", {"noise": 0.05, "planted": 3}, {"max_error": 0.3, "method": "jd-diag"}, 30),
    ("mean", {"noise": 0.1}, {"max_error": 0.9, "method": "mean"}, 20),
]


@pytest.mark.parametrize(("adapters", "options", "most"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_the_rank_found_costs_least(adapters: dict[str, Any], options: dict[str, Any], most: int) -> None:
    factors = related((4, 3, 4, 2) * 4, 40, 48, **adapters)
    spec = Spec(**{"method": "jd-full", "clusters": 1, **options})
    costs = every_cost(module(factors, spec), spec, most)
    code = encode("m", factors, spec)
    assert nbytes(code) <= 1.03 * min(costs.values())
    assert float(errors(code, factors).max()) <= options["max_error"]


@pytest.mark.parametrize("bound", [0.7, 0.4])
def test_the_rank_found_costs_least_on_real_adapters(bound: float) -> None:
    factors = zoo("15.k_proj")
    spec = Spec("jd-full", max_error=bound, clusters=1)
    costs = every_cost(module(factors, spec), spec, 24)
    assert nbytes(encode("m", factors, spec)) <= 1.03 * min(costs.values())


def test_what_is_predicted_is_what_is_stored() -> None:
    factors = related((4, 3, 4, 2) * 4, 40, 48, noise=0.3)
    for bound in (0.3, 0.2):
        spec = Spec("jd-full", max_error=bound, clusters=2)
        costs = every_cost(module(factors, spec), spec, 30)
        code = encode("m", factors, spec)
        assert nbytes(code) == costs[shared_rank(code)]


def test_copies_share_one_basis_at_the_tightest_bounds() -> None:
    """Energies of float32 fits are known to 1e-7, which must not talk the search out of a lossless basis."""
    factors = related((4,), 40, 48) * 12
    code = encode("m", factors, Spec("jd-full", max_error=1e-9, clusters=1, dtype="float32"))
    assert shared_rank(code) == 4 and not any(code.fallbacks)
    assert float(errors(code, factors).max()) <= 1e-9


@pytest.mark.parametrize("method", JOINT)
def test_adapters_that_share_nothing_keep_their_own_factors(method: str) -> None:
    random = torch.Generator().manual_seed(0)
    factors = [
        LowRank(torch.randn(60, 2, generator=random), torch.randn(2, 60, generator=random)) for _ in range(5)
    ]
    code = encode("m", factors, Spec(method, max_error=0.1, clusters=1))
    assert code.layout == () and code.shared == () and all(code.fallbacks)


def test_zero_modules_cost_nothing() -> None:
    zero = LowRank(torch.zeros(40, 2), torch.ones(2, 48), 1.0)
    for spec in (
        Spec("jd-full", max_error=0.1, clusters=1),
        Spec("jd-full", rank=3, clusters=2),
        Spec("jd-full", energy=0.9, clusters=1),
    ):
        assert nbytes(encode("m", [zero, zero], spec)) == 0


@pytest.mark.parametrize(
    ("kind", "a", "b", "rank", "shapes"),
    [
        ("scalar", 4, 4, 2, ()),
        ("diagonal", 4, 4, 2, ((4,),)),
        ("full", 4, 4, 2, ((4, 4),)),  # 2 * 8 is not less than 16
        ("full", 5, 4, 2, ((2, 5), (2, 4))),
        ("full", 3, 4, 2, ((3, 4),)),
    ],
)
def test_the_smaller_storage_of_a_core_is_taken(
    kind: str, a: int, b: int, rank: int, shapes: tuple[tuple[int, ...], ...]
) -> None:
    assert allocate.core_shape(kind, a, b, rank) == shapes


# --- a share of energy ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999, 1.0])
def test_the_rank_by_energy_is_the_least_that_holds_it(energy: float) -> None:
    factors = related((4, 3, 4, 2), 40, 48)
    code = encode("m", factors, Spec("jd-full", energy=energy, clusters=1, dtype="float32"))
    rank, matrices = shared_rank(code), stacked(factors)
    assert 1 - float(errors(code, factors).mean()) >= energy - 2e-6
    assert 1 - float(hooi(matrices, rank - 1).mean()) < energy


@pytest.mark.parametrize("method", ["jd-full", "jd-diag"])
def test_energies_count_by_their_weights(method: str) -> None:
    """With trained weights the strong adapter decides, with unit weights the weak ones do too."""
    strong, *weak = related((4, 4, 4), 40, 48, noise=0.5)
    factors = [LowRank(strong.B * 100, strong.A, strong.scale), *weak]
    spec = Spec(method, energy=0.95, clusters=1, dtype="float32")
    unit, trained = (shared_rank(encode("m", factors, replace(spec, weights=w))) for w in ("unit", "trained"))
    assert trained <= 4 < unit


def test_an_energy_that_no_rank_reaches_is_undecided() -> None:
    factors = related((4, 3, 4, 2), 40, 48)
    with pytest.raises(
        UndecidedError, match=r"^q: mean holds 0\.\d+ of the energy at rank 13, less than the 0.9"
    ):
        encode("q", factors, Spec("mean", energy=0.9, clusters=1))


def test_held_out_energy_chooses_the_directions_of_eigenlora() -> None:
    factors = related((4, 3, 4, 2) * 3, 40, 48, noise=0.15)
    made = module(factors, spec := Spec("eigenlora", energy=0.8, clusters=1, dtype="float32"))
    fitted, _, _ = allocate.subspace.held_out_energy(made.stack.scaled(made.weights.sqrt()), made.most)
    rank = shared_rank(encode("m", factors, spec))
    assert float(fitted[rank - 1]) >= 0.8 > float(fitted[rank - 2])
    zero = LowRank(torch.zeros(40, 2), torch.ones(2, 48), 1.0)
    assert shared_rank(encode("m", [*factors, zero], spec)) == rank  # it has no energy to hold


def test_held_out_energy_that_nothing_reaches_is_undecided_and_says_what_would() -> None:
    random = torch.Generator().manual_seed(0)
    strangers = [
        LowRank(torch.randn(40, 2, generator=random), torch.randn(2, 48, generator=random)) for _ in range(5)
    ]
    with pytest.raises(
        UndecidedError, match=r"10 hold 0\.\d+, as many random ones 0\.\d+, the mean adapter 0\.\d+"
    ):
        encode("q", strangers, Spec("eigenlora", energy=0.9, clusters=1))
    with pytest.raises(UndecidedError, match="at least two adapters"):
        encode("q", strangers[:1], Spec("eigenlora", energy=0.9, clusters=1))
