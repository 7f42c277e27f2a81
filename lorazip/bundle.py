"""A bundle on disk: opened by its manifest, read one module of one adapter at a time, verified."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorazip import manifest as manifests
from lorazip.adapter import LowRank
from lorazip.codecs import DTYPES
from lorazip.errors import BundleError, UsageError, printable
from lorazip.header import FormatError, TensorInfo
from lorazip.manifest import AdapterRecord, FileRecord, Manifest, Module
from lorazip.mapped import Mapped
from lorazip.peft_keys import PREFIX, A, B
from lorazip.terms import Slot, decode, own_slots, shared_indices, shared_slots

MANIFEST = "bundle.json"
SHARED = "shared.safetensors"
ADAPTERS = "adapters"

Offsets = dict[str, int]  # stream (safetensors dtype) -> first element


class _Streams:
    """One file of flat tensors, named by their dtype, and perhaps carried tensors under their own names."""

    def __init__(self, path: Path, record: FileRecord):
        self.path = path
        try:
            self.file = Mapped(path)
        except (FormatError, OSError) as error:
            raise BundleError(f"{path.name}: {error}") from error
        size = self.file.header.size
        if size != record.nbytes:
            raise BundleError(
                f"{path.name} has {size} bytes, bundle.json says {record.nbytes} (copy it again)"
            )

    def check(self, expected: Mapping[str, int]) -> None:
        """Every stream has just the length that the manifest's layout gives."""
        found = {k: (i.dtype, i.shape) for k, i in self.file.header.tensors.items() if k in DTYPES}
        wanted = {dtype: (dtype, (count,)) for dtype, count in expected.items() if count}
        if found != wanted:
            raise BundleError(
                f"{self.path.name} does not have the layout that bundle.json gives it (copy it again)"
            )

    def read(self, slots: Sequence[Slot], at: Offsets) -> list[Tensor]:
        """Decode consecutive slots that start at these offsets; the offsets are not changed."""
        at, found = dict(at), []
        for slot in slots:
            parts = self.parts(slot, at)
            found.append(slot.decode([data for _, data in parts]))
            for dtype, data in parts:
                at[dtype] = at.get(dtype, 0) + len(data)
        return found

    def tensor(self, key: str) -> Tensor:
        """A whole tensor, from the map."""
        try:
            return self.file.tensor(key)
        except FormatError as error:
            raise BundleError(f"{self.path.name}: {error}") from error

    def parts(self, slot: Slot, at: Offsets) -> list[tuple[str, Tensor]]:
        """The stored parts of one slot that starts at these offsets, (dtype, flat data) each."""
        at, found = dict(at), []
        for part in slot.parts():
            start = at.get(part.dtype, 0)
            # A stream without elements is not in the file
            whole = self.tensor(part.dtype) if part.count else torch.zeros(0, dtype=DTYPES[part.dtype])
            found.append((part.dtype, whole[start : start + part.count]))
            at[part.dtype] = start + part.count
        return found


def offsets(slots: Sequence[Sequence[Slot]]) -> list[Offsets]:
    """Where the slots of each module start in their streams, and where the streams end (one entry more)."""
    at: dict[str, int] = defaultdict(int)
    starts = [dict(at)]
    for module in slots:
        for slot in module:
            for part in slot.parts():
                at[part.dtype] += part.count
        starts.append(dict(at))
    return starts


class BundleAdapter:
    """One adapter of a bundle, with the face of `lorazip.adapter.Adapter`.

    Attributes:
        name, config: as compressed.
        record: its entry in the manifest.
    """

    def __init__(self, bundle: Bundle, record: AdapterRecord):
        self.name = record.name
        self.config: dict[str, Any] = dict(record.config)
        self.record = record
        self._bundle = bundle

    @cached_property
    def modules(self) -> dict[str, Module]:
        """The modules that this adapter has, in the bundle's order."""
        pairs = zip(self._bundle.manifest.modules, self.record.forms, strict=True)
        return {module.name: module for module, form in pairs if form is not None}

    @cached_property
    def extras(self) -> dict[str, TensorInfo]:
        """Tensors carried as they were: key -> type and shape."""
        carried = {k: i for k, i in self._file.file.header.tensors.items() if k not in DTYPES}
        factors = {PREFIX + module + end for module in self.modules for end in (A, B)}
        for key in carried:
            if not key.startswith(PREFIX) or key in factors or not key.isprintable():
                raise BundleError(
                    f"{self.name}: {printable(key)} is no tensor that an adapter carries (do not use this bundle)"
                )
        return carried

    def low_rank(self, module: str) -> LowRank:
        """D = B A of one module, float32, scale 1; rank 0 where D is zero."""
        index = self._bundle.index[module]
        form = self.record.forms[index]
        if form is None:
            raise KeyError(module)
        m = self._bundle.manifest.modules[index]
        own = self._file.read(own_slots(form, m.layout, m.out, m.in_), self._offsets[index])
        shared = self._bundle.shared(index, shared_indices(form))
        b, a = decode(form, shared, own, m.out, m.in_)
        return LowRank(b, a, 1.0)

    def extra(self, key: str) -> Tensor:
        """One carried tensor, bit for bit."""
        if key not in self.extras:
            raise KeyError(key)
        return self._file.tensor(key)

    @cached_property
    def _slots(self) -> list[list[Slot]]:
        pairs = zip(self._bundle.manifest.modules, self.record.forms, strict=True)
        return [own_slots(form or (), m.layout, m.out, m.in_) for m, form in pairs]

    @cached_property
    def _offsets(self) -> list[Offsets]:
        return offsets(self._slots)

    @cached_property
    def _file(self) -> _Streams:
        streams = _Streams(adapter_path(self._bundle.path, self.name), self.record.file)
        streams.check(self._offsets[-1])
        return streams


@dataclass(frozen=True)
class Problem:
    """One thing that `verify` found: the file, and what is wrong with it."""

    file: str
    problem: str


class Bundle:
    """A verified-on-demand directory of compressed adapters.

    Attributes:
        path: the directory.
        manifest: its checked bundle.json.
    """

    def __init__(self, path: Path, manifest: Manifest, manifest_bytes: int):
        self.path = path
        self.manifest = manifest
        self._manifest_bytes = manifest_bytes
        self.index = {module.name: i for i, module in enumerate(manifest.modules)}

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Open a bundle: its manifest is checked against its own digest, tensors are read when asked for.

        Raises:
            UsageError: there is no such path; BundleError: not a bundle, damaged, or of another version.
        """
        path = Path(path)
        if not os.path.lexists(path):
            raise UsageError(f"{path} does not exist")
        if (path / ADAPTERS).is_symlink():  # add and remove would change what it points to
            raise BundleError(f"{path} is not a bundle: {ADAPTERS} is a link")
        try:
            status = (path / MANIFEST).stat()
            if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
                raise BundleError(f"{path} is not a bundle: {MANIFEST} is not a regular file")
            if status.st_size > manifests.MAX_MANIFEST:
                raise BundleError(f"{path}: {MANIFEST} has more than {manifests.MAX_MANIFEST} bytes")
            data = (path / MANIFEST).read_bytes()
        except OSError as error:
            raise BundleError(f"{path} is not a bundle: {MANIFEST}: {error.strerror}") from error
        try:
            return cls(path, manifests.loads(data), len(data))
        except BundleError as error:
            raise BundleError(f"{path}: {error}") from error

    @property
    def names(self) -> list[str]:
        """Names of the adapters, sorted."""
        return [record.name for record in self.manifest.adapters]

    @property
    def nbytes(self) -> int:
        """Every byte of the bundle: manifest, shared tensors, adapters, card."""
        files = sum(record.nbytes for record in self.manifest.files.values())
        return self._manifest_bytes + files + sum(a.file.nbytes for a in self.manifest.adapters)

    @property
    def original_bytes(self) -> int:
        """Bytes of the adapters' files before."""
        return sum(record.original_bytes for record in self.manifest.adapters)

    def adapter(self, name: str) -> BundleAdapter:
        """The adapter of that name. Raises UsageError when there is none."""
        for record in self.manifest.adapters:
            if record.name == name:
                return BundleAdapter(self, record)
        some = ", ".join(self.names[:10]) + (" …" if len(self.names) > 10 else "")
        raise UsageError(f"{self.path} has no adapter {name!r} (it has {some})")

    def __len__(self) -> int:
        return len(self.manifest.adapters)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __getitem__(self, name: str) -> BundleAdapter:
        return self.adapter(name)

    def __iter__(self) -> Iterator[BundleAdapter]:
        return (BundleAdapter(self, record) for record in self.manifest.adapters)

    def shared(self, index: int, which: Sequence[int]) -> dict[int, Tensor]:
        """Decoded shared tensors of one module as stored, (columns, out) or (columns, in), by index."""
        return {
            i: self._shared_file.read([self._shared_slots[index][i]], self._shared_offsets[index][i])[0]
            for i in which
        }

    def shared_parts(self, index: int, which: int) -> list[tuple[str, Tensor]]:
        """The stored parts of one shared tensor, (dtype, flat data) each."""
        return self._shared_file.parts(self._shared_slots[index][which], self._shared_offsets[index][which])

    @cached_property
    def _shared_slots(self) -> list[list[Slot]]:
        return [shared_slots(m.layout, m.out, m.in_) for m in self.manifest.modules]

    @cached_property
    def _shared_offsets(self) -> list[list[Offsets]]:
        """Where each shared tensor starts, module by module."""
        flat = iter(offsets([[slot] for slots in self._shared_slots for slot in slots]))
        return [[next(flat) for _ in slots] for slots in self._shared_slots]

    @cached_property
    def _shared_ends(self) -> Offsets:
        return offsets(self._shared_slots)[-1]

    @cached_property
    def _shared_file(self) -> _Streams:
        if SHARED not in self.manifest.files:
            raise BundleError(f"{self.path}: bundle.json does not list {SHARED}, which its modules need")
        streams = _Streams(self.path / SHARED, self.manifest.files[SHARED])
        streams.check(self._shared_ends)
        return streams

    def verify(self, names: Sequence[str] | None = None) -> list[Problem]:
        """Read every byte: all files are there, of the recorded size and sha256, and have their layout.

        Args:
            names: check only what these adapters need (their files and the shared tensors).
        """
        problems = []
        chosen = set(self.names if names is None else names)
        for record in self.manifest.adapters:
            path = adapter_path(self.path, record.name)
            if record.name in chosen:
                problems += _problems(path, path.relative_to(self.path).as_posix(), record.file)
        for name, file in self.manifest.files.items():
            if names is None or name == SHARED:
                problems += _problems(self.path / name, name, file)
        if not problems:
            try:
                if SHARED in self.manifest.files or any(self._shared_ends.values()):
                    self._shared_file  # noqa: B018 - opening the file checks its layout
                for name in sorted(chosen):
                    self.adapter(name).extras  # noqa: B018
            except BundleError as error:
                problems.append(Problem(MANIFEST, str(error)))
        return problems

    def require(self, names: Sequence[str]) -> None:
        """Check the bytes that these adapters need before anything is made of them.

        Raises:
            UsageError: no such adapter; BundleError: damaged data.
        """
        for name in names:
            self.adapter(name)
        problems = self.verify(names)
        if problems:
            raise BundleError("\n".join(f"{self.path}: {p.file}: {p.problem}" for p in problems))

    def strays(self) -> list[str]:
        """Files that the manifest does not list (left by an interrupted add or remove); they are never read."""
        known = set(expected_files(self.manifest)) | {MANIFEST}
        found = (p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if not p.is_dir())
        return sorted(
            name
            for name in found
            if name not in known and not name.startswith((".git/", ".gitattributes", ".cache/"))
        )


def adapter_path(bundle: Path, name: str) -> Path:
    """The file of one adapter."""
    return bundle / ADAPTERS / f"{name}.safetensors"


def expected_files(manifest: Manifest) -> dict[str, FileRecord]:
    """Path inside the bundle -> record, of everything but the manifest itself."""
    adapters = {f"{ADAPTERS}/{a.name}.safetensors": a.file for a in manifest.adapters}
    return {**manifest.files, **adapters}


def _problems(path: Path, name: str, record: FileRecord) -> list[Problem]:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return [Problem(name, "is not a regular file")]
        if status.st_size != record.nbytes:
            return [Problem(name, f"has {status.st_size} bytes, bundle.json says {record.nbytes}")]
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return [Problem(name, f"cannot be read: {error.strerror}")]
    if digest != record.sha256:
        return [Problem(name, "its sha256 is not the recorded one: it was changed or damaged")]
    return []
