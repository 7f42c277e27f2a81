"""What the tests of training share: samples, losses and errors token by token, saved adapters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from lorazip.eval.backend import Tops
from lorazip.transfer import slots
from lorazip.transfer.batches import Sample
from lorazip.transfer.distill import Fitted
from lorazip.transfer.recipe import Training
from lorazip.transfer.slots import Shape

SPEC = Training(epochs=3, batch=4, learning_rates=(1e-2,))
ENDING = replace(SPEC, epochs=40, patience=1, learning_rates=(0.1,))  # by its patience
QV = ("q_proj", "v_proj")
PREFIX = "base_model.model."


def samples(n: int, seed: int = 0, longest: int = 9, letters: int = 5) -> list[Sample]:
    """Prompts and answers of many lengths, the fewer letters the easier to learn.

    About a third of the tokens is not trained on; the end always is.
    """
    random = torch.Generator().manual_seed(seed)
    found = []
    for prompt in tiny.prompts(n, seed):
        length = int(torch.randint(0, longest, (1,), generator=random))
        answer = (*torch.randint(0, letters, (length,), generator=random).tolist(), tiny.END)
        kept = (torch.rand(length, generator=random) < 0.67).tolist()
        found.append(Sample(prompt, answer, (*kept, True)))
    return found


TRAIN, HELD_OUT = samples(11, letters=2), samples(6, seed=1, letters=2)  # neither is a multiple of the batch


Whole = Callable[[Training], tuple[Path, Fitted]]


def shape(model: PreTrainedModel, rank: int = 4, kind: str = "lora", leaves: Sequence[str] = QV) -> Shape:
    return Shape(kind, rank, 3 * rank, slots.modules_of(model, leaves))


def plain(model: Any, sample: Sample) -> Tensor:
    """(answer, vocabulary): log-probabilities of one sample alone, no padding."""
    return tiny.logprobs(model, sample.prompt, sample.answer).double()


def hard(model: Any, some: Sequence[Sample]) -> list[float]:
    """-log p of every trained token."""
    return [
        -float(row[token])
        for sample in some
        for row, token, trained in zip(plain(model, sample), sample.answer, sample.trained, strict=True)
        if trained
    ]


def wrong(model: Any, some: Sequence[Sample]) -> list[float]:
    """1 - p of every trained token."""
    return [1 - math.exp(-loss) for loss in hard(model, some)]


def soft(model: Any, some: Sequence[Sample]) -> list[float]:
    """KL of every trained token over the teacher's k tokens and one more for all others, in float64."""
    return [
        sum(p * (math.log(p) - math.log(q)) for p, q in pairs if p) for pairs in distributions(model, some)
    ]


def apart(model: Any, some: Sequence[Sample]) -> list[float]:
    """Total variation of the same: what the likelier of the two has more, summed."""
    return [sum(max(0.0, p - q) for p, q in pairs) for pairs in distributions(model, some)]


def distributions(model: Any, some: Sequence[Sample]) -> list[list[tuple[float, float]]]:
    """Of every trained token, what teacher and student give the k tokens and all others."""
    found = []
    for sample in some:
        assert sample.tops is not None
        places = zip(
            plain(model, sample), sample.tops.tokens, sample.tops.logprobs, sample.trained, strict=True
        )
        for row, tokens, logprobs, trained in places:
            if not trained:
                continue
            others = [token for token in range(len(row)) if token not in tokens]
            student = [float(row[token].exp()) for token in tokens] + [float(row[others].exp().sum())]
            teacher = torch.tensor(logprobs, dtype=torch.float64).exp().tolist()
            teacher.append(max(0.0, 1 - sum(teacher)))
            found.append(list(zip(teacher, student, strict=True)))
    return found


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def with_tops(teacher: Any, some: Sequence[Sample], k: int) -> list[Sample]:
    found = []
    for sample in some:
        values, tokens = plain(teacher, sample).float().topk(k, dim=1)
        found.append(
            replace(sample, tops=Tops(tuple(map(tuple, tokens.tolist())), tuple(map(tuple, values.tolist()))))
        )
    return found


def factors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def delta(folder: Path, module: str) -> Tensor:
    """D = alpha/r B A of the saved adapter, dense."""
    config = tiny.json_of(folder / "adapter" / "adapter_config.json")
    saved = factors(folder)
    b, a = (saved[f"{PREFIX}{module}.lora_{side}.weight"].double() for side in "BA")
    scale: float = config["lora_alpha"] / config["r"]
    return scale * b @ a


def assert_same(one: Path, other: Path) -> None:
    ours, theirs = factors(one), factors(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)


RUINOUS = replace(SPEC, epochs=1, learning_rates=(0.9,))
