"""What frontier.py measures with: a file of results that a rerun goes on with, and one compression in its own process.

Every result is a line of JSON, appended when it is known. Its `key` says all that determines it: what was measured, the
adapters (a digest of their files), and the code (a digest of the sources that the method runs through).
"""

from __future__ import annotations

import ast
import hashlib
import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from functools import lru_cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch

import lorazip
from lorazip import Spec
from lorazip.adapter import Adapter
from lorazip.compress import job
from lorazip.errors import UndecidedError

Row = dict[str, Any]
ROOT = Path(__file__).parents[1]
FILES = ("adapter_config.json", "adapter_model.safetensors")
OTHER = (  # what has no part in the bytes of a measured bundle: other commands and options, reading from the Hub, words
    "base", "calibrate", "check", "choices", "drawing", "edit", "errors", "export", "findings", "finished", "generic",
    "join", "locate", "page", "partial", "pictures", "report", "rows", "sweep", "sweep_plot",
)  # fmt: skip
PUBLISHED = (
    "allocate", "assemble", "cluster", "encode", "frame", "joint", "lowrank", "mean", "methods", "own",
    "quantize", "subspace", "svd",
)  # fmt: skip


def code(method: str) -> str:
    """Version of lorazip and a digest of the sources behind a method, without their comments, docstrings and layout.

    auto: the core and compress/, but for what makes no bundle; the others: what they compute with, and how
    it is stored. As they are when this is first asked: a long run does not see what is edited meanwhile.
    """
    return _code(method == "auto")


@lru_cache(maxsize=2)
def _code(auto: bool) -> str:
    paths = [ROOT / "lorazip" / name for name in ("codecs.py", "quantized.py", "terms.py", "manifest.py")]
    if auto:
        paths = [*(ROOT / "lorazip").glob("*.py"), *(ROOT / "compress").glob("*.py")]
        paths = [path for path in paths if path.stem not in OTHER]
        paths += (ROOT / "lorazip").glob("*.safetensors")
    else:
        paths += [ROOT / "compress" / f"{name}.py" for name in PUBLISHED]
    found = hashlib.sha256()
    for path in sorted(paths):
        data = path.read_bytes()
        found.update(_statements(data) if path.suffix == ".py" else data)
    return f"{lorazip.__version__}+{found.hexdigest()[:8]}"


def _statements(source: bytes) -> bytes:
    """What a file does, without the strings that only say so."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        for part in ("body", "orelse", "finalbody"):
            if isinstance(inside := getattr(node, part, None), list):
                kept = [one for one in inside if not _is_text(one)]
                setattr(node, part, kept)
    return ast.dump(tree).encode()


def _is_text(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


@dataclass(frozen=True)
class Subset:
    """Some adapters of the zoo.

    Attributes:
        label: "4", "8" …, "all", "shared", "own".
    """

    label: str
    adapters: tuple[Adapter, ...]

    @property
    def paths(self) -> list[str]:
        """As `lorazip.compress` takes them, with the names that they have in the zoo."""
        return [f"{adapter.name}={adapter.directory}" for adapter in self.adapters]

    @property
    def names(self) -> list[str]:
        return [adapter.name for adapter in self.adapters]

    @property
    def original_bytes(self) -> int:
        return sum(adapter.nbytes for adapter in self.adapters)

    @property
    def digest(self) -> str:
        """Of names and files: other adapters are other results."""
        return hashlib.sha256("".join(map(_digest, self.adapters)).encode()).hexdigest()[:12]


@lru_cache(maxsize=4096)
def _digest(adapter: Adapter) -> str:
    found = hashlib.sha256(adapter.name.encode())
    for name in FILES:
        found.update((adapter.directory / name).read_bytes())
    return found.hexdigest()


@dataclass
class Store:
    """The file of results.

    Attributes:
        stale: results of other versions of the code count too.
    """

    path: Path
    stale: bool = False
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        for method in ("auto", "svd"):
            code(method)
        if self.path.exists():
            lines = self.path.read_text().splitlines()
            self.rows = [row for line in lines if (row := _parsed(line)) is not None]

    def find(self, key: Mapping[str, Any]) -> Row | None:
        """The last result with this key."""
        wanted = self._comparable(key)
        return next((row for row in reversed(self.rows) if self._comparable(row["key"]) == wanted), None)

    def _comparable(self, key: Mapping[str, Any]) -> str:
        parts = {name: part for name, part in key.items() if name != "code" or not self.stale}
        return json.dumps(parts, sort_keys=True)

    def add(self, key: Mapping[str, Any], **figures: Any) -> Row:
        """Append a result; it is on disk when this returns."""
        row = {"key": dict(key), "date": date.today().isoformat(), "machine": machine(), **figures}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(row)
        return row


def _parsed(line: str) -> Row | None:
    """A line, or None for what a killed run left of one."""
    try:
        row: Row = json.loads(line)
    except ValueError:
        return None
    return row if "key" in row else None


@lru_cache(maxsize=1)
def machine() -> dict[str, Any]:
    """What a measurement ran on, in words."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(
            (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": model, "cores": cores, "torch": torch.__version__, "gpu": gpu}


def ready() -> None:
    """Start the server that forks compressions, so that it too has the code as `code` found it."""
    multiprocessing.set_forkserver_preload(["lorazip.compress.job"])  # imported once, then forked
    forkserver.ensure_running()


def compressed(paths: Sequence[str], setting: Mapping[str, Any], threads: int) -> Row | None:
    """One compression in a process of its own, so that its memory is its own; None where no bundle is so small."""
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_compressed, list(paths), dict(setting), threads).result()


def _compressed(paths: list[str], setting: dict[str, Any], threads: int) -> Row | None:
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as scratch:
        cpu = -time.process_time()
        try:
            outcome = job.run(paths, Spec(**setting), Path(scratch, "bundle"))
        except UndecidedError:
            return None
        cpu += time.process_time()
    kept = ("bundle_bytes", "ratio", "mean_error", "max_error", "seconds", "peak_memory_bytes")
    figures = {name: outcome.summary()[name] for name in kept}
    return {**figures, "cpu_seconds": cpu, "threads": threads}
