"""Rows of examples: JSON lines, plain texts and CSV, read here and strictly; Parquet and data sets, by `datasets`."""

from __future__ import annotations

import codecs
import csv
import glob
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lorazip.errors import Defect, InputError
from lorazip.header import FormatError, parse_json

Row = tuple[int, Mapping[str, Any]]  # with its number, from 1; of a text file its line

REMEDY = 'a line is {"input": …, "output": …}; other names: --column output=answer'
_MAX_LINE = 4 * 2**20


def defect(where: Path | str, problem: str, remedy: str) -> InputError:
    """The refusal of a file, a line of it, or a data set."""
    return InputError([Defect(str(where), problem=problem, remedy=remedy)])


def lines(path: Path) -> Iterator[Row]:
    """The objects of a JSONL file, empty lines left out. Raises InputError, naming the line."""
    _require_file(path)
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(_MAX_LINE + 1):
                number += 1
                where = f"{path}: line {number}"
                if len(line) > _MAX_LINE:
                    raise defect(where, f"has more than {_MAX_LINE} bytes", "is this a task?")
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if not line.strip():
                    continue
                try:
                    row = parse_json(line)
                except FormatError as error:
                    raise defect(where, f"cannot be read: {error}", REMEDY) from error
                if not isinstance(row, dict):
                    raise defect(where, "is not a JSON object", REMEDY)
                yield number, row
    except OSError as error:
        raise defect(path, f"cannot be read: {error.strerror}", "check the file and its rights") from error


def texts(path: Path) -> list[str]:
    """Texts, from JSON lines with "input", or from the lines of a .txt file; repeated ones once.

    Raises:
        InputError: naming the line, never its text.
    """
    if path.suffix in (".txt", ".jsonl") and not path.is_file():
        raise defect(path, "does not exist or is no file", "check the path")
    if path.suffix == ".txt":
        try:
            split = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() splits at U+2028 too
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
            raise defect(path, f"cannot be read: {reason}", "check the path") from error
        found = [line.strip() for line in split if line.strip()]
    elif path.suffix == ".jsonl":
        found = []
        for number, row in lines(path):
            text = row.get("input")
            if not isinstance(text, str) or not text.strip():
                raise defect(
                    path,
                    f'line {number} has no text "input"',
                    'a line is {"input": "…"}; other keys are not read',
                )
            found.append(text)
    else:
        raise defect(
            path, "is neither .jsonl nor .txt", 'name a file of {"input": "…"} lines, or of plain lines'
        )
    found = list(dict.fromkeys(found))
    if not found:
        raise defect(path, "holds no input", 'a line is {"input": "…"}')
    return found


def cells(path: Path) -> Iterator[Row]:
    """The rows of a CSV file with a header. Raises InputError, naming the line.

    Not by `datasets`: it makes numbers and truth values of what looks like them, and nothing of "None" and "NA". Here
    all cells are texts, and only an empty one is none.
    """
    _require_file(path)
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for row in reader:
                number = reader.line_num
                if None in row:
                    raise defect(
                        f"{path}: line {number}", "has more cells than the header", "quote the commas"
                    )
                yield number, {name: cell or None for name, cell in row.items()}
    except OSError as error:
        raise defect(path, f"cannot be read: {error.strerror}", "check the file and its rights") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise defect(
            path, f"cannot be read after line {number}: {error}", "save it as CSV in UTF-8"
        ) from error


def parquet(path: Path) -> Iterator[Row]:
    """The rows of a Parquet file. Raises InputError."""
    return _file("parquet", path)


def json(path: Path) -> Iterator[Row]:
    """The rows of a JSON file that is one list. Raises InputError."""
    return _file("json", path)


def hub(name: str, config: str | None) -> Mapping[str | None, Iterator[Row]]:
    """The rows of a data set of the Hub, by split. Raises InputError."""
    remedy = "check the name and the network; there is no such file here"
    return _labelled(_loaded(name, name, remedy, name=config))


def saved(directory: str) -> Mapping[str | None, Iterator[Row]]:
    """The rows of what `datasets` saved, by split; None for data without splits. Raises InputError."""
    import datasets

    try:
        found = datasets.load_from_disk(directory)
    except Exception as error:
        raise defect(directory, f"cannot be read by datasets: {error}", "save it again") from error
    return _labelled(dict(found) if isinstance(found, datasets.DatasetDict) else {None: found})


def _file(kind: str, path: Path) -> Iterator[Row]:
    # datasets takes a file's name for a pattern.
    loaded = _loaded(str(path), kind, "check the file", data_files=glob.escape(str(path)))
    return next(iter(_labelled(loaded).values()))


def _loaded(source: str, path: str, remedy: str, **options: Any) -> Mapping[str | None, Any]:
    import datasets

    datasets.disable_progress_bars()
    try:
        # A data set's own loading script would be a stranger's code; datasets no longer runs any.
        return dict(datasets.load_dataset(path, **options))
    except Exception as error:  # what the many readers of the library raise is not listed anywhere
        raise defect(source, f"cannot be read by datasets: {error}", remedy) from error


def _labelled(parts: Mapping[str | None, Any]) -> Mapping[str | None, Iterator[Row]]:
    return {split: _named_labels(data) for split, data in parts.items()}


def _named_labels(data: Any) -> Iterator[Row]:
    """A class label is its name, not its number; one below 0 (unknown) is none."""
    labels = {name: kind for name, kind in data.features.items() if hasattr(kind, "int2str")}
    for number, row in enumerate(data, 1):
        known = {name: row[name] is not None and row[name] >= 0 for name in labels}
        yield number, row | {n: kind.int2str(row[n]) if known[n] else None for n, kind in labels.items()}


def _require_file(path: Path) -> None:
    if path.exists() and not path.is_file():  # to open a pipe would wait for ever
        raise defect(path, "is no file", "is this a task?")
