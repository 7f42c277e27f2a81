"""The stages `synthesise` and `filter`: inputs for a transfer, written by a model, screened and judged.

Rounds: the generator writes for all transfers, what is no new input of a task is put aside and counted, the
discriminators judge the rest. The next round asks for what is missing, by the yield so far, and there is a last one: a
generator that repeats itself ends in an error with the counts, and what was written is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lorazip.errors import Defect, InputError, LorazipError, TransferError
from lorazip.eval.backend import HasFactors
from lorazip.transfer import discriminator, synthesize, texts
from lorazip.transfer.move import Move, pending
from lorazip.transfer.recipe import digest
from lorazip.transfer.texts import Screen
from lorazip.transfer.world import Ask, Base, World

DRAFTS, INPUTS = "drafts.jsonl", "inputs.jsonl"
ENOUGH = 0.5  # of the inputs that were asked for: with fewer a transfer ends here


@dataclass
class _Gathering:
    """The inputs of one transfer so far."""

    move: Move
    screen: Screen
    judge: discriminator.Discriminator | None
    asked: int = 0
    rounds: int = 0
    refused: int = 0
    kept: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)

    @property
    def missing(self) -> int:
        return self.move.recipe.inputs.count - len(self.kept)

    def counts(self) -> dict[str, object]:
        """For the report: how many inputs were asked for, and what became of them."""
        aside = dict(self.screen.counts) | (
            {"refused by the discriminator": self.refused} if self.judge else {}
        )
        return {"asked": self.asked, "rounds": self.rounds, "aside": aside, "kept": len(self.kept)}


def key(move: Move, world: World, judged: bool) -> str:
    """What the inputs depend on."""
    recipe = move.recipe
    spec = recipe.inputs
    judge = move.judge if judged and judges(move) else ""
    told = [judge, str(world.engine.dtype), asdict(spec) | {"seeds": "", "prompts": ""}]
    return digest("inputs", told, move.seeds, move.prompts, _writer(move, world), world.engine.name)


def judges(move: Move) -> bool:
    """Whether a discriminator filters its inputs."""
    return move.recipe.filter.kind in ("discriminator", "both")


def judge_of(world: World, move: Move) -> discriminator.Discriminator:
    """Its discriminator. Raises InputError: it is none, or one of another base."""
    found = discriminator.read(Path(move.recipe.filter.discriminator))
    if found.record.base != world.source.digest:
        problem = "was trained on another base model than source.base"
        raise InputError([Defect(found.adapter.name, problem=problem, remedy="train it on this one")])
    return found


def synthesise(world: World, moves: Sequence[Move]) -> None:
    """The first round, without a judge: what the generator writes can be looked at before more is asked of it."""
    todo = pending(moves, "synthesise", lambda move: key(move, world, False), DRAFTS)
    some = _begun(world, todo, judged=False)
    _write(world, some)
    for one in some:
        if one.move.failed is None:
            one.move.write(DRAFTS, key(one.move, world, False), ({"input": text} for text in one.kept))
            one.move.done("synthesise", key(one.move, world, False), one.counts())


def gather(world: World, moves: Sequence[Move]) -> None:
    """All rounds, and retained prompts: the inputs that a teacher is asked."""
    todo = pending(moves, "filter", lambda move: key(move, world, True), INPUTS)
    some = _begun(world, todo, judged=True)
    for _ in range(max((m.recipe.inputs.rounds for m in todo), default=0)):
        going = [
            one
            for one in some
            if one.missing > 0 and one.move.failed is None and one.rounds < one.move.recipe.inputs.rounds
        ]
        if not going:
            break
        _write(world, going)
        _judge(world, [one for one in going if one.move.failed is None])
    for one in some:
        if one.move.failed is None:
            with one.move.guarded():
                _finish(world, one)


def _begun(world: World, moves: Sequence[Move], judged: bool) -> list[_Gathering]:
    found = []
    for move in moves:
        with move.guarded():
            # A retained prompt that is written anew adds nothing.
            screen = Screen([*move.seeds, *move.prompts])
            judge = None
            if judged and judges(move):
                judge = judge_of(world, move)
            found.append(_Gathering(move, screen, judge))
    return found


def _writer(move: Move, world: World) -> str:
    """Digest of who writes inputs."""
    base = generator(move, world)
    return base.digest + (move.digest if move.recipe.inputs.generator == "expert" else "")


def generator(move: Move, world: World) -> Base:
    """The base that writes inputs. Raises InputError."""
    match move.recipe.inputs.generator:
        case "target":
            return world.target
        case "source" | "expert":
            return world.source
        case other:
            return world.base(other)


def _write(world: World, some: Sequence[_Gathering]) -> None:
    """One round of all; `fresh` is what is new, `kept` too where nobody judges."""
    asks, calls, generators = [], {}, {}
    for one in some:
        move = one.move
        spec = move.recipe.inputs
        if one.missing <= 0:
            continue
        with move.guarded():
            base = generator(move, world)
            adapters: dict[str, HasFactors] = {}
            if spec.generator == "expert":
                adapters = {f"expert/{move.name}": move.adapter}
            count = synthesize.planned(one.missing, one.asked, len(one.kept))
            calls[move.name] = synthesize.calls(
                base.prompter(), spec, move.seeds, next(iter(adapters), None), one.rounds, count, base.context
            )
            generators[move.name] = base
            asks.append(Ask(move.name, adapters, calls[move.name]))
    for base in dict.fromkeys(generators.values()):
        mine = [ask for ask in asks if generators[ask.name] == base]
        answers = world.ask(base, mine, "writing inputs")
        for one in some:
            got = answers.get(one.move.name)
            if isinstance(got, LorazipError):
                one.move.failed = got
            elif got is not None:
                drafts = synthesize.texts(calls[one.move.name], got)
                taken = [one.screen.take(draft.text, draft.finished) for draft in drafts]
                one.fresh = [text for text in taken if text is not None]
                one.asked += len(drafts)
                one.rounds += 1
                if one.judge is None:
                    one.kept += one.fresh[: one.missing]


def _judge(world: World, some: Sequence[_Gathering]) -> None:
    asks = []
    for one in some:
        if one.judge is None or not one.fresh:
            continue
        with one.move.guarded():
            name = f"discriminator/{one.move.name}"
            prompter = world.source.prompter(one.judge.record.template)
            asks.append(
                Ask(one.move.name, {name: one.judge.adapter}, discriminator.calls(prompter, name, one.fresh))
            )
    answers = world.ask(world.source, asks, "judging inputs")
    for one in some:
        got = answers.get(one.move.name)
        if isinstance(got, LorazipError):
            one.move.failed = got
        elif got is not None:
            good = [t for t, yes in zip(one.fresh, discriminator.verdicts(got), strict=True) if yes]
            one.refused += len(one.fresh) - len(good)
            one.kept += good[: one.missing]


def _finish(world: World, one: _Gathering) -> None:
    """Write the inputs, or say what became of those that were asked for."""
    move = one.move
    count = move.recipe.inputs.count
    if len(one.kept) < ENOUGH * count:
        aside = dict(one.screen.counts) | (
            {"refused by the discriminator": one.refused} if one.refused else {}
        )
        why = ", ".join(f"{number} {reason}" for reason, number in sorted(aside.items(), key=lambda i: -i[1]))
        problem = (
            f"only {len(one.kept)} of {count} inputs came of {one.asked} that were written in {one.rounds} rounds "
            f"({why or 'none were put aside'})"
        )
        remedy = "more seeds, a higher inputs.temperature, another inputs.generator, a lower inputs.count"
        raise TransferError(f"{move.name}: {problem} (try {remedy})")
    near = texts.overlap(one.kept, move.seeds)
    rows = [{"input": text, "kind": "synthetic"} for text in one.kept]
    rows += [{"input": text, "kind": "retained"} for text in move.prompts]
    move.write(INPUTS, key(move, world, True), rows)
    figures = one.counts() | {"retained": len(move.prompts), "overlap": asdict(near)}
    move.done("filter", key(move, world, True), figures)
