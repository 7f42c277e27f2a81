"""`lorazip transfer discriminator`: write false inputs, train on both kinds, measure, keep."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorazip import base as bases
from lorazip import rows
from lorazip.adapter import open_adapter
from lorazip.errors import LorazipError, TargetError, TransferError, UsageError
from lorazip.eval.cache import Cache
from lorazip.eval.session import Engine, Progress
from lorazip.files import write_bytes
from lorazip.peft_config import CONFIG_FILE
from lorazip.transfer import discriminator, distill, publish, slots, synthesize, texts
from lorazip.transfer.discriminator import Record
from lorazip.transfer.distill import ADAPTER
from lorazip.transfer.recipe import Inputs, Training
from lorazip.transfer.slots import Shape
from lorazip.transfer.texts import Screen
from lorazip.transfer.world import Ask, World, located

MODULES = ("q_proj", "v_proj")  # Trans-LoRA's
LEAST = 20  # inputs of each kind
ROUNDS = 8
NAME = "discriminator"


def train(
    base: str,
    inputs: Path,
    output: Path,
    *,
    engine: Engine,
    seeds: Path | None = None,
    definition: str = "",
    rank: int = 8,
    epochs: int = 3,
    learning_rate: float = 1e-3,
    seed: int = 0,
    cache: Path | None = None,
    progress: Progress = lambda what, done, total, note="": None,
) -> dict[str, Any]:
    """Train one and save it as a PEFT directory with discriminator.json. Returns the content of that.

    Args:
        base: the source base.
        inputs: file of real inputs.
        seeds: file of inputs that the base is shown; the first five real ones by default.
        cache: folder for the base's answers, which stay there; by default they do not stay.
    Raises:
        InputError, UsageError: an input cannot be used; TransferError: too few false inputs came.
        TargetError: the output exists or cannot be written.
    """
    if output.exists():
        raise TargetError(f"{output} exists (choose another directory)")
    if rank < 1 or epochs < 1 or not 0 < learning_rate < 1:
        raise UsageError("--rank and --epochs must be at least 1, --learning-rate between 0 and 1")
    real = rows.texts(inputs)
    shown = texts.read_seeds(seeds) if seeds else real[: texts.LEAST_SEEDS]
    real = texts.unseen(real, shown)
    if len(real) < LEAST:
        raise UsageError(f"{inputs} has {len(real)} inputs beside the seeds, a discriminator needs {LEAST}")
    output.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as scratch,
        # What the base writes is made of private seeds: it does not stay, and not in the user's common cache.
        contextlib.closing(Cache(cache or Path(scratch))) as store,
    ):
        model_of = located(base, store)
        world = World(model_of, model_of, engine, store, progress)
        false = _written(world, shown, definition, len(real), seed)
        (real_in, false_in), (real_out, false_out) = discriminator.split(real, false, seed)
        prompter = model_of.prompter(discriminator.TEMPLATE)
        model = bases.load(model_of.path, engine.dtype, engine.device)
        spec = Training(epochs=epochs, learning_rates=(learning_rate,), patience=1)
        shape = Shape("lora", rank, 2 * rank, slots.modules_of(model, MODULES))
        folder = Path(scratch) / "fit"
        distill.fit(
            model,
            discriminator.samples(prompter, real_in, false_in),
            discriminator.samples(prompter, real_out, false_out),
            shape,
            spec,
            folder,
            seed=seed,
            progress=progress,
        )
        del model
        bases.free(engine.device)
        right = _right(world, folder / ADAPTER, real_out, false_out)
        record = Record(
            model_of.digest,
            len(real_in),
            len(false_in),
            right / (len(real_out) + len(false_out)),
            len(real_out) + len(false_out),
        )
        config = json.loads((folder / ADAPTER / CONFIG_FILE).read_bytes())
        config["base_model_name_or_path"] = publish.shown(base)  # no path of this machine
        write_bytes(folder / ADAPTER / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())
        discriminator.write_record(folder / ADAPTER, record)
        shutil.move(folder / ADAPTER, output)
        return {"schema": discriminator.SCHEMA, **asdict(record)}


def _written(world: World, seeds: list[str], definition: str, count: int, seed: int) -> list[str]:
    """False inputs: what the source base writes when it is shown seeds."""
    screen = Screen(seeds)
    spec = Inputs(definition=definition, seed=seed, count=count)
    found: list[str] = []
    asked = 0
    for round_ in range(ROUNDS):
        if len(found) >= count:
            break
        more = synthesize.planned(count - len(found), asked, len(found))
        calls = synthesize.calls(
            world.source.prompter(), spec, seeds, None, round_, more, world.source.context
        )
        answers = world.ask(world.source, [Ask(NAME, {}, calls)], "writing inputs")[NAME]
        if isinstance(answers, LorazipError):
            raise answers
        asked += len(calls)
        taken = [screen.take(draft.text, draft.finished) for draft in synthesize.texts(calls, answers)]
        found += [text for text in taken if text is not None]
    if len(found) < LEAST:
        why = ", ".join(f"{number} {reason}" for reason, number in screen.counts.most_common())
        raise TransferError(
            f"the base wrote only {len(found)} usable inputs of {asked} ({why}): give more --seeds"
        )
    return found[:count]


def _right(world: World, directory: Path, real: list[str], false: list[str]) -> int:
    """How many held-out inputs are told rightly."""
    adapter = open_adapter(directory, NAME)
    key = f"{NAME}/new"
    calls = discriminator.calls(world.source.prompter(discriminator.TEMPLATE), key, [*real, *false])
    answers = world.ask(world.source, [Ask(NAME, {key: adapter}, calls)], "measuring")[NAME]
    if isinstance(answers, LorazipError):
        raise answers
    told = discriminator.verdicts(answers)
    return sum(told[: len(real)]) + sum(not yes for yes in told[len(real) :])
