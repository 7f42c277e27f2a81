"""`lorazip verify`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from lorazip import units
from lorazip.bundle import Bundle
from lorazip.cli import render
from lorazip.compress import check
from lorazip.compress.spec import Spec
from lorazip.errors import BundleError, Defect, told
from lorazip.sources import open_adapters


@click.command(epilog="Example: lorazip verify team.lorazip --against adapters/")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--against", multiple=True, metavar="PATH", help="Originals to compare with; may be repeated.")
@click.option(
    "--skip-bad", is_flag=True, help="Leave originals with defects out, as compress --skip-bad does."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def verify(bundle: Path, against: tuple[str, ...], skip_bad: bool, device: str, as_json: bool) -> None:
    """Check every byte of a bundle; with the originals, measure every adapter's error again.

    Exit code 0: all that was looked at is as recorded. 1: something is not, or the bundle does not hold an original
    that --against names (it must not be deleted). Adapters whose originals --against does not
    name are listed: only their bytes were checked.
    """
    opened, place = Bundle.open(bundle), Spec(device=device).torch_device()
    problems = opened.verify()
    compared: list[check.Comparison] = []
    skipped: tuple[Defect, ...] = ()
    if against and not problems:
        with render.progress() as progress:
            inputs = open_adapters(list(against), base=opened.manifest.base, skip_bad=skip_bad)
            skipped = inputs.skipped
            compared = check.compare(opened, inputs.adapters, place, progress)
    found = {"bundle": {p.file: p.problem for p in problems}, "strays": opened.strays()}
    bad = [c for c in compared if c.problems]
    rest = sorted(set(opened.names) - {c.name for c in compared}) if against else []
    if as_json:
        rows = [
            {"name": c.name, "recorded": c.recorded, "measured": c.measured, "problems": list(c.problems)}
            for c in compared
        ]
        render.as_json(
            {
                "ok": not (problems or bad),
                **found,
                "adapters": rows,
                "not_compared": rest,
                "skipped": list(map(str, skipped)),
            }
        )
        sys.exit(1 if problems or bad else 0)
    for stray in opened.strays():
        click.echo(
            f"note: {stray} is not part of the bundle (left by an interrupted command? it may be deleted)"
        )
    if problems:
        raise BundleError("\n".join(f"{bundle}: {p.file}: {p.problem}" for p in problems))
    if against:
        rows_ = [
            [c.name, _figure(c.recorded), _figure(c.measured), "; ".join(c.problems) or "ok"]
            for c in compared
        ]
        render.table("", ["adapter", "recorded error", "measured error", "verdict"], rows_)
        for line in told(skipped):
            click.echo(f"skipped: {line}", err=True)
    if bad:
        absent = [c.name for c in bad if c.recorded is None]
        wrong = f"{units.counted(len(bad) - len(absent), 'adapter')} not as recorded"
        missing = f"it does not hold {render.some(absent)}"
        raise BundleError(
            f"{bundle}: " + "; ".join([wrong] * (len(absent) < len(bad)) + [missing] * bool(absent))
        )
    if rest:
        click.echo(f"not compared, for their originals are not there: {render.some(rest)}")
    click.echo(f"{bundle}: ok, {units.counted(len(opened.names), 'adapter')}, {opened.nbytes} bytes checked")


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"
