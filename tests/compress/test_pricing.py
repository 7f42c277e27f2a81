"""What a worth chooses, against all combinations of rates; larger worths, bases, and the tables of `auto`."""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import related, steady
from torch import Tensor

from lorazip import trellis
from lorazip.codecs import codec
from lorazip.compress import auto, pricing
from lorazip.compress.curves import SIZES, Curve, curve
from lorazip.compress.encode import prepare
from lorazip.compress.joint import Pair
from lorazip.compress.pricing import LOADED, Priced
from lorazip.compress.profile import (
    CODED,
    INT8,
    NOTHING,
    ORIGINAL,
    RATES,
    TWICE,
    WHOLE,
    WHOLE_NUMBERS,
    Bases,
    Basis,
    Profile,
    loading_bits,
)
from lorazip.compress.spec import Spec

BOTH = Bases(Basis(4, 3), Basis(8, 2))
EVERY = [Bases(), Bases(None, BOTH.right), Bases(BOTH.left, None), BOTH]
worths = st.floats(-12, 24).map(lambda power: 2.0**power)

NONE = Pair(torch.zeros(40, 0), torch.zeros(70, 0))  # nothing here looks at directions


def drawn(seed: int, adapters: int = 3, rank: int = 2, shape: tuple[int, int] = (40, 70)) -> Curve:
    """A curve of any singular values, falling, and any energies outside of nested directions."""
    random = torch.Generator().manual_seed(seed)
    sigma = torch.rand(adapters, rank, generator=random, dtype=torch.float64).sort(1, descending=True).values
    outside = [
        torch.rand(adapters, rank, 2, generator=random).sort(2, descending=True).values for _ in range(2)
    ]
    having = tuple(range(0, 2 * adapters, 2))
    sizes = torch.full((adapters,), 1000.0).double()
    crest, loaded = (
        [low + (high - low) * torch.rand(adapters, rank, sizes, generator=random) for _ in range(2)]
        for low, high, sizes in ((3.0, 40.0, 3), (0.8, 4.0, 2))
    )
    return Curve(
        having, shape, 10 * sigma, (rank,) * adapters, sizes, (outside[0], outside[1]), NONE,
        (crest[0], crest[1]), (loaded[0], loaded[1]),
    )  # fmt: skip


def priced(one: Curve, bases: Bases, worth: Tensor, dtype: str) -> Priced:
    """One module by itself, without the dimension of modules."""
    (bunch,) = pricing.bunches([one])
    found = pricing.priced(bunch, [bases], worth, dtype)
    return Priced(*(getattr(found, field.name)[0] for field in fields(Priced)))


def best_bases(one: Curve, worth: Tensor, start: Bases) -> Bases:
    (bunch,) = pricing.bunches([one])
    (found,) = pricing.best_bases(bunch, worth, "float16", [start])
    return found


# --- the model of the docstring, in plain Python ----------------------------------------------------------------------


def left(one: Curve, side: int, basis: Basis | None, adapter: int, row: int, rate: float) -> float:
    """d = rho LEFT(R) (1 - b / width) + (1 - rho) LOADINGS, rho outside of the basis as it is stored.

    Of what right rows lose, left rows make good what lies in the space of the rows: of own rows rank / width, of
    loadings as much as the rows have of the basis.
    """
    place = 0 if basis is None else SIZES.index(basis.columns) + 1
    width, rank = one.shape[side], int((one.sigma[adapter] > 0).sum())
    if rate == WHOLE:  # float16: 11 bits of a number, and no step less than 2^-24
        own = min(1.0, 0.18 * 2.0**-22 + width * 2.0**-48 / 12 / max(float(one.sigma[adapter, row]), 1e-30))
    elif rate == INT8:
        own = numbers(float(one.crest[side][adapter, row, place]), 8)
    else:
        own = CODED[RATES.index(rate)]
    good = rank / width * side
    if basis is None:
        return own * (1 - good) if own < 1 else 1
    noise = trellis.DISTORTION[basis.rate]
    inside = [(1 - float(one.outside[side][adapter, k, place - 1])) for k in range(rank)]
    row_inside = 1 - float(one.outside[side][adapter, row, place - 1])
    held = row_inside * (1 - noise)
    if own < 1:  # rows of nothing have no noise to take off
        own *= 1 - good - basis.columns / width
    own *= 1 + TWICE[basis.rate].get(rate, 0) * (row_inside * noise / (1 - held)) ** 2
    loaded = float(one.loaded[side][adapter, row, place - 1])
    if side == 1:
        loaded *= 1 - min(1.0, sum(inside) * (1 - noise) / basis.columns)
    return (1 - held) * min(own, 1.0) + held * numbers(loaded, loading_bits(rate))


def numbers(crest: float, bits: int) -> float:
    """A twelfth of a step's square in every number, steps of 2 max / (2^bits - 1)."""
    return WHOLE_NUMBERS[bits] * crest * (2 / (2**bits - 1)) ** 2 / 12


@cache
def taken(width: int, side: int, basis: Basis | None, rate: float) -> int:
    names = {WHOLE: "float16", INT8: "int8", 0.0: "tcq0"}
    name = names.get(rate, f"tcq{rate:g}" + "u" * side)
    parts = list(codec(name).parts((1, width)))
    if basis is not None:
        parts += codec(f"int{loading_bits(rate)}").parts((1, basis.columns))
    return sum(part.nbytes for part in parts)


def component(one: Curve, bases: Bases, loaded: tuple[bool, bool], i: int, j: int, pair: tuple[float, float]):
    """Residual and bytes of one singular value stored at a pair of rates."""
    held, nbytes = 1.0, 0
    for side, rate in enumerate(pair):
        basis = (bases.left, bases.right)[side] if loaded[side] else None
        held *= 1 - left(one, side, basis, i, j, rate)
        nbytes += taken(one.shape[side], side, basis, rate)
    return float(one.sigma[i, j]) ** 2 * (1 - held), nbytes


def allowed(bases: Bases) -> list[tuple[bool, bool]]:
    return [on for on in LOADED if (bases.left or not on[0]) and (bases.right or not on[1])]


def cheapest(one: Curve, bases: Bases, worth: float, i: int) -> float:
    """The least worth times residual plus bytes of all rates of all components with all loadings."""
    pairs = list(product(RATES, RATES))
    best = float("inf")
    for loaded in allowed(bases):
        menus = []
        for j in range(one.sigma.shape[1]):
            stored = [component(one, bases, loaded, i, j, pair) for pair in pairs]
            menus.append([(float(one.sigma[i, j]) ** 2, 0), *stored])
        for picks in product(*menus):
            best = min(best, worth * sum(r for r, _ in picks) + sum(b for _, b in picks))
    return best


@steady
@given(st.integers(0, 10_000), st.sampled_from(EVERY), worths)
def test_the_price_is_the_least_of_all_combinations(seed: int, bases: Bases, worth: float) -> None:
    one = drawn(seed, adapters=1)
    found = priced(one, bases, torch.tensor([worth]), "float16")
    assert float(found.cost) == pytest.approx(cheapest(one, bases, worth, 0), rel=1e-4)


@steady
@given(st.integers(0, 10_000), st.sampled_from(EVERY), worths)
def test_what_is_chosen_costs_what_is_said(seed: int, bases: Bases, worth: float) -> None:
    """Bytes and residual of the rates, and that the tables from which `auto` chooses in the end know them alike."""
    one = drawn(seed, adapters=4, rank=3)
    mu = worth * torch.linspace(0.2, 3, 8)
    found = priced(one, bases, mu, "float16")
    for i in range(4):
        profile = pricing.profile(found.rates[i].tolist(), int(found.loaded[i]))
        assert profile.loaded in allowed(bases)
        kept = [j for j in range(3) if found.rates[i, j] >= 0]
        stored = [
            component(one, bases, profile.loaded, i, j, pair)
            for j, pair in zip(kept, zip(profile.left, profile.right, strict=True), strict=True)
        ]
        out = [float(one.sigma[i, j]) ** 2 for j in range(3) if j not in kept]
        residual, nbytes = sum(out) + sum(r for r, _ in stored), sum(b for _, b in stored)
        energy = float(one.energies[i])
        assert float(found.residual[i]) == pytest.approx(residual, abs=1e-6 * energy)
        assert int(found.nbytes[i]) == nbytes
        cost = float(mu[one.having[i]]) * residual + nbytes
        assert float(found.cost[i]) == pytest.approx(
            cost, rel=1e-4, abs=float(mu[one.having[i]]) * 1e-6 * energy
        )
        if kept == list(range(len(kept))):  # the strongest come first, as in a form
            table = auto.tables([one], (bases,), [NOTHING, profile, ORIGINAL], 8, "float16")
            at = one.having[i], 0
            assert table.residuals[at].tolist() == pytest.approx([energy, residual, 0], abs=1e-6 * energy)
            assert table.nbytes[at].tolist() == [0, nbytes, 1000]


@steady
@given(st.integers(0, 10_000), st.sampled_from(EVERY), worths, st.floats(1.001, 100))
def test_a_larger_worth_takes_more_bytes_and_leaves_less(
    seed: int, bases: Bases, worth: float, factor: float
) -> None:
    """Everett's theorem, for every adapter by itself."""
    one = drawn(seed, adapters=6, rank=4)
    cheap, dear = (priced(one, bases, torch.full((12,), mu), "float16") for mu in (worth, factor * worth))
    assert bool((dear.nbytes >= cheap.nbytes).all())
    assert bool((dear.residual <= cheap.residual + 1e-6 * one.energies).all())


@pytest.mark.parametrize("most", [1, 2**21])
def test_modules_are_priced_together_as_they_are_alone(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alike or not, with the same bases or others, all at once or a few at a time."""
    monkeypatch.setattr(pricing, "PRICES", most)
    shapes = [(40, 70), (70, 40), (40, 70), (40, 70), (40, 70)]
    curves = [drawn(seed, adapters=3 + (seed == 3), shape=shape) for seed, shape in enumerate(shapes)]
    bases = [EVERY[i % 4] for i in range(5)]
    mu = torch.linspace(1, 40, 8)
    bunches = pricing.bunches(curves)
    assert sorted(len(one.places) for one in bunches) == ([1] * 5 if most == 1 else [1, 1, 3])
    for bunch in bunches:
        for usual in (False, True):
            together = pricing.priced(bunch, bunch.of(bases), mu, "float16", usual=usual)
            chosen = pricing.best_bases(bunch, mu, "float16", bunch.of(bases))
            for i, place in enumerate(bunch.places):
                (alone,) = pricing.bunches([curves[place]])
                found = pricing.priced(alone, [bases[place]], mu, "float16", usual=usual)
                for field in fields(Priced):
                    assert torch.equal(getattr(together, field.name)[i], getattr(found, field.name)[0])
                assert [chosen[i]] == pricing.best_bases(alone, mu, "float16", [bases[place]])


@steady
@given(st.integers(0, 10_000), worths)
def test_bases_never_cost_more_than_none_or_than_those_of_before(seed: int, worth: float) -> None:
    one = drawn(seed, adapters=12, rank=4)
    mu = torch.full((24,), worth)

    (bunch,) = pricing.bunches([one])

    def total(bases: Bases) -> float:
        """What it costs by what is usual of its rows, a side without a basis half a per cent less."""
        cost = pricing.priced(bunch, [bases], mu, "float16", usual=True).cost.double().sum()
        alone = [bases.left, bases.right].count(None)
        return (float(cost) + pricing.basis_bytes(one, bases)) * 0.995**alone

    for start in (Bases(), BOTH):
        best = best_bases(one, mu, start)
        assert total(best) <= total(start) * (1 + 1e-6) + 1e-3
        assert total(best) <= total(Bases()) * (1 + 1e-6) + 1e-3
        for columns in SIZES[:2]:  # the right side is chosen first, from all
            for rate in pricing.BASIS_RATES:
                if start.left is None:
                    assert total(best) <= total(Bases(None, Basis(columns, rate))) * (1 + 1e-6) + 1e-3


def test_bases_are_taken_where_they_pay() -> None:
    """Forty adapters whose right sides lie in four directions share those; adapters with nothing in common do not."""
    random = torch.Generator().manual_seed(0)
    four = torch.randn(4, 200, generator=random)

    def factors(shared: bool) -> Tensor:
        return torch.randn(4, 4, generator=random) @ four if shared else torch.randn(4, 200, generator=random)

    found = []
    for shared in (True, False):
        made = related((4,) * 40, 80, 200, planted=4, noise=1.0)
        made = [type(f)(f.B, factors(shared), f.scale) for f in made]
        module, _ = prepare("m", made, Spec(ratio=4.0, device="cpu"))
        one = curve(module, range(40))
        worth = 300 / one.energies.float()
        found.append(best_bases(one, worth, Bases()))
    assert found[0].right is not None and found[0].right.columns == 4
    assert found[1] == Bases()


def test_worth_is_that_of_the_adapter_not_of_its_place() -> None:
    """Curves hold only adapters that have the module; worths are of all."""
    one = drawn(5, adapters=2)
    worth = torch.tensor([1e9, 0.0, 1e-9, 1e9])
    found = priced(one, Bases(), worth, "float16")
    assert one.having == (0, 2)
    assert int(found.nbytes[0]) == 2 * (taken(40, 0, None, WHOLE) + taken(70, 1, None, WHOLE))
    assert int(found.nbytes[1]) == 0
    assert float(found.residual[1]) == pytest.approx(float(one.energies[1]))


def test_zero_adapters_take_nothing() -> None:
    one = drawn(6)
    one.sigma[1] = 0
    for bases in EVERY:
        found = priced(one, bases, torch.full((6,), 1e12), "float16")
        assert float(found.cost[1]) == float(found.residual[1]) == float(found.nbytes[1]) == 0
        assert pricing.profile(found.rates[1].tolist(), int(found.loaded[1])) == Profile()
