"""Whatever happens while lorazip writes, nothing is lost: killed, interrupted, out of disk, two at once.

Faults are placed before every single change of the file system that a command makes (see nursery.py).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from nursery import Ended, Nursery

from lorazip import files as files_module
from lorazip.adapter import open_adapter
from lorazip.bundle import Bundle
from lorazip.errors import TargetError
from lorazip.files import locked, write_bytes

if TYPE_CHECKING:
    from tests.conftest import MakeAdapter

ZOO = Path(__file__).parents[2] / "examples" / "zoo"
Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
SHAPES = {Q: (24, 24), K: (8, 24)}
FULL = "No space left on device"
JOINT = ("--method", "jd-full")
# The default plans over all modules before it encodes some; the others take them one by one.
BOTH = pytest.mark.parametrize("method", [(), JOINT], ids=["auto", "jd-full"])


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    forking = Nursery()
    yield forking
    forking.close()


@pytest.fixture
def zoo(make_adapter: MakeAdapter) -> Path:
    """Two small adapters of two modules, so that a command has few steps."""
    for name in ("ant", "bee"):
        make_adapter(f"zoo/{name}", modules=SHAPES, rank=2)
    return make_adapter.root / "zoo"


@pytest.fixture
def more(make_adapter: MakeAdapter) -> Path:
    """Two adapters to add; one has a module that no other has."""
    make_adapter("more/cat", modules=SHAPES, rank=2)
    make_adapter("more/dog", modules={**SHAPES, "model.layers.0.mlp.up_proj": (32, 24)}, rank=2)
    return make_adapter.root / "more"


def content(directory: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def assert_whole(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    assert opened.verify() == []
    assert opened.strays() == []


def assert_refused(ended: Ended, *words: str) -> None:
    """Exit code 2, and words that a person understands."""
    assert ended.code == 2, ended
    assert "Traceback" not in ended.err
    assert ended.out == ""
    for word in words:
        assert word in ended.err, ended.err


def every_step(
    nursery: Nursery,
    calm: Ended,
    attempt: Callable[[int], tuple[list[str | Path], Path]],
    fault: str,
    first: int = 1,
) -> Iterator[tuple[int, Ended, Path]]:
    """Run a command again and again, with the fault before its first, second, … last step."""
    assert calm.code == 0, calm.err
    for at in range(first, calm.steps + 1):
        arguments, below = attempt(at)
        yield at, nursery.run(*arguments, fault=fault, at=at, below=below), below  # type: ignore[arg-type]


@BOTH
def test_compress_killed_anywhere_leaves_a_whole_bundle_or_a_resumable_run(
    nursery: Nursery, zoo: Path, tmp_path: Path, method: tuple[str, ...]
) -> None:
    def attempt(at: int) -> tuple[list[str | Path], Path]:
        folder = tmp_path / f"out{at}"
        folder.mkdir()
        return ["compress", zoo, *method, "-o", folder / "made" / "team"], folder

    command, folder = attempt(0)
    calm = nursery.run(*command, below=folder)
    expected = content(folder)
    states = set()
    for at, ended, folder in every_step(nursery, calm, attempt, "kill"):
        assert ended.code == -signal.SIGKILL
        bundle, partial = folder / "made" / "team", folder / "made" / "team.partial"
        states.add((bundle.exists(), partial.exists(), (partial / "bundle").exists()))
        if bundle.exists():
            assert_whole(bundle)
            assert_refused(nursery.run("compress", zoo, "-o", bundle), "exists (use --force")
        elif partial.exists():
            assert_refused(
                nursery.run("compress", zoo, "-o", bundle), "unfinished run", "--resume", "--force"
            )
        resumed = nursery.run("compress", zoo, *method, "-o", bundle, "--resume")
        assert resumed.code == 0, (at, resumed.err)
        assert content(folder) == expected, at
        assert names(bundle.parent) == ["team"], at
    # Nothing yet; a run with shards; one in assembly; the bundle with its run; the bundle alone is the end.
    assert states == {(False, False, False), (False, True, False), (False, True, True), (True, True, False)}


@BOTH
def test_compress_on_a_full_disk_says_so_and_is_resumable(
    nursery: Nursery, zoo: Path, tmp_path: Path, method: tuple[str, ...]
) -> None:
    def attempt(at: int) -> tuple[list[str | Path], Path]:
        folder = tmp_path / f"out{at}"
        folder.mkdir()
        return ["compress", zoo, *method, "-o", folder / "team"], folder

    command, folder = attempt(0)
    calm = nursery.run(*command, below=folder)
    expected = content(folder)
    failed = 0
    for at, ended, folder in every_step(nursery, calm, attempt, "full"):
        if ended.code == 0:  # only removals were left to do
            assert content(folder) == expected
            continue
        failed += 1
        assert_refused(ended, FULL, str(folder))
        assert not (folder / "team").exists()
        assert not list(folder.rglob("*.tmp"))
        resumed = nursery.run("compress", zoo, *method, "-o", folder / "team", "--resume")
        assert resumed.code == 0, (at, resumed.err)
        assert content(folder) == expected, at
    assert failed > 10


def test_compress_beyond_a_limit_of_the_kernel(nursery: Nursery, zoo: Path, tmp_path: Path) -> None:
    """No room in the middle of a file: of the run's note, of a shard, of what is assembled."""
    bundle, partial = tmp_path / "team", tmp_path / "team.partial"
    calm = nursery.run("compress", zoo, *JOINT, "-o", tmp_path / "calm", below=tmp_path)
    last = len(content(tmp_path / "calm")["bundle.json"])
    for limit, file, options in ((50, "job.json", []), (400, "00000.safetensors", ["--resume"])):
        ended = nursery.run("compress", zoo, *JOINT, "-o", bundle, *options, limit=limit)
        assert_refused(ended, f"{partial / file} cannot be written: File too large")
    # With all shards there, only the manifest, the largest file of this bundle, does not fit.
    resume = ["compress", zoo, *JOINT, "-o", bundle, "--resume"]
    killed = nursery.run(*resume, fault="kill", at=9, below=tmp_path)
    assert killed.code == -signal.SIGKILL and len(list(partial.glob("0*"))) == 2
    ended = nursery.run(*resume, limit=last - 1)
    assert_refused(ended, f"{partial / 'bundle' / 'bundle.json'} cannot be written: File too large")
    assert not bundle.exists()
    assert nursery.run(*resume).code == 0
    assert content(bundle) == content(tmp_path / "calm")
    assert calm.code == 0


def test_compress_interrupted_from_the_keyboard(nursery: Nursery, zoo: Path, tmp_path: Path) -> None:
    calm = nursery.run("compress", zoo, "-o", tmp_path / "calm", below=tmp_path)
    for at in range(3, calm.steps, 5):
        bundle = tmp_path / f"team{at}"
        ended = nursery.run("compress", zoo, "-o", bundle, fault="interrupt", at=at, below=tmp_path)
        assert ended.code == 130, (at, ended)
        assert "interrupted" in ended.err and "--resume" in ended.err
        assert "Traceback" not in ended.err
        assert not list(tmp_path.rglob("*.tmp"))
        assert nursery.run("compress", zoo, "-o", bundle, "--resume").code == 0
        assert content(bundle) == content(tmp_path / "calm")


def test_the_command_itself_killed_while_it_works(nursery: Nursery, tmp_path: Path) -> None:
    """No tricks: `lorazip` as users start it, on real adapters, killed from outside once it has some shards."""
    bundle, partial = tmp_path / "team", tmp_path / "team.partial"
    command = ["compress", *map(str, sorted(ZOO.glob("fv_*"))), *JOINT, "--rank", "2", "-o"]
    run = subprocess.Popen(
        [sys.executable, "-m", "lorazip", *command, str(bundle)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    until = time.monotonic() + 120
    while len(list(partial.glob("0*.safetensors"))) < 7 and run.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.005)
    run.kill()
    assert run.wait() == -signal.SIGKILL
    assert names(tmp_path) == ["team.partial"]
    finished = len(list(partial.glob("0*.safetensors")))
    again = nursery.run(*command, bundle, "--resume", below=partial)
    assert again.code == 0
    calm = nursery.run(*command, tmp_path / "calm", below=tmp_path / "calm.partial")
    # A shard that was there is read, not written, and the note is there too: two steps less each, an open and a rename.
    assert calm.steps - again.steps == 2 * (finished + 1)
    assert content(bundle) == content(tmp_path / "calm")


def test_replacing_a_bundle_killed_anywhere_loses_neither(
    nursery: Nursery, zoo: Path, tmp_path: Path
) -> None:
    new_options = [*JOINT, "--rank", "3"]
    assert nursery.run("compress", zoo, "-o", tmp_path / "old", "--method", "svd").code == 0

    def attempt(at: int) -> tuple[list[str | Path], Path]:
        folder = tmp_path / f"out{at}"
        shutil.copytree(tmp_path / "old", folder / "team")
        return ["compress", zoo, "-o", folder / "team", *new_options, "--force"], folder

    command, folder = attempt(0)
    old = content(folder / "team")
    calm = nursery.run(*command, below=folder)
    new = content(folder / "team")
    assert old != new
    between = []
    # Up to the manifest the steps are those of a fresh run.
    for at, ended, folder in every_step(nursery, calm, attempt, "kill", first=calm.steps - 10):
        assert ended.code == -signal.SIGKILL
        bundle, partial = folder / "team", folder / "team.partial"
        if bundle.exists():
            assert content(bundle) in (old, new)
        else:
            between.append(at)
            assert content(partial / "old") == old
        if not bundle.exists() or content(bundle) == new:
            resumed = nursery.run("compress", zoo, "-o", bundle, *new_options, "--resume")
        else:
            resumed = nursery.run("compress", zoo, "-o", bundle, *new_options, "--resume", "--force")
        assert resumed.code == 0, (at, resumed.err)
        assert content(folder) == {f"team/{name}": data for name, data in new.items()}, at
        assert names(folder) == ["team"]
    assert len(between) == 1


def test_discarding_a_run_puts_the_old_bundle_back_first(nursery: Nursery, zoo: Path, tmp_path: Path) -> None:
    bundle, partial = tmp_path / "team", tmp_path / "team.partial"
    assert nursery.run("compress", zoo, "-o", bundle, "--method", "svd").code == 0
    old = content(bundle)
    for at in range(15, 40):
        command = ["compress", zoo, *JOINT, "-o", bundle, "--force"]
        ended = nursery.run(*command, fault="kill", at=at, below=tmp_path)
        assert ended.code == -signal.SIGKILL
        if not bundle.exists():
            break
    assert names(partial) == ["00000.safetensors", "00001.safetensors", "bundle", "job.json", "old"]
    # The next run has other options, discards this one, and finds no room for its first shard.
    ended = nursery.run(*command, "--rank", "1", limit=600, below=tmp_path)
    assert_refused(ended, "File too large")
    assert content(bundle) == old
    assert names(partial) == ["job.json"]


@pytest.mark.parametrize(
    ("method", "others"),
    [((), ["--max-error", "0.2"]), (JOINT, ["--rank", "2"])],
    ids=["auto", "jd-full"],
)
def test_a_resumed_run_must_be_the_same_job(
    nursery: Nursery,
    make_adapter: MakeAdapter,
    zoo: Path,
    tmp_path: Path,
    method: Sequence[str],
    others: Sequence[str],
) -> None:
    bundle = tmp_path / "team"
    command = ["compress", zoo, *method, "-o", bundle]
    assert nursery.run(*command, fault="kill", at=6, below=tmp_path).code == -signal.SIGKILL
    before = content(tmp_path / "team.partial")
    other = ("belongs to a run with other options or inputs", "--force")
    assert_refused(nursery.run(*command, "--resume", *others), *other)
    assert_refused(nursery.run("compress", zoo, "-o", bundle, "--resume", "--method", "svd"), *other)
    assert_refused(nursery.run(*command, "--resume", "--dtype", "bfloat16"), *other)
    assert_refused(nursery.run("compress", zoo / "ant", *method, "-o", bundle, "--resume"), *other)
    make_adapter("zoo/bee", modules=SHAPES, rank=2, seed=99)
    assert_refused(nursery.run(*command, "--resume"), *other)
    assert content(tmp_path / "team.partial") == before
    forced = nursery.run(*command, "--force")
    assert forced.code == 0, forced.err
    assert_whole(bundle)
    assert nursery.run("verify", bundle, "--against", zoo).code == 0
    assert not (tmp_path / "team.partial").exists()


@pytest.mark.parametrize("method", [(), (*JOINT, "--rank", "1")], ids=["auto", "jd-full"])
def test_resuming_a_finished_job_reports_it(
    nursery: Nursery, make_adapter: MakeAdapter, zoo: Path, tmp_path: Path, method: tuple[str, ...]
) -> None:
    """A script that repeats a killed command with --resume gets the same figures, also if it was just done."""
    bundle = tmp_path / "team"
    command = ["compress", zoo, "-o", bundle, "--max-error", "0.3", *method, "--json"]
    first = nursery.run(*command)
    before = {path: path.stat().st_mtime_ns for path in bundle.rglob("*")}
    again = nursery.run(*command, "--resume")
    assert again.code == 0, again.err
    one, two = (json.loads(ended.out) for ended in (first, again))
    for key in ("seconds", "peak_memory_bytes"):
        one.pop(key), two.pop(key)
    assert one == two
    assert (one["fallbacks"] > 0) == bool(method)
    assert {path: path.stat().st_mtime_ns for path in bundle.rglob("*")} == before
    report = tmp_path / "report.html"
    assert nursery.run(*command, "--resume", "--report", report).code == 0
    assert report.stat().st_size > 1000

    other = ("exists, made with other options or inputs", "--force")
    assert_refused(nursery.run(*command, "--resume", "--dtype", "bfloat16"), *other)
    assert_refused(nursery.run("compress", zoo / "ant", *command[2:], "--resume"), *other)
    # One weight of one original, the file as large as before: the measured error tells.
    weights = zoo / "bee" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 0x40
    weights.write_bytes(data)
    assert_refused(nursery.run(*command, "--resume"), *other)
    make_adapter("zoo/bee", modules=SHAPES, rank=2, task_type="CAUSAL_XX")
    assert_refused(nursery.run(*command, "--resume"), *other)
    assert {path: path.stat().st_mtime_ns for path in bundle.rglob("*")} == before


def test_resuming_a_job_whose_bundle_was_damaged_is_refused(
    nursery: Nursery, zoo: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "team"
    command = ["compress", zoo, *JOINT, "-o", bundle]
    assert nursery.run(*command).code == 0
    data = bytearray((bundle / "shared.safetensors").read_bytes())
    data[-1] ^= 1
    (bundle / "shared.safetensors").write_bytes(data)
    ended = nursery.run(*command, "--resume")
    assert (ended.code, ended.out) == (1, "")
    assert "its sha256 is not the recorded one" in ended.err
    assert nursery.run(*command, "--force").code == 0
    assert_whole(bundle)


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
