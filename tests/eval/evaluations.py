"""Invented evaluations, for the tests of their report."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from browsing import Page

from lorazip.eval import report
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
