"""The report of an evaluation: one HTML page that needs nothing but itself; the verdict comes first."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lorazip import page
from lorazip.eval import findings, phrases
from lorazip.eval.results import ORIGINAL, Results
from lorazip.files import write_bytes

LISTED = 100  # rows of the lists that can be as long as the input; how many are left out is said
TASKS = 1000  # rows of the table of tasks
EXAMPLES = 8  # broken examples that are shown of an arm
TEXT = 600  # characters that are shown of a text of an example
VALUE = 300  # of a setting
COSTS = {
    "asked": "model calls asked for",
    "made": "model calls made",
    "cached": "answers from the cache",
    "tokens": "tokens of the calls made",
    "seconds": "seconds of the calls made",
    "total_seconds": "seconds in all",
}


def write(path: Path, results: Results) -> None:
    """Write the page, whole or not at all.

    Raises:
        TargetError: the file cannot be written.
    """
    write_bytes(path, render(results).encode())


def render(results: Results) -> str:
    """The page. The same results give the same text."""
    own, drift = findings.task_rows(results, "own"), findings.task_rows(results, "drift")
    arms = phrases.judged_arms(results)
    found = {summary.arm: summary for summary in results.summary}
    originals = any(arm.kind == "original" for arm in results.arms)
    return page.template("eval.html.j2").render(
        results=results,
        arms=arms,
        others=findings.other_bases(results),
        adapters=len({row.adapter for row in own} - {None}),
        examples=sum(row.n for row in own) + sum(row.n for row in drift),
        base=results.settings.get("base", ""),
        label=phrases.LABELS[results.gate.verdict] if results.gate else "",
        checks=phrases.judged_checks(results),
        sentences=[phrases.sentence(arm, found.get(arm.name), originals) for arm in arms],
        asides=phrases.asides(results),
        measures=findings.measures(results),
        own=own,
        drift=drift,
        pictures=_pictures(results, own),
        breaks=findings.shown_breaks(results, EXAMPLES),
        canaries=findings.canary_rows(results),
        failed=[canary for canary in results.canaries if not canary.ok],
        settings=phrases.flat(results.settings),
        cost=_cost(results.cost),
        say=phrases,
        excerpt=findings.excerpt,
        listed=LISTED,
        listed_tasks=TASKS,
        text=TEXT,
        value=VALUE,
    )


def _pictures(results: Results, own: list[findings.TaskRow]) -> dict[str, Any]:
    """The pictures, None where one would show nothing, and what they leave out."""
    from lorazip.eval import pictures  # imports matplotlib, which takes a second

    arms = [arm.name for arm in phrases.judged_arms(results)]
    rows = pictures.drawable(own)
    names = findings.labels(rows)
    drawn = rows[: pictures.room(min(len(arms), pictures.ARMS))]
    return {
        "tasks": pictures.tasks(drawn, names[: len(drawn)], arms) if drawn else None,
        "drawn": len(drawn),
        "drawable": len(rows),
        "overview": pictures.overview(rows, arms) if len(drawn) < len(rows) else None,
        "arms_left_out": max(0, len(arms) - pictures.ARMS),
        "losses": len(own) - len(rows),
        "trade": _trade(results),
    }


def _trade(results: Results) -> dict[str, Any] | None:
    """The picture of what is kept against bytes, and whether it had to take the score; None for fewer than two arms."""
    from lorazip.eval import pictures

    found = {summary.arm: summary for summary in results.summary}
    arms = [(i, arm) for i, arm in enumerate(phrases.judged_arms(results), 1) if arm.nbytes > 0]
    measured = [(i, arm, found[arm.name]) for i, arm in arms if arm.name in found]
    by_kept = any(summary.kept is not None for _, _, summary in measured)
    scores = [(i, arm, summary.kept if by_kept else summary.score) for i, arm, summary in measured]
    points = [
        pictures.Setting(arm.name, arm.nbytes, score, i)
        for i, arm, score in scores
        if score is not None and all(map(math.isfinite, (score.estimate, score.low, score.high)))
    ]
    if len(points) < 2:
        return None
    checks = results.gate.checks if results.gate else ()
    asked = {check.threshold for check in checks if check.rule == "min-retention"}
    original = next((arm.nbytes for arm in results.arms if arm.name == ORIGINAL), None)
    picture = pictures.trade(
        points,
        original if by_kept else None,
        min(asked) if by_kept and asked else None,
        "score kept, in %" if by_kept else "score, in points of 100",
    )
    left_out = len(phrases.judged_arms(results)) - len(points)
    return {"picture": picture, "by_kept": by_kept, "left_out": left_out}


def _cost(cost: dict[str, Any]) -> list[tuple[str, str]]:
    """What the evaluation took, with the tokens a second where tokens and seconds are known."""
    tokens, seconds = cost.get("tokens"), cost.get("seconds")
    told = {COSTS.get(key, key): value for key, value in cost.items()}
    if isinstance(tokens, int | float) and isinstance(seconds, int | float) and seconds > 0:
        told["tokens a second"] = tokens / seconds
    return phrases.flat(
        {
            name: f"{value:,.{int(isinstance(value, float))}f}" if _is_number(value) else value
            for name, value in told.items()
        }
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
