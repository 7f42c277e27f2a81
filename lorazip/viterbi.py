"""The nearest paths through a trellis on a CPU, compiled by numba.

trellis.py tells what they are, and finds them with torch on other devices. Torch writes the costs of all states to
memory several times a step. Here a step is one loop that leaves only what the next one needs: the least cost of those
states that lead to the same successors. LANES rows go side by side, so that every operation is on whole vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

LANES = 64
# Nothing is NaN or infinite here, and sums may be rounded once instead of twice: without these, no vectors.
FAST = {"nnan", "ninf", "nsz", "contract"}
FAR = 1e30  # the cost of a state that cannot be
_one = Lock()  # of several threads that come at once, one compiles


def paths(x: Tensor, table: Tensor, k: int, sure: int, record: Tensor) -> Tensor:
    """The codes (rows, steps) int64 of the paths nearest to x.

    Args:
        x: (rows, steps, v) float32, on a CPU.
        table: (states, v) what the states stand for.
        k: bits a step.
        sure: of long rows, how many steps more are looked at than are decided (`Trellis.by_torch`).
        record: (steps + 1, states / 2^k, LANES) work space for all steps, or for as many as are looked at at a time.
    """
    rows, steps, v = x.shape
    costs, (kept, parts, _) = record.numpy(), record.shape
    search, trace = _compiled()
    entries = np.ascontiguousarray(table.numpy(), dtype=np.float32)
    energy = np.square(entries).sum(1)
    found = torch.empty(rows, steps, dtype=torch.long)
    for at in range(0, rows, LANES):
        some = x[at : at + LANES]
        minus = np.zeros((steps, v, LANES), dtype=np.float32)
        minus[..., : len(some)] = (-2 * some).permute(1, 2, 0).numpy()
        codes = np.empty((steps, LANES), dtype=np.int64)
        state = np.zeros(LANES, dtype=np.int64)
        first = 0
        while first < steps:
            end = min(first + kept - 1, steps)
            upto = end if end == steps else end - sure
            costs[0] = FAR
            costs[0, state % parts, np.arange(LANES)] = 0
            search(minus[first:end], energy, entries, k, costs)
            trace(minus[first:end], energy, entries, k, costs, codes[first:upto], state)
            first = upto
        found[at : at + LANES] = torch.from_numpy(codes[:, : len(some)].T)
    return found


def _search(minus: Any, energy: Any, table: Any, k: int, record: Any) -> None:
    """Fill in record[1:]: for every step the least costs of the states that lead to the same successors.

    Those are the states s, s + parts, s + 2 parts, …; s itself is reached from the states of place s >> k.
    |x - c|^2 goes without |x|^2, which is the same on all paths.

    Args:
        minus: (steps, v, LANES) -2 x.
        energy, table: (states,), (states, v).
        record: (steps + 1 or more, parts, LANES).
    """
    ways, parts = 1 << k, len(table) >> k
    pair = table.shape[1] == 2
    for t in range(len(minus)):
        x, y = minus[t, 0], minus[t, -1]
        for p in range(parts):
            least = record[t + 1, p]
            for lane in range(LANES):
                least[lane] = FAR
            for w in range(0, ways, 2):
                s, o = w * parts + p, w * parts + p + parts
                by, or_by = record[t, s >> k], record[t, o >> k]
                if pair:
                    for lane in range(LANES):
                        one = by[lane] + (energy[s] + table[s, 0] * x[lane] + table[s, 1] * y[lane])
                        two = or_by[lane] + (energy[o] + table[o, 0] * x[lane] + table[o, 1] * y[lane])
                        least[lane] = min(least[lane], min(one, two))
                else:
                    for lane in range(LANES):
                        one = by[lane] + (energy[s] + table[s, 0] * x[lane])
                        two = or_by[lane] + (energy[o] + table[o, 0] * x[lane])
                        least[lane] = min(least[lane], min(one, two))


def _trace(minus: Any, energy: Any, table: Any, k: int, record: Any, codes: Any, state: Any) -> None:
    """Follow the best paths back from the last step.

    Args:
        codes: (steps or fewer, LANES) the first codes of the paths, filled in.
        state: (LANES,) the states after these, filled in.
    """
    steps, v, _ = minus.shape
    parts = len(table) >> k
    place = np.zeros(LANES, dtype=np.int64)
    for p in range(parts):
        for lane in range(LANES):
            if record[steps, p, lane] < record[steps, place[lane], lane]:
                place[lane] = p
    for t in range(
        steps - 1, -1, -1
    ):  # all lanes at a time, so that every step's record comes to the cache once
        for lane in range(LANES):
            least, best = np.float32(np.inf), place[lane]
            for s in range(place[lane], len(table), parts):
                cost = energy[s]
                for i in range(v):
                    cost += table[s, i] * minus[t, i, lane]
                cost += record[t, s >> k, lane]
                if cost < least:
                    least, best = cost, s
            if t == len(codes) - 1:
                state[lane] = best
            if t < len(codes):
                codes[t, lane] = best & ((1 << k) - 1)
            place[lane] = best >> k


def _compiled() -> tuple[Callable[..., None], Callable[..., None]]:
    """Search and trace, as machine code: a second, once a process; nothing is written to a disk."""
    with _one:
        return _made()


@cache
def _made() -> tuple[Callable[..., None], Callable[..., None]]:
    import numba  # only where rows are encoded: it takes a while to come

    return numba.njit(nogil=True, fastmath=FAST)(_search), numba.njit(nogil=True)(_trace)
