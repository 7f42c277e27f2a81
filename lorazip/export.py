"""Adapters out of a bundle: PEFT directories with the same effect, scale 1; and upload to the Hub."""

from __future__ import annotations

import glob
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorazip import peft_config, peft_format
from lorazip.adapter import LowRank
from lorazip.bundle import Bundle
from lorazip.card import adapter_card
from lorazip.codecs import CODECS
from lorazip.errors import BundleError, CodecError, TargetError, UsageError
from lorazip.files import write_bytes

CARD = "README.md"


@dataclass(frozen=True)
class Exported:
    """One exported adapter: its directory and the largest rank among its modules."""

    name: str
    directory: Path
    rank: int


def export(
    bundle: Bundle,
    names: Sequence[str],
    directory: Path,
    *,
    dtype: str = "float32",
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[Exported]:
    """Write DIRECTORY/NAME as PEFT directories; the bytes that are read are checked first.

    Args:
        bundle: where from.
        names: which; empty for all.
        directory: made if needed; DIRECTORY/NAME must not have content.
        dtype: of the written factors. float32 has the bundle's effect exactly; the others round it once more.
    Raises:
        UsageError: no such adapter; BundleError: damaged data.
        TargetError: a target exists or cannot be written.
    """
    if dtype not in CODECS:
        raise UsageError(f"dtype must be one of {', '.join(CODECS)}, not {dtype!r}")
    names = list(dict.fromkeys(names)) or bundle.names
    bundle.require(names)
    for name in names:
        # `compress` lets no such config in, but a bundle may come from somebody else.
        for found in peft_config.problems(bundle.adapter(name).config):
            raise BundleError(f"{bundle.path}: {name}: its config cannot be used: {found.problem}")
        if (directory / name).exists() and (
            not (directory / name).is_dir() or any((directory / name).iterdir())
        ):
            raise TargetError(f"{directory / name} exists (choose another directory)")
    kind: torch.dtype = getattr(torch, dtype)
    done: list[Exported] = []
    for name in names:
        adapter = bundle.adapter(name)
        factors = {}
        for module in adapter.modules:
            factor = adapter.low_rank(module)
            factors[module] = _rounded(name, module, factor, kind)
        rank = max(1, *(a.shape[0] for _, a in factors.values()))  # PEFT has no rank 0
        extras = {key: adapter.extra(key) for key in adapter.extras}
        peft_format.save(directory / name, adapter.config, factors, extras)
        done.append(Exported(name, directory / name, rank))
        progress("exporting", len(done), len(names))
    return done


def _rounded(name: str, module: str, factor: LowRank, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """B and A in the type to be written; below float32 with columns and rows of equal length, which 16 bits hold best.

    Raises:
        BundleError: the bundle holds NaN or infinities.
        CodecError: the values do not fit the type.
    """
    b, a = factor.B, factor.A
    if not bool(torch.isfinite(b).all() & torch.isfinite(a).all()):
        raise BundleError(f"{name}: {module} has NaN or infinite values (do not use this bundle)")
    if kind == torch.float32:
        return b, a
    tiny = torch.finfo(torch.float32).tiny
    size = (a.norm(dim=1).clamp_min(tiny) / b.norm(dim=0).clamp_min(tiny)).sqrt()
    b, a = (b * size).to(kind), (a / size[:, None]).to(kind)
    if not bool(torch.isfinite(b).all() & torch.isfinite(a).all()):
        raise CodecError(f"{name}: {module} does not fit {kind} (use --dtype float32 or bfloat16)")
    return b, a


def push(folder: Path, repo: str, names: Sequence[str] = ()) -> str:
    """Upload a folder as a model repository. Returns its address.

    Args:
        folder: what to upload.
        repo: Hub id; made if needed.
        names: upload just these directories of it, and its card; empty for all of it.
    Raises:
        TargetError: the Hub refused, or cannot be reached.
    """
    from huggingface_hub import HfApi

    patterns = [CARD, *(f"{glob.escape(name)}/*" for name in names)] if names else None
    try:
        api = HfApi()
        address = api.create_repo(repo, repo_type="model", exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            repo_type="model",
            commit_message="Upload by lorazip",
            allow_patterns=patterns,
        )
        return str(address)
    except Exception as error:  # the client lets through what its HTTP library and its uploader in Rust raise
        reason = str(error).strip() or type(error).__name__
        remedy = (
            f"log in with `hf auth login`, check name and network; what was to be uploaded is in {folder}"
        )
        raise TargetError(f"{repo}: the Hub did not take it: {reason} ({remedy})") from error


def write_card(folder: Path, bundle: Bundle, names: Sequence[str]) -> None:
    """A model card beside exported adapters, for `push`.

    Raises:
        TargetError: there is one, or it cannot be written.
    """
    if (folder / CARD).exists():
        raise TargetError(
            f"{folder / CARD} exists, the model card would replace it (choose another directory)"
        )
    records = {a.name: a for a in bundle.manifest.adapters}
    errors = {name: records[name].error for name in names}
    write_bytes(folder / CARD, adapter_card(bundle.manifest.base, errors).encode())
