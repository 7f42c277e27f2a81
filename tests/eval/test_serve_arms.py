"""What is served: models with D merged in, and arms that vLLM takes or refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from handmade import MakeAdapter
from safetensors import safe_open
from serving import DORA, HEAD_KEY, MODULES, VOCABULARY, Q, make_base

import lorazip
from lorazip.errors import InputError
from lorazip.eval import serve_arms, serve_merge
from lorazip.eval.serve_records import Settings


@pytest.mark.parametrize("shard", ["1GB", "40KB"])
def test_a_merged_model_has_w_plus_d(tmp_path: Path, make_adapter: MakeAdapter, shard: str) -> None:
    base = make_base(tmp_path / "model", shard)
    files = serve_merge.weight_files(base)
    assert (len(files) > 1) == (shard == "40KB")
    modules = {module: MODULES[module] for module in list(MODULES)[:2]}
    adapter = lorazip.open_adapter(make_adapter("ant", modules=modules, use_rslora=True), "ant")
    target = tmp_path / "merged"
    nbytes = serve_merge.merge(base, adapter, target)
    assert nbytes == sum(path.stat().st_size for path in base.glob("*.safetensors"))
    for name, keys in files.items():
        with safe_open(base / name, "pt") as before, safe_open(target / name, "pt") as after:
            assert set(after.keys()) == set(keys)
            for key in keys:
                expected = before.get_tensor(key)
                if key.removesuffix(".weight") in modules:
                    factor = adapter.low_rank(key.removesuffix(".weight"))
                    expected = expected + factor.scale * factor.B @ factor.A
                torch.testing.assert_close(after.get_tensor(key), expected)
        changed = any(key.removesuffix(".weight") in modules for key in keys)
        assert (target / name).is_symlink() != changed
    assert transformers.LlamaForCausalLM.from_pretrained(target).config.vocab_size == VOCABULARY


@pytest.mark.parametrize(
    ("modules", "problem"),
    [
        ({"model.layers.7.self_attn.q_proj": (64, 64)}, "has no weight in"),
        (
            {"model.layers.0.self_attn.q_proj": (64, 32)},
            r"the base has \(64, 64\) float32, the adapter \(64, 32\)",
        ),
    ],
    ids=["module", "shape"],
)
def test_what_does_not_fit_is_not_merged(
    tmp_path: Path, make_adapter: MakeAdapter, modules: dict[str, tuple[int, int]], problem: str
) -> None:
    adapter = lorazip.open_adapter(make_adapter("ant", modules=modules), "ant")
    with pytest.raises(InputError, match=problem):
        serve_merge.merge(make_base(tmp_path / "model"), adapter, tmp_path / "merged")


def arm(*adapters: lorazip.Adapter) -> serve_arms.Arm:
    return serve_arms.Arm("x", "originals", "", Path("model"), adapters, len(adapters), 0)


def test_the_engine_differs_by_lora_alone(shop: Path) -> None:
    adapters = lorazip.open_adapters([str(shop / "adapters")]).adapters
    settings = Settings(requests=7, memory=123, prompt_tokens=5, output_tokens=3, max_loras=2)
    plain, lora = serve_arms.engine(arm(), settings), serve_arms.engine(arm(*adapters), settings)
    assert plain.items() <= lora.items()
    assert plain["kv_cache_memory_bytes"] == 123
    assert plain["max_model_len"] == 8
    assert plain["max_num_seqs"] == 7
    assert {key: lora[key] for key in lora.keys() - plain.keys()} == {
        "enable_lora": True,
        "max_lora_rank": 16,  # cat has 9
        "max_loras": 3,
        "max_cpu_loras": 3,
        "lora_target_modules": ["down_proj", "k_proj", "q_proj", "v_proj"],
    }
    few = serve_arms.engine(arm(*adapters[:1]), Settings(max_cpu_loras=1))
    assert (few["max_loras"], few["max_cpu_loras"], few["max_lora_rank"]) == (2, 2, 8)


def test_the_rank_is_what_vllm_compares_with_its_slots(make_adapter: MakeAdapter) -> None:
    ranks = {module: 2 + 31 * (module == "model.layers.1.mlp.down_proj") for module in MODULES}
    adapter = lorazip.open_adapter(make_adapter("ant", modules=MODULES, rank=ranks), "ant")
    assert serve_arms.rank(adapter) == 33
    assert serve_arms.engine(arm(adapter), Settings())["max_lora_rank"] == 64


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        (DORA, "use_dora is true"),
        ({"bias": "all"}, 'bias is "all"'),
        ({"modules_to_save": ["lm_head"]}, r'modules_to_save is \["lm_head"\]'),
        ({"layer_replication": [[0, 2]]}, "layer_replication is"),
        ({"tensors": {HEAD_KEY: torch.zeros(4, 4)}}, f"carries {HEAD_KEY}, which vLLM does not serve"),
        ({"rank": 513, "modules": {Q: (520, 520)}}, "rank 513 is above 512"),
    ],
    ids=["dora", "bias", "modules_to_save", "replication", "extra", "rank"],
)
def test_adapters_that_vllm_refuses_are_named(
    make_adapter: MakeAdapter, fields: dict[str, Any], problem: str
) -> None:
    fine = lorazip.open_adapter(make_adapter("ant"), "ant")
    bad = lorazip.open_adapter(make_adapter("bad", **fields), "bad")
    serve_arms.refuse([fine])
    with pytest.raises(InputError, match=f"^bad: .*{problem}"):
        serve_arms.refuse([fine, bad])
