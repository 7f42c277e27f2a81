"""Training from a warm start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from distilling import HELD_OUT, QV, RUINOUS, delta, mean, shape, wrong
from transformers import PreTrainedModel

from lorazip.errors import InputError
from lorazip.transfer import slots
from lorazip.transfer.batches import Sample
from lorazip.transfer.distill import Fitted
from lorazip.transfer.slots import Start

pytestmark = pytest.mark.usefixtures("quick")


def start_of(model: PreTrainedModel, rank: int, size: float = 0.3) -> Start:
    random = torch.Generator().manual_seed(rank)
    found = {}
    for name in slots.modules_of(model, QV):
        layer: Any = model.get_submodule(name)
        out, in_ = layer.weight.shape
        b = size * torch.randn(out, rank, generator=random)
        found[name] = b, torch.randn(rank, in_, generator=random) / in_**0.5
    return found


def own(model: Any) -> list[Sample]:
    """What a model answers itself, as samples: it could hardly answer better."""
    found = []
    for prompt in tiny.prompts(6):
        answer = tiny.greedy(model, prompt, 6)
        found.append(Sample(prompt, answer, (True,) * len(answer)))
    return found


@pytest.mark.parametrize("rank", [2, 4, 9])
def test_start_is_kept_as_well_as_the_rank_allows(
    fit: Callable[..., Fitted], model: PreTrainedModel, base: Path, tmp_path: Path, rank: int
) -> None:
    """Training that only makes it worse saves where it started: the best approximation of rank 4, by a dense SVD."""
    start = start_of(model, rank)
    moved = transformers.AutoModelForCausalLM.from_pretrained(base)
    best = {}
    for name, (b, a) in start.items():
        u, s, v = torch.linalg.svd(b.double() @ a.double())
        best[name] = u[:, :4] * s[:4] @ v[:4]
        if rank <= 4:
            torch.testing.assert_close(best[name], b.double() @ a.double(), rtol=0, atol=1e-12)
        with torch.no_grad():
            moved.get_submodule(name).weight += best[name].float()
    held_out = own(moved)
    found = fit(spec=RUINOUS, start=start, held_out=held_out)
    assert found.best == 0 and found.errors[1] > found.errors[0]
    assert found.errors[0] == pytest.approx(mean(wrong(moved, held_out)), rel=1e-3)
    for name, expected in best.items():
        torch.testing.assert_close(delta(tmp_path / "fit", name), expected, rtol=1e-4, atol=1e-5)


def test_training_that_helps_goes_on_from_the_start(
    fit: Callable[..., Fitted], model: PreTrainedModel, base: Path, tmp_path: Path
) -> None:
    found = fit(start=start_of(model, 6))
    assert found.best > 0
    theirs = tiny.peft(base, tmp_path / "fit" / "adapter")
    assert mean(wrong(theirs, HELD_OUT)) == pytest.approx(found.errors[found.best], rel=1e-4)


def test_ruinous_training_without_a_start_saves_no_change(
    fit: Callable[..., Fitted], model: PreTrainedModel, tmp_path: Path
) -> None:
    assert fit(spec=RUINOUS, held_out=own(model)).best == 0
    assert all(delta(tmp_path / "fit", name).abs().max() == 0 for name in slots.modules_of(model, QV))


def test_start_of_a_module_that_is_not_trained_is_refused(
    fit: Callable[..., Fitted], model: PreTrainedModel
) -> None:
    with pytest.raises(InputError, match=r"layers\.0\.self_attn\.q_proj: is not trained"):
        fit(start=start_of(model, 2), shape=shape(model, leaves=["v_proj"]))
