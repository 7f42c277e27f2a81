"""Whether a job of compression may write where it is told to, and which unfinished run is its own."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch

from lorazip import manifest as manifests
from lorazip import unfinished
from lorazip.bundle import ADAPTERS, MANIFEST, SHARED
from lorazip.compress.assemble import skipped
from lorazip.compress.spec import Spec
from lorazip.errors import TargetError
from lorazip.peft_keys import WEIGHTS_FILE
from lorazip.sources import Inputs


def identity(inputs: Inputs, spec: Spec) -> str:
    """What makes two runs the same job: program, options and inputs.

    Files count by size and time of change, not by content: this only guards a resumed run, and reading gigabytes again
    to hash them would cost as much as the run.
    """
    from lorazip import __version__  # the package imports this module

    files = []
    for adapter in inputs.adapters:
        status = (adapter.directory / WEIGHTS_FILE).stat()
        files.append([adapter.name, status.st_size, status.st_mtime_ns, adapter.config])
    job = [
        __version__,
        manifests.VERSION,
        torch.__version__,
        inputs.base,
        inputs.revision,
        spec.recorded(),
        spec.torch_device().type,
        files,
        skipped(inputs),
    ]
    return hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()


def check_target(output: Path, resume: bool, force: bool) -> None:
    """Refuse before any work what could not be written after it."""
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        if not (output / MANIFEST).is_file():
            raise TargetError(f"{output} exists and is not a bundle (choose another name)")
        if not force and not resume:
            raise TargetError(f"{output} exists (use --force to replace it, or choose another name)")
        foreign = _foreign(output)
        if foreign:
            raise TargetError(
                f"{output} holds {foreign}, which is no part of a bundle and would be lost (choose another name)"
            )
    partial = unfinished.folder(output)
    if partial.exists() and not resume and not force:
        raise TargetError(f"{partial} is an unfinished run (--resume continues it, --force discards it)")
    unfinished.check_place(output)


def _foreign(output: Path) -> str | None:
    """Something in a directory that a bundle does not have: replacing it would delete more than a bundle."""
    if not (output / MANIFEST).read_bytes()[:16].startswith(b'{"digest":"'):
        return f"a {MANIFEST} that lorazip did not write"
    own = {MANIFEST, SHARED, "README.md", ADAPTERS, ".gitattributes"}
    for path in output.iterdir():
        if path.name not in own and not path.name.endswith(".tmp"):
            return path.name
    for path in (output / ADAPTERS).glob("*"):
        if not path.name.endswith((".safetensors", ".tmp")) or path.is_dir():
            return f"{ADAPTERS}/{path.name}"
    return None


def check_inputs(output: Path, inputs: Inputs) -> None:
    """Refuse to write a bundle over its own inputs."""
    target = Path(os.path.realpath(output))
    for adapter in inputs.adapters:
        if Path(os.path.realpath(adapter.directory)).is_relative_to(target):
            raise TargetError(
                f"{output} holds the adapter {adapter.name} that is to be compressed (choose another name)"
            )
