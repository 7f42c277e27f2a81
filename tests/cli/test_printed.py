"""What the commands print where, as JSON and for people."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commandline import Run, bytes_of, content
from handmade import MakeAdapter

from lorazip.cli import group, render

COMMANDS = ("inspect", "compress", "info", "verify", "export", "add", "remove", "eval", "bench", "transfer")
REQUIRED = {
    "adapters", "modules", "original_bytes", "bundle_bytes", "ratio", "mean_error", "max_error", "fallbacks", "seconds",
    "peak_memory_bytes",
}  # fmt: skip


def test_compress_prints_the_figures(zoo: Path, lorazip: Run) -> None:
    (zoo / "ant" / "README.md").write_text("a card, which is not compressed and not counted")
    ended = lorazip("compress", zoo, "-o", "team", "--max-error", "0.2", "--json")
    assert ended.code == 0
    found = ended.json
    assert set(found) >= REQUIRED
    assert found["adapters"] == 3
    assert found["modules"] == 6
    assert found["original_bytes"] == bytes_of(zoo, "adapter_*")
    assert found["bundle_bytes"] == bytes_of(Path("team"))
    assert found["ratio"] == found["original_bytes"] / found["bundle_bytes"]
    assert 0 < found["mean_error"] <= found["max_error"] <= 0.2
    assert type(found["fallbacks"]) is int
    assert 0 < found["seconds"] < 60
    assert 10 * 2**20 < found["peak_memory_bytes"] < 2**36
    assert found["skipped"] == []
    table = lorazip("compress", zoo, "-o", "team2", "--max-error", "0.2")
    assert (table.code, table.err) == (0, "")
    assert "3 adapters, 6 modules" in table.out
    assert f"{found['max_error']:.4f}" in table.out


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "jd-full"],
        ["--method", "svd"],
        ["--method", "svd", "--rank", "1", "--dtype", "float32"],
        ["--method", "jd-full", "--max-error", "0.05", "--dtype", "bfloat16"],
        ["--method", "jd-diag", "--rank", "3", "--clusters", "2"],
        ["--method", "mean"],
        ["--method", "eigenlora", "--rank", "2", "--weights", "trained"],
    ],
    ids=" ".join,
)
def test_a_dry_run_writes_nothing_and_foretells_every_byte(
    zoo: Path, lorazip: Run, options: list[str]
) -> None:
    before = content(Path())
    dry = lorazip("compress", zoo, "-o", "team", "--dry-run", "--json", *options)
    bare = lorazip("compress", zoo, "--dry-run", "--json", *options)
    assert content(Path()) == before
    assert not Path("team.partial").exists()
    real = lorazip("compress", zoo, "-o", "team", "--json", *options)
    assert bytes_of(Path("team")) == real.json["bundle_bytes"]
    for ended in (dry, bare):
        assert {k: v for k, v in ended.json.items() if k not in ("seconds", "peak_memory_bytes")} == {
            k: v for k, v in real.json.items() if k not in ("seconds", "peak_memory_bytes")
        }


def test_a_dry_run_of_the_default_predicts_and_says_so(zoo: Path, lorazip: Run) -> None:
    before = content(Path())
    dry = lorazip("compress", zoo, "-o", "team", "--dry-run", "--json").json
    table = lorazip("compress", zoo, "--dry-run").out
    assert content(Path()) == before
    real = lorazip("compress", zoo, "-o", "team", "--json").json
    assert (dry["predicted"], real["predicted"]) == (True, False)
    assert real["options"]["method"] == "auto" and real["options"]["max_error"] == 0.1
    assert 0 < real["max_error"] <= 0.1
    assert dry["options"] == real["options"]
    assert dry["bundle_bytes"] == pytest.approx(real["bundle_bytes"], rel=0.1)  # few short rows: no averages
    assert "predicted error: mean" in table
    assert "predicted" not in lorazip("compress", zoo, "-o", "again").out


def test_every_command_prints_json(zoo: Path, team: Path, lorazip: Run) -> None:
    found = lorazip("info", team, "--json").json
    assert found["bundle_bytes"] == bytes_of(team)
    assert found["original_bytes"] == bytes_of(zoo)
    assert [row["name"] for row in found["per_adapter"]] == ["ant", "bee", "cat"]
    assert [row["bytes"] for row in found["per_adapter"]] == [
        (team / "adapters" / f"{name}.safetensors").stat().st_size for name in ("ant", "bee", "cat")
    ]
    assert [row["original_bytes"] for row in found["per_adapter"]] == [
        bytes_of(zoo / name) for name in ("ant", "bee", "cat")
    ]
    assert found["options"]["method"] == "auto" and found["options"]["max_error"] == 0.1

    found = lorazip("verify", team, "--against", zoo, "--json").json
    assert found["ok"] is True and found["bundle"] == {} and found["strays"] == []
    assert [row["name"] for row in found["adapters"]] == ["ant", "bee", "cat"]
    assert all(row["problems"] == [] for row in found["adapters"])

    found = lorazip("inspect", zoo, "--json").json
    assert [(row["name"], row["ranks"], row["dtypes"]) for row in found["adapters"]] == [
        ("ant", {"4": 6}, ["float32"]),
        ("bee", {"2": 6}, ["bfloat16"]),
        ("cat", {"4": 6}, ["float32"]),
    ]
    assert found["refused"] == [] and found["shared_init_groups"] == []
    assert all(0.99 < row["energy_by_rank"]["8"] <= 1.001 for row in found["adapters"])

    found = lorazip("export", team, "bee", "-o", "peft", "--json").json
    assert found == {"exported": [{"name": "bee", "path": "peft/bee", "rank": 2}], "pushed": None}
    found = lorazip("export", team, "bee", "cat", "--bundle", "-o", "sub", "--json").json
    assert [row["name"] for row in found["exported"]] == ["bee", "cat"]

    found = lorazip("add", team, "dog=peft/bee", "--json").json
    assert found["bundle_bytes"] == bytes_of(team)
    assert [row["name"] for row in found["added"]] == ["dog"]
    assert found["added"][0]["bytes"] == (team / "adapters" / "dog.safetensors").stat().st_size

    found = lorazip("remove", team, "ant", "dog", "--json").json
    assert found == {
        "removed": ["ant", "dog"],
        "adapters": ["bee", "cat"],
        "bundle_bytes": bytes_of(team),
    }


def test_every_command_prints_for_people(zoo: Path, team: Path, lorazip: Run) -> None:
    ended = lorazip("info", team)
    assert ended.code == 0 and "3 adapters of org/base" in ended.out and "auto" in ended.out
    ended = lorazip("verify", team)
    assert ended.code == 0 and f"ok, 3 adapters, {bytes_of(team)} bytes checked" in ended.out
    ended = lorazip("verify", team, "--against", zoo)
    assert ended.code == 0 and ended.out.count(" ok") == 4
    ended = lorazip("inspect", zoo)
    assert ended.code == 0 and "bfloat16" in ended.out
    ended = lorazip("export", team, "-o", "peft")
    assert ended.code == 0 and "bee: peft/bee (rank 2)" in ended.out
    ended = lorazip("add", team, "dog=peft/bee")
    assert ended.code == 0 and ended.out.startswith("dog: error ") and "own factors" not in ended.out
    ended = lorazip("remove", team, "dog")
    assert ended.code == 0 and "team: 3 adapters" in ended.out


def test_add_says_where_the_bases_are_not_used(zoo: Path, lorazip: Run) -> None:
    assert lorazip("compress", zoo, "-o", "shared", "--method", "jd-full", "--rank", "2").code == 0
    ended = lorazip("add", "shared", "dog=zoo/ant", "--max-error", "0")
    assert ended.code == 0 and ended.out.endswith(
        "; 6 modules of adapters with own factors beside the bases\n"
    )


def test_verify_says_what_it_did_not_compare(zoo: Path, team: Path, lorazip: Run) -> None:
    ended = lorazip("verify", team, "--against", zoo / "bee")
    assert ended.code == 0
    assert "not compared, for their originals are not there: ant, cat\n" in ended.out
    assert lorazip("verify", team, "--against", zoo / "bee", "--json").json["not_compared"] == ["ant", "cat"]
    (zoo / "gnu").mkdir()
    (zoo / "gnu" / "adapter_config.json").write_text("{")
    assert lorazip("verify", team, "--against", zoo).code == 2
    ended = lorazip("verify", team, "--against", zoo, "--skip-bad")
    assert ended.code == 0 and "skipped: gnu" in ended.err and "not compared" not in ended.out


def test_verify_says_which_originals_are_not_in_the_bundle(zoo: Path, team: Path, lorazip: Run) -> None:
    assert lorazip("remove", team, "bee").code == 0
    ended = lorazip("verify", team, "--against", zoo)
    assert ended.code == 1 and ended.err.endswith("team: it does not hold bee\n")
    (zoo / "ant" / "adapter_model.safetensors").write_bytes(
        (zoo / "cat" / "adapter_model.safetensors").read_bytes()
    )
    ended = lorazip("verify", team, "--against", zoo)
    assert ended.code == 1 and ended.err.endswith("team: 1 adapter not as recorded; it does not hold bee\n")


def test_what_is_lost_and_what_is_carried_is_named(
    zoo: Path, make_adapter: MakeAdapter, lorazip: Run
) -> None:
    key = "base_model.model.score.weight"
    make_adapter("zoo/dog", modules_to_save=["score"], tensors={key: torch.ones(500, 2)})
    ended = lorazip("compress", zoo, "-o", "all", "--ratio", "1.5", "--report", "page.html")
    assert ended.code == 0 and "carried as it is, 4.00 kB: tensors of dog\n" in ended.out
    assert "no better than nothing" not in ended.out and ended.out.endswith("all, page.html\n")
    assert "carried as they are: 1 tensor, 4.00 kB\n" in lorazip("info", "all").out
    make_adapter("zeros/a", modules={"m": (2000, 2000)})
    ended = lorazip("compress", "zeros", "-o", "gone", "--ratio", "40")
    assert ended.code == 0 and "no better than nothing, with an error of 1 or more: a\n" in ended.out
    ended = lorazip("export", "gone", "-o", "peft")
    assert ended.out == "a: peft/a (rank 1)\n"  # PEFT has no rank 0
    assert json.loads(Path("peft/a/adapter_config.json").read_text())["r"] == 1


def test_info_of_an_adapter_says_what_would_help(zoo: Path, lorazip: Run) -> None:
    ended = lorazip("info", zoo / "ant")
    assert ended.code == 2 and "is a PEFT adapter, not a bundle (see lorazip inspect)" in ended.err


def test_progress_goes_to_stderr_with_rate_and_remaining_time(
    zoo: Path, lorazip: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render, "SECONDS", 0.0)
    told = ""
    for method in (
        "auto",
        "jd-full",
    ):  # auto tells of bunches of modules: how many there are is not said here
        ended = lorazip("compress", zoo, "-o", method, "--method", method, "--json")
        assert ended.json["adapters"] == 3
        told += (
            ended.err if method == "jd-full" else re.sub(r"(reading|compressing|writing): .*", "", ended.err)
        )
    for what, total in (("reading", 3), ("choosing", 6), ("compressing", 6), ("writing", 3)):
        lines = [line for line in told.splitlines() if line.startswith(what)]
        assert len(lines) == total - 1  # the first step starts the clock
        rates = [re.fullmatch(rf"{what}: (\d)/{total}, ([\d.]+)/s, [\d.]+ s left", line) for line in lines]
        assert [int(rate[1]) for rate in rates if rate] == list(range(2, total + 1))
        assert all(1 < float(rate[2]) < 1e6 for rate in rates if rate)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_ends_with_an_example(command: str, lorazip: Run) -> None:
    ended = lorazip(command, "--help")
    assert ended.code == 0
    last = " ".join(ended.out.rstrip().split("\n\n")[-1].split())
    assert last.startswith(f"Example: lorazip {command} ")
    assert set(COMMANDS) == set(group.commands)


def test_json_that_goes_into_a_pipe_which_closes(team: Path) -> None:
    """`lorazip info team | head -0` is no traceback."""
    with subprocess.Popen(
        [sys.executable, "-m", "lorazip", "info", str(team)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as run:
        assert run.stdout is not None and run.stderr is not None
        run.stdout.close()
        assert run.stderr.read() == b""
