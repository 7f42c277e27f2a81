"""Every way lorazip can refuse, one class a kind, each with the exit code of the command that met it.

Exit codes (docs: README): 0 ok, 1 a check failed, 2 usage or bad input, 3 could not decide.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Defect:
    """One thing that is wrong with one input, and the way out.

    Attributes:
        adapter: name of the adapter (or the path as given, when it has no name yet).
        module: dotted module name in the base model, or "" when the defect is not about one module.
        tensor: tensor key in the file, or "".
        problem: what is wrong, one sentence without a full stop.
        remedy: what the user can do about it, or "".
    """

    adapter: str
    module: str = ""
    tensor: str = ""
    problem: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        where = ": ".join(printable(part) for part in (self.adapter, self.module, self.tensor) if part)
        remedy = f" ({printable(self.remedy)})" if self.remedy else ""
        return f"{where}: {printable(self.problem)}{remedy}"


ALIKE = 3  # defects of one adapter that only differ in their place are all told; of more, one and how many


def told(defects: Iterable[Defect]) -> list[str]:
    """A line for each defect, in order; of many that are alike, the first and a count of the others."""
    alike: dict[tuple[str, str, str], list[Defect]] = {}
    for defect in defects:
        alike.setdefault((defect.adapter, defect.problem, defect.remedy), []).append(defect)
    lines: list[str] = []
    for (adapter, *_), group in alike.items():
        if len(group) <= ALIKE:
            lines += map(str, group)
        else:
            lines += [str(group[0]), f"{printable(adapter)}: {len(group) - 1} more like it"]
    return lines


def printable(text: str) -> str:
    """Names come from untrusted files: escape control characters so that they cannot rewrite a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class LorazipError(Exception):
    """Base of every error that a user is meant to read; `exit_code` is what the command returns."""

    exit_code = 2


class UsageError(LorazipError):
    """The options contradict each other or are out of range."""


class InputError(LorazipError):
    """One or more adapters cannot be used; `defects` lists all of what is wrong."""

    def __init__(self, defects: Sequence[Defect]):
        self.defects = tuple(sorted(defects))
        super().__init__("\n".join(told(self.defects)))


class CodecError(LorazipError):
    """A tensor cannot be stored with the chosen codec (float16 overflow, say)."""


class TargetError(LorazipError):
    """The output exists already, cannot be written, or is being written by another process."""


class BundleError(LorazipError):
    """A bundle is damaged, truncated, of another version, or not a bundle."""

    exit_code = 1


class CheckError(LorazipError):
    """An evaluation cannot be trusted: an adapter does not act in the model as its factors say."""

    exit_code = 1


class TransferError(LorazipError):
    """A transfer cannot go on, or its result is worse than the model without it and is refused."""

    exit_code = 1


class ServeError(LorazipError):
    """The process of an arm of `bench serve` failed; the arms that finished are in the results."""


class UndecidedError(LorazipError):
    """The data do not determine an answer (a target energy that no rank reaches on held-out adapters)."""

    exit_code = 3
