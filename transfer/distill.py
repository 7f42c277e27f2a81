"""Training an adapter on texts: transformers' Trainer on a PEFT model, with the loss on answers alone (batches.py).

A fit is found again by its folder: a finished one is read, a killed one goes on from the last whole epoch.

Several processes may call `fit` with the same arguments (fits.py): each takes its share of every batch, the first one
writes.
"""

from __future__ import annotations

import gc
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorazip.errors import Defect, InputError
from lorazip.files import write_bytes
from lorazip.transfer.batches import Sample
from lorazip.transfer.recipe import Training
from lorazip.transfer.slots import SLOT, Shape, Start, begin, natural, wrapped
from lorazip.transfer.trainer import Log, Progress, arguments_of, filled, processes, trainer_of, writes

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ADAPTER, FITTED = "adapter", "fitted.json"
STATE = "trainer_state.json"  # of a checkpoint


@dataclass(frozen=True)
class Fitted:
    """What a training run came to.

    Attributes:
        learning_rate: the one that was chosen.
        searched: learning rate -> held-out error after the search; empty where there was one only.
        errors: held-out error before training and after every epoch, the mean over tokens (batches.py).
        best: epoch whose adapter was saved; 0: none was better than the start.
        steps: optimiser steps.
        seconds: of training, the search and earlier parts of a resumed run included; not what a kill undid.
    """

    learning_rate: float
    searched: dict[str, float]
    errors: list[float]
    best: int
    steps: int
    seconds: float


def fit(
    model: PreTrainedModel,
    train: Sequence[Sample],
    held_out: Sequence[Sample],
    shape: Shape,
    spec: Training,
    folder: Path,
    *,
    seed: int = 0,
    start: Start | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Fitted:
    """Train an adapter on a base and save the best epoch's as a PEFT directory, folder/adapter.

    Args:
        model: the base; it has no adapter before and none after.
        train, held_out: at least one sample each.
        folder: of this fit alone; its content decides where it goes on.
        start: factors to start from; None for PEFT's usual start, D = 0.
    Raises:
        InputError: there is nothing to train on, `start` has a module that `shape` lacks, or the error is no number.
    """
    if not train or not held_out:
        raise InputError([Defect(folder.name, problem="there is no sample to train on, or none is held out")])
    folder.mkdir(parents=True, exist_ok=True)
    before = known(folder)
    if before is not None:
        return before
    searched: dict[str, float] = {}
    seconds = 0.0
    rates = spec.learning_rates
    for rate in rates if len(rates) > 1 else ():
        log = _run(
            model,
            train,
            held_out,
            shape,
            spec,
            folder / f"search-{rate:g}",
            rate,
            seed,
            start,
            progress,
            False,
        )
        error = log.errors[-1]
        searched[f"{rate:g}"] = error if math.isfinite(error) else math.inf  # NaN is worse than anything
        seconds += log.seconds
    rate = min(rates, key=lambda rate: searched.get(f"{rate:g}", 0.0))
    log = _run(model, train, held_out, shape, spec, folder / "run", rate, seed, start, progress, True)
    best = min(range(len(log.errors)), key=lambda epoch: log.errors[epoch])
    found = Fitted(rate, searched, log.errors, best, log.steps, round(seconds + log.seconds, 1))
    if processes() > 1:
        torch.distributed.barrier()  # a slower one may still be reading the best epoch
    if writes():
        write_bytes(folder / FITTED, (json.dumps(asdict(found)) + "\n").encode())
        for rest in [folder / "run", *folder.glob("search-*")]:
            shutil.rmtree(rest, ignore_errors=True)
    return found


def known(folder: Path) -> Fitted | None:
    """What a finished fit came to; None where there is none."""
    try:
        found: dict[str, Any] = json.loads((folder / FITTED).read_bytes())
        return Fitted(**found) if (folder / ADAPTER).is_dir() else None
    except (OSError, ValueError, TypeError):
        return None


def _run(
    base: PreTrainedModel,
    train: Sequence[Sample],
    held_out: Sequence[Sample],
    shape: Shape,
    spec: Training,
    folder: Path,
    rate: float,
    seed: int,
    start: Start | None,
    progress: Progress,
    final: bool,
) -> Log:
    """One training run; the final one stops early and saves its best epoch beside `folder`."""
    model = wrapped(base, shape, seed)
    try:
        if start is not None:
            begin(model, start)
        first = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        last, past = _resumed(folder)
        epochs = spec.epochs if final else spec.search_epochs
        if final and past.waited() >= spec.patience:
            epochs = len(past.errors) - 1  # it had ended, and was killed before it was saved
        arguments = arguments_of(model, spec, folder, rate, seed, epochs, first=last is None, final=final)
        end = model.generation_config.eos_token_id
        pad = int(end[0] if isinstance(end, list) else end or 0)  # behind the mask: any token will do
        trainer = trainer_of(
            model,
            arguments,
            train,
            filled(held_out, spec.batch),
            pad,
            progress,
            "training" if final else "searching",
            spec.patience if final else epochs,
        )
        trainer.train(resume_from_checkpoint=last)
        log = Log(trainer.state.log_history, int(trainer.state.global_step))
        errors = log.errors
        if final and not all(map(math.isfinite, errors)):
            problem = f"the held-out error is no number at learning rate {rate:g}"
            raise InputError(
                [Defect(folder.parent.name, problem=problem, remedy="lower train.learning_rates")]
            )
        if final:
            if errors[0] <= min(errors[1:], default=errors[0]):  # training only made it worse
                with torch.no_grad():
                    for name, p in model.named_parameters():
                        if name in first:
                            p.copy_(first[name])
            if writes():
                _save(model, folder.parent / ADAPTER)
        return log
    finally:
        model.unload()
        del model
        gc.collect()


def _resumed(folder: Path) -> tuple[str | None, Log]:
    """The last whole checkpoint, if there is one, and what was logged up to it.

    The Trainer writes its state last: a checkpoint without it was cut off by a kill, and is deleted. It names the best
    one by its path, which is another where the folder was moved or is named from elsewhere; and where it finds nothing
    there at the end, it saves the last epoch for the best. So the path is put right, and without the best all are
    deleted.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: natural(path.name), reverse=True)
    for path in found:
        try:
            state: dict[str, Any] = json.loads((path / STATE).read_bytes())
            log = Log(state["log_history"], state["global_step"])
            told = state["best_model_checkpoint"]
            best = told and str(folder / Path(told).name)
            if best and not (Path(best) / STATE).is_file():
                shutil.rmtree(path, ignore_errors=True)
                continue
            if best != told and writes():
                write_bytes(path / STATE, json.dumps(state | {"best_model_checkpoint": best}).encode())
            return str(path), log
        except (OSError, ValueError, KeyError, TypeError):
            shutil.rmtree(path, ignore_errors=True)  # of several processes each tries
    return None, Log([], 0)


def _save(model: PeftModel, target: Path) -> None:
    """PEFT's own directory, whole or not there."""
    fresh = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    config: Any = model.peft_config[SLOT]
    config.target_modules = sorted(config.target_modules)  # PEFT writes a set as it comes
    model.save_pretrained(str(fresh), save_embedding_layers=False)
    (fresh / "README.md").unlink(missing_ok=True)  # PEFT's card names the directory of the base
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)
