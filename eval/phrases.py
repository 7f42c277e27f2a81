"""An evaluation in words: how its figures are written, the sentences of its verdict, its settings."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lorazip.eval.results import Arm, Check, Interval, Results, Summary
from lorazip.units import counted, times

NONE = "–"  # of what was not measured or is not defined
LOSS = "loss"  # the one metric that is no score between 0 and 1
LABELS = {"pass": "Pass", "fail": "Fail", "undecided": "Cannot decide"}


@dataclass(frozen=True)
class Judged:
    """A check of the gate, in words."""

    check: Check
    claim: str
    why: str


# Figures in words


def points(value: float | None) -> str:
    """A score of 0 to 1 in points of 100: 62.4."""
    return number(value, lambda v: f"{100 * v:.1f}")


def signed(value: float | None) -> str:
    """A difference of scores in points: +0.3, −1.2, 0.0."""
    return number(value, lambda v: f"{100 * v:+.1f}".replace("+0.0", "0.0").replace("-0.0", "0.0"))


def percent(value: float | None) -> str:
    """A part of the original's score: 98.2 %."""
    return number(value, lambda v: f"{100 * v:.1f} %")


def plain(value: float | None) -> str:
    """A loss, a log-probability: 1.234, 2.1e-05."""
    return number(value, lambda v: f"{v:.3f}" if v == 0 or 0.01 <= abs(v) < 1e4 else f"{v:.2g}")


def probability(value: float | None) -> str:
    """A p-value: 0.031, < 0.001."""
    return number(value, lambda v: "< 0.001" if v < 0.001 else f"{v:.3f}")


def span(low: float | None, high: float | None, say: Callable[[float | None], str]) -> str:
    """An interval: 96.9 – 99.4, and −1.2 to +0.3, where a dash would be read as a minus."""
    ends = [say(end).removesuffix(" %") for end in (low, high)]
    return (" to " if any(end[:1] in "+−" for end in ends) else " – ").join(ends)


def with_span(value: Interval, say: Callable[[float | None], str]) -> str:
    """98.2 % (96.9 – 99.4)."""
    return f"{say(value.estimate)} ({span(value.low, value.high, say)})"


def by_metric(metric: str) -> Callable[[float | None], str]:
    """How scores by this metric are written."""
    return plain if metric == LOSS else points


def differences(metric: str) -> Callable[[float | None], str]:
    """How differences of scores by this metric are written."""
    return plain if metric == LOSS else signed


def number(value: float | None, say: Callable[[float], str]) -> str:
    """A figure with a minus as it is printed; a dash for what is none, or not finite."""
    if value is None or not math.isfinite(value):
        return NONE
    text = say(value).replace("-", "−") if abs(value) < 1e100 else f"{value:.0e}"
    return text.removeprefix("−") if not any(digit in text for digit in "123456789") else text


# The verdict


def judged_arms(results: Results) -> list[Arm]:
    """The arms that are held against the original."""
    return [arm for arm in results.arms if arm.kind == "bundle"]


def sentence(arm: Arm, found: Summary | None, originals: bool) -> str:
    """What became of one arm, for those who read nothing else."""
    if found is None:
        return f"{arm.name} was not measured."
    on, saved = counted(arm.adapters, "adapter"), _saved(arm.ratio)
    if found.kept is not None:
        on = counted(found.kept_adapters, "adapter")
        return (
            f"{arm.name} keeps {with_span(found.kept, percent)} of the score of the originals on {on}{saved}."
        )
    if found.difference is not None:
        return f"{arm.name} scores {with_span(found.difference, signed)} points against the originals on {on}{saved}."
    text = f"{arm.name} scores {with_span(found.score, points)} of 100 points on {on}."
    return text if originals else f"{text} There are no originals to hold it against."


def asides(results: Results) -> list[str]:
    """What the sentences leave unsaid: which adapters do not count for what is kept. Once for arms that are alike."""
    found = {summary.arm: summary for summary in results.summary}
    texts: dict[str, list[str]] = defaultdict(list)
    for arm in judged_arms(results):
        summary = found.get(arm.name)
        if summary is None or (summary.difference is None and summary.kept is None):
            continue
        rest = arm.adapters - summary.kept_adapters
        if summary.kept is None:
            text = "what is kept cannot be given: no original is at least 10 points better than the base."
        elif rest > 0:
            text = f"{counted(rest, 'adapter does', 'adapters do')} not count for what is kept: "
            text += "the original is less than 10 points better than the base."
        else:
            continue
        texts[text].append(arm.name)
    if len(texts) == 1 and len(next(iter(texts.values()))) == len(judged_arms(results)):
        return [text[0].upper() + text[1:] for text in texts]
    return [f"{', '.join(arms)}: {text}" for text, arms in texts.items()]


def _saved(ratio: float | None) -> str:
    """At 12.3× fewer bytes."""
    if ratio is None or not math.isfinite(ratio) or ratio <= 0:
        return ""
    if 0.995 < ratio < 1.005:
        return " at as many bytes"
    return f" at {times(ratio)} fewer bytes" if ratio > 1 else f" at {times(1 / ratio)} more bytes"


def judged_checks(results: Results) -> list[Judged]:
    """The gate's checks in words, those that failed first, then the undecided."""
    if results.gate is None:
        return []
    order = ("fail", "undecided", "pass")
    checks = sorted(results.gate.checks, key=lambda check: order.index(check.verdict))
    return [Judged(check, _claim(check), _why(check, results.gate.point)) for check in checks]


def _claim(check: Check) -> str:
    value = check.value
    if check.rule == "min-retention":
        asked = f"at least {percent(check.threshold)} is asked for"
        if value is None:
            return f"must keep a part of the originals’ score, and {asked}; what it keeps is not known"
        return f"keeps {with_span(value, percent)} of the originals’ score; {asked}"
    allowed = f"at most {points(check.threshold)} points are allowed"
    if value is None:
        return f"must not lose too much, and {allowed}; what it loses is not known"
    if value.estimate < 0:
        gained = Interval(-value.estimate, -value.high, -value.low, value.n)
        return f"loses nothing: it gains {with_span(gained, points)} points of score; {allowed}"
    return f"loses {with_span(value, points)} points of score; {allowed}"


def _why(check: Check, point: bool) -> str:
    if check.value is None and check.rule == "min-retention":
        return "No original is 10 points better than the base, so more examples would not help."
    if check.value is None:
        return "Nothing was measured to judge it by."
    if point:
        return "Judged by the estimate alone, whatever its interval."
    if check.verdict != "undecided":
        return f"The whole interval is on the {'right' if check.verdict == 'pass' else 'wrong'} side."
    text = f"The interval from {counted(check.value.n, 'example')} spans the threshold."
    if check.examples_needed is None:
        return f"{text} More examples would not help: the estimate lies on the threshold."
    return f"{text} About {check.examples_needed:,} would be enough, if the estimate is right."


# Settings and cost


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """JSON values as names and texts; those in objects have the names of all of these."""
    found: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, Mapping) and value:
            found += flat(value, f"{name}, ")
        else:
            found.append((name, _value(value)))
    return found


def _value(value: Any) -> str:
    if value is None or value in ([], {}, ""):
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
