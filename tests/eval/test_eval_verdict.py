"""What the report of an evaluation says first: its verdict in each case."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from browsing import Page
from evaluations import FAIL, PASS, UNDECIDED, about, failing, gated, make, verdict, without_originals

from lorazip.eval import report
from lorazip.eval.results import Check


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
