"""Arms: who answers what, what is left out and counted, and what a file of pairs may say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import pytest
from handmade import MakeAdapter
from hypothesis import given
from hypothesis import strategies as st

import lorazip
from lorazip import Spec
from lorazip.errors import BundleError, InputError, UsageError
from lorazip.eval import arms
from lorazip.eval.arms import Pair, Team
from lorazip.eval.results import LeftOut


def team(name: str, adapters: Iterable[str]) -> Team:
    return Team(name, "bundle", name, {a: cast(Any, object()) for a in adapters}, 1, 1)


def own(*names: str) -> list[Pair]:
    return [Pair(name, name) for name in names]


# --- who answers what -------------------------------------------------------------------------------------------------


def test_adapter_x_answers_task_x_in_every_arm() -> None:
    teams = [team("original", ["ant", "bee", "cat", "dog"]), team("small", ["bee", "ant", "cat", "eel"])]
    pairs, left = arms.match(teams, ["cat", "ant", "fox"], None, [])
    assert pairs == own("ant", "cat")
    assert left == [
        LeftOut("eel", 1, "adapters that original does not have"),
        LeftOut("dog", 1, "adapters that small does not have"),
        LeftOut("bee, dog, eel", 3, "adapters without a task of their name"),
    ]


NAMES = st.lists(st.sampled_from("abcdefgh"), unique=True)


@given(rosters=st.lists(NAMES, min_size=1, max_size=3), known=NAMES, drift=NAMES)
def test_every_pair_can_be_answered_and_every_adapter_is_told(
    rosters: list[list[str]], known: list[str], drift: list[str]
) -> None:
    teams = [team(f"arm{i}", names) for i, names in enumerate(rosters)]
    expected = set(known).intersection(*rosters)
    if not expected or not set(drift) <= set(known):
        with pytest.raises(InputError):
            arms.match(teams, known, None, drift)
        return
    pairs, left = arms.match(teams, known, None, drift)
    assert {p.adapter for p in pairs if p.role == "own"} == expected
    assert {(p.task, p.adapter) for p in pairs} == {(n, n) for n in expected} | {
        (t, a) for t in drift for a in expected
    }
    assert len({(p.task, p.adapter) for p in pairs}) == len(pairs)
    assert pairs == sorted(pairs)
    told = {name for gone in left for name in gone.what.split(", ")}
    assert told == {name for names in rosters for name in names} - expected
    assert arms.match(teams[::-1], known[::-1], None, drift[::-1])[0] == pairs


def test_many_names_are_counted_and_some_are_said() -> None:
    names = [f"a{i:02}" for i in range(30)]
    _, left = arms.match([team("original", names)], ["a00"], None, [])
    assert left == [LeftOut(", ".join(names[1:11]) + " …", 29, "adapters without a task of their name")]


def test_drift_is_answered_by_every_adapter_but_its_own() -> None:
    teams = [team("original", ["ant", "bee"])]
    pairs, _ = arms.match(teams, ["ant", "bee", "facts"], None, ["facts", "ant", "facts"])
    assert pairs == [
        Pair("ant", "ant", "own"),
        Pair("ant", "bee", "drift"),
        Pair("bee", "bee", "own"),
        Pair("facts", "ant", "drift"),
        Pair("facts", "bee", "drift"),
    ]


def test_pairs_that_were_asked_for() -> None:
    teams = [team("original", ["ant", "bee"]), team("small", ["ant", "bee"])]
    asked = [Pair("words", "ant"), Pair("facts", "ant", "drift"), Pair("sums", "bee")]
    pairs, left = arms.match(teams, ["words", "facts", "sums"], asked, ["facts"])
    assert pairs == sorted([*asked, Pair("facts", "bee", "drift")])
    assert left == []


def refused(*arguments: Any) -> str:
    with pytest.raises(InputError) as caught:
        arms.match(*arguments)
    return str(caught.value)


def test_all_that_cannot_be_answered_is_told_at_once() -> None:
    teams = [team("original", ["ant", "bee"]), team("small", ["bee"])]
    asked = [Pair("sums", "ant"), Pair("wrods", "bee"), Pair("sums", "cat")]
    assert refused(teams, ["sums", "words"], asked, ["fatcs"]).split("\n") == [
        "ant: is not in small (see --pairs)",
        "cat: is not in original, small (see --pairs)",
        "fatcs: is no task of --tasks (there are sums, words)",
        "wrods: is no task of --tasks (there are sums, words)",
    ]


def test_nothing_matches() -> None:
    message = refused([team("original", ["ant", "bee"])], ["sums", "words"], None, [])
    assert message == (
        "--tasks: no adapter of all arms has a task of its name; there are sums, words; adapters: ant, bee"
        " (a task is named as its adapter; other pairs: --pairs FILE)"
    )
    # Adapters that no arm shares are nobody's.
    assert "no adapter of all arms" in refused(
        [team("a", ["ant"]), team("b", ["bee"])], ["ant", "bee"], None, []
    )
    # Drift alone says nothing about what an adapter is for.
    for asked in ([], [Pair("sums", "ant", "drift")]):
        assert (
            refused([team("original", ["ant"])], ["sums"], asked, [])
            == "--pairs: names no task as an adapter's own"
        )
    assert "\x1b" not in refused([team("original", ["\x1b[2J"])], ["\x1b]0;x"], None, [])


# --- a file of pairs --------------------------------------------------------------------------------------------------


def test_pairs_are_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows: list[dict[str, Any]] = [
        {"task": "sums", "adapter": "bee"},
        {"task": "facts\u2028", "adapter": "ant", "role": "drift", "note": 5},
        {"task": "sums", "adapter": "bee", "role": "own"},
    ]
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    expected = [Pair("facts\u2028", "ant", "drift"), Pair("sums", "bee")]
    for content in (text, f"{text}\n", "\ufeff" + text.replace("\n", "\r\n")):
        path.write_bytes(content.encode())
        assert arms.read_pairs(path) == expected
    path.write_text("\n")
    assert arms.read_pairs(path) == []


GOOD = '{"task": "sums", "adapter": "ant"}\n'


@pytest.mark.parametrize(
    "line",
    [
        "sums ant",
        "{",
        "[]",
        '["sums", "ant"]',
        '"sums"',
        "null",
        "1",
        '{"task": "sums"}',
        '{"adapter": "ant"}',
        '{"task": 1, "adapter": "ant"}',
        '{"task": "sums", "adapter": null}',
        '{"task": "sums", "adapter": ["ant"]}',
        '{"task": "sums", "adapter": "ant", "role": "Own"}',
        '{"task": "sums", "adapter": "ant", "role": ["own"]}',
        '{"task": "sums", "adapter": "ant", "role": null}',
        "[" * 100_000,
    ],
    ids=lambda line: line[:40],
)
def test_a_line_that_is_no_pair_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(InputError) as caught:
        arms.read_pairs(path)
    assert str(caught.value) == (
        f'{path}: line 3 is no pair (a line is {{"task": NAME, "adapter": NAME}}, and "role": "drift" for an'
        " unrelated task)"
    )


def test_a_file_of_pairs_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b'{"task": "\xe9"}')
    for name in ("nowhere", ".", "latin"):
        with pytest.raises(InputError, match="cannot be read: "):
            arms.read_pairs(tmp_path / name)


def test_a_pair_has_one_role(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(GOOD + '{"task": "sums", "adapter": "ant", "role": "drift"}\n')
    with pytest.raises(InputError, match="pairs ant with sums as its own task and as drift"):
        arms.read_pairs(path)


# --- adapters and bundles ---------------------------------------------------------------------------------------------


@pytest.fixture
def zoo(make_adapter: MakeAdapter) -> Path:
    for name in ("ant", "bee"):
        make_adapter(f"zoo/{name}")
    return make_adapter.root / "zoo"


def test_originals_are_what_lies_there(zoo: Path) -> None:
    found = arms.originals([str(zoo)], "somewhere/else")
    assert (found.name, found.kind, found.path) == ("original", "original", str(zoo))
    assert list(found.adapters) == ["ant", "bee"]
    assert found.nbytes == found.original_bytes
    assert found.nbytes == sum(p.stat().st_size for p in zoo.rglob("adapter_*"))
    assert found.directory("bee") == zoo / "bee"
    with pytest.raises(InputError, match="nowhere: does not exist"):
        arms.originals([str(zoo / "nowhere")], "base")


def test_a_bundle_is_an_arm_named_as_its_directory(zoo: Path, tmp_path: Path, monkeypatch: Any) -> None:
    lorazip.compress(zoo, Spec(), tmp_path / "small")
    lorazip.compress(zoo, Spec("jd-full", rank=2), tmp_path / "tiny")
    small, tiny = arms.bundles([tmp_path / "small", tmp_path / "tiny"])
    assert (small.name, small.kind, tiny.name) == ("small", "bundle", "tiny")
    assert list(small.adapters) == ["ant", "bee"]
    assert small.nbytes == sum(p.stat().st_size for p in (tmp_path / "small").rglob("*") if p.is_file())
    assert small.original_bytes == tiny.original_bytes == arms.originals([str(zoo)], "base").nbytes
    assert small.directory("ant") is None
    monkeypatch.chdir(tmp_path / "small")
    assert arms.bundles([Path(".")])[0].name == "small"


@pytest.mark.parametrize("name", ["base", "original", "base-3-shot"])
def test_an_arm_has_a_name_of_its_own(zoo: Path, tmp_path: Path, name: str) -> None:
    lorazip.compress(zoo, Spec(), tmp_path / name)
    with pytest.raises(UsageError, match=f"two arms would be called {name} .rename the bundle"):
        arms.bundles([tmp_path / name])


def test_bundles_have_different_names(zoo: Path, tmp_path: Path) -> None:
    lorazip.compress(zoo, Spec(), tmp_path / "baseline")
    for place in ("one/team", "two/team"):
        shutil.copytree(tmp_path / "baseline", tmp_path / place)
    (tmp_path / "link").symlink_to(tmp_path / "one" / "team")
    for paths in (["one/team", "two/team"], ["one/team", "one/team"], ["one/team", "link"]):
        with pytest.raises(UsageError, match="two arms would be called team"):
            arms.bundles([tmp_path / path for path in paths])
    assert [t.name for t in arms.bundles([tmp_path / "baseline", tmp_path / "one" / "team"])] == [
        "baseline",
        "team",
    ]


def test_a_damaged_bundle_is_no_arm(zoo: Path, tmp_path: Path) -> None:
    lorazip.compress(zoo, Spec(), tmp_path / "team")
    victim = tmp_path / "team" / "adapters" / "bee.safetensors"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    with pytest.raises(BundleError, match="bee"):
        arms.bundles([tmp_path / "team"])
    victim.unlink()
    with pytest.raises(BundleError, match="bee"):
        arms.bundles([tmp_path / "team"])
    with pytest.raises(UsageError, match="nowhere does not exist"):
        arms.bundles([tmp_path / "nowhere"])
