"""The gate of an evaluation, by the command line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from evaluating import NAMES, N, command, evaluate

import lorazip
from lorazip import base as bases
from lorazip.errors import CheckError, InputError


def test_gate_passes(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = command(
        world, "-o", tmp_path / "out", "--min-retention", "0.9", "--max-drop", "0.05", bundles=["whole"]
    )
    out = capsys.readouterr().out
    assert code == 0
    assert "gate: whole: keep at least 90 %: kept 100.0" in out and out.count("-> pass") == 2
    assert "gate: pass\n" in out and "8 canaries" in out
    assert tiny.json_of(tmp_path / "out" / "results.json")["gate"]["verdict"] == "pass"


def test_gate_fails_if_one_bundle_does(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = command(world, "-o", tmp_path / "out", "--min-retention", "0.9")
    out = capsys.readouterr().out
    assert code == 1
    assert re.search(r"gate: poor: keep at least 90 %: kept .* -> fail\n", out) and "gate: fail\n" in out
    assert tiny.json_of(tmp_path / "out" / "results.json")["gate"]["verdict"] == "fail"


def test_gate_says_how_many_examples_it_needs(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--min-retention", "0.9", "--limit", "3"]
    code = command(world, "-o", tmp_path / "out", *options, bundles=["whole"])
    out = capsys.readouterr().out
    assert code == 3
    needed = re.search(r"-> undecided; about (\d+) examples in all would decide\n", out)
    assert needed is not None and "gate: undecided\n" in out
    (check,) = tiny.json_of(tmp_path / "out" / "results.json")["gate"]["checks"]
    assert check["examples_needed"] == int(needed[1]) > check["value"]["n"] == 12
    # With so many it does decide; and by the estimate alone it passes at once.
    each = -(-int(needed[1]) // len(NAMES))
    assert (
        command(world, "-o", tmp_path / "more", *options[:2], "--limit", min(2 * each, N), bundles=["whole"])
        == 0
    )
    assert command(world, "-o", tmp_path / "point", *options, "--point", bundles=["whole"]) == 0


def test_a_gate_with_nothing_to_compare_is_refused(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(world, "-o", tmp_path / "out", "--min-retention", "0.9", bundles=[]) == 2
    assert "error: the gate has nothing to compare" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_bundle_of_other_adapters_under_these_names_is_found(world: Path, tmp_path: Path) -> None:
    """All checksums are right, and every adapter acts as its factors say: they are the wrong ones."""
    one, two = NAMES[:2]
    swapped = [f"{one}={world / 'zoo' / two}", f"{two}={world / 'zoo' / one}"]
    lorazip.compress([*swapped], lorazip.Spec("svd", rank=2), tmp_path / "swapped")
    with pytest.raises(CheckError, match=f"swapped/{one}: .*made from another adapter"):
        evaluate(world, bundles=[tmp_path / "swapped"])


def test_a_tokenizer_of_another_model_is_found(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "base", tmp_path / "base")
    config = tiny.json_of(tmp_path / "base" / "config.json")
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"vocab_size": 5}))
    with pytest.raises(InputError, match="has fewer tokens than its tokenizer uses"):
        evaluate(world, base=tmp_path / "base")


def test_a_path_that_is_no_text_can_be_recorded(world: Path, tmp_path: Path) -> None:
    odd = tmp_path / "t\udcff"
    shutil.copytree(world / "tasks", odd)
    evaluate(world, tasks=[str(odd)], output=tmp_path / "out")
    assert tiny.json_of(tmp_path / "out" / "results.json")["settings"]["tasks"] == [str(odd)]


def test_json_is_the_file(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(world, "-o", tmp_path / "out", "--json") == 0
    assert json.loads(capsys.readouterr().out) == tiny.json_of(tmp_path / "out" / "results.json")


@pytest.mark.parametrize(("options", "code", "message"), [
    (["--limit", "0"], 2, "--limit must be at least 1"),
    (["--min-retention", "0"], 2, "--min-retention"),
    (["--template", "none"], 2, "{input}"),
    (["--chat"], 2, "chat template"),
    (["--drift", "owl"], 2, "owl: is no task"),
    (["--device", "cuda:7"], 2, "no CUDA device"),
    (["--split", "dev"], 2, "no examples of the split"),
    (["--shots", "3"], 2, "has 2 examples to show, not 3"),
])  # fmt: skip
def test_what_cannot_be_done_is_said_before_a_model_is_loaded(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    options: list[str], code: int, message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(bases, "load", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command(world, "-o", tmp_path / "out", "--cache", tmp_path / "cache", *options) == code
    found = capsys.readouterr().err
    assert message in found and found.startswith("error: ") and "not foreseen" not in found
    assert not (tmp_path / "out").exists()
