"""`--method auto`: bytes and errors are foreseen, budgets and bounds are met, and no other method does better."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from reference import steady
from safetensors.torch import load_file, save_file

from lorazip import unfinished
from lorazip.bundle import Bundle
from lorazip.cli import group
from lorazip.compress import auto, check, job, planning, sides
from lorazip.compress.auto import Plan
from lorazip.compress.profile import NOTHING, ORIGINAL, WHOLE, Bases, Basis, Profile
from lorazip.compress.spec import Spec
from lorazip.errors import UndecidedError, UsageError
from lorazip.sources import Inputs, open_adapters

ZOO = Path(__file__).parents[2] / "examples" / "zoo"
MODULES = {"a.q_proj": (96, 160), "a.k_proj": (48, 160), "b.q_proj": (96, 160), "b.k_proj": (48, 160)}


@pytest.fixture
def zoo(make_adapter: Any) -> Path:
    """Five adapters: one lacks modules, one has other ranks, one carries a tensor, one is zero in a module."""
    make_adapter("zoo/ant", modules=MODULES)
    make_adapter("zoo/bee", modules=dict(list(MODULES.items())[:2]), rank=3)
    bias = torch.randn(5, generator=torch.Generator().manual_seed(0))
    carried: dict[str, Any] = {"base_model.model.head.weight": bias}
    make_adapter("zoo/cat", modules=MODULES, modules_to_save=["head"], tensors=carried)
    zero = {"base_model.model.b.k_proj.lora_B.weight": torch.zeros(48, 4)}
    make_adapter("zoo/dog", modules=MODULES, tensors=zero)
    path: Path = make_adapter("zoo/elk", modules=MODULES, rank=6, dtype=torch.bfloat16)
    return path.parent


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every tenth module, three of each kind, of six of the real adapters, three of them with a shared start."""
    folder = tmp_path_factory.mktemp("few")
    inits = {
        row["task"]: row["init"] for row in map(json.loads, (ZOO / "scores.jsonl").read_text().splitlines())
    }
    for start in ("own", "shared"):
        for name in sorted(n for n, init in inits.items() if init == start)[:3]:
            tensors = load_file(ZOO / name / "adapter_model.safetensors")
            modules = sorted({key.split(".lora_")[0] for key in tensors})[::10]
            assert {module.rpartition(".")[2] for module in modules} == {"q_proj", "k_proj", "v_proj"}
            (folder / name).mkdir()
            kept = {key: tensor for key, tensor in tensors.items() if key.split(".lora_")[0] in modules}
            save_file(kept, folder / name / "adapter_model.safetensors")
            shutil.copy(ZOO / name / "adapter_config.json", folder / name)
    return folder


def spec(**options: Any) -> Spec:
    return Spec("auto", device="cpu", **options)


def ratio(outcome: job.Outcome) -> float:
    return outcome.original_bytes / outcome.bundle_bytes


@pytest.mark.parametrize("aim", [2.0, 3.5, 6.0])
def test_ratio_is_met_and_used(zoo: Path, tmp_path: Path, aim: float) -> None:
    outcome = job.run([zoo], spec(ratio=aim), tmp_path / "b")
    assert outcome.bundle is not None and outcome.bundle.nbytes == outcome.bundle_bytes
    assert aim <= ratio(outcome) < 1.03 * aim


@pytest.mark.parametrize("aim", [4.0, 25.0])
def test_ratio_of_real_adapters_is_used_within_one_per_cent(few: Path, tmp_path: Path, aim: float) -> None:
    outcome = job.run([few], spec(ratio=aim), tmp_path / "b")
    assert aim <= ratio(outcome) < 1.01 * aim


@pytest.mark.parametrize(("bound", "used"), [(0.5, 0.85), (0.1, 0.95), (0.01, 0.95), (1e-4, 0.7), (0.0, 1.0)])
def test_bounds_of_real_adapters_are_met_and_used(
    few: Path, tmp_path: Path, bound: float, used: float
) -> None:
    """No adapter is above, and none is far below: six adapters pay for few profiles to choose from."""
    outcome = job.run([few], spec(max_error=bound), tmp_path / "b")
    errors = outcome.adapter_errors
    assert bool((errors <= bound).all())
    assert bool((errors >= used * bound).all())
    assert outcome.bundle is not None
    original = open_adapters([str(few)])
    for comparison in check.compare(outcome.bundle, original.adapters, torch.device("cpu")):
        assert comparison.problems == () and comparison.measured is not None
        assert comparison.measured <= bound * (1 + 1e-6) + 1e-13


def test_budget_is_met_and_more_of_it_lowers_the_error(zoo: Path) -> None:
    errors = []
    for budget in (9_000, 12_000, 20_000, 40_000, 10**9):
        outcome = job.run([zoo], spec(budget=budget), None)
        assert outcome.bundle_bytes <= budget
        errors.append(float(outcome.adapter_errors.mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0


def test_too_small_a_budget_is_refused(zoo: Path) -> None:
    with pytest.raises(UndecidedError, match="too few"):
        job.run([zoo], spec(budget=500), None)


@pytest.mark.parametrize("bound", [0.0, 1e-5, 0.01, 0.1, 0.5])
def test_every_adapter_meets_the_bound_and_comes_near_it(zoo: Path, tmp_path: Path, bound: float) -> None:
    outcome = job.run([zoo], spec(max_error=bound), tmp_path / "b")
    assert bool((outcome.adapter_errors <= bound).all())
    assert outcome.bundle is not None
    stored = [record.error for record in outcome.bundle.manifest.adapters]
    assert stored == pytest.approx(outcome.adapter_errors.tolist(), rel=1e-6)
    if bound == 0.1:
        assert float(outcome.adapter_errors.mean()) > 0.08


@pytest.mark.parametrize("options", [{"ratio": 3.0}, {"max_error": 0.2}])
def test_resumed_and_repeated_runs_give_the_same_bytes(
    zoo: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    wet = job.run([zoo], spec(**options), tmp_path / "b", force=True)
    first = (tmp_path / "b" / "bundle.json").read_bytes()
    found = job.run([zoo], spec(**options), tmp_path / "b", resume=True)  # finished: measured again
    assert not bool(found.fallbacks.any())
    assert torch.allclose(found.adapter_errors, wet.adapter_errors, atol=1e-6)
    again = job.run([zoo], spec(**options), tmp_path / "c", force=True)
    assert again.bundle is not None and (tmp_path / "c" / "bundle.json").read_bytes() == first


@pytest.mark.parametrize(
    ("options", "near"), [({"ratio": 6.0}, 0.02), ({"ratio": 24.0}, 0.02), ({"max_error": 0.1}, 0.02)]
)
def test_a_dry_run_predicts(few: Path, tmp_path: Path, options: dict[str, Any], near: float) -> None:
    dry = job.run([few], spec(**options), None)
    wet = job.run([few], spec(**options), tmp_path / "b")
    assert dry.predicted and dry.bundle is None and not wet.predicted
    assert dry.bundle_bytes == pytest.approx(wet.bundle_bytes, rel=0.02)
    assert float(dry.adapter_errors.mean()) == pytest.approx(float(wet.adapter_errors.mean()), rel=near)


def test_auto_beats_every_other_method_at_its_bytes(few: Path, tmp_path: Path) -> None:
    """METHODS.md §5: never worse than the best single method at the same bytes."""
    others = [Spec("svd", rank=r, bits=b, device="cpu") for r, b in ((1, 2), (2, 3), (3, 4))]
    others += [Spec("jd-full", rank=8, bits=3, clusters=1, device="cpu")]
    others += [Spec("jd-full", rank=20, bits=4, clusters=1, device="cpu")]
    for at, other in enumerate(others):
        rival = job.run([few], other, tmp_path / f"o{at}")
        ours = job.run([few], spec(budget=rival.bundle_bytes), tmp_path / f"a{at}")
        assert ours.bundle_bytes <= rival.bundle_bytes
        assert float(ours.adapter_errors.mean()) <= float(rival.adapter_errors.mean()), other


def test_an_interrupted_run_goes_on(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = job.run([zoo], spec(ratio=3.0), tmp_path / "whole").bundle
    assert whole is not None

    def fail(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(job, "assemble", fail)
        job.run([zoo], spec(ratio=3.0), tmp_path / "b")
    assert len(list(unfinished.folder(tmp_path / "b").glob("*.safetensors"))) == len(MODULES)
    with monkeypatch.context() as patched:
        patched.setattr(sides, "encode_planned", fail)  # all shards are there
        job.run([zoo], spec(ratio=3.0), tmp_path / "b", resume=True)
    assert (tmp_path / "b" / "bundle.json").read_bytes() == (whole.path / "bundle.json").read_bytes()


def invoke(*arguments: Any) -> str:
    result = CliRunner().invoke(group, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_bundle_of_auto_is_changed_exported_and_verified(few: Path, tmp_path: Path) -> None:
    """Shared sides stay those of the adapters that are left; one that comes back is measured on them."""
    bundle, first = tmp_path / "b", sorted(path.name for path in few.iterdir())[0]
    invoke("compress", few, "-o", bundle, "--max-error", 0.2)
    before = {adapter.name: adapter.record.error for adapter in Bundle.open(bundle)}
    assert any(module.layout for module in Bundle.open(bundle).manifest.modules)
    invoke("verify", bundle, "--against", few)
    invoke("export", bundle, "-o", tmp_path / "peft")
    invoke("export", bundle, *list(before)[1:4], "--bundle", "-o", tmp_path / "three")
    three = Bundle.open(tmp_path / "three")
    assert three.verify() == [] and {a.name: a.record.error for a in three} == dict(list(before.items())[1:4])
    originals = {adapter.name: adapter for adapter in open_adapters([str(few)]).adapters}
    exported = {adapter.name: adapter for adapter in open_adapters([str(tmp_path / "peft")]).adapters}
    for name, error in before.items():
        residual = energy = 0.0
        for module in originals[name].modules:
            one, two = originals[name].low_rank(module), exported[name].low_rank(module)
            d = one.scale * one.B.double() @ one.A.double()
            residual += float((two.scale * two.B.double() @ two.A.double() - d).square().sum())
            energy += float(d.square().sum())
            if name in three.names:
                again = three.adapter(name).low_rank(module)
                assert torch.allclose(again.B @ again.A, two.scale * two.B @ two.A, atol=1e-6)
        assert residual / energy == pytest.approx(error, rel=1e-5)
    invoke("remove", bundle, first)
    assert {a.name: a.record.error for a in Bundle.open(bundle)} == {
        n: e for n, e in before.items() if n != first
    }
    invoke("add", bundle, few / first)
    invoke("verify", bundle, "--against", few)
    assert Bundle.open(bundle).adapter(first).record.error <= 0.2


def test_adding_to_a_bundle_of_auto(zoo: Path, make_adapter: Any, tmp_path: Path) -> None:
    job.run([zoo], spec(ratio=3.0), tmp_path / "b")
    make_adapter("new/fox", modules=MODULES)
    result = CliRunner().invoke(group, ["add", str(tmp_path / "b"), str(tmp_path / "new")])
    assert result.exit_code == 0, result.output
    bundle = Bundle.open(tmp_path / "b")
    assert "fox" in bundle.names
    worst = max(a.error for a in bundle.manifest.adapters if a.name != "fox")
    assert next(a.error for a in bundle.manifest.adapters if a.name == "fox") <= worst


@pytest.mark.parametrize(
    "options",
    [
        {"method": "auto", "ratio": 4.0, "max_error": 0.1},
        {"method": "auto", "ratio": 4.0, "rank": 3},
        {"method": "auto", "ratio": 4.0, "bits": 3},
        {"method": "auto", "ratio": 4.0, "clusters": 2},
        {"method": "auto", "ratio": 4.0, "energy": 0.5},
        {"method": "auto", "ratio": 0.0},
        {"method": "auto", "budget": 0},
        {"method": "auto", "budget": 1.5},
        {"method": "svd", "ratio": 4.0},
        {"method": "jd-full", "budget": 1000},
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Spec(**options)


def test_info_and_report_say_what_was_chosen(zoo: Path, tmp_path: Path) -> None:
    output, page = tmp_path / "b", tmp_path / "r.html"
    run = [
        "compress",
        str(zoo),
        "-o",
        str(output),
        "--method",
        "auto",
        "--ratio",
        "3",
        "--report",
        str(page),
        "--json",
    ]
    result = CliRunner().invoke(group, run)
    assert result.exit_code == 0, result.output
    storage = json.loads(result.stdout)["storage"]
    assert sum(storage.values()) == 4 * len(MODULES) + 2
    most = next(iter(storage))
    assert f"{most} ({storage[most]})" in page.read_text()
    told = CliRunner().invoke(group, ["info", str(output)]).output
    assert f"stored as: {most} {storage[most]}" in " ".join(told.split())
    assert json.loads(CliRunner().invoke(group, ["info", str(output), "--json"]).output)["storage"] == storage


# --- odd inputs -------------------------------------------------------------------------------------------------------


def test_adapters_of_zeros_take_nothing(make_adapter: Any, tmp_path: Path) -> None:
    zero = {f"base_model.model.{m}.lora_B.weight": torch.zeros(out, 4) for m, (out, _) in MODULES.items()}
    for name in ("nil", "nought", "zip"):
        make_adapter(f"none/{name}", modules=MODULES, tensors=zero)
    for options in ({}, {"ratio": 2.0}):
        outcome = job.run([tmp_path / "none"], spec(**options), tmp_path / "b", force=True)
        assert outcome.adapter_errors.tolist() == [0, 0, 0]
        assert outcome.storage == {"nothing": 12}
    make_adapter("some/one", modules=MODULES)
    outcome = job.run([tmp_path / "none", tmp_path / "some"], spec(), tmp_path / "c")
    assert outcome.storage["nothing"] == 12
    assert outcome.adapter_errors.tolist() == pytest.approx([0, 0, 0.08, 0], abs=0.02)


@pytest.mark.parametrize("strength", [1e-12, 1e-6, 1e4, 1e10])
def test_an_adapter_of_another_strength_is_compressed_like_others(
    zoo: Path, make_adapter: Any, tmp_path: Path, strength: float
) -> None:
    path = make_adapter("zoo/fox", modules=MODULES, seed=5) / "adapter_model.safetensors"
    usual = job.run([zoo], spec(), tmp_path / "usual")
    tensors = {key: t * strength if "lora_B" in key else t for key, t in load_file(path).items()}
    save_file(tensors, path)
    outcome = job.run([zoo], spec(), tmp_path / "b")
    assert outcome.inputs.adapters[5].name == "fox"
    assert 0.08 < float(outcome.adapter_errors[5]) <= 0.1
    assert outcome.bundle_bytes == pytest.approx(usual.bundle_bytes, rel=0.03)


def test_one_adapter_alone(make_adapter: Any, tmp_path: Path) -> None:
    make_adapter("alone/ant", modules=MODULES)
    for options in ({}, {"ratio": 4.0}):
        outcome = job.run([tmp_path / "alone"], spec(**options), tmp_path / "b", force=True)
        assert outcome.bundle is not None and not any(m.layout for m in outcome.bundle.manifest.modules)
        assert 0 < float(outcome.adapter_errors) < 0.5


# --- the steps of the choice ------------------------------------------------------------------------------------------


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
        assert 0.97 * budget < float(total(table.nbytes, chosen).sum()) <= budget
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
    foreseen = table.residuals.gather(2, chosen[..., None])[..., 0]
    assert auto.repaired(table, chosen, foreseen, 0.1, 0) is None
    measured = foreseen.clone()
    measured[2] *= 1.1
    found = auto.repaired(table, chosen, measured, 0.1, 0)
    assert found is not None
    corrected, again = found
    others = [i for i in range(len(chosen)) if i != 2]
    assert torch.equal(again[others], chosen[others]) and not torch.equal(again[2], chosen[2])
    taken = [table.nbytes.gather(2, c[..., None])[2].sum() for c in (chosen, again)]
    assert taken[1] > taken[0]
    expected = corrected.residuals.gather(2, again[..., None])[2].sum()
    assert 0.095 * float(table.energies[2]) < float(expected) <= 0.1 * float(table.energies[2])
    last = auto.repaired(table, chosen, measured, 0.1, auto.REPAIRS)
    assert last is not None and bool((last[1][2] == len(table.menu) - 1).all())
    assert torch.equal(last[1][others], chosen[others])


def test_a_bound_that_is_missed_for_ever_ends_with_the_originals(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured errors that never fall: after some rounds what misses its bound is kept as it was."""
    real = planning.module_errors

    def worse(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        residuals, energies = real(*arguments)
        return torch.where(residuals > 0, 1e3 * energies, residuals), energies

    monkeypatch.setattr(planning, "module_errors", worse)
    outcome = job.run([zoo], spec(max_error=0.3), tmp_path / "b")
    assert outcome.adapter_errors.tolist() == [0] * 5


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
