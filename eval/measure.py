"""Asking all arms everything, and scoring what they answer, example by example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lorazip.eval import arms, plan
from lorazip.eval.arms import Pair, Team
from lorazip.eval.backend import Answer, Call, Forced, Greedy, Scores, Written
from lorazip.eval.judge import Cell, few
from lorazip.eval.metrics import Metric
from lorazip.eval.plan import Asked
from lorazip.eval.prompts import Prompter
from lorazip.eval.results import BASE, ORIGINAL
from lorazip.eval.session import Session
from lorazip.eval.spec import AGREEMENT, EvalSpec


def cells(
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
    found = []
    for arm, pair, key, one in work:
        for i, metric in enumerate(one.metrics):
            scores = tuple(plan.score(metric, q, answers, key) for q in one.questions)
            found.append(_cell(arm, pair, metric, i == 0, scores))
    if spec.agreement and any(team.name == ORIGINAL for team in teams):
        found += _agreement(session, teams, pairs, asked)
    return found


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
