#!/usr/bin/env python3
"""What each idea of storing adapters in few bits gains or loses (docs/QUANTIZATION.md).

    .venv/bin/python benchmarks/quantize.py DIR [--adapters N] [--table levels|product|joint|frontier] [--every K]

DIR holds adapters of one base. err is ||D^ - D||^2 / ||D||^2 over all modules, the mean over the adapters. The ratio is
the originals' factors at 16 bits a number over all that is stored for them: codes, scales and bases (no manifest).
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lorazip import Spec, open_adapters
from lorazip.adapter import LowRank
from lorazip.compress import quantize
from lorazip.compress.encode import ModuleCode, encode, prepare
from lorazip.compress.lowrank import Stack, inner, norms2

Modules = dict[str, list[LowRank]]
LLOYD = {  # levels of the best quantiser of a normal variable (Max 1960, Lloyd 1982)
    2: [0.4528, 1.510],
    3: [0.2451, 0.7560, 1.344, 2.152],
    4: [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733],
}


def measured(codes: list[ModuleCode], modules: Modules) -> tuple[float, float]:
    """(ratio, mean err) of all modules."""
    residuals = torch.stack([code.residuals for code in codes]).sum(0)
    energies = torch.stack([code.energies for code in codes]).sum(0)
    stored = sum(p.nbytes for code in codes for parts in (*code.shared, *code.own) for p in parts)
    return _sixteen(modules) / stored, float((residuals / energies).mean())


def _sixteen(modules: Modules) -> int:
    return sum(2 * (f.B.numel() + f.A.numel()) for factors in modules.values() for f in factors)


def compressed(modules: Modules, spec: Spec) -> tuple[float, float]:
    """What `lorazip compress` stores."""
    return measured([encode(name, factors, spec) for name, factors in modules.items()], modules)


# --- levels and scales, on balanced factors, each rounded alone ----------------------------------


def levels_of(kind: str, bits: int) -> Tensor:
    """All levels, ascending, float64."""
    count = 2**bits
    if kind == "with zero":  # as compressed-tensors has them
        return torch.arange(-(count // 2), count // 2, dtype=torch.float64)
    if kind == "Lloyd-Max" and bits in LLOYD:
        half = torch.tensor(LLOYD[bits], dtype=torch.float64)
        return torch.cat([-half.flip(0), half])
    odd: Tensor = 2 * torch.arange(count, dtype=torch.float64) + 1 - count
    return odd


def by_levels(x: Tensor, bits: int, group: int, kind: str) -> Tensor:
    """Rows (R, d) rounded group by group, with the scale (and offset) of least squares out of 24."""
    pieces = []
    grid = levels_of(kind, bits)
    middles = (grid[1:] + grid[:-1]) / 2
    for y in torch.split(x, group, dim=1):
        top = y.abs().amax(1, keepdim=True).clamp_min(1e-300)
        centre = (y.amax(1, keepdim=True) + y.amin(1, keepdim=True)) / 2 if kind == "zero point" else 0 * top
        best, least = y * 0, torch.full_like(top, torch.inf)
        for part in [1.0] if kind == "largest value" else torch.linspace(0.1, 1, 24).tolist():
            scale, at = top * part / grid.abs().max(), centre
            for _ in range(0 if kind == "largest value" else 2):
                q = grid[torch.bucketize(((y - at) / scale).contiguous(), middles)]
                if kind == "zero point":
                    shift, mean = q.mean(1, keepdim=True), y.mean(1, keepdim=True)
                    along = ((q - shift) * (y - mean)).sum(1, keepdim=True)
                    scale = (along / (q - shift).square().sum(1, keepdim=True).clamp_min(1e-300)).clamp_min(
                        1e-300
                    )
                    at = mean - scale * shift
                else:
                    along = (q * y).sum(1, keepdim=True)
                    scale = (along / q.square().sum(1, keepdim=True).clamp_min(1e-300)).clamp_min(1e-300)
            found = grid[torch.bucketize(((y - at) / scale).contiguous(), middles)] * scale + at
            error = (found - y).square().sum(1, keepdim=True)
            best, least = torch.where(error < least, found, best), torch.minimum(error, least)
        pieces.append(best)
    return torch.cat(pieces, 1)


def levels_table(modules: Modules) -> None:
    """Ways to choose levels and scales, at several groups."""
    kinds = ["odd, least squares", "with zero", "zero point", "Lloyd-Max", "largest value"]
    print(
        "| rank, bits | levels and scale | "
        + " | ".join(f"group {g or 'row'}" for g in (32, 64, 128, 0))
        + " |"
    )
    print("|---|---|---|---|---|---|")
    for rank, bits in ((1, 2), (4, 2), (4, 3), (4, 4)):
        for kind in kinds:
            cells = []
            for group in (32, 64, 128, 0):
                residuals, energies = torch.zeros(2, len(next(iter(modules.values()))), dtype=torch.float64)
                stored = 0
                for name, factors in modules.items():
                    stack = prepare(name, factors, Spec("svd", rank=rank))[0].stack
                    sides = []
                    for side in (stack.left, stack.right):
                        rows = stack.pad(side)[:, :rank].flatten(0, 1).double()
                        size = group or rows.shape[1]
                        sides.append(by_levels(rows, bits, size, kind).float())
                        numbers = 32 if kind == "zero point" else 16
                        stored += (
                            len(rows) * (rows.shape[1] * bits + -(-rows.shape[1] // size) * numbers) // 8
                        )
                    near = Stack(sides[0], sides[1], (rank,) * len(factors))
                    residuals = residuals + norms2(stack) - 2 * inner(stack, near) + norms2(near)
                    energies = energies + norms2(stack)
                error = float((residuals / energies).mean())
                cells.append(f"{_sixteen(modules) / stored:.1f}x {error:.4f}")
            print(f"| {rank}, {bits} | {kind} | " + " | ".join(cells) + " |", flush=True)


# --- ideas of rounding, taken away one by one ----------------------------------------------------


def alone(target: Tensor, metric: Tensor, name: str) -> quantize.Rounded:
    """Rounding that knows nothing of the other factor."""
    return _rounded(target, torch.eye(target.shape[1], dtype=torch.float64).expand_as(metric), name)


_rounded = quantize.rounded
_solved = quantize._solved


def unsolved(fixed: Tensor, beside: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """The factor as it was, turned, in place of the least-squares one."""
    turn = quantize.gauge("int4", fixed.shape[1]).to(other) if TURNED["on"] else None
    kept = other[:, : fixed.shape[1]]
    return (kept if turn is None else turn @ kept), _solved(fixed, beside, other)[1]


TURNED: dict[str, Any] = {"on": True}


@contextmanager
def changed(**values: Any) -> Iterator[None]:
    """compress.quantize with some of its names replaced."""
    before = {name: getattr(quantize, name) for name in values}
    for name, value in values.items():
        setattr(quantize, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(quantize, name, value)


def straight(name: str, rows: int) -> Tensor:
    """No turn."""
    return torch.eye(rows, dtype=torch.float64)


IDEAS: dict[str, dict[str, Any]] = {
    "factors rounded apart": {
        "gauge": straight, "rounded": alone, "_solved": unsolved, "ROUNDS": 1, "SWEEPS": 0,
    },
    "+ gauge": {"rounded": alone, "_solved": unsolved, "ROUNDS": 1, "SWEEPS": 0},
    "+ gauge, least squares": {"rounded": alone, "ROUNDS": 1, "SWEEPS": 0},
    "+ gauge, least squares, feedback": {"ROUNDS": 1, "SWEEPS": 0},
    "+ gauge, least squares, feedback, sweeps": {"ROUNDS": 1},
    "all, 3 rounds (kept)": {},
    "all, 8 rounds": {"ROUNDS": 8},
    "all without gauge": {"gauge": straight},
}  # fmt: skip


def ideas_table(modules: Modules, specs: list[Spec]) -> None:
    """Error of every idea at the same bytes."""
    heads = [f"{s.method} r{s.rank} {s.bits or s.basis_bits:g} bit" for s in specs]
    print("| idea | " + " | ".join(heads) + " | seconds |")
    print("|---" * (len(specs) + 2) + "|")
    ratios: list[float] = []
    for idea, values in IDEAS.items():
        if specs[0].method != "svd" and values.get("_solved") is unsolved:
            continue  # bases are solved for in any case
        TURNED["on"] = values.get("gauge") is not straight
        cells, start = [], time.perf_counter()
        with changed(**values):
            for spec in specs:
                ratio, error = compressed(modules, spec)
                cells.append(f"{error:.4f}")
                ratios.append(ratio)
        print(f"| {idea} | " + " | ".join(cells) + f" | {time.perf_counter() - start:.0f} |", flush=True)
    print("| ratio | " + " | ".join(f"{r:.1f}x" for r in ratios[: len(specs)]) + " | |")


def product_table(modules: Modules) -> None:
    """Own factors."""
    pairs = itertools.product((2, 4, 8), (1, 2, 3, 4))
    ideas_table(modules, [Spec("svd", rank=rank, bits=bits) for rank, bits in pairs])


def joint_table(modules: Modules) -> None:
    """Shared bases."""
    ideas_table(
        modules,
        [
            Spec("jd-full", rank=rank, clusters=1, bits=bits, core_bits=core)
            for rank, bits, core in ((8, 4, 8), (8, 2, 8), (16, 4, 4), (16, 3, 4), (16, 2, 4), (16, 2, 2))
        ],
    )


def frontier_table(modules: Modules) -> None:
    """Ratio and error of what `lorazip compress --bits` stores."""
    print("| method | ratio | err |\n|---|---|---|")
    for rank, bits in [
        (1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (2, 2.5), (2, 3), (2, 4), (3, 2), (3, 2.33), (3, 3),
        (4, 1), (4, 1.5), (4, 2), (4, 2.25), (4, 2.5), (4, 3), (4, 4), (6, 2), (6, 3),
        (8, 1), (8, 2), (8, 3), (8, 4), (8, 6), (8, 8),
    ]:  # fmt: skip
        ratio, error = compressed(modules, Spec("svd", rank=rank, bits=bits))
        print(f"| svd r{rank} {bits:g} bit | {ratio:.1f}x | {error:.4f} |", flush=True)
    for group in (32, 64, 128):
        ratio, error = compressed(modules, Spec("svd", rank=4, bits=2, group=group))
        print(f"| svd r4 2 bit, group {group} | {ratio:.1f}x | {error:.4f} |", flush=True)
    for rank, base, core in [
        (8, 2, 8), (8, 3, 8), (8, 4, 8), (16, 1.5, 4), (16, 2, 2), (16, 2, 3), (16, 2, 4), (16, 2.5, 4), (16, 3, 3),
        (16, 3, 4), (16, 4, 4), (16, 6, 6), (32, 2, 3), (32, 3, 3), (32, 4, 4),
    ]:  # fmt: skip
        ratio, error = compressed(
            modules, Spec("jd-full", rank=rank, clusters=1, basis_bits=base, core_bits=core)
        )
        print(
            f"| jd-full r{rank}, bases {base:g} bit, cores {core} | {ratio:.1f}x | {error:.4f} |", flush=True
        )


TABLES: dict[str, Callable[[Modules], None]] = {
    "levels": levels_table,
    "product": product_table,
    "joint": joint_table,
    "frontier": frontier_table,
}


def main() -> None:
    """Print the tables asked for."""
    parser = argparse.ArgumentParser(description="What each idea of storing adapters in few bits gains.")
    parser.add_argument("directory", metavar="DIR")
    parser.add_argument("--adapters", type=int, help="the first N by name")
    parser.add_argument("--every", type=int, default=1, help="only every K-th module")
    parser.add_argument("--table", choices=list(TABLES), action="append")
    options = parser.parse_args()
    torch.set_num_threads(1)
    adapters = open_adapters([options.directory]).adapters[: options.adapters]
    names = list(adapters[0].modules)[:: options.every]
    modules = {name: [adapter.low_rank(name) for adapter in adapters] for name in names}
    print(f"{len(adapters)} adapters, {len(modules)} modules")
    for table in options.table or TABLES:
        print(f"\n{table}\n")
        TABLES[table](modules)


if __name__ == "__main__":
    main()
