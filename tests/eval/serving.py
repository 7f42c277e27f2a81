"""What the tests of bench share: a tiny base, odd adapters, a process that plays vLLM's part."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner

from lorazip.cli.bench import bench

HIDDEN, HEAD, VOCABULARY = 64, 32, 128
MODULES = {
    f"model.layers.{layer}.{name}": shape
    for layer in range(2)
    for name, shape in {
        "self_attn.q_proj": (64, 64),
        "self_attn.k_proj": (32, 64),
        "self_attn.v_proj": (32, 64),
        "mlp.down_proj": (64, 96),
    }.items()
}
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None and not os.environ.get("LORAZIP_REQUIRE_VLLM"),
    reason="needs vllm",
)


def make_base(directory: Path, shard: str = "1GB", **fields: Any) -> Path:
    """A tiny random Llama, in float32."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=HEAD,
        num_hidden_layers=2,
        intermediate_size=96,
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
        **fields,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(directory, max_shard_size=shard)
    return directory


HEAD_KEY = "base_model.model.lm_head.weight"


Q = "model.layers.0.self_attn.q_proj"
DORA = {
    "use_dora": True,
    "modules": {Q: (64, 64)},
    "tensors": {f"base_model.model.{Q}.lora_magnitude_vector": torch.ones(64)},
}


STUB = r"""
import json, os, sys, time
task, result = sys.argv[1:]
task = json.load(open(task))
lora = "enable_lora" in task["engine"]
with open(os.environ["STUB_LOG"], "a") as log:
    log.write(json.dumps({"task": task, "files": sorted(os.listdir(task["engine"]["model"])),
                          "pid": os.getpid(), "adapters": [os.listdir(p) for _, p in task["adapters"]],
                          "memory": os.environ.get("VLLM_CPU_KVCACHE_SPACE")}) + "\n")
fault = os.environ.get("STUB_FAULT")
if fault == "lora" and lora or fault == "all":
    sys.exit("Traceback ...\n\nRuntimeError: no \x1b[31mmemory")
if fault == "killed" and lora:
    os.kill(os.getpid(), 9)
if fault == "hang" and lora or fault == "hang at once":
    time.sleep(600)
n, t = len(task["requests"]), task["output_tokens"]
if fault == "short" and lora:
    t -= 1
json.dump({
    "first": [r["arrival"] + 1.0 for r in task["requests"]],
    "finish": [r["arrival"] + 3.0 for r in task["requests"]],
    "outputs": [[int(lora)] * t] * n, "requests_sha256": "x", "start_seconds": 1.0, "load_seconds": 0.5,
    "host_memory_bytes": 10**9, "device_memory_bytes": 2 * 10**9 if os.environ.get("STUB_GPU") else None,
    "kv_cache_tokens": 64, "slot_bytes": 1000 * lora, "dtype": "float32",
    "others_cpu_share": float(os.environ.get("STUB_OTHERS", 0)), "machine": {"processor": "stub"},
}, open(result, "w"))
"""


def asked(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def run(shop: Path, output: Path, *arguments: str, **options: Any) -> Any:
    """The command; errors are raised."""
    line = ["serve", "--base", shop / "model", "--requests", 6, "--prompt-tokens", 5, "--output-tokens", 3]
    found = CliRunner().invoke(bench, [str(a) for a in [*line, "-o", output, *arguments]], **options)
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found


def everything(shop: Path) -> list[str]:
    return ["--adapters", str(shop / "adapters"), "--bundle", str(shop / "team.lorazip")]
