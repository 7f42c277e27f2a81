"""Lists of small numbers in a manifest: which of the forms (layouts) that are listed once each module has.

Equal neighbours are written as runs. Where every module has another form, as by auto, digits of base 64 are far shorter
(docs/FORMAT.md).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"  # of base 64
SAVED = 16  # bytes that a text of digits must save: short lists are left readable


def runs(values: Iterable[int]) -> list[int | list[int]]:
    """[3, 0, 0, 0, 1] -> [3, [0, 3], 1]: a run of equal values as [value, count]."""
    packed: list[list[int]] = []
    for value in values:
        if packed and packed[-1][0] == value:
            packed[-1][1] += 1
        else:
            packed.append([value, 1])
    return [run[0] if run[1] == 1 else run for run in packed]


def shorter(values: Sequence[int]) -> list[int | list[int]] | str:
    """Runs, or where that is much shorter, a text of one or two digits of base 64 for each value plus 1."""
    found = runs(values)
    digits = 1 if max(values) + 1 < 64 else 2
    if (
        max(values) + 1 >= 64**2
        or len(json.dumps(found, separators=(",", ":"))) < digits * len(values) + 2 + SAVED
    ):
        return found
    return "".join(DIGITS[(v + 1) // 64 ** (digits - 1 - d) % 64] for v in values for d in range(digits))


def undigit(text: str, length: int) -> list[int]:
    """The inverse of the texts of `shorter`."""
    digits = len(text) // length
    if digits not in (1, 2) or len(text) != digits * length:
        raise ValueError(f"a text of {len(text)} digits for {length} modules")
    places = [DIGITS.find(digit) for digit in text]
    if min(places) < 0:
        raise ValueError(f"{text[places.index(-1)]!r} is not a digit of base 64")
    return [
        sum(place * 64 ** (digits - 1 - d) for d, place in enumerate(places[at : at + digits])) - 1
        for at in range(0, len(places), digits)
    ]


def unrun(packed: Any, length: int, below: int, what: str, least: int = 0) -> list[int]:
    """The inverse of `runs`. Raises ValueError or TypeError for what is no list of `length` numbers from least on."""
    values: list[int] = []
    for item in packed:
        value, count = (item, 1) if type(item) is int else item
        if (
            type(value) is not int
            or not least <= value < below
            or type(count) is not int
            or not 0 < count <= length - len(values)
        ):
            raise ValueError(f"{what}: {item!r}")
        values += [value] * count
    if len(values) != length:
        raise ValueError(f"{what} has {len(values)} entries for {length} modules")
    return values
