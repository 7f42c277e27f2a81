"""Kinds of modules, q_proj say: what the modules of all layers are called in common."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence


def columns_by_kind(modules: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Kind of module -> its modules' indices, layer by layer.

    The kind is the last part of the name (q_proj), with the part before it where that tells two sorts apart
    (attn.c_proj and mlp.c_proj of GPT-2). Numbers are no parts: they count layers and experts.
    """
    words = [[word for word in module.split(".") if not word.isdecimal()] or [module] for module in modules]
    parents = defaultdict(set)
    for parts in words:
        parents[parts[-1]].add(tuple(parts[-2:-1]))
    columns: dict[str, list[int]] = defaultdict(list)
    for i in sorted(range(len(modules)), key=lambda i: _natural(modules[i])):
        parts = words[i]
        columns[".".join(parts[-2:] if len(parents[parts[-1]]) > 1 else parts[-1:])].append(i)
    return {kind: tuple(columns[kind]) for kind in sorted(columns)}


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts layer 10 after layer 9."""
    return [(int(word), "") if word.isdecimal() else (-1, word) for word in re.split(r"(\d+)", name)]
