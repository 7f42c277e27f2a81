#!/usr/bin/env python3
"""Every method at several settings on one directory of adapters: bytes, ratio, error, seconds, memory.

    .venv/bin/python benchmarks/compress.py examples/zoo
    .venv/bin/python benchmarks/compress.py DIR --peers --match --json figures.json

Each run is a process of its own (`lorazip compress --json`), so that memory is its own. Bytes are all files of
the bundle, the error is err_i = sum_m ||D^ - D||^2 / sum_m ||D||^2 of what is stored, seconds are wall time without
imports.
--peers adds vlora-dev and lorashare at their defaults (peers.py has more settings); --match then looks for the least
rank at which jd-full has at most a peer's own mean error, and compares the seconds of the two.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peers
from rich import box
from rich.console import Console
from rich.table import Table

TIMEOUT = 3600.0
SETTINGS: dict[str, tuple[str, ...]] = {
    "auto, error 0.1 (default)": (),
    "auto, 8 times": ("--ratio", "8"),
    "auto, 16 times": ("--ratio", "16"),
    "auto, 32 times": ("--ratio", "32"),
    "auto, 64 times": ("--ratio", "64"),
    "svd, rank 1": ("--method", "svd", "--rank", "1"),
    "svd, rank 2": ("--method", "svd", "--rank", "2"),
    "svd, rank 4": ("--method", "svd", "--rank", "4"),
    "svd, error 0.1": ("--method", "svd", "--max-error", "0.1"),
    "jd-full, paper's rule": ("--method", "jd-full"),
    "jd-full, rank 8": ("--method", "jd-full", "--rank", "8"),
    "jd-full, rank 16": ("--method", "jd-full", "--rank", "16"),
    "jd-full, rank 16, 4 clusters": ("--method", "jd-full", "--rank", "16", "--clusters", "4"),
    "jd-full, error 0.1": ("--method", "jd-full", "--max-error", "0.1"),
    "jd-diag, rank 16": ("--method", "jd-diag", "--rank", "16"),
    "eigenlora, 16": ("--method", "eigenlora", "--rank", "16"),
    "mean adapter": ("--method", "mean"),
}


def run(directory: Path, options: Sequence[str], threads: int, timeout: float) -> dict[str, Any]:
    """One `lorazip compress`; its --json figures and how it ended."""
    with tempfile.TemporaryDirectory() as scratch:
        target = str(Path(scratch, "bundle"))
        command = [
            sys.executable,
            "-m",
            "lorazip",
            "compress",
            str(directory),
            "-o",
            target,
            "--json",
            *options,
        ]
        done = peers.watch(command, timeout, threads)
        if done.status != "ok":
            return {
                "status": done.status,
                "peak_memory_bytes": done.peak,
                "message": done.stderr.strip()[-500:],
            }
        return {"status": "ok", **json.loads(done.stdout)}


def of_rank(rank: int) -> list[str]:
    """Options of jd-full with one basis a module."""
    return ["--method", "jd-full", "--rank", str(rank), "--clusters", "1"]


def matching_rank(directory: Path, error: float, threads: int, timeout: float) -> int:
    """The least rank at which jd-full's mean error is at most `error`, by doubling and bisection."""

    def reaches(rank: int) -> bool:
        row = run(directory, of_rank(rank), threads, timeout)
        return bool(row["status"] == "ok" and row["mean_error"] <= error)

    low, high = 0, 1
    while not reaches(high):
        low, high = high, 2 * high
        if high > 8192:
            raise SystemExit(f"jd-full does not reach the error {error} on {directory}")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return high


def against(directory: Path, row: dict[str, Any], threads: int, timeout: float) -> dict[str, Any]:
    """Jd-full at the error of one peer's run."""
    rank = matching_rank(directory, row["mean_error"], threads, timeout)
    ours = run(directory, of_rank(rank), threads, timeout)
    return {
        **ours,
        "name": f"jd-full, rank {rank}: at the error of {row['peer']}, {row['name']}",
        "time_ratio": ours["seconds"] / row["seconds"],
        "byte_ratio": ours["bundle_bytes"] / row["bundle_bytes"],
    }


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """One line a run."""
    drawn = Table(box=box.MARKDOWN)
    for name in ("method", "MB", "ratio", "mean error", "worst", "seconds", "peak MB", "note"):
        drawn.add_column(name, justify="left" if name in ("method", "note") else "right")
    for row in rows:
        if row["status"] != "ok":
            drawn.add_row(
                row["name"], "", "", "", "", "", f"{row['peak_memory_bytes'] / 1e6:.0f}", row["status"]
            )
            continue
        note = ""
        if "time_ratio" in row:
            note = f"{row['time_ratio']:.2f} of the peer's time, {row['byte_ratio']:.2f} of its bytes"
        drawn.add_row(
            row["name"],
            f"{row['bundle_bytes'] / 1e6:.2f}",
            f"{row['ratio']:.2f}",
            f"{row['mean_error']:.4f}",
            f"{row['max_error']:.4f}",
            f"{row['seconds']:.1f}",
            f"{row['peak_memory_bytes'] / 1e6:.0f}",
            note,
        )
    return drawn


def main() -> None:
    """Run what was asked for, print the table as it stands at the end."""
    parser = argparse.ArgumentParser(description="Compress a directory of adapters by every method.")
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--setting", action="append", choices=[*SETTINGS, "none"], help="only these of ours")
    parser.add_argument("--peers", action="store_true", help="run vlora-dev and lorashare too")
    parser.add_argument(
        "--peer-setting", action="append", help="settings of peers.py (default: their defaults)"
    )
    parser.add_argument("--match", action="store_true", help="with --peers: jd-full at each peer's own error")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds a run of ours (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: %(default)s)")
    parser.add_argument(
        "--venv", type=Path, default=peers.ROOT / ".venv-peers", help="where the peers are installed"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here too")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in options.setting or SETTINGS:
        if name != "none":
            print(f"{name} ...", file=sys.stderr)
            rows.append(
                {"name": name, **run(options.directory, SETTINGS[name], options.threads, options.timeout)}
            )
    if options.peers:
        for peer, settings in sorted(peers.SETTINGS.items()):
            for name in options.peer_setting or ["default"]:
                if name in settings:
                    print(f"{peer}, {name} ...", file=sys.stderr)
                    row = peers.run_peer(
                        peer,
                        options.directory,
                        setting=settings[name],
                        threads=options.threads,
                        venv=options.venv,
                    )
                    rows.append({**row, "name": f"{peer}, {name}"})
                    if options.match and row["status"] == "ok":
                        row = {**row, "name": name}
                        rows.append(against(options.directory, row, options.threads, options.timeout))
    console = Console(width=150)
    if rows and "adapters" in rows[0]:
        console.print(f"{rows[0]['adapters']} adapters, {rows[0]['original_bytes'] / 1e6:.1f} MB")
    console.print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
