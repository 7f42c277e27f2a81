"""A session: no answer is made twice, none is taken from another model, and every engine proves its adapters."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import END, MODULES

import lorazip
from lorazip import base as bases
from lorazip.base import load_tokenizer
from lorazip.errors import CheckError, InputError, TargetError, UsageError
from lorazip.eval import session as sessions
from lorazip.eval.backend import Acting, Call, Forced, Greedy, Scores, digest
from lorazip.eval.cache import FILE, Cache
from lorazip.eval.results import Canary
from lorazip.eval.session import Engine, Session
from lorazip.eval.transformers_backend import TransformersBackend

NAMES = ("ant", "bee", "cat")
ENGINE = Engine("hf", torch.float32, torch.device("cpu"))
PROMPTS = [prompt for prompt in tiny.prompts(60, seed=50) if len(prompt) > 12]


@dataclass
class Watched:
    """A session, and what it said of its progress."""

    session: Session
    said: list[tuple[Any, ...]]

    def ask(self, calls: Sequence[Call]) -> list[Any]:
        return list(self.session.ask(calls))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    tiny.make_base(root / "base")
    tiny.make_adapters(root / "zoo", NAMES)
    return root


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def originals(root: Path) -> list[Acting]:
    return [tiny.opened(root / "zoo" / name) for name in NAMES]


@contextmanager
def opened(
    base: Path,
    cache: Path,
    actings: Sequence[Acting],
    engine: Engine = ENGINE,
    canaries: Sequence[Sequence[int]] = PROMPTS,
) -> Iterator[Watched]:
    said: list[tuple[Any, ...]] = []
    store = Cache(cache)
    tokenizer, tokens = load_tokenizer(base), canaries[: len(actings)]
    arguments = (base, tokenizer, actings, tokens, engine, store, 64, lambda *a: said.append(a))
    try:
        with Session(*arguments) as session:  # type: ignore[arg-type]
            yield Watched(session, said)
    finally:
        store.close()


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be loaded from here on."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(bases, "load", refuse)


def questions(keys: Sequence[str | None], n: int = 4) -> list[Call]:
    forced: list[Call] = [Forced(key, p, (1, 2, END)) for key in keys for p in PROMPTS[:n]]
    return [*forced, *(Greedy(key, p, 4) for key in keys for p in PROMPTS[:n])]


KEYS = [None, *(f"original/{name}" for name in NAMES)]


# --- the cache --------------------------------------------------------------------------------------------------------


def test_nothing_is_asked_twice(world: Path, cache: Path, request: pytest.FixtureRequest) -> None:
    calls = questions(KEYS)
    with opened(world / "base", cache, originals(world)) as first:
        answers = first.ask([*calls, *calls[:5]])
        cost = first.session.cost
        assert (cost.asked, cost.made, cost.cached) == (len(calls), len(calls), 0)
        assert cost.tokens > 0 < cost.seconds
        assert answers[len(calls) :] == answers[:5]
        proof = first.session.proof()
        assert first.ask(calls[::-1]) == answers[: len(calls)][::-1]
        assert (cost.asked, cost.made, cost.cached) == (2 * len(calls), len(calls), len(calls))
        assert first.said[-1][1:3] == (len(calls), len(calls))
    request.getfixturevalue("no_model")
    with opened(world / "base", cache, originals(world)) as second:
        assert second.ask(calls) == answers[: len(calls)]
        assert second.session.proof() == proof
        cost = second.session.cost
        assert (cost.asked, cost.made, cost.cached, cost.tokens) == (len(calls), 0, len(calls), 0)


def test_answers_are_the_models(world: Path, cache: Path) -> None:
    """Fresh or from the cache, each in its place."""
    calls = questions(KEYS)
    wanted = dict(backend(world / "base", originals(world)).run(calls))
    with opened(world / "base", cache, originals(world)) as first:
        part = first.ask(calls[::3])
    with opened(world / "base", cache, originals(world)) as second:
        whole = second.ask(calls)
    assert whole[::3] == part
    for i, found in enumerate(whole):
        if isinstance(found, Scores):
            assert found.logprobs == pytest.approx(wanted[i].logprobs, abs=2e-5)
        else:
            assert found == wanted[i]


def backend(base: Path, actings: Sequence[Acting]) -> TransformersBackend:
    return TransformersBackend(
        base, load_tokenizer(base), actings, dtype=torch.float32, device=torch.device("cpu")
    )


def test_what_an_answer_depends_on_is_its_key(world: Path, cache: Path, tmp_path: Path) -> None:
    other_base = shutil.copytree(world / "base", tmp_path / "base")
    data = bytearray((other_base / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (other_base / "model.safetensors").write_bytes(data)
    other_tokenizer = shutil.copytree(world / "base", tmp_path / "tokenizer")
    text = (other_tokenizer / "tokenizer_config.json").read_text()
    (other_tokenizer / "tokenizer_config.json").write_text(text + "\n")
    ant = originals(world)[:1]
    changed = [tiny.acting(tiny.scaled(ant[0].adapter, 1 + 1e-7))]
    call: Call = Forced("original/ant", (1, 2), (3, 4))
    calls = [call, replace(call, adapter=None), replace(call, prompt=(1, 3)), replace(call, answer=(3, 5)),
             Forced("original/ant", (1, 2, 3), (4,)), Greedy("original/ant", (1, 2), 3),
             Greedy("original/ant", (1, 2), 4), Greedy("original/ant", (1, 2), 3, ("a",)),
             Greedy("original/ant", (1, 2), 3, ("a", "b"))]  # fmt: skip
    half = replace(ENGINE, dtype=torch.bfloat16)
    vllm, cuda = replace(ENGINE, kind="vllm"), replace(ENGINE, device=torch.device("cuda"))
    places = [(world / "base", ant, ENGINE), (other_base, ant, ENGINE), (other_tokenizer, ant, ENGINE),
              (world / "base", changed, ENGINE), (world / "base", ant, half), (world / "base", ant, vllm),
              (world / "base", ant, cuda)]  # fmt: skip
    keys = set()
    for base, actings, engine in places:
        with opened(base, cache, actings, engine) as one:  # type: ignore[arg-type]
            keys |= {one.session._key(call) for call in calls}
            keys |= {one.session._key(call, by_hand=True) for call in calls}
    # The adapter's own bytes are of no account for what the base answers.
    assert len(keys) == 2 * (len(places) * len(calls) - 1)


def test_the_engines_version_is_part_of_the_key(
    world: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ENGINE.name.startswith("transformers ") and f"torch {torch.__version__}" in ENGINE.name
    before = ENGINE.name
    monkeypatch.setattr(sessions, "version", lambda name: "9.9")
    assert ENGINE.name != before


def test_a_name_is_no_part_of_the_key(
    world: Path, cache: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    calls = questions(KEYS)
    with opened(world / "base", cache, originals(world)) as first:
        answers = first.ask(calls)
    for name in NAMES:
        shutil.copytree(world / "zoo" / name, tmp_path / f"{name}2")
    shutil.copytree(world / "base", tmp_path / "elsewhere")
    renamed = [tiny.opened(tmp_path / f"{name}2") for name in NAMES]
    request.getfixturevalue("no_model")
    with opened(tmp_path / "elsewhere", cache, renamed) as second:
        again = [replace(c, adapter=f"{c.adapter}2" if c.adapter else None) for c in calls]
        assert second.ask(again) == answers


def test_digests_are_of_the_effect(world: Path, make_adapter: Any) -> None:
    ant = originals(world)[0].adapter
    same, nudged = tiny.copied(ant, name="x"), dict(tiny.copied(ant).factors)
    one = nudged[tiny.Q0]
    assert digest(same) == digest(ant)
    found = {digest(ant), digest(tiny.scaled(ant, 2)), digest(tiny.without(ant, tiny.Q0))}
    for wrong in (replace(one, B=-one.B), replace(one, A=one.A.flip(0)), replace(one, A=one.A.bfloat16())):
        found.add(digest(tiny.copied(ant, factors={**nudged, tiny.Q0: wrong})))
    moved = {("x" if m == tiny.Q0 else m): f for m, f in nudged.items()}
    found.add(digest(tiny.copied(ant, factors=moved)))
    assert len(found) == 7


def test_what_was_answered_before_an_error_is_kept(
    world: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "SAVED", 8)
    calls = questions(KEYS, 8)
    with (
        pytest.raises(ZeroDivisionError),
        opened(world / "base", cache, originals(world)) as first,
    ):
        first.session.progress = lambda what, done, *_: 1 / (20 - done if what == "scoring" else 1)  # type: ignore[assignment]
        first.ask(calls)
    with opened(world / "base", cache, originals(world)) as second:
        second.ask(calls)
        assert (second.session.cost.cached, second.session.cost.made) == (16, len(calls) - 16)


def test_a_cache_that_is_no_cache(world: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / FILE).write_bytes(b"no database, but long enough to be taken for one" * 100)
    with pytest.raises(TargetError, match="cannot be used"), opened(world / "base", tmp_path / "cache", []):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(TargetError, match="cannot be used"), opened(world / "base", tmp_path / "file", []):
        pass


# --- the proof --------------------------------------------------------------------------------------------------------


def wrong_put(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    put = TransformersBackend._put

    def wrong(self: TransformersBackend, acting: Acting) -> None:
        put(self, replace(acting, adapter=tiny.scaled(acting.adapter, 2)) if acting.key == key else acting)

    monkeypatch.setattr(TransformersBackend, "_put", wrong)


def test_a_new_engine_proves_its_adapters_again(
    world: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A good run filled the cache, canaries too; then more is asked, and the engine is another."""
    calls = questions(KEYS, 6)
    with opened(world / "base", cache, originals(world)) as good:
        good.ask(calls[::2])
        good.session.proof()
    with monkeypatch.context() as patch:
        wrong_put(patch, "original/bee")
        with opened(world / "base", cache, originals(world)) as cached:
            assert all(one.ok for one in cached.session.proof())  # all of it was proven then
        for _ in range(2):
            with (
                opened(world / "base", cache, originals(world)) as bad,
                pytest.raises(CheckError, match=r"^original/bee: it does not act[^\n]*$"),
            ):
                bad.ask(calls)
    with opened(world / "base", cache, originals(world)) as again:
        again.ask(calls)
        assert again.session.cost.made == len(calls) // 2  # nothing of the bad engine was kept


def test_what_needs_several_gpus_is_referred_to_on_a_cpu(
    world: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that is split over GPUs does not fit on the first."""
    places: list[torch.device] = []
    load, cpu = bases.load, torch.device("cpu")

    def spied(base: Path, dtype: torch.dtype, device: torch.device) -> Any:
        places.append(device)
        return load(base, dtype, cpu)

    monkeypatch.setattr(bases, "load", spied)
    monkeypatch.setattr(Session, "_open", lambda self: backend(world / "base", originals(world)))
    engine = Engine("vllm", torch.float32, torch.device("cuda"), tensor_parallel=2)
    monkeypatch.setattr(sessions.vllm_backend, "installed", lambda: "vllm 0.32.0")
    with opened(world / "base", cache, originals(world), engine) as one:
        one.session.proof()
    assert places[0] == cpu


def test_a_bad_engine_leaves_nothing_behind(
    world: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        wrong_put(patch, "original/cat")
        for ask in (lambda s: s.ask(questions(KEYS)), lambda s: s.proof()):
            with (
                opened(world / "base", cache, originals(world)) as bad,
                pytest.raises(CheckError, match="cat"),
            ):
                ask(bad.session)
    with opened(world / "base", cache, originals(world)) as good:
        good.ask(questions(KEYS))
        assert all(one.ok for one in good.session.proof())
        assert good.session.cost.cached == 0


def test_the_engine_is_closed_also_after_an_error(
    world: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []
    monkeypatch.setattr(TransformersBackend, "close", lambda self: closed.append("closed"))
    with opened(world / "base", cache, originals(world)) as one:
        one.session.proof()
    assert closed == ["closed"]
    wrong_put(monkeypatch, "original/ant")
    with pytest.raises(CheckError), opened(world / "base", cache / "2", originals(world)) as one:
        one.session.proof()
    assert closed == ["closed"] * 2
    with opened(world / "base", cache, originals(world)) as one:  # from the cache: nothing to close
        one.session.proof()
    assert closed == ["closed"] * 2


def test_canaries_are_no_part_of_the_cost(world: Path, cache: Path) -> None:
    for _ in range(2):
        with opened(world / "base", cache, originals(world)) as one:
            proof = one.session.proof()
            assert [type(canary) for canary in proof] == [Canary] * 3
            assert (one.session.cost.asked, one.session.cost.made, one.session.cost.cached) == (0, 0, 0)


def test_another_prompt_is_another_proof(world: Path, cache: Path) -> None:
    with opened(world / "base", cache, originals(world)) as one:
        first = one.session.proof()
    with opened(world / "base", cache, originals(world), canaries=PROMPTS[5:]) as other:
        assert other.session.proof() != first


def test_adapters_of_a_bundle_and_originals_are_proven_apart(
    world: Path, cache: Path, tmp_path: Path
) -> None:
    lorazip.compress([str(world / "zoo")], lorazip.Spec("svd", rank=1), tmp_path / "team")
    members = [tiny.acting(a, "team") for a in lorazip.Bundle.open(tmp_path / "team")]
    with opened(world / "base", cache, [*originals(world), *members], canaries=PROMPTS[:3] * 2) as one:
        proof = one.session.proof()
    assert [(c.arm, c.adapter) for c in proof[2:4]] == [("original", "cat"), ("team", "ant")]
    assert all(a.effect != b.effect for a, b in zip(proof[:3], proof[3:], strict=True))


def test_adapters_of_another_base_are_refused_before_an_engine_starts(
    world: Path, cache: Path, make_adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "_open", lambda self: pytest.fail("an engine was started"))
    bad = tiny.opened(make_adapter("bad", modules={**MODULES, "model.layers.7.self_attn.q_proj": (64, 64)}))
    with (
        opened(world / "base", cache, [*originals(world), bad]) as one,
        pytest.raises(InputError, match=r"original/bad: model\.layers\.7\.self_attn\.q_proj: is not in"),
    ):
        one.session.proof()


# --- which engine -----------------------------------------------------------------------------------------------------


def test_the_engine_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sessions.engine("hf") == Engine("hf", torch.float32, cpu)
    assert sessions.engine("hf", "float16").dtype == torch.float16
    monkeypatch.setattr(sessions.vllm_backend, "installed", lambda: "vllm 0.32.0")
    assert sessions.engine() == Engine("vllm", torch.float32, cpu)
    monkeypatch.setattr(sessions.vllm_backend, "installed", lambda: None)
    assert sessions.engine().kind == "hf"
    with pytest.raises(UsageError, match="vLLM is not installed"):
        sessions.engine("vllm")
    with pytest.raises(UsageError, match="no CUDA device"):
        sessions.engine("hf", device="cuda")
    with pytest.raises(UsageError, match="tensor-parallel"):
        sessions.engine("hf", tensor_parallel=2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sessions.vllm_backend, "installed", lambda: "vllm 0.32.0")
    assert sessions.engine(device="cpu") == Engine("hf", torch.float32, cpu)  # vLLM would take the GPU
    for other in ("cpu", "cuda:1"):
        with pytest.raises(UsageError, match=f"vLLM takes cuda, not {other}"):
            sessions.engine("vllm", device=other)
    assert sessions.engine("vllm", device="cuda:0").dtype == torch.bfloat16
    assert sessions.engine("hf") == Engine("hf", torch.bfloat16, torch.device("cuda"))
