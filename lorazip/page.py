"""Our pages: HTML that needs nothing but itself.

A page has no scripts, and its content security policy forbids them and every request: names come from strangers'
files. They are escaped by jinja2, and by matplotlib in pictures; characters that are not printable, those that turn
the direction of the text among them, are shown as escapes.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from lorazip import __version__, units
from lorazip.errors import printable


def template(name: str) -> jinja2.Template:
    """The template of this name. Undefined names in it are errors."""
    return _environment().get_template(name)


def _shown(value: object) -> object:
    """What a page shows of a value: whatever it is, it rewrites nothing around it."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _prose(text: str) -> Markup:
    """A text of many lines, for an element that keeps them; tabs are kept, too."""
    lines = text.replace("\r\n", "\n").split("\n")
    return Markup("\n").join(
        Markup("\t").join(escape(printable(part)) for part in line.split("\t")) for line in lines
    )


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lorazip"),
        autoescape=True,
        finalize=_shown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["version"] = __version__
    environment.filters |= {
        "size": units.size,
        "figure": units.figure,
        "times": units.times,
        "share": units.share,
        "duration": units.duration,
        "counted": units.counted,
        "shape": units.shape,
        "prose": _prose,
        "last_part": lambda path: Path(path).name,
    }
    return environment
