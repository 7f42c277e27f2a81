#!/usr/bin/env python3
r"""Do both backends agree with each other and with the scores of a zoo, and what does a mixed vLLM batch gain?

    python benchmarks/backends.py BASE ZOO TASKS [--limit N] [--adapters N] [--output FILE.json]

ZOO holds PEFT directories and scores.jsonl, as benchmarks/make_zoo.py writes them; TASKS is the data that they were
trained on; vLLM must be installed. Three parts:

1. Teacher-forced exact match of every adapter on its task, in both backends, float32, against scores.jsonl.
2. Examples on which the backends decide differently, with the gap of the two most likely tokens there.
3. Examples a second, written and forced: transformers one by one, transformers in batches, vLLM in one mixed batch of
   all adapters, the same calls in each. The absolute figures are this machine's; the ratios are what counts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lorazip import base as bases
from lorazip import open_adapters
from lorazip.eval import plan, tasks
from lorazip.eval.backend import Acting, Backend, Call, Forced, Greedy, Scores, digest
from lorazip.eval.cache import Cache
from lorazip.eval.prompts import Prompter
from lorazip.eval.session import Session, engine
from lorazip.eval.spec import EvalSpec

MAX_TOKENS = 160  # the zoo was scored without longer examples
WRITTEN = 32  # tokens of a written answer in the measurement of speed


def questions(
    base: Path, zoo: Path, data: Path, limit: int | None, most: int | None
) -> tuple[Prompter, list[Acting], dict[str, list[plan.Question]]]:
    """The adapters that have a task, and their questions by name."""
    found = tasks.find([str(data)])
    prompter = Prompter(bases.load_tokenizer(base))
    spec = EvalSpec(limit=limit, metric="exact_match", max_tokens=MAX_TOKENS)
    actings, asked = [], {}
    for adapter in open_adapters([str(zoo)], base=str(base)).adapters[:most]:
        task = tasks.read(found[adapter.name][0], split="test", limit=limit, columns={})
        asked[adapter.name] = list(plan.prepare(task, prompter, spec, 2048, []).questions)
        actings.append(Acting(f"original/{adapter.name}", adapter, adapter.directory, digest(adapter)))
    return prompter, actings, asked


def forced(
    base: Path, kind: str, prompter: Prompter, actings: Sequence[Acting], asked: Any, cache: Path
) -> list[Scores]:
    """All scores of one backend, in the order of the adapters and their questions."""
    calls = [Forced(a.key, q.prompt, q.answer) for a in actings for q in asked[a.adapter.name]]
    canaries = [(*asked[a.adapter.name][0].prompt, *asked[a.adapter.name][0].answer) for a in actings]
    store = Cache(cache)

    def show(what: str, done: int, total: int, note: str = "") -> None:
        if done % 500 == 0 or done == total:
            print(f"{kind}: {what}: {done}/{total}", flush=True)

    with Session(
        base,
        prompter.tokenizer,
        actings,
        canaries,
        engine(kind, "float32", "cpu"),
        store,
        2 * MAX_TOKENS,
        show,
    ) as session:
        answers = session.ask(calls)
        session.proof()
    store.close()
    return [answer for answer in answers if isinstance(answer, Scores)]


def compare(
    found: dict[str, list[Scores]], actings: Sequence[Acting], asked: Any, zoo: Path
) -> dict[str, Any]:
    """Exact match by task and backend, against scores.jsonl; and where the backends differ."""
    known = {
        row["task"]: row["lora"] for row in map(json.loads, (zoo / "scores.jsonl").read_text().splitlines())
    }
    rows, start = [], 0
    for acting in actings:
        name, n = acting.adapter.name, len(asked[acting.adapter.name])
        row: dict[str, Any] = {"task": name, "n": n, "recorded": known[name]["exact_match"]}
        for kind, scores in found.items():
            row[kind] = sum(s.exact for s in scores[start : start + n]) / n
        rows.append(row)
        start += n
    some, other = found["hf"], found["vllm"]
    differ = [
        max(min(abs(g) for g in a.gaps), min(abs(g) for g in b.gaps))
        for a, b in zip(some, other, strict=True)
        if a.exact != b.exact
    ]
    off = max(
        abs(p - q)
        for a, b in zip(some, other, strict=True)
        for p, q in zip(a.logprobs, b.logprobs, strict=True)
    )
    return {
        "tasks": rows,
        "examples": len(some),
        "largest_difference_from_recorded": {k: max(abs(r[k] - r["recorded"]) for r in rows) for k in found},
        "mean_difference_from_recorded": {
            k: sum(abs(r[k] - r["recorded"]) for r in rows) / len(rows) for k in found
        },
        "decided_differently": len(differ),
        "largest_gap_there": max(differ, default=0.0),
        "largest_difference_of_logprobs": off,
    }


def rate(backend: Backend, calls: Sequence[Call], alone: bool) -> float:
    """Examples a second, after one call to warm up."""
    list(backend.run(calls[:1]))
    begun = time.perf_counter()
    if alone:
        for call in calls:
            list(backend.run([call]))
    else:
        list(backend.run(calls))
    return len(calls) / (time.perf_counter() - begun)


def speed(base: Path, prompter: Prompter, actings: Sequence[Acting], asked: Any, each: int) -> dict[str, Any]:
    """Examples a second of three ways, for written and for forced answers."""
    from lorazip.eval.transformers_backend import TransformersBackend
    from lorazip.eval.vllm_backend import VllmBackend

    pairs = [(a.key, q) for a in actings for q in asked[a.adapter.name][:each]]
    kinds: dict[str, list[Call]] = {
        # Nothing stops an answer but its length and the model's own end.
        f"written, at most {WRITTEN} tokens": [Greedy(key, q.prompt, WRITTEN) for key, q in pairs],
        "forced": [Forced(key, q.prompt, q.answer) for key, q in pairs],
    }
    found: dict[str, Any] = {
        "adapters": len(actings),
        "examples": len(pairs),
        "threads": torch.get_num_threads(),
    }
    backend: Backend = TransformersBackend(
        base, prompter.tokenizer, actings, dtype=torch.float32, device=torch.device("cpu")
    )
    for name, calls in kinds.items():
        found[name] = {"transformers, one by one": rate(backend, calls, True)}
        found[name]["transformers, batched"] = rate(backend, calls, False)
    backend.close()
    backend = VllmBackend(base, prompter.tokenizer, actings, dtype=torch.float32, longest=2 * MAX_TOKENS)
    for name, calls in kinds.items():
        found[name]["vllm, mixed"] = rate(backend, calls, False)
        for other in ("one by one", "batched"):
            found[name][f"vllm / {other}"] = (
                found[name]["vllm, mixed"] / found[name][f"transformers, {other}"]
            )
    backend.close()
    return found


def main() -> None:
    """Run the parts and print them as JSON."""
    parser = argparse.ArgumentParser(description="Compare the backends of lorazip eval.")
    parser.add_argument("base", type=Path)
    parser.add_argument("zoo", type=Path)
    parser.add_argument("tasks", type=Path)
    parser.add_argument("--limit", type=int, help="examples of a task")
    parser.add_argument("--adapters", type=int, help="only the first so many")
    parser.add_argument("--speed-only", action="store_true", help="leave parts 1 and 2 out")
    parser.add_argument(
        "--each", type=int, default=8, help="examples of an adapter in the measurement of speed"
    )
    parser.add_argument("--output", type=Path)
    parser.add_argument("--cache", type=Path, help="keep the answers here, to go on after a break")
    args = parser.parse_args()
    prompter, actings, asked = questions(args.base, args.zoo, args.tasks, args.limit, args.adapters)
    found: dict[str, Any] = {}
    if not args.speed_only:
        with tempfile.TemporaryDirectory() as scratch:
            cache = args.cache or Path(scratch)
            both = {k: forced(args.base, k, prompter, actings, asked, cache) for k in ("hf", "vllm")}
        found = compare(both, actings, asked, args.zoo)
    found["speed"] = speed(args.base, prompter, actings[:12], asked, args.each)
    text = json.dumps(found, indent=2)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
