"""The evaluation: tasks and arms -> model calls -> scores -> comparisons, verdict, results.json, report.html."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorazip import __version__
from lorazip.errors import Defect, InputError, TargetError, UsageError
from lorazip.eval import arms, compare, harness, plan, tasks
from lorazip.eval import base as bases
from lorazip.eval.arms import Pair, Team
from lorazip.eval.backend import Acting, Answer, Call, Forced, Greedy, Scores, Written, digest
from lorazip.eval.cache import Cache, default_directory
from lorazip.eval.judge import Cell, Judged, few, judge
from lorazip.eval.metrics import Metric
from lorazip.eval.plan import Asked
from lorazip.eval.prompts import Prompter
from lorazip.eval.results import (
    BASE,
    EXAMPLES,
    ORIGINAL,
    REPORT,
    RESULTS,
    SCHEMA,
    Arm,
    Break,
    Comparison,
    Results,
)
from lorazip.eval.session import Engine, Progress, Session, engine
from lorazip.eval.spec import AGREEMENT, EvalSpec
from lorazip.files import write_bytes

BREAKS = 20  # of each arm, for the report


def quiet(what: str, done: int, total: int, note: str = "") -> None:
    """No progress."""


def evaluate(
    base: str,
    task_sources: Sequence[str],
    *,
    adapters: Sequence[str] = (),
    bundles: Sequence[str | Path] = (),
    spec: EvalSpec | None = None,
    pairs: Path | None = None,
    drift: Sequence[str] = (),
    lm_eval: Sequence[str] = (),
    backend: Engine | None = None,
    cache: Path | None = None,
    output: str | Path | None = None,
    force: bool = False,
    progress: Progress = quiet,
) -> Results:
    """Score the base, the original adapters and bundles on tasks, and compare them example by example.

    Args:
        base: directory or Hub id of the base model.
        task_sources: see `tasks.find`.
        adapters: the originals, as `lorazip.open_adapters` takes them; empty for none.
        bundles: each is an arm of its own.
        pairs: which adapter answers which task, see `arms.read_pairs`; None for adapter X on task X.
        drift: tasks that every adapter answers besides its own.
        lm_eval: tasks of lm-evaluation-harness, see `harness.find`; they are paired like the others.
        backend: default: vLLM if it is installed.
        cache: directory of the model's answers; default: `cache.default_directory`.
        output: directory for results.json, examples.jsonl and report.html; None writes nothing.
        force: replace results of another evaluation there.
        progress: called with (what, done, total).
    Raises:
        InputError: bad adapters, tasks or base; UsageError: options; BundleError: a damaged bundle.
        CheckError: an adapter does not act in the model as its factors say. Nothing is written then.
        TargetError: the output or the cache cannot be written.
    """
    begun = time.perf_counter()
    spec, chosen = spec or EvalSpec(), backend or engine()
    if spec.gated and not (adapters and bundles):
        raise UsageError("the gate has nothing to compare (give --adapters and at least one --bundle)")
    teams = [
        *([arms.originals(adapters, base)] if adapters else []),
        *arms.bundles([Path(b) for b in bundles]),
    ]
    found = tasks.find(task_sources)
    foreign = harness.find(lm_eval, taken=found) if lm_eval else {}
    wanted = arms.read_pairs(pairs) if pairs is not None else None
    matched, left = arms.match(teams, sorted([*found, *foreign]), wanted, drift)
    harness.require_used(foreign, matched)
    settings = _settings(base, task_sources, adapters, bundles, spec, pairs, drift, chosen)
    if lm_eval:
        settings |= {"lm_eval": list(lm_eval), "harness": harness.installed()}
    if output is not None:
        _require_target(Path(output), settings, force)
    directory = bases.locate(base)
    prompter = Prompter(bases.load_tokenizer(directory), spec.template, spec.chat)
    context = bases.context_length(directory) - 1  # vLLM writes a token after every prompt, wanted or not
    asked = {}
    theirs = harness.prepare(foreign, prompter.tokenizer, spec, context, left)
    ours = [pair for pair in matched if pair.task in found]
    for name in dict.fromkeys(pair.task for pair in ours):
        task = tasks.read(_single(found[name]), split=spec.split, limit=spec.limit, columns=spec.columns)
        asked[name] = plan.prepare(task, prompter, spec, context, left)
    used = max((max(q.prompt) for one in asked.values() for q in one.questions), default=0)
    if used >= bases.vocabulary(directory):
        problem, remedy = (
            "has fewer tokens than its tokenizer uses",
            "the tokenizer is another model's: check --base",
        )
        raise InputError([Defect(base, problem=problem, remedy=remedy)])
    arms.require_the_same(teams, sorted({pair.adapter for pair in matched}))
    store = Cache(cache or default_directory())
    try:
        with (
            _made(None if output is None else Path(output)),
            _session(
                directory, prompter, teams, matched, asked, theirs, spec, chosen, store, progress
            ) as session,
        ):
            cells = _measure(session, prompter, teams, ours, asked, spec)
            if theirs:
                cells += harness.cells(session, theirs, teams, matched, left)
            canaries = tuple(session.proof())
            judged = judge(cells, matched, teams, spec)
            breaks = _breaks(session, prompter, cells, judged, asked)
            cost = asdict(session.cost) | {"total_seconds": round(time.perf_counter() - begun, 3)}
    finally:
        store.close()
    rows, comparisons, summary, verdict = judged
    results = Results(
        settings=settings,
        arms=_arms(teams, matched, spec),
        rows=rows,
        comparisons=comparisons,
        summary=summary,
        gate=verdict,
        canaries=canaries,
        left_out=tuple(left),
        breaks=breaks,
        cost=cost,
    )
    if output is not None:
        write(Path(output), results, cells)
    return results


def _single(found: Sequence[tasks.Found]) -> tasks.Found:
    if len(found) > 1:
        problem = f"lies in {' and in '.join(f.source for f in found[:3])}"
        raise InputError([Defect(found[0].name, problem=problem, remedy="name one of them: --tasks FILE")])
    return found[0]


def _settings(
    base: str,
    task_sources: Sequence[str],
    adapters: Sequence[str],
    bundles: Sequence[str | Path],
    spec: EvalSpec,
    pairs: Path | None,
    drift: Sequence[str],
    chosen: Engine,
) -> dict[str, Any]:
    return {
        "base": base,
        "tasks": list(task_sources),
        "adapters": list(adapters),
        "bundles": [str(b) for b in bundles],
        "pairs": None if pairs is None else str(pairs),
        "drift": list(drift),
        **asdict(spec),
        "backend": chosen.kind,
        "engine": chosen.name,
        "dtype": str(chosen.dtype).removeprefix("torch."),
        "lorazip": __version__,
    }


def _session(
    directory: Path,
    prompter: Prompter,
    teams: Sequence[Team],
    pairs: Sequence[Pair],
    asked: Mapping[str, Asked],
    theirs: Sequence[harness.Prepared],
    spec: EvalSpec,
    chosen: Engine,
    store: Cache,
    progress: Progress,
) -> Session:
    # An adapter proves itself on its own task, or on any that it answers.
    own = {pair.adapter: pair.task for pair in sorted(pairs, key=lambda pair: pair.role == "own")}
    proofs = {name: (*one.questions[0].prompt, *one.questions[0].answer) for name, one in asked.items()}
    proofs |= {one.name: one.canary for one in theirs}
    actings, canaries = [], []
    for team in teams:
        for name in sorted({pair.adapter for pair in pairs}):
            adapter = team.adapters[name]
            actings.append(Acting(f"{team.name}/{name}", adapter, team.directory(name), digest(adapter)))
            canaries.append(proofs[own[name]])
    return Session(
        directory,
        prompter.tokenizer,
        actings,
        canaries,
        chosen,
        store,
        max([_longest(asked, prompter, spec), *(one.longest for one in theirs)]),
        progress,
    )


def _longest(asked: Mapping[str, Asked], prompter: Prompter, spec: EvalSpec) -> int:
    """Tokens of the longest call that may come; written answers are asked for at least in breaks."""
    longest = 0
    for one in asked.values():
        shown = plan.with_shots(one, prompter, spec.shots).questions if spec.shots else ()
        for q in (*one.questions, *shown):
            longest = max(longest, plan.length(q, one.metrics), len(q.prompt) + q.limit)
    return longest


# --- measuring ----------------------------------------------------------------------------------------------


def _measure(
    session: Session,
    prompter: Prompter,
    teams: Sequence[Team],
    pairs: Sequence[Pair],
    asked: Mapping[str, Asked],
    spec: EvalSpec,
) -> list[Cell]:
    """Ask everything in one go, so that the engine sees all arms and adapters at once, and score the answers."""
    work: list[tuple[str, Pair, str | None, Asked]] = []
    for name, one in asked.items():
        role: arms.Role = "own" if any(p.task == name and p.role == "own" for p in pairs) else "drift"
        bare = Pair(name, "", role)
        work.append((BASE, bare, None, one))
        if spec.shots:
            work.append((few(spec.shots), bare, None, plan.with_shots(one, prompter, spec.shots)))
    work += [(t.name, pair, f"{t.name}/{pair.adapter}", asked[pair.task]) for t in teams for pair in pairs]
    calls = [
        c
        for _, _, key, one in work
        for m in one.metrics
        for q in one.questions
        for c in plan.calls(m, q, key)
    ]
    answers = dict(zip(calls, session.ask(calls), strict=True))
    cells = []
    for arm, pair, key, one in work:
        for i, metric in enumerate(one.metrics):
            scores = tuple(plan.score(metric, q, answers, key) for q in one.questions)
            cells.append(_cell(arm, pair, metric, i == 0, scores))
    if spec.agreement and any(team.name == ORIGINAL for team in teams):
        cells += _agreement(session, teams, pairs, asked)
    return cells


def _cell(arm: str, pair: Pair, metric: Metric, primary: bool, scores: tuple[float, ...]) -> Cell:
    return Cell(arm, pair.task, pair.adapter or None, pair.role, metric.name, metric.bounded, primary, scores)


def _agreement(
    session: Session, teams: Sequence[Team], pairs: Sequence[Pair], asked: Mapping[str, Asked]
) -> list[Cell]:
    """How often an arm would write just what the original wrote: its answer, forced; no metric of rightness."""
    originals = [
        Greedy(f"{ORIGINAL}/{p.adapter}", q.prompt, q.limit) for p in pairs for q in asked[p.task].questions
    ]
    written = dict(zip(originals, session.ask(originals, "originals' answers"), strict=True))
    others = [team for team in teams if team.name != ORIGINAL]
    work: list[tuple[Team, Pair, list[Forced]]] = []
    for team in others:
        for pair in pairs:
            calls = []
            for q in asked[pair.task].questions:
                answer = written[Greedy(f"{ORIGINAL}/{pair.adapter}", q.prompt, q.limit)]
                assert isinstance(answer, Written)
                calls.append(Forced(f"{team.name}/{pair.adapter}", q.prompt, answer.tokens))
            work.append((team, pair, calls))
    flat: list[Call] = [call for _, _, calls in work for call in calls]
    found = iter(session.ask(flat, AGREEMENT))
    cells = []
    for team, pair, calls in work:
        scores = tuple(float(_exact(next(found))) for _ in calls)
        cells.append(Cell(team.name, pair.task, pair.adapter, pair.role, AGREEMENT, True, False, scores))
    return cells


def _exact(answer: Answer) -> bool:
    return isinstance(answer, Scores) and answer.exact


def _arms(teams: Sequence[Team], pairs: Sequence[Pair], spec: EvalSpec) -> tuple[Arm, ...]:
    n = len({pair.adapter for pair in pairs})
    bare = [BASE, *([few(spec.shots)] if spec.shots else [])]
    return (
        *(Arm(name, "base", None, 0, 0, None) for name in bare),
        *(Arm(t.name, t.kind, t.path, t.nbytes, n, t.original_bytes / t.nbytes) for t in teams),
    )


# --- breaks -------------------------------------------------------------------------------------------------


def _breaks(
    session: Session, prompter: Prompter, cells: Sequence[Cell], judged: Judged, asked: Mapping[str, Asked]
) -> tuple[Break, ...]:
    """What original and arm wrote where only the original was right: one of each task in turn, worst tasks first."""
    table = {(c.arm, c.task, c.adapter): c for c in cells if c.primary}
    chosen: list[tuple[Comparison, int]] = []
    by_arm: dict[str, list[Comparison]] = {}
    for comparison in judged[1]:
        if comparison.task in asked:  # the harness keeps its answers to itself
            by_arm.setdefault(comparison.arm, []).append(comparison)
    for arm, mine in by_arm.items():
        places: list[list[tuple[Comparison, int]]] = []
        for c in sorted(mine, key=lambda c: (c.difference.estimate, c.task, c.adapter)):
            own, original = table[arm, c.task, c.adapter].scores, table[ORIGINAL, c.task, c.adapter].scores
            lost = [i for i, (a, o) in enumerate(zip(own, original, strict=True)) if a < compare.RIGHT <= o]
            places.append([(c, i) for i in lost])
        turns = [place[turn] for turn in range(BREAKS) for place in places if turn < len(place)]
        chosen += turns[:BREAKS]
    calls = [
        Greedy(f"{arm}/{c.adapter}", q.prompt, q.limit)
        for c, i in chosen
        for q in [asked[c.task].questions[i]]
        for arm in (ORIGINAL, c.arm)
    ]
    texts = [
        answer.text for answer in session.ask(calls, "examples of breaks") if isinstance(answer, Written)
    ]
    found = []
    for j, (c, i) in enumerate(chosen):
        one = asked[c.task]
        example = one.questions[i].example
        prompt = prompter.text(one.task, example)
        found.append(Break(c.task, c.adapter, c.arm, prompt, example.output, texts[2 * j], texts[2 * j + 1]))
    return tuple(found)


# --- writing ------------------------------------------------------------------------------------------------


def _require_target(output: Path, settings: Mapping[str, Any], force: bool) -> None:
    """A new directory, an empty one, or one with results of the same evaluation.

    Raises:
        TargetError: it is something else.
    """
    foreign = TargetError(f"{output} exists and holds no results of an evaluation (choose another)")
    if not output.exists():
        return
    try:
        there = {path.name for path in output.iterdir()}
        if not there <= {
            RESULTS,
            EXAMPLES,
            REPORT,
            *(f".{name}.tmp" for name in (RESULTS, EXAMPLES, REPORT)),
        }:
            raise foreign
        if RESULTS not in there:  # empty, or left by a run that was killed while it wrote
            return
        before = json.loads((output / RESULTS).read_bytes())
        schema, settings_before = str(before["schema"]), before["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        raise foreign from None
    if not schema.startswith(SCHEMA.partition("/")[0] + "/"):
        raise foreign
    same = schema == SCHEMA and settings_before == json.loads(json.dumps(settings))
    if not same and not force:
        raise TargetError(f"{output} holds results of another evaluation (choose another, or --force)")


@contextlib.contextmanager
def _made(output: Path | None) -> Iterator[None]:
    """The directory is there and can be written, rather now than after all model calls; left empty, it goes again.

    Raises:
        TargetError: it cannot be written.
    """
    if output is None:
        yield
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    except OSError as error:
        raise TargetError(f"{output} cannot be written: {error.strerror}") from error
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            output.rmdir()
        raise


def write(output: Path, results: Results, cells: Sequence[Cell]) -> None:
    """Write the three files, each whole or not at all; results.json comes last.

    Raises:
        TargetError: they cannot be written.
    """
    from lorazip.eval import report

    lines = [
        json.dumps(
            {
                "task": cell.task,
                "adapter": cell.adapter,
                "arm": cell.arm,
                "metric": cell.metric,
                "scores": [round(score, 6) for score in cell.scores],
            }
        )
        for cell in cells
    ]
    write_bytes(output / EXAMPLES, "".join(f"{line}\n" for line in lines).encode())
    report.write(output / REPORT, results)
    write_bytes(
        output / RESULTS, (json.dumps(results.document(), indent=2, ensure_ascii=False) + "\n").encode()
    )
