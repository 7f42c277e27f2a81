"""What the tests of the report share: adapters that give it all it can show."""

from __future__ import annotations

from typing import Any

import torch
from handmade import MakeAdapter

HOSTILE = '<script>alert("1")</script>'
WIDE = {
    f"model.layers.{layer}.self_attn.{name}": shape
    for layer in range(12)
    for name, shape in {"q_proj": (48, 96), "k_proj": (24, 96)}.items()
}
SOME = {name: shape for name, shape in WIDE.items() if "q_proj" in name}


def make_varied(make: MakeAdapter) -> None:
    """The adapters of `outcome`."""
    base: dict[str, Any] = {"base_model_name_or_path": f"org/{HOSTILE}"}
    for name in ("a1", "a2", "a3"):
        make(f"zoo/{name}", modules=WIDE, rank=2, a_seed=3, **base)
    make("zoo/$x$ 日本語 & co", modules=SOME, rank=2, **base)
    make("zoo/own", modules=WIDE, rank=3, **base)
    make("zoo/" + "long" * 32, modules=WIDE, rank=2, **base)
    head = {
        f"{make.prefix}classifier.weight": torch.ones(3, 96),
        f"{make.prefix}classifier.bias": torch.ones(3),
    }
    make("zoo/scored", modules=WIDE, rank=2, tensors=head, modules_to_save=["classifier"], **base)
    bad = f"{make.prefix}model.layers.0.self_attn.q_proj.lora_A.weight"
    make("zoo/bad", modules=WIDE, rank=2, tensors={bad: torch.full((2, 96), torch.nan)}, **base)
