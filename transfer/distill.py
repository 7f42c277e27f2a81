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
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Sampler

from lorazip.errors import Defect, InputError
from lorazip.files import write_bytes
from lorazip.transfer import batches
from lorazip.transfer.batches import Sample
from lorazip.transfer.recipe import Training
from lorazip.transfer.slots import SLOT, Shape, Start, begin, natural, wrapped

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ADAPTER, FITTED = "adapter", "fitted.json"
STATE = "trainer_state.json"  # of a checkpoint
WARMUP = 0.06  # of the steps: a rank's first gradients are of A = noise, B = 0


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


Progress = Callable[[str, int, int], None]


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
    if _processes() > 1:
        torch.distributed.barrier()  # a slower one may still be reading the best epoch
    if _first():
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


@dataclass(frozen=True)
class _Log:
    """What the Trainer logged: a row before training and one after every epoch."""

    rows: list[dict[str, Any]]
    steps: int

    @property
    def errors(self) -> list[float]:
        """What the Trainer takes for the loss: prediction_step."""
        return [float(row["eval_loss"]) for row in self.rows if "eval_loss" in row]

    @property
    def seconds(self) -> float:
        return sum(float(row.get("seconds", 0)) for row in self.rows)

    def waited(self) -> int:
        """Epochs since the best one."""
        errors = self.errors[1:]  # a rank's first epoch may be worse than none, and yet a beginning
        return len(errors) - 1 - min(range(len(errors)), key=lambda epoch: errors[epoch], default=-1)


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
) -> _Log:
    """One training run; the final one stops early and saves its best epoch beside `folder`."""
    from transformers import TrainingArguments

    each = spec.batch // _processes()
    model = wrapped(base, shape, seed)
    try:
        if start is not None:
            begin(model, start)
        first = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        last, past = _resumed(folder)
        epochs = spec.epochs if final else spec.search_epochs
        if final and past.waited() >= spec.patience:
            epochs = len(past.errors) - 1  # it had ended, and was killed before it was saved
        arguments = TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=epochs,
            per_device_train_batch_size=each,
            per_device_eval_batch_size=each,
            gradient_accumulation_steps=spec.accumulation,
            learning_rate=rate,
            lr_scheduler_type="linear",
            warmup_steps=WARMUP,
            weight_decay=0.0,
            max_grad_norm=1.0,
            eval_strategy="epoch",
            eval_on_start=last is None,
            save_strategy="epoch",
            save_total_limit=2,  # the best and the last
            load_best_model_at_end=final,
            metric_for_best_model="loss",
            greater_is_better=False,
            logging_strategy="no",
            disable_tqdm=True,
            report_to=[],
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            ddp_find_unused_parameters=False,
            seed=seed,
            data_seed=seed,
            use_cpu=next(model.parameters()).device.type == "cpu",
        )
        arguments._n_gpu = min(1, arguments.n_gpu)  # else one process would split its batches over all GPUs
        end = model.generation_config.eos_token_id
        pad = int(end[0] if isinstance(end, list) else end or 0)  # behind the mask: any token will do
        trainer = _trainer(
            model,
            arguments,
            train,
            _filled(held_out, spec.batch),
            pad,
            progress,
            "training" if final else "searching",
            spec.patience if final else epochs,
        )
        trainer.train(resume_from_checkpoint=last)
        log = _Log(trainer.state.log_history, int(trainer.state.global_step))
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
            if _first():
                _save(model, folder.parent / ADAPTER)
        return log
    finally:
        model.unload()
        del model
        gc.collect()


def _resumed(folder: Path) -> tuple[str | None, _Log]:
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
            log = _Log(state["log_history"], state["global_step"])
            told = state["best_model_checkpoint"]
            best = told and str(folder / Path(told).name)
            if best and not (Path(best) / STATE).is_file():
                shutil.rmtree(path, ignore_errors=True)
                continue
            if best != told and _first():
                write_bytes(path / STATE, json.dumps(state | {"best_model_checkpoint": best}).encode())
            return str(path), log
        except (OSError, ValueError, KeyError, TypeError):
            shutil.rmtree(path, ignore_errors=True)  # of several processes each tries
    return None, _Log([], 0)


def _processes() -> int:
    """That share this fit."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _first() -> bool:
    """Whether this process is the one that writes."""
    return _processes() == 1 or torch.distributed.get_rank() == 0


def _filled(samples: Sequence[Sample], batch: int) -> list[Sample]:
    """Samples, for several processes filled up with ones of no trained token to whole batches.

    accelerate would fill up with the first ones again, and they would count twice.
    """
    more = -len(samples) % batch if _processes() > 1 else 0
    nothing = replace(samples[0], trained=(False,) * len(samples[0].trained))
    return [*samples, *[nothing] * more]


class _Shuffled(Sampler[int]):
    """The first `count` of `total` samples in another order each epoch, then the rest, which only fill a batch.

    As accelerate's SeedableRandomSampler draws them; but for that one it would fill batches itself.
    """

    def __init__(self, count: int, total: int, seed: int):
        self.count, self.total, self.seed, self.epoch = count, total, seed, 0

    def __iter__(self) -> Iterator[int]:
        drawn = torch.randperm(self.count, generator=torch.Generator().manual_seed(self.seed + self.epoch))
        yield from drawn.tolist()
        yield from range(self.count, self.total)

    def __len__(self) -> int:
        return self.total

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before every epoch, a resumed one too."""
        self.epoch = epoch


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


def _trainer(
    model: PeftModel,
    arguments: Any,
    train: Sequence[Sample],
    held_out: Sequence[Sample],
    pad: int,
    progress: Progress,
    what: str,
    patience: int,
) -> Any:
    from transformers import PrinterCallback, Trainer, TrainerCallback

    each = sum(sum(sample.trained) for sample in held_out) / len(held_out)  # tokens of a sample
    filled = _filled(train, arguments.per_device_train_batch_size * arguments.world_size)

    class Ours(Trainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            found = batches.losses(model, inputs)
            # All trained tokens of the step, in all processes; the mean of their gradients is taken.
            loss = found.sum() * self.args.world_size / num_items_in_batch
            return (loss, {}) if return_outputs else loss

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return _Shuffled(len(train), len(filled), arguments.data_seed)

        def prediction_step(
            self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
        ) -> Any:
            # The Trainer takes the mean over samples; so that the mean over tokens comes out:
            with torch.no_grad():
                found = batches.errors(model, self._prepare_inputs(inputs))
                return found.sum() / len(inputs["labels"]) / each, None, None

    class Watch(TrainerCallback):
        """Progress, time and early stopping; all that it knows is in the log, so that a resumed run knows it too."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            self.since = time.monotonic()

        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            progress(what, state.global_step, state.max_steps)

        def on_evaluate(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            now = time.monotonic()
            state.log_history[-1]["seconds"] = now - self.since
            self.since = now
            if _Log(state.log_history, state.global_step).waited() >= patience:
                control.should_training_stop = True

    trainer = Ours(
        model=model,
        args=arguments,
        train_dataset=filled,
        eval_dataset=list(held_out),
        data_collator=lambda samples: batches.collated(samples, pad),
        callbacks=[Watch()],
    )
    trainer.model_accepts_loss_kwargs = True  # the loss is ours, whatever the model accepts: count its tokens
    trainer.remove_callback(PrinterCallback)
    return trainer
