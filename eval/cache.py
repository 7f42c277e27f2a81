"""Answers of models on disk, by content: a killed run goes on, and a repeated one asks no model.

The key of an answer is the sha256 of all that it depends on: engine and version, kind of device, number type, the
base's bytes, the adapter's effect, the tokens, what was asked. Nothing of it can be read back from the key.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from lorazip.errors import TargetError

FILE = "eval.sqlite3"
_HASHED = (".json", ".safetensors", ".model", ".jinja", ".txt")  # what a model and its tokenizer are made of
_TABLES = """
CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, answer TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY, stamp TEXT NOT NULL, sha256 TEXT NOT NULL) WITHOUT ROWID;
"""


def default_directory() -> Path:
    """Where answers are kept unless the user says otherwise: below XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorazip"


def key(**parts: Any) -> bytes:
    """The key of an answer that depends on these parts, JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).digest()


class Cache:
    """A table of answers in one file, shared by all runs of a user; many processes may use it at once."""

    def __init__(self, directory: Path):
        """Open it, or begin it.

        Raises:
            TargetError: it cannot be written, or is no such file.
        """
        self.path = directory / FILE
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(self.path, timeout=60)
            self._file.execute("PRAGMA journal_mode=WAL")
            self._file.executescript(_TABLES)
        except (OSError, sqlite3.Error) as error:
            raise TargetError(
                f"{self.path} cannot be used: {error} (delete it, or name another: --cache, of a transfer --work)"
            ) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def get(self, keys: Sequence[bytes]) -> dict[bytes, Any]:
        """The answers that are there."""
        found: dict[bytes, Any] = {}
        try:
            for start in range(0, len(keys), 500):  # SQLite takes 999 variables at least
                some = keys[start : start + 500]
                marks = ",".join("?" * len(some))
                with closing(
                    self._file.execute(f"SELECT key, answer FROM answers WHERE key IN ({marks})", some)
                ) as rows:
                    found.update((bytes(k), json.loads(answer)) for k, answer in rows)
        except (sqlite3.Error, ValueError) as error:
            raise TargetError(
                f"{self.path} is damaged: {error} (delete it, or name another: --cache, of a transfer --work)"
            ) from error
        return found

    def put(self, answers: Mapping[bytes, Any]) -> None:
        """Keep these answers; they are on disk when this returns."""
        try:
            with self._file:
                rows = [(k, json.dumps(answer, separators=(",", ":"))) for k, answer in answers.items()]
                self._file.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", rows)
        except sqlite3.Error as error:
            raise TargetError(f"{self.path} cannot be written: {error}") from error

    def model_digest(self, directory: Path) -> str:
        """sha256 (hex) over names and bytes of a model's files; a file of known size and time is not read again."""
        total = hashlib.sha256()
        for path in sorted(p for p in directory.iterdir() if p.suffix in _HASHED and p.is_file()):
            total.update(f"{path.name}\0{self._file_digest(path.resolve())}\n".encode())
        return total.hexdigest()

    def _file_digest(self, path: Path) -> str:
        status = path.stat()
        # The time of change too: files of reproducible archives all have one time, weights of one shape one size.
        stamp = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"
        try:
            row = self._file.execute(
                "SELECT stamp, sha256 FROM files WHERE path = ?", (str(path),)
            ).fetchone()
            if row is not None and row[0] == stamp:
                return str(row[1])
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            with self._file:
                self._file.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?)", (str(path), stamp, found))
        except sqlite3.Error as error:
            raise TargetError(
                f"{self.path} cannot be used: {error} (delete it, or name another: --cache, of a transfer --work)"
            ) from error
        return found
