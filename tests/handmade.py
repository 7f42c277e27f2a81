"""Small PEFT adapters on disk, made from a seed."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

PREFIX = "base_model.model."

# Two layers with grouped queries, so that out differs from in: module -> (out, in).
MODULES = {
    f"model.layers.{layer}.self_attn.{name}": shape
    for layer in range(2)
    for name, shape in {"q_proj": (24, 24), "k_proj": (8, 24), "v_proj": (8, 24)}.items()
}


class MakeAdapter:
    """Writes small PEFT adapters below a directory.

    Attributes:
        root: relative directories are below it.
        modules: the modules of an adapter that is not told otherwise: module -> (out, in).
        prefix: what PEFT puts before a module in a key.
    """

    modules = MODULES
    prefix = PREFIX

    def __init__(self, root: Path):
        self.root = root

    def __call__(
        self,
        directory: str | Path,
        *,
        modules: Mapping[str, tuple[int, int]] = MODULES,
        rank: int | Mapping[str, int] = 4,
        alpha: float = 8,
        dtype: torch.dtype = torch.float32,
        seed: int | None = None,
        a_seed: int | None = None,
        tensors: Mapping[str, torch.Tensor | None] | None = None,
        **config: Any,
    ) -> Path:
        """Write an adapter with random factors and return its directory.

        Args:
            directory: where to; relative to `root`.
            modules: module -> (out, in).
            rank: of all modules, or module -> rank; ranks that differ from the first become rank_pattern.
            alpha: lora_alpha.
            dtype: of the factors.
            seed: of the factors; by default from the directory's name, so that adapters differ.
            a_seed: of A alone: adapters with the same one share their A.
            tensors: key in the file -> tensor that replaces or joins what is written; None removes it.
            config: fields of adapter_config.json that replace or join the usual ones.
        """
        path = self.root / directory
        ranks = {module: rank if isinstance(rank, int) else rank[module] for module in modules}
        first = next(iter(ranks.values()))
        own = torch.Generator().manual_seed(zlib.crc32(path.name.encode()) if seed is None else seed)
        shared = own if a_seed is None else torch.Generator().manual_seed(a_seed)
        content: dict[str, torch.Tensor | None] = {}
        for module, (out, in_) in modules.items():
            a = torch.randn(ranks[module], in_, generator=shared) / in_**0.5
            b = torch.randn(out, ranks[module], generator=own) * 0.1
            content[f"{PREFIX}{module}.lora_A.weight"] = a.to(dtype)
            content[f"{PREFIX}{module}.lora_B.weight"] = b.to(dtype)
        content.update(tensors or {})
        fields = {
            "base_model_name_or_path": "org/base",
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "lora_alpha": alpha,
            "modules_to_save": None,
            "peft_type": "LORA",
            "r": first,
            "rank_pattern": {module: r for module, r in ranks.items() if r != first},
            "revision": None,
            "target_modules": sorted({module.rpartition(".")[2] for module in modules}),
            "task_type": "CAUSAL_LM",
            "use_dora": False,
            "use_rslora": False,
        } | config
        path.mkdir(parents=True, exist_ok=True)
        (path / "adapter_config.json").write_text(json.dumps(fields, indent=2))
        present = {key: tensor for key, tensor in content.items() if tensor is not None}
        save_file(present, path / "adapter_model.safetensors", metadata={"format": "pt"})
        return path
