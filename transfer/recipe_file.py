"""The tables of a recipe: read from a TOML file, single keys replaced. What they mean is checked in recipe.py."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorazip.errors import UsageError, printable

PATHS = {
    "source": ("base", "adapter"),
    "target": ("base",),
    "inputs": ("seeds", "prompts", "generator"),
    "filter": ("discriminator",),
    "gate": ("tests",),
}
HUB = ("base", "adapter", "generator")  # keys that may name something on the Hub


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The tables of a recipe file, with paths in them relative to the file.

    Raises:
        UsageError: it cannot be read, or is no TOML.
    """
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} cannot be read as a recipe: it is no file")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path} cannot be read as a recipe: {error}") from error
    for table, keys in PATHS.items():
        found = tables.get(table)
        if isinstance(found, dict):
            for key in keys:
                value = found.get(key)
                if isinstance(value, str) and value:
                    found[key] = beside(path.parent, value, key)
    return tables


def beside(folder: Path, value: str, key: str) -> str:
    """A path as the file in `folder` means it. What stands in the working directory by chance is not meant.

    A Hub id (org/name) that is no file there stays what it is, and so does the word for a generator.
    """
    hub = value.count("/") == 1 and not value.startswith((".", "/")) and not Path(value).exists()
    word = key == "generator" and value in ("target", "source", "expert")
    if word or (key in HUB and hub and not (folder / value).exists()):
        return value
    return str(folder / value)


def overridden(tables: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """The tables with single keys replaced: TABLE.KEY=VALUE, VALUE as in TOML; a text needs no quotes.

    Raises:
        UsageError: a setting is not of this form.
    """
    found = {name: dict(table) if isinstance(table, dict) else table for name, table in tables.items()}
    for text in settings:
        place, equals, value = text.partition("=")
        table, dot, key = place.partition(".")
        if not (equals and dot and table and key):
            raise UsageError(f"{printable(place)!r}=… is no TABLE.KEY=VALUE (for example train.rank=16)")
        try:  # in brackets, so that what TOML takes for a comment is text all the same
            (parsed,) = tomllib.loads(f"value = [{value}]")["value"]
        except (tomllib.TOMLDecodeError, ValueError):
            parsed = value
        inside = found.setdefault(table, {})
        if isinstance(inside, dict):
            inside[key] = parsed
    return found
