"""What is in the way, in use or missing is found before a model is asked, and nothing there is harmed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from moving import Place, run, stopping

from lorazip.errors import InputError, LorazipError, TargetError, UsageError


def test_adapter_with_more_than_factors_is_refused_at_once(place: Place, tmp_path: Path) -> None:
    extra = tmp_path / "extra"
    shutil.copytree(place.adapter, extra)
    from safetensors.torch import load_file, save_file

    factors = load_file(extra / "adapter_model.safetensors")
    save_file(
        factors | {"base_model.model.lm_head.weight": torch.zeros(3, 3)}, extra / "adapter_model.safetensors"
    )
    config = json.loads((extra / "adapter_config.json").read_text()) | {"modules_to_save": ["lm_head"]}
    (extra / "adapter_config.json").write_text(json.dumps(config))
    tables = place.tables()
    tables["source"]["adapter"] = str(extra)
    with pytest.raises(InputError, match="is carried beside the LoRA factors"):
        run(place, tmp_path / "moved", tables=tables, progress=stopping(lambda what, done: True))


def test_adapter_of_another_base_is_refused_before_anything_is_written(place: Place, tmp_path: Path) -> None:
    stranger = tmp_path / "stranger"
    config = json.loads((place.adapter / "adapter_config.json").read_text())
    from safetensors.torch import load_file, save_file

    factors = load_file(place.adapter / "adapter_model.safetensors")
    stranger.mkdir()
    (stranger / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {k: torch.cat([v, v], 1) if ".lora_A" in k else v for k, v in factors.items()},
        stranger / "adapter_model.safetensors",
    )
    tables = place.tables()
    tables["source"]["adapter"] = str(stranger)
    with pytest.raises(InputError, match=r"stranger: model\.layers\.0"):
        run(place, tmp_path / "moved", tables=tables)
    assert not (tmp_path / "moved").exists()


def test_what_exists_is_never_harmed(place: Place, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    for force in (False, True):
        with pytest.raises(TargetError, match="no result of a transfer"):
            run(place, mine, force=force)
    assert (mine / "thesis.txt").read_text() == "years of work"
    run(place, tmp_path / "moved")
    (tmp_path / "moved" / "thesis.txt").write_text("years of work")
    with pytest.raises(TargetError, match=r"holds thesis\.txt, which would be lost"):
        run(place, tmp_path / "moved", force=True)
    assert (tmp_path / "moved" / "thesis.txt").read_text() == "years of work"
    with pytest.raises(UsageError, match="must not lie in --work"):
        run(place, tmp_path / "w" / "moved", work=tmp_path / "w")


def test_killed_while_it_replaces_the_next_run_writes_it(place: Place, tmp_path: Path) -> None:
    run(place, tmp_path / "moved")
    first = (tmp_path / "moved" / "adapter_model.safetensors").read_bytes()
    left = tmp_path / "moved.partial"  # as it lies between the two renames
    (left / "bundle").mkdir(parents=True)
    (left / "bundle" / "adapter_config.json").write_text("{")
    (left / "job.json").write_text('{"job": "transfer"}')
    (tmp_path / "moved").rename(left / "old")
    with pytest.raises(TargetError, match="--force replaces it"):  # the old one is back
        run(place, tmp_path / "moved")
    assert (tmp_path / "moved" / "adapter_model.safetensors").read_bytes() == first
    run(place, tmp_path / "moved", force=True)
    assert (tmp_path / "moved" / "adapter_model.safetensors").read_bytes() == first
    assert not left.exists()


def test_folder_of_stages_is_never_somebody_elses(place: Place, tmp_path: Path) -> None:
    """It is emptied by --purge."""
    mine = tmp_path / "w" / "transfer"
    mine.mkdir(parents=True)
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="is no folder of a transfer"):
        run(place, tmp_path / "moved", work=tmp_path / "w", purge=True)
    assert (mine / "thesis.txt").read_text() == "years of work"
    with pytest.raises(UsageError, match="must not lie in the result"):
        run(place, tmp_path / "moved", work=tmp_path / "moved" / "w")


def test_unfinished_run_of_another_job_is_left_alone(place: Place, tmp_path: Path) -> None:
    left = tmp_path / "moved.partial"
    left.mkdir()
    (left / "job.json").write_text('{"job": "hours of compressing"}')
    (left / "00000.safetensors").write_text("hours of work")
    with pytest.raises(TargetError, match="belongs to a run with other options"):
        run(place, tmp_path / "moved")
    (left / "job.json").unlink()
    for force in (False, True):
        with pytest.raises(TargetError, match="is in the way"):
            run(place, tmp_path / "moved", force=force)
    assert (left / "00000.safetensors").read_text() == "hours of work"


def test_link_stays_and_what_it_names_is_written(place: Place, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "moved").symlink_to(tmp_path / "real")
    for force in (False, True):
        run(place, tmp_path / "moved", force=force)
        assert (tmp_path / "moved").is_symlink() and (tmp_path / "real" / "transfer.json").is_file()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"target": {"chat": True}}, "no chat template"),
        ({"gate": {"tests": "nowhere.jsonl"}}, "nowhere.jsonl"),
        ({"inputs": {"generator": "no-such-model"}}, "no-such-model: does not exist"),
        ({"filter": {"kind": "discriminator", "discriminator": "nothing"}}, "nothing"),
        ({"train": {"modules": ["nope"]}}, "nope: is no linear layer"),
    ],
)
def test_what_is_missing_at_the_end_is_missed_before_a_model_is_asked(
    place: Place, tmp_path: Path, more: dict[str, dict[str, Any]], said: str
) -> None:
    tables = place.tables()
    for name, table in more.items():
        tables[name] = tables[name] | table
    with pytest.raises(LorazipError, match=said):
        run(place, tmp_path / "moved", tables=tables, progress=stopping(lambda what, done: True))
    assert not (tmp_path / "moved").exists()


def test_call_that_cannot_begin_leaves_nothing(place: Place, tmp_path: Path) -> None:
    for section, table in (("inputs", {"seeds": "gone"}), ("source", {"adapter": "gone"})):
        tables = place.tables()
        tables[section] = tables[section] | table
        with pytest.raises(LorazipError, match="gone"):
            run(place, tmp_path / "moved", tables=tables)
    assert list(tmp_path.iterdir()) == []


def test_two_jobs_in_one_folder_do_not_meet(place: Place, tmp_path: Path) -> None:
    from lorazip.files import locked

    (tmp_path / "moved.work").mkdir()
    with locked(tmp_path / "moved.work"), pytest.raises(TargetError, match="another process"):
        run(place, tmp_path / "moved")
