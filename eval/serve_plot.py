"""The picture of a serving benchmark: throughput beside latency, a line an arm. Importing this takes a second."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.figure import Figure

from lorazip.drawing import DARK, FILE_STYLE, LIGHT

if TYPE_CHECKING:
    from lorazip.eval.serve_records import Row

WIDTH, ROW, AROUND = 10.0, 0.62, 1.1  # inches: of the picture, of an arm, of titles and axes
MAX_NAME = 34  # characters


def plot(rows: Sequence[Row], rate: float) -> str:
    """Output tokens a second (bars) and p50, p90, p99 of both latencies (points on a line), as SVG.

    Args:
        rows: of the arms, at least one; the first is drawn on top.
        rate: requests a second, for the title.
    """
    names = [row.arm if len(row.arm) <= MAX_NAME else row.arm[: MAX_NAME - 1] + "…" for row in rows]
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(FILE_STYLE | {"svg.hashsalt": "serve"})
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the viewer has fonts of its own
        canvas = Figure((WIDTH, ROW * len(rows) + AROUND), layout="constrained")
        left, right = canvas.subplots(1, 2, sharey=True)
        speed = [row.output_tokens_per_second for row in rows]
        left.barh(range(len(rows)), speed, height=0.6, color=DARK)
        for at, value in enumerate(speed):
            left.annotate(f"{value:,.0f}", (value, at), (3, 0), textcoords="offset points", va="center")
        left.set_xlim(0, 1.15 * max(speed))
        left.set_yticks(range(len(rows)), names)
        left.invert_yaxis()
        left.set_title("output tokens a second")
        series = (("to the first token", LIGHT, -0.15), ("to the last token", DARK, 0.15))
        for label, colour, shift in series:
            found = [row.ttft if colour == LIGHT else row.latency for row in rows]
            for at, q in enumerate(found):
                marks = (q.p50, q.p90, q.p99)
                right.plot(marks, [at + shift] * 3, color=colour, linewidth=1.2)
                right.scatter(
                    marks, [at + shift] * 3, s=(26, 14, 7), color=colour, label=None if at else label
                )
        when = "all at once" if math.isinf(rate) else f"{rate:g} requests a second"
        right.set_title(f"seconds from arrival ({when}): large p50, smaller p90, least p99")
        right.set_xlim(left=0)
        right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
        for axes in (left, right):
            axes.xaxis.grid(True)
            axes.tick_params(axis="y", length=0)
        file = io.StringIO()
        canvas.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        return file.getvalue()
