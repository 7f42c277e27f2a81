"""The embedded backend against PEFT's own model, one prompt at a time, and against greedy decoding itself."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import END, MODULES, Q0

import lorazip
from lorazip import base as bases
from lorazip.base import load_tokenizer
from lorazip.errors import InputError
from lorazip.eval import transformers_backend as hf
from lorazip.eval.backend import Acting, Answer, Call, Forced, Greedy, Scores, Written
from lorazip.eval.transformers_backend import TransformersBackend

NAMES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")
CPU = torch.device("cpu")
CLOSE = 2e-5  # nats: another order of the same sums


@dataclass(frozen=True)
class World:
    base: Path
    adapters: list[Path]
    actings: list[Acting]
    backend: TransformersBackend
    models: dict[str | None, Any]  # key -> PEFT's own model, None -> the base

    @property
    def keys(self) -> list[str | None]:
        return list(self.models)

    def ask(self, calls: Sequence[Call]) -> list[Answer]:
        return answers(self.backend, calls)


def answers(backend: TransformersBackend, calls: Sequence[Call]) -> list[Answer]:
    """Each call is answered once."""
    pairs = list(backend.run(calls))
    found = dict(pairs)
    assert len(pairs) == len(found) == len(calls)
    return [found[i] for i in range(len(calls))]


def start(base: Path, actings: Sequence[Acting], dtype: torch.dtype = torch.float32) -> TransformersBackend:
    return TransformersBackend(base, load_tokenizer(base), actings, dtype=dtype, device=CPU)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Seven adapters: six kinds, and two of one kind; two of them again from a bundle's core and from its svd."""
    root = tmp_path_factory.mktemp("world")
    base = tiny.make_base(root / "base")
    adapters = tiny.make_adapters(root / "zoo", NAMES)
    actings = [tiny.opened(directory) for directory in adapters]
    models: dict[str | None, Any] = {
        a.key: tiny.peft(base, d) for a, d in zip(actings, adapters, strict=True)
    }
    models[None] = bases.load(base, torch.float32, CPU)
    return World(base, adapters, actings, start(base, actings), models)


def forced(keys: Sequence[str | None], n: int, seed: int) -> list[Forced]:
    answers = tiny.prompts(n, seed + 1, longest=9)
    return [
        Forced(keys[i % len(keys)], prompt, (*answer, END) if i % 2 else answer)
        for i, (prompt, answer) in enumerate(zip(tiny.prompts(n, seed), answers, strict=True))
    ]


def assert_scores(found: Answer, model: Any, call: Forced, close: float = CLOSE) -> None:
    """Log-probabilities and gaps are those of this model."""
    assert isinstance(found, Scores)
    wanted = tiny.logprobs(model, call.prompt, call.answer)
    index = torch.tensor(call.answer)[:, None]
    chosen = wanted.gather(1, index)[:, 0]
    others = wanted.scatter(1, index, -torch.inf).max(1).values
    torch.testing.assert_close(torch.tensor(found.logprobs), chosen, atol=close, rtol=0)
    torch.testing.assert_close(torch.tensor(found.gaps), chosen - others, atol=2 * close, rtol=0)


# --- forced answers ---------------------------------------------------------------------------------------------------


def test_scores_are_those_of_pefts_own_model(world: World) -> None:
    calls = forced(world.keys, 96, seed=1)
    for call, found in zip(calls, world.ask(calls), strict=True):
        assert_scores(found, world.models[call.adapter], call)


def test_adapters_of_these_tests_differ(world: World) -> None:
    """Otherwise nothing here proves anything."""
    (prompt,) = tiny.prompts(1, seed=2)
    found = [tiny.logprobs(model, prompt, tiny.encode("abc")) for model in world.models.values()]
    for i, one in enumerate(found):
        assert all((one - other).abs().max() > 0.1 for other in found[:i])


@pytest.mark.parametrize("spec", [
    lorazip.Spec("svd", rank=2, dtype="float32"),
    lorazip.Spec("jd-full", rank=6, clusters=2),
    lorazip.Spec("jd-diag", rank=6),
    lorazip.Spec("jd-full", rank=3, max_error=0.1),
])  # fmt: skip
def test_a_bundles_adapters_act_as_their_matrices(world: World, tmp_path: Path, spec: lorazip.Spec) -> None:
    lorazip.compress([str(d) for d in world.adapters], spec, tmp_path / "team")
    actings = [tiny.acting(adapter, "team") for adapter in lorazip.Bundle.open(tmp_path / "team")]
    backend = start(world.base, actings)
    calls = forced([a.key for a in actings], 21, seed=3)
    found = answers(backend, calls)
    for acting in actings:
        model: Any = bases.load(world.base, torch.float32, CPU)
        for name in acting.adapter.modules:
            factor = acting.adapter.low_rank(name)
            model.get_submodule(name).weight.data += factor.scale * factor.B.float() @ factor.A.float()
        for call, scores in zip(calls, found, strict=True):
            if call.adapter == acting.key:
                assert_scores(scores, model, call, 1e-4)


def test_order_and_batches_do_not_matter(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Call] = [*forced(world.keys, 40, seed=4)]
    calls += [Greedy(world.keys[i % 8], p, 3 + i % 3) for i, p in enumerate(tiny.prompts(30, 5))]
    first = world.ask(calls)
    shuffled = random.Random(0).sample(range(len(calls)), len(calls))
    for tokens, logits in ((1, 2**27), (64, 2**27), (10**6, 1), (10**6, 4000), (10**6, 2**40)):
        monkeypatch.setattr(world.backend, "_tokens", tokens)
        monkeypatch.setattr(hf, "LOGITS", logits)
        again = world.ask([calls[i] for i in shuffled])
        for i, found in zip(shuffled, again, strict=True):
            wanted = first[i]
            if isinstance(wanted, Written):
                assert found == wanted
            else:
                assert isinstance(found, Scores)
                assert found.exact == wanted.exact
                assert found.logprobs == pytest.approx(wanted.logprobs, abs=CLOSE)
                assert found.gaps == pytest.approx(wanted.gaps, abs=2 * CLOSE)


def test_batches_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, ...]] = []
    kept: list[int] = []
    forward = world.backend.model.forward

    def watched(**arguments: Any) -> Any:
        sizes.append(tuple(arguments["input_ids"].shape))
        kept.append(arguments["logits_to_keep"])
        return forward(**arguments)

    monkeypatch.setattr(world.backend, "_tokens", 100)
    monkeypatch.setattr(hf, "LOGITS", 4000)
    monkeypatch.setattr(world.backend.model, "forward", watched)
    world.ask(list(forced(world.keys[:2], 60, seed=6)))
    assert all(rows == 1 or rows * width <= 100 for rows, width in sizes)
    assert all(
        rows == 1 or rows * keep * (END + 1) <= 4000 for (rows, _), keep in zip(sizes, kept, strict=True)
    )
    assert max(rows for rows, _ in sizes) > 2


def test_the_base_is_bare_between_adapters(world: World) -> None:
    """Also within one batch of calls, and after a run that was left in the middle."""
    plain = forced([None], 6, seed=7)
    for key in world.keys:
        mixed = [call for pair in zip(plain, forced([key], 6, seed=8), strict=True) for call in pair]
        for call, found in zip(mixed, world.ask(mixed), strict=True):
            assert_scores(found, world.models[call.adapter], call)
    interrupted = world.backend.run([Forced(None, c.prompt, c.answer) for c in plain])
    next(interrupted)
    interrupted.close()  # type: ignore[attr-defined]
    for call in forced(world.keys, 9, seed=9):
        assert_scores(world.ask([call])[0], world.models[call.adapter], call)


def test_without_adapters_the_base_answers(world: World) -> None:
    backend = start(world.base, [])
    calls = forced([None], 5, seed=10)
    for call, found in zip(calls, answers(backend, calls), strict=True):
        assert_scores(found, world.models[None], call)
    assert answers(backend, []) == []
    backend.close()


def test_bfloat16_is_near(world: World) -> None:
    backend = start(world.base, world.actings, torch.bfloat16)
    calls = forced(world.keys, 16, seed=11)
    for call, found in zip(calls, answers(backend, calls), strict=True):
        assert_scores(found, world.models[call.adapter], call, 0.3)


# --- gaps -------------------------------------------------------------------------------------------------------------


def test_gaps_are_above_zero_where_greedy_decoding_agrees() -> None:
    logits = torch.tensor([[2.0, 1, 0], [2, 1, 0], [1, 1, 0], [1, 1, 0], [0, 1, 1]])
    found = hf.scores(logits, torch.tensor([0, 1, 0, 1, 0]))
    assert found.gaps == pytest.approx((1, -1, 0, 0, -1))
    assert found.logprobs == pytest.approx(logits.log_softmax(-1)[range(5), [0, 1, 0, 1, 0]].tolist())


def test_a_tie_is_right() -> None:
    assert hf.scores(torch.tensor([[1.0, 1, 0]]), torch.tensor([1])).exact
    assert not Scores((-1.0, -1.0), (0.5, -1e-9)).exact
    assert not Scores((float("nan"),), (float("nan"),)).exact


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_exact_is_what_greedy_decoding_writes(world: World, data: st.DataObject) -> None:
    """Of an answer that greedy decoding gives, and of the same answer with any one token changed."""
    key = data.draw(st.sampled_from(world.keys))
    prompt = tuple(data.draw(st.lists(st.integers(0, END - 1), min_size=1, max_size=20)))
    model = world.models[key]
    answer = tiny.greedy(model, prompt, data.draw(st.integers(1, 6)))
    place = data.draw(st.integers(0, len(answer) - 1))
    other = (answer[place] + data.draw(st.integers(1, END))) % (END + 1)
    changed = (*answer[:place], other, *answer[place + 1 :])
    right, wrong, written = world.ask(
        [Forced(key, prompt, answer), Forced(key, prompt, changed), Greedy(key, prompt, len(answer))]
    )
    assert isinstance(right, Scores) and isinstance(wrong, Scores) and isinstance(written, Written)
    assert right.exact
    assert not wrong.exact
    assert written.tokens == answer


# --- written answers --------------------------------------------------------------------------------------------------


def generated(model: Any, prompt: Sequence[int], limit: int) -> tuple[int, ...]:
    """By generate itself, one prompt, its own cache."""
    ids = torch.tensor([prompt])
    found = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=limit,
        do_sample=False,
        pad_token_id=0,
    )
    return tuple(found[0, len(prompt) :].tolist())


def test_written_answers_are_generates_own(world: World) -> None:
    calls = [Greedy(world.keys[i % 8], p, 6) for i, p in enumerate(tiny.prompts(48, seed=12))]
    ended = 0
    for call, found in zip(calls, world.ask(calls), strict=True):
        model = world.models[call.adapter]
        wanted = generated(model, call.prompt, 6)
        assert found == Written("".join(tiny.CHARACTERS[t] for t in wanted if t != END), wanted)
        assert wanted == tiny.greedy(model, call.prompt, 6)
        ended += END in wanted
    assert 5 < ended < 43


def test_the_end_token_is_kept_and_nothing_after_it(world: World) -> None:
    calls = [Greedy(key, p, 12) for key in world.keys for p in tiny.prompts(6, seed=13)]
    lengths = set()
    for found in world.ask(calls):
        assert isinstance(found, Written)
        assert END not in found.tokens[:-1]
        assert len(found.tokens) == 12 or found.tokens[-1] == END
        lengths.add(len(found.tokens))
    assert len(lengths) > 3


def test_stop_strings_end_an_answer_and_are_cut_off(world: World) -> None:
    """Also in a batch, where one row ends before others; the last token is the one that completes the stop."""
    whole = [Greedy(key, p, 8) for key in world.keys for p in tiny.prompts(5, seed=14)]
    plain = [found for found in world.ask(whole) if isinstance(found, Written)]
    stops = {found.text[1:3] for found in plain[::4] if len(found.text) > 3}
    assert len(stops) > 3
    for stop in sorted(stops):
        found = world.ask([Greedy(c.adapter, c.prompt, c.limit, (stop, "\t")) for c in whole])
        for before, after in zip(plain, found, strict=True):
            at = before.text.find(stop)
            if at < 0:
                assert after == before
            else:
                assert after == Written(before.text[:at], before.tokens[: at + len(stop)])


def test_a_stop_that_begins_in_the_prompt_is_none(world: World) -> None:
    """Only what is written is looked at, as in vLLM."""
    key = world.keys[0]
    for prompt in tiny.prompts(12, seed=15):
        (plain,) = world.ask([Greedy(key, prompt, 6)])
        assert isinstance(plain, Written)
        stop = tiny.CHARACTERS[prompt[-1]] + plain.text[:1]
        if len(stop) == 2 and stop not in plain.text:
            assert world.ask([Greedy(key, prompt, 6, (stop,))]) == [plain]


def test_generation_config_of_the_base_changes_nothing(world: World, tmp_path: Path) -> None:
    """Chat models bring sampling and penalties; the answers asked for are the most likely tokens."""
    base = shutil.copytree(world.base, tmp_path / "base")
    odd = {
        "do_sample": True,
        "temperature": 3.0,
        "top_k": 3,
        "top_p": 0.5,
        "repetition_penalty": 5.0,
        "no_repeat_ngram_size": 1,
        "min_new_tokens": 5,
        "max_length": 7,
        "suppress_tokens": list(range(30)),
        "bad_words_ids": [[40]],
        "eos_token_id": END,
    }
    (base / "generation_config.json").write_text(json.dumps(odd))
    calls = [Greedy(key, p, 6) for key in world.keys for p in tiny.prompts(4, seed=16)]
    assert answers(start(base, world.actings), calls) == world.ask(calls)


def test_further_end_tokens_of_the_base_end_an_answer(world: World, tmp_path: Path) -> None:
    base = shutil.copytree(world.base, tmp_path / "base")
    calls = [Greedy(key, p, 8) for key in world.keys for p in tiny.prompts(4, seed=17)]
    plain = [found for found in world.ask(calls) if isinstance(found, Written)]
    other = max(range(END), key=lambda token: sum(token in found.tokens for found in plain))
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [END, other]}))
    for before, after in zip(plain, answers(start(base, world.actings), calls), strict=True):
        assert isinstance(after, Written)
        end = before.tokens.index(other) + 1 if other in before.tokens else len(before.tokens)
        assert after.tokens == before.tokens[:end]


def test_spaces_are_left_as_they_were_written(world: World, tmp_path: Path) -> None:
    base = shutil.copytree(world.base, tmp_path / "base")
    settings = tiny.json_of(base / "tokenizer_config.json") | {"clean_up_tokenization_spaces": True}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    model = bases.load(base, torch.float32, CPU)
    with torch.no_grad():  # the prompt's last token decides the next alone, and "a" is followed by " ."
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        for before, after in zip(tiny.encode("a ."), [*tiny.encode(" ."), END], strict=True):
            model.lm_head.weight[after] = 1000 * model.model.embed_tokens.weight[before]
    model.save_pretrained(base)
    assert answers(start(base, []), [Greedy(None, tiny.encode("a"), 5)]) == [
        Written(" .", (*tiny.encode(" ."), END))
    ]


def test_stops_are_cut_at_the_first() -> None:
    assert hf.cut("one\ntwo###", ("###", "\n")) == "one"
    assert hf.cut("one", ("###",)) == "one"
    assert hf.cut("one", ()) == "one"


# --- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("module", "shape", "problem"), [
    ("model.layers.2.self_attn.q_proj", (64, 64), "is not in the base model"),
    ("model.layers.0.self_attn.qkv_proj", (64, 64), "is not in the base model"),
    (Q0, (64, 32), "is 64 x 32, the base model has 64 x 64"),
    ("model.layers.0.self_attn.k_proj", (64, 64), "is 64 x 64, the base model has 32 x 64"),
    ("model.layers.0.mlp.act_fn", (64, 64), "is not in the base model"),
    ("model.layers.0.mlp", (64, 64), "is not in the base model"),
    ("model.norm", (64, 64), "is 64 x 64, the base model has 64"),
])  # fmt: skip
def test_what_does_not_fit_the_base_is_refused(
    world: World, make_adapter: Any, module: str, shape: tuple[int, int], problem: str
) -> None:
    good = tiny.opened(make_adapter("good", modules=tiny.ATTENTION))
    bad = tiny.opened(make_adapter("bad", modules={**MODULES, module: shape}))
    with pytest.raises(InputError) as error:
        start(world.base, [good, bad])
    assert (
        str(error.value)
        == f"original/bad: {module}: {problem} (name the base that it was trained on: --base)"
    )


@pytest.mark.parametrize("extra", ["model.layers.0.self_attn.q_proj.lora_magnitude_vector", "lm_head.weight"])
def test_more_than_factors_is_refused(world: World, make_adapter: Any, extra: str) -> None:
    fields: dict[str, Any] = {"modules_to_save": ["lm_head"]}
    tensors = {f"base_model.model.{extra}": torch.ones(64)}
    if "magnitude" in extra:
        fields = {"use_dora": True}
        tensors = {
            f"base_model.model.{m}.lora_magnitude_vector": torch.ones(s[0]) for m, s in tiny.ATTENTION.items()
        }
    bad = tiny.opened(make_adapter("bad", modules=tiny.ATTENTION, tensors=tensors, **fields))
    with pytest.raises(InputError, match=r"original/bad: base_model\.model\..*would be another adapter"):
        start(world.base, [bad])


def test_a_base_that_cannot_be_loaded_is_refused(world: World, tmp_path: Path) -> None:
    base = shutil.copytree(world.base, tmp_path / "base")
    (base / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(InputError, match="cannot be loaded as a base model"):
        start(base, world.actings)
    (base / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot be loaded as a base model"):
        start(base, world.actings)
