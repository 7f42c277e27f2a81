"""Writing that is whole or not there: temporary name, flush, rename; and safetensors written as a stream."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorazip.errors import TargetError
from lorazip.header import DTYPE_BYTES
from lorazip.manifest import FileRecord

FRESH = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file to be written; its data come in pieces, in order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Iterable[Tensor]


def write_bytes(path: Path, data: bytes) -> FileRecord:
    """Write a file atomically and durably."""
    with _replacing(path) as descriptor, os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(len(data), hashlib.sha256(data).hexdigest())


def safetensors_size(entries: Sequence[Entry]) -> int:
    """Bytes of the file that `write_safetensors` would make of these entries; their pieces are not touched."""
    header, data = _header(_ordered(entries))
    return 8 + len(header) + data


def write_safetensors(path: Path, entries: Sequence[Entry]) -> FileRecord:
    """Write a safetensors file without holding it in memory; sha256 is taken on the way.

    Entries go by falling element size, then by name, so that all data are aligned.
    """
    ordered = _ordered(entries)
    header, data = _header(ordered)
    digest, total = hashlib.sha256(), 0
    with _replacing(path) as descriptor, os.fdopen(descriptor, "wb", buffering=2**20) as file:
        for piece in _pieces(header, ordered):
            file.write(piece)
            digest.update(piece)
            total += len(piece)
        file.flush()
        os.fsync(file.fileno())
        if total != 8 + len(header) + data:
            raise AssertionError(
                f"{path.name}: {total} bytes written, the header describes {8 + len(header) + data}"
            )
    return FileRecord(total, digest.hexdigest())


def _ordered(entries: Sequence[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda e: (-DTYPE_BYTES[e.dtype], e.name))


def _header(ordered: Sequence[Entry]) -> tuple[bytes, int]:
    """The JSON header, padded to 8 bytes, and the bytes of the data."""
    header: dict[str, object] = {}
    begin = 0
    for entry in ordered:
        end = begin + DTYPE_BYTES[entry.dtype] * math.prod(entry.shape)
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8), begin


def _pieces(header: bytes, entries: Iterable[Entry]) -> Iterator[bytes | memoryview]:
    yield len(header).to_bytes(8, "little") + header
    for entry in entries:
        for tensor in entry.pieces:
            # numpy has no bfloat16: bytes are bytes
            yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[int]:
    """A descriptor for a hidden neighbour of path that takes its place when all went well."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        try:
            descriptor = os.open(temporary, FRESH, 0o666)
        except (
            FileExistsError
        ):  # left by an interruption; or a link in a stranger's bundle, never to be followed
            temporary.unlink()
            descriptor = os.open(temporary, FRESH, 0o666)
        yield descriptor
        os.replace(temporary, path)
        flush(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise TargetError(f"{path} cannot be written: {error.strerror or error}") from error
        raise


@contextlib.contextmanager
def fresh_folder(target: Path) -> Iterator[Path]:
    """A hidden new folder beside the target, to be filled and renamed; it is gone afterwards unless it was.

    Those that killed processes left for the same target go first: nobody holds their locks any more.
    """
    for left in target.parent.glob(f".{glob.escape(target.name)}.{'[0-9a-f]' * 16}.tmp"):
        with contextlib.suppress(TargetError), locked(left):
            shutil.rmtree(left, ignore_errors=True)
    # Not tempfile: its directories are private, and what is written is to be read by servers too.
    folder = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    folder.mkdir(parents=True)
    try:
        with locked(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def flush(path: Path) -> None:
    """Make a file, or the renames in a directory, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the directory's lock, so that two processes do not write it at once. Needs no lock file.

    Raises:
        TargetError: another process holds it, or has just replaced or deleted the directory.
    """
    busy = TargetError(f"{directory} is being written by another process (wait for it)")
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise TargetError(f"{directory} cannot be opened: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = os.path.samestat(os.fstat(descriptor), os.stat(directory))
        except (BlockingIOError, FileNotFoundError):
            raise busy from None
        if not same:
            raise busy
        yield
    finally:
        os.close(descriptor)
