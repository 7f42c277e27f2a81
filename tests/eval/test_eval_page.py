"""The page of an evaluation: nothing in it runs, it needs nothing else, and a browser takes it."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browsing import Page, probe, visit
from evaluations import FAIL, HOSTILE, PASS, failing, gated, make

from lorazip.errors import TargetError
from lorazip.eval import report
from lorazip.eval.results import Break, LeftOut, Results


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
