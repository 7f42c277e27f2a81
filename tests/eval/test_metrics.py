"""Scores by hand, against rouge-score's own, and what each metric must not be fooled by."""

from __future__ import annotations

import math
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from lorazip.errors import UsageError
from lorazip.eval.metrics import (
    METRICS,
    Choice,
    Token,
    auto,
    choice,
    choice_norm,
    exact_match,
    exact_match_any,
    final_number,
    first_answer,
    loss,
    rouge_l,
)

# --- a forced pass ----------------------------------------------------------------------------------------------------


def test_exact_match_needs_every_token_and_the_end() -> None:
    sure, unsure = Token(math.log(0.9), True), Token(math.log(0.1), False)
    assert exact_match([sure, sure]) == 1
    for tokens in ([unsure, sure], [sure, unsure], [unsure]):
        assert exact_match(tokens) == 0


def test_loss_is_nats_a_token() -> None:
    tokens = [Token(math.log(p), False) for p in (0.5, 0.25, 1.0)]
    assert loss(tokens) == pytest.approx(math.log(8) / 3)


@pytest.mark.parametrize("score", [exact_match, loss])
def test_no_token_is_no_answer(score: object) -> None:
    assert callable(score)
    with pytest.raises(ValueError, match="end token"):
        score([])


# --- a greedy answer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reference", "score"),
    [
        ("Paris", "Paris", 1),
        ("  Paris \n\nQuestion: and of Spain?", " Paris\n", 1),
        ("paris", "Paris", 0),
        ("Paris.", "Paris", 0),
        ("\nParis", "Paris", 0),  # a newline came first, and greedy decoding ends there
        ("Rome\nParis", "Paris", 0),
    ],
)
def test_first_answer(text: str, reference: str, score: float) -> None:
    assert first_answer(text, [reference, "Rome"]) == score


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("The Beatles!", 1),
        ("beatles", 1),
        ("a  band: The Fab-Four.", 1),  # a hyphen goes without leaving a space
        ("a band, the Fab Four", 0),
        ("Theatre beatles", 0),  # an article is a word of its own
        ("the beatles, I think", 0),
    ],
)
def test_exact_match_any_of_normalised_references(text: str, score: float) -> None:
    assert exact_match_any(text, ["The Beatles", "band FabFour"]) == score


def test_rouge_l_by_hand() -> None:
    # LCS "the cat the mat": 4 of 5 words written, 4 of 6 of the reference.
    p, r = 4 / 5, 4 / 6
    written, reference = "The cat, under the mat", "the cat sat on the mat"
    assert rouge_l(written, [reference]) == pytest.approx(2 * p * r / (p + r))
    assert rouge_l(written, ["dogs", reference, "mat"]) == rouge_l(written, [reference])
    assert rouge_l("", [reference]) == 0
    assert rouge_l(reference, [reference]) == 1


@settings(max_examples=100, deadline=None)
@given(*[st.text(alphabet="abcAB19 _-.'\n" + string.punctuation, max_size=30)] * 2)
def test_rouge_l_is_rouge_scores_on_ascii(text: str, reference: str) -> None:
    theirs = RougeScorer(["rougeL"], use_stemmer=False).score(reference, text)["rougeL"].fmeasure
    assert rouge_l(text, [reference]) == pytest.approx(theirs)


def test_rouge_l_reads_other_scripts() -> None:
    assert rouge_l("кот сидит здесь", ["кот сидит там"]) == pytest.approx(2 / 3)
    assert rouge_l("école d'été", ["école d'hiver"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("text", "reference", "score"),
    [
        ("3 + 4 = 7\n#### 7", "#### 7", 1),
        ("#### 7\n\nQuestion: 3 + 5?\n#### 8", "#### 7", 1),  # runs on: the first answer counts
        ("#### 8\n so not 7", "#### 7", 0),
        ("The answer is 7.", "#### 7", 1),
        ("First 7, then 8", "#### 7", 0),
        ("#### unknown, maybe 7", "#### 7", 1),
        ("no idea", "#### 7", 0),
        ("", "#### 7", 0),
        ("It costs $1,234.50.", "1234.5", 1),
        ("1234.5", "#### $1,234.50", 1),
        ("12,34", "1234", 0),  # no thousands: two numbers
        ("1,234,567", "1234567", 1),
        ("1,2345", "2345", 1),
        ("50%", "50", 1),
        ("0.50", ".5", 1),
        ("7.0", "7", 1),
        ("007", "7", 1),
        ("70", "7", 0),
        ("7.1", "7", 0),
        ("x = -3", "-3", 1),
        ("−3", "-3", 1),  # the minus sign of typesetting
        ("3", "-3", 0),
        ("-$3", "-3", 1),
        ("#### $-3\n8", "-3", 1),
        ("10-3", "3", 1),  # a hyphen or a subtraction
        ("(2)-3", "3", 1),
        ("0.1000000000000000000001", "0.1", 0),  # numbers, not floats
        ("9007199254740993", "9007199254740992", 0),
    ],
)
def test_final_number(text: str, reference: str, score: float) -> None:
    assert final_number(text, [reference]) == score


def test_final_number_of_any_reference() -> None:
    assert final_number("8", ["7", "8.0"]) == 1
    with pytest.raises(UsageError, match=r"no number in the reference 'seven'"):
        final_number("7", ["7", "seven"])


# --- choices ----------------------------------------------------------------------------------------------------------


def test_choices_by_hand() -> None:
    choices = [Choice("no", -2.0), Choice("yes, certainly", -7.0), Choice("maybe", -6.0)]
    assert [choice(choices, right) for right in range(3)] == [1, 0, 0]
    assert [choice_norm(choices, right) for right in range(3)] == [0, 1, 0]  # -1, -0.5, -1.2 a character


def test_a_tie_of_choices_is_not_right() -> None:
    choices = [Choice("no", -2.0), Choice("si", -2.0), Choice("ja", -3.0)]
    assert [score(choices, right) for score in (choice, choice_norm) for right in range(3)] == [0] * 6
    twice = [Choice("no", -2.0), Choice("no", -2.0), Choice("si", -3.0)]
    assert [choice(twice, right) for right in range(3)] == [1, 1, 0]  # the same answer is no rival


# --- the registry -----------------------------------------------------------------------------------------------------


def test_the_registry_says_what_a_metric_needs() -> None:
    assert all(name == metric.name for name, metric in METRICS.items())
    assert {name: metric.needs for name, metric in METRICS.items()} == {
        "exact_match": "forced",
        "loss": "forced",
        "first_answer": "text",
        "exact_match_any": "text",
        "rouge_l": "text",
        "final_number": "text",
        "choice": "choices",
        "choice_norm": "choices",
    }
    for metric in METRICS.values():
        good, bad = _good_and_bad(metric.name)
        assert good > bad if metric.higher_is_better else good < bad
        assert not metric.bounded or (bad, good) == (0, 1)
    assert loss([Token(-5.0, False)]) > 1 and not METRICS["loss"].bounded


def _good_and_bad(name: str) -> tuple[float, float]:
    metric = METRICS[name]
    match metric.needs:
        case "forced":
            return metric.score([Token(-0.1, True)]), metric.score([Token(-5.0, False)])
        case "text":
            return metric.score("12", ["12"]), metric.score("13", ["12"])
        case "choices":
            choices = [Choice("a", -1.0), Choice("b", -2.0)]
            return metric.score(choices, 0), metric.score(choices, 1)


PROSE = "one two three four five six seven eight nine ten eleven twelve thirteen"


@pytest.mark.parametrize(
    ("outputs", "several", "has_choices", "name"),
    [
        (["A", "B"], False, True, "choice"),
        (["#### 3", "#### 4"], False, True, "choice"),
        ([f"{PROSE}\n#### 3", "#### -1,000"], False, False, "final_number"),
        ([f"{PROSE}\n#### 3", f"{PROSE} #### 3"], False, False, "rouge_l"),  # not a line of its own
        (["#### 3", "#### none"], False, False, "exact_match"),
        ([PROSE, PROSE, "yes"], False, False, "rouge_l"),
        ([PROSE, "yes", "no"], False, False, "exact_match"),
        ([PROSE.removesuffix(" thirteen")], False, False, "exact_match"),
        (["yes", "no"], True, False, "exact_match_any"),
        ([PROSE], True, False, "rouge_l"),
    ],
)
def test_auto_goes_by_the_kind_of_answer(
    outputs: list[str], several: bool, has_choices: bool, name: str
) -> None:
    references = [[output, output.upper() + "!"] if several else [output] for output in outputs]
    assert auto(outputs, references, has_choices) == name


def test_a_few_examples_with_several_answers_do_not_change_the_metric() -> None:
    assert auto(["a", "b"], [["a", "A"], ["b"]], False) == "exact_match"
    assert auto(["a", "b"], [["a", "a"], ["b", "b"]], False) == "exact_match"  # twice the same is one
