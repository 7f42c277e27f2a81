"""Fixtures of the tests of transfers and of training: tiny bases, and fits on them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from distilling import HELD_OUT, SPEC, TRAIN, Whole, shape
from moving import SEEDS, Place
from transformers import PreTrainedModel

from lorazip.transfer import distill
from lorazip.transfer.distill import Fitted
from lorazip.transfer.recipe import Training


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("transfer")
    source, target = tiny.make_base(root / "source"), tiny.make_base(root / "target", seed=7)
    adapter = tiny.make_adapters(root / "zoo", ["ant"])[0]
    tests = tiny.make_tasks(root / "tasks", source, [adapter], n=16)
    seeds = root / "seeds.txt"
    seeds.write_text("".join(f"{seed}\n" for seed in SEEDS))
    return Place(source, target, adapter, seeds, tests / "ant.jsonl")


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """What was imported is not looked through for garbage after every training; no threads for tiny matrices."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def loaded(base: Path) -> PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(base)


@pytest.fixture
def model(loaded: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The base; whatever a test did, it is what it was."""
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    names = [name for name, _ in loaded.named_modules()]
    yield loaded
    after = loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [name for name, _ in loaded.named_modules()] == names
    assert not any("lora" in type(module).__module__ for module in loaded.modules())


@pytest.fixture
def fit(model: PreTrainedModel, tmp_path: Path) -> Callable[..., Fitted]:
    def fit(folder: str = "fit", spec: Training = SPEC, **more: Any) -> Fitted:
        options: dict[str, Any] = {"train": TRAIN, "held_out": HELD_OUT, "shape": shape(model)} | more
        return distill.fit(
            model,
            options.pop("train"),
            options.pop("held_out"),
            options.pop("shape"),
            spec,
            tmp_path / folder,
            **options,
        )

    return fit


@pytest.fixture(scope="module")
def whole(loaded: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Fits that nothing interrupted."""

    @cache
    def whole(spec: Training) -> tuple[Path, Fitted]:
        folder = tmp_path_factory.mktemp("whole") / "fit"
        return folder, distill.fit(loaded, TRAIN, HELD_OUT, shape(loaded), spec, folder)

    return whole


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    """Another base, softer, so that what is beyond the first k tokens matters."""
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(
        tiny.make_base(tmp_path_factory.mktemp("t") / "t", 7)
    )
    with torch.no_grad():
        model.lm_head.weight.mul_(0.2)
    return model
