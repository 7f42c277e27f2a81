"""What the tests of the commands share: how one ended, and the files that it left."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Ended]


def bytes_of(directory: Path, pattern: str = "*") -> int:
    """Every byte of the files below a directory, as `du -b` counts them."""
    return sum(path.stat().st_size for path in directory.rglob(pattern) if path.is_file())


def content(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
