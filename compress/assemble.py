"""Finished modules -> the files of a bundle, adapter by adapter, the manifest last."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lorazip import manifest as manifests
from lorazip.adapter import Adapter
from lorazip.bundle import ADAPTERS, MANIFEST, SHARED, adapter_path
from lorazip.card import card
from lorazip.compress import shards
from lorazip.compress.shards import Shard
from lorazip.compress.spec import Spec
from lorazip.errors import TargetError
from lorazip.files import Entry, flush, safetensors_size, write_bytes, write_safetensors
from lorazip.manifest import AdapterRecord, FileRecord, Manifest, Module
from lorazip.sources import Inputs
from lorazip.terms import Form


class Sink(Protocol):
    """Where the files go: a folder, or nowhere (a dry run counts their bytes)."""

    def tensors(self, name: str, entries: Sequence[Entry]) -> FileRecord: ...

    def data(self, name: str, data: bytes) -> FileRecord: ...


class DirectorySink:
    """Writes into a fresh folder; every file is on disk when the call returns."""

    def __init__(self, folder: Path):
        try:
            if folder.exists():
                shutil.rmtree(folder)
            (folder / ADAPTERS).mkdir(parents=True)
        except OSError as error:
            raise TargetError(f"{folder} cannot be made: {error.strerror}") from error
        self.folder = folder

    def tensors(self, name: str, entries: Sequence[Entry]) -> FileRecord:
        return write_safetensors(self.folder / name, entries)

    def data(self, name: str, data: bytes) -> FileRecord:
        record = write_bytes(self.folder / name, data)
        flush(self.folder)
        return record


class SizeSink:
    """Writes nothing: the records have the right sizes and a checksum of zeros, which is as long as a real one."""

    def tensors(self, name: str, entries: Sequence[Entry]) -> FileRecord:
        return FileRecord(safetensors_size(entries), "0" * 64)

    def data(self, name: str, data: bytes) -> FileRecord:
        return FileRecord(len(data), "0" * 64)


def assemble(
    inputs: Inputs,
    spec: Spec,
    finished: Sequence[Shard],
    sink: Sink,
    progress: Callable[[str, int, int], None],
) -> int:
    """Write the files of a bundle. Returns the bytes of all of them."""
    files = {"README.md": sink.data("README.md", card(inputs.base).encode())}
    totals = shards.streams([shard.ends for shard in finished])
    if totals:
        files[SHARED] = sink.tensors(
            SHARED, [Entry(d, d, (count,), _shared_pieces(finished, d)) for d, count in totals]
        )
    rows = _rows(inputs)
    records = []
    for done, adapter in enumerate(inputs.adapters, 1):
        pairs = zip(finished, rows.values(), strict=True)
        mine = [(shard, row[adapter.name]) for shard, row in pairs if adapter.name in row]
        records.append(sink.tensors(str(adapter_path(Path(), adapter.name)), _entries(adapter, mine)))
        progress("writing", done, len(inputs.adapters))
    manifest = _manifest(inputs, spec, finished, records, files)
    total = sink.data(MANIFEST, manifests.dumps(manifest)).nbytes
    return total + sum(record.nbytes for record in (*files.values(), *records))


def _shared_pieces(finished: Sequence[Shard], dtype: str) -> Iterator[Tensor]:
    for shard in finished:
        yield from shard.shared(dtype)


def _entries(adapter: Adapter, mine: Sequence[tuple[Shard, int]]) -> list[Entry]:
    """One flat tensor a dtype with the pieces of all modules, and the carried tensors as they are."""
    counts = [
        {d: end - shard.starts[i].get(d, 0) for d, end in shard.starts[i + 1].items()} for shard, i in mine
    ]
    entries = []
    for dtype, count in shards.streams(counts):
        pieces = [(shard, i, dtype) for shard, i in mine]
        entries.append(Entry(dtype, dtype, (count,), (p for shard, i, d in pieces for p in shard.own(d, i))))
    return entries + [
        Entry(k, info.dtype, info.shape, [adapter.extra(k)]) for k, info in adapter.extras.items()
    ]


def _rows(inputs: Inputs) -> dict[str, dict[str, int]]:
    """module -> adapter -> its row among the adapters that have the module."""
    return {
        module: {a.name: i for i, a in enumerate(a for a in inputs.adapters if module in a.modules)}
        for module in inputs.modules
    }


def _manifest(
    inputs: Inputs,
    spec: Spec,
    finished: Sequence[Shard],
    records: Sequence[FileRecord],
    files: dict[str, FileRecord],
) -> Manifest:
    modules, forms = stored(inputs, finished)
    adapters = tuple(
        AdapterRecord(
            name=adapter.name,
            config=adapter.config,
            forms=own,
            error=float(f"{float(error):.8g}"),
            original_bytes=adapter.nbytes,
            file=record,
        )
        for adapter, own, error, record in zip(
            inputs.adapters, forms, adapter_errors(inputs, finished), records, strict=True
        )
    )
    return Manifest(
        base=inputs.base,
        revision=inputs.revision,
        fingerprint=inputs.fingerprint(),
        options=spec.recorded(),
        modules=modules,
        adapters=adapters,
        files=files,
        skipped=skipped(inputs),
    )


def stored(
    inputs: Inputs, finished: Sequence[Shard]
) -> tuple[tuple[Module, ...], list[tuple[Form | None, ...]]]:
    """The modules with what they share, and how every adapter stores each of them; None where it lacks one."""
    rows = _rows(inputs)
    modules = tuple(
        Module(name, out, in_, shard.layout)
        for (name, (out, in_)), shard in zip(inputs.modules.items(), finished, strict=True)
    )
    forms = [
        tuple(
            shard.forms[rows[m.name][adapter.name]] if adapter.name in rows[m.name] else None
            for m, shard in zip(modules, finished, strict=True)
        )
        for adapter in inputs.adapters
    ]
    return modules, forms


def skipped(inputs: Inputs) -> tuple[str, ...]:
    """What was left out and why, as the manifest records it: names and defects, no paths and no advice."""
    # A defect of something that has no name yet names its path: its last part will do.
    return tuple(str(replace(d, adapter=Path(d.adapter).name, remedy="")) for d in inputs.skipped)


def module_errors(inputs: Inputs, finished: Sequence[Shard]) -> tuple[Tensor, Tensor]:
    """||D^ - D||^2 and ||D||^2 of every adapter and module, (n, m) each, NaN where an adapter lacks the module."""
    shape = len(inputs.adapters), len(finished)
    residuals, energies = torch.full(shape, torch.nan).double(), torch.full(shape, torch.nan).double()
    for column, (row, shard) in enumerate(zip(_rows(inputs).values(), finished, strict=True)):
        having = [i for i, adapter in enumerate(inputs.adapters) if adapter.name in row]
        residuals[having, column], energies[having, column] = shard.residuals, shard.energies
    return residuals, energies


def adapter_errors(inputs: Inputs, finished: Sequence[Shard]) -> Tensor:
    """err_i = sum_m ||D^ - D||^2 / sum_m ||D||^2, (n,); 0 for an adapter that is zero everywhere."""
    residuals, energies = module_errors(inputs, finished)
    total = energies.nansum(1)
    return torch.where(total > 0, residuals.nansum(1) / total.clamp_min(1e-300), 0)
