"""Whatever happens while a bundle is compressed, nothing is lost: killed, interrupted, out of disk, resumed.

Faults are placed before every single change of the file system that a command makes (see nursery.py).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from faults import BOTH, FULL, JOINT, SHAPES, ZOO, assert_refused, assert_whole, content, every_step, names
from handmade import MakeAdapter
from nursery import Nursery


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
