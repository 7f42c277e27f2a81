"""Canaries: before anything is scored, every adapter proves that it acts as its factors say.

By hand means: the base in transformers, without PEFT, one prompt at a time, with scale · (x Aᵀ) Bᵀ added to the output
of each adapted linear layer. The backend's log-probabilities of the prompt's tokens must be those. What a deviation may
be is relative to the adapter's own effect, so one that was zeroed, swapped for another or wrongly scaled is found even
where the task's score would not tell; and to the noise of the arithmetic, which the bare base shows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorazip.eval.backend import Acting, Forced, HasFactors
from lorazip.eval.results import Canary
from lorazip.eval.transformers_backend import scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Of the adapter's effect. A scale that is wrong by a fifth deviates by 2 to 30 %, the less the more certain the model
# is; one module that is missing, by 1 % or more. Half types round the factors, and each backend in its own way.
RELATIVE = {torch.float32: 0.005}
RELATIVE_HALF = 0.05
NOISE = 4.0  # times what the bare base deviates by on the same prompt, or the rounding of the type, if that is more
FOREIGN = 1e-2  # nats; float32 differs by 1e-4 between two engines
FLOOR = 1e-5  # nats; float32 through a few layers
LONGEST = 256  # tokens of a canary


def call(key: str | None, tokens: Sequence[int]) -> Forced:
    """The log-probability of every token but the first."""
    tokens = tokens[:LONGEST]
    return Forced(key, tuple(tokens[:1]), tuple(tokens[1:]))


@torch.inference_mode()
def by_hand(model: PreTrainedModel, adapter: HasFactors | None, asked: Forced) -> tuple[float, ...]:
    """Log-probabilities of the call's answer, the adapter's update added layer by layer."""
    tokens = torch.tensor([[*asked.prompt, *asked.answer]], device=model.device)
    with _updated(model, adapter):
        logits = model(input_ids=tokens, use_cache=False).logits[0]
    n = len(asked.answer)
    return scores(logits[-n - 1 : -1], tokens[0, -n:]).logprobs


@contextmanager
def _updated(model: PreTrainedModel, adapter: HasFactors | None) -> Iterator[None]:
    hooks = []
    for name in adapter.modules if adapter is not None else ():
        assert adapter is not None
        factor = adapter.low_rank(name)
        b, a = (t.to(model.device, torch.float32) for t in (factor.B, factor.A))

        def add(
            layer: Any, inputs: Any, y: Tensor, a: Tensor = a, b: Tensor = b, s: float = factor.scale
        ) -> Tensor:
            changed: Tensor = y + (s * (inputs[0].float() @ a.T @ b.T)).to(y.dtype)
            return changed

        hooks.append(model.get_submodule(name).register_forward_hook(add))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def judge(
    acting: Acting,
    hand: Sequence[float],
    hand_base: Sequence[float],
    found: Sequence[float],
    found_base: Sequence[float],
    dtype: torch.dtype,
) -> Canary:
    """Compare the log-probabilities of one prompt: by hand and in the backend, with the adapter and without.

    Args:
        dtype: that both compute in.
    """
    arm, name = acting.key.split("/", 1)
    effect, deviation, noise = (
        _largest(hand, hand_base),
        _largest(found, hand),
        _largest(found_base, hand_base),
    )
    # A base that rounds alike in both by luck says nothing of the adapter's rounding: half a unit of the last place.
    noise = max(noise, torch.finfo(dtype).eps / 2 * max(map(abs, hand_base), default=0.0))
    tolerance = max(RELATIVE.get(dtype, RELATIVE_HALF) * effect, NOISE * noise, FLOOR)
    problem = ""
    if not math.isfinite(effect + noise):
        problem = "log-probabilities of the prompt are not finite numbers: nothing can be proven"
    elif effect == 0:
        problem = "it does nothing: are its factors zero? (leave it out: --pairs)"
    elif dtype == torch.float32 and noise > FOREIGN:
        problem = f"the bare base is {noise:.2g} off in log-probability: the backend computes another model"
    elif effect <= 2 * tolerance:
        problem = (
            f"its effect on the prompt, {effect:.2g} in log-probability, drowns in the arithmetic's noise, {noise:.2g}:"
            " nothing can be proven (use --dtype float32)"
        )
    elif not deviation <= tolerance:
        if _largest(found, found_base) <= tolerance:
            problem = "it does nothing: the base answers"
        else:
            problem = (
                f"it does not act as its factors say: {deviation:.2g} off, at most {tolerance:.2g} is allowed"
            )
    return Canary(arm, name, effect, deviation, tolerance, not problem, problem)


def _largest(some: Sequence[float], others: Sequence[float]) -> float:
    differences = [abs(a - b) for a, b in zip(some, others, strict=True)]
    return max(differences) if all(d == d for d in differences) else float("nan")
