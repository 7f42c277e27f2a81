"""A second reader of bundles, written from docs/FORMAT.md alone: json, struct and numpy, no code of lorazip.

It shows that the specification is enough, and the tests compare lorazip with it. It trusts a bundle once its checksums
are right; the limits of docs/FORMAT.md are lorazip's own business.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
STREAMS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "u1"}  # numpy has no bfloat16: its bits, for now
CODECS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
INTEGERS = re.compile("int([123468])(t|g[0-9]+)?")
TABLES = Path(__file__).parents[2] / "lorazip" / "trellis.safetensors"
TABLES_SHA256 = "0fb71b5a0a10447d929452fcc7c46218a9c10aff62cc9a0eb5c0fdcec249ed02"
# rate -> bits and numbers of a step
STEPS = {
    "0.5": (1, 2),
    "1": (1, 1),
    "1.5": (3, 2),
    "2": (2, 1),
    "2.5": (5, 2),
    "3": (3, 1),
    "4": (4, 1),
    "5": (5, 1),
}
SIGNS = 0x9D5A3C716E84B21F
DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
FIRST_LINE = 78


class FormatError(Exception):
    """The directory is not a bundle of version 1, or it is damaged."""


@dataclass(frozen=True)
class Tensors:
    """One safetensors file in memory: the headers of its tensors, and its data."""

    header: Mapping[str, Any]
    data: bytes

    def raw(self, name: str) -> bytes:
        begin, end = self.header[name]["data_offsets"]
        return self.data[begin:end]

    def stream(self, name: str) -> Array:
        """The elements of one stream, float32."""
        if name not in self.header:
            return np.zeros(0, np.float32)
        dtype = self.header[name]["dtype"]
        elements = np.frombuffer(self.raw(name), STREAMS[dtype])
        if dtype == "BF16":  # the upper half of a float32
            return (elements.astype("<u4") << 16).view("<f4")
        return elements.astype(np.float32)


@dataclass
class Cursor:
    """Takes the tensors of one file in the order of the specification."""

    file: Tensors
    at: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STREAMS, 0))

    def take(self, codec: str, *shape: int) -> Array:
        """One tensor, float64."""
        if "+" in codec:  # the first rows by one codec, the others by another
            name, count, rest = re.fullmatch(r"([^*]*)\*([0-9]+)\+(.*)", codec).groups()  # type: ignore[union-attr]
            if len(shape) == 1:
                return self.take(name, *shape)
            rows = min(int(count), shape[0])
            first = self.take(name, rows, shape[1])
            return np.concatenate([first, self.take(rest, shape[0] - rows, shape[1])])
        if codec in CODECS:
            return self.run(CODECS[codec], int(np.prod(shape))).astype(np.float64).reshape(shape)
        if codec == "tcq0":
            return np.zeros(shape)
        if codec.startswith("tcq"):
            return self.trellis(codec.removeprefix("tcq").removesuffix("u"), codec[-1] != "u", *shape)
        return self.integers(codec, *shape)

    def integers(self, codec: str, *shape: int) -> Array:
        """Odd numbers of few bits times the scale of their group."""
        found = INTEGERS.fullmatch(codec)
        if found is None:
            raise FormatError(f"codec {codec!r} is not known")
        bits, scope = int(found[1]), found[2] or ""
        count = int(np.prod(shape))
        rows, width = (1, count) if scope == "t" or len(shape) == 1 else shape
        group = int(scope[1:]) if scope[:1] == "g" else width
        codes = self.codes(bits, count).reshape(rows, width)
        each = (width + group - 1) // group if width else 0  # groups of a row
        scales = self.run("BF16", rows * each).astype(np.float64).reshape(rows, each)
        odd = 2 * codes - (2**bits - 1)
        values: Array = odd * np.repeat(scales, group, axis=1)[:, :width]
        return values.reshape(shape)

    def trellis(self, rate: str, scaled: bool, *shape: int) -> Array:
        """Every code moves a row's state on; the state's row of the table are the next numbers."""
        if rate not in STEPS:
            raise FormatError(f"codec {rate!r} of a trellis is not known")
        (k, v), table = STEPS[rate], tables()[rate]
        rows, width = (1, *shape)[-2:]
        steps = (width + v - 1) // v
        codes = self.codes(k, rows * steps).reshape(rows, steps)
        state, numbers = np.zeros(rows, np.int64), np.zeros((rows, steps, v))
        for t in range(steps):
            state = (state * 2**k + codes[:, t]) % 1024
            numbers[:, t] = table[state]
        values = numbers.reshape(rows, steps * v)[:, :width]
        if whole := width // 64 * 64:
            blocks = values[:, :whole].reshape(rows, whole // 64, 64) @ TURN
            values[:, places(whole)] = blocks.reshape(rows, whole)
        scales = self.run("BF16", rows) if scaled else np.ones(rows)
        return (values * scales[:, None]).reshape(shape)

    def codes(self, bits: int, count: int) -> Array:
        """Packed codes of so many bits."""
        octets = self.run("U8", (count * bits + 7) // 8).astype(np.uint8)
        digits = np.unpackbits(octets, bitorder="little")[: count * bits].reshape(count, bits)
        return (digits.astype(np.int64) << np.arange(bits)).sum(1)  # type: ignore[no-any-return]

    def run(self, dtype: str, count: int) -> Array:
        """The next elements of one stream."""
        begin = self.at[dtype]
        self.at[dtype] = begin + count
        return self.file.stream(dtype)[begin : begin + count]

    def finish(self) -> None:
        """Every stream must have been used to its end."""
        for dtype, end in self.at.items():
            if len(self.file.stream(dtype)) != end:
                raise FormatError(f"stream {dtype} does not end where the manifest says")


class Bundle:
    """A bundle, read as a whole.

    Attributes:
        manifest: bundle.json.
        modules: (name, out, in) in the order of the data.
        shared: for each module its shared tensors, as stored.
    """

    def __init__(self, path: Path):
        self.path = path
        data = (path / "bundle.json").read_bytes()
        digest = hashlib.sha256(data[FIRST_LINE:]).hexdigest()
        if data[:FIRST_LINE] != b'{"digest":"%s",\n' % digest.encode():
            raise FormatError("bundle.json does not match its digest")
        self.manifest = json.loads(data)
        if (self.manifest["format"], self.manifest["version"]) != ("lorazip-bundle", 1):
            raise FormatError("not a bundle of version 1")
        self.modules = [tuple(module) for module in self.manifest["modules"]]
        indices = runs(self.manifest["module_layouts"])
        self._layouts = [self.manifest["layouts"][i] for i in indices]
        self.shared = self._read_shared()
        self._records = {record["name"]: record for record in self.manifest["adapters"]}
        self.names = list(self._records)

    def config(self, name: str) -> dict[str, Any]:
        """The original adapter_config.json."""
        record = self._records[name]
        removed = record.get("config_removed", [])
        common = {key: value for key, value in self.manifest["config"].items() if key not in removed}
        return {**common, **record.get("config", {})}

    def matrices(self, name: str) -> dict[str, Array]:
        """D (out, in), float64, of every module that the adapter has."""
        cursor = Cursor(self._adapter_file(name))
        forms = runs(self._records[name]["forms"], len(self.modules))
        found = {}
        for (module, out, in_), shared, layout, index in zip(
            self.modules, self.shared, self._layouts, forms, strict=True
        ):
            if index != -1:
                terms = self.manifest["forms"][index]
                found[module] = sum(
                    (product(term, shared, layout, out, in_, cursor) for term in terms), np.zeros((out, in_))
                )
        cursor.finish()
        return found

    def carried(self, name: str) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
        """Tensors of the original that are kept as they were: name -> dtype, shape, bytes."""
        file = self._adapter_file(name)
        return {
            key: (entry["dtype"], tuple(entry["shape"]), file.raw(key))
            for key, entry in file.header.items()
            if key not in STREAMS
        }

    def _read_shared(self) -> list[list[Array]]:
        listed = self.manifest["files"].get("shared.safetensors")
        file = Tensors({}, b"") if listed is None else read(self.path / "shared.safetensors", *listed)
        cursor = Cursor(file)
        shared = [
            [cursor.take(codec, columns, out if side == "left" else in_) for side, columns, codec in layout]
            for layout, (_, out, in_) in zip(self._layouts, self.modules, strict=True)
        ]
        cursor.finish()
        return shared

    def _adapter_file(self, name: str) -> Tensors:
        record = self._records[name]
        return read(self.path / "adapters" / f"{name}.safetensors", record["bytes"], record["sha256"])


def read(path: Path, nbytes: int, sha256: str) -> Tensors:
    """Read a safetensors file and check it against its record."""
    data = path.read_bytes()
    if len(data) != nbytes or hashlib.sha256(data).hexdigest() != sha256:
        raise FormatError(f"{path.name} is not the file that bundle.json lists")
    (length,) = struct.unpack("<Q", data[:8])
    return Tensors(json.loads(data[8 : 8 + length]), data[8 + length :])


def runs(packed: Any, length: int = 0) -> list[int]:
    """[3, [0, 4], -1] -> [3, 0, 0, 0, 0, -1]; a text of so many numbers in one or two digits: DAB -> [2, -1, 0]."""
    if isinstance(packed, str):
        places = [DIGITS.index(digit) for digit in packed]
        if len(places) == 2 * length:
            places = [64 * high + low for high, low in zip(places[::2], places[1::2], strict=True)]
        return [place - 1 for place in places]

    def unpacked() -> Iterator[int]:
        for item in packed:
            value, count = item if isinstance(item, list) else (item, 1)
            yield from [value] * count

    return list(unpacked())


@cache
def tables() -> dict[str, Array]:
    """Of every rate of trellis codes, (1024, v)."""
    file = read(TABLES, TABLES.stat().st_size, TABLES_SHA256)
    return {rate: file.stream(rate).reshape(1024, -1) for rate in STEPS}


def places(whole: int) -> Array:
    """Where numbers that were turned back belong in their row."""
    step = whole * 40503 // 65536
    while gcd(step, whole) != 1:
        step += 1
    return np.arange(whole) * step % whole


# z = y TURN: 64 numbers of a row are turned back
ONES = np.array([[(i & j).bit_count() for j in range(64)] for i in range(64)])
TURN = (-1.0) ** ONES / 8 * np.array([(-1.0) ** (SIGNS >> j & 1) for j in range(64)])


def product(
    term: Sequence[Any], shared: Sequence[Array], layout: Sequence[Any], out: int, in_: int, cursor: Cursor
) -> Array:
    """L C R^T (out, in) of one term; its own tensors are taken from the cursor, left, core, right."""
    left, core, right = term
    l_rows = outer(left, shared, out, cursor)
    a, b = (layout[side][1] if isinstance(side, int) else side[0] for side in (left, right))
    kind, *rest = core
    if kind == "full":
        c = cursor.take(rest[0], a, b)
    elif kind == "diagonal":
        c = np.diag(cursor.take(rest[0], a))
    elif kind == "factored":
        codec, rank = rest
        c = cursor.take(codec, rank, a).T @ cursor.take(codec, rank, b)
    elif kind == "scalar":
        c = rest[0] * np.eye(a)
    else:
        raise FormatError(f"core {kind!r} is not known")
    product: Array = l_rows.T @ c @ outer(right, shared, in_, cursor)
    return product


def outer(side: Any, shared: Sequence[Array], width: int, cursor: Cursor) -> Array:
    """L or R as stored, one column a row: shared, own, or own rows plus own loadings on shared ones."""
    if isinstance(side, int):
        return shared[side]
    columns, codec, *basis = side
    rows = cursor.take(codec, columns, width)
    if basis:
        index, of_loadings = basis
        rows = rows + cursor.take(of_loadings, columns, len(shared[index])) @ shared[index]
    return rows
