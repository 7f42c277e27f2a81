"""`lorazip add`."""

from __future__ import annotations

from pathlib import Path

import click

from lorazip import units
from lorazip.cli import render
from lorazip.compress import join
from lorazip.errors import told


@click.command(epilog="Example: lorazip add team.lorazip adapters/customer-8")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("--max-error", type=float, help="Bound on the new adapters' error. Default: the bundle's own bound, "
              "else the worst error in it.")  # fmt: skip
@click.option("--base", help="The bundle's base model, where a config names it differently.")
@click.option("--skip-bad", is_flag=True, help="Leave adapters with defects out.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def add(
    bundle: Path,
    paths: tuple[str, ...],
    max_error: float | None,
    base: str | None,
    skip_bad: bool,
    device: str,
    as_json: bool,
) -> None:
    """Add adapters to a bundle on its bases, with own factors where these cannot hold them.

    To a bundle of auto they are added as auto stores each by itself. Their errors are measured. Nothing that the bundle
    holds is changed.
    """
    with render.progress() as progress:
        changed, inputs = join.add(
            bundle, paths, max_error=max_error, base=base, skip_bad=skip_bad, device=device, progress=progress
        )
    names = [adapter.name for adapter in inputs.adapters]
    records = [changed.adapter(name).record for name in names]
    fallbacks = join.fallback_count(changed, names)
    if as_json:
        rows = [{"name": r.name, "error": r.error, "bytes": r.file.nbytes} for r in records]
        skipped = [str(defect) for defect in inputs.skipped]
        render.as_json(
            {"added": rows, "fallbacks": fallbacks, "skipped": skipped, "bundle_bytes": changed.nbytes}
        )
        return
    for line in told(inputs.skipped):
        click.echo(f"skipped: {line}", err=True)
    for record in records:
        click.echo(f"{record.name}: error {record.error:.4f}, {units.size(record.file.nbytes)}")
    # Nothing is said of own factors where the method gives every adapter its own.
    some = fallbacks and changed.manifest.options["method"] != "auto"
    alone = (
        f"; {units.counted(fallbacks, 'module')} of adapters with own factors beside the bases"
        if some
        else ""
    )
    click.echo(
        f"{bundle}: {units.counted(len(changed.names), 'adapter')}, {units.size(changed.nbytes)}{alone}"
    )
