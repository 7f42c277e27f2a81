"""What a set of adapters is like before anything is compressed: strength, spectra, shared starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorazip.adapter import Adapter
from lorazip.compress.encode import load
from lorazip.compress.groups import shared_init_groups
from lorazip.compress.lowrank import canonical

RANKS = (1, 2, 4, 8, 16, 32)  # where the cumulative spectrum is reported


@dataclass(frozen=True)
class Survey:
    """Figures of n adapters.

    Attributes:
        strength: (n,) ||D|| over all modules, Frobenius. Relative to the base's weights it would need the base.
        captured: (n, len(RANKS)) share of ||D||^2 that the best approximation of that rank in every module keeps.
        groups: names of adapters that were trained from one shared random A.
    """

    strength: Tensor
    captured: Tensor
    groups: list[list[str]]


def survey(
    adapters: Sequence[Adapter], device: torch.device, progress: Callable[[str, int, int], None]
) -> Survey:
    """Measure adapters, one module of all at a time."""
    energies = torch.zeros(len(adapters), dtype=torch.float64)
    kept = torch.zeros(len(adapters), len(RANKS), dtype=torch.float64)
    modules = sorted({module for adapter in adapters for module in adapter.modules})
    for done, module in enumerate(modules, 1):
        having = [i for i, adapter in enumerate(adapters) if module in adapter.modules]
        _, sigma = canonical(load([adapters[i].low_rank(module) for i in having], device))
        squares = sigma.square().cpu()
        energies[having] += squares.sum(1)
        for column, rank in enumerate(RANKS):
            kept[having, column] += squares[:, :rank].sum(1)
        progress("measuring", done, len(modules))
    share = kept / energies.clamp_min(torch.finfo(torch.float64).tiny)[:, None]
    return Survey(energies.sqrt(), share, shared_init_groups(adapters))
