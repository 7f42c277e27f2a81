"""Changes of a bundle that need no mathematics: take adapters out, or make a smaller bundle of some of them.

A changed bundle is the old one until the moment when its new bundle.json is renamed into place; what the manifest does
not list is not part of the bundle, so an interruption leaves at most a file that nobody reads.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from lorazip import manifest as manifests
from lorazip.bundle import ADAPTERS, MANIFEST, SHARED, Bundle, adapter_path
from lorazip.errors import BundleError, TargetError, UsageError
from lorazip.files import Entry, flush, fresh_folder, locked, write_bytes, write_safetensors
from lorazip.manifest import AdapterRecord, FileRecord, Manifest, Module
from lorazip.terms import Form, renumbered, shared_indices


def remove(path: Path, names: Sequence[str]) -> Bundle:
    """Take adapters out of a bundle. Shared tensors stay, also those that only they used (`subset` drops them).

    Raises:
        UsageError: no such adapter, or none would be left.
    """
    with changing(path) as bundle:
        gone = {bundle.adapter(name).name for name in names}
        kept = tuple(a for a in bundle.manifest.adapters if a.name not in gone)
        if not kept:
            raise UsageError(f"{path} would have no adapter left (delete the directory instead)")
        commit(path, replace(bundle.manifest, adapters=kept))
        for name in gone:
            adapter_path(path, name).unlink(missing_ok=True)
    return Bundle.open(path)


@contextlib.contextmanager
def changing(path: Path) -> Iterator[Bundle]:
    """Open a bundle to change it: nobody else can meanwhile.

    Raises:
        TargetError: somebody else does; UsageError, BundleError: as `Bundle.open`.
    """
    Bundle.open(path)  # what cannot be opened is not locked either, and this says why
    with locked(path):
        yield Bundle.open(path)


def commit(path: Path, manifest: Manifest) -> None:
    """Make this the bundle's manifest, atomically."""
    write_bytes(path / MANIFEST, manifests.dumps(manifest))


def subset(bundle: Bundle, names: Sequence[str], output: Path) -> Bundle:
    """Write a bundle of some adapters, with just the shared tensors that they use; their own files are copied.

    Raises:
        UsageError: no such adapter; BundleError: damaged data.
        TargetError: the output exists or cannot be written.
    """
    bundle.require(names)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise TargetError(f"{output} exists (choose another name)")
    chosen = [a for a in bundle.manifest.adapters if a.name in set(names)]
    modules, adapters, used = _pruned(bundle.manifest, chosen)
    target = Path(os.path.realpath(output))  # a link stays; what it names is written
    try:
        with fresh_folder(target) as temporary:
            (temporary / ADAPTERS).mkdir()
            files: dict[str, FileRecord] = {}
            for name in bundle.manifest.files:
                if name != SHARED:
                    files[name] = _copy(bundle.path / name, temporary / name, bundle.manifest.files[name])
            entries = _shared_entries(bundle, used)
            if entries:
                files[SHARED] = write_safetensors(temporary / SHARED, entries)
            for record in adapters:
                place = adapter_path(temporary, record.name)
                _copy(adapter_path(bundle.path, record.name), place, record.file)
            commit(temporary, replace(bundle.manifest, modules=modules, adapters=adapters, files=files))
            temporary.rename(target)
            flush(target.parent)
    except OSError as error:
        raise TargetError(f"{output} cannot be written: {error.strerror}") from error
    return Bundle.open(output)


def _pruned(
    manifest: Manifest, chosen: Sequence[AdapterRecord]
) -> tuple[tuple[Module, ...], tuple[AdapterRecord, ...], list[list[int]]]:
    """Modules and adapters with unused shared tensors dropped and the others renumbered, and which were kept."""
    used, modules = [], []
    columns: list[list[Form | None]] = []
    for at, module in enumerate(manifest.modules):
        forms = [a.forms[at] for a in chosen]
        kept = sorted({i for form in forms for i in shared_indices(form or ())})
        place = {old: new for new, old in enumerate(kept)}
        used.append(kept)
        modules.append(replace(module, layout=tuple(module.layout[i] for i in kept)))
        columns.append([None if form is None else renumbered(form, place) for form in forms])
    adapters = tuple(replace(a, forms=tuple(column[i] for column in columns)) for i, a in enumerate(chosen))
    return tuple(modules), adapters, used


def _shared_entries(bundle: Bundle, used: Sequence[Sequence[int]]) -> list[Entry]:
    pieces: dict[str, list[Tensor]] = {}
    for index, kept in enumerate(used):
        for which in kept:
            for dtype, data in bundle.shared_parts(index, which):
                if len(data):  # a stream without elements is absent
                    pieces.setdefault(dtype, []).append(data)
    return [Entry(dtype, dtype, (sum(map(len, data)),), data) for dtype, data in pieces.items()]


def _copy(source: Path, target: Path, record: FileRecord) -> FileRecord:
    """Copy one file and make sure that what arrived is what the manifest says."""
    copied = write_bytes(target, source.read_bytes())
    if copied != record:
        raise BundleError(f"{source}: it is damaged, or changed while it was copied")
    return record
