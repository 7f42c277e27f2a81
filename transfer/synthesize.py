"""New inputs of a task, written by a model that is shown some (Trans-LoRA, arXiv 2405.17258 §3.1).

    {definition}

    Here are 6 different inputs of this task.

    1. …
    …
    6.

Which seeds are shown, in which order, is drawn anew for every input: five fixed ones are soon exhausted. Every prompt
and its random numbers are a function of the recipe, so that a killed run asks for the same texts again and finds them
among the answers that were kept.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

from lorazip.errors import TransferError
from lorazip.eval.backend import Answer, Sampled, Written
from lorazip.eval.prompts import Prompter
from lorazip.eval.tasks import Example, Task
from lorazip.transfer.recipe import Inputs

SLACK = 8  # tokens that an input may have beyond 1.5 times the longest seed
MOST = 4  # times the inputs that are still missing, asked for in one round at most
LEAST_YIELD = 0.05  # what a round is planned for at worst


@dataclass(frozen=True)
class Draft:
    """A new input as it was written, and whether the model ended it itself."""

    text: str
    finished: bool


def calls(
    prompter: Prompter,
    spec: Inputs,
    seeds: Sequence[str],
    adapter: str | None,
    round_: int,
    count: int,
    context: int,
) -> list[Sampled]:
    """What the generator is asked in one round.

    Args:
        prompter: of the generator, with the bare template "{input}": it writes text, it does not chat.
        adapter: the key of the adapter that writes, None for the bare model.
        round_, count: which round this is, from 0, and how many inputs are asked for.
        context: tokens that the generator takes.
    Raises:
        TransferError: not even one seed and a new input fit.
    """
    limit = max(len(prompter.answer(seed, end=False)) for seed in seeds)
    limit += limit // 2 + SLACK
    lines = any("\n" in seed for seed in seeds)
    found = []
    for i in range(count):
        place = f"{spec.seed} {round_} {i}"
        chosen = random.Random(place).sample(list(seeds), min(spec.shots, len(seeds)))
        while True:  # a model of short context is shown fewer
            text = shown(spec.definition, chosen, lines)
            prompt = prompter.prompt(Task("", None, (), (), None, ""), Example(text, "", ()))
            if len(prompt) + limit <= context:
                break
            chosen = chosen[:-1]
            if not chosen:
                raise TransferError(
                    f"a seed, {len(prompt)} tokens as a prompt, leaves the generator of {context} tokens no room to "
                    "write another: shorten inputs.seeds, or name another inputs.generator"
                )
        stop = (f"\n{len(chosen) + 2}.",) if lines else ("\n",)
        found.append(Sampled(adapter, prompt, limit, _number(place), spec.temperature, spec.top_p, stop))
    return found


def shown(definition: str, seeds: Sequence[str], lines: bool) -> str:
    """The prompt. It ends after the number of the next input: what a model writes first is its space.

    Args:
        lines: inputs may have several lines; an empty line then parts them.
    """
    gap = "\n\n" if lines else "\n"
    parts = [
        f"{definition}\n\n" if definition else "",
        f"Here are {len(seeds) + 1} different inputs of this task.\n\n",
    ]
    parts += [f"{i}. {seed}{gap}" for i, seed in enumerate(seeds, 1)]
    return "".join(parts) + f"{len(seeds) + 1}."


def texts(asked: Sequence[Sampled], answers: Sequence[Answer]) -> list[Draft]:
    """The inputs that came."""
    found = []
    for call, answer in zip(asked, answers, strict=True):
        assert isinstance(answer, Written)
        found.append(Draft(answer.text.strip(), len(answer.tokens) < call.limit))
    return found


def planned(missing: int, asked: int, kept: int) -> int:
    """How many inputs the next round asks for: what is missing, by the yield so far.

    Args:
        asked, kept: in all rounds before; none were asked in the first.
    """
    share = max(kept / asked, LEAST_YIELD) if asked else 0.75
    return min(int(missing / share) + 1, MOST * max(missing, 8))


def _number(place: str) -> int:
    return int.from_bytes(hashlib.sha256(place.encode()).digest()[:4], "little")
