"""The pictures of the compression report. Importing this file takes a second: import it late."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from markupsafe import Markup
from matplotlib.colors import LogNorm
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from lorazip.compress.findings import Kind
from lorazip.drawing import INK, PAPER, SERIES, drawing, log_ticks, shorten, svg
from lorazip.units import figure

MAX_NAMES = 50  # beside a heat map
MAX_KINDS = 30  # below it
ROW = 0.22  # inches of a heat map's row, as long as it has room
TALLEST = 7.0  # inches of a heat map
DECADES = 4  # of its scale: factors kept bit for bit must not take the colours from all others


def bars(errors: Sequence[float], shared: Sequence[bool], bound: float | None) -> Markup:
    """One bar an adapter, in the order given.

    Args:
        errors: (n,) err_i.
        shared: (n,) whether the adapter is in a shared-init group; the two sorts differ in colour if both occur.
        bound: the bound on the error that was asked for, or None.
    """
    with drawing("bars", 2.5) as (canvas, axes):
        sorts = {"started from a shared A": True, "started from an A of its own": False}
        both = len(set(shared)) == 2
        for series, (label, sort) in enumerate(sorts.items()):
            at = [i for i, is_shared in enumerate(shared) if is_shared == sort]
            if at:
                heights = [errors[i] for i in at]
                # Many bars touch, with sharp edges, so that no seams are seen.
                many = len(errors) > 100
                axes.bar(
                    [i + 1 for i in at],
                    heights,
                    width=1 if many else 0.8,
                    antialiased=not many,
                    color=SERIES[series * both],
                    label=label,
                )
        # The higher one's label stands on its line, the lower one's below: they never meet.
        marks = [("mean", sum(errors) / len(errors))] + [("bound", b) for b in (bound,) if b is not None]
        for i, (name, height) in enumerate(sorted(marks, key=lambda mark: -mark[1])):
            axes.axhline(height, color=INK, linewidth=0.8, dashes=(4, 3))
            axes.annotate(
                f"{name} {figure(height)}",
                xy=(1, height),
                xycoords=("axes fraction", "data"),
                xytext=(4, 0),
                textcoords="offset points",
                verticalalignment="center" if len(marks) == 1 else ("bottom", "top")[i],
            )
        axes.set_xlim(0.4, len(errors) + 0.6)
        axes.set_xlabel("adapters, worst first")
        axes.set_ylabel("error")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.yaxis.grid(True)
        if both:
            axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0)
        return svg(canvas, f"Error of each of {len(errors)} adapters, worst first")


def heat_map(errors: Tensor, names: Sequence[str], kinds: Sequence[tuple[str, int]]) -> Markup:
    """Errors of adapters (rows) and modules (columns) in logarithmic colours.

    Args:
        errors: (n, m), NaN where an adapter lacks the module.
        names: (n) of the adapters.
        kinds: of modules from left to right, and how many columns each has; m in all.
    """
    n, m = errors.shape
    with drawing("heat-map", min(TALLEST, ROW * n) + 0.8) as (canvas, axes):
        lowest, highest = _limits(errors)
        image = axes.imshow(
            errors.clamp_min(
                lowest
            ).numpy(),  # zero has no logarithm: exact cells get the colour of the least error
            "viridis",
            norm=LogNorm(lowest, highest),
            aspect="auto",
            interpolation="none",
        )
        step = -(-n // MAX_NAMES)
        axes.set_yticks(range(0, n, step), [shorten(name) for name in names[::step]])
        ends = list(accumulate(width for _, width in kinds))
        middles = [end - (width + 1) / 2 for end, (_, width) in zip(ends, kinds, strict=True)]
        step = -(-len(kinds) // MAX_KINDS)
        labels = [shorten(kind) for kind, _ in kinds[::step]]
        axes.set_xticks(middles[::step], labels, rotation=90 if len(kinds) > 8 else 0)
        for end in ends[:-1] if len(kinds) <= MAX_KINDS else []:
            axes.axvline(end - 0.5, color=PAPER, linewidth=1.2)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        scale = canvas.colorbar(image, pad=0.01, fraction=0.03, aspect=30)
        ticks = log_ticks(lowest, highest)
        scale.set_ticks(ticks, labels=[figure(tick) for tick in ticks])
        scale.ax.minorticks_off()
        scale.ax.spines[:].set_visible(False)
        return svg(canvas, f"Error of {n} adapters in {m} modules, in logarithmic colours")


def spectra(kinds: Sequence[Kind]) -> Markup:
    """Share of energy by number of singular values; a line and a band (least to greatest) a kind, `LINES` at most."""
    with drawing("spectra", 3.2) as (canvas, axes):
        for kind, colour in zip(kinds, SERIES, strict=False):
            ranks = range(1, len(kind.mean) + 1)
            axes.fill_between(ranks, kind.low, kind.high, color=colour, alpha=0.15, linewidth=0)
            marker = "o" if len(ranks) <= 32 else ""
            name = shorten(kind.name)
            axes.plot(
                ranks, kind.mean, color=colour, linewidth=1.4, marker=marker, markersize=3.5, label=name
            )
        least = min((share for kind in kinds for share in kind.low), default=0.0)
        axes.set_ylim(math.floor(10 * least - 0.1) / 10, 1.03)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axes.set_xlabel("singular values kept")
        axes.set_ylabel("share of the energy")
        axes.grid(True)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        return svg(canvas, "Share of energy in the largest singular values, by kind of module")


def _limits(errors: Tensor) -> tuple[float, float]:
    """The ends of the scale: the greatest error, and the least positive one or what lies `DECADES` lower."""
    positive = errors[errors > 0]  # NaN is not
    if not len(positive):
        return 0.1, 1.0
    highest = float(positive.max())
    lowest = max(float(positive.min()), highest * 10.0**-DECADES)
    return (lowest, highest) if lowest < 0.9 * highest else (highest / 2, highest)
