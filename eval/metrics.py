"""How an answer is scored: one registry, and one function a metric.

What a metric needs from the model is its class: a forced pass over the right answer (cheap: one forward pass, no
writing), a greedy answer, or the log-likelihood of each choice. A new metric is one function and one line in METRICS.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from statistics import median
from typing import Any, Literal, NamedTuple

from lorazip.errors import UsageError, printable

LONG = 12  # words; answers that are typically longer are prose, which exact match cannot judge


class Token(NamedTuple):
    """One token of the right answer or its end token, each given the right ones before it.

    Attributes:
        logprob: natural logarithm of its probability.
        is_argmax: whether greedy decoding would take it.
    """

    logprob: float
    is_argmax: bool


class Choice(NamedTuple):
    """One of the answers to choose from.

    Attributes:
        text: without the space or newline that parts it from the prompt.
        logprob: sum of the log-probabilities of its tokens.
    """

    text: str
    logprob: float


@dataclass(frozen=True, kw_only=True)
class ForcedMetric:
    """Scores the model's view of the right answer, token by token, its end token last."""

    name: str
    score: Callable[[Sequence[Token]], float]
    bounded: bool = True
    higher_is_better: bool = True
    needs: Literal["forced"] = "forced"


@dataclass(frozen=True, kw_only=True)
class TextMetric:
    """Scores a greedy answer against all right answers (at least one; the first is the one that exact match uses)."""

    name: str
    score: Callable[[str, Sequence[str]], float]
    bounded: bool = True
    higher_is_better: bool = True
    needs: Literal["text"] = "text"


@dataclass(frozen=True, kw_only=True)
class ChoiceMetric:
    """Scores the choices, given the index of the right one."""

    name: str
    score: Callable[[Sequence[Choice], int], float]
    bounded: bool = True
    higher_is_better: bool = True
    needs: Literal["choices"] = "choices"


Metric = ForcedMetric | TextMetric | ChoiceMetric  # told apart by `needs`; bounded: scores lie in [0, 1]


# --- a forced pass over the right answer ------------------------------------------------------------------------------


def exact_match(tokens: Sequence[Token]) -> float:
    """1 where greedy decoding would write the right answer and end there: every token is the most likely one."""
    return float(all(token.is_argmax for token in _some(tokens)))


def loss(tokens: Sequence[Token]) -> float:
    """-(1/T) Σ_t log p_t: nats a token, mean over the tokens of ONE example. Its mean weighs all examples alike."""
    return -sum(token.logprob for token in _some(tokens)) / len(tokens)


def _some(tokens: Sequence[Token]) -> Sequence[Token]:
    if not tokens:
        raise ValueError("an answer has at least its end token")
    return tokens


# --- a greedy answer --------------------------------------------------------------------------------------------------


def first_answer(text: str, references: Sequence[str]) -> float:
    """1 where the first line, without white space around it, is the first reference: exact match of what is written.

    The first line is what stands before the first newline, even if that is nothing: so it is what was answered first.
    """
    return float(text.partition("\n")[0].strip() == references[0].strip())


def exact_match_any(text: str, references: Sequence[str]) -> float:
    """1 where the answer is one of the references, normalised as in SQuAD (Rajpurkar et al. 2016, 1606.05250)."""
    return float(_normalised(text) in [_normalised(reference) for reference in references])


def _normalised(text: str) -> str:
    """SQuAD's normalize_answer: lower case; no ASCII punctuation; no articles; single spaces. In this order."""
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def rouge_l(text: str, references: Sequence[str]) -> float:
    """ROUGE-L F1 (Lin 2004), the best over references, without stemming.

    F1 of precision |LCS| / |text| and recall |LCS| / |reference|, LCS the longest common subsequence of words. On ASCII
    this is rouge-score's own result. Its words are runs of a-z and 0-9, which leave nothing of most other scripts; ours
    are runs of letters and digits of any script.
    """
    return max(float(_rouge().score(reference, text)["rougeL"].fmeasure) for reference in references)


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Words())


class _Words:
    """What rouge-score asks for its words."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


# A minus is a sign only where it cannot be a hyphen or a subtraction: not after a word, a number or a bracket.
_NUMBER = r"(?:(?<![\w.)\]])[-−])?(?:[$€£][-−]?)?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
_MARKED = rf"####\s*({_NUMBER})"


def final_number(text: str, references: Sequence[str]) -> float:
    """1 where the final number equals that of a reference (GSM8K, Cobbe et al. 2021, arXiv 2110.14168).

    It is the first number after ####, since a model that does not stop writes further questions and answers; without
    ####, the last number of the text. Compared as numbers: 1,234.50 is 1234.5, $5. is 5, 50% is 50.

    Raises:
        UsageError: a reference has no number.
    """
    right = []
    for reference in references:
        number = _final(reference)
        if number is None:
            problem = f"no number in the reference {printable(reference[:80])!r}"
            raise UsageError(f"final_number: {problem} (this task needs another metric)")
        right.append(number)
    return float(_final(text) in right)


def _final(text: str) -> Decimal | None:
    numbers = re.findall(_MARKED, text)[:1] or re.findall(_NUMBER, text)[-1:]
    if not numbers:
        return None
    size = Decimal(re.sub(r"[^0-9.]", "", numbers[0]))
    return -size if re.search("[-−]", numbers[0]) else size


# --- the log-likelihood of each choice --------------------------------------------------------------------------------


def choice(choices: Sequence[Choice], right: int) -> float:
    """1 where the right choice is more likely than every other one.

    A tie is not right: a model that cannot tell two answers apart has not answered. Choices with the right one's text
    are no others.
    """
    return _best(choices, right, lambda one: one.logprob)


def choice_norm(choices: Sequence[Choice], right: int) -> float:
    """The same by log-likelihood a character, so that long answers can win: acc_norm of lm-evaluation-harness."""
    return _best(choices, right, lambda one: one.logprob / len(one.text))


def _best(choices: Sequence[Choice], right: int, by: Callable[[Choice], float]) -> float:
    answer = choices[right]
    return float(all(by(other) < by(answer) for other in choices if other.text != answer.text))


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        ForcedMetric(name="exact_match", score=exact_match),
        ForcedMetric(name="loss", score=loss, bounded=False, higher_is_better=False),
        TextMetric(name="first_answer", score=first_answer),
        TextMetric(name="exact_match_any", score=exact_match_any),
        TextMetric(name="rouge_l", score=rouge_l),
        TextMetric(name="final_number", score=final_number),
        ChoiceMetric(name="choice", score=choice),
        ChoiceMetric(name="choice_norm", score=choice_norm),
    )
}


def auto(outputs: Sequence[str], references: Sequence[Sequence[str]], has_choices: bool) -> str:
    """The metric that fits a task's kind of answer.

    Choices are compared. Answers that all have a line `#### number` are computed. Answers whose median is above `LONG`
    words are prose. Of the rest, those that mostly have several right answers are compared with all of them, and
    others with their only one.

    Args:
        outputs: the answer of every example.
        references: all right answers of every example.
        has_choices: whether the examples list choices.
    """
    if has_choices:
        return "choice"
    if all(re.search(rf"^{_MARKED}", output, re.MULTILINE) for output in outputs):
        return "final_number"
    if median(len(output.split()) for output in outputs) > LONG:
        return "rouge_l"
    several = [len(set(known)) > 1 for known in references]
    return "exact_match_any" if sum(several) > len(several) / 2 else "exact_match"
