"""The embedded backend: transformers and PEFT in this process, one adapter at a time, swapped in memory.

PEFT wraps every adapted linear layer once; an adapter is then put in place by handing its factors to the wrapped
layers, from wherever they are (a PEFT directory, a bundle), without a file or a copy of the model.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorazip import base as bases
from lorazip.errors import Defect, InputError
from lorazip.eval.backend import (
    Acting,
    Answer,
    Call,
    Forced,
    Greedy,
    Ranked,
    Sampled,
    Scores,
    Tops,
    Written,
    require_plain,
)

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SLOT = "lorazip"
TOKENS = {
    "cpu": 2048,
    "cuda": 16384,
}  # of a batch, padding included: enough to keep two cores, or a GPU, busy
LOGITS = 2**27  # numbers of one batch's logits: 0.5 GB in float32


class TransformersBackend:
    """`lorazip.eval.backend.Backend` on transformers.

    Attributes:
        model: the base with one PEFT slot on all modules that any adapter has.
    """

    def __init__(
        self,
        base: Path,
        tokenizer: PreTrainedTokenizerBase,
        actings: Sequence[Acting],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ):
        require_plain(actings)
        self._actings = {acting.key: acting for acting in actings}
        self._tokenizer = tokenizer
        self._device = device
        self._tokens = TOKENS.get(device.type, TOKENS["cuda"])
        plain = bases.load(base, dtype, device)
        self._ends = _take_ends(plain) | {int(tokenizer.eos_token_id)}
        self._modules = sorted({module for acting in actings for module in acting.adapter.modules})
        check_shapes(plain, actings)
        self.model: Any = _with_slot(plain, self._modules) if actings else plain
        self._inside: str | None = None

    def run(self, calls: Sequence[Call]) -> Iterator[tuple[int, Answer]]:
        """Answer the calls, adapter by adapter, in batches of one kind and about one length."""
        order = sorted(range(len(calls)), key=lambda i: _rank(calls[i]))
        for (adapter, *_), group in groupby(order, key=lambda i: _rank(calls[i])[:3]):
            members = list(group)
            with self._acting(adapter or None):
                for batch in self._batches(calls, members):
                    forced = [call for i in batch if isinstance(call := calls[i], Forced)]
                    written = [call for i in batch if not isinstance(call := calls[i], Forced)]
                    answers: Iterator[Answer] = self._forced(forced) if forced else self._written(written)
                    yield from zip(batch, answers, strict=True)

    def close(self) -> None:
        """Drop the model."""
        del self.model
        bases.free(self._device)

    def _acting(self, key: str | None) -> Any:
        """A context in which this adapter acts; for None, in which none does."""
        import contextlib

        if key is None:
            return self.model.disable_adapter() if self._actings else contextlib.nullcontext()
        if key != self._inside:
            self._put(self._actings[key])
            self._inside = key
        return contextlib.nullcontext()

    def _put(self, acting: Acting) -> None:
        """Hand this adapter's factors to the slot; modules that it does not have get factors of rank 0."""
        for name in self._modules:
            layer: Any = self.model.base_model.model.get_submodule(name)
            a, b = layer.lora_A[SLOT], layer.lora_B[SLOT]
            kind, device = layer.get_base_layer().weight.dtype, layer.get_base_layer().weight.device
            if name in acting.adapter.modules:
                factor = acting.adapter.low_rank(name)
                new = factor.A.to(device, kind), (factor.scale * factor.B.float()).to(device, kind)
            else:
                new = (
                    torch.zeros(0, a.in_features, device=device, dtype=kind),
                    b.weight.new_zeros(b.out_features, 0),
                )
            a.weight, b.weight = (nn.Parameter(t.contiguous(), requires_grad=False) for t in new)

    def _batches(self, calls: Sequence[Call], members: Sequence[int]) -> Iterator[list[int]]:
        """Cut into batches with bounded padded tokens and logits; `members` fall in length, so the first is widest."""
        vocabulary = int(self.model.config.get_text_config().vocab_size)
        start = 0
        while start < len(members):
            first = calls[members[start]]
            width = len(first.prompt) + _longest(first)
            rows = max(1, self._tokens // width)
            if isinstance(first, Forced):
                longest = max(_longest(calls[i]) for i in members[start : start + rows])
                rows = max(1, min(rows, LOGITS // (vocabulary * (longest + 1))))
            yield list(members[start : start + rows])
            start += rows

    @torch.inference_mode()
    def _forced(self, calls: Sequence[Forced]) -> Iterator[Scores | Tops]:
        """One forward pass; padded on the left, so that the answers end together and only their logits are made."""
        keep = max(len(call.answer) for call in calls) + 1
        ids, mask = self._padded([(*call.prompt, *call.answer) for call in calls])
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        logits = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=keep, use_cache=False
        ).logits[:, -keep:-1]
        targets = ids[:, 1 - keep :]
        for row, target, call in zip(logits, targets, calls, strict=True):
            n = len(call.answer)
            yield tops(row[-n:], call.k) if isinstance(call, Ranked) else scores(row[-n:], target[-n:])

    @torch.inference_mode()
    def _written(self, calls: Sequence[Greedy | Sampled]) -> Iterator[Written]:
        """All greedy or all drawn, with the same options but for the seed."""
        ids, mask = self._padded([call.prompt for call in calls])
        limit, stop = calls[0].limit, calls[0].stop

        def stopped(sofar: Tensor, scores: Any, **_: Any) -> Tensor:
            """(rows,): generate's own stop_strings would look into the prompt too."""
            written = sofar[:, ids.shape[1] :].tolist()
            return torch.tensor([self._has(row, stop) for row in written], device=sofar.device)

        made = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=limit,
            do_sample=False,  # also for draws: generate's own come from one stream for all rows
            logits_processor=_chance([call for call in calls if isinstance(call, Sampled)]),
            pad_token_id=self._pad,
            eos_token_id=sorted(self._ends),
            stopping_criteria=[stopped] if stop else [],
        )
        for row in made[:, ids.shape[1] :].tolist():
            tokens = _until(row, self._ends)
            if stop:
                tokens = self._until_stop(tokens, stop)
            yield Written(cut(self._text(tokens), stop), tuple(tokens))

    def _until_stop(self, tokens: list[int], stops: Sequence[str]) -> list[int]:
        """Up to and with the token that completes a stop; what follows it is padding."""

        def ended(length: int) -> bool:
            return self._has(tokens[:length], stops)

        return tokens[: bisect_left(range(len(tokens)), True, key=ended)]

    def _has(self, tokens: list[int], stops: Sequence[str]) -> bool:
        text = self._text(tokens)
        return any(stop in text for stop in stops)

    def _text(self, tokens: list[int]) -> str:
        """As vLLM writes it: some tokenizers would take out the space before a full stop."""
        return str(
            self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    @property
    def _pad(self) -> int:
        pad = self._tokenizer.pad_token_id
        return int(self._tokenizer.eos_token_id if pad is None else pad)

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Token ids and mask, (rows, longest), padded on the left."""
        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), self._pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, width - len(row) :] = torch.tensor(row)
            mask[i, width - len(row) :] = 1
        return ids.to(self._device), mask.to(self._device)


def _take_ends(model: PreTrainedModel) -> set[int]:
    """Tokens that end an answer by generation_config.json, as in vLLM; its other settings are put away.

    They would change which token is taken: penalties, forbidden and forced tokens, least lengths.
    """
    from transformers import GenerationConfig

    named = model.generation_config.eos_token_id
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    return set() if named is None else {named} if isinstance(named, int) else set(named)


def check_shapes(model: nn.Module, actings: Sequence[Acting]) -> None:
    """Every module of every adapter is there, with the right shape: else it belongs to another base.

    Raises:
        InputError: naming the first module of each adapter that does not fit.
    """
    defects = []
    for acting in actings:
        for name in acting.adapter.modules:
            problem = _misfit(model, name, acting.adapter.low_rank(name))
            if problem:
                defects.append(
                    Defect(acting.key, name, "", problem, "name the base that it was trained on: --base")
                )
                break
    if defects:
        raise InputError(defects)


def _misfit(model: nn.Module, name: str, factor: Any) -> str:
    wanted = factor.B.shape[0], factor.A.shape[1]
    try:
        weight: Any = model.get_submodule(name).weight
    except AttributeError:
        return "is not in the base model"
    there = tuple(weight.shape)
    if there != wanted:
        return f"is {wanted[0]} x {wanted[1]}, the base model has {' x '.join(map(str, there))}"
    return ""


def _with_slot(model: PreTrainedModel, modules: Sequence[str]) -> PeftModel:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=1,
        lora_alpha=1,  # the scale of D is put into B
        target_modules="|".join(
            re.escape(module) for module in modules
        ),  # a full match, not the end of a name
    )
    wrapped: PeftModel = get_peft_model(model, config, adapter_name=SLOT, autocast_adapter_dtype=False).eval()
    return wrapped


def scores(logits: Tensor, targets: Tensor) -> Scores:
    """Log-probabilities and gaps of the target tokens.

    Args:
        logits: (n, vocabulary), the predictions of the n tokens.
        targets: (n,).
    """
    found = logits.float().log_softmax(-1)
    chosen = found.gather(1, targets[:, None])[:, 0]
    best = found.topk(2, dim=-1)
    other = torch.where(best.indices[:, 0] == targets, best.values[:, 1], best.values[:, 0])
    return Scores(tuple(chosen.tolist()), tuple((chosen - other).tolist()))


def tops(logits: Tensor, k: int) -> Tops:
    """The k most likely tokens and their log-probabilities.

    Args:
        logits: (n, vocabulary).
        k: at most the vocabulary.
    """
    best = logits.float().log_softmax(-1).topk(k, dim=-1)
    return Tops(tuple(map(tuple, best.indices.tolist())), tuple(map(tuple, best.values.tolist())))


def _chance(calls: Sequence[Sampled]) -> list[Any]:
    """What makes generate's most likely token a draw; nothing where no call asks for one.

    With g independent Gumbel noise, argmax(log p + g) is a draw from p. Each row has a stream of its own, made on the
    CPU: the rows beside it and the device change nothing.
    """
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    if not calls:
        return []
    streams = [torch.Generator().manual_seed(call.seed) for call in calls]

    def perturbed(_: Tensor, logits: Tensor) -> Tensor:
        """(rows, vocabulary). Uniform float64: near 1, where the noise is large, float32 is too coarse."""
        rows = [torch.rand(logits.shape[1], generator=g, dtype=torch.float64) for g in streams]
        noise = -(-torch.stack(rows).log()).log()
        return logits + noise.to(logits.device, logits.dtype)

    first = calls[0]
    nucleus = [TopPLogitsWarper(first.top_p)] if first.top_p < 1 else []
    return [TemperatureLogitsWarper(float(first.temperature)), *nucleus, perturbed]


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first of these stops."""
    ends = [text.find(stop) for stop in stops if stop in text]
    return text[: min(ends)] if ends else text


def _until(tokens: list[int], ends: Collection[int]) -> list[int]:
    """Up to and with the first end token; what follows it is padding."""
    places = (i for i, token in enumerate(tokens) if token in ends)
    return tokens[: next(places, len(tokens)) + 1]


def _rank(call: Call) -> tuple[str, str, Any, int]:
    """Sort key: adapter, kind, what a batch must share, falling length."""
    if isinstance(call, Forced):
        return call.adapter or "", "forced", (), -len(call.prompt) - len(call.answer)
    if isinstance(call, Sampled):
        options = (call.limit, call.stop, call.temperature, call.top_p)
        return call.adapter or "", "sampled", options, -len(call.prompt)
    return call.adapter or "", "greedy", (call.limit, call.stop), -len(call.prompt)


def _longest(call: Call) -> int:
    """Tokens of the answer, given or allowed."""
    return len(call.answer) if isinstance(call, Forced) else call.limit
