"""The report of an evaluation: tables, pictures, examples, canaries, what was left out."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from browsing import Page
from evaluations import PASS, failing, gated, make, without_originals

from lorazip.eval import findings, report
from lorazip.eval.results import Canary, Interval


def test_all_arms_and_measures() -> None:
    bundles = ("r8", "r16", "r32")
    text = Page(report.render(make(4, bundles, drift=2))).sections["arms"]
    for name in ("base", "original", *bundles):
        assert name in text
    for name in (
        "Score", "Kept", "Lift", "Difference", "Fixes per 100", "Breaks per 100", "McNemar’s p", "Worst adapter",
        "Drift", "Loss", "Bytes", "Smaller by",
    ):  # fmt: skip
        assert name in text
    for figure in (
        "62.7",
        "60.7 – 64.7",
        "98.2 %",
        "−1.2",
        "−3.2 to +0.8",
        "< 0.001",
        "1.310",
        "1,000,000",
        "12.3×",
    ):
        assert figure in text


def test_none_is_a_dash_and_explained() -> None:
    results = make()
    unknown = replace(
        results.of("team.lorazip"), loss=None, kept=None, lift=None, difference=None, fixes_per_100=None,
        breaks_per_100=None, p_value=None, worst=None, drift=None,
    )  # fmt: skip
    results = replace(results, summary=(*results.summary[:2], unknown))
    measures = findings.measures(results)
    for measure in measures:
        if measure.name not in ("Score", "Bytes", "Smaller by"):
            assert measure.cells[2].figure == "–"
    text = Page(report.render(results)).text("arms")
    assert "None" not in text
    assert "“–”: nothing to give" in text
    for name in ("Kept", "Lift", "Drift", "Loss"):
        assert "“–” where" in next(measure.meaning for measure in measures if measure.name == name)


def test_numbers_that_are_none() -> None:
    nan, inf = float("nan"), float("inf")
    results = make()
    rows = tuple(
        replace(row, score=nan, low=nan, high=nan) if row.task == "task_001" and row.arm != "base" else row
        for row in results.rows
    )
    canaries = (Canary("team.lorazip", None, 0.0, nan, 0.0, False, ""), *results.canaries)
    summary = tuple(replace(s, loss=Interval(inf, nan, inf, 0)) for s in results.summary)
    text = report.render(replace(results, rows=rows, canaries=canaries, summary=summary))
    assert not re.search(
        r"\b(nan|inf|None)\b", " ".join(text for s in Page(text).sections.values() for text in s)
    )
    assert "no reason was given" in text


def test_all_tasks_are_in_the_table_worst_first() -> None:
    results = make(60, ("a", "b"))
    rows = findings.task_rows(results, "own")
    assert [row.worst for row in rows] == sorted(row.worst for row in rows)
    text = Page(report.render(results)).sections["tasks"]
    for i in range(60):
        assert f"task_{i:03d}" in text
        assert f"adapter_{i:03d}" in text
    for row in results.rows:
        if row.primary:
            assert f"{100 * row.score:.1f}" in text


def test_clear_differences_are_marked() -> None:
    page = report.render(make(30))
    pairs = findings.task_rows(make(30), "own")
    clear = [pair for row in pairs for _, pair in row.arms if pair and pair.difference.high < 0]
    assert clear
    assert page.count('class="number worse"') == len(clear)


def test_drift_has_a_table() -> None:
    assert "Drift:" not in Page(report.render(make())).text("tasks")
    seen = Page(report.render(make(drift=3)))
    assert "Drift: adapters on tasks that they are not for" in seen.sections["tasks"]
    assert "other_2" in seen.sections["tasks"]
    assert "and 3 for drift" in seen.text("verdict")


def test_several_adapters_of_a_task_have_rows_of_their_own() -> None:
    rows = findings.task_rows(make(2, adapters=6), "own")
    assert {(row.task, row.adapter) for row in rows} == {
        (f"task_{i % 2:03d}", f"adapter_{i:03d}") for i in range(6)
    }
    assert all(row.base and row.original for row in rows)
    assert findings.labels(rows) == [row.adapter for row in rows]


def test_a_base_with_solved_examples() -> None:
    results = make(4)
    few = replace(results.arms[0], name="base, 5 shots")
    rows = tuple(replace(row, arm=few.name, score=0.4321) for row in results.rows if row.arm == "base")
    summary = replace(results.summary[0], arm=few.name)
    results = replace(
        results, arms=(*results.arms, few), rows=results.rows + rows, summary=(*results.summary, summary)
    )
    assert len(findings.task_rows(results, "own")) == 4
    seen = Page(report.render(results))
    assert "base, 5 shots" in seen.sections["arms"]
    assert seen.sections["tasks"].count("43.2") == 4


def test_a_loss_is_no_score() -> None:
    results = make()
    rows = tuple(replace(row, primary=row.metric == "loss") for row in results.rows)
    pairs = tuple(replace(pair, metric="loss") for pair in results.comparisons)
    seen = Page(report.render(replace(results, rows=rows, comparisons=pairs)))
    assert "1.500" in seen.sections["tasks"]
    assert "3 rows have no score to draw, or one that is a loss." in seen.text("tasks")


# Pictures


def pictures(page: str) -> list[str]:
    return re.findall(r'<svg role="img" aria-label="([^"]*)"', page)


def test_one_arm_has_no_picture_of_bytes() -> None:
    page = report.render(make())
    assert "trade" not in Page(page).sections
    assert pictures(page) == ["Scores of 3 tasks by arm, with intervals"]


def test_several_arms_have_a_picture_of_bytes() -> None:
    page = report.render(gated(make(3, ("r8", "r16", "r32")), PASS))
    assert "What is kept against bytes" in Page(page).sections["trade"]
    assert pictures(page)[0] == "score kept, in % of 3 arms against their bytes"
    picture = page[page.index('id="trade"') : page.index('id="tasks"')]
    for text in ("r8", "r16", "r32", "original", "asked for: 95 %", "bytes on disk"):
        assert f">{text}</text>" in picture


def test_where_nothing_is_kept_the_score_is_drawn() -> None:
    seen = Page(report.render(without_originals(make(3, ("a", "b")))))
    assert "Score against bytes" in seen.sections["trade"]
    assert "so the plain score is drawn" in seen.text("trade")


def test_alike_arms_are_drawn() -> None:
    results = make(3, tuple("abcdefghij"))
    arms = tuple(replace(arm, nbytes=1000) if arm.kind == "bundle" else arm for arm in results.arms)
    seen = Page(report.render(replace(results, arms=arms)))
    assert "What is kept against bytes" in seen.sections["trade"]
    assert "The first 5 arms are drawn, of 10." in seen.text("tasks")


@pytest.mark.parametrize(("tasks", "drawn"), [(1, 1), (3, 3), (40, 40), (200, 40)])
def test_picture_of_tasks_grows_to_a_limit(tasks: int, drawn: int) -> None:
    page = report.render(make(tasks))
    assert pictures(page)[0] == f"Scores of {drawn} tasks by arm, with intervals"
    said = Page(page).text("tasks")
    if tasks > drawn:
        assert (
            f"Drawn one by one are the {drawn} that lost most; {tasks - drawn} rows are left out there."
            in said
        )
        assert len(pictures(page)) == 2
    else:
        assert "left out" not in said
        assert len(pictures(page)) == 1


# Examples, canaries, the rest


def test_breaks_are_counted_and_shown_from_all_tasks() -> None:
    seen = Page(report.render(make(3)))
    assert "team.lorazip: 8 of 18 examples shown" in seen.text("breaks")
    assert "10 examples more not shown." in seen.text("breaks")
    for i in range(3):
        assert f"adapter_{i:03d} on task_{i:03d}" in seen.text("breaks")
    assert "wrong 0" in seen.sections["breaks"]
    assert "Definition: find the antonym.\n\nInput: word 0\nOutput:" in seen.sections["breaks"]


def test_long_texts_are_shortened_and_said_to_be() -> None:
    results = make(1)
    prompt = "first words " + "x" * 5000 + " last words"
    broken = replace(results.breaks[0], prompt=prompt, found="")
    text = Page(report.render(replace(results, breaks=(broken,)))).text("breaks")
    assert "first words" in text
    assert "last words" in text
    assert f"{len(prompt) - report.TEXT:,} characters left out" in text
    assert "nothing" in text
    assert findings.excerpt("x" * 600, 600).cut == 0


def test_no_breaks() -> None:
    results = make()
    pairs = tuple(replace(pair, breaks=0) for pair in results.comparisons)
    assert "None: no arm broke" in Page(report.render(replace(results, breaks=(), comparisons=pairs))).text(
        "breaks"
    )


def test_many_failing_canaries() -> None:
    seen = Page(report.render(failing(make(150), 130)))
    assert "130 of 300 canaries failed: adapters did not act as they should." in seen.text("alarm")
    assert "125 more" in seen.text("alarm")
    assert "30 failed canaries more" in seen.text("canaries")


def test_canaries_are_summed_up() -> None:
    rows = findings.canary_rows(failing(make(3)))
    assert [(row.arm, row.count, row.held) for row in rows] == [("original", 2, 2), ("team.lorazip", 4, 3)]
    assert rows[0].worst_ratio == pytest.approx(0.2)
    assert rows[1].worst_ratio == pytest.approx(345)
    assert rows[1].least_effect == 0.7
    assert rows[1].most_deviation == 0.69


def test_left_out_cost_settings() -> None:
    seen = Page(report.render(make()))
    assert "examples of task_000 7 the prompt is longer than the context" in seen.text("left-out")
    text = seen.text("cost")
    for part in ("model calls made 1,200", "answers from the cache 340", "tokens a second 400.0"):
        assert part in text
    text = seen.text("settings")
    for part in ("seed 0", "chat template –", "tasks a, b", "versions, torch 2.13.0"):
        assert part in text
    bare = Page(report.render(replace(make(), left_out=(), settings={}, cost={})))
    assert "Nothing: all that was given was evaluated." in bare.text("left-out")


def test_a_long_setting_is_cut() -> None:
    results = replace(make(), settings={"tasks": [f"t{i}" for i in range(1000)]})
    assert "characters left out" in Page(report.render(results)).text("settings")
