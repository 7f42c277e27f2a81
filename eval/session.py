"""One base model, its adapters, a backend and the cache: ask for answers, whoever gives them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from lorazip import base as bases
from lorazip.devices import find_device
from lorazip.errors import CheckError, UsageError
from lorazip.eval import canary, vllm_backend
from lorazip.eval import transformers_backend as hf
from lorazip.eval.backend import Acting, Answer, Backend, Call, Forced, Scores, Tops, Written
from lorazip.eval.cache import Cache, key
from lorazip.eval.results import Canary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = Literal["vllm", "hf"]


class Progress(Protocol):
    """Called with the name of a phase, calls answered, calls in all, and a note."""

    def __call__(self, what: str, done: int, total: int, note: str = "") -> None: ...


SAVED = 64  # answers kept at once: what a killed run can lose, beside what the engine has in hand


@dataclass(frozen=True)
class Engine:
    """Which backend, on what.

    Attributes:
        kind: vllm or hf.
        dtype: number type of the base; adapters are converted to it.
        device: what it computes on; vLLM takes what there is.
        tensor_parallel: GPUs that share the model in vLLM.
    """

    kind: Kind
    dtype: torch.dtype
    device: torch.device
    tensor_parallel: int = 1

    @property
    def name(self) -> str:
        """With versions: an answer of one is not an answer of another."""
        own = vllm_backend.installed() if self.kind == "vllm" else f"transformers {version('transformers')}"
        return f"{own}, torch {torch.__version__}, {self.device.type}"


def engine(
    backend: str = "auto", dtype: str = "auto", device: str = "auto", tensor_parallel: int = 1
) -> Engine:
    """Choose: vLLM where it is installed, CUDA where there is any, float32 on a CPU and bfloat16 on a GPU.

    Raises:
        UsageError: what was asked for is not there.
    """
    place, own = find_device(device), find_device("auto")  # vLLM finds its own
    taken = device == "auto" or (place.type, place.index or 0) == (own.type, 0)
    kind: Kind
    if backend == "auto":
        kind = "vllm" if vllm_backend.installed() and taken else "hf"
    elif backend == "vllm" and not taken:
        raise UsageError(
            f"vLLM takes {own}, not {device} (--backend hf; CUDA_VISIBLE_DEVICES chooses its GPU)"
        )
    elif backend == "vllm" and not vllm_backend.installed():
        raise UsageError(f"vLLM is not installed ({vllm_backend.INSTALL})")
    else:
        kind = "vllm" if backend == "vllm" else "hf"
    if dtype == "auto":
        dtype = "float32" if place.type == "cpu" else "bfloat16"
    if tensor_parallel < 1 or (tensor_parallel > 1 and kind == "hf"):
        raise UsageError("--tensor-parallel is a number of GPUs, for --backend vllm")
    return Engine(kind, getattr(torch, dtype), place, tensor_parallel)


@dataclass
class Cost:
    """What answers have cost so far. `asked` = `made` + `cached`; tokens and seconds are of those made."""

    asked: int = 0
    made: int = 0
    cached: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass
class Session:
    """Answers calls, from the cache where it has them; starts the model when the first one is missing.

    Attributes:
        base: directory of the base model.
        actings: all adapters that calls may name.
        canaries: for each of `actings` the tokens that it proves itself on; see `lorazip.eval.canary`.
        longest: tokens of the longest call, written ones included.
        cost: so far, canaries left out.
    """

    base: Path
    tokenizer: PreTrainedTokenizerBase
    actings: Sequence[Acting]
    canaries: Sequence[Sequence[int]]
    engine: Engine
    cache: Cache
    longest: int
    progress: Progress
    cost: Cost = field(default_factory=Cost)

    def __post_init__(self) -> None:
        self._backend: Backend | None = None
        self._proof: list[Canary] | None = None
        self._digests = {acting.key: acting.digest for acting in self.actings}
        about = {"base": self.cache.model_digest(self.base), "engine": self.engine.name}
        self._about: dict[str, Any] = about | {"dtype": str(self.engine.dtype)}

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        if self._backend is not None:
            self._backend.close()

    def ask(self, calls: Sequence[Call], what: str = "scoring") -> list[Answer]:
        """The answers, in the order of the calls. Equal calls are asked once."""
        keys = [self._key(call) for call in calls]
        unique = dict(zip(keys, calls, strict=True))
        found = {k: _answer(value) for k, value in self.cache.get(list(unique)).items()}
        missing = [k for k in unique if k not in found]
        self.cost.asked += len(unique)
        self.cost.cached += len(found)
        if missing:
            found.update(self._make(missing, [unique[k] for k in missing], what))
        return [found[k] for k in keys]

    def _make(self, keys: Sequence[bytes], calls: Sequence[Call], what: str) -> dict[bytes, Answer]:
        if self._backend is None:
            self._backend, self._proof = self._start()
        found: dict[bytes, Answer] = {}
        fresh: dict[bytes, Any] = {}
        begun, tokens = time.perf_counter(), 0
        for i, answer in self._backend.run(calls):
            found[keys[i]], fresh[keys[i]] = answer, asdict(answer)
            tokens += _tokens(calls[i], answer)
            if len(fresh) >= SAVED or len(found) == len(calls):
                self.cache.put(fresh)
                fresh = {}
            rate = tokens / max(time.perf_counter() - begun, 1e-9)
            self.progress(what, len(found), len(calls), f"{rate:.0f} tokens/s")
        self.cost.made += len(calls)
        self.cost.tokens += tokens
        self.cost.seconds += time.perf_counter() - begun
        return found

    def _start(self) -> tuple[Backend, list[Canary]]:
        """Start the model, and let every adapter prove itself in it before it is asked anything else.

        Raises:
            CheckError: an adapter does not act as its factors say.
            InputError: an adapter does not fit the base.
        """
        asked, bare = self._canary_calls()
        hands = self._by_hand(
            [*asked, *bare]
        )  # first: the reference and the backend need not fit in memory together
        backend = self._open()
        try:
            found = dict(backend.run([*asked, *bare]))
            proof = self._judged(hands, [found[i] for i in range(len(found))])
            self.cache.put({self._key(c): asdict(found[i]) for i, c in enumerate([*asked, *bare])})
        except BaseException:
            backend.close()
            raise
        return backend, proof

    def proof(self) -> list[Canary]:
        """One canary for each of `actings`: of this run's model, or else of the run that filled the cache.

        Raises: as `ask`, if a model has to be started for it.
        """
        if self._proof is None:
            asked, bare = self._canary_calls()
            calls = [*asked, *bare]
            keys = [self._key(call) for call in calls]
            known = self.cache.get(keys)
            if all(k in known for k in keys):
                self._proof = self._judged(self._by_hand(calls), [_answer(known[k]) for k in keys])
            else:
                self._backend, self._proof = self._start()
        return self._proof

    def _canary_calls(self) -> tuple[list[Forced], list[Forced]]:
        asked = [canary.call(a.key, tokens) for a, tokens in zip(self.actings, self.canaries, strict=True)]
        return asked, [Forced(None, call.prompt, call.answer) for call in asked]

    def _judged(self, hands: Sequence[Sequence[float]], answers: Sequence[Answer]) -> list[Canary]:
        found = [answer.logprobs for answer in answers if isinstance(answer, Scores)]
        n = len(self.actings)
        judged = [
            canary.judge(acting, hands[i], hands[n + i], found[i], found[n + i], self.engine.dtype)
            for i, acting in enumerate(self.actings)
        ]
        wrong = [f"{c.arm}/{c.adapter}: {c.problem}" for c in judged if not c.ok]
        if wrong:
            raise CheckError("\n".join(wrong))
        return judged

    def _open(self) -> Backend:
        if self.engine.kind == "vllm":
            return vllm_backend.VllmBackend(
                self.base,
                self.tokenizer,
                self.actings,
                dtype=self.engine.dtype,
                longest=self.longest,
                tensor_parallel=self.engine.tensor_parallel,
            )
        return hf.TransformersBackend(
            self.base, self.tokenizer, self.actings, dtype=self.engine.dtype, device=self.engine.device
        )

    def _by_hand(self, calls: Sequence[Forced]) -> list[tuple[float, ...]]:
        """The reference, also from the cache; its model is gone before the backend starts."""
        keys = [self._key(call, by_hand=True) for call in calls]
        found = {k: tuple(value) for k, value in self.cache.get(keys).items()}
        missing = {k: call for k, call in zip(keys, calls, strict=True) if k not in found}
        if missing:
            # What needs several GPUs does not fit on the first; a CPU has room, and only canaries to compute.
            several = self.engine.tensor_parallel > 1
            place = torch.device("cpu") if several else self.engine.device
            model = bases.load(self.base, self.engine.dtype, place)
            hf.check_shapes(model, self.actings)
            adapters = {acting.key: acting.adapter for acting in self.actings}
            for done, (k, call) in enumerate(missing.items(), 1):
                adapter = None if call.adapter is None else adapters[call.adapter]
                found[k] = canary.by_hand(model, adapter, call)
                self.progress("canaries by hand", done, len(missing))
            self.cache.put({k: found[k] for k in missing})
            del model
            bases.free(place)
        return [found[k] for k in keys]

    def _key(self, call: Call, by_hand: bool = False) -> bytes:
        asked = {name: value for name, value in asdict(call).items() if name != "adapter"}
        adapter = None if call.adapter is None else self._digests[call.adapter]
        return key(**self._about, by_hand=by_hand, kind=type(call).__name__, adapter=adapter, asked=asked)


def _answer(value: Any) -> Answer:
    parts = {name: _tuples(part) for name, part in value.items()}
    kind: Any = Written if "text" in parts else Scores if "gaps" in parts else Tops
    made: Answer = kind(**parts)
    return made


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _tokens(call: Call, answer: Answer) -> int:
    return len(call.prompt) + len(answer.tokens if isinstance(answer, Written) else answer.logprobs)
