"""Adapters -> bundle -> PEFT: exports have the bundle's effect, and what is carried comes back bit for bit."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import MakeAdapter
from safetensors.torch import load_file
from torch import Tensor, nn

from lorazip import BundleAdapter, LowRank, Spec
from lorazip.compress import job
from lorazip.export import export
from lorazip.sources import open_adapters

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the libraries, about themselves
    import peft
    import transformers

ZOO = Path(__file__).parents[1] / "examples" / "zoo"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
P = "base_model.model."
IDS = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def calm() -> Iterator[None]:
    """PEFT and transformers warn about the tiny models; on a busy machine threads make their layers slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)


def llama(hidden: int = 24, layers: int = 2, heads: int = 3, groups: int = 1, **fields: Any) -> nn.Module:
    """A random Llama; by default with the shapes of `make_adapter`."""
    torch.manual_seed(0)
    shape = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    config = transformers.LlamaConfig(
        **shape, num_key_value_heads=groups, intermediate_size=32, vocab_size=40, **fields
    )
    return transformers.LlamaForCausalLM(config).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def merged(base: nn.Module, adapter: BundleAdapter) -> Tensor:
    """The logits of a base with the bundle's D^ added to its weights, by hand."""
    before = {module: base.get_submodule(module).weight.detach().clone() for module in adapter.modules}
    for module in adapter.modules:
        factor = adapter.low_rank(module)
        base.get_submodule(module).weight.data += factor.B @ factor.A
    found = logits(base)
    for module, weight in before.items():
        base.get_submodule(module).weight.data = weight
    return found


def assert_same_effect(found: Tensor, expected: Tensor, base: Tensor) -> None:
    """Equal to 1e-4, also if one looks at what the adapter changes only."""
    assert float((found - expected).norm() / expected.norm()) < 1e-4
    effect = float((expected - base).norm())
    assert effect > 1e-3 * float(base.norm())
    assert float((found - expected).norm()) < 1e-3 * effect


def loaded(base: nn.Module, directory: Path, names: list[str]) -> peft.PeftModel:
    """PEFT's model with all these adapters."""
    model = peft.PeftModel.from_pretrained(base, directory / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(directory / name, adapter_name=name)
    return model.eval()


def test_the_twelve_adapters_of_the_zoo(tmp_path: Path) -> None:
    """SmolLM2-135M's attention, all 30 layers; its MLP and vocabulary, which no adapter touches, are small."""
    bundle = job.run([ZOO], Spec("jd-full", rank=6), tmp_path / "team").bundle
    assert bundle is not None
    export(bundle, [], tmp_path / "peft")
    assert len(bundle.names) == 12
    base = llama(576, 30, 9, 3)
    untouched = logits(base)
    model = loaded(copy.deepcopy(base), tmp_path / "peft", bundle.names)
    seen = []
    for name in bundle.names:
        model.set_adapter(name)
        found = logits(model)
        assert_same_effect(found, merged(base, bundle.adapter(name)), untouched)
        assert all(float((found - other).norm()) > 1e-3 * float(found.norm()) for other in seen)
        seen.append(found)
        config = json.loads((tmp_path / "peft" / name / CONFIG).read_text())
        assert config["lora_alpha"] == config["r"] and config["use_rslora"] is False
        original = json.loads((ZOO / name / CONFIG).read_text())
        for key in ("base_model_name_or_path", "task_type", "bias", "peft_type"):
            assert config[key] == original[key]
    assert torch.equal(logits(base), untouched)


SPECS = {
    "svd": Spec(method="svd", rank=2),
    "svd-bf16": Spec(method="svd", energy=0.8, dtype="bfloat16"),
    "raw": Spec(method="svd", max_error=0),
    "jd-full": Spec(method="jd-full", rank=5),
    "clusters": Spec(method="jd-full", rank=3, clusters=2),
    "fallbacks": Spec(method="jd-full", rank=2, max_error=0.3),
    "jd-diag": Spec(method="jd-diag", rank=6),
    "eigenlora": Spec(method="eigenlora", rank=6, weights="trained"),
    "mean": Spec(method="mean"),
}


@pytest.fixture
def mixed(make_adapter: MakeAdapter) -> Path:
    """Adapters of mixed ranks, scales, dtypes and target modules; one is zero in a module."""
    modules = make_adapter.modules
    q, k = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj"
    make_adapter("zoo/ant", rank={module: 2 + i for i, module in enumerate(modules)})
    make_adapter("zoo/bee", rank=3, use_rslora=True, alpha=5, dtype=torch.bfloat16)
    make_adapter("zoo/cat", rank=1, alpha_pattern={"k_proj": 3}, dtype=torch.float16)
    make_adapter("zoo/dog", modules={q: modules[q], k: modules[k]}, alpha=12)
    make_adapter("zoo/elk", modules={"model.layers.0.mlp.up_proj": (32, 24), q: modules[q]}, rank=5)
    make_adapter("zoo/fox", tensors={f"{P}{q}.lora_B.weight": torch.zeros(24, 4)})
    return make_adapter.root / "zoo"


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_every_method_on_mixed_adapters(mixed: Path, tmp_path: Path, spec: Spec) -> None:
    outcome = job.run([mixed], spec, tmp_path / "team")
    assert outcome.bundle is not None
    if spec.max_error == 0.3:
        assert 0 < int(outcome.fallbacks.sum()) < 20
    export(outcome.bundle, [], tmp_path / "peft")
    base = llama()
    untouched = logits(base)
    model = loaded(copy.deepcopy(base), tmp_path / "peft", outcome.bundle.names)
    for name in outcome.bundle.names:
        model.set_adapter(name)
        assert_same_effect(logits(model), merged(base, outcome.bundle.adapter(name)), untouched)


@pytest.mark.parametrize(("dtype", "rounding"), [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_half_precision_exports(mixed: Path, tmp_path: Path, dtype: str, rounding: float) -> None:
    bundle = job.run([mixed], Spec("jd-full", rank=4), tmp_path / "team").bundle
    assert bundle is not None
    export(bundle, ["ant", "elk"], tmp_path / "peft", dtype=dtype)
    for name in ("ant", "elk"):
        tensors = load_file(tmp_path / "peft" / name / WEIGHTS)
        assert {str(tensor.dtype) for tensor in tensors.values()} == {f"torch.{dtype}"}
        for module in bundle.adapter(name).modules:
            factor = bundle.adapter(name).low_rank(module)
            b, a = (tensors[P + module + end].float() for end in (".lora_B.weight", ".lora_A.weight"))
            exact = factor.B @ factor.A
            assert float((b @ a - exact).norm()) <= 2 * rounding * float(exact.norm())
            assert torch.allclose(b.norm(dim=0), a.norm(dim=1), rtol=4 * rounding)  # one range for both
    base = llama()
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "peft" / "ant").eval()
    expected, untouched = merged(base, bundle.adapter("ant")), logits(base)
    assert float((logits(model) - expected).norm()) < 4 * rounding * float((expected - untouched).norm())


def test_full_rank_is_exact(mixed: Path, tmp_path: Path) -> None:
    for method in ("jd-full", "jd-diag", "eigenlora", "svd"):
        spec = Spec(method=method, rank=100, dtype="float32")
        bundle = job.run([mixed], spec, tmp_path / method).bundle
        assert bundle is not None
        for original in open_adapters([str(mixed)]).adapters:
            stored = bundle.adapter(original.name)
            assert stored.record.error < 1e-10
            assert relative_error(original.low_rank, stored.low_rank, list(original.modules)) < 1e-10
    bundle = job.run([mixed], Spec(method="svd", max_error=0), tmp_path / "raw").bundle
    assert bundle is not None
    assert max(record.error for record in bundle.manifest.adapters) == 0


def relative_error(first: Any, second: Any, modules: list[str]) -> float:
    """sum ||D^ - D||^2 / sum ||D||^2 in float64."""

    def dense(factor: LowRank) -> Tensor:
        return factor.scale * (factor.B.double() @ factor.A.double())

    pairs = [(dense(first(module)), dense(second(module))) for module in modules]
    return float(sum((d - e).square().sum() for d, e in pairs) / sum(d.square().sum() for d, _ in pairs))


def test_the_recorded_error_is_that_of_the_exported_adapter(mixed: Path, tmp_path: Path) -> None:
    """Measured from two directories of PEFT and nothing else."""
    for name, spec in SPECS.items():
        bundle = job.run([mixed], spec, tmp_path / name).bundle
        assert bundle is not None
        export(bundle, [], tmp_path / f"peft-{name}")
        exported = {a.name: a for a in open_adapters([str(tmp_path / f"peft-{name}")]).adapters}
        for original in open_adapters([str(mixed)]).adapters:
            again = exported[original.name]
            assert list(again.modules) == list(original.modules)
            assert {info.scale for info in again.modules.values()} == {1.0}
            measured = relative_error(original.low_rank, again.low_rank, list(original.modules))
            recorded = bundle.adapter(original.name).record.error
            assert abs(sqrt(measured) - sqrt(recorded)) < 2e-7


EXTRAS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True, "lora_alpha": 12, "rank_pattern": {"k_proj": 2}},
    "saved": {"modules_to_save": ["lm_head", "norm"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"], "lora_alpha": 3},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "tokens": {"trainable_token_indices": [1, 5]},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj"],
        "rank_pattern": {"layers.1.self_attn.v_proj": 6, "k_proj": 3},
        "alpha_pattern": {"self_attn.k_proj$": 5, "up_proj": 32},
    },
    "rslora": {"use_rslora": True, "lora_alpha": 7, "rank_pattern": {"q_proj": 6}},
    "biased": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True, "lora_alpha": 6},
}


def trained(base: nn.Module, directory: Path, fields: dict[str, Any], seed: int) -> None:
    """An adapter that PEFT made, saved as after training: everything in it random."""
    usual = {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(base, peft.LoraConfig(**usual | fields))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.peft_config["default"].base_model_name_or_path = "org/base"
    model.save_pretrained(directory)


def test_everything_else_that_peft_saves_comes_back(tmp_path: Path) -> None:
    """DoRA, saved modules, embeddings, biases …: exported from one bundle, each acts in PEFT as its original does."""
    bases: dict[str, Any] = {name: {"attention_bias": True} if name == "biased" else {} for name in EXTRAS}
    for seed, (name, fields) in enumerate(EXTRAS.items()):
        trained(llama(**bases[name]), tmp_path / "zoo" / name, fields, seed)
    bundle = job.run([tmp_path / "zoo"], Spec("jd-full", rank=100, dtype="float32"), tmp_path / "team").bundle
    assert bundle is not None
    export(bundle, [], tmp_path / "peft")
    carried = 0
    for name in EXTRAS:
        base = llama(**bases[name])
        untouched = logits(base)
        both = [
            peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / which / name).eval()
            for which in ("zoo", "peft")
        ]
        assert_same_effect(logits(both[1]), logits(both[0]), untouched)
        (original,) = open_adapters([str(tmp_path / "zoo" / name)]).adapters
        exported = load_file(tmp_path / "peft" / name / WEIGHTS)
        assert set(bundle.adapter(name).extras) == set(original.extras)
        for key in original.extras:
            carried += 1
            assert identical(bundle.adapter(name).extra(key), original.extra(key)), key
            expected = original.extra(key)
            if name == "lora_bias":  # PEFT scales biases of lora_B; exports have the scale 1
                expected = expected * original.modules[key.removeprefix(P).removesuffix(".lora_B.bias")].scale
            assert identical(exported[key], expected), key
    assert carried > 20


def identical(one: Tensor, two: Tensor) -> bool:
    """Bit for bit, so that NaN equals itself and 0 is not -0."""
    flat = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, two)]
    return one.dtype == two.dtype and one.shape == two.shape and torch.equal(*flat)


def test_carried_tensors_of_every_type(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    """Values that no arithmetic keeps: NaN with a payload, -0, denormals, integers, a convolution's factors."""
    odd = (
        torch.tensor([0x7FC01234, -0x80000000, 1, 0x7F800000], dtype=torch.int64)
        .to(torch.int32)
        .view(torch.float32)
    )
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{P}head.weight": odd,
        f"{P}head.half": odd.view(torch.int16).view(torch.bfloat16)[:7].clone(),
        f"{P}head.whole": torch.randn(3, 2, generator=generator).half(),
        f"{P}head.double": torch.randn(5, generator=generator).double(),
        f"{P}head.table": torch.arange(6).reshape(2, 3),
        f"{P}head.bytes": torch.arange(5, dtype=torch.uint8),
        f"{P}head.flags": torch.tensor([True, False, True]),
        f"{P}head.none": torch.zeros(0, 3),
        f"{P}conv.lora_A.weight": torch.randn(4, 3, 2, 2, generator=generator),
        f"{P}conv.lora_B.weight": torch.randn(5, 4, 1, 1, generator=generator),
        f"{P}embed.lora_embedding_A": torch.randn(4, 9, generator=generator),
        f"{P}embed.lora_embedding_B": torch.randn(6, 4, generator=generator),
    }
    make_adapter("zoo/ant", modules_to_save=["head"], tensors=tensors)
    make_adapter("zoo/bee")
    bundle = job.run([tmp_path / "zoo"], Spec(), tmp_path / "team").bundle
    assert bundle is not None and bundle.verify() == []
    export(bundle, ["ant"], tmp_path / "peft", dtype="bfloat16")
    exported = load_file(tmp_path / "peft" / "ant" / WEIGHTS)
    assert set(bundle.adapter("ant").extras) == set(tensors)
    for key, tensor in tensors.items():
        assert identical(bundle.adapter("ant").extra(key), tensor), key
        assert identical(exported[key], tensor), key
    assert bundle.adapter("bee").extras == {}
