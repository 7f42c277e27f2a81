"""The report of a compression: one HTML page that needs nothing but itself."""

from __future__ import annotations

from pathlib import Path

from lorazip import page
from lorazip.compress import findings
from lorazip.compress.groups import shared_init_groups
from lorazip.compress.outcome import Outcome
from lorazip.files import write_bytes

LISTED = 100  # rows of the lists that can be as long as the input; how many are left out is said


def write(path: Path, outcome: Outcome) -> None:
    """Write the page, whole or not at all.

    Raises:
        TargetError: the file cannot be written.
        InputError: see `render`.
    """
    write_bytes(path, render(outcome).encode())


def render(outcome: Outcome) -> str:
    """The page. The same outcome gives the same text.

    Raises:
        InputError: an adapter changed since it was compressed (its A is read again, to find the shared-init groups).
    """
    from lorazip import drawing
    from lorazip.compress import pictures  # imports matplotlib, which takes a second

    groups = shared_init_groups(outcome.inputs.adapters)
    names = {adapter.name for adapter in outcome.inputs.adapters}
    shared = {name for group in groups for name in group}
    rows = findings.adapter_rows(outcome, groups)
    kinds = findings.kinds(outcome)
    drawn = sorted(kinds, key=lambda kind: -len(kind.columns))[: drawing.LINES]
    place = {adapter.name: i for i, adapter in enumerate(outcome.inputs.adapters)}
    cells = outcome.errors[[place[row.name] for row in rows]][:, [c for kind in kinds for c in kind.columns]]
    return page.template("report.html.j2").render(
        base=outcome.inputs.base,
        revision=outcome.inputs.revision,
        summary=outcome.summary(),
        dry_run=outcome.bundle is None,
        bytes=findings.byte_rows(outcome),
        choices=outcome.choices,
        rows=rows,
        bars=pictures.bars(
            [row.error for row in rows], [row.group is not None for row in rows], outcome.spec.max_error
        ),
        heat_map=pictures.heat_map(
            cells, [row.name for row in rows], [(kind.name, len(kind.columns)) for kind in kinds]
        ),
        spectra=pictures.spectra([kind for kind in kinds if kind in drawn]),
        kinds=kinds,
        drawn=len(drawn),
        groups=[(group, findings.mean_error(outcome, group)) for group in groups],
        shared_error=findings.mean_error(outcome, shared),
        own_error=findings.mean_error(outcome, names - shared),
        own_count=len(names - shared),
        fallbacks=findings.fallback_rows(outcome, kinds),
        skipped=outcome.inputs.skipped,
        carried=findings.carried(outcome),
        listed=LISTED,
    )
