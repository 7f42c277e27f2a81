"""lm-evaluation-harness' view of one adapter of a session. Imported where it is used: its base is of the extra."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lorazip.errors import Defect, InputError, UsageError
from lorazip.eval.backend import Answer, Call, Forced, Greedy, Scores, Written

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEW_TOKENS = 256  # of a written answer, where the task does not say: as the harness' own models have it
IDLE = {"do_sample", "temperature", "top_p", "top_k"}  # without effect where nothing is drawn

Asks = Callable[[Sequence[Call]], Sequence[Answer]]


class SessionModel(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """Splits and joins as the harness' own model of transformers does.

    Args:
        name: of the task, for messages.
        context: tokens that the model takes.
        key: of the adapter in the session, None for the base.
        ask: answers calls.
    Attributes:
        cut: prompts that lost their start, because they were too long.
    """

    def __init__(
        self, name: str, tokenizer: PreTrainedTokenizerBase, context: int, key: str | None, ask: Asks
    ):
        super().__init__()
        self.tokenizer, self.max_length = tokenizer, context - 1
        self.cut = 0
        self._name, self._key, self._ask = name, key, ask
        self._first = str(self.tokenizer.decode(self.prefix_token_id))

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._first)
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        calls = [self._forced(context, continuation) for _, context, continuation in requests]
        return [(math.fsum(a.logprobs), a.exact) for a in self._ask(calls) if isinstance(a, Scores)]

    def _forced(self, context: list[int], continuation: list[int]) -> Forced:
        room = self.max_length + 1 - len(continuation)
        if not continuation or room < 1:
            problem = f"has an answer of {len(continuation)} tokens; there is room for 1 to {self.max_length}"
            raise InputError([Defect(self._name, problem=problem, remedy="leave it out: --lm-eval")])
        self.cut += len(context) > room
        return Forced(self._key, tuple(context[-room:]), tuple(continuation))

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        windows = [
            [(None, *make_disjoint_window(window)) for window in self._windows(request.args[0])]
            for request in requests
        ]
        scored = iter(self._loglikelihood_tokens([one for some in windows for one in some]))
        return [math.fsum(next(scored)[0] for _ in some) for some in windows]

    def _windows(self, text: str) -> Any:
        return get_rolling_token_windows(
            self.tok_encode(text), self.prefix_token_id, max_seq_len=self.max_length, context_len=1
        )

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        calls = [self._greedy(*request.args) for request in requests]
        return [answer.text for answer in self._ask(calls) if isinstance(answer, Written)]

    def _greedy(self, context: str, options: dict[str, Any]) -> Greedy:
        given = dict(normalize_gen_kwargs(options, NEW_TOKENS))
        stop, limit = tuple(s for s in given.pop("until") if s), int(given.pop("max_gen_toks"))
        other = {k: v for k, v in given.items() if k not in IDLE and (k, v) != ("num_beams", 1)}
        if given["do_sample"] or other:
            wanted = other or {k: given[k] for k in sorted(IDLE & given.keys())}
            said = ", ".join(f"{k}: {v}" for k, v in wanted.items())
            raise UsageError(
                f"{self._name} asks for {said}; only greedy answers are compared (leave it out: --lm-eval)"
            )
        room = self.max_length - limit
        if room < 1:
            problem = f"writes up to {limit} tokens; this model takes {self.max_length + 1}, prompt included"
            raise InputError([Defect(self._name, problem=problem, remedy="leave it out: --lm-eval")])
        tokens = self.tok_encode(context) or [self.prefix_token_id]
        self.cut += len(tokens) > room
        return Greedy(self._key, tuple(tokens[-room:]), limit, stop)
