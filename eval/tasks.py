"""Tasks: examples with right answers, read from JSONL files, directories of them, or whatever `datasets` reads."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lorazip import rows
from lorazip.errors import Defect, InputError, UsageError, printable
from lorazip.rows import REMEDY, defect

INDEX = "tasks.jsonl"
SPLITS = ("train", "validation", "test")
FIELDS = ("input", "output", "references", "choices", "split")
_MARKS = ("dataset_dict.json", "dataset_info.json", "state.json")  # a directory of datasets' save_to_disk
_FILES = {".jsonl": rows.lines, ".csv": rows.cells, ".json": rows.json, ".parquet": rows.parquet}


@dataclass(frozen=True)
class Example:
    """One question and its right answers.

    Attributes:
        output: the right answer; for exact match the only one.
        references: all right answers, `output` among them.
        choices: what may be answered, `output` among them; empty where the task is not multiple choice.
    """

    input: str
    output: str
    references: tuple[str, ...]
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """A named set of examples.

    Attributes:
        definition: the instruction that goes before every input; None where there is none.
        examples: those to be scored, in the order of the file.
        shots: examples of the split `train`, for few-shot prompts; never scored. Empty where there is no such split.
        metric: the metric that the task's index names, or None.
        source: the file or data set, for messages.
    """

    name: str
    definition: str | None
    examples: tuple[Example, ...]
    shots: tuple[Example, ...] = field(repr=False)
    metric: str | None
    source: str


@dataclass(frozen=True)
class Found:
    """Where a task lies: files by split (None: the lines say themselves), or a data set of `datasets`."""

    name: str
    files: Mapping[str | None, Path]
    dataset: tuple[str, str | None] | None = None
    index: Mapping[str, Any] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """The first file, or the data set, for messages."""
        return self.dataset[0] if self.dataset else str(next(iter(self.files.values())))


def find(sources: Sequence[str]) -> dict[str, list[Found]]:
    """Look for tasks: name -> where tasks of that name lie (more than one is an error only if it is wanted).

    A source is a directory, searched below: every FILE.jsonl is a task named FILE, and a directory with train.jsonl,
    validation.jsonl or test.jsonl is a task named as the directory; tasks.jsonl beside them is an index, a line a
    task: {"task": FILE, "definition" or "instruction": …, "metric": …, "choices": …}. Or a single file (JSONL, CSV,
    Parquet); or a directory that `datasets` saved; or a data set of the Hub, `org/name` or `org/name:config`.

    Raises:
        InputError: a source is none of these, holds no task, or an index is broken.
    """
    found: dict[str, list[Found]] = defaultdict(list)
    for source in sources:
        path = Path(source)
        if path.is_dir() and not any((path / mark).exists() for mark in _MARKS):
            tasks: Iterable[Found] = _below(source, path)
        elif path.is_file() and path.suffix in _FILES:
            tasks = [_named(path, _index(path.parent / INDEX))]
        elif path.is_dir():
            tasks = [Found(path.resolve().name, {}, (source, None))]
        elif path.exists() or source.count("/") != 1 or source.startswith((".", "/")):
            kinds = "a directory of JSONL files, a JSONL, CSV or Parquet file, or a data set of the Hub (org/name)"
            raise InputError([Defect(source, problem="is no source of tasks", remedy=f"name {kinds}")])
        else:
            name, _, config = source.partition(":")
            tasks = [Found(name.split("/")[1], {}, (name, config or None))]
        for task in tasks:
            found[task.name].append(task)
    return dict(found)


def _below(source: str, root: Path) -> list[Found]:
    found = [task for folder, files in _folders(root) for task in _inside(folder, files)]
    if not found:
        remedy = "of a CSV or Parquet file, or what datasets saved, name the path itself"
        raise defect(source, "holds no tasks: there is no JSONL file below it", remedy)
    return found


def _folders(root: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Every directory below that is not hidden, with its JSONL files; links to directories are not followed."""

    def refuse(error: OSError) -> None:
        raise defect(
            str(error.filename), f"cannot be searched: {error.strerror}", "check its rights"
        ) from error

    for folder, below, files in os.walk(root, onerror=refuse):
        below[:] = sorted(name for name in below if not name.startswith("."))
        names = sorted(name for name in files if name.endswith(".jsonl") and not name.startswith("."))
        yield Path(folder), [Path(folder) / name for name in names]


def _inside(folder: Path, files: Sequence[Path]) -> Iterator[Found]:
    if files:
        index = _index(folder / INDEX)
        parts: dict[str | None, Path] = {path.stem: path for path in files if path.stem in SPLITS}
        if parts:
            name = folder.resolve().name
            yield Found(name, parts, index=index.get(name, {}))
        yield from (_named(path, index) for path in files if path.stem not in SPLITS and path.name != INDEX)


def _named(path: Path, index: Mapping[str, Mapping[str, Any]]) -> Found:
    if path.stem in SPLITS:
        name = path.resolve().parent.name
        return Found(name, {path.stem: path}, index=index.get(name, {}))
    return Found(path.stem, {None: path}, index=index.get(path.stem, {}))


def _index(path: Path) -> dict[str, Mapping[str, Any]]:
    if not path.is_file():
        return {}
    entries = {}
    for number, row in rows.lines(path):
        where, name = f"{path}: line {number}", row.get("task")
        if not isinstance(name, str):
            raise defect(where, 'has no "task"', "an index line names its task")
        if name in entries:
            raise defect(where, f"names the task {name!r} again", "remove one of the lines")
        for key in ("definition", "instruction", "metric"):
            if not isinstance(row.get(key), str | None):
                raise defect(where, f"its {key} is no text", "correct the index")
        _texts(where, "choices", row.get("choices"))
        entries[name] = row
    return entries


def read(found: Found, *, split: str, limit: int | None, columns: Mapping[str, str]) -> Task:
    """Read one task.

    Args:
        split: which examples are scored, where the data have splits; where they have none, all are.
        limit: only the first so many.
        columns: field -> name of the column that holds it, where they differ; fields are those of FIELDS.
    Raises:
        InputError: a line is not as it should be, or nothing is left.
    """
    index = found.index
    definition = next((index[k] for k in ("definition", "instruction") if index.get(k)), None)
    labels = _texts(found.source, "choices", index.get("choices"))
    by_split: dict[str | None, list[Example]] = defaultdict(list)
    for own, source, some in _parts(found):
        for number, row in some:
            part, example = _example(f"{source}: line {number}", row, columns, labels)
            by_split[part if part is not None else own].append(example)
    if None in by_split and len(by_split) > 1:
        count = len(by_split[None])
        raise defect(found.source, f"{count} examples name no split, the others do", "name it in every line")
    if set(by_split) == {None}:
        examples, shots = by_split[None], []
    else:
        examples, shots = by_split.get(split, []), by_split["train"] if split != "train" else []
        if not examples and any(by_split.values()):
            there = ", ".join(sorted(str(s) for s in by_split if by_split[s])) or "none"
            raise defect(
                found.source, f"has no examples of the split {split!r}", f"there are: {there}; --split"
            )
    if not examples:
        raise defect(found.source, "has no examples", REMEDY)
    metric = index.get("metric")
    return Task(found.name, definition, tuple(examples[:limit]), tuple(shots), metric, found.source)


class _Part(NamedTuple):
    """One split (None: the rows say themselves), where it lies, and its rows with their numbers."""

    split: str | None
    source: str
    rows: Iterable[rows.Row]


def _parts(found: Found) -> Iterator[_Part]:
    for split, path in found.files.items():
        yield _Part(split, str(path), _FILES[path.suffix](path))
    if found.dataset:
        name, config = found.dataset
        parts = rows.saved(name) if Path(name).is_dir() else rows.hub(name, config)
        for split, some in parts.items():
            yield _Part(split, f"{name}, split {split}" if split else name, some)


def _example(
    where: str, row: Mapping[str, Any], columns: Mapping[str, str], labels: Sequence[str]
) -> tuple[str | None, Example]:
    values = {name: row.get(columns.get(name, name)) for name in FIELDS}
    texts = {}
    for name in ("input", "output"):
        if not _is_text(values[name]):
            there = ", ".join(sorted(row)[:12])
            raise defect(where, f"has no text {columns.get(name, name)!r} (it has {there})", REMEDY)
        texts[name] = str(values[name])
    lists = {name: _texts(where, name, values[name]) for name in ("references", "choices")}
    choices = lists["choices"] or tuple(labels)
    if choices and len(set(choices)) < 2:
        raise defect(where, "has fewer than two different choices", "correct the task")
    if choices and texts["output"] not in choices:
        raise defect(where, f"its output {texts['output']!r} is not among its choices", "correct the task")
    split = values["split"]
    if not isinstance(split, str | None):
        raise defect(where, f"its split {split!r} is no text", REMEDY)
    references = tuple(dict.fromkeys((texts["output"], *lists["references"])))
    return split, Example(texts["input"], texts["output"], references, choices)


def _texts(where: str, name: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(_is_text(v) for v in value):
        raise defect(where, f"its {name} are not a list of texts", REMEDY)
    return tuple(str(v) for v in value)


def _is_text(value: Any) -> bool:
    """A text or a number. NaN, which tables write for what is missing, is neither."""
    return isinstance(value, str) or type(value) is int or (isinstance(value, float) and math.isfinite(value))


def parse_columns(given: Sequence[str]) -> dict[str, str]:
    """Field -> column, from `FIELD=COLUMN` as given on the command line. Raises UsageError."""
    columns = {}
    for text in given:
        name, equals, column = text.partition("=")
        if name not in FIELDS or not equals or not column:
            raise UsageError(f"{printable(text)!r} is no FIELD=COLUMN with a field of {', '.join(FIELDS)}")
        columns[name] = column
    return columns
