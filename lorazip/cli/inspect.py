"""`lorazip inspect`."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import asdict
from typing import Any

import click

from lorazip import units
from lorazip.cli import render
from lorazip.compress import survey
from lorazip.compress.spec import Spec
from lorazip.errors import InputError, told
from lorazip.sources import examine


@click.command(epilog="Example: lorazip inspect adapters/")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("--base", help="Base model of all adapters, where their configs disagree about its name.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def inspect(paths: tuple[str, ...], base: str | None, device: str, as_json: bool) -> None:
    """Show what adapters are like, and what compress would refuse. Nothing is written.

    Per adapter: ranks, modules, size, strength ||D||, and the share of ||D||^2 that ranks 1, 2, 4 … of every module
    hold. Then groups of adapters that started from one shared random A: these share more.

    Exit code 0: compress takes all. 1: it would refuse some. 2: there is none that it takes.
    """
    with render.progress() as progress:
        adapters, defects = examine(
            list(paths), base=base, progress=lambda done, total: progress("reading", done, total)
        )
        if not adapters:
            raise InputError(defects)
        measured = survey.survey(adapters, Spec(device=device).torch_device(), progress)
    rows: list[dict[str, Any]] = [
        {
            "name": adapter.name,
            "base": adapter.config.get("base_model_name_or_path"),
            "ranks": {
                str(k): v for k, v in sorted(Counter(i.rank for i in adapter.modules.values()).items())
            },
            "dtypes": sorted({info.dtype for info in adapter.modules.values()}),
            "modules": len(adapter.modules),
            "carried": sorted(adapter.extras),
            "bytes": adapter.nbytes,
            "strength": float(strength),
            "energy_by_rank": dict(zip(map(str, survey.RANKS), map(float, captured), strict=True)),
        }
        for adapter, strength, captured in zip(adapters, measured.strength, measured.captured, strict=True)
    ]
    if as_json:
        render.as_json(
            {
                "adapters": rows,
                "shared_init_groups": measured.groups,
                "refused": [asdict(defect) for defect in defects],
            }
        )
        sys.exit(1 if defects else 0)
    shown = [
        [
            row["name"],
            ",".join(row["ranks"]),
            str(row["modules"]),
            ",".join(row["dtypes"]),
            units.size(row["bytes"]),
            f"{row['strength']:.3g}",
            *(f"{share:.3f}" for share in list(row["energy_by_rank"].values())[:4]),
        ]
        for row in rows
    ]
    columns = [
        "adapter",
        "ranks",
        "modules",
        "dtype",
        "size",
        "strength",
        *(f"rank {k}" for k in survey.RANKS[:4]),
    ]
    render.table("", columns, shown, numbers=6)
    for row in rows:
        if row["carried"]:
            click.echo(f"{row['name']}: carried as they are: {', '.join(row['carried'])}")
    for group in measured.groups:
        click.echo(f"one shared start ({len(group)}): {', '.join(group)}")
    for line in told(defects):
        click.echo(f"refused: {line}")
    sys.exit(1 if defects else 0)
