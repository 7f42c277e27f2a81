"""How much of the adapters' scores a bundle keeps on their own tasks, for frontier.py.

`lorazip.evaluate` scores the originals and the bundle on the same examples: teacher-forced exact match, transformers,
float32. kept = Σ score(bundle) / Σ score(original) over the adapters, with its interval from a bootstrap over examples,
paired and stratified by adapter; and for each adapter the difference with its own (docs/EVAL.md, "Statistics").

Only adapters that learned their task are asked: of the others there is nothing to keep. The originals' answers stay in
the cache, so that every further bundle costs only its own.
"""

from __future__ import annotations

import hashlib
import random
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from frontier_measure import Row, Store, Subset, code
from frontier_methods import TITLES, described

import lorazip
from lorazip import EvalSpec, Results, Spec
from lorazip.eval import tasks
from lorazip.eval.cache import Cache
from lorazip.eval.session import engine

LEARNED = 0.3  # exact match of an adapter that counts as having learned its task
MOST = 24  # adapters that are scored
EXAMPLES = 50  # of each task
MAX_TOKENS = 160  # the zoo was scored without longer examples
SEED = 0
BUNDLE = "bundle"  # the arm's name


@dataclass(frozen=True)
class Judge:
    """Scores bundles, and looks into the store first.

    Attributes:
        cache: directory of the model's answers.
        examples: of each task.
        scores: the zoo's own, by task.
    """

    store: Store
    base: Path
    data: Path
    cache: Path
    examples: int
    threads: int
    scores: Mapping[str, Row]

    def kept(self, subset: Subset, cell: Row) -> Row | None:
        """The score that a method's best setting keeps; None where the method cannot be so small."""
        if not cell["figures"]:
            return None
        names = self.learned(subset)
        method, ratio = cell["key"]["method"], cell["key"]["ratio"]
        setting = cell["figures"]["setting"]
        key = {
            "kind": "kept", "adapters": subset.digest, "method": method, "ratio": ratio, "setting": setting,
            "code": code(method), "base": self._base, "data": self._data(names), "names": names,
            "examples": self.examples,
        }  # fmt: skip
        known = self.store.find(key)
        if known is not None:
            return known
        title = f"{subset.label}: scores of {TITLES[method]}, {described(setting)}"
        print(f"{title}, ratio {ratio:g} …", file=sys.stderr, flush=True)
        torch.set_num_threads(self.threads)
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, BUNDLE)
            bundle = lorazip.compress(subset.paths, Spec(**setting), path)
            about = {"nbytes": bundle.nbytes, "real_ratio": bundle.original_bytes / bundle.nbytes}
            about["mean_error"] = sum(a.record.error for a in bundle) / len(bundle)
            figures = self._figures(self._evaluated(subset, names, path))
        return self.store.add(key, subset=subset.label, n=len(subset.adapters), figures=about | figures)

    def learned(self, subset: Subset) -> list[str]:
        """The adapters that are scored: a fixed choice of those that learned their task."""
        known = self.scores
        found = [n for n in subset.names if n in known and known[n]["lora"]["exact_match"] >= LEARNED]
        if not found:
            raise SystemExit(f"no adapter of {subset.label} learned its task by scores.jsonl")
        return sorted(random.Random(SEED).sample(found, MOST)) if len(found) > MOST else found

    def _evaluated(self, subset: Subset, names: list[str], bundle: Path) -> Results:
        paths = [path for path, name in zip(subset.paths, subset.names, strict=True) if name in names]
        return lorazip.evaluate(
            str(self.base),
            [str(self.data)],
            adapters=paths,
            bundles=[bundle],
            spec=EvalSpec(limit=self.examples, metric="exact_match", max_tokens=MAX_TOKENS),
            backend=engine("hf", "float32"),
            cache=self.cache,
        )

    def _figures(self, results: Results) -> dict[str, Any]:
        own, original = results.of(BUNDLE), results.of("original")
        assert own.kept is not None, "no original is ten points above the base"
        return {
            "kept": asdict(own.kept),
            "kept_adapters": own.kept_adapters,
            "score": own.score.estimate,
            "original_score": original.score.estimate,
            "differences": {
                c.adapter: [c.difference.estimate, c.difference.low, c.difference.high]
                for c in results.comparisons
            },
            "originals": {r.adapter: r.score for r in results.rows if r.arm == "original" and r.primary},
            "fixes_per_100": own.fixes_per_100,
            "breaks_per_100": own.breaks_per_100,
            "engine": results.settings["engine"],
            "seconds": results.cost["total_seconds"],
        }

    @cached_property
    def _base(self) -> str:
        store = Cache(self.cache)
        try:
            return store.model_digest(self.base)[:12]
        finally:
            store.close()

    def _data(self, names: list[str]) -> str:
        found, digest = tasks.find([str(self.data)]), hashlib.sha256()
        for name in names:
            if name not in found:
                raise SystemExit(f"{self.data} has no task {name}")
            for path in found[name][0].files.values():
                digest.update(path.read_bytes())
            digest.update(str(found[name][0].index).encode())
        return digest.hexdigest()[:12]
