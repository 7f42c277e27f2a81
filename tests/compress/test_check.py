"""`verify --against`: true originals pass, changed ones do not. Its figures against dense float64 matrices."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import sqrt
from pathlib import Path

import pytest
import torch
from handmade import MakeAdapter
from safetensors.torch import load_file, save_file

from lorazip import Bundle, Spec
from lorazip.compress import check, job
from lorazip.sources import open_adapters

ZOO = Path(__file__).parents[2] / "examples" / "zoo"
CPU = torch.device("cpu")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Q = "base_model.model.model.layers.0.self_attn.q_proj"
HEAD = "base_model.model.head.weight"


@pytest.fixture
def zoo(make_adapter: MakeAdapter) -> Path:
    """Three adapters; bee carries a tensor, cat has other ranks and dtype."""
    make_adapter("zoo/ant")
    head = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    make_adapter("zoo/bee", modules_to_save=["head"], tensors={HEAD: head})
    make_adapter("zoo/cat", rank=3, dtype=torch.float16, use_rslora=True)
    return make_adapter.root / "zoo"


def compare(bundle: Path, *originals: Path) -> dict[str, check.Comparison]:
    inputs = open_adapters([str(path) for path in originals])
    return {c.name: c for c in check.compare(Bundle.open(bundle), inputs.adapters, CPU)}


def tensors(adapter: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrite the weights of an adapter."""
    content = load_file(adapter / WEIGHTS)
    change(content)
    save_file(content, adapter / WEIGHTS, metadata={"format": "pt"})


SPECS = [
    Spec("jd-full"),
    Spec("auto", ratio=3.0),
    Spec(method="svd", rank=1),
    Spec(method="svd", max_error=0, dtype="float16"),
    Spec(method="jd-full", rank=24, dtype="float32"),
    Spec(method="jd-full", max_error=0.2, clusters=2, dtype="bfloat16"),
    Spec(method="jd-diag", rank=2),
    Spec(method="eigenlora", rank=5),
    Spec(method="mean"),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.method}-{spec.rank}-{spec.max_error}")
def test_true_originals_pass_and_are_measured_exactly(zoo: Path, tmp_path: Path, spec: Spec) -> None:
    job.run([zoo], spec, tmp_path / "team")
    bundle = Bundle.open(tmp_path / "team")
    found = compare(tmp_path / "team", zoo)
    assert list(found) == ["ant", "bee", "cat"]
    for original in open_adapters([str(zoo)]).adapters:
        residual = energy = 0.0
        for module in original.modules:
            one, two = original.low_rank(module), bundle.adapter(original.name).low_rank(module)
            d = one.scale * (one.B.double() @ one.A.double())
            residual += float((two.B.double() @ two.A.double() - d).square().sum())
            energy += float(d.square().sum())
        comparison = found[original.name]
        assert comparison.problems == ()
        assert comparison.measured is not None and comparison.recorded is not None
        assert abs(sqrt(comparison.measured) - sqrt(residual / energy)) < 1e-7
        assert comparison.recorded == pytest.approx(comparison.measured, rel=1e-6, abs=1e-14)
        if spec.max_error == 0:
            assert comparison.recorded == 0 and comparison.measured < 1e-14


def one_weight(adapter: Path) -> None:
    def change(content: dict[str, torch.Tensor]) -> None:
        content[f"{Q}.lora_B.weight"][3, 1] *= 1.01

    tensors(adapter, change)


def sign_of_zero(adapter: Path) -> None:
    """A carried tensor is compared bit for bit."""

    def change(content: dict[str, torch.Tensor]) -> None:
        content[HEAD].view(torch.int16)[0, 0] ^= 1

    tensors(adapter, change)


def head_of_other_type(adapter: Path) -> None:
    tensors(adapter, lambda content: content.update({HEAD: content[HEAD].float()}))


def no_head(adapter: Path) -> None:
    tensors(adapter, lambda content: content.__delitem__(HEAD))


def one_module_less(adapter: Path) -> None:
    def change(content: dict[str, torch.Tensor]) -> None:
        for side in "AB":
            content.pop(f"{Q}.lora_{side}.weight")

    tensors(adapter, change)


def other_alpha(adapter: Path) -> None:
    fields = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(fields | {"lora_alpha": 16}))


def other_task(adapter: Path) -> None:
    fields = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(fields | {"task_type": "SEQ_CLS"}))


def field_more(adapter: Path) -> None:
    fields = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(fields | {"note": "mine"}))


CHANGES = {
    one_weight: "not the adapter that was compressed",
    sign_of_zero: f"{HEAD} differs",
    head_of_other_type: "it carries other tensors",
    no_head: "it carries other tensors",
    one_module_less: "it has other modules or shapes",
    other_alpha: "its config differs in lora_alpha",
    other_task: "its config differs in task_type",
    field_more: "its config differs in note",
}


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[1], SPECS[4], SPECS[8]], ids=lambda spec: spec.method)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_original_fails(
    zoo: Path, tmp_path: Path, change: Callable[[Path], None], spec: Spec
) -> None:
    job.run([zoo], spec, tmp_path / "team")
    change(zoo / "bee")
    found = compare(tmp_path / "team", zoo)
    assert found["ant"].problems == found["cat"].problems == ()
    assert len(found["bee"].problems) == 1
    assert CHANGES[change] in found["bee"].problems[0]


def test_swapped_originals_fail(zoo: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    make_adapter("zoo/dog")
    job.run([zoo], Spec("jd-full", rank=24, dtype="float32"), tmp_path / "team")
    found = compare(tmp_path / "team", zoo / "cat")
    assert found["cat"].problems == ()
    (zoo / "dog").rename(zoo / "other")
    (zoo / "ant").rename(zoo / "dog")
    (zoo / "other").rename(zoo / "ant")
    found = compare(tmp_path / "team", zoo)
    for name in ("ant", "dog"):
        measured = found[name].measured
        assert measured is not None and measured > 0.5
        assert "not the adapter that was compressed" in found[name].problems[0]


def test_an_original_that_the_bundle_lacks_fails(
    zoo: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    job.run([zoo], Spec(), tmp_path / "team")
    make_adapter("zoo/dog")
    found = compare(tmp_path / "team", zoo)
    assert found["dog"] == check.Comparison("dog", None, None, ("is not in the bundle",))
    assert found["ant"].problems == ()


def test_a_tiny_change_of_one_weight_in_a_real_adapter_is_seen(tmp_path: Path) -> None:
    """One sign among 460,800 weights: the root of the error moves by a few millionths."""
    names = ("ii_sum", "fv_product_company")
    job.run([ZOO / name for name in names], Spec("jd-full", rank=4), tmp_path / "team")
    copy = tmp_path / "ii_sum"
    copy.mkdir()
    for file in (WEIGHTS, CONFIG):
        (copy / file).write_bytes((ZOO / "ii_sum" / file).read_bytes())
    assert compare(tmp_path / "team", copy)["ii_sum"].problems == ()

    def change(content: dict[str, torch.Tensor]) -> None:
        weight = content["base_model.model.model.layers.18.self_attn.v_proj.lora_B.weight"].view(-1)
        weight[int((weight.abs() - weight.abs().mean()).abs().argmin())] *= -1

    tensors(copy, change)
    assert len(compare(tmp_path / "team", copy)["ii_sum"].problems) == 1


def test_errors_agree_up_to_rounding_only() -> None:
    assert check.agree(0.0, 0.0)
    assert check.agree(9e-14, 1.2e-13)  # as float64 and float32 decode one bundle of full rank
    assert check.agree(0.1600000001, 0.16)
    assert not check.agree(0.1600005, 0.16)
    assert not check.agree(1e-12, 0.0)
    assert not check.agree(0.0, 1e-12)


def test_progress_is_told_module_by_module(zoo: Path, tmp_path: Path) -> None:
    job.run([zoo], Spec(), tmp_path / "team")
    told: list[tuple[str, int, int]] = []
    bundle = Bundle.open(tmp_path / "team")
    check.compare(bundle, open_adapters([str(zoo)]).adapters, CPU, lambda *step: told.append(step))
    assert told == [("comparing", i, 6) for i in range(1, 7)]


def cancelling(eps: float) -> dict[str, torch.Tensor]:
    """B A = eps N A0 of B = (B0, eps N - B0), A = (A0, A0): what is large in both cancels."""
    random = torch.Generator().manual_seed(1)
    b, n = torch.randn(2, 64, 4, generator=random)
    a = torch.randn(4, 48, generator=random)
    return {f"{Q}.lora_B.weight": torch.cat([b, eps * n - b], 1), f"{Q}.lora_A.weight": torch.cat([a, a])}


OPTIONS = [
    Spec(max_error=0.1),
    Spec("svd", max_error=0.01),
    Spec("svd", max_error=0.01, bits=2),
    Spec("jd-full", max_error=0.1),
]


@pytest.mark.parametrize("spec", OPTIONS, ids=lambda spec: f"{spec.method}-{spec.bits}")
@pytest.mark.parametrize("eps", [1e-3, 3e-4, 1e-5, 1e-6, 1e-7, 0])
def test_factors_that_nearly_cancel_are_bounded_and_told_truly(
    make_adapter: MakeAdapter, tmp_path: Path, eps: float, spec: Spec
) -> None:
    """Against the product in float64, which has eight digits of the smallest of these."""
    shapes = {"model.layers.0.self_attn.q_proj": (64, 48)}
    odd = make_adapter("zoo/odd", modules=shapes, rank=8, alpha=8, tensors=cancelling(eps))
    other = make_adapter("zoo/plain", modules=shapes, rank=8)
    stored = job.run([str(odd), str(other)], spec, tmp_path / "out").bundle
    assert stored is not None
    b, a = (t.double() for t in cancelling(eps).values())
    factor = stored.adapter("odd").low_rank("model.layers.0.self_attn.q_proj")
    true, kept = b @ a, factor.scale * factor.B.double() @ factor.A.double()
    record = stored.adapter("odd").record
    if eps:
        error = float((kept - true).square().sum() / true.square().sum())
        assert record.error == pytest.approx(error, rel=1e-4, abs=1e-12)
        assert record.error <= (spec.max_error or 0)
    else:
        assert record.error == 0 and float(kept.abs().max()) < 1e-5
    assert all(not one.problems for one in compare(tmp_path / "out", odd, other).values())
