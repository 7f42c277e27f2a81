"""The report of an evaluation: what it says in each case, its safety, and how a browser takes it."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_report import Page, probe, visit

from lorazip.errors import TargetError
from lorazip.eval import findings, report
from lorazip.eval.results import (
    Arm,
    Break,
    Canary,
    Check,
    Comparison,
    Gate,
    Interval,
    LeftOut,
    Results,
    Row,
    Summary,
    total_verdict,
)

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "a\x1b[2Jb\x00c\x07",
    "left\u202eright\u2066",
    "$x$ 日本語 עברית",
    "{{ 7 * 7 }}{% raw %}",
    "\ud800",
)


def about(estimate: float, n: int = 200, width: float = 0.02) -> Interval:
    return Interval(estimate, estimate - width, estimate + width, n)


def make(
    tasks: int = 3,
    bundles: Sequence[str] = ("team.lorazip",),
    kept: float = 0.982,
    adapters: int | None = None,
    drift: int = 0,
) -> Results:
    """An invented evaluation: each task has an adapter of its own; later bundles are larger and better."""
    dice = random.Random(0)
    n = adapters or tasks
    arms = [
        Arm("base", "base", None, 0, 0, None),
        Arm("original", "original", "zoo", 12_300_000, n, 1.0),
    ]
    arms += [Arm(b, "bundle", b, 10**6 * (i + 1), n, 12.3 / (i + 1)) for i, b in enumerate(bundles)]
    rows, pairs = [], []
    for i in range(n):
        task, adapter = f"task_{i % tasks:03d}", f"adapter_{i:03d}"
        best = 0.3 + 0.6 * dice.random()
        base = Row(task, None, "base", "exact", "own", True, best / 3, 200, best / 3 - 0.03, best / 3 + 0.04)
        if i < tasks:
            rows.append(base)
        for arm in arms[1:]:
            score = best if arm.kind == "original" else best - 0.06 * dice.random() ** 3
            rows.append(
                Row(task, adapter, arm.name, "exact", "own", True, score, 200, score - 0.05, score + 0.04)
            )
            rows.append(Row(task, adapter, arm.name, "loss", "own", False, 1.5, 200, 1.4, 1.6))
            if arm.kind == "bundle":
                change = about(score - best)
                pairs.append(
                    Comparison(task, adapter, arm.name, "exact", "own", change, 2, 6, 0.29, about(0.97))
                )
    for i in range(drift):
        for arm in arms[1:]:
            rows.append(
                Row(f"other_{i}", "adapter_000", arm.name, "exact", "drift", True, 0.5, 100, 0.4, 0.6)
            )
        for bundle in bundles:
            pairs.append(
                Comparison(
                    f"other_{i}", "adapter_000", bundle, "exact", "drift", about(0.001), 1, 1, 1.0, None
                )
            )
    summary = [
        Summary("base", about(0.213), about(2.5), None, 0, None, None, None, None, None, None, None),
        Summary("original", about(0.639), about(1.25), None, 0, None, None, None, None, None, None, None),
    ]
    for i, bundle in enumerate(bundles):
        mine = [pair for pair in pairs if pair.arm == bundle and pair.role == "own"]
        worst = min(mine, key=lambda pair: pair.difference.estimate)
        keeps = Interval(kept + 0.003 * i, kept - 0.013 + 0.003 * i, kept + 0.012 + 0.003 * i, 200 * n)
        summary.append(
            Summary(
                bundle,
                about(0.627),
                about(1.31),
                keeps,
                n - (n > 2),
                about(0.972),
                about(-0.012),
                1.0,
                3.0,
                0.0004,
                worst,
                about(-0.001) if drift else None,
            )
        )
    broken = [
        Break(
            f"task_{i % tasks:03d}",
            f"adapter_{i % tasks:03d}",
            bundles[0],
            f"Definition: find the antonym.\n\nInput: word {i}\nOutput:",
            f"right {i}",
            f"right {i}",
            f"wrong {i}",
        )
        for i in range(3 * tasks if bundles else 0)
    ]
    canaries = tuple(
        Canary(bundle, f"adapter_{i:03d}", 0.8, 0.0004, 0.002, True, "")
        for bundle in ("original", *bundles)
        for i in range(n)
    )
    return Results(
        settings={
            "base": "org/Small-Base-1B",
            "tasks": ["a", "b"],
            "seed": 0,
            "chat_template": None,
            "versions": {"torch": "2.13.0", "lorazip": "0.1.0"},
        },
        arms=tuple(arms),
        rows=tuple(rows),
        comparisons=tuple(pairs),
        summary=tuple(summary),
        gate=None,
        canaries=canaries,
        left_out=(LeftOut("examples of task_000", 7, "the prompt is longer than the context"),),
        breaks=tuple(broken),
        cost={"asked": 1540, "made": 1200, "cached": 340, "tokens": 50_000, "seconds": 125.0},
    )


def gated(results: Results, *checks: Check, point: bool = False) -> Results:
    return replace(results, gate=Gate(total_verdict(checks), point, checks))


def failing(results: Results, count: int = 1, problem: str = "the adapter changes nothing") -> Results:
    bad = [Canary("team.lorazip", f"adapter_{i:03d}", 0.7, 0.69, 0.002, False, problem) for i in range(count)]
    return replace(results, canaries=(*results.canaries[count:], *bad))


PASS = Check("team.lorazip", "min-retention", 0.95, about(0.982, 7600, 0.012), "pass", None)
FAIL = Check("team.lorazip", "max-drop", 0.005, about(0.03), "fail", None)
UNDECIDED = Check("team.lorazip", "min-retention", 0.975, about(0.982, 7600, 0.012), "undecided", 21_400)


def verdict(results: Results) -> str:
    return Page(report.render(results)).text("verdict")


# The verdict


def test_no_gate_one_arm() -> None:
    said = verdict(make(38))
    sentence = "team.lorazip keeps 98.2 % (96.9 – 99.4) of the score of the originals on 37 adapters"
    assert f"{sentence} at 12.3× fewer bytes." in said
    assert "1 adapter does not count for what is kept" in said
    assert not any(label in said for label in ("Pass", "Fail", "Cannot decide"))


def test_no_gate_many_arms() -> None:
    seen = Page(report.render(make(4, ("a", "b", "c"))))
    assert "3 arms held against the original" in seen.text("verdict")
    for name, kept in {"a": "98.2 %", "b": "98.5 %", "c": "98.8 %"}.items():
        assert f"{name} keeps {kept}" in seen.text("verdict")
    assert seen.text("verdict").count("does not count") == 1  # alike for all arms: said once


def test_pass() -> None:
    page = report.render(gated(make(), PASS))
    said = Page(page).text("verdict")
    assert said.index("Pass") < said.index("1 of 1 check of the gate passed.")
    assert "keeps 98.2 % (97.0 – 99.4) of the originals’ score; at least 95.0 % is asked for." in said
    assert "The whole interval is on the right side." in said
    assert "<title>Pass: evaluation of 3 adapters of org/Small-Base-1B</title>" in page
    assert 'class="verdict pass"' in page


def test_fail_comes_before_all_else() -> None:
    said = verdict(gated(make(), PASS, UNDECIDED, FAIL))
    assert said.index("Fail") < said.index("Cannot decide") < said.index("Pass")
    assert "1 of 3 checks of the gate passed." in said
    assert "loses 3.0 (1.0 – 5.0) points of score; at most 0.5 points are allowed." in said
    assert "wrong side" in said


def test_undecided_says_how_many_examples_would_do() -> None:
    said = verdict(gated(make(), UNDECIDED))
    assert "Cannot decide" in said
    assert "The interval from 7,600 examples spans the threshold." in said
    assert "About 21,400 would be enough, if the estimate is right." in said


@pytest.mark.parametrize(
    ("check", "point", "words"),
    [
        (replace(UNDECIDED, examples_needed=None), False, "the estimate lies on the threshold"),
        (replace(UNDECIDED, value=None, examples_needed=None), False, "more examples would not help"),
        (replace(FAIL, value=None, verdict="undecided"), False, "Nothing was measured"),
        (PASS, True, "Judged by the estimate alone"),
        (
            replace(FAIL, value=about(-0.01, width=0.03), verdict="undecided", examples_needed=900),
            False,
            "loses nothing: it gains 1.0 (−2.0 to 4.0) points of score",
        ),
    ],
)
def test_odd_checks(check: Check, point: bool, words: str) -> None:
    assert words in verdict(gated(make(), check, point=point))


def test_gate_without_checks_does_not_seem_to_judge() -> None:
    assert "The gate has no checks: nothing was judged." in verdict(gated(make()))


def test_failing_canary_comes_first() -> None:
    page = report.render(failing(gated(make(), PASS)))
    seen = Page(page)
    assert [name for name in seen.sections if name][:2] == ["alarm", "verdict"]
    body = page[page.index("<main>") :]
    assert re.match(
        r'<main>\s*<section id="alarm" class="alarm">\s*<h1>The figures below cannot be trusted', body
    )
    assert "1 of 6 canaries failed: an adapter did not act as it should." in seen.text("alarm")
    assert "team.lorazip, adapter_000 : the adapter changes nothing" in seen.text("alarm")
    assert "Void" in seen.text("verdict")
    assert "The gate alone says “pass”" in seen.text("verdict")
    assert "<title>Not to be trusted" in page
    assert 'class="verdict pass"' not in page
    assert "5 of 6" in seen.text("verdict")
    assert "the adapter changes nothing" in seen.text("canaries")


def test_no_failing_canary_no_alarm() -> None:
    seen = Page(report.render(make()))
    assert "alarm" not in seen.sections
    assert "All hold." in seen.text("canaries")


def test_nothing_to_judge() -> None:
    results = make(3, ())
    assert "there is nothing to judge" in verdict(results)
    alone = replace(
        results,
        arms=results.arms[:1],
        rows=tuple(row for row in results.rows if row.arm == "base"),
        summary=results.summary[:1],
        canaries=(),
    )
    seen = Page(report.render(alone))
    assert "task_002" in seen.sections["tasks"]
    assert "None was run" in seen.text("canaries")


def without_originals(results: Results) -> Results:
    unknown = dict.fromkeys(
        ("kept", "lift", "difference", "fixes_per_100", "breaks_per_100", "p_value", "worst", "drift")
    )
    return replace(
        results,
        arms=tuple(replace(arm, ratio=None) for arm in results.arms if arm.kind != "original"),
        rows=tuple(row for row in results.rows if row.arm != "original"),
        comparisons=(),
        breaks=(),
        summary=tuple(replace(s, kept_adapters=0, **unknown) for s in results.summary if s.arm != "original"),
    )


def test_without_originals() -> None:
    seen = Page(report.render(without_originals(make(50))))
    assert "team.lorazip scores 62.7 (60.7 – 64.7) of 100 points on 50 adapters." in seen.text("verdict")
    assert "There are no originals to hold it against." in seen.text("verdict")
    assert "or there are no originals" in seen.text("breaks")


def test_nothing_to_keep() -> None:
    results = make()
    summary = tuple(replace(s, kept=None, kept_adapters=0) for s in results.summary)
    said = verdict(replace(results, summary=summary))
    assert "team.lorazip scores −1.2 (−3.2 to +0.8) points against the originals on 3 adapters" in said
    assert "What is kept cannot be given: no original is at least 10 points better than the base." in said


def test_more_bytes_and_as_many() -> None:
    results = make(3, ("a", "b"))
    ratios = {"a": 0.5, "b": 1.0}
    arms = tuple(replace(arm, ratio=ratios.get(arm.name)) for arm in results.arms)
    said = verdict(replace(results, arms=arms))
    assert "at 2.00× more bytes." in said
    assert "at as many bytes." in said


# What follows


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


# Safety


def hostile() -> Results:
    """Every text that a stranger may choose is hostile."""
    results = make(len(HOSTILE), ("team.lorazip", "other"), drift=2)
    texts = {f"task_{i:03d}": text for i, text in enumerate(HOSTILE)}
    texts |= {f"adapter_{i:03d}": f"{text}{i}" for i, text in enumerate(HOSTILE)}
    texts |= {"team.lorazip": HOSTILE[1], "other": HOSTILE[0] + HOSTILE[2], "exact": HOSTILE[0]}

    def swap(value: Any) -> Any:
        if isinstance(value, str):
            return texts.get(value, value)
        if isinstance(value, tuple):
            return tuple(map(swap, value))
        if hasattr(value, "__dataclass_fields__"):
            return replace(value, **{name: swap(getattr(value, name)) for name in value.__dataclass_fields__})
        return value

    everything = "\n".join(HOSTILE)
    results = failing(gated(results, PASS, FAIL), problem=everything)
    return replace(
        swap(results),
        breaks=tuple(
            Break(HOSTILE[0], f"{HOSTILE[0]}0", HOSTILE[1], everything, text, text, text) for text in HOSTILE
        ),
        left_out=tuple(LeftOut(text, 1, everything) for text in HOSTILE),
        settings={"base": HOSTILE[0], **{text: [text, {text: text}] for text in HOSTILE}},
        cost={text: text for text in HOSTILE},
    )


def test_hostile_texts_are_escaped() -> None:
    text = report.render(hostile())
    text.encode()
    seen = Page(text)
    assert all(character.isprintable() or character in "\n\t" for character in text)
    for section in (
        "alarm",
        "verdict",
        "arms",
        "trade",
        "tasks",
        "breaks",
        "canaries",
        "left-out",
        "cost",
        "settings",
    ):
        assert HOSTILE[0] in seen.text(section)
    for shown in ("a\\x1b[2Jb\\x00c\\x07", "left\\u202eright\\u2066", "{{ 7 * 7 }}", "日本語 עברית"):
        assert shown in seen.text("breaks")
        assert shown in seen.text("tasks")
    forbidden = {"script", "img", "iframe", "object", "embed", "link", "base", "form", "image"}
    assert not forbidden.intersection(tag for tag, _ in seen.tags)
    assert not [name for _, attrs in seen.tags for name in attrs if name.startswith("on")]


@pytest.mark.parametrize("name", ["plain", "hostile", "many"])
def test_the_page_needs_nothing_but_itself(name: str) -> None:
    page = report.render({"plain": make(), "many": make(60, ("a", "b")), "hostile": hostile()}[name])
    assert "default-src 'none'" in page
    assert "<script" not in page
    assert "javascript:" not in page.lower()
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert set(re.findall(r"https?://[^\s\"'<>)]+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    for _, attrs in Page(page).tags:
        for key in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
            assert (attrs.get(key) or "#").startswith("#")


def test_ids_are_unique_and_known() -> None:
    page = report.render(make(60, ("a", "b")))
    ids = [attrs["id"] for _, attrs in Page(page).tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]*)\)", page)) <= set(ids)
    assert set(re.findall(r'href="#([^"]*)"', page)) <= set(ids)


def test_same_results_same_page() -> None:
    assert report.render(make(50, ("a", "b"))) == report.render(make(50, ("a", "b")))


def test_write_is_whole_or_not_at_all(tmp_path: Path) -> None:
    report.write(tmp_path / "report.html", make())
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == report.render(make())
    with pytest.raises(TargetError):
        report.write(tmp_path / "no" / "report.html", make())


def test_hundreds_are_quick_and_small() -> None:
    results = make(200, ("r8", "r16", "r32"), adapters=500)
    begun = time.perf_counter()
    page = report.render(results)
    assert time.perf_counter() - begun < 30  # 1 s on one free core
    assert len(page.encode()) < 5e6
    text = Page(page).sections["tasks"]
    assert all(f"adapter_{i:03d}" in text for i in range(500))


# In a browser


def test_browser_console_is_silent(tmp_path: Path) -> None:
    dom, console = visit(report.render(hostile()), tmp_path / "visit")
    assert console == []
    assert "</footer>" in dom


@pytest.mark.parametrize("width", [1200, 500])
def test_browser_draws_all_pictures(tmp_path: Path, width: int) -> None:
    found = probe(report.render(make(60, ("r8", "r16", "a long name " * 9))), tmp_path / "visit", width)
    assert len(found["boxes"]) == 3
    assert all(side > 50 for box in found["boxes"] for side in box)
    assert found["overflow"] == 0
