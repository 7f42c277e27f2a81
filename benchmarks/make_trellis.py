"""Make lorazip/trellis.safetensors: the tables of trellis-coded quantisation, trained on normally distributed numbers.

    python benchmarks/make_trellis.py lorazip/trellis.safetensors

Lloyd's algorithm on paths: encode random rows, replace each entry by the mean of what went to it, repeat. High rates
start from the quantiles of the normal distribution such that the entries that can follow a state lie evenly; low ones,
where structure is worth less than variety, from the quantiles in random order or from random vectors. Prints what is
left of the energy of fresh rows (`DISTORTION`), and how many bits a perfect code would need less. About two minutes.
"""

from __future__ import annotations

import sys
from math import log2
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lorazip.trellis import RATES, STATE, Trellis, name, turned

ROUNDS = 40
ROWS, WIDTH = 256, 576


def start(k: int, v: int, generator: torch.Generator) -> Tensor:
    """The first table (2^STATE, v)."""
    states = torch.arange(2**STATE)
    if v > 1:
        return torch.randn(len(states), v, generator=generator) * 0.9
    if k < 3:
        order = torch.randperm(len(states), generator=generator)
    else:
        fine = torch.randperm(2 ** (STATE - k), generator=generator)
        new, before = states & (2**k - 1), states >> k
        order = (new ^ (before & (2**k - 1))) * len(fine) + fine[before]
    quantiles: Tensor = torch.special.ndtri((order.double() + 0.5) / len(states))
    return quantiles.float()[:, None]


def trained(rate: float) -> tuple[Tensor, float]:
    """The table of a rate, and what it leaves of the energy of other rows."""
    k, v = RATES[rate]
    generator = torch.Generator().manual_seed(0)
    table = start(k, v, generator)

    def coded() -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.randn(ROWS, WIDTH, generator=generator)
        code = Trellis(k, v, table)
        codes = code.encode(rows)
        # Decoding a table of its own numbers gives the states.
        states = torch.zeros_like(codes)
        for back in range(-(-STATE // k)):
            states += torch.nn.functional.pad(codes, (back, 0))[:, : codes.shape[1]] << (k * back)
        return rows, codes, states & (2**STATE - 1)

    for _ in range(ROUNDS):
        rows, _, states = coded()
        x = turned(rows).reshape(-1, v)
        count = torch.bincount(states.flatten(), minlength=len(table))[:, None]
        total = torch.zeros_like(table).index_add_(0, states.flatten(), x)
        table = torch.where(count > 2, total / count.clamp_min(1), table)
    table = table.half().float()
    left = []
    for _ in range(4):
        rows, codes, _ = coded()
        left.append(float((rows - Trellis(k, v, table).decode(codes, WIDTH)).square().mean()))
    return table, sum(left) / len(left)


def main() -> None:
    """All rates."""
    tables = {}
    for rate in RATES:
        table, left = trained(rate)
        tables[name(rate)] = table.half()
        print(f"{rate:g} bits: {left:.5f} left, {rate + log2(left) / 2:.3f} bits above the bound", flush=True)
    save_file(tables, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
