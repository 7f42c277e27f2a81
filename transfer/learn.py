"""The stage `train`: the new adapter learns the expert's answers on the target base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lorazip import base as bases
from lorazip.errors import Defect, InputError, LorazipError, TransferError
from lorazip.eval.backend import HasFactors
from lorazip.eval.prompts import Prompter
from lorazip.eval.tasks import Example
from lorazip.transfer import excess, fits, slots, teach, warm
from lorazip.transfer.batches import Sample
from lorazip.transfer.distill import Fitted
from lorazip.transfer.fits import Fit
from lorazip.transfer.move import Move, alive, pending
from lorazip.transfer.recipe import Training, digest
from lorazip.transfer.slots import Shape, Start
from lorazip.transfer.teach import ASIDE, HELD_OUT, TRAIN, Labelled, task_of
from lorazip.transfer.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Hidden: what is in them looks like adapters, and compress of a directory above would take it.
FOLDER, ORACLE = ".training", ".oracle"


def key(move: Move, world: World) -> str:
    """What the new adapter depends on."""
    r = move.recipe
    tokens = r.filter.keep_tokens if r.filter.kind in ("excess", "both") else None
    told = [asdict(r.train), r.prompting[1], r.filter.kind, tokens, r.inputs.seed]
    return digest("train", teach.key(move, world), told, world.target.digest)


def train(world: World, moves: Sequence[Move]) -> None:
    """Train all, one after the other, on one loaded base."""
    todo = pending(moves, "train", lambda move: key(move, world))
    if not todo:
        return
    skeleton = bases.skeleton(world.target.path)
    planned: dict[str, Fit] = {}
    counts: dict[str, int] = {}
    for move in todo:
        with move.guarded():
            planned[move.name], counts[move.name] = _fit(world, move, skeleton)
    if not planned:
        return
    done = fit_all(world, list(planned.values()))
    for move in alive(todo):
        with move.guarded():
            one, found = planned[move.name], done[move.name]
            if isinstance(found, LorazipError):
                raise found
            if found.best == 0 and one.start is None:
                raise TransferError(
                    f"{move.name}: no epoch was better than no adapter at all on held-out answers (error "
                    f"{found.errors[0]:.3f}, then {min(found.errors[1:]):.3f} at best): more inputs, or another "
                    "train.learning_rates"
                )
            figures = asdict(found) | {
                "samples": len(one.train),
                "held_out": len(one.held_out),
                "tokens": sum(sum(sample.trained) for sample in one.train),
                "rank": one.shape.rank,
                "alpha": one.shape.alpha,
                "modules": len(one.shape.modules),
                "too_long": counts[move.name],
                "not_in_target": lost_kinds(move.adapter, move.recipe.train, skeleton),
            }
            move.done("train", key(move, world), figures)


def fit_all(world: World, some: Sequence[Fit]) -> dict[str, Fitted | LorazipError]:
    """Train on the target base. All fits of a job have the number type of the first."""
    return fits.fit_all(
        world.target.path,
        some,
        dtype=_dtype(some[0].spec, world),
        device=world.engine.device,
        processes=world.processes,
        progress=lambda name, what, done, total: world.progress(f"{name}: {what}", done, total),
    )


def _fit(world: World, move: Move, skeleton: PreTrainedModel) -> tuple[Fit, int]:
    """What is trained, and how many answers are too long for it.

    Raises:
        TransferError: too few are not.
    """
    labelled = teach.read(world, move)
    train, held_out = (samples(world, move, labelled, part) for part in (TRAIN, HELD_OUT))
    long = sum(one.part in (TRAIN, HELD_OUT) for one in labelled) - len(train) - len(held_out)
    if not train or not held_out:
        raise TransferError(
            f"{move.name}: {long} answers are too long with their inputs for the target base, which takes "
            f"{world.target.context} tokens; {len(train)} are left to train on and {len(held_out)} to hold out "
            "(shorter inputs, or a lower label.new_tokens)"
        )
    fit = Fit(
        move.name,
        train,
        held_out,
        shape_of(move.adapter, move.recipe.train, skeleton),
        move.recipe.train,
        folder(move, world),
        move.recipe.inputs.seed,
        _start(world, move),
    )
    return fit, long


def folder(move: Move, world: World) -> Path:
    """Where a fit of this key is."""
    return move.work / FOLDER / key(move, world)


def shape_of(adapter: HasFactors, spec: Training, model: PreTrainedModel) -> Shape:
    """The new adapter's: what the recipe says, and else as the source's.

    Raises:
        InputError: the target has none of the source's kinds of modules.
    """
    own = sorted({slots.leaf(module) for module in adapter.modules})
    leaves = spec.modules or tuple(own)
    if not spec.modules:
        there = {slots.leaf(n) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        leaves = tuple(name for name in own if name in there)
        if not leaves:
            problem = f"adapts {', '.join(own)}; the target base has none of them"
            remedy = f"name some of {', '.join(sorted(there))} in train.modules"
            raise InputError([Defect(adapter.name, problem=problem, remedy=remedy)])
    rank = spec.rank or max(adapter.low_rank(module).A.shape[0] for module in adapter.modules)
    return Shape(spec.kind, rank, spec.alpha or 2 * rank, slots.modules_of(model, leaves))


def lost_kinds(adapter: HasFactors, spec: Training, model: PreTrainedModel) -> list[str]:
    """Kinds of modules that the source adapts and the target does not have; none where the recipe names modules."""
    there = {slots.leaf(n) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    return [] if spec.modules else sorted({slots.leaf(m) for m in adapter.modules} - there)


def samples(world: World, move: Move, labelled: Sequence[Labelled], part: str) -> list[Sample]:
    """The expert's answers in the target's tokens; of the filter's choice of tokens, only what is trained on.

    Equal tokenizers may differ in which token ends an answer: for the loss on logits the two change places.

    Raises:
        InputError: the loss on logits is asked for and the tokenizers differ.
    """
    prompter = world.target.prompter(*move.recipe.prompting[1])
    logits = move.recipe.train.loss == "logits"
    if logits and world.source.tokenizer.get_vocab() != world.target.tokenizer.get_vocab():
        problem, remedy = "needs equal tokenizers, and these differ", 'give train.loss = "labels"'
        raise InputError([Defect('train.loss = "logits"', problem=problem, remedy=remedy)])
    ends = world.source.prompter(*move.recipe.prompting[0]).end, prompter.end

    def ended(token: int) -> int:
        return dict(zip(ends, reversed(ends), strict=True)).get(token, token)

    found = []
    for one in labelled:
        if one.part != part or part == ASIDE:
            continue
        prompt = prompter.prompt(task_of(move), Example(one.input, one.output, ()))
        answer = tuple(map(ended, one.tokens)) if logits else prompter.answer(one.output)
        if len(prompt) + len(answer) > world.target.context:
            continue
        trained = (True,) * len(answer)
        if one.excess and part == TRAIN:
            values = _carried(world, prompter, one, answer)
            trained = excess.best_tokens(values, move.recipe.filter.keep_tokens)
        tops = one.tops
        if tops is not None:
            tops = replace(tops, tokens=tuple(tuple(map(ended, place)) for place in tops.tokens))
        found.append(Sample(prompt, answer, trained, tops))
    return found


def _carried(world: World, prompter: Prompter, one: Labelled, answer: Sequence[int]) -> tuple[float, ...]:
    source = world.source.prompter()
    text = one.tokens[:-1]
    return excess.carried(
        one.excess, excess.ends(text, source.decode), excess.ends(answer[:-1], prompter.decode)
    )


def _start(world: World, move: Move) -> Start | None:
    """Where training starts."""
    match move.recipe.train.warm:
        case "copy":
            return warm.copied(move.adapter, world.target.path)
        case "map":
            return warm.mapped(
                move.adapter, world.source.path, world.target.path, world.engine.device
            ).factors
        case _:
            return None


def _dtype(spec: Training, world: World) -> torch.dtype:
    """The number type of the base in training."""
    if spec.dtype == "auto":
        return torch.float32 if world.engine.device.type == "cpu" else torch.bfloat16
    kind: torch.dtype = getattr(torch, spec.dtype)
    return kind


def oracle(world: World, move: Move, skeleton: PreTrainedModel, train: Sequence[Sample]) -> Fit:
    """An adapter trained on the task's own labelled data: what a transfer could reach at best."""
    held = max(1, round(move.recipe.train.held_out * len(train)))
    spec = replace(move.recipe.train, loss="labels", warm="none")
    shape, seed = shape_of(move.adapter, spec, skeleton), move.recipe.inputs.seed
    told = digest(
        "oracle", asdict(spec), asdict(shape), seed, [asdict(one) for one in train], world.target.digest
    )
    return Fit(move.name, train[held:], train[:held], shape, spec, move.work / ORACLE / told, seed)
