"""Where an unfinished run lives: OUTPUT.partial, owned by one job, locked while it runs, emptied at its end.

It holds job.json (which job it belongs to), what the job keeps there, bundle/ while the result is assembled, and old/,
a result on its way to be replaced. job.json is the first file to come and the last to go, so a folder with anything in
it but without that is not ours and is never touched.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from lorazip.errors import LorazipError, TargetError
from lorazip.files import flush, locked, write_bytes

SUFFIX = ".partial"
NOTE = "job.json"
BUNDLE = "bundle"
OLD = "old"


def check_place(output: Path) -> None:
    """Refuse a place that nothing can be renamed to."""
    if os.path.ismount(output):
        raise TargetError(f"{output} is a mount point, which cannot be replaced (name a directory in it)")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TargetError(f"{output.parent} cannot be made: {error.strerror}") from error


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


def ready(output: Path, job: str, force: bool) -> None:
    """Refuse before any work what `working` would refuse, and finish what a killed run left half done.

    One that was killed between its two renames has moved the old result away, and nothing is in its place: it goes
    back.

    Raises:
        TargetError: as for `working`, or `check_place`.
    """
    check_place(output)
    partial = folder(output)
    if not partial.exists():
        return
    if not partial.is_dir():
        raise TargetError(f"{partial} is in the way (move it elsewhere)")
    with locked(partial):
        owner = _owner(partial)
        if owner == job and (partial / OLD).exists() and not output.exists():
            (partial / OLD).rename(output)
        if owner not in (None, job) and not force:
            raise TargetError(
                f"{partial} belongs to a run with other options or inputs "
                "(repeat those to --resume it, or --force to discard it)"
            )


def publish(partial: Path, output: Path, force: bool, mark: str) -> None:
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
                        f"{output} appeared while the job ran (move it elsewhere and repeat the command; "
                        "compress goes on with --resume)"
                    )
                stack.enter_context(locked(output))  # nobody is just adding to it
                # A run that was killed after it had put the new one there may have left its old one.
                shutil.rmtree(partial / OLD, ignore_errors=True)
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
