"""Read and check the header of a safetensors file before anything is allocated for its data.

The format (https://github.com/huggingface/safetensors): 8 bytes little-endian header length n, n bytes of
JSON {name: {dtype, shape, data_offsets: [begin, end]}}, then the data; the tensors cover the data without
hole or overlap. The safetensors package checks the same; it is done here so that every way to be wrong has
its own message, and so that a header can be read without mapping the data.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Headers of real adapters have 10 kB to 2 MB; the format allows 100 MB, which costs gigabytes when parsed.
MAX_HEADER = 16 * 2**20
MAX_DEPTH = 32  # levels of JSON; headers have 3, real configs a few
MAX_DIMS = 8  # torch has more, adapters have at most 5

# Bytes per element. Types narrower than a byte cannot be carried by torch and are refused.
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """What the header says about one tensor: safetensors' name of the type ("F32") and the shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return DTYPE_BYTES[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """The checked header of one file.

    Attributes:
        tensors: key -> type and shape, in the order of the data.
        begin: key -> first byte of the tensor, counted from the start of the file.
        size: bytes of the whole file.
        stamp: identity of the file that was read, see `stamp_of`.
    """

    tensors: dict[str, TensorInfo]
    begin: dict[str, int]
    size: int
    stamp: tuple[int, int, int]


def stamp_of(status: os.stat_result) -> tuple[int, int, int]:
    """What tells whether a file is still the same: inode, size and time of the last change."""
    return status.st_ino, status.st_size, status.st_mtime_ns


class FormatError(ValueError):
    """The file is not a valid safetensors or JSON file; `tensor` names the entry at fault, or is ""."""

    def __init__(self, problem: str, tensor: str = ""):
        super().__init__(problem)
        self.tensor = tensor


def parse_json(data: bytes) -> Any:
    """Parse untrusted JSON: valid UTF-8, no key twice, only finite numbers, at most MAX_DEPTH levels.

    Args:
        data: the bytes of the document.
    Raises:
        FormatError: the bytes are not such a document.
    """
    try:
        document = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_no_duplicates,
            parse_constant=_finite,
            parse_float=_finite,
        )
    except UnicodeDecodeError as error:
        raise FormatError(f"not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise FormatError("nested too deeply") from None
    except FormatError:
        raise
    except ValueError as error:  # JSONDecodeError, and integers of more digits than Python converts
        raise FormatError(f"not JSON: {error}") from None
    _check_depth(document)
    if b"\\ud" in data or b"\\uD" in data:
        _check_surrogates(document)
    return document


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise FormatError("the same key appears twice", key)
    return result


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):  # NaN and Infinity, which are no JSON, and 1e999
        raise FormatError(f"{text[:40]} is not a finite number")
    return value


def _check_depth(document: Any) -> None:
    # What can be parsed may still be too deep to be compared, printed or written.
    level = [document]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for node in level
            if isinstance(node, list | dict)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return
    raise FormatError("nested too deeply")


def _check_surrogates(document: Any) -> None:
    try:
        json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise FormatError("has half a surrogate pair in a string") from None


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Args:
        path: the file.
    Raises:
        FormatError: the file is not a valid safetensors file.
        OSError: the file cannot be read.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise FormatError("is not a regular file")  # opening a pipe would wait for ever
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        size = status.st_size
        start = file.read(8)
        if len(start) < 8:
            raise FormatError(f"the file has {size} bytes, too few for a safetensors header")
        length = int.from_bytes(start, "little")
        if length > size - 8:
            raise FormatError(f"the header claims {length} bytes, the file has {size}")
        if length > MAX_HEADER:
            raise FormatError(f"the header claims {length} bytes, at most {MAX_HEADER} are accepted")
        document = parse_json(file.read(length))
    if not isinstance(document, dict):
        raise FormatError("the header is not a JSON object")
    document.pop("__metadata__", None)
    return _check_layout(document, 8 + length, status)


def _check_layout(document: dict[str, Any], data: int, status: os.stat_result) -> Header:
    size = status.st_size
    spans = []
    for key, entry in document.items():
        info, begin, end = _check_entry(key, entry)
        spans.append((begin, end, key, info))
    spans.sort(key=lambda span: span[:2])
    position = 0
    for begin, end, key, _ in spans:
        if begin != position:
            what = "overlaps the tensor before it" if begin < position else "leaves a hole before it"
            raise FormatError(f"its data offset {begin} {what}", key)
        position = end
    if data + position != size:
        what = "truncated" if data + position > size else "longer than its header says"
        raise FormatError(f"the file is {what}: {size} bytes, the header describes {data + position}")
    return Header(
        tensors={key: info for _, _, key, info in spans},
        begin={key: data + begin for begin, _, key, _ in spans},
        size=size,
        stamp=stamp_of(status),
    )


def _check_entry(key: str, entry: Any) -> tuple[TensorInfo, int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError("its header entry is not {dtype, shape, data_offsets}", key)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise FormatError(f"its type {str(dtype)[:40]!r} is not known", key)
    if not _is_sizes(shape, MAX_DIMS):
        raise FormatError(f"its shape is not a list of at most {MAX_DIMS} sizes", key)
    if not _is_sizes(offsets, 2) or len(offsets) != 2:
        raise FormatError("its data offsets are not two positions", key)
    if math.prod(extent or 1 for extent in shape) >= 2**63:
        raise FormatError(f"its shape {shape!r} has too many elements", key)
    info = TensorInfo(dtype, tuple(shape))
    if offsets[1] - offsets[0] != info.nbytes:
        raise FormatError(
            f"its data has {offsets[1] - offsets[0]} bytes, shape {shape} of {dtype} needs {info.nbytes}",
            key,
        )
    return info, offsets[0], offsets[1]


def _is_sizes(value: Any, most: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= most
        and all(type(n) is int and 0 <= n < 2**63 for n in value)
    )
