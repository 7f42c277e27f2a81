"""Training that was killed goes on to what the whole one comes to."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from distilling import ENDING, HELD_OUT, SPEC, TRAIN, Whole, assert_same

from lorazip.transfer import distill
from lorazip.transfer.distill import Fitted
from lorazip.transfer.recipe import Training
from lorazip.transfer.slots import Shape

pytestmark = pytest.mark.usefixtures("quick")


class Killer:
    """Progress that is killed at one step, and keeps what it was told."""

    def __init__(self, what: str = "", at: int = -1):
        self.what, self.at, self.told = what, at, list[tuple[str, int, int]]()

    def __call__(self, what: str, done: int, total: int) -> None:
        self.told.append((what, done, total))
        if (what, done) == (self.what, self.at):
            raise KeyboardInterrupt


SEARCHED = replace(SPEC, epochs=4, learning_rates=(1e-3, 1e-2), search_epochs=2)  # 3 steps an epoch


def killed(fit: Callable[..., Fitted], spec: Training, what: str, at: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        fit("killed", spec, progress=Killer(what, at))


@pytest.mark.parametrize(
    ("what", "at", "goes_on"),
    [("searching", 2, 1), ("searching", 5, 4), ("training", 1, 1), ("training", 8, 7), ("training", 12, 10)],
)
def test_killed_fit_goes_on_to_the_same(
    fit: Callable[..., Fitted], whole: Whole, tmp_path: Path, what: str, at: int, goes_on: int
) -> None:
    folder, expected = whole(SEARCHED)
    killed(fit, SEARCHED, what, at)
    assert not (tmp_path / "killed" / "adapter").exists()
    seen = Killer()
    found = fit("killed", SEARCHED, progress=seen)
    assert_same(tmp_path / "killed", folder)
    assert replace(found, seconds=0) == replace(expected, seconds=0)
    own = [done for kind, done, _ in seen.told if kind == what]
    assert own[0] == goes_on  # no finished epoch is repeated
    if what == "training":
        assert not any(kind == "searching" for kind, *_ in seen.told)


def test_killed_while_a_checkpoint_was_written(
    fit: Callable[..., Fitted], whole: Whole, tmp_path: Path
) -> None:
    folder, _ = whole(SPEC)
    killed(fit, SPEC, "training", 8)
    last = tmp_path / "killed" / "run" / "checkpoint-6"
    (last / "trainer_state.json").unlink()  # what is written last
    seen = Killer()
    fit("killed", SPEC, progress=seen)
    assert seen.told[0] == ("training", 4, 9)
    assert_same(tmp_path / "killed", folder)
    shutil.rmtree(tmp_path / "killed")
    killed(fit, SPEC, "training", 5)
    (tmp_path / "killed" / "run" / "checkpoint-3" / "trainer_state.json").write_text('{"epoch": 1')
    fit("killed", SPEC)
    assert_same(tmp_path / "killed", folder)


@pytest.mark.parametrize("patience", [1, 2])
def test_killed_fit_ends_when_the_whole_one_does(
    fit: Callable[..., Fitted], whole: Whole, tmp_path: Path, patience: int
) -> None:
    spec = replace(ENDING, patience=patience)
    folder, expected = whole(spec)
    killed(fit, spec, "training", expected.steps - 1)  # within the last epoch: those before it are counted on
    found = fit("killed", spec)
    assert replace(found, seconds=0) == replace(expected, seconds=0)
    assert_same(tmp_path / "killed", folder)


@pytest.fixture
def unsaved(
    fit: Callable[..., Fitted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """The folder of a fit that was killed when it had only to be saved."""

    def kill(*told: Any) -> None:
        raise KeyboardInterrupt

    def unsaved(before: str = "_save") -> Path:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(distill, before, kill)
            fit("killed", ENDING)
        return tmp_path / "killed"

    return unsaved


@pytest.mark.parametrize("before", ["_save", "write_bytes"])
def test_killed_before_it_was_saved(
    fit: Callable[..., Fitted], whole: Whole, unsaved: Callable[..., Path], before: str
) -> None:
    left = unsaved(before)
    seen = Killer()
    found = fit("killed", ENDING, progress=seen)
    folder, expected = whole(ENDING)
    assert seen.told == []
    assert replace(found, seconds=0) == replace(expected, seconds=0)
    assert_same(left, folder)


def test_killed_fit_in_a_folder_that_was_moved_saves_its_best(
    fit: Callable[..., Fitted], whole: Whole, unsaved: Callable[..., Path], tmp_path: Path
) -> None:
    """The Trainer knows the best checkpoint by its path; nothing is left to be trained."""
    unsaved().rename(tmp_path / "elsewhere")
    folder, expected = whole(ENDING)
    assert expected.best < len(expected.errors) - 1
    assert replace(fit("elsewhere", ENDING), seconds=0) == replace(expected, seconds=0)
    assert_same(tmp_path / "elsewhere", folder)


def test_killed_fit_whose_best_is_gone_begins_anew(
    fit: Callable[..., Fitted], whole: Whole, unsaved: Callable[..., Path]
) -> None:
    left = unsaved()
    best, _ = sorted((left / "run").glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    shutil.rmtree(best)
    fit("killed", ENDING)
    folder, _ = whole(ENDING)
    assert_same(left, folder)


def test_time_of_all_parts_is_counted(fit: Callable[..., Fitted], monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on ten seconds a look, and is looked at before training and after every evaluation."""
    ticks = iter(range(0, 10**6, 10))
    monkeypatch.setattr(time, "monotonic", lambda: next(ticks))
    spec = replace(SPEC, learning_rates=(1e-3, 1e-2))
    assert fit("whole", spec).seconds == 2 * 20 + 40
    killed(fit, spec, "training", 7)
    assert fit("killed", spec).seconds == 2 * 20 + 40


def test_finished_fit_is_only_read(fit: Callable[..., Fitted], tmp_path: Path) -> None:
    found = fit()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "fit").rglob("*")}
    assert distill.fit(None, TRAIN, HELD_OUT, Shape("lora", 1, 1, ()), SPEC, tmp_path / "fit") == found  # type: ignore[arg-type]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "fit").rglob("*")} == before


@pytest.mark.parametrize("damage", ["adapter", "fitted.json", "{", '{"best": 1}'])
def test_half_a_fit_is_none(fit: Callable[..., Fitted], whole: Whole, tmp_path: Path, damage: str) -> None:
    folder, expected = whole(SPEC)
    shutil.copytree(folder, tmp_path / "fit")
    path = tmp_path / "fit" / damage
    if path.is_dir():
        shutil.rmtree(path)
    elif path.is_file():
        path.unlink()
    else:
        (tmp_path / "fit" / "fitted.json").write_text(damage)
    assert replace(fit(), seconds=0) == replace(expected, seconds=0)
    assert_same(tmp_path / "fit", folder)
