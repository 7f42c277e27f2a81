"""From tasks to model calls, and from answers to scores, example by example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lorazip.errors import Defect, InputError, UsageError
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
)
from lorazip.eval.prompts import Prompter
from lorazip.eval.results import LeftOut
from lorazip.eval.spec import ALWAYS, AUTO, PRIMARY, EvalSpec
from lorazip.eval.tasks import Example, Task

SLACK = 16  # tokens that a written answer may have beyond 1.5 times the longest right one
ENDS = ("\n", "\n\n")  # what may end an answer of a bare base; solved examples are parted by the second


@dataclass(frozen=True)
class Question:
    """An example as tokens.

    Attributes:
        answer: the right answer; its end token last, where the model is to end there.
        choices: the answers to choose from, without end tokens.
        limit: tokens of a written answer, which the model can take after the prompt.
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

    Where a bare base is shown examples, that prompt must fit too: all arms answer the same examples.

    Args:
        context: tokens that the model takes.
    Raises:
        InputError: no example is short enough, the task cannot be scored by the metric, an example or one of its
            choices has no token, or there are too few examples to show.
    """
    if task.definition is None:
        task = replace(task, definition=spec.definition)
    metrics, shown = _metrics(task, spec), _shown(task, spec.shots)
    answers = [prompter.answer(example.output) for example in task.examples]
    longest = max(len(answer) for answer in answers)
    limit = min(spec.new_tokens, longest + longest // 2 + SLACK)
    most = min(spec.max_tokens or context, context)
    questions = []
    for example, answer in zip(task.examples, answers, strict=True):
        prompt = prompter.prompt(task, example)
        choices = tuple(prompter.answer(choice, end=False) for choice in example.choices)
        if not prompt or not all(choices):
            what = "a choice" if prompt else "an example"
            raise _defect(task, f"has {what} without any token", "correct the task, or the template")
        question = Question(example, prompt, answer, choices, limit)
        more = len(prompter.prompt(task, example, shown)) - len(prompt) if shown else 0
        size = length(question, metrics)
        if size <= most and size + more <= context:
            # Of other metrics an answer is written too, to be shown: it ends where the model does.
            questions.append(replace(question, limit=min(limit, context - len(prompt) - more)))
    if not questions:
        remedy = "see --max-tokens, --new-tokens and --shots, or leave it out: --pairs"
        raise _defect(task, f"has no example of at most {most} tokens", remedy)
    missing = len(task.examples) - len(questions)
    if missing:
        after = f", or {context} after solved ones" if shown else ""
        left.append(LeftOut(task.name, missing, f"examples of more than {most} tokens{after}"))
    return Asked(task, tuple(questions), metrics)


def with_shots(asked: Asked, prompter: Prompter, shots: int) -> Asked:
    """The same questions after solved examples of the split `train`.

    A bare base does not know where an answer ends, so what it writes ends at the line's end, or at an empty line
    where right answers have several lines; exact match is asked of that.

    Raises:
        InputError: the task has not so many examples to show.
    """
    shown = _shown(asked.task, shots)
    outputs = [one.output.strip() for one in (*shown, *asked.task.examples)]
    stop = tuple(end for end in ENDS if not any(end in output for output in outputs))[:1]
    questions = tuple(
        replace(
            q,
            prompt=prompter.prompt(asked.task, q.example, shown),
            answer=prompter.answer(q.example.output, end=False) or (prompter.end,),
            stop=stop,
        )
        for q in asked.questions
    )
    written = TextMetric(name="exact_match", score=_exact)
    return Asked(
        asked.task, questions, tuple(written if m.name == "exact_match" else m for m in asked.metrics)
    )


def _exact(text: str, references: Sequence[str]) -> float:
    """Exact match of what is written; `first_answer` where an answer is one line."""
    return float(text.strip() == references[0].strip())


def _shown(task: Task, shots: int) -> tuple[Example, ...]:
    if len(task.shots) < shots:
        raise _defect(task, f"has {len(task.shots)} examples to show, not {shots}", "lower --shots")
    return task.shots[:shots]


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
    if name not in PRIMARY:
        raise _defect(task, f"asks for the metric {name!r}", f"there are {', '.join(PRIMARY)}")
    metric = METRICS[name]
    if isinstance(metric, TextMetric):
        try:
            for example in examples:
                metric.score("", example.references)  # before a model is asked
        except UsageError as error:
            raise _defect(task, f"cannot be scored: {error}", "see --metric") from error
    if isinstance(metric, ChoiceMetric) and not all(example.choices for example in examples):
        raise _defect(task, f"has no choices, which {name} needs", "list them in every line, or in the index")
    return tuple(METRICS[one] for one in dict.fromkeys((name, *ALWAYS)))


def _defect(task: Task, problem: str, remedy: str) -> InputError:
    return InputError([Defect(task.name, "", task.source, problem, remedy)])
