"""transformers' Trainer as a fit uses it: its arguments, its batches, the loss of batches.py, and what it logged.

Several processes may share a fit: each takes its part of every batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Sampler

from lorazip.transfer import batches
from lorazip.transfer.batches import Sample
from lorazip.transfer.recipe import Training

if TYPE_CHECKING:
    from peft import PeftModel

WARMUP = 0.06  # of the steps: a rank's first gradients are of A = noise, B = 0

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Log:
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


def processes() -> int:
    """That share this fit."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def writes() -> bool:
    """Whether this process is the one that writes."""
    return processes() == 1 or torch.distributed.get_rank() == 0


def arguments_of(
    model: PeftModel,
    spec: Training,
    folder: Path,
    rate: float,
    seed: int,
    epochs: int,
    *,
    first: bool,
    final: bool,
) -> Any:
    """The Trainer's arguments.

    Args:
        first: the run begins here, and is measured before any training.
        final: its best epoch is wanted, not its last.
    """
    from transformers import TrainingArguments

    each = spec.batch // processes()
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
        eval_on_start=first,
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
    return arguments


def filled(samples: Sequence[Sample], batch: int) -> list[Sample]:
    """Samples, for several processes filled up with ones of no trained token to whole batches.

    accelerate would fill up with the first ones again, and they would count twice.
    """
    more = -len(samples) % batch if processes() > 1 else 0
    nothing = replace(samples[0], trained=(False,) * len(samples[0].trained))
    return [*samples, *[nothing] * more]


class Shuffled(Sampler[int]):
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


def trainer_of(
    model: PeftModel,
    arguments: Any,
    train: Sequence[Sample],
    held_out: Sequence[Sample],
    pad: int,
    progress: Progress,
    what: str,
    patience: int,
) -> Any:
    """A Trainer with the loss and the held-out error of batches.py, which stops early.

    Args:
        arguments: of `arguments_of`.
        train, held_out: the latter fill whole batches; see `filled`.
        pad: the token behind the mask.
        progress: called with `what`, steps done, steps in all.
        patience: epochs without a better one, after which it stops.
    """
    from transformers import PrinterCallback, Trainer, TrainerCallback

    each = sum(sum(sample.trained) for sample in held_out) / len(held_out)  # tokens of a sample
    whole = filled(train, arguments.per_device_train_batch_size * arguments.world_size)

    class Ours(Trainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            found = batches.losses(model, inputs)
            # All trained tokens of the step, in all processes; the mean of their gradients is taken.
            loss = found.sum() * self.args.world_size / num_items_in_batch
            return (loss, {}) if return_outputs else loss

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return Shuffled(len(train), len(whole), arguments.data_seed)

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
            if Log(state.log_history, state.global_step).waited() >= patience:
                control.should_training_stop = True

    trainer = Ours(
        model=model,
        args=arguments,
        train_dataset=whole,
        eval_dataset=list(held_out),
        data_collator=lambda samples: batches.collated(samples, pad),
        callbacks=[Watch()],
    )
    trainer.model_accepts_loss_kwargs = True  # the loss is ours, whatever the model accepts: count its tokens
    trainer.remove_callback(PrinterCallback)
    return trainer
