"""The commands: what they print where, their exit codes, and that no error is a traceback."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import MakeAdapter

from lorazip.bundle import Bundle
from lorazip.cli import group, main, render

COMMANDS = ("inspect", "compress", "info", "verify", "export", "add", "remove", "eval", "bench", "transfer")
REQUIRED = {
    "adapters", "modules", "original_bytes", "bundle_bytes", "ratio", "mean_error", "max_error", "fallbacks", "seconds",
    "peak_memory_bytes",
}  # fmt: skip


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Ended]


@pytest.fixture
def lorazip(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process: `lorazip("info", bundle)`."""

    def run(*arguments: str | Path) -> Ended:
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        assert isinstance(end.value.code, int)
        out, err = capsys.readouterr()
        return Ended(end.value.code, out, err)

    return run


@pytest.fixture
def zoo(make_adapter: MakeAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three adapters below the working directory; the path is relative."""
    monkeypatch.chdir(tmp_path)
    make_adapter("zoo/ant")
    make_adapter("zoo/bee", rank=2, dtype=torch.bfloat16)
    make_adapter("zoo/cat", use_rslora=True)
    return Path("zoo")


@pytest.fixture
def team(zoo: Path, lorazip: Run) -> Path:
    """A bundle of them."""
    assert lorazip("compress", zoo, "-o", "team").code == 0
    return Path("team")


def bytes_of(directory: Path, pattern: str = "*") -> int:
    """Every byte of the files below a directory, as `du -b` counts them."""
    return sum(path.stat().st_size for path in directory.rglob(pattern) if path.is_file())


def content(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


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
    assert ended.code == 0 and ended.out.startswith("dog: error ")
    ended = lorazip("remove", team, "dog")
    assert ended.code == 0 and "team: 3 adapters" in ended.out


def test_verify_says_what_it_did_not_compare(zoo: Path, team: Path, lorazip: Run) -> None:
    ended = lorazip("verify", team, "--against", zoo / "bee")
    assert ended.code == 0
    assert "not compared, for their originals are not there: 2 adapters: ant, cat" in ended.out
    assert lorazip("verify", team, "--against", zoo / "bee", "--json").json["not_compared"] == ["ant", "cat"]
    (zoo / "gnu").mkdir()
    (zoo / "gnu" / "adapter_config.json").write_text("{")
    assert lorazip("verify", team, "--against", zoo).code == 2
    ended = lorazip("verify", team, "--against", zoo, "--skip-bad")
    assert ended.code == 0 and "skipped: gnu" in ended.err and "not compared" not in ended.out


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


BAD_VALUES = {
    "compress zoo": "say where to write the bundle: -o BUNDLE",
    "compress -o b": "Missing argument 'PATH...'",
    "compress zoo -o b --method best": "'best' is not one of 'svd', 'jd-full'",
    "compress zoo -o b --rank 0": "rank must be at least 1, not 0",
    "compress zoo -o b --rank many": "'many' is not a valid integer",
    "compress zoo -o b --energy 1.5": "energy must be above 0 and at most 1",
    "compress zoo -o b --energy nan": "energy must be above 0 and at most 1",
    "compress zoo -o b --energy 0.9 --rank 2": "energy decides the rank",
    "compress zoo -o b --max-error 1": "max-error must be at least 0 and below 1",
    "compress zoo -o b --max-error -0.1": "max-error must be at least 0 and below 1",
    "compress zoo -o b --max-error nan": "max-error must be at least 0 and below 1",
    "compress zoo -o b --clusters 0": "clusters must be at least 1",
    "compress zoo -o b --clusters 2 --method svd": "svd shares nothing",
    "compress zoo -o b --weights big": "'big' is not one of 'unit', ",
    "compress zoo -o b --dtype int1": "'int1' is not one of 'float32', 'float16', 'bfloat16'",
    "compress zoo -o b --device gpu": "device 'gpu' is not known (auto, cpu or cuda)",
    "compress zoo -o b --device meta": "device must be auto, cpu or cuda",
    "compress zoo -o b --report zoo": "File 'zoo' is a directory",
    "compress zoo -o b --rnak 3": "No such option '--rnak'",
    "compress nowhere -o b": "nowhere: does not exist",
    "compress empty -o b": "empty: holds no adapter",
    "compress file -o b": "file: is not a directory",
    "compress zoo -o file": "file exists and is not a bundle",
    "compress zoo -o zoo": "zoo exists and is not a bundle",
    "compress zoo -o .": "exists and is not a bundle",
    "compress zoo -o /": "/ exists and is not a bundle",
    "inspect nowhere": "nowhere: does not exist",
    "inspect zoo --device gpu": "device 'gpu' is not known",
    "info nowhere": "nowhere does not exist",
    "verify nowhere": "nowhere does not exist",
    "verify team --against nowhere": "nowhere: does not exist",
    "verify team --device gpu": "device 'gpu' is not known",
    "export nowhere -o out": "nowhere does not exist",
    "export team": "Missing option '-o' / '--output'",
    "export team yak -o out": "team has no adapter 'yak' (it has ant, bee, cat)",
    "export team yak --bundle -o out": "team has no adapter 'yak'",
    "export team ../team -o out": "team has no adapter '../team'",
    "export team -o file": "file",
    "export team --bundle -o zoo": "zoo exists",
    "export team --bundle -o team": "team exists",
    "add nowhere zoo": "nowhere does not exist",
    "add team nowhere": "nowhere: does not exist",
    "add team zoo": "ant: the bundle has an adapter of this name",
    "add team ANT=zoo/ant": "ANT: the bundle has an adapter of this name",
    "add team new=zoo/ant --max-error 2": "max-error must be at least 0 and below 1",
    "add team new=zoo/ant --base org/other": "the bundle's base model is 'org/base', not 'org/other'",
    "remove nowhere ant": "nowhere does not exist",
    "remove team yak": "team has no adapter 'yak'",
    "remove team ant bee cat": "team would have no adapter left",
    "remove team": "Missing argument 'NAME...'",
    "frobnicate": "No such command 'frobnicate'",
}


def test_bad_usage_and_bad_input_end_with_2(team: Path, lorazip: Run) -> None:
    Path("empty").mkdir()
    Path("file").write_text("mine")
    before = content(Path())
    for command, words in BAD_VALUES.items():
        ended = lorazip(*command.split())
        assert ended.code == 2, (command, ended)
        assert words in ended.err, (command, ended.err)
        assert ended.out == "", command
        assert content(Path()) == before, command
    assert not list(Path().glob("*.partial"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["compress zoo -o b", "inspect zoo", "verify team", "add team x=zoo/ant"])
def test_cuda_without_cuda(team: Path, lorazip: Run, command: str) -> None:
    ended = lorazip(*command.split(), "--device", "cuda")
    assert (ended.code, ended.out) == (2, "")
    assert "this torch sees no CUDA device (use --device cpu)" in ended.err


def test_what_is_no_bundle_or_a_damaged_one_ends_with_1(zoo: Path, team: Path, lorazip: Run) -> None:
    Path("empty").mkdir()
    Path("file").write_text("mine")
    for command in ("info {}", "verify {}", "export {} -o out", "add {} zoo", "remove {} ant"):
        for path in ("empty", "file", "zoo"):
            ended = lorazip(*command.format(path).split())
            assert (ended.code, ended.out) == (1, "")
            assert f"error: {path} is not a bundle: bundle.json: " in ended.err
    data = bytearray((team / "adapters" / "bee.safetensors").read_bytes())
    data[-1] ^= 1
    (team / "adapters" / "bee.safetensors").write_bytes(data)
    words = "adapters/bee.safetensors: its sha256 is not the recorded one"
    for command in (
        "verify team",
        "verify team --against zoo",
        "export team -o out",
        "export team --bundle -o out",
    ):
        ended = lorazip(*command.split())
        assert (ended.code, ended.out) == (1, ""), command
        assert words in ended.err
    found = lorazip("verify", team, "--json")
    assert found.code == 1 and found.json["ok"] is False
    assert list(found.json["bundle"]) == ["adapters/bee.safetensors"]
    assert not Path("out").exists()
    assert lorazip("export", team, "ant", "-o", "out").code == 0  # whose bytes are good
    assert lorazip("remove", team, "bee").code == 0
    assert lorazip("verify", team).code == 0


def test_errors_that_nobody_foresaw_are_no_tracebacks(team: Path, lorazip: Run) -> None:
    (team / "adapters" / "ant.safetensors").unlink()
    (team / "adapters" / "ant.safetensors").mkdir()
    ended = lorazip("remove", team, "ant")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == "error: [Errno 21] Is a directory: 'team/adapters/ant.safetensors'\n"
    assert lorazip("verify", team).code == 0  # which is without ant already


def test_what_cannot_be_decided_ends_with_3(zoo: Path, lorazip: Run) -> None:
    ended = lorazip("compress", zoo, "-o", "team", "--method", "eigenlora", "--energy", "0.999")
    assert (ended.code, ended.out) == (3, "")
    assert "model.layers.0.self_attn.k_proj: no number of principal directions holds 0.999" in ended.err
    # It would fail again: nothing is left that the next attempt would have to be forced over.
    assert not Path("team.partial").exists()
    assert lorazip("compress", zoo, "-o", "team", "--method", "eigenlora", "--rank", "2").code == 0


def test_values_that_do_not_fit_the_dtype_end_with_2(
    make_adapter: MakeAdapter, zoo: Path, lorazip: Run
) -> None:
    make_adapter("zoo/big", alpha=4e6)
    make_adapter("zoo/big", alpha=4e6, tensors={
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.full((4, 24), 1e30),
    })  # fmt: skip
    ended = lorazip("compress", zoo, "--method", "svd", "-o", "team")
    assert (ended.code, ended.out) == (2, "")
    assert "model.layers.0.self_attn.q_proj: a value of" in ended.err and "--dtype bfloat16" in ended.err
    assert lorazip("compress", zoo, "--method", "svd", "-o", "team", "--dtype", "bfloat16").code == 0


def test_all_defects_are_listed_before_anything_is_written(
    make_adapter: MakeAdapter, zoo: Path, lorazip: Run
) -> None:
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    make_adapter("zoo/dud", tensors={key: torch.full((4, 24), torch.nan)})
    make_adapter("zoo/elk", base_model_name_or_path="org/other")
    make_adapter("zoo/fox", tensors={key: None})
    (zoo / "gnu").mkdir()
    (zoo / "gnu" / "adapter_config.json").write_text("{")
    ended = lorazip("compress", zoo, "-o", "team")
    assert (ended.code, ended.out) == (2, "")
    for name, words in (
        ("dud", "NaN"),
        ("elk", "its base is org/other"),
        ("fox", "lora_A.weight is missing"),
        ("gnu", "not JSON"),
    ):
        assert any(name in line and words in line for line in ended.err.splitlines()), (name, ended.err)
    assert not Path("team").exists() and not Path("team.partial").exists()
    found = lorazip("inspect", zoo, "--json")
    assert found.code == 1
    assert [row["adapter"] for row in found.json["refused"]] == ["dud", "elk", "fox", "gnu", "gnu"]
    assert [row["name"] for row in found.json["adapters"]] == ["ant", "bee", "cat"]

    ended = lorazip("compress", zoo, "-o", "team", "--skip-bad")
    assert ended.code == 0
    assert [line for line in ended.err.splitlines() if line.startswith("skipped: elk: its base")]
    manifest = Bundle.open("team").manifest
    assert [a.name for a in manifest.adapters] == ["ant", "bee", "cat"]
    assert {line.split(":")[0] for line in manifest.skipped} == {"dud", "elk", "fox", "gnu"}
    assert "skipped when it was made: elk" in lorazip("info", "team").out
    assert len(lorazip("info", "team", "--json").json["skipped"]) == 5
    found = lorazip("compress", zoo, "-o", "team3", "--skip-bad", "--json")
    assert len(found.json["skipped"]) == 5


def test_what_is_wrong_with_every_module_is_told_once(
    make_adapter: MakeAdapter, zoo: Path, lorazip: Run
) -> None:
    make_adapter("zoo/elk", use_dora=True)  # without magnitudes, in six modules
    ended = lorazip("compress", zoo, "-o", "team")
    lines = [line for line in ended.err.splitlines() if "elk" in line]
    assert ended.code == 2 and len(lines) == 2
    assert "the magnitude vector is missing" in lines[0] and lines[1].endswith("elk: 5 more like it")


def test_only_bad_adapters_cannot_be_skipped(make_adapter: MakeAdapter, zoo: Path, lorazip: Run) -> None:
    (zoo / "gnu").mkdir()
    (zoo / "gnu" / "adapter_config.json").write_text("{")
    ended = lorazip("compress", zoo / "gnu", "-o", "team", "--skip-bad")
    assert (ended.code, ended.out) == (2, "")
    assert lorazip("inspect", zoo / "gnu").code == 2


def test_bases_that_differ_need_base(make_adapter: MakeAdapter, zoo: Path, lorazip: Run) -> None:
    make_adapter("zoo/elk", base_model_name_or_path="./copy-of-base")
    assert lorazip("compress", zoo, "-o", "team").code == 2
    assert lorazip("compress", zoo, "-o", "team", "--base", "org/base").code == 0
    assert Bundle.open("team").manifest.base == "org/base"
    # Every adapter keeps its own config, so verify and export speak of what was there.
    assert Bundle.open("team").adapter("elk").config["base_model_name_or_path"] == "./copy-of-base"
    assert lorazip("verify", "team", "--against", zoo).code == 0


def test_report(zoo: Path, lorazip: Run) -> None:
    ended = lorazip("compress", zoo, "-o", "team", "--report", "report.html", "--json")
    assert ended.code == 0 and ended.json["adapters"] == 3
    page = Path("report.html").read_text()
    assert page.startswith("<!") and "ant" in page
    Path("file").write_text("mine")
    for target in ("file/report.html", "/proc/report.html"):
        ended = lorazip("compress", zoo, "--dry-run", "--report", target)
        assert (ended.code, ended.out) == (2, "")
        assert f"{target} cannot be written" in ended.err


def test_names_of_all_scripts(make_adapter: MakeAdapter, zoo: Path, lorazip: Run, tmp_path: Path) -> None:
    for name in ("größe", "顧客-7", "Δx ½", "-".join("ab")):
        make_adapter(f"zoo/{name}")
    out = Path("büro/顧客 bundle")
    ended = lorazip("compress", zoo, "-o", out, "--json")
    assert ended.code == 0
    assert Bundle.open(out).names == sorted(["ant", "bee", "cat", "größe", "顧客-7", "Δx ½", "a-b"])
    assert lorazip("verify", out, "--against", zoo).code == 0
    ended = lorazip("export", out, "顧客-7", "größe", "-o", "peft-ü")
    assert ended.code == 0 and "顧客-7: peft-ü/顧客-7" in ended.out
    assert lorazip("remove", out, "größe").code == 0
    assert lorazip("add", out, "peft-ü/größe").code == 0
    assert "größe" in lorazip("info", out).out


@pytest.mark.parametrize(
    "output", ["team", "team/", "./team", "deep/er/team", "sub/../team", "{}/abs", "{}/abs/"]
)
def test_output_paths(zoo: Path, lorazip: Run, tmp_path: Path, output: str) -> None:
    (tmp_path / "sub").mkdir()
    output = output.format(tmp_path)
    assert lorazip("compress", zoo, "-o", output).code == 0
    assert lorazip("verify", output).code == 0
    assert not list(tmp_path.rglob("*.partial"))
    assert lorazip("export", output, "ant", "-o", "peft/").code == 0
    assert sorted(p.name for p in Path("peft").iterdir()) == ["ant"]
    assert lorazip("export", output, "ant", "--bundle", "-o", "small/").code == 0


def test_an_empty_directory_or_a_link_to_one_may_be_the_output(zoo: Path, lorazip: Run) -> None:
    Path("empty").mkdir()
    assert lorazip("compress", zoo, "-o", "empty").code == 0
    Path("real").mkdir()
    for link, target in (("link", "real"), ("dangling", "later")):
        Path(link).symlink_to(target)
        assert lorazip("compress", zoo, "-o", link).code == 0
        assert Path(link).is_symlink() and content(Path(target)) == content(Path("empty"))
    Path("real2").mkdir()
    Path("link2").symlink_to("real2")
    assert lorazip("export", "empty", "--bundle", "-o", "link2").code == 0
    assert Path("link2").is_symlink() and Bundle.open("real2").verify() == []
    Path("here").mkdir()
    os.chdir("here")
    assert lorazip("compress", "../zoo", "-o", ".").code == 0
    os.chdir("..")
    assert content(Path("here")) == content(Path("empty"))


@pytest.mark.parametrize(
    "options",
    [["--max-error", "0.3"], ["--method", "jd-full", "--max-error", "0.3", "--clusters", "2"]],
    ids=["auto", "jd-full"],
)
def test_the_same_inputs_give_the_same_bytes(
    zoo: Path, lorazip: Run, tmp_path: Path, options: list[str]
) -> None:
    assert lorazip("compress", zoo, "-o", "first", *options).code == 0
    expected = content(Path("first"))
    copy = tmp_path / "elsewhere" / "deep"
    shutil.copytree(zoo, copy, copy_function=shutil.copy)  # new times
    Path("list.txt").write_text("zoo/cat\nzoo/bee\nzoo/ant\n")
    for number, paths in enumerate((
        [zoo],
        [zoo / "cat", zoo / "ant", zoo / "bee"],
        [copy],
        ["zoo/*", "zoo/bee"],
        ["@list.txt"],
        ["ant=elsewhere/deep/ant", "zoo/[bc]*"],
    )):  # fmt: skip
        assert lorazip("compress", *paths, "-o", f"again{number}", *options, "--device", "cpu").code == 0
        assert content(Path(f"again{number}")) == expected, paths


def test_the_manifest_tells_nothing_about_the_machine(
    make_adapter: MakeAdapter, zoo: Path, lorazip: Run, tmp_path: Path
) -> None:
    (zoo / "gnu").mkdir()
    (zoo / "gnu" / "adapter_config.json").write_text("{")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_model.bin").write_bytes(b"pickle")
    arguments = [tmp_path / "zoo", tmp_path / "broken", tmp_path / "nowhere"]
    assert lorazip("compress", *arguments, "-o", "team", "--skip-bad").code == 0
    manifest = Bundle.open("team").manifest
    assert {line.split(":")[0] for line in manifest.skipped} == {"gnu", "broken", "nowhere"}
    text = (Path("team") / "bundle.json").read_text()
    for secret in (
        str(tmp_path),
        tmp_path.name,
        "/tmp",
        "--skip-bad",
        "skip_bad",
        os.uname().nodename,
        "device",
    ):
        assert secret not in text, secret
    assert not re.search(r"\b20\d\d-\d\d|\d\d:\d\d", text)
    assert "save_pretrained" not in text  # advice to whoever made the bundle is not for its readers
    assert str(tmp_path) not in (Path("team") / "README.md").read_text()


def test_json_that_goes_into_a_pipe_which_closes(team: Path) -> None:
    """`lorazip info team | head -0` is no traceback."""
    with subprocess.Popen(
        [sys.executable, "-m", "lorazip", "info", str(team)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as run:
        assert run.stdout is not None and run.stderr is not None
        run.stdout.close()
        assert run.stderr.read() == b""
