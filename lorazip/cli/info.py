"""`lorazip info`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import click

from lorazip import units
from lorazip.bundle import Bundle
from lorazip.choices import Choice, choices
from lorazip.cli import render
from lorazip.errors import UsageError, printable
from lorazip.peft_config import CONFIG_FILE
from lorazip.terms import described

STORAGES = 12  # kinds that are named


@click.command(epilog="Example: lorazip info team.lorazip")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def info(bundle: Path, as_json: bool) -> None:
    """Show what a bundle holds: its adapters, their errors and bytes."""
    if (bundle / CONFIG_FILE).is_file():
        raise UsageError(f"{bundle} is a PEFT adapter, not a bundle (see lorazip inspect)")
    opened = Bundle.open(bundle)
    manifest = opened.manifest
    forms = [form for a in manifest.adapters for form in a.forms if form is not None]
    storage = dict(Counter(map(described, forms)).most_common())
    chosen = choices(manifest.modules, [a.forms for a in manifest.adapters])
    figures = {
        "base": manifest.base,
        "revision": manifest.revision,
        "fingerprint": manifest.fingerprint,
        "options": dict(manifest.options),
        "adapters": len(manifest.adapters),
        "modules": len(manifest.modules),
        "original_bytes": opened.original_bytes,
        "bundle_bytes": opened.nbytes,
        "ratio": opened.original_bytes / opened.nbytes,
        "shared_bytes": sum(f.nbytes for n, f in manifest.files.items() if n.endswith(".safetensors")),
        "storage": storage,
        "choices": [choice.document() for choice in chosen],
        "skipped": list(manifest.skipped),
    }
    rows = [
        {
            "name": a.name,
            "error": a.error,
            "original_bytes": a.original_bytes,
            "bytes": a.file.nbytes,
            "modules": sum(form is not None for form in a.forms),
        }
        for a in manifest.adapters
    ]
    if as_json:
        render.as_json({**figures, "per_adapter": rows})
        return
    revision = f" at {manifest.revision}" if manifest.revision else ""
    click.echo(
        f"{bundle}: {units.counted(len(rows), 'adapter')} of {printable(manifest.base)}{printable(revision)}"
    )
    options = ", ".join(f"{key} {value}" for key, value in manifest.options.items() if value is not None)
    click.echo(f"{printable(options)}; {units.counted(len(manifest.modules), 'module')}")
    click.echo(
        f"{units.size(opened.original_bytes)} -> {units.size(opened.nbytes)} "
        f"({figures['ratio']:.2f}x), of it shared {units.size(int(str(figures['shared_bytes'])))}"
    )
    shown = list(storage.items())[:STORAGES]
    rest = sum(storage.values()) - sum(count for _, count in shown)
    parts = [f"{printable(what)} {count}" for what, count in shown] + ([f"others {rest}"] if rest else [])
    click.echo(f"modules of adapters stored as: {', '.join(parts)}")
    _show_choices(chosen)
    carried = [info for adapter in opened for info in adapter.extras.values()]
    if carried:
        nbytes = sum(info.nbytes for info in carried)
        click.echo(f"carried as they are: {units.counted(len(carried), 'tensor')}, {units.size(nbytes)}")
    for line in manifest.skipped:
        click.echo(f"skipped when it was made: {printable(line)}")
    table = [
        [str(r["name"]), f"{r['error']:.4f}", str(r["modules"]), units.size(int(str(r["original_bytes"]))),
         units.size(int(str(r["bytes"])))]
        for r in rows
    ]  # fmt: skip
    render.table("", ["adapter", "error", "modules", "original", "own file"], table, numbers=4)


def _show_choices(chosen: Sequence[Choice]) -> None:
    """A row and a sentence a kind of module."""
    rows = []
    for choice in chosen:
        sides = (choice.left, choice.right)
        bits = ["-" if side.own_bits is None else f"{side.own_bits:.2g}" for side in sides]
        rows.append(
            [
                choice.kind,
                str(choice.modules),
                " / ".join(f"{side.columns:.3g}" for side in sides),
                " / ".join(f"{100 * side.used:.0f}" for side in sides),
                f"{choice.rank:.3g}",
                " / ".join(bits),
                units.size(choice.shared_bytes),
                units.size(choice.own_bytes),
            ]
        )
    columns = ["kind", "modules", "shared columns L / R", "used by % L / R", "rank", "own bits L / R"]
    render.table("", [*columns, "shared", "own"], rows, numbers=7)
    for choice in chosen:
        click.echo(printable(choice.sentence))
