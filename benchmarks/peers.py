#!/usr/bin/env python3
"""What other tools make of the same adapters: their error measured on D, their bytes on disk, seconds and memory.

    python benchmarks/peers.py examples/zoo --json peers.json

The peers, vlora-dev and lorashare from PyPI, live in a virtual environment of their own, which the first run makes.
Each runs in a process of its own, at its defaults and at a few settings, and is cut after ten minutes. Then it writes
every adapter back, and for D_i = s_i B_i A_i, with the original's own scale s_i,

    err_i = sum_m ||D^_im - D_im||^2 / sum_m ||D_im||^2

over all modules m, from the factors of the residual in float64. Where a peer needs it we help: vlora gets float32
copies, since its SVD refuses 16-bit factors on a CPU; and D^ gets the original's scale, since vlora does not store it
(and so writes adapters back with alpha = r).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from torch import Tensor

from lorazip.adapter import Adapter
from lorazip.sources import open_adapters

ROOT = Path(__file__).parents[1]
WORKER = Path(__file__).with_name("peer_worker.py")
PINS = ("vlora-dev==1.0.0", "lorashare==0.1.3")
TIMEOUT = 600.0
# Keyword arguments of SharedSubspace.from_adapters and SHAREModel.from_adapters; "store" is ours and names one of
# vlora's other ways to save. The defaults: as many components as hold 60 % of the variance of the first module's A,
# in float32; and 32 components, in float32.
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "vlora-dev": {
        "default": {},
        "k=8": {"num_components": 8},
        "k=16": {"num_components": 16},
        "k=8, bf16": {"num_components": 8, "store": "bf16"},
        "k=8, nf4": {"num_components": 8, "store": "nf4"},
        "adaptive 0.9": {"adaptive_k": True, "variance_threshold": 0.9},
    },
    "lorashare": {
        "default": {},
        "k=64": {"num_components": 64},
        "k=128": {"num_components": 128},
        "auto 0.95": {"num_components": "auto"},
    },
}


@dataclass(frozen=True)
class Finished:
    """A process that ended or was cut.

    Attributes:
        status: "ok", "cut" or "failed".
        seconds: wall time of the whole process.
        peak: highest sampled anonymous resident memory in bytes (Linux; else 0).
    """

    status: str
    seconds: float
    peak: int
    stdout: str
    stderr: str


def watch(command: Sequence[str], timeout: float, threads: int) -> Finished:
    """Run a command in its own process group, look at its memory every 20 ms, cut it at `timeout` seconds."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=stdout, stderr=stderr, env=environment, start_new_session=True
        )
        peak, cut = 0, False
        try:
            while process.poll() is None:
                peak = max(peak, anonymous_memory(process.pid))
                if time.perf_counter() - start > timeout:
                    cut = True
                    break
                time.sleep(0.02)
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        seconds = time.perf_counter() - start
        stdout.seek(0)
        stderr.seek(0)
        status = "cut" if cut else "failed" if process.returncode else "ok"
        return Finished(status, seconds, peak, stdout.read(), stderr.read())


def anonymous_memory(pid: int) -> int:
    """Resident memory of a process that no file backs, in bytes; 0 where /proc does not tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def peer_python(venv: Path) -> Path:
    """The interpreter of the peers' virtual environment, which is made when it is not there yet."""
    python, stamp = venv / "bin" / "python", venv / ".installed"
    if not stamp.exists() or stamp.read_text().split() != list(PINS):
        install = [
            str(python),
            "-m",
            "pip",
            "install",
            "--quiet",
            "--constraint",
            str(ROOT / "constraints.txt"),
        ]
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        subprocess.run([*install, "torch"], check=True)  # first, at our pin: the peers ask for any torch
        subprocess.run([*install, *PINS], check=True)
        stamp.write_text(" ".join(PINS))
    return python


def residual_and_energy(original: Adapter, restored: Path) -> tuple[float, float]:
    """sum_m ||D^ - D||^2 and sum_m ||D||^2 over the modules of one adapter.

    D^ - D = s [B^ -B] [A^; A], and ||L R||^2 = <L^T L, R R^T>, which are 2r x 2r. A module that the peer left out
    counts with D^ = 0.
    """
    residual = energy = 0.0
    with safe_open(restored / "adapter_model.safetensors", framework="pt") as file:
        keys = set(file.keys())
        for module in original.modules:
            factors = original.low_rank(module)
            left, right = factors.B.double(), factors.A.double()  # (out, r), (r, in)
            key = f"base_model.model.{module}.lora_{{}}.weight"
            energy += factors.scale**2 * product_norm2(left, right)
            if key.format("A") in keys:
                left = torch.cat([file.get_tensor(key.format("B")).double(), -left], dim=1)
                right = torch.cat([file.get_tensor(key.format("A")).double(), right], dim=0)
            residual += factors.scale**2 * product_norm2(left, right)
    return residual, energy


def product_norm2(left: Tensor, right: Tensor) -> float:
    """||left @ right||^2 for left (out, r), right (r, in)."""
    return float(((left.T @ left) * (right @ right.T)).sum())


def run_peer(
    peer: str,
    directory: Path,
    *,
    setting: Mapping[str, Any] | None = None,
    timeout: float = TIMEOUT,
    threads: int = 2,
    venv: Path = ROOT / ".venv-peers",
) -> dict[str, Any]:
    """Compress all adapters below a directory with one peer at one setting, and measure what comes back.

    Args:
        peer: "vlora-dev" or "lorashare".
        directory: adapters, at any depth; their directories' names must differ.
        setting: keyword arguments of the peer's compressing function; none are its defaults.
        timeout: seconds after which compressing is cut. Writing back and measuring take as long as they take.
        threads: of torch.
        venv: the peers' virtual environment.

    Returns:
        peer, setting, adapters, original_bytes, status ("ok", "cut", "failed"), peak_memory_bytes (anonymous, of the
        whole process), wall_seconds (of the whole process); of a failure, message; of a run that came to its end,
        seconds (reading, compressing, saving; not the imports), cpu_seconds (of the same, over all threads), threads,
        bundle_bytes, ratio, mean_error, max_error.
    """
    adapters = open_adapters([str(directory)]).adapters
    if len({adapter.directory.name for adapter in adapters}) < len(adapters):
        raise ValueError(
            f"two adapters below {directory} have directories of one name, which is all a peer sees"
        )
    row: dict[str, Any] = {"peer": peer, "setting": dict(setting or {}), "adapters": len(adapters)}
    row["original_bytes"] = sum(adapter.nbytes for adapter in adapters)
    worker = [str(peer_python(venv)), str(WORKER)]
    with tempfile.TemporaryDirectory() as scratch:
        bundle, restored = Path(scratch, "bundle"), Path(scratch, "restored")
        options = json.dumps(row["setting"])
        directories = [str(adapter.directory) for adapter in adapters]
        done = watch([*worker, "compress", peer, options, str(bundle), *directories], timeout, threads)
        row |= {"status": done.status, "peak_memory_bytes": done.peak, "wall_seconds": done.seconds}
        if done.status == "failed":
            row["message"] = done.stderr.strip().splitlines()[-1]
        if done.status != "ok":
            return row
        row |= json.loads(done.stdout.splitlines()[-1])
        row["bundle_bytes"] = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
        row["ratio"] = row["original_bytes"] / row["bundle_bytes"]
        subprocess.run([*worker, "restore", peer, options, str(restored), str(bundle)], check=True)
        errors = []
        for adapter in adapters:
            residual, energy = residual_and_energy(adapter, restored / adapter.directory.name)
            errors.append(residual / energy)
        row |= {"mean_error": sum(errors) / len(errors), "max_error": max(errors)}
    return row


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One line a run."""
    result = Table(title=f"{rows[0]['adapters']} adapters, {rows[0]['original_bytes'] / 1e6:.1f} MB")
    for name in ("peer", "setting", "status", "MB", "ratio", "mean error", "worst", "seconds", "peak MB"):
        result.add_column(name, justify="left" if name in ("peer", "setting", "status") else "right")
    for row in rows:
        measured = ("", "", "", "", "")
        if row["status"] == "ok":
            measured = (
                f"{row['bundle_bytes'] / 1e6:.2f}",
                f"{row['ratio']:.2f}",
                f"{row['mean_error']:.4f}",
                f"{row['max_error']:.4f}",
                f"{row['seconds']:.1f}",
            )
        result.add_row(
            row["peer"], row["name"], row["status"], *measured, f"{row['peak_memory_bytes'] / 1e6:.0f}"
        )
    return result


def main() -> None:
    """Every peer at every setting on one directory, one after another."""
    parser = argparse.ArgumentParser(
        description="Compress a directory of adapters with vlora-dev and lorashare."
    )
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument(
        "--peer", action="append", choices=sorted(SETTINGS), help="only this one; may be repeated"
    )
    parser.add_argument("--setting", action="append", help="only settings of this name; may be repeated")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds a run (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: %(default)s)")
    parser.add_argument(
        "--venv", type=Path, default=ROOT / ".venv-peers", help="where the peers are installed"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here too")
    options = parser.parse_args()
    rows = []
    for peer in options.peer or sorted(SETTINGS):
        for name, setting in SETTINGS[peer].items():
            if options.setting is None or name in options.setting:
                print(f"{peer}, {name} ...", file=sys.stderr)
                row = run_peer(
                    peer,
                    options.directory,
                    setting=setting,
                    timeout=options.timeout,
                    threads=options.threads,
                    venv=options.venv,
                )
                rows.append({"name": name, **row})
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    Console(width=110).print(table(rows))


if __name__ == "__main__":
    main()
