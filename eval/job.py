"""The evaluation: tasks and arms -> model calls -> scores -> comparisons, verdict, results.json, report.html."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorazip import __version__
from lorazip import base as bases
from lorazip.errors import Defect, InputError, UsageError
from lorazip.eval import arms, harness, plan, tasks
from lorazip.eval import breaks as breaking
from lorazip.eval import measure as measuring
from lorazip.eval import output as output_files
from lorazip.eval.arms import Pair, Team
from lorazip.eval.backend import Acting, digest
from lorazip.eval.cache import Cache, default_directory
from lorazip.eval.judge import few, judge
from lorazip.eval.plan import Asked
from lorazip.eval.prompts import Prompter
from lorazip.eval.results import (
    BASE,
    Arm,
    Results,
)
from lorazip.eval.session import Engine, Progress, Session, engine
from lorazip.eval.spec import EvalSpec


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
        output_files.require(Path(output), settings, force)
    directory = bases.locate(base)
    prompter = Prompter(bases.load_tokenizer(directory), spec.template, spec.chat)
    context = bases.context_length(directory) - 1  # vLLM writes a token after every prompt, wanted or not
    theirs = harness.prepare(foreign, prompter.tokenizer, spec, context, left)
    ours = [pair for pair in matched if pair.task in found]
    asked = {}
    for name in dict.fromkeys(pair.task for pair in ours):
        task = tasks.read(_single(found[name]), split=spec.split, limit=spec.limit, columns=spec.columns)
        asked[name] = plan.prepare(task, prompter, spec, context, left)
    _require_known_tokens(base, directory, asked)
    arms.require_the_same(teams, sorted({pair.adapter for pair in matched}))
    store = Cache(cache or default_directory())
    try:
        with (
            output_files.made(None if output is None else Path(output)),
            _session(
                directory, prompter, teams, matched, asked, theirs, spec, chosen, store, progress
            ) as session,
        ):
            cells = measuring.cells(session, prompter, teams, ours, asked, spec)
            if theirs:
                cells += harness.cells(session, theirs, teams, matched, left)
            canaries = tuple(session.proof())
            rows, comparisons, summary, verdict = judge(cells, matched, teams, spec)
            breaks = breaking.examples(session, prompter, cells, comparisons, asked)
            cost = asdict(session.cost) | {"total_seconds": round(time.perf_counter() - begun, 3)}
    finally:
        store.close()
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
        output_files.write(Path(output), results, cells)
    return results


def _require_known_tokens(base: str, directory: Path, asked: Mapping[str, Asked]) -> None:
    used = max((max(q.prompt) for one in asked.values() for q in one.questions), default=0)
    if used >= bases.vocabulary(directory):
        problem = "has fewer tokens than its tokenizer uses"
        remedy = "the tokenizer is another model's: check --base"
        raise InputError([Defect(base, problem=problem, remedy=remedy)])


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


def _arms(teams: Sequence[Team], pairs: Sequence[Pair], spec: EvalSpec) -> tuple[Arm, ...]:
    n = len({pair.adapter for pair in pairs})
    bare = [BASE, *([few(spec.shots)] if spec.shots else [])]
    return (
        *(Arm(name, "base", None, 0, 0, None) for name in bare),
        *(Arm(t.name, t.kind, t.path, t.nbytes, n, t.original_bytes / t.nbytes) for t in teams),
    )
