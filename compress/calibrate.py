"""What an error in each module costs the base model, measured on a few prompts (`--calibrate`).

‖D̂ − D‖ treats all modules alike; the model does not. For a small error E in the weights of one module the expected
rise of the loss is ½ tr(E^T F E) with the Fisher information F. Of F only its trace is kept, one number a module,

    c = E_t E_y ‖∂ log p(y_t) / ∂W‖² = E ‖g_t‖² ‖x_t‖²        x_t: the module's input, g_t: the gradient at its output,

with y drawn from the model itself and g_t of the whole prompt's log-probability. The residual of a module then counts
√c times: the root, because neither F is a multiple of 1 nor are D's errors small.
Finer metrics were tried and lost (docs/AUTO.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorazip import base as bases
from lorazip import rows
from lorazip.errors import Defect, InputError
from lorazip.generic import PROMPTS

POWER = 0.5
TOKENS = 256  # of a prompt that are looked at
SEED = 0


def weights(
    base: str,
    prompts: str | None,
    shapes: dict[str, tuple[int, int]],
    device: torch.device,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, float]:
    """Module -> how much its residual counts; their geometric mean is 1.

    Args:
        base: the adapters' base model, a directory or a Hub id.
        prompts: file of texts, as `rows.texts` reads; None for the built-in ones.
        shapes: module -> (out, in), as the adapters have them.
    Raises:
        InputError: the base has other modules or shapes, a file cannot be read, or a gradient is no number.
    """
    path = bases.locate(base)
    tokenizer = bases.load_tokenizer(path)
    texts = PROMPTS if prompts is None else rows.texts(Path(prompts))
    model = bases.load(path, torch.float32, device)
    _check(model, base, shapes)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    sums = dict.fromkeys(shapes, 0.0)
    handles = [
        model.get_submodule(name).register_forward_hook(_hook(name, sums)) for name in shapes
    ]  # gradients at outputs alone: none of weights are made
    embedded = model.get_input_embeddings()
    random = torch.Generator().manual_seed(SEED)
    try:
        for done, text in enumerate(texts, 1):
            ids = torch.tensor([tokenizer(text)["input_ids"][:TOKENS]], device=device)
            if ids.shape[1] > 1:
                states = embedded(ids).requires_grad_(True)
                logits = model(inputs_embeds=states, use_cache=False).logits[0]
                found = logits.float().log_softmax(-1)
                drawn = torch.multinomial(found.detach().exp().cpu(), 1, generator=random).to(device)
                found.gather(1, drawn).sum().backward()
            progress("calibrating", done, len(texts))
    finally:
        for handle in handles:
            handle.remove()
    bad = [name for name, value in sums.items() if not 0 < value < math.inf]
    if bad:
        problem = "has a gradient that is zero or no number on these prompts"
        raise InputError([Defect(base, bad[0], problem=problem, remedy="give other --prompts")])
    mean = sum(math.log(value) for value in sums.values()) / len(sums)
    return {name: math.exp(POWER * (math.log(value) - mean)) for name, value in sums.items()}


def _hook(name: str, sums: dict[str, float]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # The first token is where attention goes that has nowhere to go: its states dwarf all others.
        energy = inputs[0].detach()[0, 1:].float().square().sum(1)

        def seen(gradient: Tensor) -> None:
            sums[name] += float((gradient[0, 1:].float().square().sum(1) * energy).sum())

        output.register_hook(seen)  # type: ignore[no-untyped-call]

    return hook


def _check(model: nn.Module, base: str, shapes: dict[str, tuple[int, int]]) -> None:
    for name, shape in shapes.items():
        try:
            weight: Any = model.get_submodule(name).weight
            there = tuple(weight.shape)
        except AttributeError:
            there = ()
        if there != shape:
            what = f"is {' x '.join(map(str, there))} there" if there else "is not there"
            problem = f"{what}; the adapters' is {shape[0]} x {shape[1]}"
            raise InputError([Defect(base, name, problem=problem, remedy="name the adapters' own base")])
