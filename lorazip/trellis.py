"""Trellis-coded quantisation: rows of numbers in 1/4 to 6 bits a number, near what rate-distortion theory allows.

A row is read as steps of v numbers; a step is k bits, k / v bits a number. Decoding slides a window of STATE bits along
the row's bits: state_t = (state_{t-1} 2^k + code_t) mod 2^STATE, from state 0, and row t of the rate's table are the v
numbers. So every step has all 2^STATE entries to be near to, but only 2^k of them from where the last step left it; the
encoder finds the best path by dynamic programming (Viterbi). The length does not depend on the data, and all steps can
be decoded at once.

Trellis codes: Marcellin and Fischer (IEEE Trans. Comm. 38:82, 1990); the sliding window ("bitshift trellis") for
weights of models: QTIP (arXiv 2406.11235). Ours are smaller (1024 states, tables that fit a page), have rates below one
bit, and their tables are trained on what they decode: each entry is the mean of the numbers that the encoder sends to
it (`benchmarks/make_trellis.py`), so that decoded rows are conditional means and need no shrinking.

The tables are made for normally distributed numbers. Rows are turned first, 64 neighbours at a time, by a Hadamard
matrix with signs (as in QuIP#, arXiv 2402.04396), which makes the numbers of any row nearly normal, outliers too, so
that the error depends on hardly anything but the rate (`DISTORTION`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

STATE = 10  # bits of a state
TABLES = Path(__file__).with_name("trellis.safetensors")
# rate -> (k bits a step, v numbers a step)
RATES: dict[float, tuple[int, int]] = {
    0.25: (1, 4), 0.5: (1, 2), 0.75: (3, 4), 1: (1, 1), 1.5: (3, 2), 2: (2, 1), 2.5: (5, 2), 3: (3, 1), 4: (4, 1),
    5: (5, 1), 6: (6, 1),
}  # fmt: skip
# What is left of the energy of a long row of normally distributed numbers; theory's bound is 4^-rate.
# Printed by benchmarks/make_trellis.py.
DISTORTION: dict[float, float] = {
    0.25: 0.7335, 0.5: 0.5303, 0.75: 0.3864, 1: 0.2767, 1.5: 0.1446, 2: 0.0743, 2.5: 0.0393, 3: 0.0200, 4: 0.00515,
    5: 0.00140, 6: 0.00041,
}  # fmt: skip
BLOCK = 64  # neighbours that are turned together; what is left at the end of a row stays
SIGNS = 0x9D5A3C716E84B21F  # bit j, the lowest first: 1 turns the sign of number j of a block
WORK = 2**26  # bytes of the encoder's record of decisions
ROWS = 256  # at a time: the costs of all states of so many fit a core's cache


@dataclass(frozen=True)
class Trellis:
    """The code of one rate: k bits for every v numbers."""

    k: int
    v: int
    table: Tensor  # (2^STATE, v) float32

    def steps(self, width: int) -> int:
        """Of a row of so many numbers."""
        return -(-width // self.v)

    def decode(self, codes: Tensor, width: int) -> Tensor:
        """Codes (rows, steps), 0 <= code < 2^k, to rows (rows, width) float32."""
        states = torch.zeros_like(codes, dtype=torch.long)
        for back in range(-(-STATE // self.k)):
            shifted = torch.nn.functional.pad(codes.long(), (back, 0))[:, : codes.shape[1]]
            states += shifted << (self.k * back)
        values = self.table.to(codes.device)[states & (2**STATE - 1)]
        return turned(values.flatten(1)[:, :width], back=True)

    def encode(self, rows: Tensor) -> Tensor:
        """Codes (rows, steps) int64 of the paths nearest to rows (rows, width) of about unit variance."""
        found = torch.zeros(len(rows), self.steps(rows.shape[1]), dtype=torch.long, device=rows.device)
        size = max(1, min(ROWS, WORK // max(1, found.shape[1] << (STATE - self.k))))
        for first in range(0, len(rows), size):
            some = turned(rows[first : first + size].float())
            padded = torch.nn.functional.pad(some, (0, -some.shape[1] % self.v))
            found[first : first + size] = self._paths(padded.view(len(some), -1, self.v))
        return found

    def _paths(self, x: Tensor) -> Tensor:
        """The codes of the nearest paths to x (rows, steps, v).

        States are in the first dimension. The states that reach s are those whose lower STATE - k bits are the upper
        ones of s, so the best of the 2^k halves, quarters ... of the costs is the best way to 2^k successors at once.
        """
        rows, steps, _ = x.shape
        ways = 2**self.k
        table = self.table.to(x.device)
        energy = table.square().sum(1, keepdim=True)  # (S, 1)
        cost = x.new_full((len(table), rows), 1e30)
        cost[0] = 0
        after = torch.empty_like(cost)
        decisions = torch.empty(steps, len(table) // ways, rows, dtype=torch.uint8, device=x.device)
        minus = (-2 * x).permute(1, 2, 0).contiguous()  # (steps, v, rows)
        for t in range(steps):
            best, decisions[t] = _best(cost, self.k)
            # |x - c|^2 without |x|^2, which is the same on all paths
            if self.v == 1:
                torch.addcmul(energy, table, minus[t], out=after)
            else:
                torch.addmm(energy.expand_as(cost), table, minus[t], out=after)
            after.view(-1, ways, rows).add_(best[:, None])
            cost, after = after, cost
        state = cost.argmin(0)
        columns = torch.arange(rows, device=x.device)
        codes = torch.empty(rows, steps, dtype=torch.long, device=x.device)
        for t in reversed(range(steps)):
            codes[:, t] = state & (ways - 1)
            lower = state >> self.k
            state = (decisions[t][lower, columns].long() << (STATE - self.k)) + lower
        return codes


def _best(cost: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The least of the 2^k equal parts of cost (S, rows), entry by entry, and which: (S / 2^k, rows) each."""
    which: Tensor | None = None
    for bit in reversed(range(k)):
        half = len(cost) // 2
        one, two = cost[:half], cost[half:]
        second = two < one
        cost = torch.minimum(one, two)
        if which is None:
            which = second.to(torch.uint8) << bit
        else:
            which = torch.where(second, which[half:] | (1 << bit), which[:half])
    assert which is not None
    return cost, which


@lru_cache(maxsize=None)
def trellis(rate: float) -> Trellis:
    """The code of a rate in `RATES`."""
    return Trellis(*RATES[rate], load_file(TABLES)[name(rate)].float())


def name(rate: float) -> str:
    """As in the names of codecs and tables: "0.25", "3"."""
    return f"{rate:g}"


@lru_cache(maxsize=None)
def _turn() -> Tensor:
    """(BLOCK, BLOCK) orthogonal: signs, then Hadamard's matrix."""
    matrix = torch.ones(1, 1)
    while len(matrix) < BLOCK:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    signs = torch.tensor([-1.0 if SIGNS >> j & 1 else 1.0 for j in range(BLOCK)])
    return matrix * signs / BLOCK**0.5


def turned(rows: Tensor, back: bool = False) -> Tensor:
    """Every whole block of rows (n, d) times the orthogonal matrix, or its inverse."""
    whole = rows.shape[1] // BLOCK * BLOCK
    matrix = _turn().to(rows)
    blocks = rows[:, :whole].reshape(len(rows), -1, BLOCK) @ (matrix if back else matrix.T)
    return torch.cat([blocks.flatten(1), rows[:, whole:]], 1)
