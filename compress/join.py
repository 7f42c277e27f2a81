"""Joining later: new adapters on the bases of a finished bundle (METHODS.md §2 "Joining later", §3 "projected").

The bases stay; every new adapter gets the least-squares core on the one that fits it best, its error is measured, and
where the bases cannot hold it, it keeps factors of its own. To a bundle of auto every new adapter is added as auto
stores it alone: there profiles and bases were chosen for all adapters together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from lorazip.adapter import Adapter, LowRank
from lorazip.bundle import Bundle, adapter_path
from lorazip.codecs import DTYPES
from lorazip.compress import encode, planning, shards, sides
from lorazip.compress.encode import ModuleCode
from lorazip.compress.joint import Pair
from lorazip.compress.methods import METHODS
from lorazip.compress.own import own_factors
from lorazip.compress.planning import Choice
from lorazip.compress.spec import Spec
from lorazip.compress.svd import OwnFactors
from lorazip.edit import changing, commit
from lorazip.errors import BundleError, Defect, InputError, TargetError, UsageError
from lorazip.files import Entry, flush, write_safetensors
from lorazip.manifest import AdapterRecord, FileRecord, Module
from lorazip.names import folded
from lorazip.sources import Inputs, fingerprint, open_adapters
from lorazip.terms import Form, shared_indices

BATCH = 16  # adapters whose own tensors are held in memory at a time
Progress = Callable[[str, int, int], None]


def add(
    path: Path,
    paths: Sequence[str],
    *,
    max_error: float | None = None,
    base: str | None = None,
    skip_bad: bool = False,
    device: str = "auto",
    progress: Progress = lambda what, done, total: None,
) -> tuple[Bundle, Inputs]:
    """Add adapters to a bundle; nothing that it holds is changed.

    Args:
        path: the bundle.
        paths: as for `compress`.
        max_error: bound on err of every new adapter, and but for auto of its every module; by default the bundle's own
            bound, else the worst error that one of its adapters has already.
        base: accept adapters of another base string.
        skip_bad: leave adapters with defects out.
    Returns:
        the changed bundle, and what was added and skipped.
    Raises:
        InputError: bad adapters, names that the bundle has, another base or shapes; nothing is changed.
    """
    with changing(path) as bundle:
        bundle.require([])
        inputs = open_adapters(
            paths, base=base, skip_bad=skip_bad, progress=lambda done, total: progress("reading", done, total)
        )
        _check(bundle, inputs, base)
        spec = _spec(bundle, max_error, device)
        known = {m.name: m for m in bundle.manifest.modules}
        fresh = [Module(n, o, i, ()) for n, (o, i) in inputs.modules.items() if n not in known]
        modules = (*bundle.manifest.modules, *fresh)
        records: list[AdapterRecord] = []
        for start in range(0, len(inputs.adapters), BATCH):
            some = inputs.adapters[start : start + BATCH]
            if spec.method == "auto":
                for adapter in some:
                    records += _recorded(bundle, modules, [adapter], _planned(inputs, adapter, spec))
            else:
                records += _recorded(bundle, modules, some, _joined(bundle, modules, some, spec))
            progress("joining", len(records), len(inputs.adapters))
        missing: tuple[None, ...] = (None,) * len(fresh)
        old = (replace(a, forms=(*a.forms, *missing)) for a in bundle.manifest.adapters)
        commit(
            path,
            replace(
                bundle.manifest,
                modules=modules,
                adapters=tuple(sorted((*old, *records), key=lambda a: a.name)),
                fingerprint=fingerprint({m.name: (m.out, m.in_) for m in modules}),
            ),
        )
    return Bundle.open(path), inputs


def _joined(
    bundle: Bundle, modules: Sequence[Module], adapters: Sequence[Adapter], spec: Spec
) -> Iterator[tuple[str, ModuleCode]]:
    """Encode some adapters, module by module, on the bases that are there."""
    for index, module in enumerate(modules):
        factors = [a.low_rank(module.name) for a in adapters if module.name in a.modules]
        if factors:
            bases = bundle.shared(index, range(len(module.layout))) if module.layout else {}
            yield module.name, join(module, bases, factors, spec)


def _planned(inputs: Inputs, adapter: Adapter, spec: Spec) -> Iterator[tuple[str, ModuleCode]]:
    """Encode one adapter by auto within the bound. By itself it shares nothing, so its forms fit any module."""
    one = replace(inputs, adapters=(adapter,))
    curves = [planning.survey(one, spec, name) for name in one.modules]
    choice: Choice | None = planning.choose(one, spec, curves)
    codes: list[ModuleCode] = []
    while choice is not None:
        tasks = [choice.task(place, name, [adapter.low_rank(name)]) for place, name in enumerate(one.modules)]
        codes = sides.encode_planned(tasks, spec)
        encoded = [shards.describe(c, *shape) for c, shape in zip(codes, one.modules.values(), strict=True)]
        choice = planning.repaired(one, spec, choice, encoded)
    yield from zip(one.modules, codes, strict=True)


def _recorded(
    bundle: Bundle,
    modules: Sequence[Module],
    adapters: Sequence[Adapter],
    encoded: Iterable[tuple[str, ModuleCode]],
) -> list[AdapterRecord]:
    """Write the files of some adapters.

    Args:
        encoded: modules that some of them have, each with the forms of those that have it.
    """
    place = {module.name: index for index, module in enumerate(modules)}
    forms: dict[str, list[Form | None]] = {a.name: [None] * len(modules) for a in adapters}
    parts: dict[str, list[Tensor]] = defaultdict(list)
    sums = {a.name: [0.0, 0.0] for a in adapters}
    for name, code in encoded:
        having = [a for a in adapters if name in a.modules]
        rows = zip(having, code.forms, code.own, code.residuals, code.energies, strict=True)
        for adapter, form, own, residual, energy in rows:
            forms[adapter.name][place[name]] = form
            parts[adapter.name] += own
            sums[adapter.name][0] += float(residual)
            sums[adapter.name][1] += float(energy)
    records = []
    for adapter in adapters:
        residual, energy = sums[adapter.name]
        file = _write(bundle.path, adapter, parts.pop(adapter.name, []))
        error = float(f"{residual / energy if energy else 0.0:.8g}")
        own_forms = tuple(forms[adapter.name])
        records.append(AdapterRecord(adapter.name, adapter.config, own_forms, error, adapter.nbytes, file))
    return records


def join(module: Module, bases: dict[int, Tensor], factors: Sequence[LowRank], spec: Spec) -> ModuleCode:
    """Encode adapters of one module on stored bases.

    Args:
        module: with its layout; what is tried are its left bases that a right one follows, as compress writes them.
        bases: decoded shared tensors, (columns, out) or (columns, in).
        factors: of the new adapters.
        spec: of the bundle, with the bound in max_error.
    """
    ready, loaded = encode.prepare(module.name, factors, spec)
    starts = [
        i for i, (one, two) in enumerate(pairwise(module.layout)) if (one.side, two.side) == ("left", "right")
    ]
    if spec.method == "svd" or not starts:
        own = own_factors(ready, range(len(factors)), _alone(spec), factors)
        return encode.measured(ready, loaded, module.layout, (), own, bases)
    device = loaded.left.device
    pairs = [Pair(bases[c].T.to(device), bases[c + 1].T.to(device)) for c in starts]
    errors = torch.stack(
        [METHODS[spec.method].residuals(ready.stack, p, ready.energies) for p in pairs], dim=1
    )
    best = errors.argmin(1).tolist()
    own = [OwnFactors((), ())] * len(factors)
    for c, pair in enumerate(pairs):
        members = [i for i, choice in enumerate(best) if choice == c and ready.energies[i] > 0]
        if members:
            found = encode.cores(ready.stack, members, pair, spec, (starts[c], starts[c] + 1))
            for i, core in zip(members, found, strict=True):
                own[i] = core
    code = encode.measured(ready, loaded, module.layout, (), own, bases)
    missed = [i for i, misses in enumerate(encode.missed(code, spec)) if misses]
    if not missed:
        return code
    alone = dict(zip(missed, own_factors(ready, missed, _alone(spec), factors), strict=True))
    own = [alone.get(i, o) for i, o in enumerate(own)]
    return encode.measured(ready, loaded, module.layout, (), own, bases)


def _alone(spec: Spec) -> Spec:
    """Own factors: as the bundle's svd was asked for, or within the bound."""
    if spec.method == "svd" and (spec.rank is not None or spec.energy is not None):
        return spec
    return spec.alone()


def _spec(bundle: Bundle, max_error: float | None, device: str) -> Spec:
    try:
        spec = Spec(**bundle.manifest.options)
    except (TypeError, UsageError) as error:
        raise BundleError(
            f"{bundle.path}: its options {dict(bundle.manifest.options)} are not those of this lorazip (upgrade it)"
        ) from error
    spec = replace(spec, device=device)
    if spec.method == "svd" and max_error is None:
        return spec
    if max_error is None:
        worst = max(a.error for a in bundle.manifest.adapters)
        max_error = spec.max_error if spec.max_error is not None else min(worst, 0.99)
    # What calibration decided is in the bundle's bases; a bound needs none.
    return replace(
        spec, max_error=max_error, energy=None, ratio=None, budget=None, calibrate=None, prompts=None
    )


def _check(bundle: Bundle, inputs: Inputs, base: str | None) -> None:
    """All that keeps adapters from joining: names, base, shapes."""
    defects = []
    known = {m.name: (m.out, m.in_) for m in bundle.manifest.modules}
    taken = {folded(name) for name in bundle.names}
    for adapter in inputs.adapters:
        if folded(adapter.name) in taken:
            remedy = "remove it first, or give the new one another name: NAME=PATH"
            defects.append(
                Defect(adapter.name, problem="the bundle has an adapter of this name", remedy=remedy)
            )
        for module, info in adapter.modules.items():
            shape = info.out, info.in_
            if known.get(module, shape) != shape:
                problem = f"is {info.out}x{info.in_}, in the bundle {known[module][0]}x{known[module][1]}"
                remedy = "another base model? it cannot join this bundle"
                defects.append(Defect(adapter.name, module, problem=problem, remedy=remedy))
                break
    if base is None and inputs.base != bundle.manifest.base:
        problem = f"base model is {inputs.base!r}, the bundle's is {bundle.manifest.base!r}"
        remedy = f"if they are the same model, give --base {bundle.manifest.base}"
        defects += [Defect(a.name, problem=problem, remedy=remedy) for a in inputs.adapters]
    elif base is not None and base != bundle.manifest.base:
        defects.append(
            Defect("--base", problem=f"the bundle's base model is {bundle.manifest.base!r}, not {base!r}")
        )
    if defects:
        raise InputError(defects)


def _write(path: Path, adapter: Adapter, parts: Sequence[Tensor]) -> FileRecord:
    """The adapter's file. One that is there but not in the manifest was left by an interrupted add: it is replaced."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    streams: dict[str, list[Tensor]] = defaultdict(list)
    for part in parts:
        streams[names[part.dtype]].append(part)
    counts = {k: sum(map(len, p)) for k, p in streams.items()}
    entries = [Entry(k, k, (counts[k],), p) for k, p in streams.items() if counts[k]]  # none without elements
    entries += [Entry(k, info.dtype, info.shape, [adapter.extra(k)]) for k, info in adapter.extras.items()]
    target = adapter_path(path, adapter.name)
    try:
        target.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise TargetError(f"{target.parent} cannot be made: {error.strerror}") from error
    record = write_safetensors(target, entries)
    flush(target.parent)
    return record


def fallback_count(bundle: Bundle, names: Sequence[str]) -> int:
    """Modules of these adapters that share nothing although the module has bases."""
    chosen = set(names)
    return sum(
        form is not None and len(form) > 0 and bool(module.layout) and not shared_indices(form)
        for record in bundle.manifest.adapters
        if record.name in chosen
        for module, form in zip(bundle.manifest.modules, record.forms, strict=True)
    )
