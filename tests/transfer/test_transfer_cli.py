"""`lorazip transfer` as a command: what it says, what it needs, what it leaves."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from moving import SETTINGS, Place, refusing, run

import lorazip
from lorazip.cli import main
from lorazip.transfer import assess
from lorazip.transfer.move import STAGES


def test_probe_says_what_a_transfer_could_not(place: Place, tmp_path: Path) -> None:
    tables = place.tables(train=SETTINGS["train"] | {"modules": ["nope"]})
    (moved,) = run(place, tmp_path / "moved", tables=tables, until="probe")
    assert moved.error is None and "advised" in moved.stages["probe"]


def test_command_says_what_it_did(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "move.toml"
    recipe.write_text(
        f"""
[source]
base = "{place.source}"
adapter = "{place.adapter}"
template = "{{input}}="
[target]
base = "{os.path.relpath(place.target, tmp_path)}"
[inputs]
seeds = "{place.seeds}"
count = 72
[filter]
kind = "none"
[train]
epochs = 3
learning_rates = [1e-2]
batch = 2
modules = ["down_proj", "up_proj", "gate_proj", "o_proj"]
"""
    )
    with pytest.raises(SystemExit) as done:
        main(["transfer", "validate", str(recipe)])
    assert done.value.code == 0 and "valid, 1 transfer" in capsys.readouterr().out
    arguments = ["--recipe", str(recipe), "-o", str(tmp_path / "moved"), "--backend", "hf"]
    for stage in STAGES[:-1]:
        with pytest.raises(SystemExit) as done:
            main(["transfer", stage, *arguments])
        said = capsys.readouterr()
        assert done.value.code == 0, said.err
        assert "ant:" in said.out
    with pytest.raises(SystemExit) as done:
        main(["transfer", "run", *arguments, "--accept-worse", "--purge"])
    said = capsys.readouterr()
    assert done.value.code == 0, said.err
    for part in ("inputs: 72 kept", "leak check", "answers:", "training:", "agreement %", "written:"):
        assert part in said.out
    assert not (tmp_path / "moved.work").exists() and (tmp_path / "moved").is_dir()


def test_command_shows_what_was_refused(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assess, "judge", refusing(assess.judge))
    recipe = tmp_path / "move.toml"
    recipe.write_text("".join(f"[{name}]\n{lines(table)}" for name, table in place.tables().items()))
    arguments = ["transfer", "run", "--recipe", str(recipe), "-o", str(tmp_path / "moved"), "--backend", "hf"]
    for more in ([], ["--json"]):
        with pytest.raises(SystemExit) as done:
            main([*arguments, *more])
        said = capsys.readouterr()
        assert done.value.code == 1 and "refused: it is a test" in said.err
        assert "transferred" in said.out and "  written:" not in said.out
    (found,) = json.loads(said.out)
    assert found["gate"]["refused"] == "it is a test" and "refused" in found["error"]


def lines(table: dict[str, Any]) -> str:
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())


def test_probe_needs_no_inputs(place: Place, tmp_path: Path) -> None:
    arguments = ["--adapter", place.adapter, "--source-base", place.source, "--target-base", place.target]
    with pytest.raises(SystemExit) as done:
        main(["transfer", "probe", *map(str, arguments), "-o", str(tmp_path / "moved"), "--backend", "hf"])
    assert done.value.code == 0


def test_compress_does_not_take_what_a_transfer_left(place: Place, tmp_path: Path) -> None:
    run(place, tmp_path / "all" / "moved")
    assert (tmp_path / "all" / "moved.work").is_dir()
    assert [one.name for one in lorazip.open_adapters([str(tmp_path / "all")]).adapters] == ["moved"]
