"""Training an adapter on texts: transformers' Trainer on a PEFT model, with the loss on answers alone.

Hard labels: the mean of -log p over the tokens that are trained on (Hinton et al. 2015 call the other kind soft).
Logits (equal tokenizers): at each of these tokens the Kullback-Leibler divergence from the teacher's distribution over
its k most likely tokens and the rest as one,

    sum_j t_j (log t_j - log s_j) + t_rest (log t_rest - log s_rest).

Answers stand at the end of left-padded rows, so logits are made of answers only: a vocabulary of 262 000 costs more
than a small model's layers.

A fit is found again by its folder: a finished one is read, a killed one goes on from the last whole epoch.
"""

from __future__ import annotations

import gc
import json
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorazip.errors import Defect, InputError
from lorazip.eval.backend import Tops
from lorazip.files import write_bytes
from lorazip.transfer.recipe import Training

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ADAPTER, FITTED = "adapter", "fitted.json"
NONE = -100  # a label that is not trained on, as everywhere in transformers
WARMUP = 0.06  # of the steps: a rank's first gradients are of A = noise, B = 0
SLOT = "default"  # PEFT's name of the only adapter

Start = Mapping[str, tuple[Tensor, Tensor]]  # module -> B (out, r) and A (r, in), D = B A


@dataclass(frozen=True)
class Sample:
    """One answer to learn.

    Attributes:
        prompt, answer: token ids; the answer's end token is its last.
        trained: of each answer token, whether it is trained on.
        tops: the teacher's most likely tokens at each answer token, for the loss on logits.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    trained: tuple[bool, ...]
    tops: Tops | None = None


@dataclass(frozen=True)
class Shape:
    """The new adapter: its rank, alpha, and the full names of its modules."""

    kind: str
    rank: int
    alpha: int
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Fitted:
    """What a training run came to.

    Attributes:
        learning_rate: the one that was chosen.
        searched: learning rate -> held-out loss after the search; empty where there was one only.
        losses: held-out loss before training and after every epoch.
        best: epoch whose adapter was saved; 0: none was better than the start.
        steps: optimiser steps.
        seconds: of training, the search and earlier parts of a resumed run included; not what a kill undid.
    """

    learning_rate: float
    searched: dict[str, float]
    losses: list[float]
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
        InputError: there is nothing to train on, `start` has a module that `shape` lacks, or the loss is no number.
    """
    if not train or not held_out:
        raise InputError([Defect(folder.name, problem="there is no sample to train on, or none is held out")])
    folder.mkdir(parents=True, exist_ok=True)
    known = _known(folder)
    if known is not None:
        return known
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
        searched[f"{rate:g}"] = log.losses[-1]
        seconds += log.seconds
    rate = min(rates, key=lambda rate: searched.get(f"{rate:g}", 0.0))
    log = _run(model, train, held_out, shape, spec, folder / "run", rate, seed, start, progress, True)
    best = min(range(len(log.losses)), key=lambda epoch: log.losses[epoch])
    found = Fitted(rate, searched, log.losses, best, log.steps, round(seconds + log.seconds, 1))
    write_bytes(folder / FITTED, (json.dumps(asdict(found)) + "\n").encode())
    for rest in [folder / "run", *folder.glob("search-*")]:
        shutil.rmtree(rest, ignore_errors=True)
    return found


def _known(folder: Path) -> Fitted | None:
    """What a finished fit came to."""
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
    def losses(self) -> list[float]:
        return [float(row["eval_loss"]) for row in self.rows if "eval_loss" in row]

    @property
    def seconds(self) -> float:
        return sum(float(row.get("seconds", 0)) for row in self.rows)

    def waited(self) -> int:
        """Epochs since the best one."""
        losses = self.losses[1:]  # a rank's first epoch may be worse than none, and yet a beginning
        return len(losses) - 1 - min(range(len(losses)), key=lambda epoch: losses[epoch], default=-1)


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

    model = _wrapped(base, shape, seed)
    try:
        if start is not None:
            _begin(model, start)
        first = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        last, past = _resumed(folder)
        epochs = spec.epochs if final else spec.search_epochs
        if final and past.waited() >= spec.patience:
            epochs = len(past.losses) - 1  # it had ended, and was killed before it was saved
        arguments = TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=epochs,
            per_device_train_batch_size=spec.batch,
            per_device_eval_batch_size=spec.batch,
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
            seed=seed,
            data_seed=seed,
            use_cpu=next(model.parameters()).device.type == "cpu",
        )
        end = model.generation_config.eos_token_id
        pad = int(end[0] if isinstance(end, list) else end or 0)  # behind the mask: any token will do
        trainer = _trainer(
            model,
            arguments,
            train,
            held_out,
            pad,
            progress,
            "training" if final else "searching",
            spec.patience if final else epochs,
        )
        trainer.train(resume_from_checkpoint=last)
        log = _Log(trainer.state.log_history, int(trainer.state.global_step))
        losses = log.losses
        if not all(loss < float("inf") for loss in losses):
            problem = f"the held-out loss is no number at learning rate {rate:g}"
            raise InputError(
                [Defect(folder.parent.name, problem=problem, remedy="lower train.learning_rates")]
            )
        if final:
            if losses[0] <= min(losses[1:], default=losses[0]):  # training only made it worse
                with torch.no_grad():
                    for name, p in model.named_parameters():
                        if name in first:
                            p.copy_(first[name])
            _save(model, folder.parent / ADAPTER)
        return log
    finally:
        model.unload()
        del model
        gc.collect()


def _resumed(folder: Path) -> tuple[str | None, _Log]:
    """The last whole checkpoint, if there is one, and what was logged up to it.

    The Trainer writes its state last: a checkpoint without it was cut off by a kill, and is deleted.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: _natural(path.name), reverse=True)
    for path in found:
        try:
            state: dict[str, Any] = json.loads((path / "trainer_state.json").read_bytes())
            return str(path), _Log(state["log_history"], state["global_step"])
        except (OSError, ValueError):
            shutil.rmtree(path)
    return None, _Log([], 0)


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


def _wrapped(base: PreTrainedModel, shape: Shape, seed: int) -> PeftModel:
    """The base with a trainable adapter in float32."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=shape.rank,
        lora_alpha=shape.alpha,
        lora_dropout=0.0,
        use_dora=shape.kind == "dora",
        target_modules=_named(base, shape.modules),
    )
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PeftModel = get_peft_model(base, config)
    return model


@torch.no_grad()
def _begin(model: PeftModel, start: Start) -> None:
    """Put the factors of a start in place. Raises InputError."""
    inner: Any = model.base_model.model
    layers = {name: layer for name, layer in inner.named_modules() if hasattr(layer, "lora_A")}
    lost = sorted(start.keys() - layers.keys(), key=_natural)
    if lost:
        remedy = 'name its kind in train.modules, or give train.warm = "none"'
        raise InputError([Defect("warm start", lost[0], "", "is not trained, and would be lost", remedy)])
    for name, (b, a) in start.items():
        into_a, into_b = layers[name].lora_A[SLOT].weight, layers[name].lora_B[SLOT].weight
        rank = min(b.shape[1], into_a.shape[0])
        b, a = _truncated(b, a, rank)
        into_a[:rank] = a.to(into_a)
        into_b[:, :rank] = (b / layers[name].scaling[SLOT]).to(into_b)


def _truncated(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of B A of this rank, with columns of B and rows of A of equal length."""
    qb, rb = torch.linalg.qr(b.double())
    qa, ra = torch.linalg.qr(a.double().T)
    u, s, v = torch.linalg.svd(rb @ ra.T)
    root = s[:rank].sqrt()
    return (qb @ u[:, :rank] * root).float(), (root[:, None] * (v[:rank] @ qa.T)).float()


def _named(base: PreTrainedModel, modules: Sequence[str]) -> list[str]:
    """target_modules: leaf names where they mean just these modules, as people write them, else full names."""
    leaves = sorted({leaf(name) for name in modules})
    meant = {name for name, _ in base.named_modules() if leaf(name) in leaves}
    return leaves if meant == set(modules) else sorted(modules)


def modules_of(base: PreTrainedModel, leaves: Sequence[str]) -> tuple[str, ...]:
    """The linear layers of a model with one of these leaf names, sorted as names.

    Raises:
        InputError: a leaf name has none.
    """
    found = [
        name
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear) and leaf(name) in leaves
    ]
    missing = sorted(set(leaves) - {leaf(name) for name in found})
    if missing:
        linear = {leaf(n) for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)}
        remedy = f"name some of {', '.join(sorted(linear))} in train.modules"
        raise InputError([Defect(str(base.name_or_path), missing[0], "", "is no linear layer of it", remedy)])
    return tuple(sorted(found, key=_natural))


def leaf(name: str) -> str:
    """The last part of a module's name: q_proj."""
    return name.rpartition(".")[2]


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key: layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def collated(samples: Sequence[Sample], pad: int) -> dict[str, Tensor]:
    """A batch. Rows are padded on the left, so that all answers end together.

    Returns:
        input_ids, attention_mask, position_ids (n, width); labels (n, 1 + longest answer), the first column of which is
        not trained on (transformers counts trained tokens from the second); with tops: tops, tops_logprobs
        (n, longest answer, k).
    """
    width = max(len(s.prompt) + len(s.answer) for s in samples)
    longest = max(len(s.answer) for s in samples)
    ids = torch.full((len(samples), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full((len(samples), 1 + longest), NONE, dtype=torch.long)
    for i, s in enumerate(samples):
        row = torch.tensor([*s.prompt, *s.answer])
        ids[i, -len(row) :] = row
        mask[i, -len(row) :] = 1
        labels[i, -len(s.answer) :] = torch.where(
            torch.tensor(s.trained), torch.tensor(s.answer), torch.tensor(NONE)
        )
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp_min(0),
        "labels": labels,
    }
    with_tops = [s.tops for s in samples if s.tops is not None]
    if len(with_tops) == len(samples):
        k = max(len(row) for tops in with_tops for row in tops.tokens)
        batch["tops"] = torch.zeros(len(samples), longest, k, dtype=torch.long)
        batch["tops_logprobs"] = torch.full((len(samples), longest, k), -torch.inf)
        for i, tops in enumerate(with_tops):
            n = len(tops.tokens)
            batch["tops"][i, -n:] = torch.tensor(tops.tokens)
            batch["tops_logprobs"][i, -n:] = torch.tensor(tops.logprobs)
    return batch


def losses(model: torch.nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The loss of every trained token of a batch, flat."""
    labels = batch["labels"][:, 1:]
    logits = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"],
        logits_to_keep=labels.shape[1] + 1,
        use_cache=False,
    ).logits[:, :-1]
    trained = labels != NONE
    found = logits[trained].float().log_softmax(-1)  # (tokens, vocabulary)
    if "tops" not in batch:
        hard: Tensor = -found.gather(1, labels[trained][:, None])[:, 0]
        return hard
    student = found.gather(1, batch["tops"][trained])  # (tokens, k)
    teacher = batch["tops_logprobs"][trained]
    share = teacher.exp()
    inside = torch.where(share > 0, share * (teacher - student), 0).sum(1)
    tiny = torch.finfo(torch.float32).eps
    rest, own = (1 - share.sum(1)).clamp_min(tiny), (1 - student.exp().sum(1)).clamp_min(tiny)
    soft: Tensor = inside + rest * (rest.log() - own.log())
    return soft


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

    class Ours(Trainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            found = losses(model, inputs)
            count = len(found) if num_items_in_batch is None else num_items_in_batch
            loss = found.sum() / count
            return (loss, {}) if return_outputs else loss

        def prediction_step(
            self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
        ) -> Any:
            # The Trainer takes the mean over samples; so that the mean over tokens comes out:
            with torch.no_grad():
                found = losses(model, self._prepare_inputs(inputs))
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
        train_dataset=list(train),
        eval_dataset=list(held_out),
        data_collator=lambda samples: collated(samples, pad),
        callbacks=[Watch()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
