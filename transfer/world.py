"""What all stages of a job share: the two bases and their tokenizers, an engine, kept answers; and asking models.

The bases are never in memory together: a question opens the one model that it is for. Where many adapters ask one base,
it is opened once for all of them, and if that fails, once for each, so that one bad adapter costs the others nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lorazip import base as bases
from lorazip.errors import LorazipError, TransferError
from lorazip.eval.backend import Acting, Answer, Call, Forced, HasFactors, digest
from lorazip.eval.cache import Cache
from lorazip.eval.prompts import Prompter
from lorazip.eval.session import Engine, Progress, Session

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN = "{input}"  # the template of text that is written on, not asked


@dataclass(frozen=True)
class Base:
    """A base model on disk.

    Attributes:
        name: as the user gave it.
        path: its directory.
        digest: sha256 of its files.
    """

    name: str
    path: Path
    digest: str

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its own."""
        return bases.load_tokenizer(self.path)

    @cached_property
    def context(self) -> int:
        """Tokens that it takes; one less than it says, for vLLM writes a token after every prompt."""
        return bases.context_length(self.path) - 1

    def prompter(self, template: str = PLAIN, chat: bool = False) -> Prompter:
        """How texts become its tokens."""
        return Prompter(self.tokenizer, template, chat)


@dataclass(frozen=True)
class Ask:
    """Questions of one adapter's transfer to one base.

    Attributes:
        name: of the transfer.
        adapters: those that the calls name, by their keys.
        calls: what is asked.
    """

    name: str
    adapters: Mapping[str, HasFactors]
    calls: Sequence[Call]


@dataclass(frozen=True)
class World:
    """See the module.

    Attributes:
        processes: that share the training of an adapter.
    """

    source: Base
    target: Base
    engine: Engine
    cache: Cache
    progress: Progress
    processes: int = 1
    _others: dict[str, Base] = field(default_factory=dict)

    def base(self, name: str) -> Base:
        """Another model, looked for once: keys of stages ask again and again. Raises InputError."""
        if name not in self._others:
            self._others[name] = located(name, self.cache)
        return self._others[name]

    def ask(self, base: Base, asks: Sequence[Ask], what: str) -> dict[str, list[Answer] | LorazipError]:
        """The answers of each transfer, in the order of its calls, or why there are none."""
        asks = [one for one in asks if one.calls]
        try:
            with self._session(base, asks) as session:
                return {one.name: session.ask(one.calls, what) for one in asks}
        except LorazipError as error:
            if len(asks) == 1:
                return {asks[0].name: error}
        except torch.OutOfMemoryError as error:
            if len(asks) == 1:
                why = str(error).partition(". ")[0]
                return {asks[0].name: TransferError(f"{base.name}: {why} (free it, or take another device)")}
        found: dict[str, list[Answer] | LorazipError] = {}
        for one in asks:
            found |= self.ask(base, [one], what)
        return found

    @contextmanager
    def _session(self, base: Base, asks: Sequence[Ask]) -> Iterator[Session]:
        actings, canaries = [], []
        for one in asks:
            for key, adapter in one.adapters.items():
                mine = next((call for call in one.calls if call.adapter == key), None)
                if mine is None:
                    continue
                actings.append(Acting(key, adapter, getattr(adapter, "directory", None), digest(adapter)))
                answer = mine.answer if isinstance(mine, Forced) else ()
                tokens = (*mine.prompt, *answer)
                # An adapter is shown the first token and scored on the rest.
                canaries.append(tokens if len(tokens) > 1 else tokens * 2)
        longest = max((_length(call) for one in asks for call in one.calls), default=1)
        with Session(
            base.path, base.tokenizer, actings, canaries, self.engine, self.cache, longest, self.progress
        ) as session:
            yield session


def located(name: str, cache: Cache) -> Base:
    """The base model of this name. Raises InputError."""
    path = bases.locate(name)
    return Base(name, path, cache.model_digest(path))


def _length(call: Call) -> int:
    return len(call.prompt) + (len(call.answer) if isinstance(call, Forced) else call.limit)
