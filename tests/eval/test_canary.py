"""Canaries: an adapter that the embedded backend gets wrong is named, one that it gets right passes.

The same faults in vLLM: test_vllm_backend.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import MODULES

import lorazip
from lorazip import base as bases
from lorazip.adapter import open_adapter
from lorazip.base import load_tokenizer
from lorazip.errors import CheckError
from lorazip.eval import canary, job
from lorazip.eval import session as sessions
from lorazip.eval.backend import Acting, Forced
from lorazip.eval.cache import Cache
from lorazip.eval.results import Canary
from lorazip.eval.session import Session
from lorazip.eval.transformers_backend import TransformersBackend

NAMES = ("ant", "bee", "cat", "dog", "eel", "fox")
KINDS = sorted(tiny.faults(tiny.Changed("", {}, {tiny.Q0: tiny.LowRank(torch.ones(64, 1), torch.ones(1, 64))}),
                           tiny.Changed("", {}, {})))  # fmt: skip
CPU = torch.device("cpu")
HALF = torch.bfloat16


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six kinds of adapters, and a bundle of them with two clusters a module."""
    root = tmp_path_factory.mktemp("world")
    tiny.make_base(root / "base")
    tiny.make_adapters(root / "zoo", NAMES)
    lorazip.compress([str(root / "zoo")], lorazip.Spec("jd-full", rank=8, clusters=2), root / "team")
    return root


def originals(root: Path) -> list[Acting]:
    return [tiny.opened(root / "zoo" / name) for name in NAMES]


def members(root: Path) -> list[Acting]:
    return [tiny.acting(adapter, "team") for adapter in lorazip.Bundle.open(root / "team")]


def prompt(seed: int) -> tuple[int, ...]:
    return next(p for p in tiny.prompts(200, 100 + seed, longest=60) if len(p) > 25)


def prove(
    world: Path, cache: Path, actings: Sequence[Acting], dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Canary]:
    """Start the embedded backend, and let these adapters prove themselves."""
    engine = sessions.engine("hf", str(dtype).removeprefix("torch."), "cpu")
    tokens = [prompt(seed + i) for i in range(len(actings))]
    store = Cache(cache)
    tokenizer = load_tokenizer(world / "base")
    try:
        with Session(world / "base", tokenizer, actings, tokens, engine, store, 80, job.quiet) as session:
            return session.proof()
    finally:
        store.close()


def sabotage(monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]) -> None:
    """Let the backend put other factors in place than those of the adapter that is asked for."""
    put = TransformersBackend._put

    def wrong(self: TransformersBackend, acting: Acting) -> None:
        adapter = changed.get(acting.key, acting.adapter)
        put(self, dataclasses.replace(acting, adapter=adapter))

    monkeypatch.setattr(TransformersBackend, "_put", wrong)


# --- honest adapters --------------------------------------------------------------------------------------------------


def test_honest_adapters_pass(world: Path, tmp_path: Path) -> None:
    for seed in range(3):
        found = prove(world, tmp_path, [*originals(world), *members(world)], seed=seed)
        assert [f"{one.arm}/{one.adapter}" for one in found][:2] == ["original/ant", "original/bee"]
        for one in found:
            assert one.ok and not one.problem and one.effect > 1
            assert one.deviation < 1e-4 * one.effect


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_honest_adapters_pass_in_half_types(world: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    for seed in range(2):
        for one in prove(world, tmp_path, [*originals(world), *members(world)], dtype, seed):
            assert one.ok and 0 < one.deviation < one.tolerance < 0.5 * one.effect


def test_an_adapter_that_is_zero_is_a_silent_no_op(world: Path, tmp_path: Path, make_adapter: Any) -> None:
    path = make_adapter("null", modules=MODULES)
    adapter = open_adapter(path, "null")
    tensors = {
        f"base_model.model.{m}.lora_B.weight": torch.zeros_like(adapter.low_rank(m).B) for m in MODULES
    }
    null = tiny.opened(make_adapter("null", modules=MODULES, tensors=tensors))
    for dtype in (torch.float32, HALF):
        with pytest.raises(CheckError, match="original/null: it does nothing: are its factors zero"):
            prove(world, tmp_path / "calm", [null], dtype)


def test_what_is_too_weak_for_bfloat16_is_told_so(world: Path, tmp_path: Path) -> None:
    good = originals(world)
    weak = tiny.acting(tiny.scaled(good[0].adapter, 3e-4))
    (one,) = prove(world, tmp_path, [weak])
    assert one.ok and one.effect < 0.1
    for seed in range(
        4
    ):  # a batch of one length is computed as by hand and shows no noise; so there are others
        with pytest.raises(CheckError, match="nothing can be proven") as error:
            prove(world, tmp_path, [weak, *good[1:]], HALF, seed)
        assert str(error.value).startswith("original/ant: ")
        assert "(use --dtype float32)" in str(error.value)
        assert "\n" not in str(error.value)


def test_a_base_that_rounds_alike_by_luck_does_not_accuse_a_weak_adapter() -> None:
    """One unit of bfloat16's last place off at logits of 8 (0.0625), and none in the base: seen on a CPU."""
    acting = tiny.acting(tiny.Changed("ant", {}, {}))
    base, hand = [-8.0, -6.0], [-8.0625, -6.0]
    (exact, half) = (
        canary.judge(acting, hand, base, [-8.0, -6.0], base, dtype) for dtype in (torch.float32, HALF)
    )
    assert exact.problem == "it does nothing: the base answers"
    assert "nothing can be proven" in half.problem


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", KINDS)
@pytest.mark.parametrize("arm", ["original", "team"])
def test_every_fault_is_found_and_named(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, arm: str
) -> None:
    """Of any adapter, whatever the prompt."""
    actings = originals(world) if arm == "original" else members(world)
    changed = {
        a.key: tiny.faults(a.adapter, b.adapter)[fault]
        for a, b in zip(actings, [*actings[1:], actings[0]], strict=True)
    }
    sabotage(monkeypatch, changed)
    for seed in range(2):
        with pytest.raises(CheckError) as error:
            prove(world, tmp_path / f"wrong{seed}", actings, seed=seed)
        lines = str(error.value).split("\n")
        assert [line.split(": ")[0] for line in lines] == [f"{arm}/{name}" for name in NAMES]
        what = (
            "it does nothing: the base answers" if fault == "zeroed" else "it does not act as its factors say"
        )
        assert all(what in line for line in lines)
    assert error.value.exit_code == 1


@pytest.mark.parametrize("fault", ["zeroed", "swapped", "twice", "flipped", "another's core"])
def test_coarse_faults_are_found_in_bfloat16(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    actings = originals(world)
    sabotage(monkeypatch, {"original/cat": tiny.faults(actings[2].adapter, actings[3].adapter)[fault]})
    for seed in range(3):
        with pytest.raises(CheckError, match=r"^original/cat: it does n[^\n]*$"):
            prove(world, tmp_path / str(seed), actings, HALF, seed)


def test_two_adapters_that_were_swapped_are_both_named(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    actings = members(world)
    sabotage(monkeypatch, {"team/bee": actings[4].adapter, "team/eel": actings[1].adapter})
    with pytest.raises(CheckError, match=r"^team/bee: [^\n]*\nteam/eel: [^\n]*$"):
        prove(world, tmp_path, actings)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_any_module_that_is_missing_is_found(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    actings = [acting for acting in originals(world) if module in acting.adapter.modules]
    sabotage(monkeypatch, {acting.key: tiny.without(acting.adapter, module) for acting in actings})
    with pytest.raises(CheckError) as error:
        prove(world, tmp_path, actings)
    assert len(str(error.value).split("\n")) == len(actings)


def test_a_base_that_is_not_bare_is_found(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows without an adapter that get another row's: the bug of this vLLM, in its coarsest form."""
    ask = TransformersBackend.run

    def leaking(self: TransformersBackend, calls: Sequence[Any]) -> Any:
        return ask(self, [dataclasses.replace(c, adapter=c.adapter or "original/bee") for c in calls])

    monkeypatch.setattr(TransformersBackend, "run", leaking)
    with pytest.raises(CheckError, match="original/ant"):
        prove(world, tmp_path, originals(world))


def test_the_score_is_not_what_finds_it(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that base, adapter and sabotaged adapter all answer alike still shows that one is sabotaged."""
    good = originals(world)[0]
    wrong = tiny.scaled(good.adapter, 1.02)
    question = prompt(0)
    backends = [
        TransformersBackend(
            world / "base", load_tokenizer(world / "base"), [a], dtype=torch.float32, device=CPU
        )
        for a in (good, Acting(good.key, wrong, None, ""))
    ]
    model = tiny.peft(world / "base", world / "zoo" / "ant")
    call = Forced(good.key, question, tiny.greedy(model, question, 4))
    (_, right), (_, same) = (next(backend.run([call])) for backend in backends)
    assert right.exact and same.exact  # type: ignore[union-attr]
    sabotage(monkeypatch, {good.key: wrong})
    with pytest.raises(CheckError, match="original/ant: it does not act as its factors say"):
        prove(world, tmp_path, [good])


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_by_hand_is_pefts_own_model(world: Path) -> None:
    model = bases.load(world / "base", torch.float32, CPU)
    for i, name in enumerate(NAMES):
        asked = canary.call(name, prompt(i))
        wanted = tiny.logprobs(tiny.peft(world / "base", world / "zoo" / name), asked.prompt, asked.answer)
        found = canary.by_hand(model, open_adapter(world / "zoo" / name, name), asked)
        chosen = wanted.gather(1, torch.tensor(asked.answer)[:, None])[:, 0]
        assert found == pytest.approx(chosen.tolist(), abs=2e-5)
    bare = canary.by_hand(model, None, asked)  # the hooks are gone
    assert bare == canary.by_hand(bases.load(world / "base", torch.float32, CPU), None, asked)


def test_a_canary_is_cut_to_a_bound() -> None:
    asked = canary.call("a/b", range(1000))
    assert (asked.prompt, len(asked.answer)) == ((0,), canary.LONGEST - 1)
    assert canary.call("a/b", [1, 2]) == Forced("a/b", (1,), (2,))


# --- the judgement ----------------------------------------------------------------------------------------------------


def judged(
    hand: float, base: float, found: float, found_base: float, dtype: torch.dtype = torch.float32
) -> Canary:
    """Of one token; another one agrees everywhere."""
    acting = Acting("arm/a/b", tiny.Changed("a/b", {}, {}), None, "")
    return canary.judge(acting, *([-1.0, x] for x in (hand, base, found, found_base)), dtype)


def test_the_tolerance_is_of_effect_and_noise() -> None:
    one = judged(-2, -1, -2.0049, -1)
    assert (one.arm, one.adapter, one.ok, one.effect) == ("arm", "a/b", True, 1)
    assert one.tolerance == canary.RELATIVE[torch.float32] == 0.005
    assert not judged(-2, -1, -2.0051, -1).ok
    assert judged(-2, -1, -2.049, -1, HALF).ok
    assert not judged(-2, -1, -2.051, -1, HALF).ok
    assert judged(-2, -1, -2.03, -1.009).tolerance == pytest.approx(0.036)  # four times the base's own
    assert judged(-2, -1, -2.035, -1.009).ok
    assert "computes another model" in judged(-2, -1, -2, -1.011).problem
    assert judged(-2, -1, -2, -1.011, HALF).ok  # half types are as far off
    assert "are its factors zero" in judged(-1, -1, -1, -1).problem


def test_what_does_nothing_is_said_to_do_nothing() -> None:
    assert judged(-2, -1, -1, -1).problem == "it does nothing: the base answers"
    assert (
        judged(-2, -1, -3, -1).problem
        == "it does not act as its factors say: 1 off, at most 0.005 is allowed"
    )


def test_what_cannot_be_told_from_noise_is_not_ok() -> None:
    for found in (-1.01, -1.0):
        one = judged(-1.01, -1, found, -1.005, HALF)
        assert not one.ok and "drowns in the arithmetic's noise, 0.005" in one.problem
    assert not judged(-1 - 1e-5, -1, -1 - 1e-5, -1).ok


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_what_is_not_finite_is_never_ok(place: int, value: float) -> None:
    values = [-2.0, -1.0, -2.0, -1.0]
    values[place] = value
    one = judged(*values)  # type: ignore[arg-type]
    assert not one.ok and one.problem
