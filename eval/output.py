"""The directory of an evaluation's results: taken before any model call, filled at the end."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorazip.errors import TargetError
from lorazip.eval import report
from lorazip.eval.judge import Cell
from lorazip.eval.results import EXAMPLES, REPORT, RESULTS, SCHEMA, Results
from lorazip.files import write_bytes


def require(output: Path, settings: Mapping[str, Any], force: bool) -> None:
    """A new directory, an empty one, or one with results of the same evaluation.

    Raises:
        TargetError: it is something else.
    """
    foreign = TargetError(f"{output} exists and holds no results of an evaluation (choose another)")
    if not output.exists():
        return
    try:
        there = {path.name for path in output.iterdir()}
        if not there <= {
            RESULTS,
            EXAMPLES,
            REPORT,
            *(f".{name}.tmp" for name in (RESULTS, EXAMPLES, REPORT)),
        }:
            raise foreign
        if RESULTS not in there:  # empty, or left by a run that was killed while it wrote
            return
        before = json.loads((output / RESULTS).read_bytes())
        schema, settings_before = str(before["schema"]), before["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        raise foreign from None
    if not schema.startswith(SCHEMA.partition("/")[0] + "/"):
        raise foreign
    same = schema == SCHEMA and settings_before == json.loads(json.dumps(settings))
    if not same and not force:
        raise TargetError(f"{output} holds results of another evaluation (choose another, or --force)")


@contextlib.contextmanager
def made(output: Path | None) -> Iterator[None]:
    """The directory is there and can be written, rather now than after all model calls; left empty, it goes again.

    Raises:
        TargetError: it cannot be written.
    """
    if output is None:
        yield
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    except OSError as error:
        raise TargetError(f"{output} cannot be written: {error.strerror}") from error
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            output.rmdir()
        raise


def write(output: Path, results: Results, cells: Sequence[Cell]) -> None:
    """Write the three files, each whole or not at all; results.json comes last.

    Raises:
        TargetError: they cannot be written.
    """
    lines = [
        json.dumps(
            {
                "task": cell.task,
                "adapter": cell.adapter,
                "arm": cell.arm,
                "metric": cell.metric,
                "scores": [round(score, 6) for score in cell.scores],
            }
        )
        for cell in cells
    ]
    write_bytes(output / EXAMPLES, "".join(f"{line}\n" for line in lines).encode())
    report.write(output / REPORT, results)
    document = json.dumps(results.document(), indent=2, ensure_ascii=False) + "\n"
    # A path from the command line may hold bytes that are no text; JSON has an escape for them.
    write_bytes(output / RESULTS, document.encode("utf-8", "backslashreplace"))
