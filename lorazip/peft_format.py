"""The tensors of a PEFT adapter, sorted out on reading and written back.

With `peft_keys` and `peft_config` this is the only place that knows PEFT. Matrices (2-D) of lora_A and lora_B are the
factors to compress; all else that PEFT saves with a LoRA adapter is an extra, carried as it is. Written adapters have
the scale 1, which every reader computes alike, whatever patterns and rank-stabilised scales it knows.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lorazip.errors import Defect, TargetError
from lorazip.files import flush, fresh_folder
from lorazip.header import TensorInfo
from lorazip.mapped import TORCH_DTYPE
from lorazip.peft_config import CONFIG_FILE, ScaleRule, endings
from lorazip.peft_keys import (
    LORA_BIAS,
    MAGNITUDES,
    PAIRS,
    PREFIX,
    RESAVE,
    WEIGHTS_FILE,
    A,
    B,
    module_of,
    refusal,
    split_factor,
)

FACTOR_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class ModuleInfo:
    """One adapted module: D = scale * B @ A with B (out, rank), A (rank, in_); dtype as torch names it."""

    out: int
    in_: int
    rank: int
    scale: float
    dtype: str


@dataclass(frozen=True)
class Parsed:
    """The tensors of one adapter, sorted out.

    Attributes:
        modules: module -> sizes and scale, sorted by name.
        extras: key -> type and shape of every tensor that is carried as it is, sorted by key.
        defects: all that is wrong; modules and extras hold what was understood.
    """

    modules: dict[str, ModuleInfo] = field(default_factory=dict)
    extras: dict[str, TensorInfo] = field(default_factory=dict)
    defects: tuple[Defect, ...] = ()


def parse(adapter: str, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Parsed:
    """Sort the tensors of an adapter into modules, extras and defects.

    Args:
        adapter: the adapter's name, for the messages.
        tensors: key -> type and shape, from the header.
        config: adapter_config.json; `peft_config.problems` found nothing in it.
    """
    rule = ScaleRule(config)
    pairs: dict[str, dict[str, TensorInfo]] = defaultdict(dict)  # module -> key suffix -> info
    extras: dict[str, TensorInfo] = {}
    defects: list[Defect] = []
    rest: list[str] = []
    for key, info in tensors.items():
        found = split_factor(key)
        if found is None:
            rest.append(key)
        else:
            pairs[found[0]][found[1]] = info
    for key in rest:
        refused = refusal(key, config, pairs)
        if refused is None:
            extras[key] = tensors[key]
        else:
            defects.append(Defect(adapter, module_of(key), key, *refused))

    modules: dict[str, ModuleInfo] = {}
    for module, parts in pairs.items():
        wrong = _pair_defects(adapter, module, parts, rule)
        if (
            not wrong
            and config.get("use_dora")
            and not any(PREFIX + module + m in tensors for m in MAGNITUDES)
        ):
            wrong = [
                Defect(adapter, module, "", "use_dora is set but the magnitude vector is missing", RESAVE)
            ]
        defects += wrong
        if wrong:
            continue
        if A in parts and len(parts[A].shape) == 2:
            modules[module] = _module_info(module, parts[A], parts[B], rule)
        else:
            extras.update({PREFIX + module + suffix: info for suffix, info in parts.items()})
    if not pairs and not defects:
        defects.append(
            Defect(adapter, "", "", "the file has no LoRA factors", "leave it out, or save it again")
        )
    elif not modules and not defects:
        problem = "only convolutions or embeddings are adapted: there is nothing to compress"
        defects.append(Defect(adapter, "", "", problem, "leave it out"))
    return Parsed(dict(sorted(modules.items())), dict(sorted(extras.items())), tuple(defects))


def _pair_defects(
    adapter: str, module: str, parts: Mapping[str, TensorInfo], rule: ScaleRule
) -> list[Defect]:
    """Check the factors of one module against each other and against the config."""
    pairs = [pair for pair in PAIRS if pair[0] in parts or pair[1] in parts]
    if len(pairs) > 1:
        return [Defect(adapter, module, "", "has factors of a matrix and of an embedding", RESAVE)]
    a_suffix, b_suffix = pairs[0]
    for suffix, other in ((a_suffix, b_suffix), (b_suffix, a_suffix)):
        if suffix not in parts:
            tensor = PREFIX + module + other
            return [Defect(adapter, module, tensor, f"{suffix[1:]} is missing beside it", RESAVE)]
    found = []
    for suffix in pairs[0]:
        info, tensor = parts[suffix], PREFIX + module + suffix
        if info.dtype not in FACTOR_DTYPES:
            problem = f"its type is {info.dtype}, a factor has {', '.join(FACTOR_DTYPES)}"
            found.append(Defect(adapter, module, tensor, problem, "convert it to one of these"))
        if len(info.shape) < 2 or 0 in info.shape:
            problem = f"its shape is {list(info.shape)}, empty or not a matrix"
            remedy = "gather the shards (DeepSpeed ZeRO-3, FSDP) before saving the adapter"
            found.append(Defect(adapter, module, tensor, problem, remedy))
    return found or _shape_defects(adapter, module, parts, pairs[0], rule)


def _shape_defects(
    adapter: str, module: str, parts: Mapping[str, TensorInfo], pair: tuple[str, str], rule: ScaleRule
) -> list[Defect]:
    a, b, rank = parts[pair[0]].shape, parts[pair[1]].shape, rule.rank(module)
    keys = [PREFIX + module + suffix for suffix in pair]
    if len(a) != len(b):
        problem = f"its shape {list(b)} does not fit lora_A {list(a)}"
        return [Defect(adapter, module, keys[1], problem, RESAVE)]
    # Convolutions with groups divide the second dimension of lora_B.
    b_rank = rank if len(b) > 2 and rank % b[1] == 0 else b[1]
    found = []
    for key, own in zip(keys, (a[0], b_rank), strict=True):
        if own != rank:
            problem = f"its rank is {own} (lora_A {list(a)}, lora_B {list(b)}), the config says {rank}"
            found.append(
                Defect(adapter, module, key, problem, "correct r or rank_pattern in adapter_config.json")
            )
    if a[0] == b_rank:
        found = found[:1]  # both are right, or both are wrong in the same way
    wrong_scale = rule.scale_problem(module)
    if wrong_scale is not None:
        found.append(Defect(adapter, module, "", wrong_scale.problem, wrong_scale.remedy))
    return found


def _module_info(module: str, a: TensorInfo, b: TensorInfo, rule: ScaleRule) -> ModuleInfo:
    dtype = torch.promote_types(TORCH_DTYPE[a.dtype], TORCH_DTYPE[b.dtype])
    return ModuleInfo(
        out=b.shape[0],
        in_=a.shape[1],
        rank=a.shape[0],
        scale=rule.scale(module),
        dtype=str(dtype).removeprefix("torch."),
    )


def export_config(
    config: Mapping[str, Any], ranks: Mapping[str, int], extras: Collection[str] = ()
) -> dict[str, Any]:
    """The config of an exported adapter: the original one, with the scale 1 for every module of `ranks`.

    r is the largest rank and lora_alpha equals it, so that alpha / r is 1 also for readers that know no
    patterns; rank_pattern and alpha_pattern hold the other modules. Embeddings and convolutions keep their
    factors bit for bit, so they keep their rank and scale.

    Args:
        config: the original adapter_config.json.
        ranks: module -> rank of its exported factors, each at least 1.
        extras: keys of the extras that are written beside them.
    """
    rule = ScaleRule(config)
    wanted: dict[str, tuple[int, float]] = {module: (rank, rank) for module, rank in ranks.items()}
    for key in extras:
        found = split_factor(key)
        if found is not None:
            rank = rule.rank(found[0])
            wanted[found[0]] = rank, _as_number(rule.scale(found[0]) * rank)
    top = max(ranks.values())
    result = {**config, "r": top, "lora_alpha": top, "use_rslora": False, "init_lora_weights": True}
    result["rank_pattern"] = _pattern({m: rank for m, (rank, _) in wanted.items()}, top)
    result["alpha_pattern"] = _pattern({m: alpha for m, (_, alpha) in wanted.items()}, top)
    if result.get("eva_config") is not None:
        result["eva_config"] = None  # belongs to the initialisation only; PEFT warns about it otherwise
    return result


def _as_number(alpha: float) -> float:
    """PEFT declares alpha an integer; write 16 and not 16.0 where that is the same."""
    return int(alpha) if alpha == int(alpha) else alpha


def _pattern(values: Mapping[str, float], default: float) -> dict[str, float]:
    """The shortest table for PEFT's get_pattern_key that gives every module its value.

    A module is named by the shortest ending of its name that all modules with this ending share the value of,
    so one key `k_proj` serves all layers where it can, and no key depends on the order.
    """
    shared: dict[str, set[float]] = defaultdict(set)
    for module, value in values.items():
        for ending in endings(module):
            shared[ending].add(value)
    table = {}
    for module, value in sorted(values.items()):
        if value != default:
            found = next((ending for ending in endings(module) if len(shared[ending]) == 1), None)
            # Another module may end with this whole name: then only the whole name is meant.
            table[f"^{re.escape(module)}$" if found is None else re.escape(found)] = value
    return table


def save(
    directory: Path,
    config: Mapping[str, Any],
    factors: Mapping[str, tuple[Tensor, Tensor]],
    extras: Mapping[str, Tensor],
) -> None:
    """Write an adapter that PEFT and vLLM load, as a whole or not at all.

    Args:
        directory: a directory that does not exist yet, or is empty.
        config: the original adapter_config.json.
        factors: module -> (B (out, r), A (r, in)) with D = B @ A, the scale folded in.
        extras: key -> tensor, as read from the original; biases of lora_B get the scale that the factors
            lost.
    Raises:
        TargetError: the directory has content, or cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for module, (b, a) in factors.items():
        if b.shape[1] == 0:  # PEFT has no rank 0; one column of zeros has the same effect
            b, a = b.new_zeros(b.shape[0], 1), a.new_zeros(1, a.shape[1])
        tensors[PREFIX + module + B], tensors[PREFIX + module + A] = b, a
    ranks = {module: tensors[PREFIX + module + A].shape[0] for module in factors}
    tensors.update(_scaled_biases(config, ranks, extras))
    new_config = export_config(config, ranks, extras)
    text = json.dumps(new_config, indent=2, sort_keys=True, allow_nan=False) + "\n"
    own = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    _write(directory, text, own)


def _scaled_biases(
    config: Mapping[str, Any], modules: Collection[str], extras: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """PEFT adds scale * bias of lora_B: with the scale 1 the bias itself has to be scaled, in float32."""
    rule = ScaleRule(config)
    for key, tensor in extras.items():
        module = key.removeprefix(PREFIX).removesuffix(LORA_BIAS)
        if key.endswith(LORA_BIAS) and module in modules and rule.scale(module) != 1.0:
            yield key, tensor.float() * rule.scale(module)
        else:
            yield key, tensor


def _write(directory: Path, config: str, tensors: Mapping[str, Tensor]) -> None:
    """Write both files to a temporary directory beside the target, flush, and rename it."""
    if directory.is_dir() and any(directory.iterdir()):
        raise TargetError(f"{directory} exists and is not empty")
    try:
        with fresh_folder(directory) as temporary:
            (temporary / CONFIG_FILE).write_text(config, encoding="utf-8")
            save_file(dict(tensors), temporary / WEIGHTS_FILE, metadata={"format": "pt"})
            shutil.copymode(temporary / CONFIG_FILE, temporary / WEIGHTS_FILE)
            for path in (temporary / WEIGHTS_FILE, temporary / CONFIG_FILE, temporary):
                flush(path)
            os.replace(temporary, directory)
            flush(directory.parent)
    except (OSError, SafetensorError) as error:
        raise TargetError(f"{directory} cannot be written: {error}") from error
