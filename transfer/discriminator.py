"""Is this an input of the task? A LoRA on the source base that says yes or no (Trans-LoRA, arXiv 2405.17258 §3.2).

It is trained while the task's data exist, half on real inputs and half on what the source base writes when it is shown
seeds, and is kept beside the adapter. It judges later what another model writes: an input is kept where p(yes) > p(no).
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_type_hints

from lorazip.adapter import Adapter, open_adapter
from lorazip.errors import Defect, InputError
from lorazip.eval.backend import Answer, Forced, Scores
from lorazip.eval.prompts import Prompter
from lorazip.eval.tasks import Example, Task
from lorazip.files import write_bytes
from lorazip.header import FormatError, parse_json
from lorazip.transfer.batches import Sample

FILE = "discriminator.json"
SCHEMA = "lorazip.discriminator/1"
TEMPLATE = "{input}\n\nIs the text above an input of the task? Answer yes or no.\nAnswer:"
YES, NO = " yes", " no"
HELD_OUT = 0.2  # of the inputs of either kind: what accuracy is measured on
MAX_FILE = 2**16


@dataclass(frozen=True)
class Record:
    """What is saved beside its adapter.

    Attributes:
        base: digest of the source base that it was trained on.
        real, synthetic: inputs it was trained on; no text of them.
        accuracy: on held-out ones of both kinds, in equal parts.
        held_out: how many these are.
    """

    base: str
    real: int
    synthetic: int
    accuracy: float
    held_out: int
    template: str = TEMPLATE


@dataclass(frozen=True)
class Discriminator:
    """One that was read from disk."""

    adapter: Adapter
    record: Record


def read(directory: Path) -> Discriminator:
    """Open a trained one.

    Raises:
        InputError: it is none, or is damaged.
    """
    adapter = open_adapter(directory, f"discriminator {directory.name}")
    try:
        path = directory / FILE
        if not path.is_file() or path.stat().st_size > MAX_FILE:
            raise FormatError("is missing, or too large")
        found = parse_json(path.read_bytes())
        if not isinstance(found, dict) or found.pop("schema", None) != SCHEMA:
            raise FormatError("is of another kind or version")
        if {name: type(value) for name, value in found.items()} != get_type_hints(Record):
            raise FormatError("has other keys or values than a record of one")
        record = Record(**found)
        if "{input}" not in record.template:
            raise FormatError("its template has no {input}")
    except (OSError, FormatError) as error:
        remedy = "make it with lorazip transfer discriminator"
        raise InputError([Defect(str(directory), "", FILE, str(error), remedy)]) from error
    return Discriminator(adapter, record)


def write_record(directory: Path, record: Record) -> None:
    """Keep the record beside the adapter."""
    document = {"schema": SCHEMA, **asdict(record)}
    write_bytes(directory / FILE, (json.dumps(document, indent=2) + "\n").encode())


def split(
    real: Sequence[str], synthetic: Sequence[str], seed: int
) -> tuple[list[list[str]], list[list[str]]]:
    """Equal numbers of both kinds, parted into those trained on and those held out: ([real, synthetic], the same)."""
    count = min(len(real), len(synthetic))
    held = max(1, round(HELD_OUT * count))
    train, held_out = [], []
    for kind, some in enumerate((real, synthetic)):
        chosen = random.Random(f"{seed} {kind}").sample(list(some), count)
        train.append(chosen[held:])
        held_out.append(chosen[:held])
    return train, held_out


def samples(prompter: Prompter, real: Sequence[str], synthetic: Sequence[str]) -> list[Sample]:
    """Questions with their right answers, each a word and no end token: only the choice between two is asked."""
    found = []
    for some, word in ((real, YES), (synthetic, NO)):
        answer = prompter.answer(word, end=False)
        found += [Sample(_prompt(prompter, text), answer, (True,) * len(answer)) for text in some]
    return found


def calls(prompter: Prompter, key: str, inputs: Sequence[str]) -> list[Forced]:
    """Two questions an input: how likely is yes, how likely is no."""
    words = [prompter.answer(word, end=False) for word in (YES, NO)]
    return [Forced(key, _prompt(prompter, text), word) for text in inputs for word in words]


def verdicts(answers: Sequence[Answer]) -> list[bool]:
    """Whether each input is one of the task: p(yes) > p(no)."""
    sums = [sum(answer.logprobs) for answer in answers if isinstance(answer, Scores)]
    return [yes > no for yes, no in zip(sums[::2], sums[1::2], strict=True)]


def _prompt(prompter: Prompter, text: str) -> tuple[int, ...]:
    return prompter.prompt(Task("", None, (), (), None, ""), Example(text, "", ()))
