"""`--method auto`: bytes and errors are predicted, budgets are met, bounds are met."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from lorazip.bundle import Bundle
from lorazip.cli import group
from lorazip.compress import job, partial, sides
from lorazip.compress.spec import Spec
from lorazip.errors import UndecidedError, UsageError

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
    """Every ninth module of six of the real adapters, three of them with a shared start."""
    folder = tmp_path_factory.mktemp("few")
    inits = {
        row["task"]: row["init"] for row in map(json.loads, (ZOO / "scores.jsonl").read_text().splitlines())
    }
    for start in ("own", "shared"):
        for name in sorted(n for n, init in inits.items() if init == start)[:3]:
            tensors = load_file(ZOO / name / "adapter_model.safetensors")
            modules = sorted({key.split(".lora_")[0] for key in tensors})[::9]
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
    ("options", "near"), [({"ratio": 6.0}, 0.05), ({"ratio": 24.0}, 0.02), ({"max_error": 0.1}, 0.02)]
)
def test_a_dry_run_predicts(few: Path, tmp_path: Path, options: dict[str, Any], near: float) -> None:
    """docs/AUTO.md: within 2 % where much is lost, a few per cent too low where little is."""
    dry = job.run([few], spec(**options), None)
    wet = job.run([few], spec(**options), tmp_path / "b")
    assert dry.predicted and dry.bundle is None and not wet.predicted
    assert dry.bundle_bytes == pytest.approx(wet.bundle_bytes, rel=0.02)
    assert float(dry.adapter_errors.mean()) == pytest.approx(float(wet.adapter_errors.mean()), rel=near)


def test_auto_beats_every_other_method_at_its_bytes(few: Path, tmp_path: Path) -> None:
    """METHODS.md §5: never worse than the best single method at the same bytes."""
    others = [Spec("svd", rank=r, bits=b, device="cpu") for r, b in ((1, 2), (1, 3), (2, 3), (4, 4))]
    others.append(Spec("jd-full", rank=8, bits=4, device="cpu"))
    for at, other in enumerate(others):
        rival = job.run([few], other, tmp_path / f"o{at}")
        ours = job.run([few], spec(budget=rival.bundle_bytes), tmp_path / f"a{at}")
        assert ours.bundle_bytes <= rival.bundle_bytes
        assert float(ours.adapter_errors.mean()) <= 1.02 * float(rival.adapter_errors.mean())


def test_an_interrupted_run_goes_on(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = job.run([zoo], spec(ratio=3.0), tmp_path / "whole").bundle
    assert whole is not None

    def fail(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(job, "assemble", fail)
        job.run([zoo], spec(ratio=3.0), tmp_path / "b")
    assert len(list(partial.folder(tmp_path / "b").glob("*.safetensors"))) == len(MODULES)
    with monkeypatch.context() as patched:
        patched.setattr(sides, "encode_planned", fail)  # all shards are there
        job.run([zoo], spec(ratio=3.0), tmp_path / "b", resume=True)
    assert (tmp_path / "b" / "bundle.json").read_bytes() == (whole.path / "bundle.json").read_bytes()


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
