"""The losses and the error of batches against the formulas, token by token, and one step of accumulated ones."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from distilling import PREFIX, QV, apart, factors, hard, mean, samples, soft, with_tops, wrong
from transformers import PreTrainedModel

from lorazip.transfer import batches, slots
from lorazip.transfer.batches import Sample
from lorazip.transfer.distill import Fitted
from lorazip.transfer.recipe import Training

pytestmark = pytest.mark.usefixtures("quick")


def test_padded_batch_loses_what_each_sample_loses_alone(model: PreTrainedModel) -> None:
    some = samples(9, seed=2)
    with torch.no_grad():
        found = batches.losses(model, batches.collated(some, pad=3))
        assert found.tolist() == pytest.approx(hard(model, some), rel=1e-4, abs=1e-4)
        other = batches.losses(model, batches.collated(some, pad=50))
    assert torch.equal(found, other)  # what it is padded with is of no account
    with pytest.raises(ValueError, match=r"longer|shorter"):
        hard(model, [replace(some[0], trained=())])


def test_only_trained_tokens_count(model: PreTrainedModel) -> None:
    some = samples(5, seed=3)
    whole = [replace(sample, trained=(True,) * len(sample.answer)) for sample in some]
    with torch.no_grad():
        found = batches.losses(model, batches.collated(some, 0))
        every = batches.losses(model, batches.collated(whole, 0))
    trained = torch.tensor([one for sample in some for one in sample.trained])
    assert 0 < len(found) < len(every)
    torch.testing.assert_close(found, every[trained])


@pytest.mark.parametrize("k", [1, 5])
def test_divergence_over_the_likeliest_and_the_rest(
    model: PreTrainedModel, teacher: PreTrainedModel, k: int
) -> None:
    some = with_tops(teacher, samples(7, seed=4), k)
    with torch.no_grad():
        found = batches.losses(model, batches.collated(some, 0))
    assert found.tolist() == pytest.approx(soft(model, some), rel=1e-3, abs=1e-3)
    assert mean(found.tolist()) > 0.1


@pytest.mark.parametrize("k", [0, 1, 5, tiny.END + 1])
def test_error_is_the_total_variation(model: PreTrainedModel, teacher: PreTrainedModel, k: int) -> None:
    """By the teacher's distribution, or (k = 0) by one that is sure of the label."""
    some = samples(9, seed=4)
    expected = wrong(model, some)
    if k:
        some = with_tops(teacher, some, k)
        expected = apart(model, some)
    with torch.no_grad():
        found = batches.errors(model, batches.collated(some, 0))
    assert found.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert 0.01 < mean(expected) < 1


@pytest.mark.parametrize("k", [3, tiny.END + 1])
def test_model_does_not_diverge_from_itself(teacher: PreTrainedModel, k: int) -> None:
    some = with_tops(teacher, samples(7, seed=4), k)
    with torch.no_grad():
        found = batches.losses(teacher, batches.collated(some, 0))
    assert found.abs().max() < 1e-4


def test_impossible_tokens_of_a_teacher_have_no_weight(
    model: PreTrainedModel, teacher: PreTrainedModel
) -> None:
    (sample,) = with_tops(teacher, samples(1, seed=4), 2)
    assert sample.tops is not None
    one = tuple((row[0], -torch.inf) for row in sample.tops.logprobs)
    sample = replace(sample, tops=replace(sample.tops, logprobs=one))
    model.requires_grad_(True)
    found = batches.losses(model, batches.collated([sample], 0))
    found.sum().backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert found.isfinite().all()
    model.zero_grad(set_to_none=True)


# One step


def test_accumulated_batches_make_the_step_of_one(
    fit: Callable[..., Fitted], tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With plain gradient descent a step shows its gradient: the mean over all tokens of all parts of the batch."""
    theirs = transformers.TrainingArguments
    monkeypatch.setattr(
        sys.modules["transformers"],  # which replaces itself while it is imported
        "TrainingArguments",
        lambda **options: theirs(**options | {"optim": "sgd", "max_grad_norm": 0.0}),
    )
    answers = [(1, 2, 3, 4, 5, 6, 7, 8, tiny.END), (9, tiny.END), (tiny.END,), (7, 7, 7, tiny.END)]
    some = [Sample((10, 11), answer, (True,) * len(answer)) for answer in answers]
    # Of the two steps the first is warmup, of length 0.
    spec = Training(epochs=2, batch=4, learning_rates=(1e-3,))
    for folder, one in {"one": spec, "two": replace(spec, batch=2, accumulation=2)}.items():
        found = fit(folder, one, train=some, held_out=some)
        assert (found.best, found.steps) == (2, 2)

    fresh: Any = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = tiny.json_of(tmp_path / "one" / "adapter" / "adapter_config.json")
    for module in slots.modules_of(fresh, QV):
        saved = factors(tmp_path / "one")
        b, a = (saved[f"{PREFIX}{module}.lora_{side}.weight"] for side in "BA")
        layer = fresh.get_submodule(module)
        layer.weight.grad = None
        layer.register_parameter("step", torch.nn.Parameter(torch.zeros_like(b)))
        scale = config["lora_alpha"] / config["r"]
        layer.register_forward_hook(
            lambda layer, args, out, a=a, scale=scale: out + scale * args[0] @ a.T @ layer.step.T
        )
    terms = []
    for sample in some:
        logits = fresh(input_ids=torch.tensor([[*sample.prompt, *sample.answer]])).logits[0]
        rows = logits[len(sample.prompt) - 1 : -1].log_softmax(-1)
        terms += [-row[token] for row, token in zip(rows, sample.answer, strict=True)]
    torch.stack(terms).mean().backward()  # type: ignore[no-untyped-call]
    for folder in ("one", "two"):
        for module in slots.modules_of(fresh, QV):
            step = -1e-3 * fresh.get_submodule(module).step.grad
            assert step.abs().max() > 1e-5
            saved_b = factors(tmp_path / folder)[f"{PREFIX}{module}.lora_B.weight"]
            torch.testing.assert_close(saved_b, step, rtol=1e-3, atol=1e-8)
