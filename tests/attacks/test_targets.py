"""Targets in the way, in use, too small or not to be written: refused, and nothing there is harmed."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults import FULL, assert_refused, assert_whole, content, names
from nursery import Nursery


def test_two_runs_at_once_on_one_target(nursery: Nursery, zoo: Path, tmp_path: Path) -> None:
    calm = nursery.run("compress", zoo, "-o", tmp_path / "calm", below=tmp_path)
    for at in (2, 4, calm.steps - 1):
        bundle = tmp_path / f"team{at}"
        first = nursery.run("compress", zoo, "-o", bundle, fault="stop", at=at, below=tmp_path)
        assert first.code == -signal.SIGSTOP
        for option in ("--resume", "--force"):
            assert_refused(nursery.run("compress", zoo, "-o", bundle, option), "is being written by another")
        assert nursery.signal(first.pid, signal.SIGCONT).code == 0
        assert content(bundle) == content(tmp_path / "calm")
        assert not bundle.with_name(f"team{at}.partial").exists()


def test_what_appears_meanwhile_is_not_replaced(nursery: Nursery, zoo: Path, tmp_path: Path) -> None:
    assert nursery.run("compress", zoo, "-o", tmp_path / "other", "--method", "svd").code == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("ten years of work")
    for what, options in (("other", []), ("mine", ["--force"])):
        bundle = tmp_path / f"team-{what}"
        first = nursery.run("compress", zoo, "-o", bundle, *options, fault="stop", at=5, below=tmp_path)
        assert first.code == -signal.SIGSTOP
        (tmp_path / what).rename(bundle)
        before = content(bundle)
        assert_refused(nursery.signal(first.pid, signal.SIGCONT), "appeared while the job ran")
        assert content(bundle) == before
        bundle.rename(tmp_path / what)
        assert nursery.run("compress", zoo, "-o", bundle, "--resume").code == 0
        assert_whole(bundle)


def test_a_folder_of_somebody_else_in_the_way_is_never_touched(
    nursery: Nursery, zoo: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "team.partial" / "thesis.tex"
    mine.parent.mkdir()
    mine.write_text("ten years of work")
    for option in ("--resume", "--force"):
        ended = nursery.run("compress", zoo, "-o", tmp_path / "team", option)
        assert_refused(ended, "not an unfinished run of lorazip", "move it")
    assert nursery.run("compress", zoo, "-o", tmp_path / "small").code == 0
    assert nursery.run("export", tmp_path / "small", "--bundle", "-o", tmp_path / "team").code == 0
    assert mine.read_text() == "ten years of work"


def test_targets_that_cannot_be_written(nursery: Nursery, zoo: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "mine").write_text("mine")
    assert_refused(nursery.run("compress", zoo, "-o", file), "exists and is not a bundle")
    assert_refused(nursery.run("compress", zoo, "-o", file, "--force"), "exists and is not a bundle")
    assert_refused(nursery.run("compress", zoo, "-o", foreign, "--force"), "exists and is not a bundle")
    assert_refused(
        nursery.run("compress", zoo, "-o", file / "below" / "it"), "cannot be made: Not a directory"
    )
    assert_refused(nursery.run("compress", zoo, "-o", "/proc/nowhere/team"), "/proc/nowhere cannot be made")
    assert_refused(nursery.run("compress", zoo, "-o", "/proc/team"), "/proc/team.partial cannot be made")
    assert_refused(nursery.run("compress", zoo, "-o", tmp_path / ("x" * 300)), "File name too long")
    assert nursery.run("compress", zoo, "-o", tmp_path / "team").code == 0
    before = content(tmp_path / "team")
    assert_refused(nursery.run("compress", zoo, "-o", tmp_path / "team"), "exists (use --force")
    assert content(tmp_path / "team") == before

    for arguments in (["export", tmp_path / "team"], ["export", tmp_path / "team", "--bundle"]):
        assert_refused(nursery.run(*arguments, "-o", file), str(file))
        assert_refused(nursery.run(*arguments, "-o", file / "below"), "cannot be written")
        assert_refused(nursery.run(*arguments, "-o", "/proc/nowhere"), "cannot be written")
    assert_refused(nursery.run("export", tmp_path / "team", "--bundle", "-o", foreign), "exists")
    (foreign / "ant").mkdir()
    (foreign / "ant" / "mine").write_text("mine")
    assert_refused(nursery.run("export", tmp_path / "team", "-o", foreign), str(foreign / "ant"), "exists")
    assert names(foreign) == ["ant", "mine"]
    assert file.read_text() == "mine"


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount small file systems: `tmpfs("size=64k")`. Only root may; what the kernel refuses is tested above."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        path = tmp_path / f"disk{len(mounted)}"
        path.mkdir()
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "none", path], capture_output=True
        ).returncode:
            pytest.skip("this user may not mount a file system")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", path], check=True)


def test_a_disk_that_is_really_full(
    nursery: Nursery, zoo: Path, tmp_path: Path, tmpfs: Callable[[str], Path]
) -> None:
    assert nursery.run("compress", zoo, "-o", tmp_path / "calm").code == 0
    disk = tmpfs("size=128k")
    reached = set()
    for free in range(0, 8, 2):  # pages; the job needs eight
        (disk / "ballast").write_bytes(bytes(128 * 1024 - 4096 * free))
        ended = nursery.run("compress", zoo, "-o", disk / "team")
        assert_refused(ended, FULL, str(disk))
        assert not (disk / "team").exists()
        reached.add(re.findall(r"team\.partial/?(\S*) cannot", ended.err)[0])
        (disk / "ballast").unlink()
        assert nursery.run("compress", zoo, "-o", disk / "team", "--resume").code == 0
        assert content(disk / "team") == content(tmp_path / "calm")
        shutil.rmtree(disk / "team")
    assert len(reached) > 2


def test_file_systems_that_are_read_only_or_mounted_at_the_target(
    nursery: Nursery, zoo: Path, tmp_path: Path, tmpfs: Callable[[str], Path]
) -> None:
    assert nursery.run("compress", zoo, "-o", tmp_path / "team").code == 0
    disk = tmpfs("size=1m")
    assert_refused(nursery.run("compress", zoo, "-o", disk), "is a mount point", "name a directory in it")
    shutil.copytree(tmp_path / "team", disk / "team")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    before = content(disk)
    read_only = "Read-only file system"
    assert_refused(nursery.run("compress", zoo, "-o", disk / "new"), read_only)
    assert_refused(nursery.run("compress", zoo, "-o", disk / "team", "--force"), read_only)
    assert_refused(nursery.run("remove", disk / "team", "ant"), read_only)
    assert_refused(nursery.run("add", disk / "team", f"cow={zoo / 'ant'}"), read_only)
    assert_refused(nursery.run("export", tmp_path / "team", "-o", disk / "peft"), read_only)
    assert_refused(nursery.run("export", tmp_path / "team", "--bundle", "-o", disk / "sub"), read_only)
    for command in (["info"], ["verify"]):
        assert nursery.run(*command, disk / "team").code == 0
    assert nursery.run("export", disk / "team", "-o", tmp_path / "peft").code == 0
    assert content(disk) == before
