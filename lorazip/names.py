"""Names that are safe to use as one directory of a path, on every system and in a terminal.

An adapter's name becomes a file name in a bundle, a directory of an export and a model name of a server, and
it often comes from somebody else's directory, so it is checked once, here.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable

MAX_BYTES = 128  # leaves room for suffixes below the 255 bytes of common file systems

_FORBIDDEN = frozenset('/\\:*?"<>|')
_DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])\Z")


def problem_with(name: str) -> str | None:
    """Say why a name cannot be used, or None if it can.

    Args:
        name: the name of an adapter.
    Returns:
        One clause for an error message ("the name starts with '.'"), or None.
    """
    if not name:
        return "the name is empty"
    if not all(c.isprintable() for c in name):
        return "the name has control or invisible characters"
    size = len(name.encode())  # lone surrogates are not printable
    if size > MAX_BYTES:
        return f"the name has {size} bytes, at most {MAX_BYTES} are allowed"
    bad = sorted(_FORBIDDEN.intersection(name))
    if bad:
        return f"the name has {' '.join(bad)}"
    if name[0] in ".- ":
        return f"the name starts with {name[0]!r}"
    if name[-1] in ". ":
        return f"the name ends with {name[-1]!r}"
    if unicodedata.normalize("NFC", name) != name:
        return "the name is not in Unicode normal form C"
    # Windows reserves device names with any extension ("nul.txt") and any case.
    if _DEVICES.match(name.split(".")[0].rstrip(" ").lower()):
        return "the name is a reserved device name"
    return None


def folded(name: str) -> str:
    """Map names that some file systems cannot tell apart to one string (case and Unicode composition)."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def twins(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Find names that meet on a case-insensitive file system.

    Args:
        names: names, each as often as it is used.
    Returns:
        For every name that clashes, all names of its clash, sorted; ("a", "a") for a plain duplicate.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[folded(name)].append(name)
    return {name: tuple(sorted(group)) for group in groups.values() if len(group) > 1 for name in group}
