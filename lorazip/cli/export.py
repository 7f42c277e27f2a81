"""`lorazip export`."""

from __future__ import annotations

from pathlib import Path

import click

from lorazip import edit
from lorazip import export as exporting
from lorazip.bundle import Bundle
from lorazip.cli import render
from lorazip.codecs import CODECS


@click.command(epilog="Example: lorazip export team.lorazip customer-7 -o exported/")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("names", nargs=-1, metavar="[NAME...]")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Directory to write to.")
@click.option(
    "--bundle", "as_bundle", is_flag=True, help="Write a bundle of just these adapters to the directory."
)
@click.option("--dtype", type=click.Choice(list(CODECS)), default="float32", show_default=True,
              help="Type of PEFT factors; float32 has the bundle's effect exactly.")  # fmt: skip
@click.option("--push", metavar="REPO", help="Upload the result to the Hub, with a model card.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def export(
    bundle: Path,
    names: tuple[str, ...],
    output: Path,
    as_bundle: bool,
    dtype: str,
    push: str | None,
    as_json: bool,
) -> None:
    """Write adapters of a bundle (all, or those named) as PEFT directories OUTPUT/NAME.

    PEFT and vLLM load them; their effect is the bundle's, with scale 1.
    """
    opened = Bundle.open(bundle)
    chosen = list(names) or opened.names
    rows: list[dict[str, str | int]]
    if as_bundle:
        smaller = edit.subset(opened, chosen, output)
        rows = [{"name": name, "path": str(output)} for name in smaller.names]
        folder, parts = output, list[str]()
    else:
        with render.progress() as progress:
            done = exporting.export(opened, chosen, output, dtype=dtype, progress=progress)
        rows = [{"name": e.name, "path": str(e.directory), "rank": e.rank} for e in done]
        # The directory may hold more than was exported now, which is nobody's business.
        folder, parts = (done[0].directory, []) if len(done) == 1 else (output, [e.name for e in done])
        if push is not None:
            exporting.write_card(folder, opened, [e.name for e in done])
    address = exporting.push(folder, push, parts) if push is not None else None
    if as_json:
        render.as_json({"exported": rows, "pushed": address})
        return
    for row in rows:
        rank = f" (rank {row['rank']})" if "rank" in row else ""
        click.echo(f"{row['name']}: {row['path']}{rank}")
    if address:
        click.echo(f"pushed to {address}")
