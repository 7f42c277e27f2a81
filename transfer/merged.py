"""A base with a DoRA adapter merged in: what backends are asked in its place, for they take low-rank updates alone.

DoRA scales every row of W + s B A, so what it adds to W is of full rank (arXiv 2402.09353 §4). PEFT merges it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorazip import base as bases
from lorazip.errors import TargetError
from lorazip.transfer.world import Base, World

FOLDER = "merged"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


@contextmanager
def merged(world: World, adapter: Path) -> Iterator[Base]:
    """The target base with an adapter merged in, in the type that answers are made in; it is gone afterwards.

    Raises:
        TargetError: it cannot be written beside the adapter.
    """
    target = adapter.parent / FOLDER
    shutil.rmtree(target, ignore_errors=True)  # of a run that was killed
    try:
        try:
            _merge(world, adapter, target)
        except OSError as error:
            raise TargetError(f"{target}: the merged model cannot be written: {error}") from error
        yield Base(world.target.name, target, world.cache.model_digest(target))
    finally:
        shutil.rmtree(target, ignore_errors=True)


def _merge(world: World, adapter: Path, target: Path) -> None:
    from peft import PeftModel

    base = world.target.path
    model: Any = bases.load(base, world.engine.dtype, world.engine.device)
    whole = PeftModel.from_pretrained(model, str(adapter), trust_remote_code=False)
    whole.merge_and_unload().save_pretrained(str(target))
    for file in base.iterdir():
        weights = file.suffix in _WEIGHTS or file.name.endswith(".index.json")
        if file.is_file() and not weights and not (target / file.name).exists():
            (target / file.name).symlink_to(file.resolve())
    del model, whole
    bases.free(world.engine.device)
