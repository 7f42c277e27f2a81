"""`lorazip eval` from end to end on a tiny model: figures that are known beforehand, kills, gates, what is written."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import lorazip
from lorazip.cli import main
from lorazip.errors import CheckError, InputError, TargetError, UsageError
from lorazip.eval import job
from lorazip.eval import transformers_backend as hf
from lorazip.eval.backend import Greedy, Written
from lorazip.eval.base import load_tokenizer
from lorazip.eval.breaks import BREAKS
from lorazip.eval.results import Results
from lorazip.eval.session import Engine
from lorazip.eval.spec import EvalSpec
from lorazip.eval.transformers_backend import TransformersBackend

NAMES = ("ant", "bee", "cat", "dog")
N, RIGHT = 24, 18  # examples of a task, and how many the original gets right
CPU = torch.device("cpu")
ENGINE = Engine("hf", torch.float32, CPU)
SPEC = EvalSpec(template=tiny.TEMPLATE)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four adapters, a task for each, a bundle that loses nothing and one that loses most, and a filled cache."""
    root = tmp_path_factory.mktemp("world")
    tiny.make_base(root / "base")
    adapters = tiny.make_adapters(root / "zoo", NAMES)
    tiny.make_tasks(root / "tasks", root / "base", adapters, N, RIGHT / N)
    everything = lorazip.Spec("svd", rank=8, dtype="float32")
    lorazip.compress([str(root / "zoo")], everything, root / "whole")
    lorazip.compress([str(root / "zoo")], lorazip.Spec("jd-full", rank=2), root / "poor")
    return root


def evaluate(world: Path, spec: EvalSpec = SPEC, **changes: Any) -> Results:
    """By the library; answers are kept in a cache of the module."""
    arguments: dict[str, Any] = {
        "adapters": [str(world / "zoo")],
        "bundles": [world / "whole", world / "poor"],
        "cache": world / "cache",
        "backend": ENGINE,
        "spec": spec,
    }
    arguments |= changes
    sources = arguments.pop("tasks", [str(world / "tasks")])
    return job.evaluate(str(arguments.pop("base", world / "base")), sources, **arguments)


def command(world: Path, *options: str | Path | int, bundles: Sequence[str] = ("whole", "poor")) -> int:
    """By the command line; returns its exit code."""
    arguments = ["eval", "--backend", "hf", "--base", world / "base", "--tasks", world / "tasks", "--adapters",
                 world / "zoo", "--cache", world / "cache", "--template", tiny.TEMPLATE]  # fmt: skip
    for bundle in bundles:
        arguments += ["--bundle", world / bundle]
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in (*arguments, *options)])
    assert isinstance(end.value.code, int)
    return end.value.code


def scores(found: Results, metric: str, arm: str) -> dict[tuple[str, str | None], float]:
    return {(r.task, r.adapter): r.score for r in found.rows if (r.metric, r.arm) == (metric, arm)}


def written(world: Path, calls: Sequence[Greedy]) -> list[Written]:
    """What originals and the poor bundle's adapters write, asked without cache or session."""
    members = [tiny.acting(a, "poor") for a in lorazip.Bundle.open(world / "poor")]
    actings = [*(tiny.opened(world / "zoo" / name) for name in NAMES), *members]
    tokenizer = load_tokenizer(world / "base")
    backend = TransformersBackend(world / "base", tokenizer, actings, dtype=torch.float32, device=CPU)
    found = dict(backend.run(calls))
    return [one for i in range(len(calls)) if isinstance(one := found[i], Written)]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def examples(world: Path, name: str) -> list[dict[str, Any]]:
    """Those that are scored."""
    return [row for row in lines(world / "tasks" / f"{name}.jsonl") if row["split"] == "test"]


# --- figures ----------------------------------------------------------------------------------------------------------


def test_scores_are_those_that_the_tasks_were_made_for(world: Path, tmp_path: Path) -> None:
    found = evaluate(world, output=tmp_path / "out")
    assert set(scores(found, "exact_match", "original").values()) == {RIGHT / N}
    assert scores(found, "exact_match", "whole") == scores(found, "exact_match", "original")
    assert found.of("base").score.estimate < 0.3
    assert found.of("poor").score.estimate < 0.5
    for arm in ("original", "whole", "poor"):
        assert set(scores(found, "loss", arm)) == {(name, name) for name in NAMES}
    calls = [
        Greedy(f"poor/{name}", tiny.encode(f"{row['input']}="), 20)
        for name in NAMES
        for row in examples(world, name)
    ]
    texts = iter(written(world, calls))
    for name in NAMES:
        right = [
            tuple(next(texts).tokens) == (*tiny.encode(row["output"]), tiny.END)
            for row in examples(world, name)
        ]
        assert scores(found, "exact_match", "poor")[name, name] == sum(right) / N
    whole = found.of("whole")
    assert whole.kept is not None and whole.kept.estimate == 1 and whole.kept_adapters == 4
    assert (whole.fixes_per_100, whole.breaks_per_100, whole.p_value) == (0, 0, 1)
    assert [arm.name for arm in found.arms] == ["base", "original", "whole", "poor"]
    assert {f"{c.arm}/{c.adapter}" for c in found.canaries} == {
        f"{arm}/{name}" for arm in ("original", "whole", "poor") for name in NAMES
    }


def test_breaks_show_what_was_written(world: Path) -> None:
    found = evaluate(world)
    assert len(found.breaks) == BREAKS and {one.arm for one in found.breaks} == {"poor"}
    for one in found.breaks:
        assert one.original == one.expected != one.found
        assert one.prompt.endswith("=")
    calls = [Greedy(f"poor/{one.adapter}", tiny.encode(one.prompt), 40) for one in found.breaks]
    for one, text in zip(found.breaks, written(world, calls), strict=True):
        assert text.text.startswith(one.found)


def test_agreement_is_of_the_originals_own_answers(world: Path) -> None:
    found = evaluate(world, dataclasses.replace(SPEC, agreement=True, new_tokens=10))
    assert set(scores(found, "agreement", "whole").values()) == {1.0}
    assert scores(found, "agreement", "original") == scores(found, "agreement", "base") == {}
    shares = scores(found, "agreement", "poor").values()
    agreed = found.of("poor").agreement
    assert agreed is not None and agreed.estimate == pytest.approx(sum(shares) / len(shares))
    assert found.of("original").agreement is None
    for name in NAMES:
        prompts = [tiny.encode(f"{row['input']}=") for row in examples(world, name)]
        pairs = [
            written(world, [Greedy(f"{arm}/{name}", p, 10) for p in prompts]) for arm in ("original", "poor")
        ]
        wanted = sum(a == b for a, b in zip(*pairs, strict=True)) / N
        assert scores(found, "agreement", "poor")[name, name] == pytest.approx(wanted)


def test_written_and_forced_answers_are_scored_alike(world: Path) -> None:
    """The tasks' answers have one line, so exact match of what is written is exact match."""
    forced = evaluate(world)
    found = evaluate(world, dataclasses.replace(SPEC, metric="exact_match_any"))
    for arm in ("original", "whole"):
        assert all(s >= RIGHT / N for s in scores(found, "exact_match_any", arm).values())
    for arm in ("base", "original", "whole", "poor"):
        assert scores(found, "exact_match", arm) == scores(forced, "exact_match", arm)
    assert {(row.metric, row.primary) for row in found.rows} == {
        ("exact_match_any", True), ("exact_match", False), ("loss", False)
    }  # fmt: skip


def test_choices_are_scored_by_log_likelihood(world: Path, tmp_path: Path) -> None:
    choices = ["red", "blue", "a"]
    rows = [{"input": f"x{i}", "output": choices[i % 3], "choices": choices} for i in range(9)]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "ant.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = tiny.peft(world / "base", world / "zoo" / "ant")
    for metric, weigh in (("choice", lambda text: 1), ("choice_norm", len)):
        found = evaluate(
            world, dataclasses.replace(SPEC, metric=metric), tasks=[str(tmp_path / "tasks")], bundles=[]
        )
        right = 0
        for row in rows:
            sums = {}
            for text in choices:
                answer = tiny.encode(text)
                table = tiny.logprobs(model, tiny.encode(f"{row['input']}="), answer)
                sums[text] = float(table.gather(1, torch.tensor(answer)[:, None]).sum()) / weigh(text)
            right += max(sums, key=lambda text: sums[text]) == row["output"]
        assert scores(found, metric, "original") == {("ant", "ant"): right / 9}


def test_solved_examples_are_shown_to_the_base(world: Path) -> None:
    found = evaluate(world, dataclasses.replace(SPEC, shots=2))
    assert [arm.name for arm in found.arms][:2] == ["base", "base-2-shot"]
    model = hf.load(world / "base", torch.float32, CPU)
    for name in NAMES[:2]:
        shown = [row for row in lines(world / "tasks" / f"{name}.jsonl") if row["split"] == "train"]
        before = "".join(f"{row['input']}={row['output']}\n\n" for row in shown)
        right = 0
        for row in examples(world, name):
            tokens = tiny.greedy(model, tiny.encode(f"{before}{row['input']}="), 40)
            text = "".join(tiny.CHARACTERS[t] for t in tokens if t != tiny.END)
            right += text.partition("\n")[0].strip() == row["output"]
        assert scores(found, "exact_match", "base-2-shot")[name, None] == pytest.approx(right / N)


def test_drift_and_pairs(world: Path, tmp_path: Path) -> None:
    found = evaluate(world, drift=["dog"])
    drifting = [row for row in found.rows if row.role == "drift" and row.primary and row.arm == "poor"]
    assert [(row.task, row.adapter) for row in drifting] == [("dog", name) for name in NAMES[:3]]
    assert found.of("poor").drift is not None and found.of("whole").drift is not None
    assert found.of("whole").drift.estimate == 0  # type: ignore[union-attr]
    assert found.of("poor").score == evaluate(world).of("poor").score
    pairs = [{"task": "ant", "adapter": "bee"}, {"task": "bee", "adapter": "bee", "role": "drift"}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    found = evaluate(world, pairs=tmp_path / "pairs.jsonl")
    assert {(r.task, r.adapter, r.role) for r in found.rows if r.adapter} == {
        ("ant", "bee", "own"),
        ("bee", "bee", "drift"),
    }
    assert [c.adapter for c in found.canaries] == ["bee"] * 3


def test_an_arm_by_itself(world: Path) -> None:
    """Without originals nothing is compared; without bundles neither."""
    alone = evaluate(world, adapters=[])
    assert alone.comparisons == () and alone.of("poor").kept is None and alone.breaks == ()
    assert alone.of("poor").score == evaluate(world).of("poor").score
    assert evaluate(world, bundles=[]).of("original").score.estimate == RIGHT / N


def test_an_example_as_long_as_the_model_takes(world: Path, tmp_path: Path) -> None:
    """It is left out, and said so: vLLM could not write the token that it always writes."""
    (tmp_path / "tasks").mkdir()
    sizes = (tiny.CONTEXT - 4, tiny.CONTEXT - 3, tiny.CONTEXT - 2)  # and "=", the answer and its end
    rows = [{"input": "x" * size, "output": "y"} for size in sizes]
    (tmp_path / "tasks" / "ant.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = evaluate(world, tasks=[str(tmp_path / "tasks")], bundles=[])
    left = [one for one in found.left_out if one.what == "ant"]
    assert [(one.count, one.why) for one in left] == [(2, "examples of more than 319 tokens")]
    assert {row.n for row in found.rows} == {1}


# --- what is written --------------------------------------------------------------------------------------------------


def test_results_hold_the_fields_of_the_records(world: Path, tmp_path: Path) -> None:
    spec = dataclasses.replace(SPEC, agreement=True, min_retention=0.9)
    found = evaluate(world, spec, drift=["dog"], output=tmp_path / "out", tasks=[str(world / "tasks")])
    document = tiny.json_of(tmp_path / "out" / "results.json")
    assert document.pop("schema") == "lorazip.eval/1"
    assert_like(document, Results)
    assert document == json.loads(json.dumps({k: v for k, v in found.document().items() if k != "schema"}))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "examples.jsonl", "report.html", "results.json"
    ]  # fmt: skip
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and "poor" in page
    kept = lines(tmp_path / "out" / "examples.jsonl")
    own = {(line["arm"], line["task"], line["adapter"], line["metric"]): line["scores"] for line in kept}
    assert len(own) == len(kept) == len(found.rows)
    for row in found.rows:
        values = own[row.arm, row.task, row.adapter, row.metric]
        assert len(values) == row.n and row.low <= row.score <= row.high
        assert sum(values) / len(values) == pytest.approx(row.score, abs=1e-6)


def assert_like(value: Any, kind: Any) -> None:
    """A JSON value has just the fields of a dataclass, all the way down."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        assert set(value) == set(hints), kind
        for name, hint in hints.items():
            assert_like(value[name], hint)
    elif typing.get_origin(kind) is tuple:
        assert isinstance(value, list)
        for item in value:
            assert_like(item, typing.get_args(kind)[0])
    elif typing.get_origin(kind) in (types.UnionType, typing.Union):
        if value is not None:
            assert_like(value, next(part for part in typing.get_args(kind) if part is not types.NoneType))
    elif typing.get_origin(kind) is typing.Literal:
        assert value in typing.get_args(kind)
    elif typing.get_origin(kind) is dict:
        assert isinstance(value, dict)
    else:
        assert isinstance(value, (int, float) if kind is float else kind)


def test_what_is_there_is_only_replaced_when_asked(world: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    evaluate(world, output=output)
    first = (output / "results.json").read_bytes()
    evaluate(world, output=output)  # the same evaluation
    other = dataclasses.replace(SPEC, limit=5)
    with pytest.raises(TargetError, match=r"results of another evaluation .*--force"):
        evaluate(world, other, output=output)
    assert tiny.json_of(output / "results.json")["rows"] == json.loads(first)["rows"]
    evaluate(world, other, output=output, force=True)
    assert {row["n"] for row in tiny.json_of(output / "results.json")["rows"]} == {5}
    assert not [path for path in tmp_path.rglob("*") if ".tmp" in path.name]


@pytest.mark.parametrize("content", [None, "thesis", "{}", "[1]", '{"schema": 3, "settings": {}}',
                                     '{"schema": "lorazip.report/1", "settings": {}}'])  # fmt: skip
@pytest.mark.parametrize("force", [False, True])
def test_a_directory_of_somebody_else_is_refused(
    world: Path, tmp_path: Path, content: str | None, force: bool
) -> None:
    """Before anything is loaded, and whatever was asked."""
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.tex").write_text("ten years of work")
    if content is not None:
        (output / "results.json").write_text(content)
    before = sorted((path.name, path.read_text()) for path in output.iterdir())
    with pytest.raises(TargetError):
        evaluate(world, output=output, force=force, cache=tmp_path / "cache")
    assert sorted((path.name, path.read_text()) for path in output.iterdir()) == before
    assert not (tmp_path / "cache").exists()


def test_a_target_that_cannot_be_written(world: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(TargetError):
        evaluate(world, output=tmp_path / "file")
    with pytest.raises(TargetError):
        evaluate(world, output=tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    evaluate(world, output=tmp_path / "empty")
    assert (tmp_path / "empty" / "results.json").exists()


# --- the gate, by the command line ------------------------------------------------------------------------------------


def test_gate_passes(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = command(
        world, "-o", tmp_path / "out", "--min-retention", "0.9", "--max-drop", "0.05", bundles=["whole"]
    )
    out = capsys.readouterr().out
    assert code == 0
    assert "gate: whole: keep at least 90 %: 100.0" in out and out.count("-> pass") == 2
    assert "gate: pass\n" in out and "8 canaries" in out
    assert tiny.json_of(tmp_path / "out" / "results.json")["gate"]["verdict"] == "pass"


def test_gate_fails_if_one_bundle_does(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = command(world, "-o", tmp_path / "out", "--min-retention", "0.9")
    out = capsys.readouterr().out
    assert code == 1
    assert re.search(r"gate: poor: keep at least 90 %: .* -> fail\n", out) and "gate: fail\n" in out
    assert tiny.json_of(tmp_path / "out" / "results.json")["gate"]["verdict"] == "fail"


def test_gate_says_how_many_examples_it_needs(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--min-retention", "0.9", "--limit", "3"]
    code = command(world, "-o", tmp_path / "out", *options, bundles=["whole"])
    out = capsys.readouterr().out
    assert code == 3
    needed = re.search(r"-> undecided; about (\d+) examples in all would decide\n", out)
    assert needed is not None and "gate: undecided\n" in out
    (check,) = tiny.json_of(tmp_path / "out" / "results.json")["gate"]["checks"]
    assert check["examples_needed"] == int(needed[1]) > check["value"]["n"] == 12
    # With so many it does decide; and by the estimate alone it passes at once.
    each = -(-int(needed[1]) // len(NAMES))
    assert (
        command(world, "-o", tmp_path / "more", *options[:2], "--limit", min(2 * each, N), bundles=["whole"])
        == 0
    )
    assert command(world, "-o", tmp_path / "point", *options, "--point", bundles=["whole"]) == 0


def test_a_gate_with_nothing_to_compare_is_refused(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(world, "-o", tmp_path / "out", "--min-retention", "0.9", bundles=[]) == 2
    assert "error: the gate has nothing to compare" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_bundle_of_other_adapters_under_these_names_is_found(world: Path, tmp_path: Path) -> None:
    """All checksums are right, and every adapter acts as its factors say: they are the wrong ones."""
    one, two = NAMES[:2]
    swapped = [f"{one}={world / 'zoo' / two}", f"{two}={world / 'zoo' / one}"]
    lorazip.compress([*swapped], lorazip.Spec("svd", rank=2), tmp_path / "swapped")
    with pytest.raises(CheckError, match=f"swapped/{one}: .*made from another adapter"):
        evaluate(world, bundles=[tmp_path / "swapped"])


def test_a_tokenizer_of_another_model_is_found(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "base", tmp_path / "base")
    config = tiny.json_of(tmp_path / "base" / "config.json")
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"vocab_size": 5}))
    with pytest.raises(InputError, match="has fewer tokens than its tokenizer uses"):
        evaluate(world, base=tmp_path / "base")


def test_a_path_that_is_no_text_can_be_recorded(world: Path, tmp_path: Path) -> None:
    odd = tmp_path / "t\udcff"
    shutil.copytree(world / "tasks", odd)
    evaluate(world, tasks=[str(odd)], output=tmp_path / "out")
    assert tiny.json_of(tmp_path / "out" / "results.json")["settings"]["tasks"] == [str(odd)]


def test_json_is_the_file(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(world, "-o", tmp_path / "out", "--json") == 0
    assert json.loads(capsys.readouterr().out) == tiny.json_of(tmp_path / "out" / "results.json")


@pytest.mark.parametrize(("options", "code", "message"), [
    (["--limit", "0"], 2, "--limit must be at least 1"),
    (["--min-retention", "0"], 2, "--min-retention"),
    (["--template", "none"], 2, "{input}"),
    (["--chat"], 2, "chat template"),
    (["--drift", "owl"], 2, "owl: is no task"),
    (["--device", "cuda:7"], 2, "no CUDA device"),
    (["--split", "dev"], 2, "no examples of the split"),
    (["--shots", "3"], 2, "has 2 examples to show, not 3"),
])  # fmt: skip
def test_what_cannot_be_done_is_said_before_a_model_is_loaded(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    options: list[str], code: int, message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(hf, "load", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command(world, "-o", tmp_path / "out", "--cache", tmp_path / "cache", *options) == code
    found = capsys.readouterr().err
    assert message in found and found.startswith("error: ") and "not foreseen" not in found
    assert not (tmp_path / "out").exists()


# --- again, and after a kill ------------------------------------------------------------------------------------------


def test_a_repeated_run_loads_no_model(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = dataclasses.replace(SPEC, agreement=True, shots=1)
    first = evaluate(world, spec, cache=tmp_path / "cache", drift=["ant"])
    assert first.cost["made"] == first.cost["asked"] - first.cost["cached"] > 0
    monkeypatch.setattr(hf, "load", lambda *_: pytest.fail("a model was loaded"))
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
    monkeypatch.setattr(hf, "load", lambda *_: pytest.fail("a model was loaded"))
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
import test_eval_job as tests
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
KILLED_SPEC = dataclasses.replace(SPEC, limit=6, agreement=True, new_tokens=8)


def sessions_saved(n: int) -> None:
    """Keep answers more often, so that a small run has much to lose."""
    from lorazip.eval import session

    session.SAVED = n


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


def assert_same(found: Any, wanted: Any, close: float = 1e-4) -> None:
    """But for the cost and for rounding: what is asked again is asked in other batches; padding moves last bits."""
    if isinstance(wanted, dict):
        assert set(found) == set(wanted)
        for name in set(wanted) - {"cost"}:
            assert_same(found[name], wanted[name])
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other)
    else:
        assert found == (pytest.approx(wanted, abs=close) if isinstance(wanted, float) else wanted)


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


# --- inputs that do not fit -------------------------------------------------------------------------------------------


def test_adapters_with_more_than_factors_are_named(world: Path, tmp_path: Path, make_adapter: Any) -> None:
    magnitudes = {
        f"base_model.model.{m}.lora_magnitude_vector": torch.ones(s[0]) for m, s in tiny.ATTENTION.items()
    }
    make_adapter("zoo/ant", modules=tiny.ATTENTION, tensors=magnitudes, use_dora=True)
    with pytest.raises(
        InputError, match=r"original/ant: .*lora_magnitude_vector: is carried beside the LoRA factors"
    ):
        evaluate(world, adapters=[str(tmp_path / "zoo")], bundles=[], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tasks_and_adapters_must_meet(world: Path, tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    shutil.copy(world / "tasks" / "ant.jsonl", tmp_path / "tasks" / "owl.jsonl")
    with pytest.raises(InputError, match="no adapter of all arms has a task of its name"):
        evaluate(world, tasks=[str(tmp_path / "tasks")])
    shutil.copy(world / "tasks" / "ant.jsonl", tmp_path / "tasks" / "ant.jsonl")
    found = evaluate(world, tasks=[str(tmp_path / "tasks")])
    assert {row.task for row in found.rows} == {"ant"}
    assert [(one.count, one.why) for one in found.left_out] == [(3, "adapters without a task of their name")]
    with pytest.raises(InputError, match="lies in"):
        evaluate(world, tasks=[str(tmp_path / "tasks"), str(world / "tasks")])


def test_two_arms_of_one_name_are_refused(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "poor", tmp_path / "original")
    shutil.copytree(world / "poor", tmp_path / "whole")
    for bundles in ([tmp_path / "original"], [world / "whole", tmp_path / "whole"]):
        with pytest.raises(UsageError, match="two arms would be called"):
            evaluate(world, bundles=bundles)


def test_progress_counts_up_to_the_end(world: Path, tmp_path: Path) -> None:
    said: dict[str, list[tuple[int, int]]] = {}

    def progress(what: str, done: int, total: int, *more: str) -> None:
        said.setdefault(re.sub(",.*", "", what), []).append((done, total))

    evaluate(world, dataclasses.replace(SPEC, limit=3), cache=tmp_path / "cache", progress=progress)
    assert len(said) >= 2
    for steps in said.values():
        assert steps[-1][0] == steps[-1][1]
        assert all(a[0] < b[0] for a, b in itertools.pairwise(steps) if a[1] == b[1])
