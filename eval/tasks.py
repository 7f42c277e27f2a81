"""Tasks: examples with right answers, read from JSONL files, directories of them, or whatever `datasets` reads."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorazip.errors import Defect, InputError, UsageError, printable

INDEX = "tasks.jsonl"
SPLITS = ("train", "validation", "test")
FIELDS = ("input", "output", "references", "choices", "split")
_MARKS = ("dataset_dict.json", "dataset_info.json", "state.json")  # a directory of datasets' save_to_disk
_FILES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_MAX_LINE = 4 * 2**20
_REMEDY = 'a line is {"input": …, "output": …}; other names: --column output=answer'


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
        InputError: a source is none of these, or an index is broken.
    """
    found: dict[str, list[Found]] = defaultdict(list)
    for source in sources:
        path = Path(source)
        if path.is_dir() and not any((path / mark).exists() for mark in _MARKS):
            tasks: Iterable[Found] = _below(path)
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


def _below(root: Path) -> Iterator[Found]:
    by_folder: dict[Path, list[Path]] = defaultdict(list)
    for path in sorted(root.rglob("*.jsonl")):
        if not any(part.startswith(".") for part in path.relative_to(root).parts):
            by_folder[path.parent].append(path)
    for folder, files in by_folder.items():
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
    rows = {}
    for number, row in _lines(path):
        name = row.get("task")
        if not isinstance(name, str):
            raise _defect(path, f'line {number} has no "task"', "an index line names its task")
        rows[name] = row
    return rows


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
    labels = index.get("choices") or ()
    by_split: dict[str | None, list[Example]] = defaultdict(list)
    for where, rows in _rows(found):
        for number, row in rows:
            part, example = _example(found, number, row, columns, labels)
            by_split[part if part is not None else where].append(example)
    if set(by_split) == {None}:
        examples, shots = by_split[None], []
    else:
        examples, shots = by_split.get(split, []), by_split["train"] if split != "train" else []
        if not examples:
            there = ", ".join(sorted(str(s) for s in by_split if by_split[s])) or "none"
            raise _defect(
                found.source, f"has no examples of the split {split!r}", f"there are: {there}; --split"
            )
    if not examples:
        raise _defect(found.source, "has no examples", _REMEDY)
    metric = index.get("metric")
    return Task(found.name, definition, tuple(examples[:limit]), tuple(shots), metric, found.source)


def _rows(found: Found) -> Iterator[tuple[str | None, Iterable[tuple[int, Mapping[str, Any]]]]]:
    for split, path in found.files.items():
        if path.suffix == ".jsonl":
            yield split, _lines(path)
        else:
            parts = _datasets(found, _FILES[path.suffix], data_files=str(path))
            yield split, enumerate(next(iter(parts.values())), 1)
    if found.dataset:
        name, config = found.dataset
        parts = _saved(found, name) if Path(name).is_dir() else _datasets(found, name, name=config)
        for split, rows in parts.items():
            yield split, enumerate(rows, 1)


def _datasets(found: Found, path: str, **options: Any) -> Mapping[str | None, Iterable[Mapping[str, Any]]]:
    import datasets

    try:
        # A data set's own loading script would be a stranger's code; datasets no longer runs any.
        return dict(datasets.load_dataset(path, **options))
    except Exception as error:  # what the many readers of the library raise is not listed anywhere
        raise _defect(
            found.source, f"cannot be read by datasets: {error}", "check the name, or the file"
        ) from error


def _saved(found: Found, path: str) -> Mapping[str | None, Iterable[Mapping[str, Any]]]:
    import datasets

    try:
        saved = datasets.load_from_disk(path)
    except Exception as error:
        raise _defect(found.source, f"cannot be read by datasets: {error}", "save it again") from error
    return dict(saved) if isinstance(saved, datasets.DatasetDict) else {None: saved}


def _lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(_MAX_LINE + 1):
                number += 1
                if len(line) > _MAX_LINE:
                    raise _defect(path, f"line {number} has more than {_MAX_LINE} bytes", "is this a task?")
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise _defect(path, f"line {number} is not JSON: {error}", _REMEDY) from error
                if not isinstance(row, dict):
                    raise _defect(path, f"line {number} is not a JSON object", _REMEDY)
                yield number, row
    except OSError as error:
        raise _defect(path, f"cannot be read: {error.strerror}", "check the file and its rights") from error


def _example(
    found: Found, number: int, row: Mapping[str, Any], columns: Mapping[str, str], labels: Sequence[Any]
) -> tuple[str | None, Example]:
    where = f"{found.source}: line {number}"
    values = {name: row.get(columns.get(name, name)) for name in FIELDS}
    texts = {}
    for name in ("input", "output"):
        value = values[name]
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            there = ", ".join(sorted(row)[:12])
            raise _defect(where, f"has no text {columns.get(name, name)!r} (it has {there})", _REMEDY)
        texts[name] = str(value)
    lists = {name: _texts(where, name, values[name]) for name in ("references", "choices")}
    choices = lists["choices"] or tuple(str(label) for label in labels)
    if choices and texts["output"] not in choices:
        raise _defect(where, f"its output {texts['output']!r} is not among its choices", "correct the task")
    split = values["split"]
    references = tuple(dict.fromkeys((texts["output"], *lists["references"])))
    return (split if isinstance(split, str) else None), Example(
        texts["input"], texts["output"], references, choices
    )


def _texts(where: str, name: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(v, str | int | float) for v in value):
        raise _defect(where, f"its {name} are not a list of texts", _REMEDY)
    return tuple(str(v) for v in value)


def parse_columns(given: Sequence[str]) -> dict[str, str]:
    """Field -> column, from `FIELD=COLUMN` as given on the command line. Raises UsageError."""
    columns = {}
    for text in given:
        name, equals, column = text.partition("=")
        if name not in FIELDS or not equals or not column:
            raise UsageError(f"{printable(text)!r} is no FIELD=COLUMN with a field of {', '.join(FIELDS)}")
        columns[name] = column
    return columns


def _defect(where: Path | str, problem: str, remedy: str) -> InputError:
    return InputError([Defect(str(where), problem=problem, remedy=remedy)])
