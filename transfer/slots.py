"""The new adapter in the base: which modules, which shape, and what it starts from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorazip.errors import Defect, InputError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

SLOT = "default"  # PEFT's name of the only adapter
LENGTH = 3**-0.5  # of a row of A whose numbers are uniform within ±1/√in, as PEFT draws them

Start = Mapping[str, tuple[Tensor, Tensor]]  # module -> B (out, r) and A (r, in), D = B A


@dataclass(frozen=True)
class Shape:
    """The new adapter: its rank, alpha, and the full names of its modules."""

    kind: str
    rank: int
    alpha: int
    modules: tuple[str, ...]


def wrapped(base: PreTrainedModel, shape: Shape, seed: int) -> PeftModel:
    """The base with a trainable adapter in float32."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=shape.rank,
        lora_alpha=shape.alpha,
        lora_dropout=0.0,
        use_dora=shape.kind == "dora",
        target_modules=_named(base, shape.modules),
    )
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PeftModel = get_peft_model(base, config)
    return model


@torch.no_grad()
def begin(model: PeftModel, start: Start) -> None:
    """Put the factors of a start in place. Raises InputError."""
    inner: Any = model.base_model.model
    layers = {name: layer for name, layer in inner.named_modules() if hasattr(layer, "lora_A")}
    lost = sorted(start.keys() - layers.keys(), key=natural)
    if lost:
        remedy = 'name its kind in train.modules, or give train.warm = "none"'
        raise InputError([Defect("warm start", lost[0], "", "is not trained, and would be lost", remedy)])
    for name, (b, a) in start.items():
        into_a, into_b = layers[name].lora_A[SLOT].weight, layers[name].lora_B[SLOT].weight
        rank = min(b.shape[1], into_a.shape[0])
        b, a = _truncated(b, a, rank)
        into_a[:rank] = a.to(into_a)
        into_b[:, :rank] = (b / layers[name].scaling[SLOT]).to(into_b)


def _truncated(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of B A of this rank, with orthogonal rows of A as long as those that PEFT draws.

    B learns by what A hands it. With B and A balanced, A is small, and a mapped start learned more slowly than none:
    held-out loss 0.71 after 12 steps where PEFT's own start came to 0.46 and this one to 0.32 (past tenses, SmolLM2 to
    Gemma 3 270M, learning rate 3e-4, one seed).
    """
    qb, rb = torch.linalg.qr(b.double())
    qa, ra = torch.linalg.qr(a.double().T)
    u, s, v = torch.linalg.svd(rb @ ra.T)
    return (qb @ u[:, :rank] * (s[:rank] / LENGTH)).float(), (LENGTH * (v[:rank] @ qa.T)).float()


def _named(base: PreTrainedModel, modules: Sequence[str]) -> list[str]:
    """target_modules: leaf names where they mean just these modules, as people write them, else full names."""
    leaves = sorted({leaf(name) for name in modules})
    meant = {name for name, _ in base.named_modules() if leaf(name) in leaves}
    return leaves if meant == set(modules) else sorted(modules)


def modules_of(base: PreTrainedModel, leaves: Sequence[str]) -> tuple[str, ...]:
    """The linear layers of a model with one of these leaf names, sorted as names.

    Raises:
        InputError: a leaf name has none.
    """
    found = [
        name
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear) and leaf(name) in leaves
    ]
    missing = sorted(set(leaves) - {leaf(name) for name in found})
    if missing:
        linear = {leaf(n) for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)}
        remedy = f"name some of {', '.join(sorted(linear))} in train.modules"
        raise InputError([Defect(str(base.name_or_path), missing[0], "", "is no linear layer of it", remedy)])
    return tuple(sorted(found, key=natural))


def leaf(name: str) -> str:
    """The last part of a module's name: q_proj."""
    return name.rpartition(".")[2]


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key: layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]
