"""Memory: it is measured rightly, and jobs hold one module of all adapters, never everything."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from handmade import MakeAdapter
from nursery import Nursery

from lorazip import memory
from lorazip.compress import join
from lorazip.memory import anonymous_memory

MB = 2**20


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    # Blocks from 128 kB on go back to the system when they are freed: what counts is what a job holds, not the heap's
    # holes.
    forking = Nursery(MALLOC_MMAP_THRESHOLD_="131072")
    yield forking
    forking.close()


MEASURE = """
import time
from lorazip.memory import PERIOD, PeakMemory, anonymous_memory
before = anonymous_memory()
with PeakMemory() as first:
    block = b"x" * (60 << 20)
    time.sleep(20 * PERIOD)  # a busy machine may let the watcher wait
    del block
with PeakMemory() as second:
    pass
print(before, first.peak, second.peak)
"""


def test_the_peak_is_of_the_block_and_holds_what_was_freed() -> None:
    """In a fresh process: in this one, allocators of libraries may give memory back at any moment."""
    ended = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    before, first, second = map(int, ended.stdout.split())
    assert before + 55 * MB < first < before + 80 * MB
    assert second < first - 40 * MB


def test_pages_of_files_do_not_count(tmp_path: Path) -> None:
    """Adapters are mapped: what the kernel keeps of them is not the job's memory."""
    from lorazip.mapped import Mapped

    path = tmp_path / "big.safetensors"
    header = b'{"x":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (60 * MB, 60 * MB)
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(60 * MB))
    before = anonymous_memory()
    tensor = Mapped(path).tensor("x")
    assert int(tensor.max()) == 0  # every page was read
    assert anonymous_memory() < before + 20 * MB


def test_elsewhere_the_whole_resident_set_stands_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import resource

    monkeypatch.setattr(memory, "STATUS", tmp_path / "no proc")
    assert anonymous_memory() == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (tmp_path / "status").write_text("Name:\tpython\nRssAnon:\t    1234 kB\n")
    monkeypatch.setattr(memory, "STATUS", tmp_path / "status")
    assert anonymous_memory() == 1234 * 1024


def test_jobs_hold_one_module_whatever_their_number(nursery: Nursery, make_adapter: MakeAdapter) -> None:
    """Eight times the modules, nearly the same peak: of compress, its dry run and resumption, verify.

    Peaks are sampled, so a short run may miss what a module takes for a moment; everything would be 20 MB.
    """
    root = make_adapter.root
    peaks: dict[str, list[int]] = {}
    sizes = []
    for count in (4, 32):
        zoo, team, svd = root / f"zoo{count}", root / f"team{count}", root / f"svd{count}"
        modules = {f"m{j:02d}": (1024, 2048) for j in range(count)}
        for i in range(8):
            make_adapter(zoo / f"a{i}", modules=modules, rank=8)
        exact = ["--method", "svd", "--max-error", "0", "--dtype", "float32"]
        commands = {
            "jd-full": ["compress", zoo, "--method", "jd-full", "--rank", "2", "-o", team],
            "svd": ["compress", zoo, *exact, "-o", svd],
            "dry run": ["compress", zoo, *exact, "--dry-run"],
            "finished": ["compress", zoo, *exact, "-o", svd, "--resume"],
            "verify": ["verify", svd, "--against", zoo],
        }
        for what, command in commands.items():
            ended = nursery.run(*command)
            assert ended.code == 0, ended.err
            peaks.setdefault(what, []).append(ended.peak)
        sizes.append(sum(path.stat().st_size for path in svd.rglob("*") if path.is_file()))
    assert sizes[1] - sizes[0] > 20 * MB
    for what, (small, large) in peaks.items():
        assert large - small < 8 * MB, (what, small / MB, large / MB)


def test_add_holds_a_batch_of_adapters(nursery: Nursery, make_adapter: MakeAdapter) -> None:
    """Six times the adapters that keep factors of their own: what is written is not held."""
    root, shapes = make_adapter.root, {f"m{j}": (1024, 1024) for j in range(8)}
    for i in range(6 * join.BATCH):
        make_adapter(root / ("few" if i < join.BATCH else "many") / f"b{i}", modules=shapes, rank=4)
    make_adapter(root / "zoo" / "a", modules=shapes, rank=4)
    options = "--method", "jd-full", "--rank", "1"
    assert nursery.run("compress", root / "zoo", "-o", root / "team", *options).code == 0
    peaks = []
    for which in ("few", "many"):
        ended = nursery.run("add", root / "team", root / which, "--max-error", "0")
        assert ended.code == 0, ended.err
        peaks.append(ended.peak)
    assert sum(path.stat().st_size for path in (root / "many").rglob("*") if path.is_file()) > 20 * MB
    assert peaks[1] - peaks[0] < 8 * MB
