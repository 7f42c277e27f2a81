#!/usr/bin/env python3
"""Generate LoRA adapters of Mistral-7B's shapes with a planted shared subspace, to measure speed and memory.

Adapter i belongs to cluster c = i mod C. Per module, with U_c (out, K), V_c (in, K) orthonormal and random:

    B_i = g_i (sqrt(1 - nu) U_c X_i   + sqrt(nu) N_i),    X_i (K, r) ~ N(0, 1/K),  N_i (out, r) ~ N(0, 1/out)
    A_i =      sqrt(1 - nu) Y_i V_c^T + sqrt(nu) M_i,     Y_i (r, K) ~ N(0, 1/K),  M_i (r, in)  ~ N(0, 1/in)

so that a share nu of each factor's energy lies outside the planted bases, and D_i = (alpha/r) B_i A_i, given
the planted bases, has the squared relative error 1 - (1 - nu)^2 (up to terms of K/out and K/in). The default,
nu = 0.25, gives 0.44, where the better compressible real pools lie. The strength g_i is log-uniform in
[10^-1/2, 10^1/2]: real adapters differ by an order of magnitude too.

An adapter depends on the options and its index alone, not on n: a smaller set is a prefix of a larger one.
A run that was cut goes on where it stopped. Memory: the bases of one cluster and one adapter.

    python benchmarks/generate.py /data/gen500 --n 500 --clusters 25
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

# Mistral-7B: hidden size 4096; 32 query heads and 8 key and value heads of 128.
SHAPES = {"q_proj": (4096, 4096), "k_proj": (1024, 4096), "v_proj": (1024, 4096)}
SMALL = {"q_proj": (64, 64), "k_proj": (16, 64), "v_proj": (16, 64)}


@dataclass(frozen=True)
class Recipe:
    """Everything an adapter depends on, besides its index; kept in OUT/recipe.json."""

    rank: int
    layers: int
    planted: int
    clusters: int
    noise: float
    dtype: str
    seed: int
    small: bool

    def modules(self) -> dict[str, tuple[int, int]]:
        """Module name -> (out, in)."""
        shapes = SMALL if self.small else SHAPES
        return {
            f"model.layers.{layer}.self_attn.{name}": shape
            for layer in range(self.layers)
            for name, shape in shapes.items()
        }

    def config(self) -> dict[str, object]:
        """The adapter_config.json of every adapter."""
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "mistralai/Mistral-7B-v0.1",
            "r": self.rank,
            "lora_alpha": 2 * self.rank,
            "target_modules": sorted(SMALL),
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "lora_dropout": 0.0,
        }


def stream(recipe: Recipe, kind: int, index: int) -> torch.Generator:
    """The random numbers of one cluster (kind 0) or adapter (kind 1).

    Torch's CPU generator looks at 32 bits of its seed only; a multiplication by a large odd number spreads them.
    """
    number = (recipe.seed * 2 + kind) * 1_000_003 + index
    return torch.Generator().manual_seed(number * 2_654_435_761 % 2**32)


def planted_bases(recipe: Recipe, cluster: int) -> dict[str, tuple[Tensor, Tensor]]:
    """U (out, K) and V (in, K), orthonormal, of every module; K is cut to a narrow module's width."""
    random = stream(recipe, 0, cluster)
    bases = {}
    for module, (out, in_) in recipe.modules().items():
        left, _ = torch.linalg.qr(torch.randn(out, min(recipe.planted, out), generator=random))
        right, _ = torch.linalg.qr(torch.randn(in_, min(recipe.planted, in_), generator=random))
        bases[module] = (left, right)
    return bases


def adapter(recipe: Recipe, index: int, bases: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The tensors of adapter_model.safetensors, by PEFT's keys."""
    random = stream(recipe, 1, index)
    strength = 10 ** (torch.rand((), generator=random, dtype=torch.float64).item() - 0.5)
    dtype = getattr(torch, recipe.dtype)
    signal, noise, rank = math.sqrt(1 - recipe.noise), math.sqrt(recipe.noise), recipe.rank
    tensors = {}
    for module, (left, right) in bases.items():
        for side, basis, size in (("A", right, 1.0), ("B", left, strength)):
            width, planted = basis.shape
            cores = torch.randn(planted, rank, generator=random).mul_(size * signal / math.sqrt(planted))
            factor = torch.randn(width, rank, generator=random).mul_(size * noise / math.sqrt(width))
            factor.addmm_(basis, cores)  # (width, r)
            oriented = factor.T if side == "A" else factor
            tensors[f"base_model.model.{module}.lora_{side}.weight"] = oriented.to(dtype).contiguous()
    return tensors


def generate(out: Path, n: int, recipe: Recipe) -> int:
    """Write adapters 0..n-1 below `out`, cluster by cluster; returns how many were missing."""
    record = out / "recipe.json"
    if record.exists() and json.loads(record.read_text()) != asdict(recipe):
        sys.exit(f"{out} holds adapters of another recipe ({record}); choose another directory")
    out.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(asdict(recipe), indent=2) + "\n")
    config = json.dumps(recipe.config(), indent=2) + "\n"
    written = 0
    for cluster in range(min(recipe.clusters, n)):
        folders = {index: out / f"gen_{index:04d}" for index in range(cluster, n, recipe.clusters)}
        missing = {
            i: path for i, path in folders.items() if not (path / "adapter_model.safetensors").exists()
        }
        bases = planted_bases(recipe, cluster) if missing else {}
        for index, folder in missing.items():
            folder.mkdir(exist_ok=True)
            (folder / "adapter_config.json").write_text(config)
            partial = folder / "adapter_model.safetensors.partial"
            save_file(adapter(recipe, index, bases), partial, metadata={"format": "pt"})
            os.replace(partial, folder / "adapter_model.safetensors")
            written += 1
    return written


def main() -> None:
    """Read the options, generate, say how long it took."""
    parser = argparse.ArgumentParser(description="Generate LoRA adapters of Mistral-7B's shapes (q, k, v).")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--n", type=int, default=64, help="adapters (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--planted", type=int, default=16, metavar="K", help="columns of the planted bases")
    parser.add_argument(
        "--clusters", type=int, default=1, metavar="C", help="planted bases (default: %(default)s)"
    )
    parser.add_argument(
        "--noise", type=float, default=0.25, metavar="NU", help="share of energy outside them, 0..1"
    )
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="hidden size 64, for tests")
    options = vars(parser.parse_args())
    out, n = options.pop("out"), options.pop("n")
    torch.set_num_threads(1)  # the same bytes on every machine with this torch
    start = time.perf_counter()
    written = generate(out, n, Recipe(**options))
    print(f"{written} of {n} adapters written to {out} in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
