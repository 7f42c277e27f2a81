"""The scripts of benchmarks/ that others rely on: generated adapters, and the error that peers are measured by."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorazip import Spec
from lorazip.compress import job
from lorazip.sources import open_adapters

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def script(name: str) -> ModuleType:
    """A script of benchmarks/, imported from its file: the folder is no package."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # frozen dataclasses look their module up
    spec.loader.exec_module(module)
    return module


generate = script("generate")
RECIPE = generate.Recipe(
    rank=4, layers=2, planted=4, clusters=2, noise=0.25, dtype="float32", seed=0, small=True
)


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_generated_adapters_are_a_prefix_of_a_larger_set_and_resumed(tmp_path: Path) -> None:
    assert generate.generate(tmp_path / "a", 3, RECIPE) == 3
    assert generate.generate(tmp_path / "b", 5, RECIPE) == 5
    for name in ("gen_0000", "gen_0001", "gen_0002"):
        assert weights(tmp_path / "a" / name) == weights(tmp_path / "b" / name)
    lost = tmp_path / "a" / "gen_0001"
    (lost / "adapter_model.safetensors").unlink()
    assert generate.generate(tmp_path / "a", 3, RECIPE) == 1
    assert weights(lost) == weights(tmp_path / "b" / "gen_0001")
    adapters = open_adapters([str(tmp_path / "b")]).adapters
    assert [len(adapter.modules) for adapter in adapters] == [6] * 5
    assert {info.rank for adapter in adapters for info in adapter.modules.values()} == {4}


def test_generated_adapters_of_another_recipe_are_not_mixed(tmp_path: Path) -> None:
    generate.generate(tmp_path, 1, RECIPE)
    with pytest.raises(SystemExit, match="another recipe"):
        generate.generate(tmp_path, 2, replace(RECIPE, noise=0.5))


def test_generated_adapters_have_the_planted_error() -> None:
    recipe = replace(RECIPE, rank=16, planted=16, layers=1, small=False)
    bases = generate.planted_bases(recipe, 0)
    tensors = generate.adapter(recipe, 0, bases)
    energy = captured = 0.0
    for name, (left, right) in bases.items():
        key = f"base_model.model.{name}.lora_"
        a, b = tensors[f"{key}A.weight"], tensors[f"{key}B.weight"]
        energy += float(((b.T @ b) * (a @ a.T)).sum())
        captured += float(((left.T @ b) @ (a @ right)).square().sum())
    assert 1 - captured / energy == pytest.approx(1 - 0.75**2, abs=0.05)


def test_a_peers_error_is_that_of_the_dense_matrices(tmp_path: Path) -> None:
    generate.generate(tmp_path / "original", 1, RECIPE)
    folder = tmp_path / "original" / "gen_0000"
    tensors = load_file(folder / "adapter_model.safetensors")
    random = torch.Generator().manual_seed(0)
    changed = {key: t + 0.1 * torch.randn(t.shape, generator=random) for key, t in tensors.items()}
    gone = "base_model.model.model.layers.1.self_attn.v_proj"
    kept = {key: tensor for key, tensor in changed.items() if not key.startswith(gone)}
    (tmp_path / "restored").mkdir()
    save_file(kept, tmp_path / "restored" / "adapter_model.safetensors")
    (original,) = open_adapters([str(folder)]).adapters
    residual, energy = script("peers").residual_and_energy(original, tmp_path / "restored")

    expected_residual = expected_energy = 0.0
    for key in tensors:
        if key.endswith("lora_A.weight"):
            other = key.replace("lora_A", "lora_B")
            dense = 2 * tensors[other].double() @ tensors[key].double()
            back = 2 * changed[other].double() @ changed[key].double() if key in kept else torch.zeros(())
            expected_residual += float((back - dense).square().sum())
            expected_energy += float(dense.square().sum())
    assert residual == pytest.approx(expected_residual, rel=1e-9)
    assert energy == pytest.approx(expected_energy, rel=1e-9)


@pytest.mark.parametrize(
    "spec",
    [
        Spec("svd", rank=2),
        Spec("svd", rank=3, bits=2.5),
        Spec("svd", rank=4, bits=1.25),
        Spec("jd-full", rank=6, clusters=1),
        Spec("jd-full", rank=5, clusters=2, bits=3),
        Spec("jd-full", rank=5, clusters=1, basis_bits=2.5, core_bits=3),
        Spec("jd-diag", rank=7, clusters=1),
        Spec("eigenlora", rank=5, clusters=1),
    ],
)
def test_a_bundles_bytes_are_foreseen(spec: Spec, tmp_path: Path) -> None:
    """The frontier looks for the largest setting within a budget by these bytes; a dry run makes the real ones."""
    methods = script("frontier_methods")
    generate.generate(tmp_path / "zoo", 5, replace(RECIPE, noise=1.0))
    inputs = open_adapters([str(tmp_path / "zoo")])
    made = job.run([tmp_path / "zoo"], spec, None)
    # Digits of errors differ, and what clusters lay where: some bytes of the manifest.
    assert methods.Sizes(inputs).of_bundle(spec) == pytest.approx(made.bundle_bytes, abs=40 * 5)
