"""Where an unfinished run lives: BUNDLE.partial, owned by one job, locked while it runs, emptied at its end.

It holds job.json (which job it belongs to), a shard for every finished module, bundle/ while that is assembled, and
old/, a bundle on its way to be replaced. job.json is the first file to come and the last to go, so a folder without it
is not ours and is never touched.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from lorazip import manifest as manifests
from lorazip.bundle import ADAPTERS, MANIFEST, SHARED
from lorazip.compress.assemble import skipped
from lorazip.compress.spec import Spec
from lorazip.errors import LorazipError, TargetError
from lorazip.files import flush, locked, write_bytes
from lorazip.peft_keys import WEIGHTS_FILE
from lorazip.sources import Inputs

SUFFIX = ".partial"
NOTE = "job.json"
BUNDLE = "bundle"
OLD = "old"


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
    partial = folder(output)
    if partial.exists() and not resume and not force:
        raise TargetError(f"{partial} is an unfinished run (--resume continues it, --force discards it)")
    check_place(output)


def check_place(output: Path) -> None:
    """Refuse a place that nothing can be renamed to."""
    if os.path.ismount(output):
        raise TargetError(f"{output} is a mount point, which cannot be replaced (name a directory in it)")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TargetError(f"{output.parent} cannot be made: {error.strerror}") from error


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


def folder(output: Path) -> Path:
    """Where the unfinished run of this output lives."""
    return output.with_name(output.name + SUFFIX)


@contextlib.contextmanager
def working(output: Path, job: str, resume: bool, force: bool, keep: bool = True) -> Iterator[Path]:
    """The locked folder of this job: a fresh one, or with `resume` the one that is there.

    Args:
        keep: what is left of a run that ends early, so that it can be resumed.
    Raises:
        TargetError: it belongs to another job, another process works in it, it is not ours, or cannot be made.
    """
    partial = folder(output)
    try:
        partial.mkdir(exist_ok=True)
    except OSError as error:
        raise TargetError(f"{partial} cannot be made: {error.strerror}") from error
    with locked(partial):
        if not (resume and _owner(partial) == job):
            if _owner(partial) is not None:
                if not force:
                    raise TargetError(
                        f"{partial} belongs to a run with other options or inputs "
                        "(repeat those to --resume it, or --force to discard it)"
                    )
                _clear(partial, output)
            write_bytes(partial / NOTE, json.dumps({"job": job}).encode())
        try:
            yield partial
        except BaseException as error:
            # With room, say, it can go on; what is wrong with options or inputs a resumed run would meet again.
            lasting = isinstance(error, LorazipError) and not isinstance(error, TargetError)
            if lasting or not keep:
                discard(partial, output)
            raise


def _owner(partial: Path) -> str | None:
    """The job that the folder belongs to, or None when it is empty."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads((partial / NOTE).read_text())["job"])
    if any(path.name != f".{NOTE}.tmp" for path in partial.iterdir()):
        raise TargetError(f"{partial} is in the way and not an unfinished run of lorazip (move it elsewhere)")
    return None


def _clear(partial: Path, output: Path) -> None:
    """Empty the folder, the note last; a bundle that was about to be replaced goes back."""
    try:
        if (partial / OLD).exists() and not output.exists():
            (partial / OLD).rename(output)
        for path in partial.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != NOTE:
                path.unlink()
        (partial / NOTE).unlink()
    except OSError as error:
        raise TargetError(f"{partial} cannot be emptied: {error.strerror}") from error


def publish(partial: Path, output: Path, force: bool, mark: str = MANIFEST) -> None:
    """Rename the finished bundle, or another directory, to its final name and remove the folder.

    With `force` an old one moves aside, and is deleted once the new one is there.

    Args:
        mark: the file that every directory of its kind has: nothing else is replaced.
    """
    with contextlib.ExitStack() as stack:
        try:
            if output.exists() and any(output.iterdir()):
                if not force or not (output / mark).is_file():
                    raise TargetError(
                        f"{output} appeared while the job ran (move it elsewhere, and run the command again)"
                    )
                stack.enter_context(locked(output))  # nobody is just adding to it
                output.rename(partial / OLD)
            (partial / BUNDLE).rename(output)
            flush(output.parent)
        except OSError as error:
            raise TargetError(f"{output} cannot be written: {error.strerror}") from error
    discard(partial, output)


def discard(partial: Path, output: Path) -> None:
    """Remove the folder of a job that is done."""
    _clear(partial, output)
    partial.rmdir()
