"""From tasks to model calls, and from answers to scores, example by example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lorazip.errors import Defect, InputError
from lorazip.eval.backend import Answer, Call, Forced, Greedy, Scores, Written
from lorazip.eval.metrics import (
    METRICS,
    Choice,
    ChoiceMetric,
    ForcedMetric,
    Metric,
    TextMetric,
    Token,
    auto,
    first_answer,
)
from lorazip.eval.prompts import Prompter
from lorazip.eval.results import LeftOut
from lorazip.eval.spec import ALWAYS, AUTO, EvalSpec
from lorazip.eval.tasks import Example, Task

SLACK = 16  # tokens that a written answer may have beyond 1.5 times the longest right one
NEWLINE = ("\n",)


@dataclass(frozen=True)
class Question:
    """An example as tokens.

    Attributes:
        answer: the right answer; its end token last, where the model is to end there.
        choices: the answers to choose from, without end tokens.
        limit: tokens of a written answer.
        stop: texts that end it.
    """

    example: Example
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]
    limit: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Asked:
    """A task as questions, with its metrics, the primary one first."""

    task: Task
    questions: tuple[Question, ...]
    metrics: tuple[Metric, ...]


def prepare(task: Task, prompter: Prompter, spec: EvalSpec, context: int, left: list[LeftOut]) -> Asked:
    """Tokenise a task and choose its metrics; what is too long is left out, and said so in `left`.

    Args:
        context: tokens that the model takes.
    Raises:
        InputError: no example is short enough, or the task cannot be scored by the metric.
    """
    if task.definition is None:
        task = replace(task, definition=spec.definition)
    metrics = _metrics(task, spec)
    prompts = [prompter.prompt(task, example) for example in task.examples]
    answers = [prompter.answer(example.output) for example in task.examples]
    longest = max(len(answer) for answer in answers)
    limit = min(spec.new_tokens, longest + longest // 2 + SLACK)
    most = min(spec.max_tokens or context, context)
    questions = []
    for example, prompt, answer in zip(task.examples, prompts, answers, strict=True):
        choices = tuple(prompter.answer(choice, end=False) for choice in example.choices)
        question = Question(example, prompt, answer, choices, limit)
        if length(question, metrics) <= most:
            questions.append(question)
    if not questions:
        raise _defect(
            task, f"has no example of at most {most} tokens", "raise --max-tokens, or leave it out: --pairs"
        )
    missing = len(task.examples) - len(questions)
    if missing:
        left.append(LeftOut(task.name, missing, f"examples of more than {most} tokens"))
    return Asked(task, tuple(questions), metrics)


def with_shots(asked: Asked, prompter: Prompter, shots: int) -> Asked:
    """The same questions after solved examples of the split `train`; a written answer ends at the line's end.

    A bare base does not know where an answer ends, so exact match is asked of the first line that it writes.

    Raises:
        InputError: the task has not so many examples to show.
    """
    task = asked.task
    if len(task.shots) < shots:
        raise _defect(task, f"has {len(task.shots)} examples to show, not {shots}", "lower --shots")
    shown = task.shots[:shots]
    questions = tuple(
        replace(
            q,
            prompt=prompter.prompt(task, q.example, shown),
            answer=prompter.answer(q.example.output, end=False),
            stop=NEWLINE,
        )
        for q in asked.questions
    )
    line = TextMetric(name="exact_match", score=first_answer)
    return Asked(task, questions, tuple(line if m.name == "exact_match" else m for m in asked.metrics))


def length(question: Question, metrics: Sequence[Metric]) -> int:
    """Tokens of the longest call about this question."""
    written = question.limit if any(isinstance(m, TextMetric) for m in metrics) else 0
    return len(question.prompt) + max(len(question.answer), written, *map(len, question.choices), 0)


def calls(metric: Metric, question: Question, key: str | None) -> tuple[Call, ...]:
    """What a metric asks the adapter of this key (None: the base) about a question."""
    if isinstance(metric, ForcedMetric):
        return (Forced(key, question.prompt, question.answer),)
    if isinstance(metric, TextMetric):
        return (Greedy(key, question.prompt, question.limit, question.stop),)
    return tuple(Forced(key, question.prompt, choice) for choice in question.choices)


def score(metric: Metric, question: Question, answers: Mapping[Call, Answer], key: str | None) -> float:
    """The score of the answers to `calls`."""
    found = [answers[call] for call in calls(metric, question, key)]
    example = question.example
    if isinstance(metric, TextMetric):
        (text,) = (a.text for a in found if isinstance(a, Written))
        return metric.score(text, example.references)
    forced = [a for a in found if isinstance(a, Scores)]
    if isinstance(metric, ForcedMetric):
        return metric.score(
            [Token(p, gap >= 0) for p, gap in zip(forced[0].logprobs, forced[0].gaps, strict=True)]
        )
    choices = [Choice(text, sum(a.logprobs)) for text, a in zip(example.choices, forced, strict=True)]
    return metric.score(choices, example.choices.index(example.output))


def _metrics(task: Task, spec: EvalSpec) -> tuple[Metric, ...]:
    name, examples = spec.metric, task.examples
    if name == AUTO:
        several = [example.references for example in examples]
        name = task.metric or auto([e.output for e in examples], several, all(e.choices for e in examples))
    if name not in METRICS:
        raise _defect(task, f"asks for the metric {name!r}", f"there are {', '.join(METRICS)}")
    if isinstance(METRICS[name], ChoiceMetric) and not all(example.choices for example in examples):
        raise _defect(task, f"has no choices, which {name} needs", "list them in every line, or in the index")
    return tuple(METRICS[one] for one in dict.fromkeys((name, *ALWAYS)))


def _defect(task: Task, problem: str, remedy: str) -> InputError:
    return InputError([Defect(task.name, "", task.source, problem, remedy)])
