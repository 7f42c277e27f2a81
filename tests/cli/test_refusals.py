"""What ends a command with another exit code than 0, in words and never as a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commandline import Run, content
from handmade import MakeAdapter

from lorazip.bundle import Bundle

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
