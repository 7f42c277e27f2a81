#!/usr/bin/env python3
r"""What `--method auto` gains over every published method at the same bytes: errors, and scores kept on the tasks.

    python benchmarks/frontier.py ZOO                                measure errors
    python benchmarks/frontier.py ZOO --base BASE --tasks TASKS      and how much of the adapters' scores is kept
    python benchmarks/frontier.py ZOO --page docs/RESULTS.md         write the page from what is measured so far

ZOO holds PEFT directories and scores.jsonl, as benchmarks/make_zoo.py writes them; TASKS is the data that they were
trained on. Every result is a line of --results, and a rerun measures only what is missing there.

1. Errors. Subsets of 4, 8, 16 and 32 adapters (the first ones of one shuffled order, so that they are nested), all of
   them, and those with a shared and with an own start apart; ratios 4 to 64, bytes of the originals' files over every
   byte of the bundle. Each method has the setting of least mean error whose bundle is no larger: frontier_methods.py.
2. Scores kept, of the bundles of 8, 16 and all adapters, at ratios 24, 48 and 12: frontier_kept.py.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import frontier_kept
import frontier_page
import peers
from frontier_measure import ROOT, Row, Store, Subset, code, compressed, ready
from frontier_methods import TITLES, Ladder, Sizes, described, ladders

from lorazip import Spec, open_adapters

COUNTS = (4, 8, 16, 32)
RATIOS = (4.0, 8.0, 16.0, 32.0, 64.0)
SEED = 0
KEPT_SUBSETS, KEPT_RATIOS = ("all", "16", "8"), (24.0, 48.0, 12.0)
RISES = 2  # settings in a row that are worse than the best, after which a group is given up
Cell = tuple[Subset, str, float]  # a method at a ratio


def subsets(zoo: Path) -> dict[str, Subset]:
    """The sets of adapters, all first."""
    adapters = open_adapters([str(zoo)]).adapters
    order = list(adapters)
    random.Random(SEED).shuffle(order)
    found = {"all": adapters}
    for count in sorted(COUNTS, reverse=True):
        if count < len(adapters):
            chosen = {adapter.name for adapter in order[:count]}
            found[str(count)] = tuple(a for a in adapters if a.name in chosen)
    starts = {name: row.get("init") for name, row in scores(zoo).items()}
    for start in ("shared", "own"):
        some = tuple(a for a in adapters if starts.get(a.name) == start)
        if 0 < len(some) < len(adapters):
            found[start] = some
    return {label: Subset(label, some) for label, some in found.items()}


def scores(zoo: Path) -> dict[str, Row]:
    """The lines of scores.jsonl by task; none where there is no such file."""
    path = zoo / "scores.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {row["task"]: row for row in map(json.loads, lines)}


@dataclass
class Bench:
    """Measures methods at budgets, and looks into the store first.

    Attributes:
        threads: of torch, in every compression.
    """

    store: Store
    threads: int
    _reference: dict[str, Row] = field(default_factory=dict)
    _sizes: dict[str, Sizes] = field(default_factory=dict)

    def cell(self, subset: Subset, method: str, ratio: float) -> Row:
        """The best setting of a method at a ratio; a row without figures where none is so small."""
        key = {"kind": "cell", "adapters": subset.digest, "method": method, "ratio": ratio}
        key["code"] = code(method)
        known = self.store.find(key)
        if known is not None:
            return known
        best = self._auto(subset, ratio) if method == "auto" else self._best(subset, method, ratio)
        figures = {} if best is None else {"setting": best["key"]["setting"], **best["figures"]}
        return self.store.add(key, subset=subset.label, n=len(subset.adapters), figures=figures)

    def _auto(self, subset: Subset, ratio: float) -> Row | None:
        row = self._fit(subset, "auto", Spec("auto", ratio=ratio))
        return row if row["figures"] else None

    def _best(self, subset: Subset, method: str, ratio: float) -> Row | None:
        budget = subset.original_bytes / ratio
        if subset.label not in self._sizes:
            self._sizes[subset.label] = Sizes(open_adapters(subset.paths))
        sizes, best = self._sizes[subset.label], None
        for group in ladders(method, sizes.inputs):
            least, rises = float("inf"), 0
            for ladder in group:
                row = self._climbed(subset, method, ladder, sizes.last_that_fits(ladder, budget), budget)
                if row is None:
                    continue
                error = row["figures"]["mean_error"]
                rises = 0 if error < least else rises + 1
                least = min(least, error)
                if best is None or error < best["figures"]["mean_error"]:
                    best = row
                if rises == RISES:
                    break
        return best

    def _climbed(self, subset: Subset, method: str, ladder: Ladder, last: int, budget: float) -> Row | None:
        """The fit of a ladder's last setting that fits; a little lower where its real bytes are too many."""
        step = 1
        while last > 0:
            row = self._fit(subset, method, ladder.at(last))
            if row["figures"]["bundle_bytes"] <= budget:
                return row
            last, step = last - step, 2 * step
        return None

    def _fit(self, subset: Subset, method: str, spec: Spec) -> Row:
        setting = spec.recorded()
        key = {"kind": "fit", "adapters": subset.digest, "setting": setting, "code": code(method)}
        known = self.store.find(key)
        if known is not None:
            return known
        print(f"{subset.label}: {TITLES[method]}, {described(setting)} …", file=sys.stderr, flush=True)
        # Time is told in fits of jd-full by the same process tree, on the same machine, a little before.
        reference = self.reference(subset) if method == "auto" else {}
        figures = compressed(subset.paths, setting, self.threads)
        times = {f"reference_{name}": figure for name, figure in reference.items()}
        return self.store.add(key, subset=subset.label, figures={} if figures is None else figures | times)

    def reference(self, subset: Subset) -> Row:
        """One jd-full with its defaults on these adapters, measured in this run."""
        if subset.label not in self._reference:
            found = compressed(subset.paths, {"method": "jd-full"}, self.threads)
            assert found is not None
            self._reference[subset.label] = found
        return self._reference[subset.label]

    def peer(self, subset: Subset, peer: str, venv: Path) -> Row:
        """Another tool at its defaults, as it stores."""
        key = {"kind": "peer", "adapters": subset.digest, "peer": peer, "pins": list(peers.PINS)}
        known = self.store.find(key)
        if known is not None:
            return known
        print(f"{subset.label}: {peer} …", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            for adapter in subset.adapters:
                shutil.copytree(adapter.directory, Path(scratch, adapter.name))
            figures = peers.run_peer(peer, Path(scratch), threads=self.threads, venv=venv)
        return self.store.add(key, subset=subset.label, n=len(subset.adapters), figures=figures)


@dataclass(frozen=True)
class Plan:
    """What is asked for, in the order in which it is measured."""

    found: dict[str, Subset]
    options: argparse.Namespace

    def errors(self) -> Iterator[Cell]:
        """Subset by subset; ours first."""
        for subset in self.chosen(list(self.found)):
            for method in self.methods:
                for ratio in self.options.ratio or RATIOS:
                    yield subset, method, ratio

    def kept(self) -> Iterator[Cell]:
        """All adapters first, and ours first of all methods."""
        ratios = self.options.ratio or KEPT_RATIOS
        for subset in self.chosen([label for label in KEPT_SUBSETS if label in self.found]):
            for method in self.methods:
                more = self.options.kept_ratio or [] if method == "auto" else []
                yield from ((subset, method, ratio) for ratio in dict.fromkeys([*ratios, *more]))

    @cached_property
    def methods(self) -> list[str]:
        return [method for method in TITLES if method in (self.options.method or TITLES)]

    def chosen(self, labels: Sequence[str]) -> list[Subset]:
        return [self.found[label] for label in labels if label in (self.options.n or labels)]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="auto against every method at the same bytes.")
    add: Any = parser.add_argument
    add("zoo", type=Path, metavar="ZOO")
    add("--base", type=Path, help="the base model's directory, for the scores")
    add("--tasks", type=Path, help="the tasks that the adapters were trained on")
    add("--results", type=Path, default=ROOT / "build" / "frontier.jsonl", metavar="FILE")
    add("--page", type=Path, metavar="FILE", help="write the page of what is measured, and measure nothing")
    add("--only", choices=("errors", "kept"), help="one part")
    add("--method", action="append", choices=list(TITLES), help="only this one; repeatable")
    add("--n", action="append", metavar="N", help="only these adapters: 4 … all, shared, own; repeatable")
    add("--ratio", action="append", type=float, help="only this ratio; repeatable")
    add("--kept-ratio", action="append", type=float, help="scores of auto at this ratio too; repeatable")
    add("--examples", type=int, default=frontier_kept.EXAMPLES, help="of a task (default: %(default)s)")
    add("--threads", type=int, default=2, help="of torch (default: %(default)s)")
    add("--stale", action="store_true", help="what an older version of the code measured counts too")
    add("--cache", type=Path, help="answers of the model (default: beside the results)")
    add("--peers", action="store_true", help="vlora-dev and lorashare too, with --only errors or neither")
    add("--venv", type=Path, default=peers.ROOT / ".venv-peers", help="where the peers are installed")
    options = parser.parse_args(argv)
    if (options.base is None) != (options.tasks is None):
        parser.error("--base and --tasks go together")
    if options.only == "kept" and options.base is None:
        parser.error("--only kept needs --base and --tasks")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing, or write the page."""
    options = arguments(argv)
    plan = Plan(subsets(options.zoo), options)
    unknown = set(options.n or ()) - set(plan.found)
    if unknown:
        raise SystemExit(f"{options.zoo} has no subset {', '.join(sorted(unknown))}")
    store = Store(options.results, options.stale)
    if options.page:
        frontier_page.write(options.page, store, plan.found, scores(options.zoo))
        return
    ready()
    bench = Bench(store, options.threads)
    if options.only != "kept":
        for cell in plan.errors():
            bench.cell(*cell)
        if options.peers:
            for subset in plan.chosen(list(plan.found)):
                for peer in sorted(peers.SETTINGS):
                    bench.peer(subset, peer, options.venv)
    if options.only != "errors" and options.base:
        judge = frontier_kept.Judge(
            store,
            options.base,
            options.tasks,
            options.cache or options.results.parent / "frontier-cache",
            options.examples,
            options.threads,
            scores(options.zoo),
        )
        for subset, method, ratio in plan.kept():
            judge.kept(subset, bench.cell(subset, method, ratio))


if __name__ == "__main__":
    main()
