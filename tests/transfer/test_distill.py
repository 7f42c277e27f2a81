"""Training against plain truths: one sample at a time, without padding, in PEFT's own hands, and killed anywhere."""

from __future__ import annotations

import gc
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from lorazip.errors import InputError
from lorazip.eval.backend import Tops
from lorazip.transfer import batches, distill, slots
from lorazip.transfer.batches import Sample
from lorazip.transfer.distill import Fitted
from lorazip.transfer.recipe import Training
from lorazip.transfer.slots import Shape, Start

SPEC = Training(epochs=3, batch=4, learning_rates=(1e-2,))
ENDING = replace(SPEC, epochs=40, patience=1, learning_rates=(0.1,))  # by its patience
QV = ("q_proj", "v_proj")
PREFIX = "base_model.model."


def samples(n: int, seed: int = 0, longest: int = 9, letters: int = 5) -> list[Sample]:
    """Prompts and answers of many lengths, the fewer letters the easier to learn.

    About a third of the tokens is not trained on; the end always is.
    """
    random = torch.Generator().manual_seed(seed)
    found = []
    for prompt in tiny.prompts(n, seed):
        length = int(torch.randint(0, longest, (1,), generator=random))
        answer = (*torch.randint(0, letters, (length,), generator=random).tolist(), tiny.END)
        kept = (torch.rand(length, generator=random) < 0.67).tolist()
        found.append(Sample(prompt, answer, (*kept, True)))
    return found


TRAIN, HELD_OUT = samples(11, letters=2), samples(6, seed=1, letters=2)  # neither is a multiple of the batch


@pytest.fixture(scope="module", autouse=True)
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


Whole = Callable[[Training], tuple[Path, Fitted]]


@pytest.fixture(scope="module")
def whole(loaded: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Fits that nothing interrupted."""

    @cache
    def whole(spec: Training) -> tuple[Path, Fitted]:
        folder = tmp_path_factory.mktemp("whole") / "fit"
        return folder, distill.fit(loaded, TRAIN, HELD_OUT, shape(loaded), spec, folder)

    return whole


def shape(model: PreTrainedModel, rank: int = 4, kind: str = "lora", leaves: Sequence[str] = QV) -> Shape:
    return Shape(kind, rank, 3 * rank, slots.modules_of(model, leaves))


def plain(model: Any, sample: Sample) -> Tensor:
    """(answer, vocabulary): log-probabilities of one sample alone, no padding."""
    return tiny.logprobs(model, sample.prompt, sample.answer).double()


def hard(model: Any, some: Sequence[Sample]) -> list[float]:
    """-log p of every trained token."""
    return [
        -float(row[token])
        for sample in some
        for row, token, trained in zip(plain(model, sample), sample.answer, sample.trained, strict=True)
        if trained
    ]


def wrong(model: Any, some: Sequence[Sample]) -> list[float]:
    """1 - p of every trained token."""
    return [1 - math.exp(-loss) for loss in hard(model, some)]


def soft(model: Any, some: Sequence[Sample]) -> list[float]:
    """KL of every trained token over the teacher's k tokens and one more for all others, in float64."""
    return [
        sum(p * (math.log(p) - math.log(q)) for p, q in pairs if p) for pairs in distributions(model, some)
    ]


def apart(model: Any, some: Sequence[Sample]) -> list[float]:
    """Total variation of the same: what the likelier of the two has more, summed."""
    return [sum(max(0.0, p - q) for p, q in pairs) for pairs in distributions(model, some)]


def distributions(model: Any, some: Sequence[Sample]) -> list[list[tuple[float, float]]]:
    """Of every trained token, what teacher and student give the k tokens and all others."""
    found = []
    for sample in some:
        assert sample.tops is not None
        places = zip(
            plain(model, sample), sample.tops.tokens, sample.tops.logprobs, sample.trained, strict=True
        )
        for row, tokens, logprobs, trained in places:
            if not trained:
                continue
            others = [token for token in range(len(row)) if token not in tokens]
            student = [float(row[token].exp()) for token in tokens] + [float(row[others].exp().sum())]
            teacher = torch.tensor(logprobs, dtype=torch.float64).exp().tolist()
            teacher.append(max(0.0, 1 - sum(teacher)))
            found.append(list(zip(teacher, student, strict=True)))
    return found


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def with_tops(teacher: Any, some: Sequence[Sample], k: int) -> list[Sample]:
    found = []
    for sample in some:
        values, tokens = plain(teacher, sample).float().topk(k, dim=1)
        found.append(
            replace(sample, tops=Tops(tuple(map(tuple, tokens.tolist())), tuple(map(tuple, values.tolist()))))
        )
    return found


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    """Another base, softer, so that what is beyond the first k tokens matters."""
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(
        tiny.make_base(tmp_path_factory.mktemp("t") / "t", 7)
    )
    with torch.no_grad():
        model.lm_head.weight.mul_(0.2)
    return model


def factors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def delta(folder: Path, module: str) -> Tensor:
    """D = alpha/r B A of the saved adapter, dense."""
    config = tiny.json_of(folder / "adapter" / "adapter_config.json")
    saved = factors(folder)
    b, a = (saved[f"{PREFIX}{module}.lora_{side}.weight"].double() for side in "BA")
    scale: float = config["lora_alpha"] / config["r"]
    return scale * b @ a


def assert_same(one: Path, other: Path) -> None:
    ours, theirs = factors(one), factors(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)


# The losses


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


# A whole fit


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


# Killed


class Killer:
    """Progress that is killed at one step, and keeps what it was told."""

    def __init__(self, what: str = "", at: int = -1):
        self.what, self.at, self.told = what, at, list[tuple[str, int, int]]()

    def __call__(self, what: str, done: int, total: int) -> None:
        self.told.append((what, done, total))
        if (what, done) == (self.what, self.at):
            raise KeyboardInterrupt


SEARCHED = replace(SPEC, epochs=4, learning_rates=(1e-3, 1e-2), search_epochs=2)  # 3 steps an epoch


def killed(fit: Callable[..., Fitted], spec: Training, what: str, at: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        fit("killed", spec, progress=Killer(what, at))


@pytest.mark.parametrize(
    ("what", "at", "goes_on"),
    [("searching", 2, 1), ("searching", 5, 4), ("training", 1, 1), ("training", 8, 7), ("training", 12, 10)],
)
def test_killed_fit_goes_on_to_the_same(
    fit: Callable[..., Fitted], whole: Whole, tmp_path: Path, what: str, at: int, goes_on: int
) -> None:
    folder, expected = whole(SEARCHED)
    killed(fit, SEARCHED, what, at)
    assert not (tmp_path / "killed" / "adapter").exists()
    seen = Killer()
    found = fit("killed", SEARCHED, progress=seen)
    assert_same(tmp_path / "killed", folder)
    assert replace(found, seconds=0) == replace(expected, seconds=0)
    own = [done for kind, done, _ in seen.told if kind == what]
    assert own[0] == goes_on  # no finished epoch is repeated
    if what == "training":
        assert not any(kind == "searching" for kind, *_ in seen.told)


def test_killed_while_a_checkpoint_was_written(
    fit: Callable[..., Fitted], whole: Whole, tmp_path: Path
) -> None:
    folder, _ = whole(SPEC)
    killed(fit, SPEC, "training", 8)
    last = tmp_path / "killed" / "run" / "checkpoint-6"
    (last / "trainer_state.json").unlink()  # what is written last
    seen = Killer()
    fit("killed", SPEC, progress=seen)
    assert seen.told[0] == ("training", 4, 9)
    assert_same(tmp_path / "killed", folder)
    shutil.rmtree(tmp_path / "killed")
    killed(fit, SPEC, "training", 5)
    (tmp_path / "killed" / "run" / "checkpoint-3" / "trainer_state.json").write_text('{"epoch": 1')
    fit("killed", SPEC)
    assert_same(tmp_path / "killed", folder)


@pytest.mark.parametrize("patience", [1, 2])
def test_killed_fit_ends_when_the_whole_one_does(
    fit: Callable[..., Fitted], whole: Whole, tmp_path: Path, patience: int
) -> None:
    spec = replace(ENDING, patience=patience)
    folder, expected = whole(spec)
    killed(fit, spec, "training", expected.steps - 1)  # within the last epoch: those before it are counted on
    found = fit("killed", spec)
    assert replace(found, seconds=0) == replace(expected, seconds=0)
    assert_same(tmp_path / "killed", folder)


@pytest.mark.parametrize("before", ["_save", "write_bytes"])
def test_killed_before_it_was_saved(
    fit: Callable[..., Fitted], whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    def kill(*told: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(distill, before, kill)
        with pytest.raises(KeyboardInterrupt):
            fit("killed", ENDING)
    seen = Killer()
    found = fit("killed", ENDING, progress=seen)
    folder, expected = whole(ENDING)
    assert seen.told == []
    assert replace(found, seconds=0) == replace(expected, seconds=0)
    assert_same(tmp_path / "killed", folder)


def test_time_of_all_parts_is_counted(fit: Callable[..., Fitted], monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on ten seconds a look, and is looked at before training and after every evaluation."""
    ticks = iter(range(0, 10**6, 10))
    monkeypatch.setattr(time, "monotonic", lambda: next(ticks))
    spec = replace(SPEC, learning_rates=(1e-3, 1e-2))
    assert fit("whole", spec).seconds == 2 * 20 + 40
    killed(fit, spec, "training", 7)
    assert fit("killed", spec).seconds == 2 * 20 + 40


def test_finished_fit_is_only_read(fit: Callable[..., Fitted], tmp_path: Path) -> None:
    found = fit()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "fit").rglob("*")}
    assert distill.fit(None, TRAIN, HELD_OUT, Shape("lora", 1, 1, ()), SPEC, tmp_path / "fit") == found  # type: ignore[arg-type]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "fit").rglob("*")} == before


@pytest.mark.parametrize("damage", ["adapter", "fitted.json", "{", '{"best": 1}'])
def test_half_a_fit_is_none(fit: Callable[..., Fitted], whole: Whole, tmp_path: Path, damage: str) -> None:
    folder, expected = whole(SPEC)
    shutil.copytree(folder, tmp_path / "fit")
    path = tmp_path / "fit" / damage
    if path.is_dir():
        shutil.rmtree(path)
    elif path.is_file():
        path.unlink()
    else:
        (tmp_path / "fit" / "fitted.json").write_text(damage)
    assert replace(fit(), seconds=0) == replace(expected, seconds=0)
    assert_same(tmp_path / "fit", folder)


# A warm start


def start_of(model: PreTrainedModel, rank: int, size: float = 0.3) -> Start:
    random = torch.Generator().manual_seed(rank)
    found = {}
    for name in slots.modules_of(model, QV):
        layer: Any = model.get_submodule(name)
        out, in_ = layer.weight.shape
        b = size * torch.randn(out, rank, generator=random)
        found[name] = b, torch.randn(rank, in_, generator=random) / in_**0.5
    return found


RUINOUS = replace(SPEC, epochs=1, learning_rates=(0.9,))


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


# Modules, and what is refused


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
