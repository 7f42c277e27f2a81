"""`lorazip eval` refuses before it starts a model: what is wrong, the way out, exit code 2, nothing written."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
from handmade import MakeAdapter

import lorazip
from lorazip import Spec
from lorazip import base as bases
from lorazip.cli import main
from lorazip.errors import InputError
from lorazip.eval import job, session

MODEL = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


Run = Callable[[str], Ended]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model as far as it is looked at before it is loaded: its weights are no weights."""
    path = tmp_path_factory.mktemp("template") / "model"
    path.mkdir()
    tiny.make_tokenizer(path)
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 64}))
    (path / "model.safetensors").write_bytes(b"never read")
    return path


@pytest.fixture
def world(template: Path, make_adapter: MakeAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """model/ zoo/ (ant, bee) team/ (a bundle of them) tasks/ (ant, bee) in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a model was started")

    monkeypatch.setattr(session.Session, "_start", refuse)
    shutil.copytree(template, "model")
    Path("tasks").mkdir()
    for name in ("ant", "bee"):
        make_adapter(f"zoo/{name}")
        rows = [{"input": f"{i} + {i}", "output": str(2 * i), "split": "test"} for i in range(3)]
        (tmp_path / "tasks" / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    lorazip.compress("zoo", Spec(), "team")
    return tmp_path


@pytest.fixture
def evaluate(world: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `lorazip eval` with these options; it must leave all files as they were, and make none."""

    def run(options: str) -> Ended:
        before = content(world)
        with pytest.raises(SystemExit) as end:
            main(["eval", *shlex.split(options)])
        assert isinstance(end.value.code, int)
        out, err = capsys.readouterr()
        assert content(world) == before
        assert "Traceback" not in err and "not foreseen" not in err
        assert all(line.isprintable() for line in err.split("\n"))
        return Ended(end.value.code, out, err)

    return run


def content(directory: Path) -> dict[str, bytes | None]:
    """Every path below, the cache of answers left out."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
        if "caches" not in path.parts
    }


ALL = "--base model --tasks tasks --adapters zoo --bundle team -o out --backend hf"

REFUSED = {
    # the command line itself
    "": "Missing option '--base'",
    "--base model --tasks tasks --adapters zoo": "Missing option '-o'",
    "--base model --tasks tasks -o out": "there is nothing to evaluate (give --adapters, --bundle or both)",
    f"{ALL} --backend mlx": "'mlx' is not one of 'auto', 'vllm', 'hf'",
    f"{ALL} --metric bleu": "'bleu' is not one of 'auto', 'exact_match'",
    f"{ALL} --dtype int4": "'int4' is not one of 'auto', 'float32'",
    f"{ALL} --limit many": "'many' is not a valid integer",
    f"{ALL} --limit 0": "--limit must be at least 1, not 0",
    f"{ALL} --max-tokens 1": "--max-tokens must be at least 2, not 1",
    f"{ALL} --new-tokens 0": "--new-tokens must be at least 1, not 0",
    f"{ALL} --shots -1": "--shots must be at least 0, not -1",
    f"{ALL} --min-retention 0": "--min-retention is a share above 0 and at most 2, not 0.0",
    f"{ALL} --min-retention 95": "--min-retention is a share above 0 and at most 2, not 95.0",
    f"{ALL} --min-retention nan": "--min-retention is a share above 0 and at most 2, not nan",
    f"{ALL} --max-drop 2": "--max-drop is a share of all answers, at least 0 and below 1 (0.02 is 2 points), not 2.0",
    f"{ALL} --column question=input": "'question=input' is no FIELD=COLUMN with a field of input, output",
    f"{ALL} --template 'Q: {{question}}'": "the template has no {input}",
    f"{ALL} --chat": "this model's tokenizer has no chat template (leave --chat out)",
    # the base
    f"{ALL} --base nowhere": "nowhere: does not exist (a base model is a directory, or a Hub id (org/name))",
    f"{ALL} --base org/model": "org/model: the Hub does not give it: ",
    f"{ALL} --base zoo": "zoo: is no base model: it has no config.json (give its own directory)",
    f"{ALL} --base model/config.json": "is no base model: it has no config.json (give its own directory)",
    # tasks
    f"{ALL} --tasks nowhere": "nowhere: is no source of tasks (name a directory of JSONL files",
    f"{ALL} --tasks model": "model: holds no tasks: there is no JSONL file below it (of a CSV",
    f"{ALL} --tasks tasks/ant.jsonl": "ant: lies in tasks/ant.jsonl and in tasks/ant.jsonl (name one of them",
    f"{ALL} --column input=question": "tasks/ant.jsonl: line 1: has no text 'question' (it has input, output, split)",
    f"{ALL} --split validation": "tasks/ant.jsonl: has no examples of the split 'validation' (there are: test;",
    f"{ALL} --metric choice": "ant: tasks/ant.jsonl: has no choices, which choice needs (list them",
    f"{ALL} --shots 2": "ant: tasks/ant.jsonl: has 0 examples to show, not 2 (lower --shots)",
    f"{ALL} --max-tokens 2": "ant: tasks/ant.jsonl: has no example of at most 2 tokens (see --max-tokens",
    f"{ALL} --drift fatcs": "fatcs: is no task of --tasks (there are ant, bee)",
    f"{ALL} --pairs nowhere": "nowhere: cannot be read: ",
    f"{ALL} --pairs tasks/ant.jsonl": "tasks/ant.jsonl: line 1 is no pair (a line is {",
    # adapters and bundles
    f"{ALL} --adapters nowhere": "nowhere: does not exist",
    f"{ALL} --adapters tasks": "tasks: holds no adapter",
    f"{ALL} --bundle nowhere": "nowhere does not exist",
    f"{ALL} --bundle team": "two arms would be called team (rename the bundle)",
    # the output
    f"{ALL} -o tasks": "tasks exists and holds no results of an evaluation (choose another)",
    f"{ALL} -o tasks --force": "tasks exists and holds no results of an evaluation (choose another)",
    f"{ALL} -o tasks/ant.jsonl --force": "tasks/ant.jsonl exists and holds no results of an evaluation",
}  # fmt: skip


@pytest.mark.parametrize("options", REFUSED)
def test_bad_values_are_refused(options: str, evaluate: Run) -> None:
    ended = evaluate(options)
    assert (ended.code, ended.out) == (2, ""), ended.err
    assert REFUSED[options] in " ".join(ended.err.split())
    assert not Path("caches").exists()


def test_what_is_good_gets_as_far_as_the_model(world: Path) -> None:
    """The table above would prove nothing if all options were refused."""
    engine = session.engine("hf")
    with pytest.raises(AssertionError, match="a model was started"):
        job.evaluate("model", ["tasks"], adapters=["zoo"], bundles=["team"], backend=engine, output="out")


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.safetensors.index.json", None])
def test_pickled_weights_are_not_read(evaluate: Run, weights: str | None) -> None:
    Path("model/model.safetensors").unlink()
    if weights:
        Path("model", weights).write_bytes(b"pickle")
    ended = evaluate(ALL)
    assert ended.code == 2
    assert "model: has no safetensors weights; pickles can run code" in ended.err
    assert "(save it with save_pretrained)" in ended.err


@pytest.mark.parametrize("broken", ["", "{", "[]", "null", '{"model_type": "nonsense"}', "\xff"])
def test_a_broken_config_of_the_base(evaluate: Run, broken: str) -> None:
    Path("model/config.json").write_text(broken, encoding="latin-1")
    ended = evaluate(ALL)
    assert ended.code == 2
    assert "model: its " in ended.err and " cannot be " in ended.err


@pytest.mark.parametrize("broken", ["", "{", "[]", '{"model": 5}'])
def test_a_broken_tokenizer(template: Path, tmp_path: Path, broken: str) -> None:
    shutil.copytree(template, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text(broken)
    with pytest.raises(
        InputError, match=r"model: its tokenizer cannot be loaded: .* \(save it beside the model\)"
    ):
        bases.load_tokenizer(tmp_path / "model")


def test_a_base_says_how_much_it_takes(template: Path, tmp_path: Path) -> None:
    assert bases.locate(str(template)) == template
    assert bases.context_length(template) == 64
    (tmp_path / "config.json").write_text('{"model_type": "bloom"}')
    assert bases.context_length(tmp_path) == 2048  # it has no such limit


def test_a_damaged_bundle_is_a_failed_check(evaluate: Run) -> None:
    victim = Path("team/adapters/bee.safetensors")
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    ended = evaluate(ALL)
    assert (ended.code, ended.out) == (1, "")
    assert "bee" in ended.err


def test_nothing_matches(evaluate: Run) -> None:
    for name in ("ant", "bee"):
        Path(f"tasks/{name}.jsonl").rename(f"tasks/task_{name}.jsonl")
    ended = evaluate(ALL)
    assert ended.code == 2
    assert ended.err == (
        "error: --tasks: no adapter of all arms has a task of its name; there are task_ant, task_bee; adapters: ant,"
        " bee (a task is named as its adapter; other pairs: --pairs FILE)\n"
    )


def test_results_of_another_evaluation_are_not_replaced(evaluate: Run) -> None:
    Path("out").mkdir()
    Path("out/results.json").write_text('{"schema": "lorazip.eval/1", "settings": {}}')
    ended = evaluate(ALL)
    assert ended.code == 2
    assert "out holds results of another evaluation (choose another, or --force)" in ended.err
    for foreign in ("{}", "[]", "5", '{"schema": 5, "settings": 5}', '{"schema": "eval/1", "settings": {}}'):
        Path("out/results.json").write_text(foreign)
        ended = evaluate(f"{ALL} --force")
        assert ended.code == 2
        assert "out" in ended.err and "choose another" in ended.err


def test_what_a_killed_run_left_is_no_obstacle(evaluate: Run) -> None:
    Path("out").mkdir()
    for name in ("examples.jsonl", ".report.html.tmp"):
        Path("out", name).write_text("half")
    with pytest.raises(AssertionError, match="a model was started"):
        job.evaluate("model", ["tasks"], adapters=["zoo"], output="out")
    Path("out/mine.txt").write_text("mine")
    assert "holds no results of an evaluation" in evaluate(f"{ALL} --force").err


def test_names_from_files_do_not_rewrite_the_terminal(evaluate: Run) -> None:
    Path("tasks/bad\x1b[2J\n.jsonl").write_text("{")
    Path("tasks/tasks.jsonl").write_text('{"task": "ant", "metric": "\\u001b[2J"}')
    ended = evaluate(ALL)
    assert ended.code == 2
    assert "asks for the metric" in ended.err
