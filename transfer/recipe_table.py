"""Recipes of a job: one, or one for every line of a table of adapters (`--table`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorazip import names, rows
from lorazip.errors import Defect, InputError, UsageError, printable
from lorazip.transfer import recipe as recipes
from lorazip.transfer import recipe_file
from lorazip.transfer.recipe import Recipe

COLUMNS = {
    "adapter": ("source", "adapter"),
    "name": ("source", "name"),
    "definition": ("inputs", "definition"),
    "seeds": ("inputs", "seeds"),
    "prompts": ("inputs", "prompts"),
    "discriminator": ("filter", "discriminator"),
    "tests": ("gate", "tests"),
}  # of a table of many adapters -> table and key of the recipe
LINE = '{"adapter": "…", "seeds": "…"}'  # of a table
_FILES = ("adapter", "seeds", "prompts", "discriminator", "tests")


def recipes_of(
    tables: Mapping[str, Any], table: Path | None, where: str = "recipe", *, probed: bool = False
) -> list[Recipe]:
    """The recipe, or one for every line of a table of adapters.

    Args:
        tables: TOML tables, see `recipe.parse`.
        table: JSON lines, with columns of `COLUMNS`; paths in it are relative to it.
        probed: they are only for the stage `probe`, which needs no inputs.
    Raises:
        UsageError: the recipe is not as it should be, or two names of the table are alike; InputError: the table cannot
            be read, or lines are not as they should be: all of them, up to one that is no JSON.
    """
    if table is None:
        return [recipes.parse(tables, where, probed=probed)]
    found: list[Recipe] = []
    wrong: list[Defect] = []
    try:
        for number, row in rows.lines(table):
            line = f"{table}: line {number}"
            problem, remedy = _problem(row)
            if problem:
                wrong.append(Defect(line, problem=problem, remedy=remedy))
                continue
            try:
                found.append(recipes.parse(_with(tables, row, table.parent), line, probed=probed))
            except UsageError as error:  # a line of text for each key, which begins with the place
                told = [text.removeprefix(f"{line}: ") for text in str(error).splitlines()]
                wrong += [Defect(line, problem=text) for text in told]
    except InputError as error:  # no JSON from here on
        wrong += [replace(defect, remedy=LINE) for defect in error.defects]
    if wrong:
        raise InputError(wrong)
    if not found:
        raise InputError([Defect(str(table), problem="has no line", remedy=LINE)])
    require_different(one.source.name or Path(one.source.adapter).name for one in found)
    return found


def _problem(row: Mapping[str, Any]) -> tuple[str, str]:
    """What is wrong with a line of a table, and the way out; empty where nothing is."""
    unknown = [name for name in row if name not in COLUMNS]
    if unknown or not all(isinstance(value, str) for value in row.values()):
        problem = f"{unknown[0]!r} is no column" if unknown else "holds more than texts"
        return printable(problem), f"there are {', '.join(COLUMNS)}"
    return ("", "") if "adapter" in row else ("names no adapter", LINE)


def _with(tables: Mapping[str, Any], row: Mapping[str, str], folder: Path) -> dict[str, Any]:
    """The recipe's tables with what a line says; paths in it are relative to the folder."""
    found = {name: dict(table) if isinstance(table, dict) else table for name, table in tables.items()}
    for name, value in row.items():
        if name in _FILES and value:
            value = recipe_file.beside(folder, value, name)
        section, key = COLUMNS[name]
        if isinstance(found.setdefault(section, {}), dict):  # else parse says what it is
            found[section][key] = value
    return found


def require_different(chosen: Iterable[str]) -> None:
    """Raises UsageError: two of these names would be one file somewhere."""
    for name, group in names.twins(chosen).items():
        given = printable(", ".join(group))
        raise UsageError(f"two transfers are called {printable(name)} ({given}): give names in the table")
