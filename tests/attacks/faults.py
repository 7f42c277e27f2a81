"""What the tests of faults share: what a directory holds, how a command was refused, a fault before every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from nursery import Ended, Nursery

from lorazip.bundle import Bundle

ZOO = Path(__file__).parents[2] / "examples" / "zoo"
Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
SHAPES = {Q: (24, 24), K: (8, 24)}
FULL = "No space left on device"
JOINT = ("--method", "jd-full")
# The default plans over all modules before it encodes some; the others take them one by one.
BOTH = pytest.mark.parametrize("method", [(), JOINT], ids=["auto", "jd-full"])


def content(directory: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def assert_whole(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    assert opened.verify() == []
    assert opened.strays() == []


def assert_refused(ended: Ended, *words: str) -> None:
    """Exit code 2, and words that a person understands."""
    assert ended.code == 2, ended
    assert "Traceback" not in ended.err
    assert ended.out == ""
    for word in words:
        assert word in ended.err, ended.err


def every_step(
    nursery: Nursery,
    calm: Ended,
    attempt: Callable[[int], tuple[list[str | Path], Path]],
    fault: str,
    first: int = 1,
) -> Iterator[tuple[int, Ended, Path]]:
    """Run a command again and again, with the fault before its first, second, … last step."""
    assert calm.code == 0, calm.err
    for at in range(first, calm.steps + 1):
        arguments, below = attempt(at)
        yield at, nursery.run(*arguments, fault=fault, at=at, below=below), below  # type: ignore[arg-type]
