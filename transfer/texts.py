"""Inputs of a task as texts: seeds read from a file, new ones screened, overlaps measured.

These texts may be private. No message, figure or name here holds any of them.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lorazip import rows

LEAST_SEEDS = 5  # Trans-LoRA shows five
LONGER = 3.0  # times the longest seed: what is longer is no input of this task
N = 8  # characters of the n-grams that overlap is measured by: longer than most words


def read_seeds(path: Path) -> list[str]:
    """As `rows.texts`, stripped, at least `LEAST_SEEDS` that differ by more than case and spaces. Raises InputError."""
    found = unseen((text.strip() for text in rows.texts(path)), ())
    if len(found) < LEAST_SEEDS:
        problem = f"has {len(found)} different inputs, synthesis needs {LEAST_SEEDS}"
        raise rows.defect(path, problem, "add example inputs of the task, or give inputs.prompts")
    return found


def plain(text: str) -> str:
    """By what two inputs are the same: letters' case, width of signs and spaces do not count."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())  # folding may part what was composed


@dataclass
class Screen:
    """Takes new inputs in order and keeps what may be one of the task.

    Attributes:
        seeds: what the task's inputs look like.
        counts: why others were not kept, and how many.
    """

    seeds: Sequence[str]
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._seen = {plain(seed) for seed in self.seeds}
        self._longest = LONGER * max(map(len, self.seeds))
        self._shortest = min(map(len, self.seeds)) / LONGER
        self._lines = any("\n" in seed for seed in self.seeds)

    def take(self, text: str, finished: bool) -> str | None:
        """The input, stripped; None where it is not kept.

        Args:
            finished: whether the model ended it itself, and not the limit of tokens.
        """
        text = text.strip()
        why = self._why_not(text, finished)
        if why:
            self.counts[why] += 1
            return None
        self._seen.add(plain(text))
        return text

    def _why_not(self, text: str, finished: bool) -> str:
        if not text:
            return "empty"
        if not finished or len(text) > self._longest:
            return "too long"
        if len(text) < self._shortest:
            return "too short"
        if not self._lines and "\n" in text:
            return "more than one line"
        if plain(text) in self._seen:
            return "repeated"
        return ""


@dataclass(frozen=True)
class Overlap:
    """How near synthetic inputs come to the seeds they were made from: a leak check.

    Attributes:
        nearest: the largest share of a synthetic input's n-grams that one single seed has.
        mean: of every synthetic input's nearest seed.
        copies: synthetic inputs all of whose n-grams are in one seed.
    """

    n: int
    nearest: float
    mean: float
    copies: int


def overlap(synthetic: Sequence[str], seeds: Sequence[str], n: int = N) -> Overlap:
    """The overlap in character n-grams, of `plain` texts; one shorter than n is looked for as a whole."""
    known = [(whole, _grams(whole, n)) for whole in map(plain, seeds)]
    shares = []
    for text in map(plain, synthetic):
        grams = _grams(text, n)
        near = (len(grams & some) / len(grams) if len(text) >= n else text in whole for whole, some in known)
        shares.append(max(map(float, near), default=0.0))
    if not shares:
        return Overlap(n, 0.0, 0.0, 0)
    return Overlap(n, max(shares), sum(shares) / len(shares), sum(share == 1 for share in shares))


def _grams(text: str, n: int) -> set[str]:
    return {text[i : i + n] for i in range(max(1, len(text) - n + 1))}


def unseen(texts: Iterable[str], known: Iterable[str]) -> list[str]:
    """Those that are not among the known, in order, each once."""
    seen = {plain(text) for text in known}
    found = []
    for text in texts:
        if plain(text) not in seen:
            seen.add(plain(text))
            found.append(text)
    return found
