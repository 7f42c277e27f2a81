"""The result of a transfer: a PEFT directory with its card, its figures and its page, whole or not there.

None of them holds a seed, a synthetic input or an answer: only counts, digests, options and scores.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorazip import __version__, page, unfinished
from lorazip.errors import TargetError
from lorazip.files import write_bytes
from lorazip.peft_config import CONFIG_FILE
from lorazip.peft_keys import WEIGHTS_FILE
from lorazip.transfer import assess, learn
from lorazip.transfer.assess import Judged
from lorazip.transfer.distill import ADAPTER
from lorazip.transfer.move import STAGES, Move
from lorazip.transfer.world import World

SCHEMA = "lorazip.transfer/1"
RECORD, PAGE, CARD = "transfer.json", "transfer.html", "README.md"
JOB = "transfer"  # owns OUTPUT.partial
FILES = (CONFIG_FILE, WEIGHTS_FILE, RECORD, CARD, PAGE)
PRIVATE = {
    "source": ("base", "adapter"),
    "target": ("base",),
    "inputs": ("definition", "seeds", "prompts"),
    "filter": ("discriminator",),
    "gate": ("tests",),
}  # paths, and texts of the task; no digests of them either, by which a guess could be checked


def document(world: World, move: Move, judged: Judged) -> dict[str, Any]:
    """The content of transfer.json, JSON values only."""
    recipe = move.recipe.document()
    for table, keys in PRIVATE.items():
        for key in keys:
            recipe[table].pop(key)
    recipe["inputs"]["generator"] = shown(recipe["inputs"]["generator"])
    return {
        "schema": SCHEMA,
        "lorazip": __version__,
        "name": move.name,
        "source": {
            "base": shown(world.source.name),
            "base_sha256": world.source.digest,
            "adapter_sha256": move.digest,
        },
        "target": {"base": shown(world.target.name), "base_sha256": world.target.digest},
        "seeds": {"count": len(move.seeds)},
        "recipe": recipe,
        "engine": world.engine.name,
        "dtype": str(world.engine.dtype).removeprefix("torch."),
        "stages": {stage: move.known(stage) for stage in STAGES if stage not in ("gate", "synthesise")},
        "gate": asdict(judged),
    }


def shown(base: str) -> str:
    """A base as a stranger may read it: a Hub id as it is, of a directory its last part."""
    path = Path(base)
    return path.resolve().name if path.exists() else base


def require_free(output: Path, force: bool) -> None:
    """Rather now than after hours. An empty directory is free; of a link, what it names.

    Raises:
        TargetError: something is there that may not be replaced, or nothing can be put there.
    """
    target = Path(os.path.realpath(output))
    unfinished.ready(target, JOB, force)
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / RECORD).is_file():
        raise TargetError(f"{output} exists and is no result of a transfer (choose another)")
    if not force:
        raise TargetError(f"{output} exists (--force replaces it; or choose another)")
    for path in target.iterdir():
        if path.name not in FILES:
            raise TargetError(f"{output} holds {path.name}, which would be lost (choose another)")


def write(world: World, move: Move, judged: Judged, force: bool) -> None:
    """Put the result under its final name.

    Raises:
        TargetError: it is there already, or cannot be written.
    """
    trained = learn.folder(move, world) / ADAPTER
    target = Path(os.path.realpath(move.output))  # a link stays; what it names is written
    require_free(move.output, force)
    with unfinished.working(target, JOB, resume=True, force=force, keep=False) as place:
        fresh = place / unfinished.BUNDLE
        try:
            shutil.rmtree(fresh, ignore_errors=True)  # of a run that was killed right here
            fresh.mkdir()
            config = json.loads((trained / CONFIG_FILE).read_bytes())
            config |= {"base_model_name_or_path": shown(world.target.name), "inference_mode": True}
            write_bytes(fresh / CONFIG_FILE, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
            weights = write_bytes(fresh / WEIGHTS_FILE, (trained / WEIGHTS_FILE).read_bytes())
            if weights.sha256 != move.known("evaluate")["weights_sha256"]:
                raise TargetError(
                    f"{trained}: it is not the adapter that was evaluated (delete {trained.parent})"
                )
            record = document(world, move, judged)
            write_bytes(fresh / RECORD, (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())
            write_bytes(fresh / CARD, _rendered("transfer_card.md.j2", record, judged).encode())
            write_bytes(fresh / PAGE, _rendered("transfer.html.j2", record, judged).encode())
        except OSError as error:
            raise TargetError(f"{move.output} cannot be written: {error.strerror or error}") from error
        unfinished.publish(place, target, force, RECORD)


def _rendered(name: str, record: Mapping[str, Any], judged: Judged) -> str:
    order = [arm for arm in _ORDER if arm in judged.arms]
    order[2:2] = [arm for arm in judged.arms if arm.startswith(assess.TARGET) and arm not in order]
    return page.template(name).render(record=record, judged=judged, arms=order)


_ORDER = (assess.SOURCE, assess.EXPERT, assess.TARGET, assess.COPY, assess.MOVED, assess.ORACLE)
