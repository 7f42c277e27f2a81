"""`lorazip compress`."""

from __future__ import annotations

from pathlib import Path

import click

from lorazip import quantized, units
from lorazip.cli import render, sweep
from lorazip.codecs import CODECS
from lorazip.compress import job, report
from lorazip.compress.methods import NAMES
from lorazip.compress.spec import Spec
from lorazip.errors import TargetError, UsageError, told

BITS = click.FloatRange(min(quantized.BITS), max(quantized.BITS))


@click.command(epilog="Example: lorazip compress adapters/ -o team.lorazip --max-error 0.05")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("-o", "--output", type=click.Path(path_type=Path),
              help="Bundle directory to make (--sweep: directory of frontier.json and frontier.svg).")  # fmt: skip
@click.option(
    "--method", type=click.Choice(NAMES), default="auto", show_default=True, help="How to compress."
)
@click.option("--rank", type=int, help="Columns of the shared bases (svd: rank of each adapter).")
@click.option("--energy", type=float, help="Share of each D's energy to keep, e.g. 0.9; decides the rank.")
@click.option(
    "--max-error", type=float, help="Bound on every adapter's error; own factors where it is missed."
)
@click.option(
    "--clusters", type=int, help="Bases a module. Default: the paper's rule (1 up to 100 adapters)."
)
@click.option("--weights", type=click.Choice(["unit", "strength", "trained"]), default="unit",
              show_default=True,
              help="unit: all adapters alike; strength: by their norm (auto); trained: by its square.")  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(list(CODECS)), default="float16", show_default=True, help="Storage type."
)
@click.option(
    "--bits", type=BITS, help="Store numbers in 1 to 8 bits; 2.5: half of the columns in 3, half in 2."
)
@click.option("--core-bits", type=click.Choice([str(b) for b in quantized.BITS]),
              help="Other bits for the adapters' own cores on shared bases.")  # fmt: skip
@click.option("--basis-bits", type=BITS, help="Other bits for the shared bases.")
@click.option(
    "--group", type=int, help="Numbers with one scale. Default: a column of a factor, a whole core."
)
@click.option("--ratio", type=float, help="auto: how many times smaller the bundle is to be, at least.")
@click.option("--budget", type=int, help="auto: bytes of the bundle, at most.")
@click.option("--calibrate", metavar="MODEL",
              help="auto: the base model (a directory or a Hub id): spend bytes where errors cost most.")  # fmt: skip
@click.option(
    "--prompts",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="--calibrate: texts to measure that on. Default: built-in.",
)
@click.option("--sweep", "sweeping", is_flag=True,
              help="auto: make no bundle to keep, but find what each of --ratios costs in error.")  # fmt: skip
@click.option("--ratios", metavar="LIST", help="--sweep: these ratios. Default: 4,8,16,32,64.")
@click.option("--eval", "model", metavar="MODEL",
              help="--sweep: also what each bundle keeps of the score on --tasks, by this base model (a directory or "
                   "a Hub id).")  # fmt: skip
@click.option("--tasks", multiple=True, metavar="SOURCE",
              help="--sweep: tasks for --eval, as lorazip eval takes them; may be repeated.")  # fmt: skip
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--base", help="Base model of all adapters, where their configs disagree about its name.")
@click.option("--skip-bad", is_flag=True, help="Leave adapters with defects out, and record them.")
@click.option("--dry-run", is_flag=True, help="Compute all figures, make no bundle. auto predicts them.")
@click.option("--resume", is_flag=True, help="Continue an interrupted run.")
@click.option("--force", is_flag=True, help="Replace a bundle, discard an unfinished run.")
@click.option(
    "--report", "page", type=click.Path(path_type=Path, dir_okay=False), help="Write an HTML report."
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def compress(
    paths: tuple[str, ...],
    output: Path | None,
    method: str,
    rank: int | None,
    energy: float | None,
    max_error: float | None,
    clusters: int | None,
    weights: str,
    dtype: str,
    bits: float | None,
    core_bits: str | None,
    basis_bits: float | None,
    group: int | None,
    ratio: float | None,
    budget: int | None,
    calibrate: str | None,
    prompts: str | None,
    sweeping: bool,
    ratios: str | None,
    model: str | None,
    tasks: tuple[str, ...],
    device: str,
    base: str | None,
    skip_bad: bool,
    dry_run: bool,
    resume: bool,
    force: bool,
    page: Path | None,
    as_json: bool,
) -> None:
    """Compress LoRA adapters of one base model into one bundle.

    PATH is a PEFT directory, a directory of them (at any depth), a glob, @list.txt, a Hub id (org/name[@revision]),
    or NAME=PATH to choose a name.

    --method auto, the default, takes one of --max-error (0.1 without any), --ratio and --budget and chooses for every
    module of every adapter rank, bits and what is shared: the least bytes at that error, or the least mean error in
    those bytes (docs/AUTO.md). Its --max-error bounds an adapter's error over all its modules; the other methods hold
    it in every single module. Its --dry-run predicts, and is quick.

    The other methods, without --rank, --energy and --max-error, follow the paper's rule: up to 100 adapters one basis
    of n/2 + 7 columns, above that 16 columns and as many clusters as needed; svd keeps 90 % of the energy of every
    module, mean the largest rank of the adapters.

    --bits stores numbers in fewer bits (docs/QUANTIZATION.md): 3 or 4 cost little error, since the rounding keeps each
    D near, not its factors. Errors and --max-error are those of what is stored.

    --sweep keeps no bundle: for each of --ratios it makes one, measures it and discards it, or with --dry-run predicts
    it. A table, frontier.json and frontier.svg say what comes out; a ratio that cannot be reached says why. With --eval
    and --tasks every bundle is also evaluated, as lorazip eval does without further options.
    """
    if output is None and not dry_run and not sweeping:
        raise UsageError("say where to write the bundle: -o BUNDLE (or --dry-run)")
    spec = Spec(
        method, rank, energy, max_error, clusters, weights, dtype, device,  # type: ignore[arg-type]
        bits, None if core_bits is None else int(core_bits), basis_bits, group, ratio, budget,
        calibrate, prompts,
    )  # fmt: skip
    if sweeping:
        if resume or page is not None:
            raise UsageError(
                "a sweep makes no bundle to report on or to go on with (leave --report, --resume out)"
            )
        sweep.run(
            paths, spec, output, ratios=ratios, model=model, tasks=tasks, base=base, skip_bad=skip_bad,
            dry_run=dry_run, force=force, as_json=as_json,
        )  # fmt: skip
        return
    if (ratios, model, tasks) != (None, None, ()):
        raise UsageError("--ratios, --eval and --tasks are for --sweep (give it, or leave them out)")
    if page is not None:
        _check_page(page, output, force)
    with render.progress() as progress:
        outcome = job.run(
            paths,
            spec,
            None if dry_run else output,
            base=base,
            skip_bad=skip_bad,
            resume=resume,
            force=force,
            progress=progress,
        )
    if page is not None:
        report.write(page, outcome)
    figures = outcome.summary()
    if as_json:
        render.as_json(figures)
        return
    for line in told(outcome.inputs.skipped):
        click.echo(f"skipped: {line}", err=True)
    adapters, modules = len(outcome.inputs.adapters), len(outcome.modules)
    click.echo(
        f"{units.counted(adapters, 'adapter')}, {units.counted(modules, 'module')}: "
        f"{units.size(outcome.original_bytes)} -> {units.size(outcome.bundle_bytes)}, "
        f"{figures['ratio']:.2f}x, every byte counted"
    )
    error = "predicted error" if outcome.predicted else "error"
    click.echo(
        f"{error}: mean {figures['mean_error']:.4f}, worst {figures['max_error']:.4f}; "
        f"{units.counted(int(outcome.fallbacks.sum()), 'fallback')}; "
        f"{figures['seconds']:.1f} s, {units.size(outcome.peak_memory)} of memory"
    )
    lost = [a.name for a, e in zip(outcome.inputs.adapters, outcome.adapter_errors, strict=True) if e >= 1]
    if lost:
        click.echo(f"no better than nothing, with an error of 1 or more: {render.some(lost)}")
    carrying = [adapter for adapter in outcome.inputs.adapters if adapter.extras]
    if carrying:
        nbytes = sum(info.nbytes for adapter in carrying for info in adapter.extras.values())
        click.echo(
            f"carried as it is, {units.size(nbytes)}: tensors of {render.some([a.name for a in carrying])}"
        )
    written = [str(path) for path in (outcome.bundle and outcome.bundle.path, page) if path]
    if written:
        click.echo(f"written: {', '.join(written)}")


def _check_page(page: Path, output: Path | None, force: bool) -> None:
    """Refuse before the run what would destroy something after it."""
    if not page.parent.is_dir():
        raise TargetError(f"{page} cannot be written: {page.parent} is not a directory (make it first)")
    if page.exists() and not (force and page.is_file() and page.suffix in (".html", ".htm")):
        raise TargetError(f"{page} exists (--force replaces an .html file; or choose another name)")
    if output is not None and page.resolve().is_relative_to(output.resolve()):
        raise TargetError(f"{page} lies in the bundle, which holds nothing else (choose another place)")
