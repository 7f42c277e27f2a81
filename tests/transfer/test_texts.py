"""Inputs as texts: read strictly and silently, screened with a reason each, their overlaps by definition."""

from __future__ import annotations

import json
import os
import unicodedata
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorazip import rows
from lorazip.errors import InputError
from lorazip.transfer import texts
from lorazip.transfer.texts import Screen

SECRET = "zyzzyva"  # no message may hold it
SEEDS = ("How far is the moon?", "Who wrote Faust?", "What is 3 + 4?", "Name a noble gas.", "Où est-il?")


def written(path: Path, *inputs: str) -> Path:
    path.write_text("".join(json.dumps({"input": text}) + "\n" for text in inputs))
    return path


def test_json_lines_and_plain_lines(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", *SEEDS, SEEDS[0], "two\nlines ", "e\u0301")
    path.write_bytes(b'\xef\xbb\xbf{"input": "first", "output": "x"}\n\n' + path.read_bytes())
    assert rows.texts(path) == ["first", *SEEDS, "two\nlines ", "e\u0301"]
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff first \r\n\r\n  \nse\u0301cond\u2028still\x0c second\nfirst\nlast".encode())
    assert rows.texts(path) == ["first", "se\u0301cond\u2028still\x0c second", "last"]


BAD_LINES = {
    "no JSON": f"{SECRET} {{",
    "no string": f'{{"input": "{SECRET}',
    "escape": f'{{"input": "{SECRET}\\q"}}',
    "control": f'{{"input": "{SECRET}\t"}}',
    "no object": f'["{SECRET}"]',
    "no input": f'{{"{SECRET}": "{SECRET}"}}',
    "twice": f'{{"{SECRET}": 1, "{SECRET}": "{SECRET}"}}',
    "empty": f'{{"input": " ", "output": "{SECRET}"}}',
    "no text": f'{{"input": ["{SECRET}"]}}',
    "half a pair": f'{{"input": "{SECRET}\\ud800"}}',
    "no UTF-8": f'{{"input": "{SECRET}\udcff"}}',
    "not finite": f'{{"input": NaN, "output": "{SECRET}"}}',
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES)
def test_bad_line_is_named_but_not_shown(tmp_path: Path, line: str) -> None:
    path = written(tmp_path / "seeds.jsonl", SECRET, f"{SECRET} again")
    path.write_bytes(path.read_bytes() + line.encode("utf-8", "surrogateescape") + b"\n")
    for read in (rows.texts, texts.read_seeds):
        with pytest.raises(InputError) as caught:
            read(path)
        assert "seeds.jsonl" in str(caught.value) and "line 3" in str(caught.value)
        error: BaseException | None = caught.value
        while error is not None:  # what a traceback shows
            assert SECRET not in str(error)
            error = error.__cause__


def test_bad_file_is_named_but_not_shown(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(f"{SECRET}\n{SECRET}\xe9".encode("latin1"))
    (tmp_path / "none.txt").write_text(" \n\n")
    (tmp_path / "none.jsonl").write_text("\n")
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "folder.jsonl").mkdir()
    written(tmp_path / "seeds.json", SECRET)
    names = (
        "latin.txt",
        "none.txt",
        "none.jsonl",
        "folder.txt",
        "folder.jsonl",
        "seeds.json",
        "lost.txt",
        "lost.jsonl",
    )
    for name in names:
        with pytest.raises(InputError) as caught:
            rows.texts(tmp_path / name)
        assert name in str(caught.value) and SECRET not in str(caught.value)


def test_too_few_seeds(tmp_path: Path) -> None:
    assert texts.read_seeds(written(tmp_path / "a.jsonl", *SEEDS)) == list(SEEDS)
    # Four, written seven times; a newline at the end is no second line.
    path = written(tmp_path / "b.jsonl", *SEEDS[:3], SECRET, SECRET.upper(), f"{SECRET}\n", f" {SECRET}")
    with pytest.raises(InputError, match=r"b\.jsonl: has 4 different inputs, synthesis needs 5") as caught:
        texts.read_seeds(path)
    assert SECRET not in str(caught.value)
    assert texts.read_seeds(written(tmp_path / "c.jsonl", *SEEDS, "six\n"))[-1] == "six"


def test_screen_keeps_what_is_new_and_counts_the_rest() -> None:
    screen = Screen(["abcdef", "Straße naïve", "x" * 9])
    taken = [
        (" a new one ", True, "a new one", ""),
        ("A  NEW\tone", True, None, "repeated"),
        ("ａ ｎｅｗ ｏｎｅ", True, None, "repeated"),  # full width
        ("STRASSE nai\u0308ve", True, None, "repeated"),  # of a seed
        ("", True, None, "empty"),
        (" \n", False, None, "empty"),
        ("cut off", False, None, "too long"),
        ("y" * 36, True, "y" * 36, ""),
        ("z" * 37, True, None, "too long"),
        ("q", True, None, "too short"),
        ("no", True, "no", ""),
        ("one\ntwo", True, None, "more than one line"),
        ("one two", True, "one two", ""),
        ("one\u00a0two", True, None, "repeated"),
    ]
    counts: dict[str, int] = {}
    for text, finished, kept, why in taken:
        assert screen.take(text, finished) == kept, text
        if why:
            counts[why] = counts.get(why, 0) + 1
    assert dict(screen.counts) == counts


def test_screen_takes_lines_where_seeds_have_them() -> None:
    screen = Screen(["one\ntwo", "three"])
    assert screen.take("four\nfive", True) == "four\nfive"
    assert screen.take("Four Five", True) is None and screen.counts == {"repeated": 1}


TEXTS = st.text(max_size=30)


@given(TEXTS)
def test_plain_form_does_not_depend_on_how_it_is_written(text: str) -> None:
    plain = texts.plain(text)
    assert texts.plain(plain) == plain
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert texts.plain(unicodedata.normalize(form, text)) == plain
    assert texts.plain(f"\n {text}\t") == plain


def test_capitals_are_the_same_text() -> None:
    for text in ("ΐ straße ﬁn", "ǆ ŉ", "αὐτῷ ᾳ"):
        assert texts.plain(text.upper()) == texts.plain(text) == texts.plain(text.lower())


def by_definition(synthetic: list[str], seeds: list[str], n: int) -> list[Fraction]:
    """Of each synthetic text the share of its different n-grams that the nearest seed has, by search."""
    found = []
    for text in map(texts.plain, synthetic):
        grams = {text[i : i + n] for i in range(len(text) - n + 1)} or {text}
        shares = [Fraction(sum(g in texts.plain(s) for g in grams), len(grams)) for s in seeds]
        found.append(max(shares, default=Fraction(0)))
    return found


def test_overlap_by_hand() -> None:
    # abcdef has the 4-grams abcd bcde cdef; ABCDEX the first two of them, "cde" is in it, xyxyxy has two, none in it.
    assert texts.overlap(["ABCDEX"], ["abcdef"], 4) == texts.Overlap(4, 2 / 3, 2 / 3, 0)
    found = texts.overlap(["ABCDEX", "cde", "xyxyxy"], ["qqqq", "abcdef"], 4)
    assert (found.n, found.nearest, found.copies) == (4, 1.0, 1)
    assert found.mean == pytest.approx((2 / 3 + 1 + 0) / 3)
    # Half in one seed and half in another is near to neither.
    assert texts.overlap(["abcdefgh"], ["abcd", "efgh"], 4).nearest == 1 / 5
    assert texts.overlap([], ["abcdef"]) == texts.Overlap(8, 0, 0, 0)
    assert texts.overlap(["abcdef"], []) == texts.Overlap(8, 0, 0, 0)


SMALL = st.text("abC \u00e9", min_size=1, max_size=14).filter(str.strip)


@given(st.lists(SMALL, min_size=1, max_size=4), st.lists(SMALL, max_size=4), st.integers(1, 8), st.data())
def test_overlap_by_definition(synthetic: list[str], seeds: list[str], n: int, data: st.DataObject) -> None:
    shares = by_definition(synthetic, seeds, n)
    found = texts.overlap(synthetic, seeds, n)
    assert found.nearest == pytest.approx(float(max(shares)))
    assert found.mean == pytest.approx(float(sum(shares) / len(shares)))
    assert found.copies == sum(share == 1 for share in shares)
    assert texts.overlap(synthetic, data.draw(st.permutations(seeds)), n) == found


@given(SMALL, st.lists(SMALL, max_size=3), st.integers(1, 10), st.data())
def test_part_of_a_seed_is_a_copy(seed: str, others: list[str], n: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(seed) - 1))
    part = seed[start : data.draw(st.integers(start + 1, len(seed)))]
    found = texts.overlap([part.swapcase()], [*others, seed], n)
    assert (found.nearest, found.copies) == (1.0, 1)


def test_unseen_are_new_each_once() -> None:
    assert texts.unseen(["a", "B", " b", "c", "A"], ["C "]) == ["a", "B"]


@pytest.mark.parametrize("name", ["seeds.txt", "seeds.jsonl"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match="does not exist or is no file"):
        rows.texts(tmp_path / name)
