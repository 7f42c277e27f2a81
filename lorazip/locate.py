"""From what the user names (directories, globs, lists, Hub ids) to adapter directories with names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorazip import names
from lorazip.errors import Defect, InputError
from lorazip.peft_config import CONFIG_FILE
from lorazip.peft_keys import WEIGHTS_FILE

# A directory with one of these is meant as an adapter, complete or not.
_MARKS = (CONFIG_FILE, WEIGHTS_FILE, "adapter_model.bin", "adapter_model.pt")
_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?\Z", re.ASCII)
_RENAME = "give it a name: NAME=PATH"
_MAX_LIST_BYTES = 16 * 2**20
_MAX_LISTS = 16  # lists within lists


@dataclass(frozen=True, order=True)
class Source:
    """An adapter directory and the name that it gets.

    Attributes:
        name: unique among the sources of one call.
        directory: the directory with adapter_config.json.
        given: the argument that it came from, for messages.
    """

    name: str
    directory: Path
    given: str


def resolve(paths: Sequence[str]) -> list[Source]:
    """Find the adapters that the arguments name, sorted by name.

    An argument is one of: an adapter directory (named by its last component); a directory that holds adapters
    at any depth (named by the path below it, joined by "--"; hidden directories and what lies inside an
    adapter are not searched); a glob, which may have `**` (named by the path below its fixed part);
    `@list.txt` with one argument a line, relative to the list; a Hub id `org/name[@revision]` if there is no
    such path (named `org--name`); or NAME=ARGUMENT for a single adapter.

    Args:
        paths: the arguments.
    Raises:
        InputError: with every argument that names no adapter, and every unsafe or doubled name.
    """
    sources, defects = find(paths)
    if defects:
        raise InputError(defects)
    return sources


def find(paths: Sequence[str]) -> tuple[list[Source], list[Defect]]:
    """Like `resolve`, but gives the usable sources together with the defects instead of raising."""
    sources: list[Source] = []
    defects: list[Defect] = []
    if not paths:
        defects.append(
            Defect("input", problem="no adapter is named", remedy="name a directory, a glob or @list.txt")
        )
    for path in paths:
        for found in _expand(path, Path(), 0):
            if isinstance(found, Source):
                sources.append(found)
            else:
                defects.append(found)
    # The same directory under the same name (a glob and a list, say) is one source.
    unique = {(source.name, os.path.realpath(source.directory)): source for source in sources}
    good, bad = _check_names(unique.values())
    return sorted(good), sorted(set(defects + bad))


def _expand(given: str, root: Path, depth: int) -> Iterator[Source | Defect]:
    """Yield the sources and defects of one argument; relative paths are relative to `root`."""
    path = root / os.path.expanduser(given)
    name, mark, rest = given.partition("=")
    named = bool(mark and name and rest) and (
        "/" not in name or os.path.lexists(root / os.path.expanduser(rest))
    )
    if given.startswith("@"):
        yield from _expand_list(given, root, depth)
    elif given and os.path.isdir(path):
        yield from _expand_directory(path, given)
    elif named and not os.path.lexists(path):
        yield from _expand_named(name, rest, given, root, depth)
    elif given and os.path.lexists(path):
        remedy = f"name its directory: {path.parent}" if path.name in _MARKS else "name a directory"
        yield Defect(given, problem="is not a directory", remedy=remedy)
    elif _has_wildcard(given):
        yield from _expand_glob(given, root)
    elif _HUB_ID.match(given):
        yield _from_hub(given)
    else:
        yield Defect(
            given, problem="does not exist", remedy="name a directory, a glob, @list.txt or org/name"
        )


def _expand_list(given: str, root: Path, depth: int) -> Iterator[Source | Defect]:
    file = root / os.path.expanduser(given[1:])
    if depth >= _MAX_LISTS:
        yield Defect(
            given, problem=f"lists are nested more than {_MAX_LISTS} deep", remedy="does it name itself?"
        )
        return
    try:
        if not file.is_file() and file.exists():
            yield Defect(
                given, problem="the list is not a regular file", remedy="write one path a line in a file"
            )
            return
        if file.exists() and file.stat().st_size > _MAX_LIST_BYTES:
            yield Defect(
                given, problem=f"the list has more than {_MAX_LIST_BYTES} bytes", remedy="is it a list?"
            )
            return
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        yield Defect(given, problem="the list is not UTF-8 text", remedy="write one path a line")
        return
    except OSError as error:
        yield Defect(given, problem=f"the list cannot be read: {error.strerror}", remedy="check the path")
        return
    entries = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    if not entries:
        yield Defect(given, problem="the list is empty", remedy="write one path a line")
    for entry in entries:
        named = file.parent / os.path.expanduser(entry[1:]) if entry.startswith("@") else None
        if named is not None and os.path.realpath(named) == os.path.realpath(file):
            yield Defect(given, problem="the list names itself", remedy=f"take the line {entry} out")
            continue
        yield from _expand(entry, file.parent, depth + 1)


def _expand_directory(path: Path, given: str) -> Iterator[Source | Defect]:
    if _is_adapter(path):
        # "." and ".." have no name of their own.
        name = path.name if path.name not in ("", "..") else Path(os.path.realpath(path)).name
        yield Source(name, path, given)
        return
    found, unreadable = walk(path)
    yield from unreadable
    for directory in found:
        yield Source("--".join(directory.relative_to(path).parts), directory, given)
    if not found and not unreadable:
        problem = f"holds no adapter: no {CONFIG_FILE} in it or below it"
        yield Defect(given, problem=problem, remedy="name a directory of PEFT adapters")


def _expand_named(name: str, rest: str, given: str, root: Path, depth: int) -> Iterator[Source | Defect]:
    found = list(_expand(rest, root, depth))
    defects = [item for item in found if isinstance(item, Defect)]
    sources = [item for item in found if isinstance(item, Source)]
    yield from defects
    if len(sources) == 1:
        yield Source(name, sources[0].directory, given)
    elif not defects:
        problem = f"one name for {len(sources)} adapters"
        yield Defect(given, problem=problem, remedy="name a single adapter directory after the =")


def _expand_glob(given: str, root: Path) -> Iterator[Source | Defect]:
    # Names are relative to the part before the first wildcard, so that runs/*/final gives different names.
    parts = Path(os.path.expanduser(given)).parts
    first = next(i for i, part in enumerate(parts) if _has_wildcard(part))
    base, pattern = root / Path(*parts[:first]), str(Path(*parts[first:]))
    found: dict[Path, None] = {}
    try:
        # Not the glob module: its ** follows links, for ever if they form a loop.
        matches = sorted(match for match in base.glob(pattern) if os.path.isdir(match))
    except (ValueError, NotImplementedError, OSError) as error:
        yield Defect(given, problem=f"the pattern cannot be used: {error}", remedy="correct it")
        return
    for match in matches:
        if _hidden(match.relative_to(base), pattern):
            continue
        below, unreadable = ([match], []) if _is_adapter(match) else walk(match)
        found.update(dict.fromkeys(below))
        yield from unreadable
    for directory in found:
        yield Source("--".join(directory.relative_to(base).parts), directory, given)
    if not found:
        remedy = f"it must match directories with {CONFIG_FILE}"
        yield Defect(given, problem="matches no adapter", remedy=remedy)


def _has_wildcard(text: str) -> bool:
    return any(c in text for c in "*?[")


def _hidden(path: Path, pattern: str) -> bool:
    # As in a shell, a wildcard does not match a leading dot; a pattern that spells the dot does.
    return "/." not in f"/{pattern}" and any(part.startswith(".") for part in path.parts)


def walk(root: Path) -> tuple[list[Path], list[Defect]]:
    """Find the adapter directories below a directory.

    An adapter is not searched for more adapters: its checkpoints belong to it. Links to directories are followed;
    a directory that is no adapter is visited once, by its real path first, so that loops end.

    Args:
        root: a directory that is no adapter itself.
    Returns:
        The adapters, sorted by path, and a defect for every directory that cannot be read.
    """
    found: list[Path] = []
    defects: list[Defect] = []
    queue, links = [root], list[Path]()
    visited: set[str] = set()
    while queue or links:
        path = queue.pop() if queue else links.pop()
        real = os.path.realpath(path)
        try:
            entries = sorted(os.listdir(path), reverse=True)
        except OSError as error:
            defects.append(
                Defect(str(path), problem=f"cannot be read: {error.strerror}", remedy="check its rights")
            )
            continue
        if not set(_MARKS).isdisjoint(entries):
            found.append(path)
        elif real not in visited:
            visited.add(real)
            for child in (path / entry for entry in entries if not entry.startswith(".")):
                if os.path.isdir(child):
                    (links if child.is_symlink() else queue).append(child)
    return sorted(found), defects


def _is_adapter(path: Path) -> bool:
    return any(os.path.lexists(path / mark) for mark in _MARKS)


def _from_hub(given: str) -> Source | Defect:
    match = _HUB_ID.match(given)
    assert match is not None  # the caller has matched it
    # Imported here: it takes most of a second, and local paths do not need it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    repo = match["repo"]
    try:
        directory = Path(
            snapshot_download(repo, revision=match["revision"], allow_patterns=[CONFIG_FILE, WEIGHTS_FILE])
        )
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        problem = f"there is no such path, and the Hub did not give it: {reason}"
        return Defect(
            given, problem=problem, remedy="check the spelling, the network, or log in with `hf auth login`"
        )
    if not _is_adapter(directory):
        problem = f"the repository has no {CONFIG_FILE} at its top"
        return Defect(given, problem=problem, remedy="download it and name the directory of the adapter")
    return Source(repo.replace("/", "--"), directory, given)


def _check_names(sources: Iterable[Source]) -> tuple[list[Source], list[Defect]]:
    sources = list(sources)
    clashes = names.twins(source.name for source in sources)
    good, bad = [], []
    for source in sources:
        problem = names.problem_with(source.name)
        if problem is not None:
            bad.append(
                Defect(source.name or source.given, problem=f"{problem} ({source.directory})", remedy=_RENAME)
            )
        elif source.name in clashes:
            twins = clashes[source.name]
            others = " and ".join(sorted({twin for twin in twins if twin != source.name}))
            problem = (
                f"the name differs from {others} in case only"
                if others
                else f"{len(twins)} adapters have this name"
            )
            remedy = f"{_RENAME}, or name the directory above them"
            bad.append(Defect(source.name, problem=f"{problem} ({source.directory})", remedy=remedy))
        else:
            good.append(source)
    return good, bad
