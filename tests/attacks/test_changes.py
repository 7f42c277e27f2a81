"""Add, remove, export and single files: whatever happens, the bundle is the old one or the new one."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from faults import FULL, JOINT, assert_refused, assert_whole, content, every_step, names
from nursery import Nursery

from lorazip import files as files_module
from lorazip.adapter import open_adapter
from lorazip.bundle import Bundle
from lorazip.errors import TargetError
from lorazip.files import locked, write_bytes


def test_add_killed_anywhere_keeps_the_bundle(
    nursery: Nursery, zoo: Path, more: Path, tmp_path: Path
) -> None:
    assert nursery.run("compress", zoo, "-o", tmp_path / "base").code == 0

    def attempt(at: int) -> tuple[list[str | Path], Path]:
        shutil.copytree(tmp_path / "base", tmp_path / f"team{at}")
        return ["add", tmp_path / f"team{at}", more], tmp_path / f"team{at}"

    command, bundle = attempt(0)
    old = content(bundle)
    calm = nursery.run(*command, below=bundle)
    new = content(bundle)
    strays = 0
    for at, ended, bundle in every_step(nursery, calm, attempt, "kill"):
        assert ended.code == -signal.SIGKILL
        opened = Bundle.open(bundle)
        assert opened.verify() == []
        left = content(bundle)
        assert {name: left[name] for name in old if name != "bundle.json"} == {
            name: data for name, data in old.items() if name != "bundle.json"
        }
        if opened.names == ["ant", "bee"]:
            assert left["bundle.json"] == old["bundle.json"]
            verified = nursery.run("verify", bundle)
            assert verified.code == 0
            for stray in opened.strays():
                strays += 1
                assert f"note: {stray} is not part of the bundle" in verified.out
            assert nursery.run("add", bundle, more).code == 0
        assert content(bundle) == new, at
    assert strays > 3


def test_add_on_a_full_disk_keeps_the_bundle(nursery: Nursery, zoo: Path, more: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "team"
    assert nursery.run("compress", zoo, "-o", bundle).code == 0
    old = content(bundle)
    at = 1
    while True:
        ended = nursery.run("add", bundle, more, fault="full", at=at, below=bundle)
        if ended.code == 0:
            break
        assert_refused(ended, FULL)
        assert Bundle.open(bundle).verify() == []
        assert {name: data for name, data in content(bundle).items() if name in old} == old
        assert not list(bundle.rglob("*.tmp"))
        at += 1
    assert at > 5
    assert_whole(bundle)
    assert Bundle.open(bundle).names == ["ant", "bee", "cat", "dog"]


def test_remove_killed_anywhere_keeps_the_bundle(nursery: Nursery, zoo: Path, tmp_path: Path) -> None:
    assert nursery.run("compress", zoo, "-o", tmp_path / "base").code == 0

    def attempt(at: int) -> tuple[list[str | Path], Path]:
        shutil.copytree(tmp_path / "base", tmp_path / f"team{at}")
        return ["remove", tmp_path / f"team{at}", "ant"], tmp_path / f"team{at}"

    command, bundle = attempt(0)
    calm = nursery.run(*command, below=bundle)
    seen = []
    for _, ended, bundle in every_step(nursery, calm, attempt, "kill"):
        assert ended.code == -signal.SIGKILL
        opened = Bundle.open(bundle)
        assert opened.verify() == []
        seen.append((opened.names, opened.strays()))
    kept, file = ["ant", "bee"], "adapters/ant.safetensors"
    assert seen == [(kept, [".bundle.json.tmp"]), (kept, [".bundle.json.tmp"]), (["bee"], [file])]
    # What was left lying is replaced when an adapter of this name comes again.
    assert nursery.run("add", bundle, zoo / "ant").code == 0
    assert_whole(bundle)


def test_remove_on_a_full_disk_keeps_the_bundle(nursery: Nursery, zoo: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "team"
    assert nursery.run("compress", zoo, "-o", bundle).code == 0
    old = content(bundle)
    assert_refused(nursery.run("remove", bundle, "ant", limit=200), "File too large")
    for at in (1, 2):
        assert_refused(nursery.run("remove", bundle, "ant", fault="full", at=at, below=bundle), FULL)
    assert content(bundle) == old


def test_two_changes_of_a_bundle_at_once(nursery: Nursery, zoo: Path, more: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "team"
    assert nursery.run("compress", zoo, "-o", bundle).code == 0
    first = nursery.run("add", bundle, more / "cat", fault="stop", at=2, below=bundle)
    assert first.code == -signal.SIGSTOP
    busy = "is being written by another process"
    assert_refused(nursery.run("add", bundle, more / "dog"), busy)
    assert_refused(nursery.run("remove", bundle, "ant"), busy)
    assert_refused(nursery.run("compress", zoo, "-o", bundle, *JOINT, "--force"), busy)
    assert nursery.run("export", bundle, "ant", "-o", tmp_path / "peft").code == 0  # readers do not mind
    assert nursery.signal(first.pid, signal.SIGCONT).code == 0
    assert_whole(bundle)
    assert Bundle.open(bundle).names == ["ant", "bee", "cat"]
    replaced = nursery.run("compress", zoo, "-o", bundle, *JOINT, "--resume", "--force")
    assert replaced.code == 0, replaced.err
    assert Bundle.open(bundle).names == ["ant", "bee"]
    assert names(tmp_path) == ["more", "peft", "team", "zoo"]


@pytest.mark.parametrize("option", [[], ["--bundle"]])
@pytest.mark.parametrize("fault", ["kill", "full"])
def test_export_is_whole_or_not_there(
    nursery: Nursery, zoo: Path, tmp_path: Path, fault: str, option: list[str]
) -> None:
    bundle = tmp_path / "team"
    assert nursery.run("compress", zoo, "-o", bundle).code == 0

    def attempt(at: int) -> tuple[list[str | Path], Path]:
        (tmp_path / f"out{at}").mkdir()
        return ["export", bundle, *option, "-o", tmp_path / f"out{at}" / "made"], tmp_path / f"out{at}"

    command, folder = attempt(0)
    calm = nursery.run(*command, below=folder)
    expected = content(folder / "made")
    for at, ended, folder in every_step(nursery, calm, attempt, fault):
        target = folder / "made"
        if fault == "full":
            assert_refused(ended, FULL)
            assert not list(folder.rglob("*.tmp"))
        else:
            assert ended.code == -signal.SIGKILL
        if option and target.exists():
            assert content(target) == expected
        for name in ("ant", "bee"):
            if not option and (target / name).exists():
                open_adapter(target / name, name)
        again = nursery.run("export", bundle, *option, "-o", folder / "again")
        assert again.code == 0
        assert content(folder / "again") == expected, at


def test_what_is_renamed_into_place_is_on_disk_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Power may fail at any time too: a file is flushed before its rename, its directory after."""
    log: list[tuple[str, int]] = []
    sync, rename = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        log.append(("flush", os.fstat(descriptor).st_ino))
        sync(descriptor)

    def replace(old: Path, new: Path) -> None:
        log.append(("rename", os.stat(old).st_ino))
        rename(old, new)

    monkeypatch.setattr(files_module.os, "fsync", fsync)
    monkeypatch.setattr(files_module.os, "replace", replace)
    write_bytes(tmp_path / "file", b"x")
    file, directory = (tmp_path / "file").stat().st_ino, tmp_path.stat().st_ino
    assert log == [("flush", file), ("rename", file), ("flush", directory)]


def test_a_lock_is_of_the_directory_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with locked(folder), pytest.raises(TargetError, match="another process"), locked(folder):
        pass
    lock = files_module.fcntl.flock

    def after(change: Callable[[], None]) -> Callable[[int, int], None]:
        """What another process does between our opening of the directory and our lock."""
        return lambda descriptor, how: (change(), lock(descriptor, how))[1]

    monkeypatch.setattr(
        files_module.fcntl, "flock", after(lambda: folder.rename(tmp_path / "old") and folder.mkdir())
    )
    with pytest.raises(TargetError, match="another process"), locked(folder):
        pass
    monkeypatch.setattr(files_module.fcntl, "flock", after(folder.rmdir))
    with pytest.raises(TargetError, match="another process"), locked(folder):
        pass
    monkeypatch.undo()
    with pytest.raises(TargetError, match="cannot be opened"), locked(folder):
        pass
