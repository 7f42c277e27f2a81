"""`--method auto`: bytes and errors are foreseen, budgets and bounds are met, and no other method does better."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from planned import spec
from safetensors.torch import load_file, save_file

from lorazip import unfinished
from lorazip.bundle import Bundle
from lorazip.cli import group
from lorazip.compress import check, job, planning, sides
from lorazip.compress.spec import Spec
from lorazip.errors import UndecidedError, UsageError
from lorazip.sources import open_adapters

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
    ("options", "near"),
    [({"ratio": 2.0}, 0.04), ({"ratio": 3.0}, 0.03), ({"ratio": 24.0}, 0.02), ({"max_error": 0.1}, 0.02)],
)
def test_a_dry_run_predicts(few: Path, tmp_path: Path, options: dict[str, Any], near: float) -> None:
    """Nine modules of six adapters; of all modules both are nearer."""
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
