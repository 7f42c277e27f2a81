"""Memory: it is measured rightly, and jobs hold one module of all adapters, never everything."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from nursery import Nursery

from lorazip import memory
from lorazip.memory import PeakMemory, anonymous_memory

if TYPE_CHECKING:
    from tests.conftest import MakeAdapter

MB = 2**20


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    forking = Nursery()
    yield forking
    forking.close()


def test_the_peak_is_of_the_block_and_holds_what_was_freed(tmp_path: Path) -> None:
    before = anonymous_memory()
    with PeakMemory() as first:
        block = bytearray(60 * MB)  # zeros, but written: bytearray touches them
        time.sleep(4 * memory.PERIOD)
        del block
    with PeakMemory() as second:
        pass
    assert before + 55 * MB < first.peak < before + 80 * MB
    assert second.peak < first.peak - 40 * MB


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
    """Eight times the modules and bytes, within a few MB the same peak: of compress, add, verify, export.

    A module of all adapters has 4 MB here, the larger job 128 MB.
    """
    root = make_adapter.root
    peaks: dict[str, list[int]] = {"compress": [], "dry run": [], "svd": []}
    sizes = []
    for count in (4, 32):
        zoo = root / f"zoo{count}"
        for i in range(8):
            modules = {f"m{j:02d}": (512, 512) for j in range(count)}
            make_adapter(zoo / f"a{i}", modules=modules, rank=128, a_seed=1)
        for what, options in (
            ("compress", ["-o", root / f"team{count}"]),
            ("dry run", ["--dry-run"]),
            (
                "svd",
                ["-o", root / f"svd{count}", "--method", "svd", "--max-error", "0", "--dtype", "float32"],
            ),
        ):
            ended = nursery.run("compress", zoo, "--rank", "16", "--json", *options)
            assert ended.code == 0, ended.err
            found = json.loads(ended.out)
            peaks[what].append(found["peak_memory_bytes"])
        sizes.append(found["original_bytes"])
    assert sizes[1] - sizes[0] > 100 * MB
    for what, (small, large) in peaks.items():
        assert large - small < 12 * MB, (what, small / MB, large / MB)
