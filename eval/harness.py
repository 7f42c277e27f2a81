"""Tasks of lm-evaluation-harness (an extra, `lorazip[lm-eval]`), asked of our sessions and judged like all others.

The harness (github.com/EleutherAI/lm-evaluation-harness) makes the prompts, the answers to choose from and the scores
of every example; the answers come from our backends, through our cache. Its conventions are kept, so that figures can
be laid beside published ones: context and continuation are tokenised together and then parted (its `TemplateLM`), what
is too long loses its start, a task's own number of solved examples is shown. One token differs: its models take
`max_length` tokens and predict one more; a forced call of ours carries that one too, so `max_length` is one less.

Only greedy answers are compared, and only by metrics that are a mean over examples and better when higher: the first of
them that lies in [0, 1] is the primary one. Others (a corpus' perplexity, say) cannot be paired by example; they are
left out, and said so.

The harness' own tasks are code of the installed package; a YAML file of the user's may name functions that run.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import math
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lorazip.errors import Defect, InputError, LorazipError, UsageError
from lorazip.eval.arms import Pair, Role, Team
from lorazip.eval.backend import Answer, Call, Forced, Scores, Written
from lorazip.eval.judge import Cell, few
from lorazip.eval.results import BASE, LeftOut
from lorazip.eval.session import Session
from lorazip.eval.spec import EvalSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INSTALL = "pip install '.[lm-eval]' in lorazip's checkout"
SEEDS = (0, 1234)  # of random and of NumPy: those of the harness


@dataclass(frozen=True)
class Prepared:
    """A task of the harness as model calls.

    Attributes:
        task: the harness' object.
        shown: solved examples in each prompt.
        shots: above 0 for the arm of the base with so many examples, which alone is asked then.
        calls: all that will be asked, of the bare base; for another key they are the same.
    """

    name: str
    task: Any
    tokenizer: PreTrainedTokenizerBase
    context: int
    limit: int | None
    chat: bool
    shown: int
    shots: int = 0
    calls: tuple[Call, ...] = ()

    @property
    def longest(self) -> int:
        """Tokens of the longest call, written ones included."""
        return max(len(c.prompt) + (len(c.answer) if isinstance(c, Forced) else c.limit) for c in self.calls)

    @property
    def canary(self) -> tuple[int, ...]:
        """At least two tokens for an adapter to prove itself on; see `lorazip.eval.canary`."""
        first = max(self.calls[:16], key=lambda c: len(c.prompt))  # of many: the longest of some says most
        return (*first.prompt, *(first.answer if isinstance(first, Forced) else first.prompt[-1:]))


def find(given: Sequence[str], taken: Collection[str] = ()) -> dict[str, Any]:
    """Load tasks: name -> the harness' object.

    Args:
        given: names of the installed harness' tasks, or the user's own YAML files (PATH.yaml), which are trusted.
        taken: names that other tasks have.
    Raises:
        UsageError: the harness is not installed, or what is named is no single task that can be asked here.
        InputError: there is no such task, or its data cannot be had.
    """
    installed()
    from lm_eval.tasks import TaskManager

    files = {name for name in given if name.endswith((".yaml", ".yml"))}
    manager = TaskManager(include_defaults=not files.issuperset(given))
    found: dict[str, Any] = {}
    for name in dict.fromkeys(given):
        if name in files and not Path(name).is_file():
            raise InputError([Defect(name, problem="is not there", remedy="check --lm-eval")])
        if name not in files:
            _require_task(name, manager)
        with _inside(name, "cannot be loaded"):
            loaded = manager.load(name)
        if loaded.get("groups") or len(loaded["tasks"]) != 1:
            raise UsageError(f"{name} is a group of {len(loaded['tasks'])} tasks (name them one by one)")
        own, task = next(iter(loaded["tasks"].items()))
        if own in taken or own in found:
            raise UsageError(f"two tasks are called {own} (leave out one of --tasks and --lm-eval)")
        _require_askable(own, task)
        found[own] = task
    return found


def installed() -> str:
    """The harness' name and version, for the record.

    Raises:
        UsageError: it is not there.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UsageError(f"--lm-eval needs lm-evaluation-harness: {error} ({INSTALL})") from error
    return f"lm_eval {version('lm_eval')}"


def require_used(names: Collection[str], pairs: Sequence[Pair]) -> None:
    """Every task that was named has an adapter to answer it; none is passed over in silence.

    Raises:
        UsageError: one has none.
    """
    unused = sorted(set(names) - {pair.task for pair in pairs})
    if unused:
        raise UsageError(
            f"no adapter answers {', '.join(unused)} (every one does with --drift {unused[0]}; or name pairs: --pairs)"
        )


def prepare(
    tasks: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    spec: EvalSpec,
    context: int,
    left: list[LeftOut],
) -> list[Prepared]:
    """Make the calls of every task; with `spec.shots` once more, for the base with so many solved examples.

    Args:
        context: tokens that the model takes.
        left: what had to be cut is added here.
    Raises:
        InputError: a task does not fit the model; UsageError: it wants answers to be drawn at random.
    """
    made = []
    for name, task in tasks.items():
        own = task.get_config("num_fewshot")
        made.append(Prepared(name, task, tokenizer, context, spec.limit, spec.chat, own or 0))
        if spec.shots:
            # A task that says 0 has nothing to show, or must not: the harness does not change it either.
            made.append(replace(made[-1], shown=0 if own == 0 else spec.shots, shots=spec.shots))
    return [_with_calls(one, left) for one in made]


def cells(
    session: Session,
    prepared: Sequence[Prepared],
    teams: Sequence[Team],
    pairs: Sequence[Pair],
    left: list[LeftOut],
) -> list[Cell]:
    """Ask everything in one go, as for other tasks, and let the harness score the answers of one arm after another.

    Args:
        left: metrics that cannot be used are added here.
    Raises:
        InputError: the harness cannot score the answers, or by nothing that can be compared by example.
    """
    work: list[tuple[str, Pair, str | None, Prepared]] = []
    for one in prepared:
        mine = [pair for pair in pairs if pair.task == one.name]
        role: Role = "own" if any(pair.role == "own" for pair in mine) else "drift"
        arm = few(one.shots) if one.shots else BASE
        work.append((arm, Pair(one.name, "", role), None, one))
        if not one.shots:
            work += [(t.name, pair, f"{t.name}/{pair.adapter}", one) for t in teams for pair in mine]
    calls = [replace(call, adapter=key) for _, _, key, one in work for call in one.calls]
    answers = dict(zip(calls, session.ask(calls, "harness tasks"), strict=True))
    values = []
    for done, (_, _, key, one) in enumerate(work, 1):
        values.append(_values(one, key, session, answers))
        session.progress("harness scores", done, len(work))
    made = []
    for name in dict.fromkeys(one.name for one in prepared):
        rows = [i for i, (_, pair, _, _) in enumerate(work) if pair.task == name]
        chosen = _chosen(name, [values[i] for i in rows], left)
        primary = next(metric for metric, bounded in chosen.items() if bounded)
        made += [
            Cell(arm, name, pair.adapter or None, pair.role, metric, bounded, metric == primary, scores)
            for i in rows
            for arm, pair, _, _ in [work[i]]
            for metric, bounded in chosen.items()
            for scores in [tuple(float(value) for value in values[i][metric])]
        ]
    return made


# --- what is asked ------------------------------------------------------------------------------------------


def _require_task(name: str, manager: Any) -> None:
    """A name in the index, and not a file of that name, which the harness would take too."""
    if name in manager.all_groups or name in manager.all_tags:
        raise UsageError(f"{name} is a group of tasks of the harness (name the tasks one by one)")
    if name not in manager.all_subtasks:
        near = ", ".join(difflib.get_close_matches(name, manager.all_subtasks)) or "see lm-eval ls tasks"
        problem = f"is no task of the installed harness ({version('lm_eval')})"
        raise InputError([Defect(name, problem=problem, remedy=f"{near}; a file of yours: PATH.yaml")])


def _require_askable(name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise UsageError(f"{name} runs code that the model writes (not done here; leave it out)")
    if getattr(task, "MULTIMODAL", False):
        raise UsageError(f"{name} shows pictures or plays sounds (leave it out)")
    if not _means(task):
        there = ", ".join(task.aggregation()) or "nothing"
        problem = f"is scored by {there}, none of them a mean over examples that is better when higher"
        raise InputError([Defect(name, problem=problem, remedy="leave it out: --lm-eval")])


def _with_calls(one: Prepared, left: list[LeftOut]) -> Prepared:
    """Let the harness build its requests and note what they would ask, without a model."""
    asked: list[Call] = []

    def note(calls: Sequence[Call]) -> list[Answer]:
        asked.extend(calls)
        return [
            Scores((0.0,) * len(c.answer), (0.0,) * len(c.answer))
            if isinstance(c, Forced)
            else Written("", ())
            for c in calls
        ]

    model = _model(one, None, note)
    with _inside(one.name, "cannot be put to this model"):
        _reset(one)
        template = model.apply_chat_template if one.chat else None
        one.task.build_all_requests(
            limit=one.limit, apply_chat_template=one.chat, chat_template=template, tokenizer_name=""
        )
        built = list(one.task.instances)
        for kind in dict.fromkeys(request.request_type for request in built):
            getattr(model, kind)([request for request in built if request.request_type == kind])
    if model.cut:
        why = f"beginnings of prompts beyond the {one.context} tokens that the model takes"
        left.append(LeftOut(one.name, model.cut, why))
    return replace(one, calls=tuple(dict.fromkeys(asked)))


def _reset(one: Prepared) -> None:
    """The same examples are shown every time: the harness draws them anew from where it stopped."""
    one.task.set_config(key="num_fewshot", value=one.shown)
    one.task.set_fewshot_seed(seed=SEEDS[1])


def _model(one: Prepared, key: str | None, ask: Any) -> Any:
    from lorazip.eval.harness_model import SessionModel

    return SessionModel(one.name, one.tokenizer, one.context, key, ask)


# --- what is scored -----------------------------------------------------------------------------------------


def _values(
    one: Prepared, key: str | None, session: Session, answers: Mapping[Call, Answer]
) -> dict[str, list[Any]]:
    """The harness' metrics, example by example; named METRIC or METRIC,FILTER as in its tables."""
    from lm_eval.evaluator import evaluate

    def ask(calls: Sequence[Call]) -> list[Answer]:
        # The calls were made before; a task that makes others each time is asked all the same.
        missing = list(dict.fromkeys(call for call in calls if call not in answers))
        more = dict(zip(missing, session.ask(missing), strict=True)) if missing else {}
        return [answers[call] if call in answers else more[call] for call in calls]

    with _inside(one.name, "cannot be scored"):
        _reset(one)
        found = evaluate(
            _model(one, key, ask),
            {"tasks": {one.name: one.task}},
            limit=one.limit,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=one.chat,
        )
    values: dict[str, list[Any]] = {}
    order = list(one.task.aggregation())
    for sample in found["samples"][one.name]:
        for metric in sorted(sample["metrics"], key=lambda m: order.index(m) if m in order else len(order)):
            name = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
            values.setdefault(name, []).append(sample[metric] if metric in _means(one.task) else None)
    return values


def _means(task: Any) -> set[str]:
    """Metrics that are the mean of what the examples score, and better when higher."""
    from lm_eval.api.metrics import mean

    better = task.higher_is_better()
    return {m for m, how in task.aggregation().items() if how is mean and better.get(m) is not False}


def _chosen(name: str, values: Sequence[Mapping[str, Sequence[Any]]], left: list[LeftOut]) -> dict[str, bool]:
    """The metrics that have a number for every example in every arm -> whether all lie in [0, 1]."""
    examples = max(len(found) for row in values for found in row.values())
    chosen, other = {}, []
    for metric in values[0]:
        found = [value for row in values for value in row.get(metric, ())]
        if len(found) < examples * len(values) or not all(_is_number(value) for value in found):
            other.append(metric)
        else:
            chosen[metric] = all(0 <= value <= 1 for value in found)
    if other:
        why = "metrics that are no mean of one number an example, better when higher"
        left.append(LeftOut(f"{name}: {', '.join(other)}", len(other), why))
    if not any(chosen.values()):
        problem = f"has no metric from 0 to 1 an example, only {', '.join(values[0])}"
        raise InputError([Defect(name, problem=problem, remedy="leave it out: --lm-eval")])
    return chosen


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float | np.number | np.bool_) and math.isfinite(value)


@contextlib.contextmanager
def _inside(name: str, problem: str) -> Iterator[None]:
    """The harness' own code runs: seeded as it seeds itself, its bars unseen, what it raises with the task's name."""
    before = random.getstate(), np.random.get_state()
    random.seed(SEEDS[0])
    np.random.seed(SEEDS[1])
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    except LorazipError:
        raise
    except Exception as error:  # tasks are code of many authors: what they raise is not listed anywhere
        said = f"{problem}: {type(error).__name__}: {error}"
        raise InputError([Defect(name, problem=said, remedy="try it in lm-eval itself")]) from error
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
