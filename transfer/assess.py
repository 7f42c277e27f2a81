"""The stages `evaluate` and `gate`: the transferred adapter against the bare target base, on the same examples.

Arms: source base; source base and adapter; target base, alone and after solved examples; the direct copy, where shapes
allow it; the transferred adapter; and an oracle, where it was asked for. A strict answer format makes a bare base score
near zero, so the transfer has to hold against the better of the base's two scores, and against its token loss.

Without a labelled test the teacher's answers are the right ones. That measures agreement, and is called so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lorazip import base as bases
from lorazip.adapter import open_adapter
from lorazip.errors import LorazipError, TransferError, UsageError
from lorazip.eval import compare, plan, tasks
from lorazip.eval.backend import Answer, Call, HasFactors, Scores
from lorazip.eval.plan import Asked
from lorazip.eval.prompts import Prompter
from lorazip.eval.results import Interval, LeftOut
from lorazip.eval.spec import EvalSpec
from lorazip.eval.tasks import Example, Task
from lorazip.peft_keys import WEIGHTS_FILE
from lorazip.transfer import distill, learn, merged, teach
from lorazip.transfer.batches import Sample
from lorazip.transfer.move import Move, alive, pending
from lorazip.transfer.recipe import digest
from lorazip.transfer.teach import TEST, TRAIN, task_of
from lorazip.transfer.world import Ask, Base, World

SCORES = "scores.jsonl"
SOURCE, EXPERT = "source base", "source adapter"
TARGET, COPY, MOVED, ORACLE = "target base", "direct copy", "transferred", "oracle"
LOSS = "loss"


def shown(shots: int) -> str:
    """The name of the target base's arm after so many solved examples."""
    return f"{TARGET}, {shots} examples"


@dataclass(frozen=True)
class Scored:
    """One arm: the scores of all examples by the primary metric, and their token losses.

    Attributes:
        unended: token losses without the end token, as after solved examples, where no answer has one.
    """

    arm: str
    scores: tuple[float, ...]
    losses: tuple[float, ...]
    unended: tuple[float, ...]


@dataclass(frozen=True)
class Judged:
    """What the gate says.

    Attributes:
        measure: the primary metric; `agreement` where the teacher's answers are the right ones.
        arms: arm -> score and loss, each with its interval.
        base: the target base's arm that the transfer is held against.
        gain: transferred - that arm, paired.
        loss_gain: transferred - the target base's arm of lower loss, of the same tokens; better below zero.
        to_expert: transferred - source adapter; None without a labelled test.
        fixes, breaks, p_value: examples that only the transfer, only the base got right; McNemar's exact test.
        retention: (transferred - base) / (oracle - base), where it can be told.
        refused: why; empty where it is not.
    """

    measure: str
    examples: int
    arms: dict[str, dict[str, Interval]]
    base: str
    gain: Interval
    loss_gain: Interval
    to_expert: Interval | None
    fixes: int
    breaks: int
    p_value: float
    retention: Interval | None
    refused: str


def key(move: Move, world: World) -> str:
    """What the scores depend on."""
    gate = move.recipe.gate
    task = asdict(labelled(move)) if gate.tests else {}
    return digest(
        "evaluate", learn.key(move, world), asdict(gate), task, world.engine.name, str(world.engine.dtype)
    )


def evaluate(world: World, moves: Sequence[Move]) -> None:
    """Ask all arms of all transfers, and keep every example's scores."""
    todo = pending(moves, "evaluate", lambda move: key(move, world), SCORES)
    work: dict[str, _Work] = {}
    for move in todo:
        with move.guarded():
            work[move.name] = _prepared(world, move)
    _oracles(world, [move for move in alive(todo) if move.recipe.gate.oracle], work)
    answers: dict[str, dict[tuple[str, Call], Answer]] = {move.name: {} for move in todo}
    for base in (world.source, world.target):
        _collect(world, base, f"{base.digest} ", alive(todo), work, answers)
    for move in alive(todo):
        with move.guarded():
            for arm in work[move.name].arms:
                if arm.merge is not None:
                    with merged.merged(world, arm.merge) as base:
                        _collect(world, base, arm.model, [move], work, answers)
    for move in alive(todo):
        with move.guarded():
            scored = [_scored(arm, answers[move.name]) for arm in work[move.name].arms]
            move.write(SCORES, key(move, world), map(asdict, scored))
            one = work[move.name]
            figures = {
                "measure": one.measure,
                "examples": len(scored[0].scores),
                "left_out": one.left_out,
                "weights_sha256": one.weights,
                "no_oracle": one.no_oracle,
            }
            move.done("evaluate", key(move, world), figures)


def _collect(
    world: World,
    base: Base,
    model: str,
    moves: Sequence[Move],
    work: Mapping[str, _Work],
    answers: dict[str, dict[tuple[str, Call], Answer]],
) -> None:
    """Ask one model all that its arms are for."""
    asks = []
    for move in moves:
        calls = [call for arm in work[move.name].arms if arm.model == model for call in _calls(arm)]
        asks.append(Ask(move.name, work[move.name].adapters, calls))
    found = world.ask(base, asks, "evaluating")
    for ask in asks:
        move = next(m for m in moves if m.name == ask.name)
        got = found.get(ask.name, [])
        if isinstance(got, LorazipError):
            move.failed = got
        else:
            answers[move.name] |= {(model, call): a for call, a in zip(ask.calls, got, strict=True)}


@dataclass(frozen=True)
class _Arm:
    """What is asked: a base, an adapter of this key or none, or an adapter that is merged into the base.

    Attributes:
        ended: answers have their end token.
    """

    name: str
    base: Base
    key: str | None
    asked: Asked
    ended: bool = True
    merge: Path | None = None

    @property
    def model(self) -> str:
        """Arms of one model are asked together."""
        return f"{self.base.digest} {self.merge or ''}"


@dataclass
class _Work:
    measure: str
    left_out: int
    arms: list[_Arm]
    adapters: dict[str, HasFactors]
    task: Task
    prompter: Prompter
    weights: str  # sha256 of the transferred adapter's file
    no_oracle: str = ""  # why there is none, though it was asked for


def _prepared(world: World, move: Move) -> _Work:
    gate = move.recipe.gate
    task = labelled(move) if gate.tests else _taught(world, move)
    shots = min(gate.shots, len(task.shots))
    spec = EvalSpec(metric=gate.metric if gate.tests else "exact_match", shots=shots)
    theirs = world.target.prompter(*move.recipe.prompting[1])
    left: list[LeftOut] = []
    asked = plan.prepare(task, theirs, spec, world.target.context, left)
    arms = [_Arm(TARGET, world.target, None, asked)]
    if shots:
        arms.append(
            _Arm(shown(shots), world.target, None, plan.with_shots(asked, theirs, shots), ended=False)
        )
    adapters: dict[str, HasFactors] = {}
    trained = learn.folder(move, world) / distill.ADAPTER
    arms.append(_acting(world, move, MOVED, trained, f"moved/{move.name}", asked, adapters))
    if copies(move):
        adapters[f"copy/{move.name}"] = move.adapter
        arms.append(_Arm(COPY, world.target, f"copy/{move.name}", asked))
    if gate.tests:
        ours = world.source.prompter(*move.recipe.prompting[0])
        own = plan.prepare(task, ours, EvalSpec(metric=gate.metric), world.source.context, left)
        adapters[f"expert/{move.name}"] = move.adapter
        arms += [
            _Arm(SOURCE, world.source, None, own),
            _Arm(EXPERT, world.source, f"expert/{move.name}", own),
        ]
    arms, examples = _common(arms)
    measure = asked.metrics[0].name if gate.tests else "agreement"
    weights = hashlib.sha256((trained / WEIGHTS_FILE).read_bytes()).hexdigest()
    return _Work(measure, len(task.examples) - examples, arms, adapters, task, theirs, weights)


def _acting(
    world: World,
    move: Move,
    name: str,
    trained: Path,
    key: str,
    asked: Asked,
    adapters: dict[str, HasFactors],
) -> _Arm:
    """The arm of an adapter that was trained here: the target base with it, or with it merged in."""
    if move.recipe.train.kind == "dora":
        return _Arm(name, world.target, None, asked, merge=trained)
    adapters[key] = open_adapter(trained, move.name)
    return _Arm(name, world.target, key, asked)


def copies(move: Move) -> bool:
    """Whether the source's factors fit the target as they are."""
    return bool(move.known("probe")["routes"]["warm-copy"]["possible"])


def labelled(move: Move) -> Task:
    """The labelled task of the gate. Raises InputError, UsageError."""
    gate = move.recipe.gate
    found = [one for some in tasks.find([gate.tests]).values() for one in some]
    if len(found) != 1:
        raise UsageError(f"gate.tests names {len(found)} tasks, not one: {gate.tests} (name one file)")
    task = tasks.read(found[0], split=gate.split, limit=gate.limit, columns={})
    definition = move.recipe.inputs.definition
    return Task(move.name, definition or None, task.examples, task.shots, task.metric, task.source)


def _taught(world: World, move: Move) -> Task:
    """The expert's answers as right ones: those put aside for the test, and some that were trained on as examples."""
    rows = teach.read(world, move)
    examples = [Example(one.input, one.output, (one.output,)) for one in rows if one.part == TEST]
    shots = [Example(one.input, one.output, (one.output,)) for one in rows if one.part == TRAIN]
    return task_of(move, examples[: move.recipe.gate.limit], shots)


def _common(arms: Sequence[_Arm]) -> tuple[list[_Arm], int]:
    """Only the examples that all arms can answer, in one order."""
    there = [{id(q.example): q for q in arm.asked.questions} for arm in arms]
    order = [q.example for q in arms[0].asked.questions if all(id(q.example) in some for some in there)]
    if not order:
        raise TransferError("no example is short enough for both bases (gate.tests)")
    found = [
        replace(arm, asked=replace(arm.asked, questions=tuple(some[id(e)] for e in order)))
        for arm, some in zip(arms, there, strict=True)
    ]
    return found, len(order)


def _oracles(world: World, moves: Sequence[Move], work: Mapping[str, _Work]) -> None:
    """Train them, and add them as arms."""
    if not moves:
        return
    skeleton = bases.skeleton(world.target.path)
    planned = {}
    for move in moves:
        with move.guarded():
            planned[move.name] = learn.oracle(world, move, skeleton, _solved(world, move, work[move.name]))
    done = learn.fit_all(world, list(planned.values())) if planned else {}
    for move in alive(moves):
        with move.guarded():
            found, one = done[move.name], work[move.name]
            if isinstance(found, LorazipError):
                raise found
            if found.best == 0:
                one.no_oracle = "no epoch of it was better than the bare base on held-out answers"
                continue
            asked = next(arm.asked for arm in one.arms if arm.name == MOVED)
            trained = planned[move.name].folder / distill.ADAPTER
            one.arms.append(_acting(world, move, ORACLE, trained, f"oracle/{move.name}", asked, one.adapters))


def _solved(world: World, move: Move, work: _Work) -> list[Sample]:
    """What an oracle learns. Raises UsageError."""
    found = []
    for example in work.task.shots:
        prompt = work.prompter.prompt(work.task, example)
        answer = work.prompter.answer(example.output)
        if len(prompt) + len(answer) <= world.target.context:
            found.append(Sample(prompt, answer, (True,) * len(answer)))
    if len(found) < teach.LEAST:
        raise UsageError(
            f"{move.name}: gate.oracle needs {teach.LEAST} examples of the split train in gate.tests, "
            f"not {len(found)}"
        )
    return found


def _calls(arm: _Arm) -> list[Call]:
    return [
        call
        for metric in arm.asked.metrics
        for question in arm.asked.questions
        for call in plan.calls(metric, question, arm.key)
    ]


def _scored(arm: _Arm, answers: Mapping[Any, Answer]) -> Scored:
    mine = {call: answers[arm.model, call] for call in _calls(arm)}

    def by(metric: Any) -> tuple[float, ...]:
        return tuple(plan.score(metric, q, mine, arm.key) for q in arm.asked.questions)

    loss = next(metric for metric in arm.asked.metrics if metric.name == LOSS)
    unended = []
    for question in arm.asked.questions:
        (forced,) = (mine[call] for call in plan.calls(loss, question, arm.key))
        assert isinstance(forced, Scores)
        kept = forced.logprobs[:-1] if arm.ended and len(question.answer) > 1 else forced.logprobs
        unended.append(-sum(kept) / len(kept))
    return Scored(arm.name, by(arm.asked.metrics[0]), by(loss), tuple(unended))


def read(world: World, move: Move) -> list[Scored]:
    """What `evaluate` wrote. Raises TargetError."""
    try:
        return [
            Scored(row["arm"], tuple(row["scores"]), tuple(row["losses"]), tuple(row["unended"]))
            for row in move.read(SCORES, key(move, world))
        ]
    except (KeyError, TypeError) as error:
        raise move.damaged(SCORES, "a row of it is no arm") from error


def judge(measure: str, scored: Sequence[Scored]) -> Judged:
    """Hold the transfer against the bare base.

    Refused: the interval of its score lies wholly below that of the better of the base's arms, paired by example; or
    its token loss wholly above the lower of the base's losses. After solved examples answers have no end token, which
    costs a trained model nearly nothing: against that arm the transfer's loss is taken without it too.
    """
    by = {one.arm: one for one in scored}
    moved = by[MOVED]
    bare = [one for one in scored if one.arm.startswith(TARGET)]
    best = max(bare, key=lambda one: sum(one.scores))
    likeliest = min(bare, key=lambda one: sum(one.losses))
    losses = moved.losses if likeliest.arm == TARGET else moved.unended
    gain = compare.difference([moved.scores], [best.scores])
    loss_gain = compare.difference([losses], [likeliest.losses], bounded=False)
    fixes, breaks, p_value = compare.flips(moved.scores, best.scores)
    expert = by.get(EXPERT)
    oracle = by.get(ORACLE)
    refused = []
    if gain.high < 0:
        refused.append(f"its {measure} is below that of the {best.arm}: {_percent(gain)} points")
    if loss_gain.low > 0:
        refused.append(f"its token loss is above that of the {likeliest.arm}: {loss_gain.estimate:+.3f}")
    return Judged(
        measure,
        len(moved.scores),
        {
            one.arm: {
                "score": compare.mean(one.scores),
                "loss": compare.mean(one.losses, bounded=False),
            }
            for one in scored
        },
        best.arm,
        gain,
        loss_gain,
        compare.difference([moved.scores], [expert.scores]) if expert else None,
        fixes,
        breaks,
        p_value,
        compare.lift([moved.scores], [oracle.scores], [best.scores]) if oracle else None,
        "; ".join(refused),
    )


def _percent(value: Interval) -> str:
    return f"{100 * value.estimate:+.1f} ({100 * value.low:+.1f} to {100 * value.high:+.1f})"
