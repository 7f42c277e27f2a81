"""The job of `lorazip transfer`: stage after stage, each for all adapters, up to the one that was asked for.

    probe -> synthesise -> filter -> label -> train -> evaluate -> gate

A stage opens one base once for all adapters. What an adapter's stage came to is in its folder below --work; model
answers are in a cache beside them. A transfer that fails is left where it is, and the others go on.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorazip import base as bases
from lorazip import names, rows
from lorazip.bundle import MANIFEST, Bundle
from lorazip.errors import Defect, InputError, LorazipError, TargetError, TransferError, UsageError, printable
from lorazip.eval.backend import HasFactors, digest
from lorazip.eval.cache import FILE, Cache
from lorazip.eval.session import Engine, Progress
from lorazip.files import locked
from lorazip.sources import open_adapters
from lorazip.transfer import assess, fits, gather, learn, probe, publish, recipe_table, teach, texts, warm
from lorazip.transfer import recipe as recipes
from lorazip.transfer.assess import Judged
from lorazip.transfer.move import STAGES, STATE, Move, alive, pending
from lorazip.transfer.recipe import Recipe
from lorazip.transfer.world import World, located

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Stage = Literal["probe", "synthesise", "filter", "label", "train", "evaluate", "gate"]


@dataclass(frozen=True)
class Moved:
    """What became of one transfer.

    Attributes:
        output: its directory; None unless it passed the gate, or was accepted all the same.
        stages: what each stage came to.
        judged: by the gate; None where it did not come so far.
        error: why it stopped; None where all went well.
    """

    name: str
    output: Path | None
    stages: dict[str, Any]
    judged: Judged | None
    error: LorazipError | None

    def document(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "name": self.name,
            "output": None if self.output is None else str(self.output),
            "stages": self.stages,
            "gate": None if self.judged is None else dataclasses.asdict(self.judged),
            "error": None if self.error is None else str(self.error),
        }


def move(
    parsed: Sequence[Recipe],
    output: Path,
    *,
    engine: Engine,
    many: bool,
    until: Stage = "gate",
    work: Path | None = None,
    force: bool = False,
    accept_worse: bool = False,
    purge: bool = False,
    processes: int = 1,
    progress: Progress = lambda what, done, total, note="": None,
) -> list[Moved]:
    """Move adapters to a new base, all stages of all of them.

    Args:
        parsed: a recipe for each, of one source base and one target base.
        output: PEFT directory to make.
        many: make OUTPUT/NAME for each.
        until: the last stage that is done; those before it are brought up to date.
        work: folder of stages and answers; OUTPUT.work by default.
        force: replace what exists.
        accept_worse: write a transfer that the gate refuses, marked as such.
        processes: that share the training of an adapter, each on a GPU of its own.
        purge: delete inputs, answers and all else in `work` of the transfers that came to their gate.
    Returns:
        What became of each.
    Raises:
        LorazipError: what concerns all of them: a base, the folders, names.
    """
    fits.require(processes, engine.device, (one.train.batch for one in parsed))
    if not output.name:  # "."
        output = output.resolve()
    folder = work or output.with_name(f"{output.name}.work")
    if len({(one.source.base, one.target.base) for one in parsed}) > 1:
        raise UsageError("one job has one source.base and one target.base")
    if folder.resolve() == output.resolve() or output.resolve().is_relative_to(folder.resolve()):
        raise UsageError("the result must not lie in --work, which may be deleted (choose another)")
    moves, lost = _moves(parsed, output, folder, many, until == "gate", force)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TargetError(f"{folder} cannot be made: {error.strerror} (choose another --work)") from error
    with locked(folder):
        for one in moves:
            _swept(one.work)
        cache = Cache(folder)
        try:
            world = World(
                located(parsed[0].source.base, cache),
                located(parsed[0].target.base, cache),
                engine,
                cache,
                progress,
                processes,
            )
            for one in moves:
                one.work.mkdir(parents=True, exist_ok=True)
            judged = _stages(world, moves, until, force, accept_worse)
        finally:
            cache.close()
        found = [*(_moved(move, judged.get(move.name), until) for move in moves), *lost]
        if purge:
            _purge(folder, [move for move in moves if move.name in judged])
    return found


def _stages(
    world: World, moves: Sequence[Move], until: Stage, force: bool, accept_worse: bool
) -> dict[str, Judged]:
    steps: dict[str, Callable[[World, Sequence[Move]], None]] = {
        "probe": _probe,
        "synthesise": gather.synthesise,
        "filter": gather.gather,
        "label": teach.label,
        "train": learn.train,
        "evaluate": assess.evaluate,
    }
    judged: dict[str, Judged] = {}
    if until != "probe":  # which says what is possible
        skeleton = bases.skeleton(world.target.path)
        for move in moves:
            with move.guarded():
                _check(world, move, skeleton)
                _spare(world, move)
    for stage in STAGES[: STAGES.index(until) + 1]:
        if stage == "synthesise" and until != "synthesise":
            continue  # the filter's rounds begin with the same one
        if stage != "gate":
            steps[stage](world, moves)
            continue
        for move in alive(moves):
            with move.guarded():
                scored = assess.read(world, move)
                judged[move.name] = one = assess.judge(move.known("evaluate")["measure"], scored)
                if one.refused and not accept_worse:
                    raise TransferError(
                        f"{move.name}: refused: {one.refused}; nothing was written to {move.output} "
                        f"(the adapter is in {learn.folder(move, world)}; --accept-worse writes it)"
                    )
                publish.write(world, move, one, force)
    return judged


def _check(world: World, move: Move, skeleton: PreTrainedModel) -> None:
    """What a later stage would find missing, found before hours of work."""
    source, target = move.recipe.prompting
    world.source.prompter(*source)
    world.target.prompter(*target)
    extras = sorted(move.adapter.extras)
    if extras:
        problem = "is carried beside the LoRA factors, and would not act in what it teaches"
        remedy = "a transfer takes adapters of factors alone: no DoRA, no modules_to_save, no trained bias"
        raise InputError([Defect(move.name, "", extras[0], problem, remedy)])
    learn.shape_of(move.adapter, move.recipe.train, skeleton)
    if move.recipe.train.warm == "copy":
        warm.copied(move.adapter, world.target.path)
    gather.generator(move, world)
    if gather.judges(move):
        gather.judge_of(world, move)
    if move.recipe.gate.tests:
        assess.labelled(move)


def _probe(world: World, moves: Sequence[Move]) -> None:
    for move in pending(moves, "probe", lambda move: _probed(world, move)):
        with move.guarded():
            found = probe.probe(move.adapter, world.source.path, world.target.path, world.engine.device)
            move.done("probe", _probed(world, move), found.document())


def _probed(world: World, move: Move) -> str:
    return recipes.digest("probe", move.digest, world.source.digest, world.target.digest)


def _moves(
    parsed: Sequence[Recipe], output: Path, folder: Path, many: bool, ends: bool, force: bool
) -> tuple[list[Move], list[Moved]]:
    """The transfers of a job; and of many, those that cannot begin."""
    found: list[Move] = []
    lost: list[Moved] = []
    for recipe in parsed:
        name = recipe.source.name or Path(recipe.source.adapter).name
        try:
            move = _begun(recipe, output, folder, many)
            if ends:
                publish.require_free(move.output, force)
            _require_own(move)
            found.append(move)
        except LorazipError as error:
            if not many:
                raise
            lost.append(Moved(name, None, {}, None, error))
    recipe_table.require_different(move.name for move in found)
    return found, lost


def _require_own(move: Move) -> None:
    """The folder of its stages is written to, and emptied by --purge: it is new, or one that a transfer made.

    Raises:
        UsageError: it is something else, or lies in the result.
    """
    folder, output = move.work.resolve(), move.output.resolve()
    if folder.is_relative_to(output):
        raise UsageError("--work must not lie in the result, which may be replaced (choose another)")
    ours = (folder / STATE).is_file() or not folder.exists()
    if not ours and (not folder.is_dir() or any(not path.name.startswith(".") for path in folder.iterdir())):
        raise UsageError(f"{move.work} is no folder of a transfer (choose another --work)")


def _begun(recipe: Recipe, output: Path, folder: Path, many: bool) -> Move:
    adapter = open_one(recipe.source.adapter, recipe.source.name)
    name = recipe.source.name or adapter.name
    problem = names.problem_with(name)
    if problem:
        raise UsageError(f"{printable(name)}: {problem} (give source.name, --name)")
    inputs = recipe.inputs
    return Move(
        name,
        recipe,
        adapter,
        digest(adapter),
        texts.read_seeds(Path(inputs.seeds)) if inputs.seeds else [],
        rows.texts(Path(inputs.prompts)) if inputs.prompts else [],
        folder / name if many else folder / "transfer",
        output / name if many else output,
    )


def open_one(path: str, name: str) -> HasFactors:
    """The adapter of a PEFT directory, a Hub id, or a bundle.

    Raises:
        InputError, BundleError: it cannot be used; UsageError: it is not one.
    """
    if (Path(path) / MANIFEST).is_file():
        bundle = Bundle.open(path)
        if not name and len(bundle) != 1:
            raise UsageError(f"{path} holds {len(bundle)} adapters: say which, source.name (--name)")
        chosen = name or bundle.names[0]
        bundle.require([chosen])
        return bundle.adapter(chosen)
    adapters = open_adapters([path], base="the user's word").adapters
    if len(adapters) != 1:
        raise UsageError(f"{path} holds {len(adapters)} adapters: name one (--adapter), or give --table")
    return adapters[0]


def _swept(folder: Path) -> None:
    """Without what processes that were killed left of texts, as tokens; nothing else is touched."""
    for kind in (learn.FOLDER, learn.ORACLE):
        for left in (folder / kind).glob(f"{fits.SCRATCH}*"):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)


def _spare(world: World, move: Move) -> None:
    """Say whose rows nobody will read: of what was refused and purged, the adapter and its scores are left."""
    keys = {
        "filter": gather.key(move, world, True),
        "label": teach.key(move, world),
        "train": learn.key(move, world),
        "evaluate": assess.key(move, world),
    }
    done = {stage for stage, name in keys.items() if move.figures(stage, name) is not None}
    scored = "evaluate" in done and move.holds(assess.SCORES, keys["evaluate"])
    if {"filter", "label", "train"} <= done and (scored or move.recipe.gate.tests):
        move.spared |= {"filter", "label"}
    elif {"filter", "label"} <= done and move.holds(teach.LABELLED, keys["label"]):
        move.spared |= {"filter"}


def _moved(move: Move, judged: Judged | None, until: Stage) -> Moved:
    """What became of it, by the stages that this run came to: the folder may hold others of older options."""
    stages = {}
    try:
        for stage in STAGES[: STAGES.index(until) + 1]:
            if stage in move.current:
                stages[stage] = move.known(stage)
    except LorazipError as error:
        move.failed = move.failed or error
    written = move.failed is None and judged is not None
    return Moved(move.name, move.output if written else None, stages, judged, move.failed)


def _purge(folder: Path, moves: Sequence[Move]) -> None:
    """Nothing of a synthetic set stays: not the answers either, which hold it too.

    What was trained and refused stays: it holds no text, and may be all that is left of hours.
    """
    for move in moves:
        if move.failed is None:
            shutil.rmtree(move.work)
        for name in (gather.DRAFTS, gather.INPUTS, teach.LABELLED):
            for path in (move.work / name, *move.work.glob(f".{name}*")):  # what a kill left of one, too
                path.unlink(missing_ok=True)
    for suffix in ("", "-wal", "-shm"):
        folder.joinpath(FILE + suffix).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()
