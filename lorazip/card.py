"""Model cards for the Hub: the README.md of a bundle, and of adapters exported from one."""

from __future__ import annotations

import json
from collections.abc import Mapping


def card(base: str, title: str = "LoRA adapters in one lorazip bundle") -> str:
    """The card of a bundle. It says nothing that adding or removing an adapter would make wrong."""
    return f"""{_front(base, "lorazip")}
# {title}

LoRA adapters of one base model, compressed together: shared tensors in `shared.safetensors`, one small file an adapter
in `adapters/`, and `bundle.json`, which lists every adapter with its measured error and every file with its checksum.

    lorazip info .          # what is inside
    lorazip verify .        # every byte
    lorazip export . NAME -o DIR   # an ordinary PEFT directory
"""


def adapter_card(base: str, errors: Mapping[str, float]) -> str:
    """The card of exported PEFT adapters: name -> measured error against the original."""
    rows = "\n".join(f"| {name} | {error:.3g} |" for name, error in errors.items())
    return f"""{_front(base, "peft")}
# LoRA adapters out of a lorazip bundle

Ordinary PEFT directories with the effect of the bundle's adapters. The error is the squared relative difference from
the original adapter, measured when it was compressed.

| adapter | error |
|---|---|
{rows}
"""


def _front(base: str, library: str) -> str:
    """Hub metadata. The base's name comes from untrusted configs, so it is quoted as JSON, which is YAML."""
    return f"""---
base_model: {json.dumps(base)}
library_name: {library}
tags:
- lora
- peft
- lorazip
---
"""
