"""Numbers as people read them: bytes, errors, times, counts, shapes."""

from __future__ import annotations

from collections.abc import Sequence


def size(nbytes: int) -> str:
    """Bytes in decimal units, three digits: 999 B, 2.47 MB, 9.4 GB."""
    value, unit = float(nbytes), 0
    while value >= 999.5 and unit < 4:
        value, unit = value / 1000, unit + 1
    return f"{nbytes} B" if unit == 0 else f"{_three(value)} {'kMGT'[unit - 1]}B"


def figure(value: float) -> str:
    """An error with three significant digits: 0, 0.163, 1.2e-07."""
    if value == 0:
        return "0"
    return f"{value:.3g}" if value < 1e-4 else f"{value:.4f}" if value < 0.01 else f"{value:.3f}"


def times(value: float) -> str:
    """How many times smaller: 6.38×, 24.1×, 130×."""
    return f"{_three(value)}×"


def share(part: float) -> str:
    """A part of the whole: 84.8 %, < 0.1 %, 0 %."""
    return "< 0.1 %" if 0 < part < 0.0005 else f"{part:.1%}".replace("%", " %")


def duration(seconds: float) -> str:
    """Wall time, three digits: 4.81 s, 12.1 min, 1.05 h."""
    for limit, divisor, unit in ((99.95, 1, "s"), (5997, 60, "min")):
        if seconds < limit:
            return f"{_three(seconds / divisor)} {unit}"
    return f"{_three(seconds / 3600)} h"


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number and its noun: 1 adapter, 1,200 adapters."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def shape(sides: Sequence[int]) -> str:
    """576 × 192; "scalar" for ()."""
    return " × ".join(map(str, sides)) or "scalar"


def _three(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"
