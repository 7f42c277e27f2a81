"""What the tests of tasks share: files of rows, tasks read from them, what was said of those that were refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorazip.errors import InputError
from lorazip.eval import tasks
from lorazip.eval.job import _single
from lorazip.eval.tasks import Task

LINE = {"input": "1 + 1", "output": "2"}


def put(path: Path, *rows: Any) -> Path:
    """A JSONL file; a text or bytes are a raw line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
        for row in rows
    ]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def read(source: Path | str, name: str | None = None, **options: Any) -> Task:
    found = tasks.find([str(source)])
    place = _single(found[name]) if name is not None else next(iter(found.values()))[0]
    return tasks.read(place, **{"split": "test", "limit": None, "columns": {}} | options)


def refused(source: Path | str, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        read(source, **options)
    assert all(text.isprintable() for text in str(caught.value).split("\n"))
    return str(caught.value)
