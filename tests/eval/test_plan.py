"""Plans: which examples are asked, by which metrics, and how answers become scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorazip.errors import InputError, UsageError
from lorazip.eval import plan
from lorazip.eval.backend import Answer, Call, Forced, Greedy, Scores, Written
from lorazip.eval.metrics import METRICS
from lorazip.eval.plan import Asked, Question
from lorazip.eval.prompts import Prompter
from lorazip.eval.results import LeftOut
from lorazip.eval.spec import EvalSpec
from lorazip.eval.tasks import Example, Task


class Letters:
    """As much of a tokenizer as a prompter needs: a token a letter; `~` is none."""

    eos_token_id = 0
    chat_template = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text if c != "~"]}

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(map(chr, tokens))


PROMPTER = Prompter(cast(Any, Letters()), "{input}")


def example(text: str, output: str, *more: str, choices: tuple[str, ...] = ()) -> Example:
    return Example(text, output, tuple(dict.fromkeys((output, *more))), choices)


def task(*examples: Example, shots: tuple[Example, ...] = (), metric: str | None = None) -> Task:
    return Task("sums", None, examples, shots, metric, "sums.jsonl")


def prepared(what: Task, context: int = 1000, left: list[LeftOut] | None = None, **options: Any) -> Asked:
    return plan.prepare(what, PROMPTER, EvalSpec(**options), context, [] if left is None else left)


def tokens(text: str) -> tuple[int, ...]:
    return tuple(map(ord, text))


# --- what is asked ----------------------------------------------------------------------------------------------------


def test_questions_are_tokens() -> None:
    asked = prepared(task(example("1+1", "2"), example("a?", "yes", choices=("yes", "no"))))
    first, second = asked.questions
    assert (first.prompt, first.answer, first.choices) == (tokens("1+1"), (*tokens("2"), 0), ())
    assert second.answer == (*tokens("yes"), 0)
    assert second.choices == (tokens("yes"), tokens("no"))
    assert first.stop == second.stop == ()
    # The longest right answer has 4 tokens with its end: half as much again, and 16.
    assert first.limit == second.limit == 4 + 2 + plan.SLACK
    assert prepared(task(example("1+1", "2")), new_tokens=5).questions[0].limit == 5


def test_the_definition_of_the_command_line_is_for_tasks_without_one() -> None:
    prompter = Prompter(cast(Any, Letters()), "{definition}:{input}")
    for own, found in ((None, "ours:a"), ("theirs", "theirs:a")):
        one = replace(task(example("a", "b")), definition=own)
        asked = plan.prepare(one, prompter, EvalSpec(definition="ours"), 100, [])
        assert asked.questions[0].prompt == tokens(found)


@pytest.mark.parametrize(
    ("context", "options"), [(1000, {"max_tokens": 6}), (6, {}), (6, {"max_tokens": 99})]
)
def test_too_long_examples_are_left_out_and_counted(context: int, options: dict[str, int]) -> None:
    """Prompt, answer and end token: 3 + 2 + 1 fit into 6, and the model takes no more than its context."""
    left: list[LeftOut] = []
    one = task(example("aaa", "bb"), example("aaaa", "bb"), example("aaa", "bbb"))
    asked = prepared(one, context, left, metric="exact_match", **options)
    assert [q.example for q in asked.questions] == [one.examples[0]]
    assert left == [LeftOut("sums", 2, "examples of more than 6 tokens")]
    with pytest.raises(InputError, match=r"sums: sums\.jsonl: has no example of at most 5 tokens"):
        prepared(one, context, metric="exact_match", max_tokens=5)


def test_choices_and_written_answers_must_fit_too() -> None:
    left: list[LeftOut] = []
    asked = prepared(
        task(example("aaa", "b", choices=("b", "cccc")), example("a", "b", choices=("b", "c"))), 6, left
    )
    assert [q.example.input for q in asked.questions] == ["a"]
    # An answer of one letter and its end may be written with 3 + 16 tokens.
    assert len(prepared(task(example("a" * 10, "b")), 29, metric="first_answer").questions) == 1
    with pytest.raises(
        InputError, match=r"has no example of at most 28 tokens \(see --max-tokens, --new-tokens"
    ):
        prepared(task(example("a" * 10, "b")), 28, metric="first_answer")


def test_what_is_only_shown_is_written_within_the_context() -> None:
    (question,) = prepared(task(example("a" * 10, "b")), 15, metric="exact_match").questions
    assert question.limit == 5


@settings(deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 40)), min_size=1, max_size=8),
    context=st.integers(2, 60),
    most=st.none() | st.integers(2, 60),
    metric=st.sampled_from(["exact_match", "rouge_l"]),
    shots=st.integers(0, 2),
)
def test_nothing_is_lost_and_no_call_is_too_long(
    sizes: list[tuple[int, int]], context: int, most: int | None, metric: str, shots: int
) -> None:
    left: list[LeftOut] = []
    one = task(*(example("a" * p, "b" * n) for p, n in sizes), shots=(example("s", "t"),) * 2)
    try:
        asked = prepared(one, context, left, max_tokens=most, metric=metric, shots=shots)
    except InputError:
        return
    assert len(asked.questions) + sum(gone.count for gone in left) == len(sizes)
    groups = [asked, plan.with_shots(asked, PROMPTER, shots)] if shots else [asked]
    for group in groups:
        for q in group.questions:
            assert max(len(q.answer), q.limit) + len(q.prompt) <= context
            assert q.limit >= 1


def test_what_has_no_tokens_is_refused() -> None:
    with pytest.raises(InputError, match=r"sums\.jsonl: has an example without any token"):
        prepared(task(example("", "b")))
    for choice in ("", "~"):  # the second is a letter that the tokenizer drops
        with pytest.raises(InputError, match=r"sums\.jsonl: has a choice without any token"):
            prepared(task(example("a", "b", choices=("b", choice))))
    assert prepared(task(example("a", ""))).questions[0].answer == (0,)  # nothing but the end is an answer


# --- metrics ----------------------------------------------------------------------------------------------------------

LONG = " ".join(["word"] * 20)


@pytest.mark.parametrize(
    ("one", "metric", "names"),
    [
        (task(example("a", "b")), "auto", ["exact_match", "loss"]),
        (task(example("a", "b", "c")), "auto", ["exact_match_any", "exact_match", "loss"]),
        (task(example("a", LONG)), "auto", ["rouge_l", "exact_match", "loss"]),
        (task(example("a", "1 + 1\n#### 2")), "auto", ["final_number", "exact_match", "loss"]),
        (task(example("a", "b", choices=("b", "c"))), "auto", ["choice", "exact_match", "loss"]),
        (task(example("a", "b"), metric="rouge_l"), "auto", ["rouge_l", "exact_match", "loss"]),
        (task(example("a", LONG), metric="exact_match"), "auto", ["exact_match", "loss"]),
        (task(example("a", "b"), metric="rouge_l"), "first_answer", ["first_answer", "exact_match", "loss"]),
        (task(example("a", "b"), metric="unknown"), "rouge_l", ["rouge_l", "exact_match", "loss"]),
    ],
)
def test_the_metric_is_the_users_or_the_indexs_or_fits_the_answers(
    one: Task, metric: str, names: list[str]
) -> None:
    assert [m.name for m in prepared(one, metric=metric).metrics] == names


@pytest.mark.parametrize(
    ("one", "metric", "problem"),
    [
        (
            task(example("a", "b"), metric="bleu"),
            "auto",
            r"asks for the metric 'bleu' \(there are exact_match, ",
        ),
        (
            task(example("a", "b"), metric="loss"),
            "auto",
            r"asks for the metric 'loss' \(there are exact_match, ",
        ),
        (task(example("a", "b")), "choice", "has no choices, which choice needs"),
        (task(example("a", "b", choices=("b",)), example("a", "b")), "choice_norm", "has no choices"),
        (task(example("a", "5"), example("a", "five")), "final_number", "no number in the reference 'five'"),
    ],
)
def test_a_metric_that_cannot_be_is_refused_before_a_model_is_asked(
    one: Task, metric: str, problem: str
) -> None:
    with pytest.raises(InputError, match=rf"sums: sums\.jsonl: .*{problem}"):
        prepared(one, metric=metric)


@pytest.mark.parametrize("metric", ["bleu", "", "loss", "Exact_Match"])
def test_a_spec_refuses_other_metrics(metric: str) -> None:
    """The gate asks what was lost; more loss is not more of anything good."""
    with pytest.raises(UsageError, match="metric must be one of auto, exact_match, "):
        EvalSpec(metric=metric)


@pytest.mark.parametrize("options", [{"limit": 0}, {"max_tokens": 1}, {"new_tokens": 0}, {"shots": -1}])
def test_a_spec_refuses_numbers_out_of_range(options: dict[str, int]) -> None:
    (name,) = options
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} must be at least "):
        EvalSpec(**cast(Any, options))


# --- few-shot ---------------------------------------------------------------------------------------------------------


def test_solved_examples_go_before_and_a_line_ends_the_answer() -> None:
    one = task(example("a", "b"), shots=(example("s", "t"), example("u", "v"), example("w", "x")))
    asked = prepared(one, shots=2)
    shown = plan.with_shots(asked, PROMPTER, 2)
    (question,) = shown.questions
    assert question.prompt == tokens("st\n\nuv\n\na")
    assert question.answer == tokens("b")  # a bare base does not know that it should end there
    assert question.stop == ("\n",)
    assert asked.questions[0].stop == ()
    assert question.example is asked.questions[0].example
    assert [m.name for m in shown.metrics] == ["exact_match", "loss"]
    metric = shown.metrics[0]
    assert plan.calls(metric, question, None) == (Greedy(None, question.prompt, question.limit, ("\n",)),)
    for text, score in (("b", 1), (" b ", 1), ("bb", 0), ("", 0)):
        call = plan.calls(metric, question, None)[0]
        assert plan.score(metric, question, {call: Written(text, ())}, None) == score


def test_answers_of_several_lines_are_written_to_their_end() -> None:
    """A line's end would cut the worked solution of GSM8K before its number."""
    shots = (example("s", "x = 1\n#### 1\n"),)
    asked = plan.with_shots(prepared(task(example("a", "b = 2\n#### 2"), shots=shots)), PROMPTER, 1)
    assert asked.questions[0].stop == ("\n\n",)
    metric, exact = asked.metrics[:2]
    assert (metric.name, exact.name) == ("final_number", "exact_match")
    call = plan.calls(metric, asked.questions[0], None)[0]
    answers: dict[Call, Answer] = {call: Written("b = 2\n#### 2", ())}
    assert plan.score(metric, asked.questions[0], answers, None) == 1
    assert plan.score(exact, asked.questions[0], answers, None) == 1
    several = task(example("a", "b\n\nc"), shots=shots)
    assert plan.with_shots(prepared(several), PROMPTER, 1).questions[0].stop == ()


def test_an_empty_answer_is_still_a_token() -> None:
    asked = plan.with_shots(prepared(task(example("a", ""), shots=(example("s", "t"),))), PROMPTER, 1)
    assert asked.questions[0].answer == (0,)


def test_too_few_examples_to_show_are_refused() -> None:
    one = task(example("a", "b"), shots=(example("s", "t"),))
    with pytest.raises(InputError, match=r"sums.jsonl: has 1 examples to show, not 2 \(lower --shots\)"):
        prepared(one, shots=2)
    with pytest.raises(InputError, match="has 1 examples to show, not 2"):
        plan.with_shots(prepared(one), PROMPTER, 2)


def test_few_shot_prompts_must_fit_and_all_arms_answer_the_same() -> None:
    left: list[LeftOut] = []
    one = task(example("a", "b"), example("aaa", "b"), shots=(example("s", "t"),))
    asked = prepared(one, 7, left, shots=1, metric="exact_match")  # "st\n\na" and "b" and the end
    assert [q.example.input for q in asked.questions] == ["a"]
    assert left == [LeftOut("sums", 1, "examples of more than 7 tokens, or 7 after solved ones")]


# --- calls and scores -------------------------------------------------------------------------------------------------

QUESTION = Question(
    example("a?", "yes", choices=("no", "yes", "perhaps")),
    tokens("a?"),
    (*tokens("yes"), 0),
    (tokens("no"), tokens("yes"), tokens("perhaps")),
    20,
)


def scored(name: str, *answers: Answer, key: str | None = "arm/x") -> float:
    metric = METRICS[name]
    asked = plan.calls(metric, QUESTION, key)
    other: dict[Call, Answer] = {Forced("arm/y", c.prompt, (1,)): Scores((-9.0,), (-9.0,)) for c in asked}
    return plan.score(metric, QUESTION, other | dict(zip(asked, answers, strict=True)), key)


def test_each_kind_of_metric_asks_its_own_calls() -> None:
    forced = Forced("k", QUESTION.prompt, QUESTION.answer)
    for name in ("exact_match", "loss"):
        assert plan.calls(METRICS[name], QUESTION, "k") == (forced,)
    for name in ("first_answer", "exact_match_any", "rouge_l", "final_number"):
        assert plan.calls(METRICS[name], QUESTION, None) == (Greedy(None, QUESTION.prompt, 20),)
    for name in ("choice", "choice_norm"):
        assert plan.calls(METRICS[name], QUESTION, "k") == tuple(
            Forced("k", QUESTION.prompt, choice) for choice in QUESTION.choices
        )


def test_forced_answers_are_scored() -> None:
    assert scored("exact_match", Scores((-1.0, -1.0, -1.0, -1.0), (0.5, 0.0, 2.0, 0.1))) == 1  # a tie counts
    assert scored("exact_match", Scores((-0.1, -0.1, -0.1, -0.1), (0.5, 0.5, 2.0, -0.001))) == 0  # it goes on
    assert scored("exact_match", Scores((-1.0,), (math.nan,))) == 0
    assert scored("loss", Scores((-1.0, -2.0, -3.0, -4.0), (0.0, 0.0, 0.0, 0.0))) == 2.5
    assert scored("loss", Scores((-3.0, -1.0), (0.0, 0.0)), key=None) == 2.0


def test_written_answers_are_scored_against_the_references() -> None:
    assert scored("first_answer", Written("yes\nno", ())) == 1
    assert scored("first_answer", Written("Yes", ())) == 0
    assert scored("exact_match_any", Written("Yes.", ())) == 1
    assert scored("rouge_l", Written("yes no", ())) == pytest.approx(2 / 3)


def test_the_likeliest_choice_is_the_answer() -> None:
    """Sums over tokens: -3, -2 and -2.8; a letter: -1.5, -0.67 and -0.4."""
    some = [
        Scores((-1.0, -2.0), (0.0, 0.0)),
        Scores((-0.5, -0.5, -1.0), (0.0,) * 3),
        Scores((-0.4,) * 7, (0.0,) * 7),
    ]
    assert scored("choice", *some) == 1
    assert scored("choice_norm", *some) == 0
    assert (
        scored("choice", some[0], Scores((-3.0,), (0.0,)), Scores((-4.0,), (0.0,))) == 0
    )  # a tie is no answer


@settings(deadline=None)
@given(st.permutations(range(3)), st.lists(st.floats(-9, 0), min_size=3, max_size=3, unique=True))
def test_choices_may_come_in_any_order(order: list[int], logprobs: list[float]) -> None:
    texts = QUESTION.example.choices
    for name in ("choice", "choice_norm"):
        found = []
        for some in (range(3), order):
            one = replace(
                QUESTION,
                example=replace(QUESTION.example, choices=tuple(texts[i] for i in some)),
                choices=tuple(QUESTION.choices[i] for i in some),
            )
            asked = plan.calls(METRICS[name], one, "k")
            answers: dict[Call, Answer] = {
                c: Scores((logprobs[i],), (0.0,)) for c, i in zip(asked, some, strict=True)
            }
            found.append(plan.score(METRICS[name], one, answers, "k"))
        assert found[0] == found[1]
