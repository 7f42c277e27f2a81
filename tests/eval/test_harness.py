"""Tasks of lm-evaluation-harness in our sessions, against the harness' own model of transformers and PEFT."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from lorazip.adapter import open_adapter
from lorazip.base import load_tokenizer
from lorazip.errors import InputError, UsageError
from lorazip.eval import arms, harness
from lorazip.eval.arms import Pair, Team
from lorazip.eval.backend import Acting, Forced, Greedy
from lorazip.eval.cache import Cache
from lorazip.eval.judge import Cell
from lorazip.eval.results import LeftOut
from lorazip.eval.session import Engine, Session
from lorazip.eval.spec import EvalSpec

REQUIRED = "LORAZIP_REQUIRE_LM_EVAL"
needs_lm_eval = pytest.mark.skipif(
    find_spec("lm_eval") is None and not os.environ.get(REQUIRED),
    reason=f"lm_eval is not installed; {REQUIRED}",
)
# What the harness and what it stands on warn of is not ours.
pytestmark = pytest.mark.filterwarnings("default")
NAMES = ("ant", "bee")
N = 16
CPU = Engine("hf", torch.float32, torch.device("cpu"))


@dataclass(frozen=True)
class World:
    root: Path
    base: Path
    adapters: Mapping[str, Path]
    files: Mapping[str, Path]  # task -> YAML

    def team(self, name: str = "original") -> Team:
        opened = {n: open_adapter(path, n) for n, path in self.adapters.items()}
        return Team(name, "original", str(self.root), opened, 1, 1)

    def session(self, cache: Cache, longest: int = 64) -> Session:
        actings: list[Acting] = [tiny.opened(path) for path in self.adapters.values()]
        canaries = [tiny.encode("abcdef")] * len(actings)
        return Session(
            self.base, load_tokenizer(self.base), actings, canaries, CPU, cache, longest, lambda *_: None
        )


def with_begin(base: Path, directory: Path) -> Path:
    """The same base, its tokenizer with a begin token before every text (written as `~` otherwise)."""
    from tokenizers import processors
    from transformers import AutoTokenizer

    shutil.copytree(base, directory)
    tokenizer = AutoTokenizer.from_pretrained(base)
    begin = tiny.CHARACTERS.index("~")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="~ $A", pair="~ $A $B", special_tokens=[("~", begin)]
    )
    tokenizer.bos_token = "~"
    tokenizer.save_pretrained(directory)
    assert AutoTokenizer.from_pretrained(directory)("a")["input_ids"] == [begin, 0]
    return directory


def write_task(root: Path, name: str, rows: Sequence[Mapping[str, Any]], **fields: Any) -> Path:
    """A task of the harness as YAML, which JSON is too; the first two rows are shown, the others asked."""
    folder = root / name
    folder.mkdir(parents=True)
    data = {}
    for split, part in {"train": rows[:2], "test": rows[2:]}.items():
        data[split] = str(folder / f"{split}.jsonl")
        Path(data[split]).write_text("".join(json.dumps(row) + "\n" for row in part))
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": data, "cache_dir": str(folder / "cache")},
        "training_split": "train",
        "test_split": "test",
        "doc_to_text": "{{input}}=",
        "doc_to_target": "output",
        "metadata": {"version": 1},
    } | fields
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(config))
    return path


CHOICE: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "label",
    "num_fewshot": 1,
    "metric_list": [
        {"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc_norm", "acc")
    ],
}
WRITE: dict[str, Any] = {
    "output_type": "generate_until",
    "generation_kwargs": {"until": ["Z", ";"], "max_gen_toks": 14, "do_sample": False},
    "metric_list": [
        {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": False}
    ],
}


@pytest.fixture(scope="module", params=["plain", "begin"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Two adapters; `ant` and `bee` are tasks that their adapter can answer, `pick` is for nobody."""
    root = tmp_path_factory.mktemp(request.param)
    base = tiny.make_base(root / "plain")
    if request.param == "begin":
        base = with_begin(base, root / "begin")
    adapters = tiny.make_adapters(root / "zoo", NAMES)
    tasks = tiny.make_tasks(root / "jsonl", root / "plain", adapters, n=N)
    files = {}
    for name in NAMES:
        rows = [json.loads(line) for line in (tasks / f"{name}.jsonl").read_text().splitlines()]
        files[name] = write_task(root / "tasks", name, rows, **WRITE)
    draw = random.Random(0)
    rows = [
        {
            "input": "".join(draw.choices("abcdef", k=5)),
            "choices": ["".join(draw.choices("uvwxyz ", k=draw.randint(0, 3))) + end for end in "stz"],
            "label": draw.randrange(3),
        }
        for _ in range(N + 2)
    ]
    files["pick"] = write_task(root / "tasks", "pick", rows, **CHOICE)
    return World(root, base, dict(zip(NAMES, adapters, strict=True)), files)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    opened = Cache(tmp_path / "cache")
    yield opened
    opened.close()


def prepared(
    world: World,
    files: Sequence[Path],
    left: list[LeftOut] | None = None,
    context: int = tiny.CONTEXT,
    **spec: Any,
) -> list[harness.Prepared]:
    found = harness.find([str(path) for path in files])
    return harness.prepare(
        found, load_tokenizer(world.base), EvalSpec(**spec), context, [] if left is None else left
    )


def its_own(world: World, file: Path, adapter: str | None, **options: Any) -> dict[str, list[float]]:
    """What the harness itself finds, with its own model: metric -> scores."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    peft = {} if adapter is None else {"peft": str(world.adapters[adapter])}
    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(world.base), "dtype": "float32", **peft},
        tasks=[str(file)],
        task_manager=TaskManager(include_defaults=False),
        device="cpu",
        batch_size=4,
        bootstrap_iters=0,
        **options,
    )
    assert found is not None
    (samples,) = found["samples"].values()
    return {m: [float(sample[m]) for sample in samples] for m in samples[0]["metrics"]}


# --- against the harness' own model -------------------------------------------------------------------------


@needs_lm_eval
@pytest.mark.parametrize("limit", [None, 5])
def test_scores_are_those_of_the_harness_itself(world: World, cache: Cache, limit: int | None) -> None:
    asked = prepared(world, list(world.files.values()), limit=limit)
    pairs = [Pair("ant", "ant"), Pair("bee", "bee"), *(Pair("pick", name, "drift") for name in NAMES)]
    left: list[LeftOut] = []
    with world.session(cache) as session:
        cells = harness.cells(session, asked, [world.team()], pairs, left)
    assert not left
    found = {(c.task, c.adapter, c.metric): list(c.scores) for c in cells}
    answered = [("ant", None), ("ant", "ant"), ("bee", None), ("bee", "bee")]
    answered += [("pick", None), ("pick", "ant"), ("pick", "bee")]
    wanted = {
        (task, adapter, metric): scores
        for task, adapter in answered
        for metric, scores in its_own(world, world.files[task], adapter, limit=limit).items()
    }
    assert found == wanted
    means = {key: sum(scores) / len(scores) for key, scores in found.items()}
    if limit is None and "plain" in world.base.name:  # the right answers were written without a begin token
        assert all(
            means[name, name, "exact_match"] >= 0.3 > means[name, None, "exact_match"] for name in NAMES
        )
    if limit is None:
        assert len({tuple(found["pick", name, "acc"]) for name in (None, *NAMES)}) > 1
    assert {(c.task, c.metric) for c in cells if c.primary} == {
        ("ant", "exact_match"), ("bee", "exact_match"), ("pick", "acc_norm"),
    }  # fmt: skip
    assert {(c.task, c.role) for c in cells} == {("ant", "own"), ("bee", "own"), ("pick", "drift")}
    assert all(c.bounded for c in cells)


@needs_lm_eval
@pytest.mark.parametrize("adapter", [None, "ant"])
def test_each_kind_of_request_is_answered_as_by_the_harness_itself(
    world: World, cache: Cache, adapter: str | None
) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    context = 40
    own = HFLM(
        pretrained=str(world.base),
        peft=None if adapter is None else str(world.adapters[adapter]),
        dtype="float32",
        device="cpu",
        batch_size=1,
        max_length=context - 1,
        logits_cache=False,  # it mixes up ("", "~abc") and ("~ab", "c"): 0.4.13
    )
    one = prepared(world, [world.files["pick"]])[0]
    with world.session(cache) as session:
        ours = harness._model(
            harness.replace(one, context=context), adapter and f"original/{adapter}", session.ask
        )
        rolling, writing = ["a", "abc~d", "xyz" * 40], {"until": ["a", "\n\n"], "max_gen_toks": 9}
        pairs = [("", "abc"), ("", "~b"), ("ab", " cd"), ("ab  ", "cd"), ("~ab", "c"), ("x " * 50, "yes")]
        for kind, arguments in {
            "loglikelihood": pairs,
            "loglikelihood_rolling": [(text,) for text in rolling],
            "generate_until": [(text, {**writing}) for text in ("abc=", "~abc", "q" * 60)],
        }.items():
            requests = [Instance(kind, {}, arguments=a, idx=0) for a in arguments]  # type: ignore[arg-type]
            found, wanted = getattr(ours, kind)(requests), getattr(own, kind)(requests)
            if kind == "loglikelihood":
                assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
                found, wanted = [ll for ll, _ in found], [ll for ll, _ in wanted]
            assert found == (wanted if kind == "generate_until" else pytest.approx(wanted, abs=1e-3))
    assert ours.cut == 2  # a context of 100 characters, and one of 60


@needs_lm_eval
def test_solved_examples_and_chat_are_those_of_the_harness(world: World, cache: Cache) -> None:
    asked = prepared(world, [world.files["ant"]], shots=2)
    with world.session(cache, longest=160) as session:
        cells = harness.cells(session, asked, [], [Pair("ant", "ant")], [])
    found = {c.arm: list(c.scores) for c in cells}
    assert found == {
        "base": its_own(world, world.files["ant"], None)["exact_match"],
        "base-2-shot": its_own(world, world.files["ant"], None, num_fewshot=2)["exact_match"],
    }
    plain, shown = (one.calls[0].prompt for one in asked)
    assert len(shown) > len(plain) and shown[-len(plain) + 1 :] == plain[1:]
    tokenizer = load_tokenizer(world.base)
    tokenizer.chat_template = "<{% for m in messages %}{{ m.content }}{% endfor %}>"
    found_tasks = harness.find([str(world.files["ant"])])
    (chat,) = harness.prepare(found_tasks, tokenizer, EvalSpec(chat=True), tiny.CONTEXT, [])
    begin = plain[:-7] if world.base.name == "begin" else ()
    assert chat.calls[0].prompt == (*begin, *tiny.encode("<"), *plain[-7:], *tiny.encode(">"))


# --- our side -----------------------------------------------------------------------------------------------


@needs_lm_eval
def test_a_repeated_run_asks_no_model(world: World, cache: Cache) -> None:
    pairs, teams = [Pair("pick", "ant", "drift"), Pair("ant", "ant")], [world.team()]
    runs: list[list[Cell]] = []
    for made in (True, False):
        state = random.getstate()
        with world.session(cache) as session:
            asked = prepared(world, [world.files["pick"], world.files["ant"]])
            runs.append(harness.cells(session, asked, teams, pairs, []))
            assert session.cost.asked == 2 * sum(len(one.calls) for one in asked)
            assert (session.cost.made > 0) is made
            assert session.cost.cached == (0 if made else session.cost.asked)
        assert random.getstate() == state
    assert runs[0] == runs[1]


@needs_lm_eval
def test_what_a_session_must_know_before_it_starts(world: World) -> None:
    pick, ant = prepared(world, [world.files["pick"], world.files["ant"]])
    assert all(isinstance(call, Forced) for call in pick.calls) and len(pick.calls) <= 3 * N
    assert pick.longest == max(len(c.prompt) + len(c.answer) for c in pick.calls if isinstance(c, Forced))
    assert all(isinstance(c, Greedy) and (c.limit, c.stop) == (14, ("Z", ";")) for c in ant.calls)
    assert ant.longest == max(len(c.prompt) for c in ant.calls) + 14
    assert len(pick.canary) >= 2 and len(ant.canary) >= 2
    left: list[LeftOut] = []
    prepared(world, [world.files["pick"]], left, context=12)
    assert [(one.what, "beginnings of prompts" in one.why) for one in left] == [("pick", True)]


@needs_lm_eval
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": 0.7}, "do_sample: True, temperature: 0.7"),
        (
            {"do_sample": True, "temperature": 1.0, "top_p": 0.9},
            "do_sample: True, temperature: 1.0, top_p: 0.9",
        ),
        ({"num_beams": 4}, "num_beams: 4"),
        ({"repetition_penalty": 1.2}, "repetition_penalty: 1.2"),
    ],
)
def test_only_greedy_answers(world: World, tmp_path: Path, options: dict[str, Any], said: str) -> None:
    rows = [{"input": "a", "output": "b"}] * 3
    path = write_task(tmp_path, "drawn", rows, **{**WRITE, "generation_kwargs": options})
    with pytest.raises(UsageError, match=f"^drawn asks for {said}; only greedy answers"):
        prepared(world, [path])


@needs_lm_eval
def test_an_answer_that_the_model_has_no_room_for(world: World, tmp_path: Path) -> None:
    options = {**WRITE, "generation_kwargs": {"max_gen_toks": tiny.CONTEXT}}
    path = write_task(tmp_path, "long", [{"input": "a", "output": "b"}] * 3, **options)
    with pytest.raises(InputError, match=r"^long: writes up to 320 tokens; this model takes 320"):
        prepared(world, [path])


@needs_lm_eval
def test_metrics_that_cannot_be_compared_by_example(world: World, cache: Cache, tmp_path: Path) -> None:
    rows = [{"input": "ab", "output": letter} for letter in "abcdefgh"]
    metrics = ["perplexity", "acc"]
    path = write_task(tmp_path, "last", rows, output_type="loglikelihood",
                      metric_list=[{"metric": m} for m in metrics])  # fmt: skip
    left: list[LeftOut] = []
    with world.session(cache) as session:
        (cell,) = harness.cells(session, prepared(world, [path]), [], [], left)
    assert (cell.metric, cell.primary, len(cell.scores)) == ("acc", True, 6)
    assert [(one.what, one.count) for one in left] == [("last: perplexity", 1)]
    path = write_task(tmp_path, "rolling", rows, output_type="loglikelihood_rolling",
                      metric_list=[{"metric": "word_perplexity"}])  # fmt: skip
    with pytest.raises(InputError, match=r"^rolling: is scored by word_perplexity, none of them a mean"):
        prepared(world, [path])


@needs_lm_eval
def test_a_primary_metric_lies_between_0_and_1(world: World, cache: Cache, tmp_path: Path) -> None:
    mean = {"aggregation": "mean", "higher_is_better": True}
    path = write_task(tmp_path, "graded", [{"input": c, "output": "x"} for c in "abcdef"], **WRITE)
    config = {
        **json.loads(path.read_text()),
        "metric_list": [{"metric": m, **mean} for m in ("points", "wrote")],
    }
    path.write_text(json.dumps(config)[:-1] + ', "process_results": !function grades.grade}')
    (path.parent / "grades.py").write_text(
        "def grade(doc, results):\n    return {'points': 100.0 * len(results[0]), 'wrote': bool(results[0])}\n"
    )
    with world.session(cache) as session:
        cells = harness.cells(session, prepared(world, [path]), [], [], [])
    assert {(c.metric, c.primary, c.bounded) for c in cells} == {
        ("points", False, False),
        ("wrote", True, True),
    }


# --- names --------------------------------------------------------------------------------------------------


def test_without_the_harness_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match=r"pip install '\.\[lm-eval\]'"):
        harness.find(["arc_easy"])


@needs_lm_eval
def test_names_are_those_of_the_installed_harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    manager = TaskManager()  # reading thirteen thousand files once will do
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: manager)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "arc_eazy").write_text("task: arc_eazy")  # the harness would read a file of this name
    with pytest.raises(InputError, match=r"arc_eazy: is no task of the installed harness .*arc_easy"):
        harness.find(["arc_eazy"])
    with pytest.raises(UsageError, match="mmlu is a group"):
        harness.find(["mmlu"])
    with pytest.raises(InputError, match=r"gone.yaml: is not there"):
        harness.find(["gone.yaml"])


@needs_lm_eval
def test_a_name_is_one_task(world: World) -> None:
    file = str(world.files["pick"])
    with pytest.raises(UsageError, match="two tasks are called pick"):
        harness.find([file], taken={"pick"})
    found = harness.find([file, file])
    assert list(found) == ["pick"]
    pairs, _ = arms.match([world.team()], ["ant", *found], None, ["pick"])
    harness.require_used(found, pairs)
    with pytest.raises(UsageError, match=r"no adapter answers pick .*--drift pick"):
        harness.require_used(found, [Pair("ant", "ant")])


@needs_lm_eval
def test_tasks_that_are_not_asked(tmp_path: Path) -> None:
    path = write_task(tmp_path, "code", [{"input": "a", "output": "b"}] * 3, **WRITE, unsafe_code=True)
    with pytest.raises(UsageError, match="code runs code that the model writes"):
        harness.find([str(path)])
    group = tmp_path / "group.yaml"
    group.write_text(json.dumps({"group": "all", "task": [{"task": "a"}]}))
    with pytest.raises((UsageError, InputError), match="group"):
        harness.find([str(group)])
    broken = tmp_path / "broken.yaml"
    broken.write_text("task: broken\ndataset_path: json\ndataset_kwargs: {data_files: gone.jsonl}\n")
    with pytest.raises(InputError, match=r"broken.yaml: cannot be loaded: "):
        harness.find([str(broken)])
