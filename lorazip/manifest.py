"""bundle.json: what a bundle holds and how its files are laid out (specified in docs/FORMAT.md).

The file starts with one line `{"digest":"<sha256 of all bytes after this line>",`, so any language can check it without
a canonical form of JSON. Lists of small numbers (a module's layout, an adapter's forms) are stored in runs.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lorazip import codecs, numbers
from lorazip.errors import BundleError
from lorazip.header import FormatError, parse_json
from lorazip.names import problem_with, twins
from lorazip.terms import Core, Form, Layout, Own, Shared, Term

FORMAT = "lorazip-bundle"
VERSION = 1
MAX_EXTENT = 2**24  # rows or columns of a module; the largest vocabularies have a million
ABSENT = -1  # in place of a form: the adapter does not have this module
MAX_MANIFEST = 256 * 2**20
MAX_TERMS = 64  # of a form: a term may repeat a shared tensor, so each costs memory that no file had to hold
MAX_PLACES = 2**27  # adapters times modules: runs make a short manifest out of many
MAX_UNSTORED = 2**28  # rows of a form that take no bytes (tcq0), times their width: a gigabyte in memory
MAX_NUMBER = 3.4028234663852886e38  # of float32, in which all is computed
_FIRST_LINE = re.compile(rb'\{"digest":"([0-9a-f]{64})",\n')


@dataclass(frozen=True)
class FileRecord:
    """Size and sha256 (hex) of one file of the bundle."""

    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Module:
    """One adapted module: its dotted name in the base model, its shape, and its shared tensors."""

    name: str
    out: int
    in_: int
    layout: Layout


@dataclass(frozen=True)
class AdapterRecord:
    """One adapter of the bundle.

    Attributes:
        name: unique, safe as a file name.
        config: the original adapter_config.json.
        forms: one a module of the manifest, None where the adapter does not have the module.
        error: measured ||D^ - D||^2 / ||D||^2 over all its modules.
        original_bytes: of its weights and config file when it was compressed.
        file: its file adapters/NAME.safetensors.
    """

    name: str
    config: Mapping[str, Any]
    forms: tuple[Form | None, ...]
    error: float
    original_bytes: int
    file: FileRecord


@dataclass(frozen=True)
class Manifest:
    """Everything bundle.json says.

    Attributes:
        base: base model, Hub id or as the adapters name it.
        revision: its revision or None.
        fingerprint: sha256 of the lines "module out in": the shapes that a base must have.
        options: the resolved options of the compression.
        modules: in the order of the files' layout.
        adapters: sorted by name.
        files: every other file: shared.safetensors, README.md.
        skipped: what --skip-bad left out, one line each.
    """

    base: str
    revision: str | None
    fingerprint: str
    options: Mapping[str, Any]
    modules: tuple[Module, ...]
    adapters: tuple[AdapterRecord, ...]
    files: Mapping[str, FileRecord]
    skipped: tuple[str, ...] = field(default=())


def dumps(manifest: Manifest) -> bytes:
    """The bytes of bundle.json: one line a module, a form, an adapter; the same manifest gives the same bytes."""
    layouts = list(dict.fromkeys(m.layout for m in manifest.modules))
    forms = list(dict.fromkeys(f for a in manifest.adapters for f in a.forms if f is not None))
    layout_place = {layout: i for i, layout in enumerate(layouts)}
    place = {form: i for i, form in enumerate(forms)}
    common = _common([a.config for a in manifest.adapters])
    body = {
        "format": FORMAT,
        "version": VERSION,
        "base": {"name": manifest.base, "revision": manifest.revision, "fingerprint": manifest.fingerprint},
        "options": dict(manifest.options),
        "config": common,
        "layouts": [[[s.side, s.columns, s.codec] for s in layout] for layout in layouts],
        "forms": [[pack_term(t) for t in form] for form in forms],
        "modules": [[m.name, m.out, m.in_] for m in manifest.modules],
        "module_layouts": numbers.runs([layout_place[m.layout] for m in manifest.modules]),
        "adapters": [
            {
                "name": a.name,
                **_difference(a.config, common),
                "forms": numbers.shorter([ABSENT if f is None else place[f] for f in a.forms]),
                "error": a.error,
                "original_bytes": a.original_bytes,
                "bytes": a.file.nbytes,
                "sha256": a.file.sha256,
            }
            for a in manifest.adapters
        ],
        "files": {name: [f.nbytes, f.sha256] for name, f in sorted(manifest.files.items())},
        "skipped": list(manifest.skipped),
    }
    lines = [f"{_json(key)}:{_block(value)}" for key, value in body.items()]
    rest = (",\n".join(lines) + "}\n").encode()
    return b'{"digest":"' + hashlib.sha256(rest).hexdigest().encode() + b'",\n' + rest


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _block(value: object) -> str:
    """Lists of items one a line; all else on one line."""
    if isinstance(value, list) and value and isinstance(value[0], list | dict):
        return "[\n" + ",\n".join(_json(item) for item in value) + "]"
    return _json(value)


def pack_term(term: Term) -> list[object]:
    """A term as JSON: [left, core, right].

    An outer factor is a shared index, [columns, codec], or [columns, codec, shared index, codec of the loadings].
    """

    def side(factor: int | Own) -> object:
        if isinstance(factor, int):
            return factor
        whole = [factor.columns, factor.codec, factor.basis, factor.loadings]
        return whole if factor.basis is not None else whole[:2]

    core: list[object] = [term.core.kind]
    match term.core.kind:
        case "scalar":
            core.append(term.core.value)
        case "factored":
            core += [term.core.codec, term.core.rank]
        case _:
            core.append(term.core.codec)
    return [side(term.left), core, side(term.right)]


def _common(configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """For every key that most configs have, its most frequent value (the first of these by text)."""
    common: dict[str, Any] = {}
    for key in sorted({key for config in configs for key in config}):
        texts = Counter(_json(config[key]) for config in configs if key in config)
        if 2 * texts.total() > len(configs):
            common[key] = json.loads(max(sorted(texts), key=texts.__getitem__))
    return common


def _difference(config: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    changed = {k: v for k, v in config.items() if k not in common or _json(common[k]) != _json(v)}
    removed = sorted(k for k in common if k not in config)
    result: dict[str, Any] = {"config": changed} if changed else {}
    return {**result, "config_removed": removed} if removed else result


def loads(data: bytes) -> Manifest:
    """Read and check bundle.json.

    Raises:
        BundleError: damaged, of another version, or inconsistent.
    """
    first = _FIRST_LINE.match(data)
    if first is None:
        raise BundleError("bundle.json does not start with its digest: not a lorazip bundle, or damaged")
    rest = data[first.end() :]
    if hashlib.sha256(rest).hexdigest().encode() != first.group(1):
        raise BundleError(
            "bundle.json does not match its own digest: it was changed or damaged (copy the bundle again)"
        )
    try:
        body = parse_json(b"{" + rest)
        return _manifest(body)
    except FormatError as error:
        raise BundleError(f"bundle.json: {error}") from error
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise BundleError(
            f"bundle.json is not a manifest of version {VERSION}: {repr(error)[:200]}"
        ) from error


def _manifest(body: dict[str, Any]) -> Manifest:
    if body["format"] != FORMAT:
        raise BundleError(f"bundle.json: format {body['format']!r} is not {FORMAT!r}")
    if type(body["version"]) is not int or body["version"] != VERSION:
        raise BundleError(
            f"bundle.json has version {body['version']!r}; this lorazip reads {VERSION} (upgrade it)"
        )
    if len(body["modules"]) * len(body["adapters"]) > MAX_PLACES:
        raise BundleError(f"bundle.json: adapters times modules is more than {MAX_PLACES}")
    layouts = [tuple(unpack_shared(item) for item in layout) for layout in body["layouts"]]
    forms = [_form(form) for form in body["forms"]]
    indices = numbers.unrun(body["module_layouts"], len(body["modules"]), len(layouts), "module_layouts")
    modules = tuple(
        Module(_text(name), _count(out, 1), _count(in_, 1), layouts[i])
        for (name, out, in_), i in zip(body["modules"], indices, strict=True)
    )
    _unique([m.name for m in modules], "module")
    if not modules or not isinstance(body["adapters"], list) or not body["adapters"]:
        raise ValueError("a bundle has at least one module and one adapter")
    if max(max(m.out, m.in_) for m in modules) > MAX_EXTENT:
        raise ValueError(f"a module has more than {MAX_EXTENT} rows or columns")
    adapters = tuple(_adapter(item, modules, forms, _object(body["config"])) for item in body["adapters"])
    _unique([a.name for a in adapters], "adapter")
    for names in twins([a.name for a in adapters]).values():
        raise BundleError(f"bundle.json: adapters {', '.join(names)} differ in case only")
    base = body["base"]
    return Manifest(
        base=_text(base["name"]),
        revision=None if base["revision"] is None else _text(base["revision"]),
        fingerprint=_hex(base["fingerprint"]),
        options=_object(body["options"]),
        modules=modules,
        adapters=adapters,
        files={_plain_name(k): FileRecord(_count(n), _hex(h)) for k, (n, h) in body["files"].items()},
        skipped=tuple(_text(line) for line in _list(body["skipped"])),
    )


def _adapter(
    item: dict[str, Any], modules: Sequence[Module], forms: Sequence[Form], common: Mapping[str, Any]
) -> AdapterRecord:
    name = _text(item["name"])
    problem = problem_with(name)
    if problem:
        raise BundleError(f"bundle.json: adapter name {name!r} {problem}")
    packed = item["forms"]
    if isinstance(packed, str):
        packed = numbers.undigit(packed, len(modules))
    indices = numbers.unrun(packed, len(modules), len(forms), f"forms of {name}", least=ABSENT)
    own = tuple(None if i == ABSENT else forms[i] for i in indices)
    for module, form in zip(modules, own, strict=True):
        _check_form(name, module, form)
    removed = set(_list(item.get("config_removed", [])))
    config = {k: v for k, v in common.items() if k not in removed} | _object(item.get("config", {}))
    error = _number(item["error"])
    if error < 0:
        raise ValueError(f"error of {name} is {error!r}")
    record = FileRecord(_count(item["bytes"]), _hex(item["sha256"]))
    return AdapterRecord(name, config, own, error, _count(item["original_bytes"]), record)


def _check_form(name: str, module: Module, form: Form | None) -> None:
    """Shared tensors exist and are of the right side; the core fits between them; not too much comes from nothing."""
    unstored = 0
    for term in form or ():
        ends = []
        for factor, side in ((term.left, "left"), (term.right, "right")):
            shared = factor.basis if isinstance(factor, Own) else factor
            known = shared is None or 0 <= shared < len(module.layout)
            if not known or (shared is not None and module.layout[shared].side != side):
                raise BundleError(f"bundle.json: {name}: {module.name}: no shared {side} tensor {shared}")
            if isinstance(factor, Own):
                ends.append(factor.columns)
                unstored += codecs.unstored(factor.codec, factor.columns)
            else:
                ends.append(module.layout[factor].columns)
        if term.core.kind in ("diagonal", "scalar") and ends[0] != ends[1]:
            raise BundleError(f"bundle.json: {name}: {module.name}: {ends[0]} columns meet {ends[1]}")
        if term.core.rank > min(ends):  # never useful, and a way to make a small file decode to a huge matrix
            raise BundleError(f"bundle.json: {name}: {module.name}: rank {term.core.rank} between {ends}")
    if unstored * max(module.out, module.in_) > MAX_UNSTORED:
        raise BundleError(f"bundle.json: {name}: {module.name}: {unstored} columns of nothing")


def _form(terms: Any) -> Form:
    if len(terms) > MAX_TERMS:
        raise BundleError(f"bundle.json: a form has {len(terms)} terms, at most {MAX_TERMS} are accepted")
    return tuple(unpack_term(term) for term in terms)


def unpack_term(item: Any) -> Term:
    """The inverse of `pack_term`. Raises ValueError or TypeError for anything else."""

    def side(value: Any) -> int | Own:
        if type(value) is int:
            return value
        columns, codec, *shared = value
        own = Own(_count(columns, 1), _codec(codec))
        if not shared:
            return own
        basis, loadings = shared
        return replace(own, basis=_count(basis), loadings=_stored(loadings))

    left, core, right = item
    match core:
        case ["scalar", value]:
            parsed = Core("scalar", value=_number(value))
        case ["factored", codec, rank]:
            parsed = Core("factored", _stored(codec), _count(rank, 1))
        case ["full" | "diagonal" as kind, codec]:
            parsed = Core(kind, _stored(codec))
        case _:
            raise ValueError(f"core {core!r}")
    return Term(side(left), parsed, side(right))


def unpack_shared(item: Any) -> Shared:
    """A shared tensor from its JSON [side, columns, codec]."""
    side, columns, codec = item
    if side not in ("left", "right"):
        raise ValueError(f"side {side!r}")
    return Shared(side, _count(columns, 1), _stored(codec))


def _codec(name: Any) -> str:
    try:
        codecs.codec(_text(name))
    except BundleError as error:
        raise BundleError(f"bundle.json: {error}") from None
    return str(name)


def _stored(name: Any) -> str:
    """A codec that stores something of every row.

    Rows of nothing are of use only in an adapter's own factor, beside its loadings. Elsewhere they would let a small
    file decode to a huge matrix.
    """
    if codecs.unstored(_codec(name), 2**53):
        raise BundleError(f"bundle.json: codec {name!r} has tcq0, which only an adapter's own factors have")
    return str(name)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a text")
    return value


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{value!r} is not an object")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r} is not a list")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or abs(value) > MAX_NUMBER:
        raise ValueError(f"{repr(value)[:40]} is not a number of float32")
    return float(value)


def _count(value: Any, least: int = 0) -> int:
    if type(value) is not int or not least <= value < 2**53:
        raise ValueError(f"{value!r} is not a count")
    return value


def _hex(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
        raise ValueError(f"{value!r} is not a sha256")
    return value


def _plain_name(name: str) -> str:
    """Files of the bundle itself lie at its top level; a path from a manifest is never followed."""
    problem = problem_with(name)
    if problem or name == "bundle.json":
        raise ValueError(f"file name {name!r}")
    return name


def _unique(names: Sequence[str], what: str) -> None:
    if len(set(names)) < len(names):
        raise ValueError(f"the same {what} twice")
