"""`lorazip eval` from end to end on a tiny model: figures that are known beforehand, kills, gates, what is written."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
import types
import typing
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from evaluating import CPU, NAMES, RIGHT, SPEC, N, evaluate, examples, lines, scores, written

from lorazip import base as bases
from lorazip.errors import InputError, TargetError, UsageError
from lorazip.eval.backend import Greedy
from lorazip.eval.breaks import BREAKS
from lorazip.eval.results import Results

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
    model = bases.load(world / "base", torch.float32, CPU)
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
