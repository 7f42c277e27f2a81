"""`lorazip transfer`: its stages as commands, and what helps them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from lorazip import units
from lorazip.cli import render
from lorazip.errors import TransferError, printable
from lorazip.eval import session
from lorazip.transfer import job, recipe_file, recipe_table, train_discriminator

HELP = {"help_option_names": ["-h", "--help"]}
POOR = 0.75  # accuracy of a discriminator, below which it refuses by chance; Trans-LoRA asks for 0.9
_Command = Callable[..., Any]


@click.group(
    context_settings=HELP,
    epilog="Example: lorazip transfer run --recipe move.toml -o moved/ --json",
)
def transfer() -> None:
    """Move an adapter to a new base model without its training data. `lorazip transfer COMMAND --help` tells more."""


def _options(function: _Command) -> _Command:
    """What all stages take."""
    for option in reversed(
        [
            click.option("--recipe", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
                         help="TOML file of all options (docs/TRANSFER.md); the flags below replace its keys."),
            click.option("--adapter", metavar="PATH",
                         help="The adapter: a PEFT directory, a Hub id, or a bundle."),
            click.option("--name", metavar="NAME", help="Which adapter of a bundle; of the result."),
            click.option("--source-base", metavar="MODEL", help="Base model that it was trained on."),
            click.option("--target-base", metavar="MODEL", help="Base model to move it to."),
            click.option("--definition", metavar="TEXT", help="Instruction that goes before every input."),
            click.option("--seeds", metavar="FILE", help="Five or more example inputs (JSON lines or .txt)."),
            click.option("--prompts", metavar="FILE", help="Retained inputs without answers; equal ones count once."),
            click.option("--count", type=int, metavar="N", help="Synthetic inputs. Default: 250."),
            click.option("--filter", "kind", type=click.Choice(["none", "discriminator", "excess", "both"]),
                         help="Which inputs and answers are trained on. Default: none."),
            click.option("--discriminator", metavar="DIR", help="A trained one, for --filter discriminator."),
            click.option("--tests", metavar="FILE", help="Labelled task for the gate. Default: agreement."),
            click.option("--set", "settings", multiple=True, metavar="TABLE.KEY=VALUE",
                         help="Any key of the recipe, for example train.rank=16; may be repeated."),
            click.option("--table", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
                         help="Many adapters: JSON lines with adapter, seeds, … (docs/TRANSFER.md)."),
            click.option("-o", "--output", type=click.Path(path_type=Path), required=True,
                         help="PEFT directory to make; with --table a directory of them."),
            click.option("--work", type=click.Path(path_type=Path), metavar="DIR",
                         help="Folder of stages and answers. Default: OUTPUT.work."),
            click.option("--backend", type=click.Choice(["auto", "vllm", "hf"]), default="auto",
                         show_default=True, help="Who answers; training is always transformers and PEFT."),
            click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto",
                         show_default=True, help="Of models that answer."),
            click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda."),
            click.option("--processes", type=int, default=1, show_default=True, metavar="N",
                         help="That share every batch in training: as many GPUs."),
            click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON."),
        ]
    ):  # fmt: skip
        function = option(function)
    return function


_FLAGS = {
    "adapter": "source.adapter",
    "name": "source.name",
    "source_base": "source.base",
    "target_base": "target.base",
    "definition": "inputs.definition",
    "seeds": "inputs.seeds",
    "prompts": "inputs.prompts",
    "count": "inputs.count",
    "kind": "filter.kind",
    "discriminator": "filter.discriminator",
    "tests": "gate.tests",
}


def _tables(options: dict[str, Any]) -> dict[str, Any]:
    """The recipe file, with flags and --set on top."""
    path = options["recipe"]
    tables = recipe_file.overridden(recipe_file.read(path) if path else {}, options["settings"])
    for flag, place in _FLAGS.items():
        if options.get(flag) is not None:
            table, _, key = place.partition(".")
            inside = tables.setdefault(table, {})
            if isinstance(inside, dict):
                inside[key] = options[flag]
    return tables


def _run(until: job.Stage, options: dict[str, Any], **more: Any) -> None:
    engine = session.engine(options["backend"], options["dtype"], options["device"])
    where = str(options["recipe"] or "options")
    parsed = recipe_table.recipes_of(_tables(options), options["table"], where, probed=until == "probe")
    many = options["table"] is not None
    with render.progress() as progress:
        moved = job.move(
            parsed,
            options["output"],
            engine=engine,
            many=many,
            until=until,
            work=options["work"],
            processes=options["processes"],
            progress=progress,
            **more,
        )
    if options["as_json"]:
        render.as_json([one.document() for one in moved])
    else:
        for one in moved:
            _show(one, until)
    failed = [one for one in moved if one.error is not None]
    if failed and not many:
        assert failed[0].error is not None
        raise failed[0].error
    if failed:
        lines = [_named(one) for one in failed]
        raise TransferError("\n".join([f"{len(failed)} of {len(moved)} transfers failed:", *lines]))


def _named(one: job.Moved) -> str:
    """An error that says whose it is."""
    name, text = printable(one.name), str(one.error)
    return text if text.startswith(f"{name}: ") else f"{name}: {text}"


def _show(one: job.Moved, until: str) -> None:
    """What became of a transfer, in a few lines; of one that failed, if it came to the gate."""
    if one.error is not None and one.judged is None:
        return
    click.echo(f"{printable(one.name)}:")
    stages = one.stages
    if until == "probe":
        _show_probe(stages["probe"])
        return
    inputs = stages.get("filter") if until != "synthesise" else stages.get("synthesise")
    if inputs:
        aside = ", ".join(f"{count} {why}" for why, count in inputs["aside"].items())
        click.echo(
            f"  inputs: {inputs['kept']} kept of {inputs['asked']} written in "
            f"{units.counted(inputs['rounds'], 'round')}"
            + (f" (put aside: {aside})" if aside else "")
            + (f", {inputs['retained']} retained" if inputs.get("retained") else "")
        )
        if inputs.get("overlap") and inputs["kept"]:
            near = inputs["overlap"]
            click.echo(
                f"  leak check: at most {units.share(near['nearest'])} of an input's {near['n']}-character "
                f"n-grams in one seed, {units.share(near['mean'])} on average"
            )
    if until in ("label", "train", "evaluate", "gate") and "label" in stages:
        answers, parts = stages["label"]["answers"], stages["label"]["parts"]
        click.echo(
            f"  answers: {answers['kept']} ended, {answers['unfinished']} did not, {answers['empty']} empty; "
            + ", ".join(f"{count} {part}" for part, count in parts.items())
        )
    if until in ("train", "evaluate", "gate") and "train" in stages:
        fitted = stages["train"]
        errors = fitted["errors"]
        click.echo(
            f"  training: {units.counted(fitted['samples'], 'answer')}, {fitted['tokens']} tokens, rank "
            f"{fitted['rank']}, learning rate {fitted['learning_rate']:g}: held-out error {errors[0]:.3f} -> "
            f"{errors[fitted['best']]:.3f} (epoch {fitted['best']}), {units.duration(fitted['seconds'])}"
        )
        if fitted["too_long"]:
            click.echo(
                f"  {units.counted(fitted['too_long'], 'answer')} too long for the target base, left out"
            )
        if fitted["not_in_target"]:
            missing = ", ".join(fitted["not_in_target"])
            click.echo(
                f"  not adapted, for the target base has no such modules: {missing} (see train.modules)"
            )
    if one.judged is not None:
        _show_gate(one)
    if one.output is not None:
        click.echo(f"  written: {one.output}")


def _show_gate(one: job.Moved) -> None:
    judged = one.judged
    assert judged is not None
    table = [
        [arm, render.interval(found["score"]), f"{found['loss'].estimate:.3f}"]
        for arm, found in judged.arms.items()
    ]
    render.table("", ["arm", f"{judged.measure} %", "token loss"], table, numbers=2)
    click.echo(
        f"  against the {judged.base}: {render.interval(judged.gain, '+')} points on {judged.examples} examples; "
        f"fixes {judged.fixes}, breaks {judged.breaks}"
    )
    if judged.to_expert is not None:
        click.echo(f"  against the source adapter: {render.interval(judged.to_expert, '+')} points")
    if one.stages["evaluate"]["no_oracle"]:
        click.echo(f"  no oracle: {one.stages['evaluate']['no_oracle']}")
    if judged.retention is not None:
        click.echo(f"  of the oracle's gain: {render.interval(judged.retention)} %")
    if judged.refused and one.output is not None:
        click.echo(f"  refused, and written all the same: {judged.refused}")


def _show_probe(found: dict[str, Any]) -> None:
    rows = [
        [name, "yes" if route["possible"] else "no", route["why"]] for name, route in found["routes"].items()
    ]
    render.table("", ["route", "possible", "why"], rows)
    click.echo(f"  advised: {found['advised']['route']}: {found['advised']['why']}")


def _stage(name: job.Stage, text: str) -> None:
    def command(**options: Any) -> None:
        _run(name, options)

    command.__doc__ = text
    made = click.command(
        name=name,
        context_settings=HELP,
        epilog=f"Example: lorazip transfer {name} --recipe move.toml -o moved/",
    )(_options(command))
    transfer.add_command(made)


@transfer.command(context_settings=HELP, epilog="Example: lorazip transfer run --recipe move.toml -o moved/")
@_options
@click.option("--accept-worse", is_flag=True, help="Write a transfer that is worse than the bare base, too.")
@click.option("--purge", is_flag=True, help="Delete inputs, answers and checkpoints at the end.")
@click.option("--force", is_flag=True, help="Replace an earlier result.")
def run(accept_worse: bool, purge: bool, force: bool, **options: Any) -> None:
    """Move adapters to a new base: probe, synthesise, filter, label, train, evaluate, gate.

    Every stage is kept in --work: what was killed goes on, and what has not changed is not done again. Exit code 1: the
    adapter is worse than the bare target base and was refused, or a transfer of --table failed.
    """
    _run("gate", options, accept_worse=accept_worse, purge=purge, force=force)


_stage(
    "probe",
    """Compare the two bases, and say which routes are possible and which is advised.

    Shapes of the adapted modules, tokenizers, weights layer by layer, activations (CKA) on generic prompts.
    """,
)
_stage("synthesise", """Write a first round of new inputs and screen them, without a filter.""")
_stage("filter", """Write inputs in rounds until enough of them pass the filter.""")
_stage(
    "label", """Let the source base with the adapter answer all inputs, and choose answers by their excess."""
)
_stage("train", """Train the new adapter on the target base.""")
_stage("evaluate", """Ask all arms the gate's questions.""")


@transfer.command(context_settings=HELP, epilog="Example: lorazip transfer validate move.toml")
@click.argument("recipe", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--table", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
              help="Many adapters, as for run.")  # fmt: skip
@click.option(
    "--set", "settings", multiple=True, metavar="TABLE.KEY=VALUE", help="As for run; may be repeated."
)
@click.option("--json", "as_json", is_flag=True, help="Print the whole recipe, defaults too.")
def validate(recipe: Path, table: Path | None, settings: tuple[str, ...], as_json: bool) -> None:
    """Check a recipe without running it: keys, types, ranges. No model is opened."""
    found = recipe_table.recipes_of(
        recipe_file.overridden(recipe_file.read(recipe), settings), table, str(recipe)
    )
    if as_json:
        render.as_json([one.document() for one in found])
        return
    click.echo(f"{recipe}: valid, {units.counted(len(found), 'transfer')}; files in it were not looked for")


@transfer.command(
    context_settings=HELP,
    epilog="Example: lorazip transfer discriminator --base model/ --inputs train.jsonl -o task.discriminator/",
)
@click.option("--base", required=True, metavar="MODEL", help="The source base model.")
@click.option("--inputs", required=True, type=click.Path(path_type=Path), metavar="FILE",
              help="Real inputs of the task (JSON lines or .txt): the adapter's training data.")  # fmt: skip
@click.option("--seeds", type=click.Path(path_type=Path), metavar="FILE",
              help="Inputs that the base is shown to write false ones. Default: the first five real ones.")  # fmt: skip
@click.option("--definition", default="", metavar="TEXT", help="The task's instruction.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Directory to make.")
@click.option("--rank", type=int, default=8, show_default=True, help="Of its LoRA.")
@click.option("--epochs", type=int, default=3, show_default=True, help="At most.")
@click.option("--learning-rate", type=float, default=1e-3, show_default=True, help="Of training.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of sampling and training.")
@click.option("--backend", type=click.Choice(["auto", "vllm", "hf"]), default="auto", show_default=True,
              help="Who writes the false inputs.")  # fmt: skip
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def discriminator(
    base: str,
    inputs: Path,
    seeds: Path | None,
    definition: str,
    output: Path,
    rank: int,
    epochs: int,
    learning_rate: float,
    seed: int,
    backend: str,
    device: str,
    as_json: bool,
) -> None:
    """Train the filter of --filter discriminator while the task's data exist, to be kept beside the adapter.

    It is a LoRA on the source base that says yes or no: is this an input of the task? Half of what it sees are real
    inputs, half are written by the base from seeds. It holds no text of them.
    """
    engine = session.engine(backend, "auto", device)
    with render.progress() as progress:
        record = train_discriminator.train(
            base,
            inputs,
            output,
            seeds=seeds,
            definition=definition,
            rank=rank,
            epochs=epochs,
            learning_rate=learning_rate,
            seed=seed,
            engine=engine,
            progress=progress,
        )
    if as_json:
        render.as_json(record)
        return
    click.echo(
        f"accuracy {100 * record['accuracy']:.1f} % on {record['held_out']} held-out inputs; trained on "
        f"{record['real']} real and {record['synthetic']} written ones"
    )
    if record["accuracy"] < POOR:
        click.echo(
            "it hardly tells them apart: more --epochs, or another filter (a task of plain words has no mark)"
        )
    click.echo(f"written: {output}")
