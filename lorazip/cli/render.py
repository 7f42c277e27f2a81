"""What the commands share in showing: progress on stderr, tables and JSON on stdout."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

import click
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from lorazip import units
from lorazip.errors import printable
from lorazip.eval.results import Interval

NAMED = 8  # of some names, how many are shown


class Report(Protocol):
    """What jobs call with the name of a phase, steps done, steps in all, and perhaps a note (a rate, say)."""

    def __call__(self, what: str, done: int, total: int, note: str = "") -> None: ...


SECONDS = 5.0  # between two lines of progress in a log


class _Rate(ProgressColumn):
    """Steps a second, once known."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "", style="progress.data.speed")


@contextlib.contextmanager
def progress() -> Iterator[Report]:
    """A callback that shows progress on stderr with rate and remaining time.

    A bar in a terminal; in a log one line every few seconds.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        TextColumn("{task.fields[note]}", style="dim"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    tasks: dict[str, TaskID] = {}
    begun: dict[str, tuple[float, int]] = {}  # when the first step was reported, and which
    last = 0.0
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:

        def report(what: str, done: int, total: int, note: str = "") -> None:
            nonlocal last
            now = time.monotonic()
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total, note=note)
                begun[what], last = (now, done), now
            bar.update(tasks[what], completed=done, total=total, note=note)
            since, first = begun[what]
            if not console.is_terminal and done > first and now - last >= SECONDS:
                last = now
                rate = (done - first) / max(now - since, 1e-9)
                left = units.duration((total - done) / rate)
                said = f", {note}" if note else ""
                click.echo(f"{what}: {done}/{total}, {rate:.1f}/s{said}, {left} left", err=True)

        yield report


def as_json(value: object) -> None:
    """Print JSON to stdout."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def some(names: Sequence[str]) -> str:
    """The first of some names, and how many there are."""
    more = f" … ({len(names)} in all)" if len(names) > NAMED else ""
    return printable(", ".join(names[:NAMED])) + more


def table(title: str, columns: list[str], rows: list[list[str]], numbers: int = 0) -> None:
    """Print a table; the last `numbers` columns are right-aligned."""
    drawn = Table(title=title, box=box.SIMPLE, title_justify="left")
    for i, column in enumerate(columns):
        drawn.add_column(column, justify="right" if i >= len(columns) - numbers else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(printable(cell)) for cell in row))
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(drawn)


def interval(value: Interval | None, sign: str = "") -> str:
    """An estimate and its interval, in per cent."""
    if value is None:
        return "-"
    return f"{100 * value.estimate:{sign}.1f} ({100 * value.low:{sign}.1f} to {100 * value.high:{sign}.1f})"
