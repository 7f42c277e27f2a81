"""One adapter merged into its base: a model directory with W + scale B A in place of W."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lorazip.adapter import Adapter
from lorazip.errors import Defect, InputError, TargetError, UsageError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def weight_files(base: Path) -> dict[str, list[str]]:
    """The weights of a model directory: file -> its tensors.

    Raises:
        UsageError: it has no safetensors weights, or they cannot be read.
    """
    try:
        if (base / INDEX).is_file():
            files: dict[str, list[str]] = {}
            for key, file in json.loads((base / INDEX).read_text(encoding="utf-8"))["weight_map"].items():
                files.setdefault(file, []).append(key)
            return files
        with safe_open(base / SINGLE, framework="pt") as weights:
            return {SINGLE: list(weights.keys())}
    except (OSError, SafetensorError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UsageError(
            f"{base}: its weights cannot be read: {error} (name a model with {SINGLE})"
        ) from error


def merge(base: Path, adapter: Adapter, target: Path) -> int:
    """Write the merged model, one file of weights at a time; what does not change is linked to.

    W' = W + scale B A is computed in float32 and rounded to the type of W, as merged models are published.

    Args:
        base: a model directory with safetensors weights.
        adapter: what is merged; all its modules must have a weight in the base.
        target: the directory to make.
    Returns:
        Bytes of the merged model's weights.
    Raises:
        InputError: a module has no weight in the base, or one of another shape or an integer type.
        UsageError: the base's weights cannot be read; TargetError: the target cannot be written.
    """
    files = weight_files(base)
    place = {key: file for file, keys in files.items() for key in keys}
    changed = {f"{module}.weight": module for module in adapter.modules}
    missing = [module for key, module in changed.items() if key not in place]
    if missing:
        raise InputError([Defect(adapter.name, m, "", f"has no weight in {base}", _OTHER) for m in missing])
    try:
        target.mkdir()
        for file in base.iterdir():
            if file.is_file() and file.name not in files and file.suffix != ".safetensors":
                (target / file.name).symlink_to(file.resolve())
        for name, keys in files.items():
            if changed.keys().isdisjoint(keys):
                (target / name).symlink_to((base / name).resolve())
            else:
                _merge_file(base / name, target / name, adapter, changed)
        return sum((target / name).stat().st_size for name in files)
    except (OSError, SafetensorError) as error:
        raise TargetError(f"{target}: the merged model cannot be written: {error}") from error


_OTHER = "merge it into its own base"


def _merge_file(source: Path, target: Path, adapter: Adapter, changed: Mapping[str, str]) -> None:
    with safe_open(source, framework="pt") as weights:
        merged: dict[str, Tensor] = {key: weights.get_tensor(key) for key in weights.keys()}  # noqa: SIM118
    for key in merged.keys() & changed.keys():
        merged[key] = _merged(merged[key], adapter, changed[key])
    save_file(merged, target, metadata={"format": "pt"})


def _merged(weight: Tensor, adapter: Adapter, module: str) -> Tensor:
    """W + scale B A in the type of W; W is (out, in), or (in, out) where PEFT says fan_in_fan_out."""
    factor = adapter.low_rank(module)
    change = factor.scale * (factor.B.float() @ factor.A.float())  # (out, in)
    if adapter.config.get("fan_in_fan_out"):
        change = change.T
    if weight.shape != change.shape or not weight.is_floating_point() or weight.element_size() == 1:
        found = f"{tuple(weight.shape)} {weight.dtype}".replace("torch.", "")
        problem = f"cannot be merged: the base has {found}, the adapter {tuple(change.shape)}"
        raise InputError([Defect(adapter.name, module, "", problem, _OTHER)])
    return (weight.to(torch.float32) + change).to(weight.dtype)
