"""`lorazip compress --sweep`: the frontier of auto, and what the tasks keep along it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from lorazip import units
from lorazip.cli import render
from lorazip.compress import sweep
from lorazip.compress.spec import Spec
from lorazip.compress.sweep import Frontier, Judge, Judgement, Point
from lorazip.errors import UsageError, told
from lorazip.eval.job import evaluate
from lorazip.eval.results import ORIGINAL, Interval
from lorazip.sources import Inputs


def run(
    paths: Sequence[str],
    spec: Spec,
    output: Path | None,
    *,
    ratios: str | None,
    model: str | None,
    tasks: Sequence[str],
    base: str | None,
    skip_bad: bool,
    dry_run: bool,
    force: bool,
    as_json: bool,
) -> None:
    """What `compress` does when it is asked to sweep."""
    if model is not None and not tasks:
        raise UsageError("there is nothing to answer (give --tasks with --eval)")
    if tasks and model is None:
        raise UsageError("tasks need a model that answers them: --eval MODEL (or leave --tasks out)")
    with render.progress() as progress:
        found = sweep.run(
            paths,
            spec,
            sweep.RATIOS if ratios is None else parse_ratios(ratios),
            output,
            dry_run=dry_run,
            judge=None if model is None else _judge(model, tasks, progress),
            base=base,
            skip_bad=skip_bad,
            force=force,
            progress=progress,
        )
    if as_json:
        render.as_json(found.document())
    else:
        _show(found, output)


def parse_ratios(text: str) -> list[float]:
    """The numbers of "4,8,16"."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"ratios are numbers with commas between them, not {text!r} (4,8,16)") from None


def _judge(model: str, tasks: Sequence[str], progress: render.Report) -> Judge:
    """`lorazip eval` with its defaults; what originals answered is in its cache when the bundles come."""

    def judge(inputs: Inputs, bundles: Sequence[Path]) -> Judgement:
        originals = [f"{adapter.name}={adapter.directory}" for adapter in inputs.adapters]
        results = evaluate(model, tasks, adapters=originals, bundles=bundles, progress=progress)
        arms = {
            one.arm: {"score": asdict(one.score), "kept": one.kept and asdict(one.kept)}
            for one in results.summary
        }
        return Judgement({"model": model, "tasks": list(tasks), "engine": results.settings["engine"]}, arms)

    return judge


def _show(found: Frontier, output: Path | None) -> None:
    for line in told(found.inputs.skipped):
        click.echo(f"skipped: {line}", err=True)
    click.echo(
        f"{units.counted(len(found.inputs.adapters), 'adapter')}, "
        f"{units.counted(len(found.inputs.modules), 'module')}, {units.size(found.original_bytes)}; "
        f"surveyed in {units.duration(found.survey_seconds)}"
    )
    kind = "predicted" if found.predicted else "measured"
    columns = ["ratio asked", "reached", "size", f"mean error, {kind}", "worst", "time"]
    judged = found.evaluation is not None
    rows = [_cells(point, judged) for point in found.points]
    render.table("", [*columns, *(["score %", "kept %"] if judged else [])], rows, numbers=8 if judged else 6)
    if found.evaluation is not None:
        score = found.evaluation.arms[ORIGINAL]["score"]
        click.echo(f"the originals' score: {_interval(score)} %, 95 % intervals throughout")
    for point in found.points:
        if point.problem:
            click.echo(f"ratio {sweep.named(point.asked)}: {point.problem}")
    if output is not None:
        click.echo(f"written: {output / sweep.FRONTIER}, {output / sweep.PICTURE}")


def _cells(point: Point, judged: bool) -> list[str]:
    asked = sweep.named(point.asked)
    if point.ratio is None or point.bundle_bytes is None:
        return [asked] + ["-"] * (7 if judged else 5)
    cells = [
        asked,
        f"{point.ratio:.2f}",
        units.size(point.bundle_bytes),
        f"{point.mean_error:.4f}",
        f"{point.max_error:.4f}",
        units.duration(point.seconds or 0),
    ]
    return cells + ([_interval(point.score), _interval(point.kept)] if judged else [])


def _interval(value: Mapping[str, Any] | None) -> str:
    return render.interval(Interval(**value) if value else None)
