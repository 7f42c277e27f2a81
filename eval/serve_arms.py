"""The arms of a serving benchmark: what each serves, and how vLLM is started for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorazip.adapter import Adapter, open_adapter
from lorazip.bundle import Bundle, BundleAdapter
from lorazip.errors import Defect, InputError, UsageError
from lorazip.eval.serve_merge import merge
from lorazip.eval.serve_records import BASE, MERGED, ORIGINALS, Kind, Settings
from lorazip.export import export

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM 0.32 has slots for (vllm/config/lora.py)
MAX_SEQS = 256  # requests in one batch at most


@dataclass(frozen=True)
class Arm:
    """One way to answer the requests, ready to be started.

    Attributes:
        model: the model's directory.
        adapters: served by vLLM's LoRA engine, in the order of the requests' indices; empty: the model alone.
        served: how many adapters that makes: 1 where one is merged into the model.
        disk_bytes: see `Row`.
    """

    name: str
    kind: Kind
    path: str
    model: Path
    adapters: tuple[Adapter, ...]
    served: int
    disk_bytes: int


Prepare = Callable[[Path], Arm]


def refuse(adapters: Sequence[Adapter | BundleAdapter]) -> None:
    """Raise InputError if vLLM would not serve one of the adapters."""
    if defects := [defect for adapter in adapters for defect in _refusals(adapter)]:
        raise InputError(defects)


def _refusals(adapter: Adapter | BundleAdapter) -> list[Defect]:
    """Why vLLM 0.32 would not serve an adapter, or would serve something else (vllm/lora/peft_helper.py)."""
    config, why = adapter.config, []
    for field_, bad in (
        ("use_dora", bool(config.get("use_dora"))),
        ("lora_bias", bool(config.get("lora_bias"))),
        ("bias", config.get("bias") not in (None, "none")),
        ("modules_to_save", bool(config.get("modules_to_save"))),
        ("layer_replication", bool(config.get("layer_replication"))),
    ):
        if bad:
            why.append(f"{field_} is {json.dumps(config[field_])[:60]}, which vLLM does not serve")
    if not why and adapter.extras:
        key, *more = adapter.extras
        others = f" and {len(more)} more tensors" if more else ""
        why.append(f"carries {key}{others}, which vLLM does not serve")
    # In a bundle the config has the rank of the original; the exported one is judged when it is there.
    if isinstance(adapter, Adapter) and rank(adapter) > RANKS[-1]:
        why.append(f"its rank {rank(adapter)} is above {RANKS[-1]}, the most that vLLM serves")
    return [Defect(adapter.name, "", "", problem, "leave it out") for problem in why]


def rank(adapter: Adapter) -> int:
    """The largest rank that its config names, which is what vLLM compares with its slots."""
    return int(max([adapter.config["r"], *(adapter.config.get("rank_pattern") or {}).values()]))


def engine(arm: Arm, settings: Settings) -> dict[str, Any]:
    """The arguments of vllm.LLM for an arm; without those for LoRA they are the same for all, but for the model."""
    found: dict[str, Any] = {
        "model": str(arm.model),
        "dtype": settings.dtype,
        "seed": settings.seed,
        "skip_tokenizer_init": True,
        "max_model_len": settings.prompt_tokens + settings.output_tokens,
        "max_num_seqs": min(MAX_SEQS, settings.requests),
        "kv_cache_memory_bytes": settings.memory,
        "enable_prefix_caching": False,
    }
    if arm.adapters:
        # One slot more than adapters in a batch: with all slots full, vLLM 0.32 on CPUs gives rows without an adapter
        # the last slot's.
        slots = min(len(arm.adapters), settings.max_loras) + 1
        found |= {
            "enable_lora": True,
            "max_lora_rank": next(r for r in RANKS if r >= max(map(rank, arm.adapters))),
            "max_loras": slots,
            "max_cpu_loras": max(slots, settings.max_cpu_loras or len(arm.adapters)),
            # Otherwise slots are set aside in all layers, embeddings too.
            "lora_target_modules": sorted({m.rpartition(".")[2] for a in arm.adapters for m in a.modules}),
        }
    return found


def open_bundles(paths: Sequence[Path], names: Sequence[str]) -> dict[str, Bundle]:
    """Arm name -> bundle: its directory's name, or the whole path where that is not unique."""
    opened: dict[str, Bundle] = {}
    stems = [path.name.removesuffix(".lorazip") for path in paths]
    for path, stem in zip(paths, stems, strict=True):
        unique = stem and stems.count(stem) == 1 and stem not in (BASE, MERGED, ORIGINALS)
        name, bundle = stem if unique else str(path), Bundle.open(path)
        if name in opened:
            raise UsageError(f"{path} is named twice")
        wanted = list(names) or (next(iter(opened.values())).names if opened else bundle.names)
        if missing := [n for n in wanted if n not in bundle]:
            some = ", ".join(missing[:5]) + (" …" if len(missing) > 5 else "")
            raise UsageError(f"{path} lacks {some} (all arms serve the same adapters)")
        bundle.require(wanted)
        refuse([bundle[n] for n in wanted])
        opened[name] = bundle
    return opened


def plan(
    model: Path, originals: Sequence[Adapter], bundles: Mapping[str, Bundle], names: Sequence[str]
) -> list[tuple[str, Prepare]]:
    """The arms by name; each is made in a directory of its own, when its turn comes."""

    def alone(place: Path) -> Arm:
        return Arm(BASE, "base", str(model), model, (), 0, 0)

    def merged(place: Path) -> Arm:
        adapter = originals[0] if originals else _export(next(iter(bundles.values())), names[:1], place)[0]
        nbytes = merge(model, adapter, place / "model")
        return Arm(MERGED, "merged", adapter.name, place / "model", (), 1, nbytes)

    def stock(place: Path) -> Arm:
        nbytes = sum(adapter.nbytes for adapter in originals)
        return Arm(ORIGINALS, "originals", "", model, tuple(originals), len(originals), nbytes)

    def exported(name: str, bundle: Bundle) -> Prepare:
        def prepare(place: Path) -> Arm:
            adapters = tuple(_export(bundle, names, place))
            return Arm(name, "bundle", str(bundle.path), model, adapters, len(adapters), bundle.nbytes)

        return prepare

    found: list[tuple[str, Prepare]] = [(BASE, alone), (MERGED, merged)]
    if originals:
        found.append((ORIGINALS, stock))
    return found + [(name, exported(name, bundle)) for name, bundle in bundles.items()]


def _export(bundle: Bundle, names: Sequence[str], place: Path) -> list[Adapter]:
    found = [open_adapter(e.directory, e.name) for e in export(bundle, names, place / "exported")]
    refuse(found)
    return found
