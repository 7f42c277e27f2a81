"""The steps of auto's choice: a short menu, plans within their limits, who chooses again, bunches of modules."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planned import spec
from reference import steady
from safetensors.torch import load_file, save_file

from lorazip.compress import auto, job, planning, shrinkage
from lorazip.compress.auto import Plan
from lorazip.compress.profile import NOTHING, ORIGINAL, WHOLE, Bases, Basis, Profile
from lorazip.sources import Inputs, open_adapters


@pytest.fixture(scope="module")
def opened(few: Path) -> Inputs:
    return open_adapters([str(few)])


@pytest.fixture(scope="module")
def choice(opened: Inputs) -> planning.Choice:
    options = spec(max_error=0.1)
    return planning.choose(
        opened, options, [planning.survey(opened, options, name) for name in opened.modules]
    )


def test_the_menu_is_short_and_everyone_finds_something(choice: planning.Choice) -> None:
    menu = choice.table.menu
    assert menu[0] == NOTHING and menu[-1] == ORIGINAL
    assert len(set(menu)) == len(menu) <= auto.MENU + 8 + 1
    assert all(profile.nameable for profile in menu if profile.rank)
    assert {Profile((WHOLE,) * r, (WHOLE,) * r) for r in range(1, 9)} <= set(menu)


def test_choices_are_within_their_limits(choice: planning.Choice) -> None:
    table = choice.table

    def total(values: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        return values.gather(2, chosen[..., None])[..., 0].sum(1)

    previous = None
    for bound in (0.5, 0.1, 0.01, 1e-3):
        chosen = auto.within_errors(table, bound * table.energies)
        assert bool((total(table.residuals, chosen) <= bound * table.energies * (1 + 1e-9)).all())
        nbytes = total(table.nbytes, chosen)
        assert previous is None or bool((nbytes >= previous).all())
        previous = nbytes
    weights = 1 / table.energies
    errors = []
    for budget in (5_000, 20_000, 80_000):
        chosen = auto.within_bytes(table, budget, weights)
        assert 0.96 * budget < float(total(table.nbytes, chosen).sum()) <= budget
        errors.append(float((total(table.residuals, chosen) * weights).sum()))
    assert errors == sorted(errors, reverse=True)


def test_a_basis_that_nobody_uses_is_not_stored(choice: planning.Choice) -> None:
    table = choice.table
    assert any(bases.right for bases in table.bases)
    whole = torch.full(table.nbytes.shape[:2], len(table.menu) - 1)
    assert all(plan.bases == Bases() for plan in auto.plans(table, choice.curves, whole))
    for plan in choice.plans:
        for side, basis in enumerate((plan.bases.left, plan.bases.right)):
            assert (basis is not None) == any(profile.loaded[side] for profile in plan.profiles)


def test_only_adapters_that_miss_their_bound_choose_again(choice: planning.Choice) -> None:
    """One is found to lose a tenth more than foreseen in every module: it gets more bytes, the others keep theirs."""
    table, chosen = choice.table, choice.chosen
    allowed = shrinkage.allowed(0.1) * table.energies
    foreseen = table.residuals.gather(2, chosen[..., None])[..., 0]
    assert auto.repaired(table, chosen, foreseen, allowed, 0) is None
    measured = foreseen.clone()
    measured[2] *= 1.1
    found = auto.repaired(table, chosen, measured, allowed, 0)
    assert found is not None
    corrected, again = found
    others = [i for i in range(len(chosen)) if i != 2]
    assert torch.equal(again[others], chosen[others]) and not torch.equal(again[2], chosen[2])
    taken = [table.nbytes.gather(2, c[..., None])[2].sum() for c in (chosen, again)]
    assert taken[1] > taken[0]
    expected = corrected.residuals.gather(2, again[..., None])[2].sum()
    assert 0.95 * float(allowed[2]) < float(expected) <= float(allowed[2])
    last = auto.repaired(table, chosen, measured, allowed, auto.REPAIRS)
    assert last is not None and bool((last[1][2] == len(table.menu) - 1).all())
    assert torch.equal(last[1][others], chosen[others])


@steady
@given(st.integers(0, 10**6), st.integers(1, 90), st.integers(1, 12), st.booleans())
def test_the_menu_is_the_greedy_one(seed: int, offers: int, customers: int, coarse: bool) -> None:
    """Looking again only at what may be best chooses as looking at everything does."""
    costs = torch.rand(offers, customers, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    costs = (costs * 8).floor() * 100 if coarse else costs * 2000  # coarse: many offers are equally good
    served, chosen = costs[0], [0]
    while len(chosen) < auto.MENU:
        saved = (served - costs).clamp_min(0).sum(1)
        if float(saved.max()) <= auto.LISTED:
            break
        chosen.append(int(saved.argmax()))
        served = torch.minimum(served, costs[chosen[-1]])
    found = auto._served(costs)
    if coarse:  # which of equals is taken first is left open; no step is worse for it
        assert found[0] == 0 and len(set(found)) == len(found)
        served = costs[0]
        for best in found[1:]:
            saved = (served - costs).clamp_min(0).sum(1)
            assert float(saved[best]) == float(saved.max()) > auto.LISTED
            served = torch.minimum(served, costs[best])
        assert len(found) == auto.MENU or float((served - costs).clamp_min(0).sum(1).max()) <= auto.LISTED
    else:
        assert found == chosen


@pytest.mark.parametrize("aim", [{"ratio": 16.0}, {"budget": 300_000}])
def test_an_adapter_of_zeros_and_of_lower_rank_takes_nothing_from_the_others(
    few: Path, tmp_path: Path, aim: dict[str, Any]
) -> None:
    """Its weight is 0, and profiles of more rows than it has are infinitely far off: 0 times infinity is no number."""
    root = tmp_path / "zoo"
    shutil.copytree(few, root)
    without = job.run([root], spec(**aim), None)
    blank = root / "zero"
    shutil.copytree(next(path for path in sorted(root.iterdir()) if path.is_dir()), blank)
    weights = load_file(blank / "adapter_model.safetensors")
    cut = {n: v[:1].clone() if "lora_A" in n else torch.zeros_like(v[:, :1]) for n, v in weights.items()}
    save_file(cut, blank / "adapter_model.safetensors")
    config = json.loads((blank / "adapter_config.json").read_text())
    (blank / "adapter_config.json").write_text(json.dumps(config | {"r": 1}))
    found = job.run([root], spec(**aim), None)
    assert found.summary()["max_error"] <= 1.1 * without.summary()["max_error"] < 0.5


def test_plans_have_names_of_their_own() -> None:
    profiles = Profile((2.0,), (1.0,)), Profile((2.0,), (1.0,), (False, True)), NOTHING, ORIGINAL
    bases = Bases(), Bases(None, Basis(4, 2)), Bases(Basis(4, 2), None), Bases(None, Basis(4, 3))
    made = [Plan(b, order) for b in bases for order in (profiles, profiles[::-1])]
    assert len({plan.digest for plan in made}) == len(made)
    assert Plan(bases[1], profiles).digest == Plan(Bases(None, Basis(4, 2)), profiles).digest


@pytest.mark.parametrize("together", [1, 20_000, 60_000, 2**24])
def test_bunches_hold_all_modules_once_and_no_more_than_their_room(
    opened: Inputs, monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    monkeypatch.setattr(job, "TOGETHER", together)
    shapes = list(opened.modules.values())
    sizes = [6 * 8 * sum(shape) for shape in shapes]
    for indices in (list(range(9)), [1, 4, 5], [7], []):
        bunches = job._bunches(opened, indices)
        assert [index for bunch in bunches for index in bunch] == indices
        assert all(bunches)
        for bunch in bunches:
            assert len(bunch) == 1 or sum(sizes[i] for i in bunch) <= together
        for one, two in pairwise(bunches):  # another module would not have fitted
            half = -(-sum(sizes[i] for i in indices) // 2)
            assert sum(sizes[i] for i in [*one, two[0]]) > min(together, half)
    assert len(job._bunches(opened, range(9))) >= 2  # one for each of two workers at least


def test_bunches_change_nothing(few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for together in (1, 2**24):
        monkeypatch.setattr(job, "TOGETHER", together)
        made.append(job.run([few], spec(ratio=40.0), tmp_path / str(together)))
    assert made[0].bundle_bytes == pytest.approx(made[1].bundle_bytes, abs=20)  # digits of errors
    assert torch.allclose(made[0].adapter_errors, made[1].adapter_errors, rtol=1e-3)
