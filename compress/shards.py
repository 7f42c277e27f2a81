"""Finished modules on disk: one shard each, so that a killed job loses at most one module, and their assembly.

The job works module by module, a bundle is stored adapter by adapter; the shards are where the one is turned into the
other without holding everything. They live in BUNDLE.partial, whose job.json says which job they belong to.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from lorazip.bundle import Offsets, offsets
from lorazip.codecs import DTYPES
from lorazip.compress.encode import ModuleCode
from lorazip.files import Entry, write_safetensors
from lorazip.header import FormatError
from lorazip.manifest import pack_term, unpack_shared, unpack_term
from lorazip.mapped import Mapped
from lorazip.terms import Form, Layout, own_slots, shared_slots

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write(path: Path, code: ModuleCode) -> None:
    """Write one module's shard, whole or not at all."""
    streams: dict[str, list[Tensor]] = defaultdict(list)
    for part in (p for parts in code.shared for p in parts):
        streams[f"shared.{_NAMES[part.dtype]}"].append(part)
    for part in (p for parts in code.own for p in parts):
        streams[f"own.{_NAMES[part.dtype]}"].append(part)
    note = {
        "layout": [[s.side, s.columns, s.codec] for s in code.layout],
        "forms": [[pack_term(term) for term in form] for form in code.forms],
        "fallbacks": list(code.fallbacks),
    }
    text = torch.frombuffer(bytearray(json.dumps(note).encode()), dtype=torch.uint8)
    entries = [Entry(k, k.split(".")[1], (sum(map(len, p)),), p) for k, p in streams.items()]
    for name, tensor in (
        ("residuals", code.residuals),
        ("energies", code.energies),
        ("spectrum", code.spectrum),
    ):
        entries.append(Entry(name, "F64", tuple(tensor.shape), [tensor.double()]))
    entries.append(Entry("note", "U8", (len(text),), [text]))
    write_safetensors(path, entries)


@dataclass(frozen=True)
class Shard:
    """A finished module. Fields as in `ModuleCode`; tensors stay on disk until asked for (after a dry run: nowhere)."""

    layout: Layout
    forms: tuple[Form, ...]
    fallbacks: tuple[bool, ...]
    residuals: Tensor
    energies: Tensor
    spectrum: Tensor
    starts: tuple[Offsets, ...]  # of each adapter in the own streams, and their ends
    ends: Offsets  # of the shared streams
    file: Mapped | None

    def shared(self, dtype: str) -> Iterator[Tensor]:
        """The module's piece of one shared stream."""
        assert self.file is not None
        if dtype in self.ends:
            yield self.file.tensor(f"shared.{dtype}")

    def own(self, dtype: str, i: int) -> Iterator[Tensor]:
        """Adapter i's piece of one own stream."""
        assert self.file is not None
        start, end = (self.starts[j].get(dtype, 0) for j in (i, i + 1))
        if end > start:
            yield self.file.tensor(f"own.{dtype}")[start:end]


def read(path: Path, out: int, in_: int) -> Shard | None:
    """Read a shard back; None when it is not there or damaged (it is then made again)."""
    try:
        file = Mapped(path)
        note = json.loads(bytes(file.tensor("note").tolist()))
    except (OSError, FormatError, KeyError, ValueError):
        return None
    layout = tuple(unpack_shared(item) for item in note["layout"])
    forms = tuple(tuple(unpack_term(term) for term in form) for form in note["forms"])
    residuals, energies, spectrum = (file.tensor(n).clone() for n in ("residuals", "energies", "spectrum"))
    return Shard(
        layout,
        forms,
        tuple(note["fallbacks"]),
        residuals,
        energies,
        spectrum,
        *_extents(layout, forms, out, in_),
        file,
    )


def describe(code: ModuleCode, out: int, in_: int) -> Shard:
    """The shard that `write` would make, without its tensors."""
    extents = _extents(code.layout, code.forms, out, in_)
    return Shard(
        code.layout, code.forms, code.fallbacks, code.residuals, code.energies, code.spectrum, *extents, None
    )


def _extents(
    layout: Layout, forms: Sequence[Form], out: int, in_: int
) -> tuple[tuple[Offsets, ...], Offsets]:
    starts: list[Offsets] = [{}]
    for form in forms:
        sizes, last = _sizes(form, layout, out, in_), starts[-1]
        starts.append(last | {dtype: last.get(dtype, 0) + count for dtype, count in sizes.items()})
    return tuple(starts), offsets([shared_slots(layout, out, in_)])[-1]


@lru_cache(maxsize=2**14)  # a choice is tried several times, and its forms are few
def _sizes(form: Form, layout: Layout, out: int, in_: int) -> Offsets:
    """Elements of an adapter's own tensors in every stream."""
    return offsets([own_slots(form, layout, out, in_)])[-1]


def streams(counts: Sequence[Offsets]) -> list[tuple[str, int]]:
    """(dtype, elements) of every stream that pieces of these sizes make together, in the order of `DTYPES`."""
    totals = {dtype: sum(ends.get(dtype, 0) for ends in counts) for dtype in DTYPES}
    return [(dtype, count) for dtype, count in totals.items() if count]
