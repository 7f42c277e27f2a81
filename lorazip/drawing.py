"""How all pictures of our pages are drawn: SVG that stands inside the page, in the page's own fonts and colours.

Matplotlib knows neither of light and dark pages nor of their fonts: figures are drawn in the marker colours of
`_COLOURS`, which then become CSS variables, and texts stay texts. Importing this file takes a second: import it late.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator
from html import escape
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

LINES = 8  # colours of a picture
WIDTH = 10.0  # inches; the page scales pictures to its width
MAX_NAME = 34  # characters

FILE_STYLE: Any = {  # of pictures that are files of their own; Any: matplotlib wants each key as a literal type
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9.0,
    "font.size": 8.0,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "text.parse_math": False,  # names may have dollar signs
}
DARK, LIGHT = "#1f4e79", "#d08a2e"  # their colours

INK, MUTED, LINE, PAPER = "#010203", "#010204", "#010205", "#010206"
SERIES = tuple(f"#0103{i:02x}" for i in range(LINES))
_COLOURS = {INK: "var(--ink)", MUTED: "var(--muted)", LINE: "var(--line)", PAPER: "var(--paper)"} | {
    colour: f"var(--series-{i})" for i, colour in enumerate(SERIES)
}
_STYLE: Any = {  # Any: matplotlib wants each key as a literal type
    "axes.axisbelow": True,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 8.0,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,  # names may have dollar signs
    "xtick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.color": LINE,
    "ytick.labelcolor": MUTED,
}


def shorten(name: str) -> str:
    """A name that is too long for a picture ends in an ellipsis."""
    return name if len(name) <= MAX_NAME else name[: MAX_NAME - 1] + "…"


@contextlib.contextmanager
def drawing(salt: str, height: float) -> Iterator[tuple[Figure, Axes]]:
    """An empty figure in the page's style, whatever style the user's own matplotlibrc has.

    Args:
        salt: what the picture's ids are made from: pictures of one page must not share any.
        height: inches.
    """
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE | {"svg.hashsalt": salt})
        # Matplotlib measures texts by a font that lacks some scripts; the browser then draws them with its own fonts.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        canvas = Figure((WIDTH, height), layout="constrained")
        yield canvas, canvas.add_subplot()


def svg(canvas: Figure, label: str) -> Markup:
    """The figure as a part of a page: no prolog, no ids but those in use, no fonts and colours of its own."""
    file = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    canvas.savefig(file, format="svg", transparent=True, metadata=metadata)
    text = file.getvalue()
    text = text[text.index("<svg ") :]
    text = re.sub(
        r'<style.*?</style>|<metadata>.*?</metadata>|font-family: [^;"<>]*;? ?', "", text, flags=re.DOTALL
    )
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    text = re.sub("|".join(_COLOURS), lambda match: _COLOURS[match.group()], text)
    # Markup: matplotlib escapes the texts it writes.
    return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1))


def log_ticks(lowest: float, highest: float) -> list[float]:
    """Some round numbers between two others; these themselves if there are too few."""
    ticks: list[float] = []
    for steps in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
        ticks = [step * 10.0**power for power in range(-300, 16) for step in steps]
        ticks = [tick for tick in ticks if lowest <= tick <= highest]
        if len(ticks) >= 4:
            break
    return ticks[:: -(-len(ticks) // 8)] if len(ticks) > 1 else [lowest, highest]
