"""Run by peers.py inside the peers' own virtual environment: one peer, through its public API, nothing of lorazip.

    peer_worker.py compress PEER OPTIONS OUT ADAPTER...    adapters -> the peer's own format; prints the seconds
    peer_worker.py restore PEER OPTIONS OUT BUNDLE         the peer's own format -> one PEFT directory an adapter

OPTIONS is JSON: keyword arguments of the peer's function. Imports are not timed; reading the adapters and saving are.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def vlora_compress(adapters: list[Path], out: Path, options: dict[str, Any]) -> float:
    """As vlora's README does it, but for the cast: its SVD refuses 16-bit adapters on a CPU."""
    import torch
    from vlora import SharedSubspace, load_adapter

    store = options.pop("store", "fp32")
    start = time.perf_counter()
    loaded = [load_adapter(path) for path in adapters]
    for weights in loaded:
        weights.lora_a = {module: tensor.float() for module, tensor in weights.lora_a.items()}
        weights.lora_b = {module: tensor.float() for module, tensor in weights.lora_b.items()}
    subspace = SharedSubspace.from_adapters(loaded, task_ids=[path.name for path in adapters], **options)
    if store == "nf4":
        subspace.save_quantized(out)
    else:
        subspace.to(dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[store]).save(out)
    return time.perf_counter() - start


def vlora_restore(bundle: Path, out: Path) -> None:
    """Every task of a saved subspace, as vlora itself writes it back."""
    from vlora import SharedSubspace, extract_adapter

    subspace = SharedSubspace.load(bundle)
    for name in subspace.tasks:
        extract_adapter(subspace, name, out / name)


def lorashare_compress(adapters: list[Path], out: Path, options: dict[str, Any]) -> float:
    """As lorashare's README does it."""
    from lorashare import SHAREModel

    start = time.perf_counter()
    SHAREModel.from_adapters({path.name: str(path) for path in adapters}, **options).save_pretrained(out)
    return time.perf_counter() - start


def lorashare_restore(bundle: Path, out: Path) -> None:
    """Every adapter of a saved checkpoint, as lorashare itself writes it back."""
    from lorashare import SHAREModel

    model = SHAREModel.from_pretrained(bundle)
    for name in model.all_loadings:
        model.reconstruct(name, out / name)


COMPRESS = {"vlora-dev": vlora_compress, "lorashare": lorashare_compress}
RESTORE = {"vlora-dev": vlora_restore, "lorashare": lorashare_restore}

if __name__ == "__main__":
    import lorashare  # noqa: F401  # the imports before the clock starts
    import torch
    import vlora  # noqa: F401

    action, peer, options, out, *paths = sys.argv[1:]
    if action == "compress":
        cpu = -time.process_time()
        seconds = COMPRESS[peer]([Path(path) for path in paths], Path(out), json.loads(options))
        cpu += time.process_time()
        print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "threads": torch.get_num_threads()}))
    else:
        RESTORE[peer](Path(paths[0]), Path(out))
