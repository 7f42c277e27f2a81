"""Training against plain truths: one sample at a time, without padding, in PEFT's own hands."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from distilling import (
    ENDING,
    HELD_OUT,
    PREFIX,
    QV,
    RUINOUS,
    SPEC,
    TRAIN,
    Whole,
    apart,
    assert_same,
    factors,
    hard,
    mean,
    shape,
    with_tops,
    wrong,
)
from transformers import PreTrainedModel

from lorazip.errors import InputError
from lorazip.transfer import distill, slots
from lorazip.transfer.batches import Sample
from lorazip.transfer.distill import Fitted
from lorazip.transfer.slots import Shape

pytestmark = pytest.mark.usefixtures("quick")


def test_start_that_is_wrong_in_every_token_is_trained(base: Path, tmp_path: Path) -> None:
    """1 - p is 1 for all; the mean that the Trainer takes of it may come out a little above."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.lm_head.weight.mul_(1000)
    lengths = (1, 4, 5, 5, 3)
    some = []
    for prompt, length in zip(tiny.prompts(len(lengths)), lengths, strict=True):
        answer = tuple(tiny.logprobs(model, prompt, (0,) * length).argmin(1).tolist())
        some.append(Sample(prompt, answer, (True,) * length))
    assert min(hard(model, some)) > 50
    found = distill.fit(model, some, some, shape(model), replace(SPEC, epochs=1), tmp_path / "fit")
    assert found.errors[0] == pytest.approx(1)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_fit_learns_and_saves_the_epoch_that_it_says(
    fit: Callable[..., Fitted], model: PreTrainedModel, base: Path, tmp_path: Path, kind: str
) -> None:
    found = fit(shape=shape(model, kind=kind))
    assert found.errors[0] == pytest.approx(mean(wrong(model, HELD_OUT)), rel=1e-4)
    assert found.best > 0 and found.errors[found.best] == min(found.errors) < found.errors[0] - 0.05
    assert (found.learning_rate, found.searched, found.steps) == (1e-2, {}, 9)
    assert {path.name for path in (tmp_path / "fit").iterdir()} == {"adapter", "fitted.json"}
    assert {path.name for path in (tmp_path / "fit" / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    theirs = tiny.peft(base, tmp_path / "fit" / "adapter")
    assert mean(wrong(theirs, HELD_OUT)) == pytest.approx(found.errors[found.best], rel=1e-4)
    config = tiny.json_of(tmp_path / "fit" / "adapter" / "adapter_config.json")
    assert (config["r"], config["lora_alpha"], config["use_dora"]) == (4, 12, kind == "dora")


def test_fit_on_logits_learns_them(
    fit: Callable[..., Fitted], teacher: PreTrainedModel, base: Path, tmp_path: Path
) -> None:
    train, held_out = (with_tops(teacher, some, 8) for some in (TRAIN, HELD_OUT))
    found = fit(train=train, held_out=held_out)
    assert found.best > 0 and found.errors[found.best] < found.errors[0] - 0.02
    theirs = tiny.peft(base, tmp_path / "fit" / "adapter")
    assert mean(apart(theirs, held_out)) == pytest.approx(found.errors[found.best], rel=1e-3)


def test_base_of_half_precision_gets_an_adapter_of_float32(base: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    found = distill.fit(model, TRAIN, HELD_OUT, shape(model), SPEC, tmp_path / "fit")
    assert found.errors[found.best] < found.errors[0]
    assert {tensor.dtype for tensor in factors(tmp_path / "fit").values()} == {torch.float32}


def test_best_learning_rate_is_trained_on(fit: Callable[..., Fitted], whole: Whole, tmp_path: Path) -> None:
    spec = replace(SPEC, learning_rates=(1e-9, 1e-2, 1e-8))
    found = fit("three", spec)
    assert found.learning_rate == 1e-2 and list(found.searched) == ["1e-09", "0.01", "1e-08"]
    assert min(found.searched.values()) == found.searched["0.01"]
    assert_same(tmp_path / "three", whole(SPEC)[0])


def test_fit_ends_when_it_no_longer_gets_better(whole: Whole, base: Path) -> None:
    folder, found = whole(replace(ENDING, patience=2))
    later = found.errors[1:]
    assert len(later) < 40 and later.index(min(later)) == len(later) - 3
    theirs = tiny.peft(base, folder / "adapter")
    assert mean(wrong(theirs, HELD_OUT)) == pytest.approx(min(found.errors), rel=1e-4)


def test_modules_are_named_as_people_name_them(
    fit: Callable[..., Fitted], model: PreTrainedModel, tmp_path: Path
) -> None:
    fit("all", RUINOUS)
    config = tiny.json_of(tmp_path / "all" / "adapter" / "adapter_config.json")
    assert config["target_modules"] == ["q_proj", "v_proj"]
    some = tuple(name for name in slots.modules_of(model, QV) if "layers.0" in name or "v_proj" in name)
    fit("some", RUINOUS, shape=Shape("lora", 2, 2, some))
    assert {key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in factors(tmp_path / "some")} == set(
        some
    )


def test_leaf_name_of_another_kind_of_layer_is_not_meant() -> None:
    tower = torch.nn.ModuleDict(
        {"text": torch.nn.ModuleDict({"proj": torch.nn.Linear(2, 2)}),
         "image": torch.nn.ModuleDict({"proj": torch.nn.Conv2d(2, 2, 1)})}
    )  # fmt: skip
    assert slots._named(tower, ["text.proj"]) == ["text.proj"]  # type: ignore[arg-type]
    del tower["image"]
    assert slots._named(tower, ["text.proj"]) == ["proj"]  # type: ignore[arg-type]


def test_modules_of_are_sorted_as_numbers(model: PreTrainedModel) -> None:
    assert slots.modules_of(model, ["down_proj", "q_proj"]) == tuple(
        f"model.layers.{i}.{name}" for i in range(2) for name in ("mlp.down_proj", "self_attn.q_proj")
    )
    layers = torch.nn.ModuleList(torch.nn.ModuleDict({"q": torch.nn.Linear(1, 1)}) for _ in range(11))
    assert slots.modules_of(layers, ["q"])[-2:] == ("9.q", "10.q")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"c_attn: is no linear layer of it \(name some of down_proj, "):
        slots.modules_of(model, ["q_proj", "c_attn"])


def test_nothing_to_train_on_is_refused(fit: Callable[..., Fitted]) -> None:
    for none in ("train", "held_out"):
        with pytest.raises(InputError, match="no sample to train on, or none is held out"):
            fit(**{none: []})


def test_loss_that_is_no_number_is_refused(fit: Callable[..., Fitted], tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"no number at learning rate 1e\+30 \(lower train\.learning_rates\)"
    ):
        fit(spec=replace(SPEC, learning_rates=(1e30,)))
    assert not (tmp_path / "fit" / "adapter").exists()


def test_fit_is_a_function_of_its_seed(fit: Callable[..., Fitted], tmp_path: Path) -> None:
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        torch.manual_seed(len(folder) + seed * 7)  # of no account
        fit(folder, seed=seed)
    assert_same(tmp_path / "a", tmp_path / "b")
    ours, other = factors(tmp_path / "a"), factors(tmp_path / "c")
    assert any(not torch.allclose(ours[name], other[name]) for name in ours)


def test_record_is_what_was_returned(fit: Callable[..., Fitted], tmp_path: Path) -> None:
    found = fit()
    assert Fitted(**json.loads((tmp_path / "fit" / "fitted.json").read_text())) == found
