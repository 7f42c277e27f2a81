"""`lorazip compress --sweep` on the command line: what it prints, and what it refuses before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from handmade import MakeAdapter

from lorazip.cli import main

MODULES = {"a.q_proj": (96, 160), "b.q_proj": (96, 160)}


@pytest.fixture
def zoo(make_adapter: MakeAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three adapters below the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("ant", "bee", "cat"):
        make_adapter(f"zoo/{name}", modules=MODULES)
    return Path("zoo")


def lorazip(capsys: pytest.CaptureFixture[str], line: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `lorazip LINE`."""
    with pytest.raises(SystemExit) as end:
        main(line.split())
    assert isinstance(end.value.code, int)
    return end.value.code, *capsys.readouterr()


def test_the_table(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = lorazip(capsys, "compress zoo --sweep --ratios 2,4,10000 -o f")
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    (two,) = (row for row in rows if row[:1] == ["2"])
    assert 2 <= float(two[1]) < 2.1
    assert any(row[:3] == ["10000", "-", "-"] for row in rows)
    assert "ratio 10000: " in out and "are too few" in out
    assert "mean error, measured" in out
    assert "written: f/frontier.json, f/frontier.svg" in out


def test_json_is_the_content_of_the_file(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = lorazip(capsys, "compress zoo --sweep --dry-run --ratios 2.5 -o f --json")
    assert code == 0, err
    assert json.loads(out) == json.loads((Path("f") / "frontier.json").read_text())
    assert json.loads(out)["points"][0]["asked"] == 2.5


def test_a_dry_run_needs_no_output_and_has_default_ratios(
    zoo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = lorazip(capsys, "compress zoo --sweep --dry-run --json")
    assert code == 0
    assert [point["asked"] for point in json.loads(out)["points"]] == [4, 8, 16, 32, 64]
    code, out, _ = lorazip(capsys, "compress zoo --sweep --dry-run --ratios 2")
    assert code == 0 and "mean error, predicted" in out and "written" not in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--sweep", "-o FOLDER"),
        ("--sweep -o f --method svd", "leave --method svd out"),
        ("--sweep -o f --ratio 4", "--ratios"),
        ("--sweep -o f --budget 4000", "--ratios"),
        ("--sweep -o f --max-error 0.1", "--ratios"),
        ("--sweep -o f --resume", "leave --report, --resume out"),
        ("--sweep -o f --report r.html", "leave --report, --resume out"),
        ("--sweep -o f --ratios 4,many", "numbers with commas"),
        ("--sweep -o f --ratios 4,,8", "numbers with commas"),
        ("--sweep -o f --ratios 4,-8", "at least 1"),
        ("--sweep -o f --ratios 0.5,4", "at least 1"),
        ("--sweep -o f --rank 4", "auto decides rank by itself"),
        ("--sweep -o f --tasks t", "--eval MODEL"),
        ("--sweep -o f --eval m", "--tasks"),
        ("--sweep --dry-run --eval m --tasks t", "no bundles to evaluate"),
        ("-o f --ratios 4", "--sweep"),
        ("-o f --eval m --tasks t", "--sweep"),
        ("-o f --tasks t", "--sweep"),
    ],
)
def test_what_makes_no_sense_is_refused(
    zoo: Path, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    code, out, err = lorazip(capsys, f"compress zoo {options}")
    assert code == 2
    assert out == ""
    assert err.startswith("error: ") and message in err
    assert [path.name for path in Path().iterdir()] == ["zoo"]
