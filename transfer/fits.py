"""Many fits on one base: here, or on several devices, a process for each.

On several, torchrun starts this module once a device. The Trainer's accelerate gives every process its share of each
batch and takes the mean of their gradients, so a step is the step of one process with the whole batch. The processes
end when the one that started them does.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lorazip
from lorazip import base as bases
from lorazip.errors import LorazipError, TransferError, UsageError, printable
from lorazip.eval.backend import Tops
from lorazip.transfer import distill, trainer
from lorazip.transfer.batches import Sample
from lorazip.transfer.distill import Fitted
from lorazip.transfer.recipe import Training
from lorazip.transfer.slots import Shape, Start

PLAN, FACTORS, SAMPLES = "plan.json", "start.safetensors", "samples.jsonl"
SCRATCH = ".fits-"  # begins the name of a folder of texts, there while processes train on them
MARK = "lorazip:"  # begins a line of the first process that is meant for the one that started it

Progress = Callable[[str, str, int, int], None]  # fit, what, done, total


@dataclass(frozen=True)
class Fit:
    """One adapter to train; see distill.fit."""

    name: str
    train: Sequence[Sample]
    held_out: Sequence[Sample]
    shape: Shape
    spec: Training
    folder: Path
    seed: int
    start: Start | None = None


def fit_all(
    base: Path,
    fits: Sequence[Fit],
    *,
    dtype: torch.dtype,
    device: torch.device,
    processes: int = 1,
    progress: Progress = lambda name, what, done, total: None,
) -> dict[str, Fitted | LorazipError]:
    """Train all, one after the other, the base opened once.

    Args:
        base: directory of the model.
        processes: that share every batch; on CUDA as many GPUs, from the first on.
    Returns:
        By name, what came of each, or why nothing did: one that fails costs the others nothing.
    Raises:
        LorazipError: what concerns all of them.
    """
    require(processes, device, (one.spec.batch for one in fits))
    found: dict[str, Fitted | LorazipError] = {}
    for one in fits:
        fitted = distill.known(one.folder)
        if fitted is not None:
            found[one.name] = fitted
    while rest := [one for one in fits if one.name not in found]:
        if processes == 1:
            found |= _here(base, rest, dtype, device, progress)
        else:
            found |= _spread(base, rest, dtype, device, processes, progress)
    return found


def require(processes: int, device: torch.device, batches: Iterable[int]) -> None:
    """Raises UsageError: so many processes cannot share batches of these sizes."""
    if processes < 1:
        raise UsageError("--processes must be at least 1")
    if processes > 1 and device.type == "cuda" and processes > torch.cuda.device_count():
        raise UsageError(f"--processes {processes}: {torch.cuda.device_count()} GPUs are visible")
    for batch in batches:
        if batch % processes:
            raise UsageError(
                f"train.batch = {batch} cannot be shared by --processes {processes} (give a multiple of it)"
            )


def _here(
    base: Path, fits: Sequence[Fit], dtype: torch.dtype, device: torch.device, progress: Progress
) -> dict[str, Fitted | LorazipError]:
    """In this process."""
    model = bases.load(base, dtype, device)
    found: dict[str, Fitted | LorazipError] = {}
    for one in fits:
        try:
            found[one.name] = _fit(model, one, partial(progress, one.name))
        except LorazipError as error:
            found[one.name] = error
        except (
            Exception
        ) as error:  # of memory, a disk, a damaged checkpoint: no one kind, and the others go on
            found[one.name] = _ended(one, f"training ended: {type(error).__name__}: {error}")
    del model
    bases.free(device)
    return found


def _ended(one: Fit, why: str) -> TransferError:
    full = "space" in why.lower() or "quota" in why.lower()
    remedy = "make room on the disk" if full else "lower train.batch or train.rank"
    remedy += f"; if it ends so again, delete {one.folder}"
    return TransferError(f"{one.name}: {printable(why)} ({remedy})")


def _fit(model: Any, one: Fit, progress: trainer.Progress) -> Fitted:
    return distill.fit(
        model,
        one.train,
        one.held_out,
        one.shape,
        one.spec,
        one.folder,
        seed=one.seed,
        start=one.start,
        progress=progress,
    )


def _spread(
    base: Path,
    fits: Sequence[Fit],
    dtype: torch.dtype,
    device: torch.device,
    processes: int,
    progress: Progress,
) -> dict[str, Fitted | LorazipError]:
    """In processes of their own. When these die, the fit that they were at has failed; the rest is not told."""
    for one in fits:
        one.folder.mkdir(parents=True, exist_ok=True)
    # Beside the fits, where a job's texts are, and not among temporary files of the machine.
    with tempfile.TemporaryDirectory(dir=fits[0].folder.parent, prefix=SCRATCH) as scratch:
        folder = Path(scratch)
        _write(folder, base, fits, dtype, device)
        threads = max(1, torch.get_num_threads() // processes)
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"),
            *(str(processes), "-m", __spec__.name, str(folder)),
        ]
        here = str(Path(lorazip.__file__).parent.parent)
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")])),
            "PYTHONSAFEPATH": "1",  # -m would import what lies in the working directory
        }
        if device.type == "cpu":
            environment["ACCELERATE_USE_CPU"] = "true"
        with (
            (folder / "stderr").open("w+", errors="replace") as errors,
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # its end is ours: _end_with_parent
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                errors="replace",
                env=environment,
            ) as process,
        ):
            try:
                failed, at = _followed(process, fits, progress)
            finally:
                process.terminate()  # a job that is stopped; one that has ended is past it
                process.wait()
            errors.seek(0)
            why = _why(errors) or f"exit code {process.returncode}"
    found: dict[str, Fitted | LorazipError] = dict(failed)
    for one in fits:
        fitted = distill.known(one.folder)
        if fitted is not None and one.name not in found:
            found[one.name] = fitted
    lost = next((one for one in fits[at:] if one.name not in found), None)
    if lost is not None:
        found[lost.name] = _ended(lost, f"training on {processes} processes ended: {why}")
    return found


def _why(errors: Iterable[str]) -> str:
    """What ended processes, by what they wrote: an exception that is their own, else a signal."""
    plain = [re.sub(r"^\[rank\d+\]: ?", "", line.rstrip()) for line in errors]
    raised = [line for line in plain if re.match(r"[\w.]+(Error|Exception)\b(: |$)", line)]
    own = [line for line in raised if not re.search("ChildFailed|DistBackend|onnection", line)]
    signals = [found[0] for line in plain if (found := re.search(r"Signal \d+ \(\w+\)", line))]
    signals.sort(key=lambda signal: "SIGTERM" in signal)  # by which torchrun ends the others
    return next(iter([*own, *signals, *raised]), "")


def _followed(
    process: subprocess.Popen[str], fits: Sequence[Fit], progress: Progress
) -> tuple[dict[str, LorazipError], int]:
    """Pass on what the first process tells, until it ends: errors by name, and the fit that it came to."""
    failed: dict[str, LorazipError] = {}
    at = 0
    assert process.stdout is not None
    for line in process.stdout:
        if not line.startswith(MARK):
            continue
        told: dict[str, Any] = json.loads(line.removeprefix(MARK))
        at = told["fit"]
        if "error" in told:
            failed[fits[at].name] = TransferError(told["error"])
        else:
            progress(fits[at].name, told["what"], told["done"], told["total"])
    process.wait()
    return failed, at


def _write(folder: Path, base: Path, fits: Sequence[Fit], dtype: torch.dtype, device: torch.device) -> None:
    """All that the processes need."""
    from safetensors.torch import save_file

    told = []
    for number, one in enumerate(fits):
        own = folder / str(number)
        own.mkdir()
        for name, samples in ((f"train-{SAMPLES}", one.train), (f"held-{SAMPLES}", one.held_out)):
            (own / name).write_text("".join(json.dumps(asdict(sample)) + "\n" for sample in samples))
        if one.start is not None:
            factors: dict[str, Tensor] = {}
            for module, (b, a) in one.start.items():
                factors |= {f"{module}.B": b.cpu().contiguous(), f"{module}.A": a.cpu().contiguous()}
            save_file(factors, own / FACTORS)
        told.append(
            {
                "name": one.name,
                "folder": str(one.folder.resolve()),
                "shape": asdict(one.shape),
                "spec": asdict(one.spec),
                "seed": one.seed,
            }
        )
    plan = {
        "base": str(base),
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "fits": told,
    }
    (folder / PLAN).write_text(json.dumps(plan))


def _plan(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / PLAN).read_text())
    return found


def _read(folder: Path, told: Mapping[str, Any]) -> Fit:
    """The other end of `_write`."""
    train, held = (list(_samples(folder / f"{part}-{SAMPLES}")) for part in ("train", "held"))
    shape = Shape(**told["shape"] | {"modules": tuple(told["shape"]["modules"])})
    spec: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in told["spec"].items()
    }
    start = _start(folder / FACTORS)
    return Fit(told["name"], train, held, shape, Training(**spec), Path(told["folder"]), told["seed"], start)


def _start(path: Path) -> Start | None:
    from safetensors.torch import load_file

    if not path.exists():
        return None
    factors = load_file(path)
    modules = [key.removesuffix(".B") for key in factors if key.endswith(".B")]
    return {module: (factors[f"{module}.B"], factors[f"{module}.A"]) for module in modules}


def _samples(path: Path) -> Iterator[Sample]:
    for line in path.read_text().splitlines():
        told = json.loads(line)
        tops = told["tops"]
        if tops is not None:
            tops = Tops(tuple(map(tuple, tops["tokens"])), tuple(map(tuple, tops["logprobs"])))
        yield Sample(tuple(told["prompt"]), tuple(told["answer"]), tuple(told["trained"]), tops)


def _child(folder: Path) -> None:
    """One of the processes."""
    plan = _plan(folder)
    threading.Thread(target=_end_with_parent, args=(sys.stdin.fileno(),), daemon=True).start()
    first, place = os.environ["RANK"] == "0", torch.device(plan["device"])
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
    # Before anything asks how many share a batch; the Trainer would begin it only after that.
    torch.distributed.init_process_group("nccl" if place.type == "cuda" else "gloo")

    def tell(**what: Any) -> None:
        if first:
            print(MARK + json.dumps(what), flush=True)

    try:
        model = bases.load(Path(plan["base"]), getattr(torch, plan["dtype"]), place)
    except LorazipError as error:
        for number in range(len(plan["fits"])):
            tell(fit=number, error=str(error))
        return
    for number, told in enumerate(plan["fits"]):
        tell(fit=number, what="training", done=0, total=0)
        try:
            _fit(
                model,
                _read(folder / str(number), told),
                partial(_step, number, tell),
            )
        except LorazipError as error:
            tell(fit=number, error=str(error))


def _step(number: int, tell: Callable[..., None], what: str, done: int, total: int) -> None:
    tell(fit=number, what=what, done=done, total=total)


def _end_with_parent(descriptor: int) -> None:
    """A job that was killed must not train on beside the one that is started after it.

    Nothing is ever written to this pipe; it is at its end when the process that holds the other one is gone.
    """
    while os.read(descriptor, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    _child(Path(sys.argv[1]))
