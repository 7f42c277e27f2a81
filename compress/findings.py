"""What the report says, as numbers: where the bytes are, how each adapter and kind of module fared, what is special."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lorazip.bundle import ADAPTERS, MANIFEST, SHARED, Bundle, expected_files
from lorazip.compress.outcome import Outcome
from lorazip.header import TensorInfo, read_header
from lorazip.kinds import columns_by_kind
from lorazip.terms import own_slots
from lorazip.units import shape

NAMED = 6  # fallbacks of an adapter that are named one by one


@dataclass(frozen=True)
class ByteRow:
    """A part of the bundle: what it is, a few words about it, its bytes."""

    name: str
    meaning: str
    nbytes: int


@dataclass(frozen=True)
class AdapterRow:
    """One adapter. `group` is the number of its shared-init group, `stored` is None after a dry run."""

    name: str
    error: float
    worst_module: str
    worst_error: float
    group: int | None
    fallbacks: int
    modules: int
    original: int
    stored: int | None


@dataclass(frozen=True)
class Kind:
    """The modules of one kind, q_proj say.

    Attributes:
        name: their common name.
        columns: their columns in `Outcome.errors`, layer by layer.
        shapes: their shapes (out, in).
        mean_error: mean of the errors of all adapters and modules of the kind.
        fallbacks: how many of these fell back.
        mean: (r,) mean share of energy in the first 1 … r singular values.
        low: (r,) the least share among the modules.
        high: (r,) the greatest.
    """

    name: str
    columns: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]
    mean_error: float
    fallbacks: int
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    def needed(self, share: float) -> int | None:
        """How many singular values have this share of the energy, in the mean; None if all have less."""
        # The shares are sums of rounded numbers: a hair of slack.
        return next((k for k, sum_ in enumerate(self.mean, 1) if sum_ >= share - 1e-9), None)


@dataclass(frozen=True)
class Fallbacks:
    """What fell back of one adapter: how many modules of how many, and which, by name or by kind."""

    adapter: str
    count: int
    modules: int
    places: str


@dataclass(frozen=True)
class Carried:
    """A tensor that is carried as it is, by key: in how many adapters, of which types and shapes, bytes in all."""

    key: str
    adapters: int
    types: str
    nbytes: int


def byte_rows(outcome: Outcome) -> list[ByteRow]:
    """Where the bytes are, counted in the files: disjoint parts, none empty, whose sum is `outcome.bundle_bytes`."""
    carried = sum(info.nbytes for adapter in outcome.inputs.adapters for info in adapter.extras.values())
    carried_row = ByteRow("Carried tensors", "what is no low-rank factor, bit for bit as it was", carried)
    if outcome.bundle is None:
        rest = outcome.bundle_bytes - carried
        parts = [
            ByteRow("All else", "a dry run writes no files, so only the sum is known", rest),
            carried_row,
        ]
        return [part for part in parts if part.nbytes]
    bundle, manifest = outcome.bundle, outcome.bundle.manifest
    heads = {
        name: _head(bundle.path / name) for name in expected_files(manifest) if name.endswith(".safetensors")
    }
    shared = manifest.files[SHARED].nbytes - heads[SHARED] if SHARED in manifest.files else 0
    listed = sum(record.nbytes for record in expected_files(manifest).values())
    fallbacks = _fallback_bytes(outcome, bundle)
    own = sum(record.file.nbytes for record in manifest.adapters) - sum(heads.values()) + heads.get(SHARED, 0)
    role = "what each adapter adds to the bases" if shared else "the factors of each adapter"
    parts = [
        ByteRow("Shared tensors", f"{SHARED}: the bases that adapters have in common", shared),
        ByteRow("Adapters’ own tensors", f"{ADAPTERS}/: {role}", own - carried - fallbacks),
        ByteRow(
            "Fallbacks", f"{ADAPTERS}/: own factors, where the bases would not hold the bound", fallbacks
        ),
        carried_row,
        ByteRow("Headers", "of the safetensors files: names, types, positions", sum(heads.values())),
        ByteRow("Manifest", f"{MANIFEST}: forms, configs, errors, checksums", bundle.nbytes - listed),
    ]
    others = {name: record.nbytes for name, record in manifest.files.items() if name != SHARED}
    parts += [
        ByteRow("Card", f"{name}: what the bundle is, for the Hub", n) for name, n in sorted(others.items())
    ]
    return [part for part in parts if part.nbytes]


def _head(path: Path) -> int:
    """Bytes of a safetensors file before its data."""
    header = read_header(path)
    return min(header.begin.values(), default=header.size)


def _fallback_bytes(outcome: Outcome, bundle: Bundle) -> int:
    total = 0
    for row, column in outcome.fallbacks.nonzero().tolist():
        module = bundle.manifest.modules[column]
        form = bundle.manifest.adapters[row].forms[column] or ()
        slots = own_slots(form, module.layout, module.out, module.in_)
        total += sum(part.nbytes for slot in slots for part in slot.parts())
    return total


def adapter_rows(outcome: Outcome, groups: Sequence[Sequence[str]]) -> list[AdapterRow]:
    """All adapters, worst first."""
    number = {name: i for i, group in enumerate(groups, 1) for name in group}
    stored: dict[str, int] = {}
    if outcome.bundle is not None:
        stored = {record.name: record.file.nbytes for record in outcome.bundle.manifest.adapters}
    rows = []
    for i, adapter in enumerate(outcome.inputs.adapters):
        errors = outcome.errors[i].nan_to_num(-1)
        worst = int(errors.argmax())
        rows.append(
            AdapterRow(
                name=adapter.name,
                error=float(outcome.adapter_errors[i]),
                worst_module=outcome.modules[worst] if adapter.modules else "",
                worst_error=max(0.0, float(errors[worst])),
                group=number.get(adapter.name),
                fallbacks=int(outcome.fallbacks[i].sum()),
                modules=len(adapter.modules),
                original=adapter.nbytes,
                stored=stored.get(adapter.name),
            )
        )
    return sorted(rows, key=lambda row: (-row.error, row.name))


def mean_error(outcome: Outcome, names: Collection[str]) -> float:
    """Mean err_i of these adapters, NaN for none."""
    pairs = zip(outcome.inputs.adapters, outcome.adapter_errors.tolist(), strict=True)
    found = [error for adapter, error in pairs if adapter.name in names]
    return sum(found) / len(found) if found else float("nan")


def kinds(outcome: Outcome) -> list[Kind]:
    """The modules by kind, sorted by name."""
    found = []
    for name, columns in columns_by_kind(outcome.modules).items():
        shapes = sorted({outcome.inputs.modules[outcome.modules[column]] for column in columns})
        spectra = [outcome.spectra[column].double().nan_to_num(0) for column in columns]
        longest = max(len(spectrum) for spectrum in spectra)
        padded = [torch.nn.functional.pad(spectrum, (0, longest - len(spectrum))) for spectrum in spectra]
        shares = torch.stack(padded).cumsum(1).clamp_max(1)  # (modules, r)
        found.append(
            Kind(
                name=name,
                columns=columns,
                shapes=tuple(shapes),
                mean_error=float(outcome.errors[:, list(columns)].nanmean()),
                fallbacks=int(outcome.fallbacks[:, list(columns)].sum()),
                mean=tuple(shares.mean(0).tolist()),
                low=tuple(shares.amin(0).tolist()),
                high=tuple(shares.amax(0).tolist()),
            )
        )
    return found


def fallback_rows(outcome: Outcome, found: Sequence[Kind]) -> list[Fallbacks]:
    """The adapters with fallbacks, most first. Few are named; many are counted by kind of module."""
    rows = []
    for i, adapter in enumerate(outcome.inputs.adapters):
        fallen = outcome.fallbacks[i]
        at = fallen.nonzero()[:, 0].tolist()
        if not at:
            continue
        if len(at) <= NAMED:
            places = [outcome.modules[column] for column in at]
        else:
            counts = [(kind, int(fallen[list(kind.columns)].sum())) for kind in found]
            places = [f"{count} of {len(kind.columns)} {kind.name}" for kind, count in counts if count]
        rows.append(Fallbacks(adapter.name, len(at), len(adapter.modules), ", ".join(places)))
    return sorted(rows, key=lambda row: (-row.count, row.adapter))


def carried(outcome: Outcome) -> list[Carried]:
    """The tensors that are carried as they are, by key, most bytes first."""
    by_key: dict[str, list[TensorInfo]] = defaultdict(list)
    for adapter in outcome.inputs.adapters:
        for key, info in adapter.extras.items():
            by_key[key].append(info)
    rows = []
    for key, infos in by_key.items():
        types = sorted({f"{info.dtype} {shape(info.shape)}" for info in infos})
        rows.append(Carried(key, len(infos), ", ".join(types), sum(info.nbytes for info in infos)))
    return sorted(rows, key=lambda row: (-row.nbytes, row.key))
