"""The picture of a frontier: error, and what the tasks keep, beside the ratio. Importing this takes a second."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from lorazip.drawing import DARK, FILE_STYLE, LIGHT

if TYPE_CHECKING:
    from lorazip.compress.sweep import Frontier

PANEL, HEIGHT = 5.0, 3.4  # inches: the width of a panel, the height of the picture


def plot(found: Frontier) -> str:
    """Mean and worst error by ratio on logarithmic axes; where it was evaluated, the kept score too. SVG."""
    judged = any(point.kept for point in found.points)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(FILE_STYLE | {"svg.hashsalt": "frontier"})
        canvas = Figure((PANEL * (1 + judged), HEIGHT), layout="constrained")
        panels = canvas.subplots(1, 1 + judged, squeeze=False)[0]
        _errors(panels[0], found)
        if judged:
            _kept(panels[1], found)
        for axes in panels:
            _ratios(axes, [point.ratio for point in found.points if point.ratio])
        file = io.StringIO()
        canvas.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        return file.getvalue()


def _errors(axes: Axes, found: Frontier) -> None:
    for label, colour, name in (("mean", DARK, "mean_error"), ("worst adapter", LIGHT, "max_error")):
        # Zero has no logarithm: an exact bundle is not drawn.
        pairs = [(p.ratio, getattr(p, name)) for p in found.points if p.ratio and getattr(p, name)]
        if pairs:
            ratios, errors = zip(*pairs, strict=True)
            style = "--" if found.predicted else "-"
            axes.plot(
                ratios, errors, style, color=colour, linewidth=1.4, marker="o", markersize=4, label=label
            )
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.legend(loc="lower right")
    axes.set_title("error, predicted" if found.predicted else "error")


def _kept(axes: Axes, found: Frontier) -> None:
    kept = [(p.ratio, p.kept) for p in found.points if p.kept and p.ratio]
    for ratio, interval in kept:
        ends = [100 * interval["low"], 100 * interval["high"]]
        axes.plot([ratio] * 2, ends, color=DARK, linewidth=1.2, marker="_", markersize=7)
    estimates = [100 * interval["estimate"] for _, interval in kept]
    axes.plot([r for r, _ in kept], estimates, color=DARK, linewidth=1.4, marker="o", markersize=4)
    axes.axhline(100, color=LIGHT, linewidth=0.8, dashes=(4, 3))
    axes.set_title("score kept, % of the originals', with 95 % intervals")


def _ratios(axes: Axes, ratios: list[float]) -> None:
    """The axis of the ratios: logarithmic, a mark at every point."""
    if ratios:
        axes.set_xscale("log")
        axes.set_xticks(ratios, [f"{ratio:.3g}" for ratio in ratios])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", which="minor", length=0)
    axes.set_xlabel("times smaller")
    axes.grid(True)
