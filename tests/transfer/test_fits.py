"""Fits that several processes share, against one process; and processes that fail and die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from lorazip import base as bases
from lorazip.errors import InputError, LorazipError, TransferError, UsageError
from lorazip.eval.backend import Tops
from lorazip.transfer import distill, fits, slots
from lorazip.transfer.batches import Sample
from lorazip.transfer.distill import Fitted
from lorazip.transfer.fits import Fit
from lorazip.transfer.recipe import Training
from lorazip.transfer.slots import Shape

SPEC = Training(epochs=2, batch=4, learning_rates=(3e-3, 1e-2))
CPU = torch.device("cpu")


def samples(n: int, seed: int) -> list[Sample]:
    """Answers of different lengths, so that a mean over batches is not the mean over tokens."""
    return [
        Sample(prompt, (*range(1 + i % 5), tiny.END), (True,) * (2 + i % 5))
        for i, prompt in enumerate(tiny.prompts(n, seed))
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def planned(base: Path, folder: Path, **more: Any) -> Fit:
    shape = Shape("lora", 4, 8, slots.modules_of(bases.skeleton(base), ("q_proj", "v_proj")))
    # Neither is a multiple of the batch; of the last two in training one process has none.
    fit = Fit(folder.name, samples(10, 0), samples(5, 1), shape, SPEC, folder, seed=3)
    return replace(fit, **more)


def run(base: Path, *some: Fit, **options: Any) -> dict[str, Fitted | LorazipError]:
    return fits.fit_all(base, some, dtype=torch.float32, device=CPU, **options)


def fitted(found: Fitted | LorazipError) -> Fitted:
    assert isinstance(found, Fitted), found
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / distill.ADAPTER / "adapter_model.safetensors")


def assert_same(one: Path, other: Path) -> None:
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("more", [{}, {"learning_rates": (1e-2,)}, {"accumulation": 3}])
def test_two_processes_learn_what_one_learns(
    base: Path, tmp_path: Path, more: dict[str, Any], threads: None
) -> None:
    spec = replace(SPEC, **more)
    here = fitted(run(base, planned(base, tmp_path / "one", spec=spec))["one"])
    told: list[tuple[str, str, int, int]] = []
    spread = run(
        base,
        planned(base, tmp_path / "two", spec=spec),
        processes=2,
        progress=lambda *step: told.append(step),
    )
    there = fitted(spread["two"])
    assert there.learning_rate == here.learning_rate and there.best == here.best
    assert there.steps == here.steps > 0
    # Adam takes the sign of a first gradient, however small: rounding may turn it.
    assert there.errors == pytest.approx(here.errors, rel=2e-3)
    assert there.searched == pytest.approx(here.searched, rel=2e-3)
    assert_same(tmp_path / "one", tmp_path / "two")
    assert ("two", "training", there.steps, there.steps) in told
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]  # no text is left beside them


def test_one_that_fails_costs_the_others_nothing(base: Path, tmp_path: Path, threads: None) -> None:
    wild = replace(SPEC, learning_rates=(1e38,))
    some = [
        planned(base, tmp_path / "wild", spec=replace(wild, accumulation=1)),
        planned(base, tmp_path / "tame", spec=replace(SPEC, learning_rates=(1e-2,))),
    ]
    here = run(base, *some)
    assert isinstance(here["wild"], InputError)
    there = run(base, *(replace(one, folder=tmp_path / "two" / one.name) for one in some), processes=2)
    assert isinstance(there["wild"], TransferError) and str(there["wild"]) == str(here["wild"])
    assert fitted(there["tame"]).errors == pytest.approx(fitted(here["tame"]).errors, rel=2e-3)


def children(parent: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, rest = stat.read_text().rsplit(") ", 1)
        except OSError:
            continue
        if int(rest.split()[1]) == parent:
            found.append(int(name.split()[0]))
    return found


def test_processes_that_die_cost_the_fit_that_they_were_at(base: Path, tmp_path: Path, threads: None) -> None:
    single = replace(SPEC, learning_rates=(1e-2,))
    killed: list[int] = []

    def kill(name: str, what: str, done: int, total: int) -> None:
        if name == "first" and done == 4 and not killed:
            (torchrun,) = children(os.getpid())
            killed.extend(children(torchrun))
            os.kill(killed[0], signal.SIGKILL)

    some = [planned(base, tmp_path / name, spec=single) for name in ("first", "second")]
    found = run(base, *some, processes=2, progress=kill)
    assert len(killed) == 2
    assert isinstance(found["first"], TransferError) and "training on 2 processes ended" in str(
        found["first"]
    )
    second = fitted(found["second"])
    again = fitted(run(base, some[0], processes=2)["first"])  # goes on from its last epoch
    assert again.errors == pytest.approx(second.errors, rel=2e-3)  # the same samples and seed
    assert_same(tmp_path / "first", tmp_path / "second")


class Stopped(BaseException):
    """Nothing may catch it."""


def test_stopped_job_leaves_no_process(base: Path, tmp_path: Path, threads: None) -> None:
    def stop(name: str, what: str, done: int, total: int) -> None:
        if done == 2:
            raise Stopped

    with pytest.raises(Stopped):
        run(base, planned(base, tmp_path / "one"), processes=2, progress=stop)
    assert children(os.getpid()) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one"]


JOB = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_fits
torch.set_num_threads(1)
folder = Path(sys.argv[2])
fit = test_fits.planned(folder / "base", folder / "one", spec=test_fits.replace(test_fits.SPEC, epochs=10000))
test_fits.run(folder / "base", fit, processes=2, progress=lambda *step: print(step, flush=True))
"""


def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    tiny.make_base(tmp_path / "base")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", JOB, str(Path(__file__).parent), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as job:
        assert job.stdout is not None
        assert next(line for line in job.stdout if "training', 2," in line)
        (torchrun,) = children(job.pid)
        left = [torchrun, *children(torchrun)]
        job.kill()
        assert len(left) == 3
        for _ in range(600):
            if not any(Path(f"/proc/{pid}").exists() for pid in left):
                break
            time.sleep(0.1)
        assert [pid for pid in left if Path(f"/proc/{pid}").exists()] == []


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (["    raise ValueError(", "ValueError: bad"], "ValueError: bad"),
        (["[rank1]: torch.OutOfMemoryError: much", "DistBackendError: gone"], "torch.OutOfMemoryError: much"),
        (["  traceback : Signal 9 (SIGKILL) received", "x.ChildFailedError: "], "Signal 9 (SIGKILL)"),
        # torchrun ends the others, and may name one of them first.
        (["  traceback : Signal 15 (SIGTERM) received", "Signal 9 (SIGKILL) received"], "Signal 9 (SIGKILL)"),
        (["  traceback : Signal 15 (SIGTERM) received"], "Signal 15 (SIGTERM)"),
        (["RuntimeError: Connection closed by peer"], "RuntimeError: Connection closed by peer"),
        (["a warning with Error in it"], ""),
    ],
)
def test_reason_of_an_end_is_an_exception_of_its_own(said: list[str], why: str) -> None:
    assert fits._why(said) == why


def test_damaged_checkpoint_costs_one_fit_and_is_named(base: Path, tmp_path: Path, threads: None) -> None:
    class Killed(BaseException):
        """Nothing may catch it."""

    def kill(name: str, what: str, done: int, total: int) -> None:
        if done == 4:
            raise Killed

    single = replace(SPEC, learning_rates=(1e-2,))
    some = [planned(base, tmp_path / name, spec=single) for name in ("first", "second")]
    with pytest.raises(Killed):
        run(base, some[0], progress=kill)
    (kept,) = (tmp_path / "first" / "run").glob("checkpoint-*")
    (kept / "optimizer.pt").write_bytes(b"")
    found = run(base, *some)
    assert isinstance(found["first"], TransferError) and f"delete {tmp_path / 'first'}" in str(found["first"])
    fitted(found["second"])


def test_what_is_written_for_a_process_is_read_again(base: Path, tmp_path: Path) -> None:
    tops = Tops(((1, 2), (3, 4)), ((-0.1, -2.5), (-0.3, -1.7)))
    start = {"model.layers.0.self_attn.q_proj": (torch.randn(5, 2), torch.randn(2, 7))}
    one = planned(base, tmp_path / "fit", train=[Sample((1, 2), (3, 4), (False, True), tops)], start=start)
    fits._write(tmp_path, base, [one], torch.float32, CPU)
    plan = fits._plan(tmp_path)
    again = fits._read(tmp_path / "0", plan["fits"][0])
    assert replace(again, start=None) == replace(one, start=None, folder=one.folder.resolve())
    assert again.start is not None and again.start.keys() == start.keys()
    for module, pair in start.items():
        assert all(map(torch.equal, again.start[module], pair))


@pytest.mark.parametrize(
    ("processes", "batch", "message"),
    [(0, 4, "at least 1"), (3, 4, "train.batch = 4 cannot be shared by --processes 3")],
)
def test_processes_that_cannot_share_are_refused(processes: int, batch: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fits.require(processes, CPU, [batch])


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="1 GPUs are visible"):
        fits.require(2, torch.device("cuda"), [4])
