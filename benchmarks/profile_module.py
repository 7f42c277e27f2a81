#!/usr/bin/env python3
"""How much of the time of one module is spent inside torch: the rest is Python.

    .venv/bin/python benchmarks/profile_module.py DIR --rank 16 --clusters 25

Encodes the first q_proj module of the adapters in DIR under torch's profiler, on one thread, and prints the operators'
own time as a share of the wall time. Reading counts as torch: factors are copied out of the mapped files by `copy_`.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch.profiler import ProfilerActivity, profile

from lorazip import Spec, open_adapters
from lorazip.compress.encode import encode


def main() -> None:
    """Profile one module and print the share and the ten dearest operators."""
    parser = argparse.ArgumentParser(description="Share of one module's time inside torch.")
    parser.add_argument("directory", metavar="DIR")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--clusters", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    inputs = open_adapters([options.directory])
    name = next(module for module in inputs.modules if "q_proj" in module)
    factors = [adapter.low_rank(name) for adapter in inputs.adapters if name in adapter.modules]
    spec = Spec("jd-full", rank=options.rank, clusters=options.clusters)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        start = time.perf_counter()
        encode(name, factors, spec)
        wall = time.perf_counter() - start
    events = recorded.key_averages()
    inside = sum(event.self_cpu_time_total for event in events) / 1e6
    print(
        f"{name}, {len(factors)} adapters: {wall:.2f} s, {inside:.2f} s of it inside torch: {inside / wall:.1%}"
    )
    print(events.table(sort_by="self_cpu_time_total", row_limit=10, max_name_column_width=30))


if __name__ == "__main__":
    main()
