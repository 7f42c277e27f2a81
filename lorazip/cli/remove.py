"""`lorazip remove`."""

from __future__ import annotations

from pathlib import Path

import click

from lorazip import edit, units
from lorazip.cli import render


@click.command(epilog="Example: lorazip remove team.lorazip customer-7")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def remove(bundle: Path, names: tuple[str, ...], as_json: bool) -> None:
    """Take adapters out of a bundle.

    Shared tensors stay; `lorazip export --bundle` writes a bundle without those that nobody uses any more.
    """
    changed = edit.remove(bundle, names)
    if as_json:
        render.as_json({"removed": list(names), "adapters": changed.names, "bundle_bytes": changed.nbytes})
        return
    click.echo(f"{bundle}: {units.counted(len(changed.names), 'adapter')}, {units.size(changed.nbytes)}")
