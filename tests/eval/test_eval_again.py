"""An evaluation again: nothing is asked twice, after a kill neither."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
from evaluating import KILLED_SPEC, SPEC, assert_same, command, evaluate

from lorazip import base as bases
from lorazip.errors import CheckError
from lorazip.eval.transformers_backend import TransformersBackend


def test_a_repeated_run_loads_no_model(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = dataclasses.replace(SPEC, agreement=True, shots=1)
    first = evaluate(world, spec, cache=tmp_path / "cache", drift=["ant"])
    assert first.cost["made"] == first.cost["asked"] - first.cost["cached"] > 0
    monkeypatch.setattr(bases, "load", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(
        TransformersBackend, "__init__", lambda *_, **__: pytest.fail("a backend was started")
    )
    second = evaluate(world, spec, cache=tmp_path / "cache", drift=["ant"])
    assert (second.cost["made"], second.cost["tokens"]) == (0, 0)
    assert second.cost["cached"] == second.cost["asked"] == first.cost["asked"]
    assert dataclasses.replace(second, cost={}) == dataclasses.replace(first, cost={})


def test_a_weaker_question_needs_no_model(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(world, cache=tmp_path / "cache")
    monkeypatch.setattr(bases, "load", lambda *_: pytest.fail("a model was loaded"))
    for spec in (dataclasses.replace(SPEC, limit=7), dataclasses.replace(SPEC, min_retention=0.5)):
        assert evaluate(world, spec, cache=tmp_path / "cache", bundles=[world / "whole"]).cost["made"] == 0


def test_more_examples_prove_the_adapters_again(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = dataclasses.replace(SPEC, limit=4)
    evaluate(world, few, cache=tmp_path / "cache", bundles=[world / "whole"])
    put = TransformersBackend._put

    def wrong(self: TransformersBackend, acting: Any) -> None:
        bad = tiny.scaled(acting.adapter, 1.2) if acting.key == "whole/cat" else acting.adapter
        put(self, dataclasses.replace(acting, adapter=bad))

    monkeypatch.setattr(TransformersBackend, "_put", wrong)
    assert evaluate(world, few, cache=tmp_path / "cache", bundles=[world / "whole"]).cost["made"] == 0
    with pytest.raises(CheckError, match=r"^whole/cat: it does not act as its factors say"):
        evaluate(world, cache=tmp_path / "cache", bundles=[world / "whole"], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_does_not_act_fails_the_command(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(TransformersBackend, "_put", lambda self, acting: None)
    assert command(world, "-o", tmp_path / "out", "--cache", tmp_path / "cache") == 1
    errors = capsys.readouterr().err
    assert (
        "error: original/ant: it does nothing: the base answers" in errors and "error: poor/dog: " in errors
    )
    assert not (tmp_path / "out").exists()


KILLED = """
import json, os, signal, sys
import peft, torch, transformers
sys.path[:0] = json.loads(sys.argv[1])
import evaluating as tests
from pathlib import Path
world, cache = Path(sys.argv[2]), Path(sys.argv[3])
tests.sessions_saved(5)
for step in [*map(int, sys.argv[4:]), 0]:
    child = os.fork()
    if child == 0:
        reached = 0
        def progress(*said):
            global reached
            reached += 1
            if reached == step:
                os.kill(os.getpid(), signal.SIGKILL)
        tests.evaluate(world, tests.KILLED_SPEC, cache=cache, output=cache / "out", progress=progress)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(status, (cache / "out" / "results.json").exists(), flush=True)
"""


def test_killed_anywhere_a_run_goes_on(world: Path, tmp_path: Path) -> None:
    """In the canaries, while scoring, while originals write, while breaks are shown; and always nearer to the end."""
    said: list[tuple[Any, ...]] = []
    calm = evaluate(world, KILLED_SPEC, cache=tmp_path / "calm", progress=lambda *a: said.append(a))
    stages = list(dict.fromkeys(re.sub(",.*", "", one[0]) for one in said))
    assert len(stages) >= 4, stages
    n = len(said)
    steps = [3, 40, n // 5, n // 5, n // 5, n // 6]
    folders = json.dumps([str(Path(__file__).parents[1]), str(Path(__file__).parent)])
    command = [sys.executable, "-c", KILLED, folders, str(world), str(tmp_path / "killed"), *map(str, steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = [line.split() for line in ended.stdout.splitlines() if line[0].isdigit()]
    assert found[-1] == ["0", "True"] and len(found) == len(steps) + 1
    assert found[:-1] == [[str(int(signal.SIGKILL)), "False"]] * len(steps)
    document = tiny.json_of(tmp_path / "killed" / "out" / "results.json")
    wanted = json.loads(json.dumps(calm.document()))
    assert 0 < document["cost"]["made"] < wanted["cost"]["made"] / 3
    assert_same(document, wanted)


def test_killed_at_any_time_a_run_goes_on(world: Path, tmp_path: Path) -> None:
    """From outside, by the clock: also between the steps that are announced, and while files are written."""
    arguments = [sys.executable, "-m", "lorazip", "eval", "--backend", "hf", "--base", world / "base", "--tasks",
                 world / "tasks", "--adapters", world / "zoo", "--bundle", world / "poor", "--template", tiny.TEMPLATE,
                 "--limit", "8", "--cache", tmp_path / "cache", "-o", tmp_path / "out"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = tmp_path / "cache" / "eval.sqlite3-wal"
    size = 0
    for seconds in (0.0, 0.1, 0.3):  # after the first answers of this run are on disk
        process = subprocess.Popen(
            arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and not (log.exists() and log.stat().st_size > size + 4096):
            time.sleep(0.01)
        time.sleep(seconds)
        process.kill()
        process.wait()
        size = log.stat().st_size if log.exists() else 0
        if (tmp_path / "out" / "results.json").exists():
            tiny.json_of(tmp_path / "out" / "results.json")
    few = dataclasses.replace(SPEC, limit=8)
    calm = evaluate(world, few, bundles=[world / "poor"])
    found = evaluate(world, few, bundles=[world / "poor"], cache=tmp_path / "cache", output=tmp_path / "out")
    assert_same(found.document(), calm.document())
