"""The stage `label`: the expert, source base and adapter, answers every input; with TiTok's filter answers are chosen.

Answers are texts, for the two models have different tokens. Where their tokenizers are equal, the expert's most likely
tokens at every place of an answer are kept too.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lorazip.errors import LorazipError, TransferError
from lorazip.eval.backend import Answer, Call, Forced, Greedy, Ranked, Scores, Tops, Written
from lorazip.eval.prompts import Prompter
from lorazip.eval.tasks import Example, Task
from lorazip.transfer import excess, gather
from lorazip.transfer.gather import INPUTS
from lorazip.transfer.move import Move, alive, pending
from lorazip.transfer.recipe import digest
from lorazip.transfer.world import Ask, World

LABELLED = "labelled.jsonl"
LEAST = 4  # answers: with fewer nothing can be trained and held out
TESTED = (
    0.2  # of the answers, where there is no labelled test: what agreement with the teacher is measured on
)

TRAIN, HELD_OUT, TEST, ASIDE = "train", "held out", "test", "aside"


@dataclass(frozen=True)
class Labelled:
    """An input and the expert's answer.

    Attributes:
        tokens: the answer in the source's tokens, its end token last.
        excess: of each of them; empty without that filter.
        part: train, held out, test; or aside: not among the best samples.
        tops: the expert's most likely tokens; None unless they were asked for.
    """

    input: str
    output: str
    tokens: tuple[int, ...]
    excess: tuple[float, ...]
    part: str
    tops: Tops | None = None


def task_of(move: Move, examples: Sequence[Example] = (), shots: Sequence[Example] = ()) -> Task:
    """The task as prompts are made of it."""
    return Task(
        move.name, move.recipe.inputs.definition or None, tuple(examples), tuple(shots), None, move.name
    )


def key(move: Move, world: World) -> str:
    """What the answers depend on."""
    r = move.recipe
    filtered = r.filter.keep_samples if _filtered(move) else None
    logits = r.label.top_k if r.train.loss == "logits" else None
    told = [r.label.new_tokens, filtered, r.prompting[0], r.train.held_out, bool(r.gate.tests), r.inputs.seed]
    return digest("label", gather.key(move, world, True), told, logits, move.digest, world.source.digest)


def label(world: World, moves: Sequence[Move]) -> None:
    """Ask the expert of every transfer, and keep the answers that end."""
    todo = pending(moves, "label", lambda move: key(move, world), LABELLED)
    asks, inputs, questions = [], {}, {}
    for move in todo:
        with move.guarded():
            inputs[move.name] = _inputs(world, move)
            questions[move.name] = _questions(world, move, inputs[move.name])
            asks.append(Ask(move.name, {_expert(move): move.adapter}, questions[move.name]))
    answers = world.ask(world.source, asks, "the expert answers")
    asks, kept, counts = [], {}, {}
    for move in alive(todo):
        with move.guarded():
            got = answers[move.name]
            if isinstance(got, LorazipError):
                raise got
            limits = [call.limit for call in questions[move.name]]
            end = _prompter(world, move).end
            kept[move.name], counts[move.name] = _ended(move, inputs[move.name], limits, end, got)
            asks.append(Ask(move.name, {_expert(move): move.adapter}, _scoring(world, move, kept[move.name])))
    answers = world.ask(world.source, asks, "weighing answers")
    for move in alive(todo):
        with move.guarded():
            got = answers.get(move.name, [])
            if isinstance(got, LorazipError):
                raise got
            found = _chosen(move, _scored(move, kept[move.name], got))
            move.write(LABELLED, key(move, world), map(asdict, found))
            parts = dict(Counter(one.part for one in found))
            move.done("label", key(move, world), {"answers": counts[move.name], "parts": parts})


def read(world: World, move: Move) -> list[Labelled]:
    """What `label` wrote. Raises TargetError."""
    try:
        return [_labelled(row) for row in move.read(LABELLED, key(move, world))]
    except (KeyError, TypeError) as error:
        raise move.damaged(LABELLED, "a row of it is no answer") from error


def _labelled(row: dict[str, Any]) -> Labelled:
    tops = row["tops"]
    if tops is not None:
        tops = Tops(*(tuple(tuple(place) for place in tops[name]) for name in ("tokens", "logprobs")))
    return Labelled(**row | {"tokens": tuple(row["tokens"]), "excess": tuple(row["excess"]), "tops": tops})


def _inputs(world: World, move: Move) -> list[str]:
    try:
        return [row["input"] for row in move.read(INPUTS, gather.key(move, world, True))]
    except KeyError as error:
        raise move.damaged(INPUTS, "a row of it is no input") from error


def _expert(move: Move) -> str:
    return f"expert/{move.name}"


def _prompter(world: World, move: Move) -> Prompter:
    return world.source.prompter(*move.recipe.prompting[0])


def _questions(world: World, move: Move, inputs: Sequence[str]) -> list[Greedy]:
    prompter, limit = _prompter(world, move), move.recipe.label.new_tokens
    found = []
    for text in inputs:
        prompt = prompter.prompt(task_of(move), Example(text, "", ()))
        room = world.source.context - len(prompt)
        if room < 2:
            raise TransferError(
                f"{move.name}: an input of {len(prompt)} tokens leaves the source base no room to answer "
                f"(it takes {world.source.context}; shorten inputs.prompts)"
            )
        found.append(Greedy(_expert(move), prompt, min(limit, room)))
    return found


def _ended(
    move: Move, inputs: Sequence[str], limits: Sequence[int], end: int, answers: Sequence[Answer]
) -> tuple[list[tuple[str, Written]], dict[str, int]]:
    """Inputs and answers that end and say something, and how many of each kind there were."""
    found, counts = [], Counter(kept=0, unfinished=0, empty=0)
    for text, limit, answer in zip(inputs, limits, answers, strict=True):
        assert isinstance(answer, Written)
        if len(answer.tokens) >= limit and answer.tokens[-1] != end:
            counts["unfinished"] += 1
        elif not answer.text.strip():
            counts["empty"] += 1
        else:
            counts["kept"] += 1
            found.append((text, answer))
    if counts["kept"] == len(inputs) < LEAST:
        raise TransferError(
            f"{move.name}: {len(inputs)} inputs are too few to train on and hold out: give {LEAST} at least"
        )
    if len(found) < LEAST:
        raise TransferError(
            f"{move.name}: {len(found)} of {len(inputs)} answers of the source adapter can be used "
            f"({counts['unfinished']} did not end within label.new_tokens = {move.recipe.label.new_tokens}, "
            f"{counts['empty']} were empty): is source.template the prompt that it was trained with?"
        )
    return found, dict(counts)


def _filtered(move: Move) -> bool:
    return move.recipe.filter.kind in ("excess", "both")


def _scoring(world: World, move: Move, kept: Sequence[tuple[str, Written]]) -> list[Call]:
    """With the filter every answer's probabilities by expert and base; then, for logits, the likeliest tokens."""
    prompter, expert = _prompter(world, move), _expert(move)
    found: list[Call] = []
    for text, answer in kept:
        prompt = prompter.prompt(task_of(move), Example(text, "", ()))
        if _filtered(move):
            found += [Forced(expert, prompt, answer.tokens), Forced(None, prompt, answer.tokens)]
        if move.recipe.train.loss == "logits":
            # More than the vocabulary has cannot be asked for; that many are all.
            k = min(move.recipe.label.top_k, len(world.source.tokenizer))
            found.append(Ranked(expert, prompt, answer.tokens, k))
    return found


def _scored(move: Move, kept: Sequence[tuple[str, Written]], answers: Sequence[Answer]) -> list[Labelled]:
    each = iter(answers)
    found = []
    for text, answer in kept:
        gains: tuple[float, ...] = ()
        if _filtered(move):
            expert, base = next(each), next(each)
            assert isinstance(expert, Scores) and isinstance(base, Scores)
            gains = excess.excess(expert.logprobs, base.logprobs)
        tops = next(each) if move.recipe.train.loss == "logits" else None
        assert tops is None or isinstance(tops, Tops)
        found.append(Labelled(text, answer.text, answer.tokens, gains, TRAIN, tops))
    return found


def _chosen(move: Move, answers: Sequence[Labelled]) -> list[Labelled]:
    """Each in its part. What is tested on is drawn before the filter looks: a filter must not choose its own test.

    Raises:
        TransferError: too few are left to train on one and hold out another.
    """
    order = list(range(len(answers)))
    random.Random(move.recipe.inputs.seed).shuffle(order)
    tested = 0 if move.recipe.gate.tests else max(2, round(TESTED * len(order)))
    part = dict.fromkeys(order[:tested], TEST)
    rest = order[tested:]
    if _filtered(move):
        means = [sum(answers[i].excess) / len(answers[i].excess) for i in rest]
        good = excess.best_samples(means, move.recipe.filter.keep_samples)
        part |= dict.fromkeys((i for i, keep in zip(rest, good, strict=True) if not keep), ASIDE)
        rest = [i for i, keep in zip(rest, good, strict=True) if keep]
    if len(rest) < 2:
        raise TransferError(
            f"{move.name}: of {len(answers)} answers {tested} are tested on and {len(rest)} left to train on "
            "and hold out: raise inputs.count or filter.keep_samples"
        )
    held = max(1, round(move.recipe.train.held_out * len(rest)))
    part |= dict.fromkeys(rest[:held], HELD_OUT)
    return [replace(one, part=part.get(i, TRAIN)) for i, one in enumerate(answers)]
