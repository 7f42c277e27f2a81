"""What is asked of a model: score given answers, or write answers; adapters are named call by call."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from lorazip.adapter import LowRank
from lorazip.errors import Defect, InputError


class HasFactors(Protocol):
    """The face that `Adapter` and `BundleAdapter` share, as far as an evaluation needs it."""

    name: str
    config: dict[str, Any]

    @property
    def modules(self) -> Mapping[str, object]: ...

    @property
    def extras(self) -> Mapping[str, object]: ...

    def low_rank(self, module: str) -> LowRank: ...


@dataclass(frozen=True)
class Acting:
    """An adapter as the backends see it.

    Attributes:
        key: unique among all adapters of an evaluation; `arm/adapter`.
        adapter: where its factors come from.
        directory: a PEFT directory with the same effect, if there is one already.
        digest: of its effect: names of modules, factors, scales.
    """

    key: str
    adapter: HasFactors
    directory: Path | None
    digest: str


@dataclass(frozen=True)
class Forced:
    """Score an answer token by token, each given the right ones before it: one forward pass.

    Attributes:
        adapter: the key of an `Acting`, None for the bare base.
        prompt: token ids, at least one.
        answer: token ids, at least one.
    """

    adapter: str | None
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Ranked(Forced):
    """Name the most likely tokens at each place of a forced answer: what one model can teach another.

    Attributes:
        k: how many, 1 to the size of the vocabulary.
    """

    k: int


@dataclass(frozen=True)
class Greedy:
    """Write an answer, always taking the most likely token.

    Attributes:
        limit: at most so many tokens; an end token ends it earlier.
        stop: texts that end it too; they are cut off with what follows.
    """

    adapter: str | None
    prompt: tuple[int, ...]
    limit: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sampled:
    """Write an answer, each token drawn from the model's distribution.

    The text follows from the call alone, up to rounding: what else is asked with it is of no account. Calls of one
    seed share their chance, also on different prompts; so each gets its own.

    Attributes:
        limit: as in `Greedy`.
        seed: 0 to 2**32 - 1.
        temperature: above 0; logits are divided by it. vLLM takes 0.01 for less.
        top_p: above 0 to 1; only the fewest most likely tokens of this probability together are drawn from.
        stop: as in `Greedy`.
    """

    adapter: str | None
    prompt: tuple[int, ...]
    limit: int
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()


Call = Forced | Greedy | Sampled  # Forced includes Ranked


@dataclass(frozen=True)
class Scores:
    """Of each token of a forced answer.

    Attributes:
        logprobs: natural logarithms of its probability.
        gaps: its log-probability minus that of the best other token: below 0 where greedy decoding would differ.
    """

    logprobs: tuple[float, ...]
    gaps: tuple[float, ...]

    @property
    def exact(self) -> bool:
        """Whether greedy decoding gives this answer. A tie counts: which of two equals is taken is chance."""
        return all(gap >= 0 for gap in self.gaps)


@dataclass(frozen=True)
class Written:
    """An answer that the model wrote.

    Attributes:
        text: without special tokens, cut at the first stop.
        tokens: as they were written, the end token too if it was reached.
    """

    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Tops:
    """At each place of a forced answer, the most likely tokens, best first.

    Attributes:
        tokens: for each token of the answer, `k` that could stand there.
        logprobs: natural logarithms of their probabilities, in the same form.
    """

    tokens: tuple[tuple[int, ...], ...]
    logprobs: tuple[tuple[float, ...], ...]


Answer = Scores | Written | Tops


class Backend(Protocol):
    """A model that answers calls. Calls may name different adapters; the answers come as they are ready."""

    def run(self, calls: Sequence[Call]) -> Iterator[tuple[int, Answer]]:
        """Yield (index of the call, its answer), each once, in any order."""

    def close(self) -> None:
        """Free what the model holds."""


def digest(adapter: HasFactors) -> str:
    """sha256 (hex) of an adapter's effect: two that act alike bit for bit are one, whatever they are called."""
    found = hashlib.sha256()
    for module in sorted(adapter.modules):
        factor = adapter.low_rank(module)
        found.update(f"{module}\0{factor.scale!r}\0".encode())
        for tensor in (factor.B, factor.A):
            found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            found.update(_bytes(tensor))
    return found.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    import torch

    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def require_plain(actings: Sequence[Acting]) -> None:
    """Only low-rank updates of linear layers are evaluated: what an adapter carries beside them would be lost.

    Raises:
        InputError: naming every adapter that carries more.
    """
    defects = []
    for acting in actings:
        extras = sorted(acting.adapter.extras)
        if extras:
            more = f" and {len(extras) - 1} more tensors" if len(extras) > 1 else ""
            problem = (
                f"is carried beside the LoRA factors{more}; evaluating without it would be another adapter"
            )
            defects.append(Defect(acting.key, "", extras[0], problem, "leave this adapter out: --pairs"))
    if defects:
        raise InputError(defects)
