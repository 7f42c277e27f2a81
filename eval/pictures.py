"""The pictures of the evaluation report. Importing this file takes a second: import it late."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import MaxNLocator, NullLocator

from lorazip.drawing import INK, LINE, LINES, MUTED, PAPER, SERIES, drawing, log_ticks, shorten, svg
from lorazip.errors import printable
from lorazip.eval.findings import TaskRow
from lorazip.eval.phrases import LOSS
from lorazip.eval.results import BASE, ORIGINAL, Interval, Row
from lorazip.units import size

ARMS = LINES - 3  # arms of a picture of tasks, beside the original: with more, a row would be a thicket
TALLEST = 12.0  # inches of the picture of tasks; who adds rows beyond it scrolls, and compares nothing
LEAST = 12  # rows that it has room for, however many arms

Box = tuple[float, float, float, float]  # left, bottom, right, top in pixels


@dataclass(frozen=True)
class Setting:
    """A point of the picture of bytes: an arm, its bytes, its score, and the place of its colour."""

    name: str
    nbytes: int
    score: Interval
    series: int


def room(arms: int) -> int:
    """How many rows a picture of tasks has, by the number of arms."""
    return max(LEAST, int(TALLEST / _pitch(arms)))


def drawable(rows: Sequence[TaskRow]) -> list[TaskRow]:
    """The rows that have scores on the common scale."""
    return [row for row in rows if row.metric != LOSS and any(_finite(cell) for cell in _cells(row))]


def tasks(rows: Sequence[TaskRow], names: Sequence[str], arms: Sequence[str]) -> Markup:
    """A dot with its interval for the original and each arm, a row a task, in the order given.

    Args:
        rows: of `drawable`, `room` at most.
        names: of the rows.
        arms: names of the judged arms; the first `ARMS` are drawn.
    """
    arms = arms[:ARMS]
    pitch = _pitch(len(arms))
    with drawing("tasks", len(rows) * pitch + 0.8) as (canvas, axes):
        offsets = [(i - len(arms) / 2) * 0.72 / (len(arms) + 1) for i in range(len(arms) + 1)]
        for series, name in enumerate([ORIGINAL, *arms]):
            cells = [_cells(row)[series] for row in rows]
            at = [(i + offsets[series], cell) for i, cell in enumerate(cells) if cell and _finite(cell)]
            _dots(axes, at, series, name)
        bases = [(i, row.base) for i, row in enumerate(rows) if row.base and _finite(row.base)]
        if bases:
            heights, scores = [i for i, _ in bases], [100 * row.score for _, row in bases]
            axes.scatter(scores, heights, s=90, marker="|", color=MUTED, linewidth=1.2, label=BASE, zorder=1)
        axes.set_yticks(range(len(rows)), [shorten(printable(label)) for label in names])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        for i in range(len(rows) - 1):
            axes.axhline(i + 0.5, color=LINE, linewidth=0.6, zorder=0)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.spines["left"].set_visible(False)
        axes.xaxis.grid(True)
        axes.set_xlabel("score, in points of 100")
        _legend(axes)
        return svg(canvas, f"Scores of {len(rows)} tasks by arm, with intervals")


def overview(rows: Sequence[TaskRow], arms: Sequence[str]) -> Markup | None:
    """The differences to the original of all tasks, a line an arm, each sorted on its own; with intervals if it is one.

    Args:
        rows: of `drawable`.
        arms: names of the judged arms; the first `ARMS` are drawn.
    Returns:
        None if there are no differences.
    """
    lines = [
        sorted((pair.difference for pair in column if pair and _known(pair.difference)), key=_estimate)
        for column in zip(*([pair for _, pair in row.arms[:ARMS]] for row in rows), strict=True)
    ]
    if not any(lines):
        return None
    with drawing("overview", 2.8) as (canvas, axes):
        axes.axhline(0, color=MUTED, linewidth=0.8, zorder=0)
        for series, (name, line) in enumerate(zip(arms, lines, strict=False), 1):
            at = range(1, len(line) + 1)
            if len(lines) == 1:
                low, high = [100 * value.low for value in line], [100 * value.high for value in line]
                axes.fill_between(at, low, high, color=SERIES[series], alpha=0.18, linewidth=0)
            axes.plot(
                at,
                [100 * value.estimate for value in line],
                color=SERIES[series],
                linewidth=1.6,
                label=shorten(printable(name)),
            )
        axes.set_xlim(0.4, max(map(len, lines)) + 0.6)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel("tasks, each arm’s own worst first")
        axes.set_ylabel("difference, in points")
        axes.yaxis.grid(True)
        _legend(axes)
        return svg(canvas, f"Differences to the original of all {len(rows)} tasks, worst first")


def trade(settings: Sequence[Setting], original: int | None, asked: float | None, label: str) -> Markup:
    """Score against bytes, a point with its interval a setting; a line joins those that no other one beats.

    Args:
        settings: at least two, bytes positive.
        original: bytes of the original, drawn where it keeps all; None where the scale is not of what is kept.
        asked: the gate's threshold, or None.
        label: of the scale.
    """
    with drawing("trade", 4.2) as (canvas, axes):
        sizes = [point.nbytes for point in settings] + ([original] if original else [])
        axes.set_xscale("log")
        axes.set_xlim(min(sizes) / 1.3, max(sizes) * 1.6)
        front = _front(settings)
        axes.step(
            [point.nbytes for point in front],
            [100 * point.score.estimate for point in front],
            where="post",
            color=LINE,
            linewidth=1.6,
            zorder=1,
        )
        for point in settings:
            _point(axes, point)
        if original:
            axes.axhline(100, color=MUTED, linewidth=0.8, zorder=0)
            axes.plot(
                [original], [100], "o", markersize=6, markerfacecolor=PAPER, markeredgecolor=MUTED, zorder=2
            )
        if asked is not None:
            axes.axhline(100 * asked, color=INK, linewidth=0.8, dashes=(4, 3), zorder=0)
            axes.annotate(
                f"asked for: {100 * asked:.4g} %",
                (0, 100 * asked),
                (4, 2),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
            )
        ticks = log_ticks(*axes.get_xlim())
        axes.set_xticks(ticks, [size(round(tick)) for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(True)
        axes.set_xlabel("bytes on disk")
        axes.set_ylabel(label)
        axes.margins(y=0.12)
        marks = [(point.nbytes, point.score, point.name, _colour(point)) for point in settings]
        if original:
            marks.append((original, Interval(1, 1, 1, 0), ORIGINAL, MUTED))
        _name(canvas, axes, marks)
        return svg(canvas, f"{label} of {len(settings)} arms against their bytes")


def _pitch(arms: int) -> float:
    """Inches of a row with this many arms beside the original."""
    return (arms + 2) / 10


def _cells(row: TaskRow) -> list[Row | None]:
    return [row.original, *(cell for cell, _ in row.arms)]


def _finite(cell: Row | None) -> bool:
    return cell is not None and all(math.isfinite(value) for value in (cell.score, cell.low, cell.high))


def _known(value: Interval) -> bool:
    return all(map(math.isfinite, (value.estimate, value.low, value.high)))


def _estimate(value: Interval) -> float:
    return value.estimate


def _dots(axes: Axes, at: Sequence[tuple[float, Row]], series: int, name: str) -> None:
    """Dots with intervals at these heights; a label even where there are none."""
    scores = [100 * cell.score for _, cell in at]
    below = [max(0.0, score - 100 * cell.low) for score, (_, cell) in zip(scores, at, strict=True)]
    above = [max(0.0, 100 * cell.high - score) for score, (_, cell) in zip(scores, at, strict=True)]
    axes.errorbar(
        scores,
        [height for height, _ in at],
        xerr=[below, above],
        fmt="o" if series else "D",
        markersize=4 if series else 3.4,
        elinewidth=1.2,
        color=SERIES[series],
        label=shorten(printable(name)),
        zorder=3,
    )


def _colour(point: Setting) -> str:
    return SERIES[point.series % LINES]


def _point(axes: Axes, point: Setting) -> None:
    score = 100 * point.score.estimate
    axes.errorbar(
        [point.nbytes],
        [score],
        yerr=[[max(0.0, score - 100 * point.score.low)], [max(0.0, 100 * point.score.high - score)]],
        fmt="o",
        markersize=6,
        elinewidth=1.4,
        color=_colour(point),
        zorder=3,
    )


def _front(settings: Sequence[Setting]) -> list[Setting]:
    """Those that no other one beats: none is as small and scores higher."""
    front: list[Setting] = []
    for point in sorted(settings, key=lambda p: (p.nbytes, -p.score.estimate)):
        if not front or point.score.estimate > front[-1].score.estimate:
            front.append(point)
    return front


def _name(canvas: Figure, axes: Axes, marks: Sequence[tuple[int, Interval, str, str]]) -> None:
    """Write the names beside their points, where they cover neither each other nor points and intervals."""
    canvas.draw_without_rendering()
    taken: list[Box] = []
    for x, score, *_ in marks:
        for low, high, half in (
            (score.low, score.high, 2.0),
            (score.estimate, score.estimate, 5.0),
        ):
            across, bottom = axes.transData.transform((x, 100 * low))
            top = axes.transData.transform((x, 100 * high))[1]
            taken.append((across - half, bottom - half, across + half, top + half))
    for x, score, name, colour in sorted(marks, key=lambda mark: (mark[0], mark[2])):
        tried: list[tuple[int, int, Annotation, Box]] = []
        for y, dx, dy, side in _places(score):
            text = axes.annotate(
                shorten(printable(name)),
                (x, 100 * y),
                (dx, dy),
                textcoords="offset points",
                horizontalalignment=side,
                color=colour,
            )
            box = text.get_window_extent()
            hits = sum(
                box.x0 < right and left < box.x1 and box.y0 < top and bottom < box.y1
                for left, bottom, right, top in taken
            )
            hits += box.x0 < axes.bbox.x0 or box.x1 > axes.bbox.x1
            tried.append((hits, len(tried), text, (box.x0, box.y0, box.x1, box.y1)))
        best = min(tried, key=lambda attempt: attempt[:2])
        for attempt in tried:
            if attempt is not best:
                attempt[2].remove()
        taken.append(best[3])


def _places(score: Interval) -> list[tuple[float, float, float, Literal["left", "center", "right"]]]:
    """Where a name may stand, best first: beside the point, or at the ends of its interval. Offsets in points."""
    return [
        (score.estimate, 7, 4, "left"),
        (score.estimate, 7, -11, "left"),
        (score.estimate, -7, 4, "right"),
        (score.estimate, -7, -11, "right"),
        (score.high, 0, 5, "center"),
        (score.low, 0, -12, "center"),
    ]


def _legend(axes: Axes) -> None:
    """Above the picture; the base comes last, in as many columns as there is room for."""
    handles, names = axes.get_legend_handles_labels()
    found = sorted(zip(names, handles, strict=True), key=lambda pair: pair[0] == BASE)
    axes.legend(
        [handle for _, handle in found],
        [name for name, _ in found],
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=min(len(found), max(1, 130 // (6 + max(map(len, names))))),
        borderaxespad=0.2,
        columnspacing=1.5,
    )
