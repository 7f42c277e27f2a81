"""`lorazip eval`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from lorazip import units
from lorazip.cli import render
from lorazip.errors import UsageError
from lorazip.eval import job, session, tasks
from lorazip.eval.prompts import TEMPLATE
from lorazip.eval.results import REPORT, RESULTS, Gate, Results
from lorazip.eval.spec import AUTO, PRIMARY, EvalSpec

CODES = {"pass": 0, "fail": 1, "undecided": 3}


@click.command(
    name="eval",
    epilog="Example: lorazip eval --base model/ --tasks tasks/ --adapters adapters/ --bundle b.lorazip -o out/",
)
@click.option(
    "--base",
    required=True,
    metavar="MODEL",
    help="Base model: a directory, or a Hub id (org/name[@revision]).",
)
@click.option("--tasks", "sources", multiple=True, metavar="SOURCE",
              help="Tasks: a directory of JSONL files (searched below), a JSONL, CSV or Parquet file, a data set "
                   "of the Hub (org/name[:config]); may be repeated.")  # fmt: skip
@click.option(
    "--adapters",
    multiple=True,
    metavar="PATH",
    help="The original adapters, as compress takes them; may be repeated.",
)
@click.option(
    "--bundle",
    "bundles",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A bundle to evaluate; may be repeated.",
)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path),
              help="Directory for results.json, examples.jsonl and report.html.")  # fmt: skip
@click.option("--pairs", type=click.Path(path_type=Path), metavar="FILE",
              help='Which adapter answers which task: JSON lines {"task": …, "adapter": …}. '
                   "Default: the task of its name.")  # fmt: skip
@click.option(
    "--drift",
    multiple=True,
    metavar="TASK",
    help="An unrelated task that every adapter answers too; may be repeated.",
)
@click.option("--lm-eval", multiple=True, metavar="TASK",
              help="A task of lm-evaluation-harness: its name, or a YAML file that you trust (PATH.yaml; functions "
                   "that it names are run). May be repeated; needs lorazip[lm-eval].")  # fmt: skip
@click.option("--backend", type=click.Choice(["auto", "vllm", "hf"]), default="auto", show_default=True,
              help="hf: transformers and PEFT. auto: vllm if it is installed.")  # fmt: skip
@click.option("--metric", type=click.Choice([AUTO, *PRIMARY]), default=AUTO, show_default=True,
              help="What tasks are judged by. auto: what the index says, else by the kind of answer.")  # fmt: skip
@click.option(
    "--agreement", is_flag=True, help="Also measure how often an arm gives the original's own answer."
)
@click.option("--limit", type=int, metavar="N", help="Only the first N examples of each task.")
@click.option(
    "--split", default="test", show_default=True, help="Split that is scored, where the data have splits."
)
@click.option("--column", "columns", multiple=True, metavar="FIELD=COLUMN",
              help="Another name of a field (input, output, references, choices, split); may be repeated.")  # fmt: skip
@click.option("--definition", metavar="TEXT", help="Instruction of the tasks whose index has none.")
@click.option(
    "--template",
    default=TEMPLATE,
    metavar="TEXT",
    help=f"Prompt with {{definition}} and {{input}}. Default: {TEMPLATE!r}",
)
@click.option("--chat", is_flag=True, help="Use the model's chat template instead.")
@click.option(
    "--shots",
    type=int,
    default=0,
    metavar="N",
    help="A further arm: the base with N solved examples in its prompt.",
)
@click.option(
    "--max-tokens",
    type=int,
    metavar="N",
    help="Leave out examples of more tokens. Default: what the model takes.",
)
@click.option(
    "--new-tokens", type=int, default=512, show_default=True, metavar="N", help="Longest written answer."
)
@click.option(
    "--min-retention",
    type=float,
    metavar="R",
    help="Gate: each bundle keeps at least this share of the originals' score.",
)
@click.option(
    "--max-drop", type=float, metavar="D", help="Gate: each bundle's mean score falls by at most this."
)
@click.option(
    "--point", is_flag=True, help="The gate judges estimates instead of the bounds of their intervals."
)
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto",
              show_default=True, help="auto: float32 on a CPU, bfloat16 on a GPU.")  # fmt: skip
@click.option("--device", default="auto", show_default=True, help="Of --backend hf: auto, cpu or cuda.")
@click.option(
    "--tensor-parallel",
    type=int,
    default=1,
    show_default=True,
    metavar="N",
    help="GPUs that share the model in vLLM.",
)
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where answers of models are kept. Default: ~/.cache/lorazip.",
)
@click.option("--force", is_flag=True, help="Replace results of another evaluation in the directory.")
@click.option("--json", "as_json", is_flag=True, help="Print results.json.")
def evaluate(
    base: str,
    sources: tuple[str, ...],
    adapters: tuple[str, ...],
    bundles: tuple[Path, ...],
    output: Path,
    pairs: Path | None,
    drift: tuple[str, ...],
    lm_eval: tuple[str, ...],
    backend: str,
    metric: str,
    agreement: bool,
    limit: int | None,
    split: str,
    columns: tuple[str, ...],
    definition: str | None,
    template: str,
    chat: bool,
    shots: int,
    max_tokens: int | None,
    new_tokens: int,
    min_retention: float | None,
    max_drop: float | None,
    point: bool,
    dtype: str,
    device: str,
    tensor_parallel: int,
    cache: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Score base, original adapters and bundles on tasks, and compare them example by example.

    Exit code 0: done, and the gate passes if there is one. 1: the gate fails, or an adapter does not act in the model
    as its factors say. 3: the examples are too few to decide.
    """
    if not adapters and not bundles:
        raise UsageError("there is nothing to evaluate (give --adapters, --bundle or both)")
    if not sources and not lm_eval:
        raise UsageError("there is nothing to answer (give --tasks, --lm-eval or both)")
    spec = EvalSpec(
        split=split,
        limit=limit,
        columns=tasks.parse_columns(columns),
        template=template,
        chat=chat,
        definition=definition,
        metric=metric,
        agreement=agreement,
        max_tokens=max_tokens,
        new_tokens=new_tokens,
        shots=shots,
        min_retention=min_retention,
        max_drop=max_drop,
        point=point,
    )
    engine = session.engine(backend, dtype, device, tensor_parallel)
    with render.progress() as progress:
        results = job.evaluate(
            base,
            sources,
            adapters=adapters,
            bundles=bundles,
            spec=spec,
            pairs=pairs,
            drift=drift,
            lm_eval=lm_eval,
            backend=engine,
            cache=cache,
            output=output,
            force=force,
            progress=progress,
        )
    if as_json:
        render.as_json(results.document())
    else:
        _show(results, output)
    sys.exit(CODES[results.gate.verdict] if results.gate else 0)


def _show(results: Results, output: Path) -> None:
    sizes = {arm.name: arm for arm in results.arms}
    rows = []
    for one in results.summary:
        arm = sizes[one.arm]
        flips = "-" if one.fixes_per_100 is None else f"{one.fixes_per_100:.1f} / {one.breaks_per_100:.1f}"
        worst = (
            "-" if one.worst is None else f"{one.worst.adapter} {100 * one.worst.difference.estimate:+.1f}"
        )
        rows.append(
            [
                one.arm,
                render.interval(one.score),
                render.interval(one.kept),
                flips,
                worst,
                render.interval(one.drift, "+"),
                "-" if one.loss is None else f"{one.loss.estimate:.3f}",
                units.size(arm.nbytes) if arm.nbytes else "-",
                "-" if arm.ratio is None else f"{arm.ratio:.2f}",
            ]
        )
    columns = [
        "arm",
        "score %",
        "kept %",
        "fixes / breaks per 100",
        "worst adapter",
        "drift",
        "loss",
        "size",
        "ratio",
    ]
    render.table("", columns, rows, numbers=3)
    for left in results.left_out:
        click.echo(f"left out: {units.counted(left.count, 'item')}, {left.why}: {left.what}")
    cost = results.cost
    rate = cost["tokens"] / cost["seconds"] if cost["seconds"] else 0.0
    click.echo(
        f"{cost['made']} model calls made, {cost['cached']} from the cache; "
        f"{cost['tokens']} tokens, {rate:.0f} tokens/s, {units.duration(cost['total_seconds'])} in all"
    )
    click.echo(f"every adapter acts as its factors say ({len(results.canaries)} canaries)")
    if results.gate:
        _show_gate(results.gate)
    click.echo(f"results: {output / RESULTS}, report: {output / REPORT}")


def _show_gate(gate: Gate) -> None:
    for check in gate.checks:
        needed = (
            f"; about {check.examples_needed} examples in all would decide" if check.examples_needed else ""
        )
        most = f"{100 * check.threshold:g}"
        kept = check.rule == "min-retention"
        rule = f"keep at least {most} %: kept" if kept else f"lose at most {most} points: lost"
        click.echo(f"gate: {check.arm}: {rule} {render.interval(check.value)} -> {check.verdict}{needed}")
    click.echo(f"gate: {gate.verdict}")
