"""Trellis-coded quantisation: rows of numbers in 1/2 to 5 bits a number, near what rate-distortion theory allows.

A row is read as steps of v numbers; a step is k bits, k / v bits a number. Decoding slides a window of STATE bits
along the row's bits: state_t = (state_{t-1} 2^k + code_t) mod 2^STATE, from state 0, and row t of the rate's table
are the v numbers. So every step has all 2^STATE entries to be near to, but only 2^k of them from where the last step
left it; the encoder finds the best path by dynamic programming (Viterbi; on a CPU in viterbi.py). The length does not
depend on the data, and all steps can be decoded at once.

Trellis codes: Marcellin and Fischer (IEEE Trans. Comm. 38:82, 1990); the sliding window ("bitshift trellis") for
weights of models: QTIP (arXiv 2406.11235). Ours are smaller (1024 states, tables that fit a page), have rates below one
bit, and their tables are trained on what they decode: each entry is the mean of the numbers that the encoder sends to
it (`benchmarks/make_trellis.py`), so that decoded rows are conditional means and need no shrinking.

The tables are made for normally distributed numbers. Rows are turned first, 64 numbers at a time, by a Hadamard
matrix with signs (as in QuIP#, arXiv 2402.04396), which makes the numbers of any row nearly normal, outliers too, so
that the error depends on hardly anything but the rate (`DISTORTION`). The 64 come from all over the row, a golden
section apart: neighbours belong to one head of attention, some heads have many times the energy of others, and turned
by themselves they leave up to twice the error at 5 bits (left rows of q_proj in examples/zoo).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cache
from math import gcd
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from lorazip import viterbi

STATE = 10  # bits of a state
TABLES = Path(__file__).with_name("trellis.safetensors")
# rate -> (k bits a step, v numbers a step)
RATES: dict[float, tuple[int, int]] = {
    0.5: (1, 2), 1: (1, 1), 1.5: (3, 2), 2: (2, 1), 2.5: (5, 2), 3: (3, 1), 4: (4, 1), 5: (5, 1),
}  # fmt: skip
# What is left of the energy of a long row of normally distributed numbers; theory's bound is 4^-rate.
# Printed by benchmarks/make_trellis.py.
DISTORTION: dict[float, float] = {
    0.5: 0.5303, 1: 0.2767, 1.5: 0.1446, 2: 0.0743, 2.5: 0.0393, 3: 0.0200, 4: 0.00515, 5: 0.00140,
}  # fmt: skip
BLOCK = 64  # numbers that are turned together; what is left at the end of a row stays
SECTION = 40503  # in 65536: the golden section
SIGNS = 0x9D5A3C716E84B21F  # bit j, the lowest first: 1 turns the sign of number j of a block
ROWS = 512  # at a time: the record of all their steps takes 270 MB at rates 1/2 and 1 in by_torch, and less at others
# Steps that are decided at a time, and how many more are looked at for it: not looking further costs 0.6 % of what
# is left at rate 1, and less at the others.
SPAN, SURE = 224, 32


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
        steps = self.steps(rows.shape[1])
        found = torch.zeros(len(rows), steps, dtype=torch.long, device=rows.device)
        for first in range(0, len(rows), ROWS):
            some = turned(rows[first : first + ROWS].float())
            padded = torch.nn.functional.pad(some, (0, -some.shape[1] % self.v))
            x = padded.view(len(some), steps, self.v)
            found[first : first + ROWS] = self.on_cpu(x) if x.device.type == "cpu" else self.by_torch(x)
        return found

    def on_cpu(self, x: Tensor) -> Tensor:
        """The codes of the nearest paths to x (rows, steps, v): viterbi.py."""
        kept, parts = min(x.shape[1], SPAN + SURE) + 1, 2 ** (STATE - self.k)
        count = kept * parts * viterbi.LANES
        record = _record(count, x.device)[:count].view(kept, parts, viterbi.LANES)
        return viterbi.paths(x, self.table, self.k, SURE, record)

    def by_torch(self, x: Tensor) -> Tensor:
        """The codes of the nearest paths to x (rows, steps, v), on any device.

        States are in the first dimension. The states that reach s are those whose lower STATE - k bits are the upper
        ones of s, so the least of the 2^k equal parts of the costs is the best way to 2^k successors at once. Those
        least costs are recorded; which part it was is found again for the one state that the path comes from. Long
        rows are decided SPAN steps at a time, looking SURE steps further, and then go on from where the path is: the
        best paths into different states need not have been one for long.
        """
        rows, steps, _ = x.shape
        record = _record(min(steps, SPAN + SURE) * 2 ** (STATE - self.k) * rows, x.device)
        minus = (-2 * x).permute(1, 2, 0).contiguous()  # (steps, v, rows)
        codes = torch.empty(rows, steps, dtype=torch.long, device=x.device)
        state = torch.zeros(rows, dtype=torch.long, device=x.device)
        first = 0
        while first < steps:
            end = min(first + SPAN + SURE, steps)
            upto = end if end == steps else end - SURE
            state = self._span(minus[first:end], state, codes[:, first:upto], record)
            first = upto
        return codes

    def _span(self, minus: Tensor, state: Tensor, codes: Tensor, record: Tensor) -> Tensor:
        """Fill in the first codes of the paths from `state` (rows,) nearest to x = -minus / 2 (steps, v, rows).

        Returns:
            The states after these codes.
        """
        steps, _, rows = minus.shape
        ways, parts = 2**self.k, 2 ** (STATE - self.k)
        table = self.table.to(minus.device)
        energy = table.square().sum(1, keepdim=True)  # (S, 1)
        cost = minus.new_full((len(table), rows), 1e30).scatter_(0, state[None], 0)
        least = [minus.new_empty(len(table) >> (bit + 1), rows) for bit in range(self.k - 1)]
        best = record[: steps * parts * rows].view(steps, parts, rows)
        for t in range(steps):
            halves = cost
            for bit in range(self.k):
                one, two = halves.chunk(2)
                halves = torch.minimum(one, two, out=least[bit] if bit < self.k - 1 else best[t])
            # |x - c|^2 without |x|^2, which is the same on all paths
            if self.v == 1:
                torch.addcmul(energy, table, minus[t], out=cost)
            else:
                torch.addmm(energy.expand_as(cost), table, minus[t], out=cost)
            cost.view(parts, ways, rows).add_(halves[:, None])
        return self._trace(cost.argmin(0), best, minus, codes)

    def _trace(self, state: Tensor, best: Tensor, minus: Tensor, codes: Tensor) -> Tensor:
        """Follow the best path back from its last state; returns its state after the last of the codes filled in."""
        table = self.table.to(minus.device)
        energy = table.square().sum(1)
        ways = torch.arange(2**self.k, device=minus.device)[:, None] << (STATE - self.k)
        reached = state
        for t in reversed(range(len(minus))):
            if t == codes.shape[1] - 1:
                reached = state
            if t < codes.shape[1]:
                codes[:, t] = state & (2**self.k - 1)
            if t > 0:
                before = ways + (state >> self.k)  # (2^k, rows) states
                # the cost of each, as it was
                was = best[t - 1].gather(0, before >> self.k) + energy[before]
                if self.v == 1:
                    was.addcmul_(table[:, 0][before], minus[t - 1])
                else:
                    was += (table.T[:, before] * minus[t - 1][:, None]).sum(0)
                state = before.gather(0, was.argmin(0, keepdim=True))[0]
        return reached


_reused = threading.local()


def _record(count: int, device: torch.device) -> Tensor:
    """Work space of this thread for so many numbers: fresh pages for every call would cost as much as the call."""
    found: Tensor | None = getattr(_reused, "record", None)
    if found is None or len(found) < count or found.device != device:
        _reused.record = found = torch.empty(count, device=device)
    return found


@cache
def trellis(rate: float) -> Trellis:
    """The code of a rate in `RATES`."""
    return Trellis(*RATES[rate], load_file(TABLES)[name(rate)].float())


def name(rate: float) -> str:
    """As in the names of codecs and tables: "0.5", "3"."""
    return f"{rate:g}"


@cache
def _turn() -> Tensor:
    """(BLOCK, BLOCK) orthogonal: signs, then Hadamard's matrix."""
    matrix: Tensor = torch.ones(1, 1)
    while len(matrix) < BLOCK:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    matrix *= torch.tensor([-1.0 if SIGNS >> j & 1 else 1.0 for j in range(BLOCK)]) / BLOCK**0.5
    return matrix


def turned(rows: Tensor, back: bool = False) -> Tensor:
    """Every whole block of rows (n, d) times the orthogonal matrix, or its inverse."""
    count = rows.shape[1] // BLOCK
    if not count:
        return rows
    matrix, places = _turn().to(rows), _places(count).to(rows.device)
    found = rows.clone()
    if back:
        found[:, places] = (rows[:, : len(places)].reshape(len(rows), count, BLOCK) @ matrix).flatten(1)
    else:
        found[:, : len(places)] = (rows[:, places].view(len(rows), count, BLOCK) @ matrix.T).flatten(1)
    return found


@cache
def _places(count: int) -> Tensor:
    """Where the numbers of so many blocks stand in a row, block after block."""
    step = count * BLOCK * SECTION >> 16
    while gcd(step, count * BLOCK) > 1:
        step += 1
    return torch.arange(count * BLOCK) * step % (count * BLOCK)
