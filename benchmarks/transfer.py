#!/usr/bin/env python3
r"""How well adapters are moved between two bases: every way to get inputs, every filter, with intervals.

    python benchmarks/transfer.py SMOLLM GEMMA TASKS              both directions, all tasks, all arms
    python benchmarks/transfer.py SMOLLM GEMMA TASKS --route unfiltered --route retained    only these arms
    python benchmarks/transfer.py SMOLLM GEMMA TASKS --page docs/TRANSFER-RESULTS.md    write the page

SMOLLM and GEMMA are two base models (the letters S and G in the tables), TASKS a directory of labelled tasks with
splits train, validation and test, and definitions in its tasks.jsonl. For every task and direction this trains the
source adapter on the train split, a discriminator on the same inputs where its route is asked for, an oracle on the
target, and moves the adapter along the routes with the commands' own code:

    retained        the train split's inputs, without their answers
    unfiltered      synthetic inputs from five seeds, all of them
    discriminator   Trans-LoRA: those that the discriminator takes for real
    excess          TiTok: twice as many, of which the better half is kept, and of it 70 % of the tokens
    seeds           the five seeds alone
    generic         sentences that have nothing to do with the task

Of the data-free routes, unfiltered, discriminator and excess, one is chosen for all tasks by the mean score on the
validation splits, where all were run; the page gives its scores on the test splits. Results are lines of --results: a
rerun does what is missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transfer_page

from lorazip import base as bases
from lorazip.eval import session, tasks
from lorazip.eval.cache import Cache
from lorazip.eval.prompts import Prompter
from lorazip.eval.tasks import Task
from lorazip.generic import PROMPTS
from lorazip.transfer import distill, job, slots, train_discriminator
from lorazip.transfer import recipe as recipes
from lorazip.transfer.batches import Sample
from lorazip.transfer.recipe import Recipe, Training
from lorazip.transfer.slots import Shape
from lorazip.transfer.world import located

ROOT = Path(__file__).resolve().parent.parent
TASKS = ("corpora_verb_past", "fv_animal_v_object_5", "snips_playmusic_artist", "lre_landmark_on_continent")
DIRECTIONS = ("S->G", "G->S")
SEEDS = 5
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SOURCE_MODULES = ("q_proj", "k_proj", "v_proj")
RANK = 8
JUDGED = 160  # real inputs that a discriminator sees
MOST_TOKENS = 160  # of an example: what is longer is left out of the source adapter's training
TEMPLATE = "{definition}\n{input} =>"  # short: time on a CPU goes by tokens


@dataclass(frozen=True)
class Place:
    """A task in one direction, and where its files go."""

    task: Task
    source: Path
    target: Path
    work: Path
    inputs: list[str]  # of the train split
    judge_epochs: int

    @property
    def judge(self) -> Path:
        """Where the discriminator goes."""
        return self.work / f"discriminator-{self.judge_epochs}"

    def file(self, name: str, inputs: Sequence[str]) -> str:
        """Inputs as a file."""
        path = self.work / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"input": text}) + "\n" for text in inputs))
        return str(path)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing, or write the page."""
    parser = argparse.ArgumentParser(description="Moving adapters between two bases.")
    add: Any = parser.add_argument
    add("smollm", type=Path)
    add("gemma", type=Path)
    add("tasks", type=Path)
    add("--task", action="append", help="only this one; repeatable; any name of TASKS")
    add("--direction", action="append", choices=DIRECTIONS, help="only this one; repeatable")
    add("--route", action="append", choices=transfer_page.ROUTES, help="only this one; repeatable")
    add("--count", type=int, default=96, help="inputs to train on (default: %(default)s)")
    add("--limit", type=int, default=60, help="test examples (default: %(default)s)")
    add("--epochs", type=int, default=3, help="at most (default: %(default)s)")
    add("--rates", type=float, nargs="+", default=[1e-3], help="learning rates (default: 1e-3)")
    add("--judge-epochs", type=int, default=3, help="of the discriminator, at most (default: %(default)s)")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the bases in training")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=2)
    add("--backend", default="hf", choices=("hf", "vllm"))
    add("--work", type=Path, default=ROOT / "build" / "transfer")
    add("--results", type=Path, default=ROOT / "build" / "transfer.jsonl")
    add("--page", type=Path, help="write the page of what is measured, and measure nothing")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    if options.page:
        transfer_page.write(options.page, options.results)
        return
    for name in options.task or TASKS:
        for direction in options.direction or DIRECTIONS:
            measure(options, name, direction)


def measure(options: argparse.Namespace, name: str, direction: str) -> None:
    """One task in one direction, if it is not among the results."""
    setting = {
        "task": name,
        "direction": direction,
        "routes": [
            route for route in transfer_page.ROUTES if route in (options.route or transfer_page.ROUTES)
        ],
        **{
            key: getattr(options, key)
            for key in ("count", "limit", "epochs", "rates", "judge_epochs", "seed", "dtype")
        },
    }
    known = options.results.read_text().splitlines() if options.results.exists() else []
    if any(json.loads(line)["setting"] == setting for line in known):
        return
    begun = time.monotonic()
    pair = (options.smollm, options.gemma) if direction == "S->G" else (options.gemma, options.smollm)
    found = tasks.read(
        tasks.find([str(options.tasks)])[name][0], split="test", limit=options.limit, columns={}
    )
    work = options.work / f"{name} {direction.replace('->', ' ')} {options.seed} {options.dtype}"
    work.mkdir(parents=True, exist_ok=True)
    inputs = [example.input for example in found.shots]
    random.Random(options.seed).shuffle(inputs)
    place = Place(found, *pair, work, list(dict.fromkeys(inputs)), options.judge_epochs)
    adapter, seconds = _source(place, options)
    print(f"{name} {direction}: source {seconds:.0f} s", flush=True)
    accuracy = _discriminator(place, options) if "discriminator" in setting["routes"] else None
    engine = session.engine(options.backend, "float32", "auto")
    plans = _recipes(place, options, adapter, setting["routes"])
    moved = job.move(
        list(plans.values()), work / "moved", engine=engine, many=True, work=work / "stages", force=True
    )
    row: dict[str, Any] = {"setting": setting, "source_seconds": seconds, "discriminator_accuracy": accuracy}
    row["minutes"] = round((time.monotonic() - begun) / 60, 1)
    row["routes"] = {}
    for one in moved:
        text = str(one.error or "") if one.judged is None or not one.judged.refused else "refused"
        row["routes"][one.name] = {
            "error": text,
            "gate": None if one.judged is None else dataclasses.asdict(one.judged),
            "stages": {k: v for k, v in one.stages.items() if k in ("filter", "label", "train")},
            "scores": transfer_page.scores(work / "stages" / one.name),
        }
    row["validation"] = {}
    if set(transfer_page.FREE) <= set(plans):  # there is something to choose
        checked = [
            dataclasses.replace(plan, gate=dataclasses.replace(plan.gate, split="validation", oracle=False))
            for plan in plans.values()
        ]
        again = job.move(checked, work / "moved", engine=engine, many=True, work=work / "stages", force=True)
        row["validation"] = {
            one.name: one.judged.arms["transferred"]["score"].estimate
            for one in again
            if one.judged is not None
        }
    row["engine"], row["threads"] = engine.name, options.threads
    options.results.parent.mkdir(parents=True, exist_ok=True)
    with options.results.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{name} {direction}: {row['minutes']} min", flush=True)


def _recipes(
    place: Place, options: argparse.Namespace, adapter: Path, routes: Sequence[str]
) -> dict[str, Recipe]:
    """The routes, each a recipe whose adapter is named as the route."""
    seeds, rest = place.inputs[:SEEDS], place.inputs[SEEDS:]
    common: dict[str, Any] = {
        "source": {"base": str(place.source), "adapter": str(adapter), "template": TEMPLATE},
        "target": {"base": str(place.target)},
        "inputs": {"definition": place.task.definition or "", "seed": options.seed},
        "train": {
            "epochs": options.epochs,
            "learning_rates": list(options.rates),
            "modules": list(MODULES),
            "rank": RANK,
            "dtype": options.dtype,
        },
        "label": {"new_tokens": 32},
        "gate": {"tests": place.task.source, "limit": options.limit},
    }
    seeded = {"seeds": place.file("seeds", seeds), "count": options.count, "rounds": 4}
    chosen: dict[str, dict[str, dict[str, Any]]] = {
        "retained": {
            "inputs": {"prompts": place.file("retained", rest[: options.count]), "count": 0},
            "filter": {"kind": "none"},
            "gate": {"oracle": True},
        },
        "unfiltered": {"inputs": seeded, "filter": {"kind": "none"}},
        "discriminator": {
            "inputs": seeded,
            "filter": {"kind": "discriminator", "discriminator": str(place.judge)},
        },
        "excess": {"inputs": seeded | {"count": 2 * options.count}, "filter": {"kind": "excess"}},
        "seeds": {
            "inputs": {"prompts": seeded["seeds"], "count": 0},
            "filter": {"kind": "none"},
        },
        "generic": {
            "inputs": {"prompts": place.file("generic", PROMPTS), "count": 0},
            "filter": {"kind": "none"},
        },
    }
    found = {}
    for route in routes:
        tables = {name: dict(table) for name, table in common.items()}
        for name, table in chosen[route].items():
            tables.setdefault(name, {}).update(table)
        tables["source"]["name"] = route
        found[route] = recipes.parse(tables, route)
    return found


def _source(place: Place, options: argparse.Namespace) -> tuple[Path, float]:
    """The adapter to be moved, trained on the task's train split."""
    folder = place.work / "source"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = bases.load(place.source, getattr(torch, options.dtype), device)
    with_cache = Cache(place.work)
    prompter = located(str(place.source), with_cache).prompter(TEMPLATE)
    with_cache.close()
    train = _samples(place.task, prompter)
    held = max(8, len(train) // 10)
    spec = Training(epochs=2, learning_rates=(1e-3,))
    shape = Shape("lora", RANK, 2 * RANK, slots.modules_of(model, SOURCE_MODULES))
    fitted = distill.fit(model, train[held:], train[:held], shape, spec, folder, seed=options.seed)
    return folder / distill.ADAPTER, fitted.seconds


def _samples(task: Task, prompter: Prompter) -> list[Sample]:
    found = []
    for example in task.shots:
        prompt, answer = prompter.prompt(task, example), prompter.answer(example.output)
        if len(prompt) + len(answer) <= MOST_TOKENS:
            found.append(Sample(prompt, answer, (True,) * len(answer)))
    return found


def _discriminator(place: Place, options: argparse.Namespace) -> float:
    """Train it; its accuracy."""
    record = place.judge / "discriminator.json"
    if not record.exists():
        train_discriminator.train(
            str(place.source),
            Path(place.file("train", place.inputs[: SEEDS + JUDGED])),
            place.judge,
            engine=session.engine(options.backend, options.dtype, "auto"),
            definition=place.task.definition or "",
            epochs=options.judge_epochs,
            seed=options.seed,
            cache=place.work,
        )
    return float(json.loads(record.read_text())["accuracy"])


if __name__ == "__main__":
    main()
