"""Examples for the report: what original and arm wrote where only the original was right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lorazip.eval import compare
from lorazip.eval.backend import Greedy, Written
from lorazip.eval.judge import Cell
from lorazip.eval.plan import Asked
from lorazip.eval.prompts import Prompter
from lorazip.eval.results import ORIGINAL, Break, Comparison
from lorazip.eval.session import Session

BREAKS = 20  # of each arm


def examples(
    session: Session,
    prompter: Prompter,
    cells: Sequence[Cell],
    comparisons: Sequence[Comparison],
    asked: Mapping[str, Asked],
) -> tuple[Break, ...]:
    """What original and arm wrote where only the original was right: one of each task in turn, worst tasks first."""
    table = {(c.arm, c.task, c.adapter): c for c in cells if c.primary}
    chosen: list[tuple[Comparison, int]] = []
    by_arm: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
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
