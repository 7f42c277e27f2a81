"""The picture of frontier.py: error against ratio, both logarithmic, a line for each method."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

SIZE = (8.0, 5.0)  # inches
COLOURS = (
    "#000000", "#0072b2", "#d55e00", "#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#999999", "#6a3d9a",
)  # fmt: skip  # told apart by colour-blind readers too


def draw(path: Path, lines: Iterable[tuple[str, list[tuple[float, float]]]]) -> bool:
    """Write the picture; False where there is nothing to draw.

    Args:
        lines: (title, (ratio, error) points) of each method, ours first.
    """
    known = list(lines)
    if not known:
        return False
    # The same points are the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "frontier", "svg.fonttype": "none"}):
        figure = Figure(SIZE, layout="constrained")
        axes = figure.subplots()
        for place, ((title, points), colour) in enumerate(zip(known, COLOURS, strict=False)):
            ratios, errors = zip(*points, strict=True)
            width = 1.4 if place else 2.6
            axes.plot(ratios, errors, color=colour, linewidth=width, marker="o", markersize=4, label=title)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(lambda ratio, _: f"{ratio:g}")
        axes.set_xlabel("ratio: bytes of the originals over every byte of the bundle")
        axes.set_ylabel("mean error")
        axes.grid(True, which="both", color="#dddddd", linewidth=0.6)
        axes.legend(frameon=False)
        figure.savefig(path, metadata={"Date": None})
    return True
