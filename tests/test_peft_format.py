"""What is read from PEFT's files must mean what PEFT means by them, and what is written must load there."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import MakeAdapter
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lorazip import peft_config, peft_format
from lorazip.adapter import Adapter, open_adapter
from lorazip.errors import TargetError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the libraries, about themselves
    import peft
    import transformers
    from peft.utils.other import get_pattern_key

P = "base_model.model."


@pytest.fixture(autouse=True)
def calm() -> Iterator[None]:
    """PEFT and transformers warn about the tiny models; on a busy machine threads make their layers slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)


class Net(nn.Module):
    """A model with every kind of layer that PEFT adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 6, 3, padding=1)
        self.lin = nn.Linear(6, 10)
        self.deep = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 9))
        self.head = nn.Linear(9, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        return self.head(self.deep(torch.tanh(self.lin(x))))


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=40,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=40, n_positions=32)
    return transformers.GPT2LMHeadModel(config)


ATTENTION = ["q_proj", "k_proj", "v_proj"]
Model = Callable[[], nn.Module]
CASES: dict[str, tuple[Model, dict[str, Any]]] = {
    "plain": (llama, {"target_modules": ATTENTION, "lora_alpha": 16}),
    "gaussian": (llama, {"target_modules": ATTENTION, "init_lora_weights": "gaussian"}),
    "orthogonal": (llama, {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}),
    "mica": (llama, {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": "mica"}),
    "random": (llama, {"target_modules": ["o_proj"], "init_lora_weights": False}),
    "rslora": (llama, {"target_modules": ATTENTION, "lora_alpha": 7, "use_rslora": True}),
    "patterns": (
        llama,
        {
            "target_modules": [*ATTENTION, "up_proj"],
            "rank_pattern": {
                "^model.layers.0.self_attn.q_proj": 2,
                "layers.1.self_attn.v_proj": 6,
                "k_proj": 3,
            },
            "alpha_pattern": {
                "self_attn.k_proj$": 5,
                "k_proj": 1,
                r"model\.layers\.1\.mlp\.up_proj": 32,
                "j_proj": 9,
            },
        },
    ),
    "rslora patterns": (
        llama,
        {
            "target_modules": ATTENTION,
            "use_rslora": True,
            "rank_pattern": {"q_proj": 6},
            "alpha_pattern": {"v_proj": 3},
        },
    ),
    "layers": (
        llama,
        {"target_modules": ATTENTION, "layers_to_transform": [1], "exclude_modules": ["v_proj"]},
    ),
    "regex target": (llama, {"target_modules": r".*\.1\..*(q|v)_proj"}),
    "all-linear": (llama, {"target_modules": "all-linear"}),
    "replication": (llama, {"target_modules": ATTENTION, "layer_replication": [[0, 2], [1, 2]]}),
    "bias all": (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"}),
    "bias lora_only": (net, {"target_modules": ["lin", "deep.0"], "bias": "lora_only"}),
    "fan_in_fan_out": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "dora": (
        llama,
        {"target_modules": ATTENTION, "use_dora": True, "lora_alpha": 12, "rank_pattern": {"k_proj": 2}},
    ),
    "dora fan_in_fan_out": (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
    "lora_bias": (net, {"target_modules": ["lin", "deep.2", "conv"], "lora_bias": True, "lora_alpha": 6}),
    "conv": (net, {"target_modules": ["conv", "lin"], "lora_alpha": 20, "alpha_pattern": {"conv": 3}}),
    "conv rank": (net, {"target_modules": ["conv", "lin"], "rank_pattern": {"conv": 2}, "use_rslora": True}),
    "dora conv": (net, {"target_modules": ["conv", "lin"], "use_dora": True}),
    "embedding": (net, {"target_modules": ["embed", "lin"], "lora_alpha": 3}),
    "hf embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"], "lora_alpha": 3}),
    "hf lm_head": (llama, {"target_modules": ["lm_head", "q_proj"]}),
    "modules_to_save": (net, {"target_modules": ["lin"], "modules_to_save": ["head", "deep"]}),
    "saved embedding": (
        llama,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "tokens": (llama, {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]}),
}


def trained(case: str, dtype: torch.dtype = torch.float32) -> peft.PeftModel:
    """A PEFT model of the case whose adapter weights are all random, as after training."""
    model, fields = CASES[case]
    adapted = peft.get_peft_model(model().to(dtype), peft.LoraConfig(**{"r": 4} | fields))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            kept = "modules_to_save" in name or "trainable_tokens" in name
            if "lora_magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
            elif "lora_" in name or kept or (name.endswith("bias") and parameter.requires_grad):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return adapted.eval()


def deltas(model: nn.Module) -> dict[str, Tensor]:
    """module -> D as PEFT computes it, (out, in), of all adapted matrices."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer) and not isinstance(
            layer.get_base_layer(), nn.Embedding | nn.Conv1d
        ):
            delta = layer.get_delta_weight("default").detach().float()
            found[name.removeprefix(P)] = delta.T if layer.fan_in_fan_out else delta
    return found


def product(adapter: Adapter, module: str) -> Tensor:
    factors = adapter.low_rank(module)
    return factors.scale * (factors.B.float() @ factors.A.float())


def save_folded(adapter: Adapter, directory: Path) -> None:
    """Export the adapter unchanged: scale folded into B, every second module at twice the rank."""
    factors = {}
    for i, module in enumerate(adapter.modules):
        low_rank = adapter.low_rank(module)
        b, a = low_rank.B * low_rank.scale, low_rank.A
        factors[module] = (torch.cat([b, b], 1) / 2, torch.cat([a, a])) if i % 2 else (b, a)
    peft_format.save(directory, adapter.config, factors, {key: adapter.extra(key) for key in adapter.extras})


@dataclass(frozen=True)
class Original:
    """An adapter as PEFT saved it and as PEFT loads it again."""

    base: Model
    model: nn.Module
    adapter: Adapter


@pytest.fixture(scope="module", params=CASES)
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Original:
    path = tmp_path_factory.mktemp("original") / "a"
    base = CASES[request.param][0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained(request.param).save_pretrained(path)
        # Not the trained model: save_pretrained sorts the patterns, and the first one that matches wins.
        model = peft.PeftModel.from_pretrained(base(), path).eval()
    return Original(base, model, open_adapter(path, "a"))


def test_deltas_equal_those_of_peft(original: Original) -> None:
    adapter, expected = original.adapter, deltas(original.model)
    assert list(adapter.modules) == sorted(expected)
    for module, delta in expected.items():
        assert (adapter.modules[module].out, adapter.modules[module].in_) == delta.shape
        torch.testing.assert_close(product(adapter, module), delta)


def test_an_export_has_the_same_effect_in_peft(original: Original, tmp_path: Path) -> None:
    adapter, model = original.adapter, original.model
    save_folded(adapter, tmp_path / "out" / "b")

    ids = torch.randint(0, 11, (2, 7), generator=torch.Generator().manual_seed(0))
    loaded = peft.PeftModel.from_pretrained(original.base(), tmp_path / "out" / "b").eval()
    with torch.no_grad():
        expected, found, base = model(ids), loaded(ids), original.base().eval()(ids)
    expected, found, base = (getattr(output, "logits", output) for output in (expected, found, base))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(base, expected, atol=1e-3)
    for layer in loaded.modules():
        if isinstance(layer, peft.tuners.lora.Linear):
            assert layer.scaling["default"] == 1

    again = open_adapter(tmp_path / "out" / "b", "b")
    assert list(again.extras) == list(adapter.extras)
    for key in adapter.extras:
        if not key.endswith("lora_B.bias"):
            assert again.extra(key).dtype == adapter.extra(key).dtype
            assert torch.equal(again.extra(key), adapter.extra(key))
    config = json.loads((tmp_path / "out" / "b" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == max(info.rank for info in again.modules.values())
    kept = set(config) - {
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "init_lora_weights",
    }
    assert {key: config[key] for key in kept} == {key: adapter.config[key] for key in kept}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_stored(dtype: torch.dtype, tmp_path: Path) -> None:
    model = trained("patterns", dtype)
    model.to(dtype).save_pretrained(tmp_path / "a")
    model = peft.PeftModel.from_pretrained(llama().to(dtype), tmp_path / "a", autocast_adapter_dtype=False)
    adapter = open_adapter(tmp_path / "a", "a")
    for module, info in adapter.modules.items():
        layer = model.get_submodule(P + module)
        assert info.dtype == str(dtype).removeprefix("torch.")
        assert adapter.low_rank(module).B.dtype == dtype
        assert torch.equal(adapter.low_rank(module).A, layer.lora_A["default"].weight)
        assert adapter.modules[module].scale == layer.scaling["default"]


def test_the_eva_config_is_dropped_with_its_initialisation() -> None:
    config = {"r": 4, "lora_alpha": 8, "init_lora_weights": "eva", "eva_config": {"rho": 2.0}}
    exported = peft_format.export_config(config, {"m": 3})
    assert exported["eva_config"] is None
    assert exported["init_lora_weights"] is True


NAMES = st.lists(
    st.sampled_from(["a", "b", "q_proj", "k_proj", "0", "1", "x-y"]), min_size=1, max_size=4
).map(".".join)


@settings(deadline=None, max_examples=200)
@given(st.dictionaries(NAMES, st.integers(1, 3), min_size=1, max_size=12))
def test_exported_patterns_give_every_module_its_rank_in_peft(ranks: dict[str, int]) -> None:
    config = peft_format.export_config({"r": 9, "lora_alpha": 3}, ranks)
    for table, default in (
        (config["rank_pattern"], config["r"]),
        (config["alpha_pattern"], config["lora_alpha"]),
    ):
        for module, rank in ranks.items():
            assert table.get(get_pattern_key(table.keys(), module), default) == rank
        assert len(table) < len(ranks)
    rule = peft_config.ScaleRule(config)
    assert {module: rule.rank(module) for module in ranks} == ranks


KEYS = st.tuples(st.sampled_from(["", "^"]), NAMES, st.booleans(), st.sampled_from(["", "$"])).map(
    lambda t: t[0] + (re.escape(t[1]) if t[2] else t[1]) + t[3]
)


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(KEYS, st.integers(1, 9), max_size=6), NAMES)
def test_literal_patterns_match_as_in_peft(table: dict[str, int], module: str) -> None:
    expected = table.get(get_pattern_key(table.keys(), module), 0)
    assert peft_config.PatternTable(table).get(module, 0) == expected


def test_modules_of_one_kind_share_a_pattern() -> None:
    ranks = {
        f"model.layers.{i}.self_attn.{m}": r for i in range(32) for m, r in {"q_proj": 8, "k_proj": 4}.items()
    }
    config = peft_format.export_config({"r": 16, "lora_alpha": 16}, ranks)
    assert config["rank_pattern"] == config["alpha_pattern"] == {"k_proj": 4}


def test_rank_zero_becomes_one_column_of_zeros(tmp_path: Path) -> None:
    factors = {"m": (torch.zeros(5, 0), torch.zeros(0, 3)), "n": (torch.ones(5, 2), torch.ones(2, 3))}
    peft_format.save(tmp_path / "a", {"r": 4, "lora_alpha": 4, "peft_type": "LORA"}, factors, {})
    adapter = open_adapter(tmp_path / "a", "a")
    assert adapter.modules["m"].rank == 1
    assert not product(adapter, "m").any()


def test_save_refuses_a_directory_with_content(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    adapter = open_adapter(make_adapter("a"), "a")
    before = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(TargetError, match="not empty"):
        save_folded(adapter, tmp_path / "a")
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == before


def test_save_leaves_nothing_behind_when_it_fails(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    adapter = open_adapter(make_adapter("a"), "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(TargetError, match="cannot be written"):
        save_folded(adapter, tmp_path / "file" / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "file"]


def test_save_gives_the_same_bytes_and_ordinary_rights(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    adapter = open_adapter(
        make_adapter("a", rank={"x.q": 3, "y.q": 2}, modules={"x.q": (4, 5), "y.q": (4, 5)}), "a"
    )
    for name in "bc":
        save_folded(adapter, tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "b" / file).read_bytes() == (tmp_path / "c" / file).read_bytes()
        assert (tmp_path / "b" / file).stat().st_mode == (
            tmp_path / "a" / "adapter_config.json"
        ).stat().st_mode
