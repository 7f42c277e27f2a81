"""Drawn answers and most likely tokens: the right chances, whatever is asked with them, and the same in both backends.

vLLM runs in another process, as in `test_vllm_backend`: this file, run as a script.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from scipy.stats import chisquare
from tiny import END

from lorazip import base as bases
from lorazip.base import load_tokenizer
from lorazip.eval import session as sessions
from lorazip.eval import vllm_backend
from lorazip.eval.backend import Acting, Answer, Call, Forced, Greedy, Ranked, Sampled, Scores, Tops, Written
from lorazip.eval.cache import Cache, key
from lorazip.eval.job import quiet
from lorazip.eval.session import Engine, Session
from lorazip.eval.transformers_backend import TransformersBackend

NAMES = ("ant", "bee", "cat")
KEYS = (None, *(f"original/{name}" for name in NAMES))
CPU = torch.device("cpu")
EMBEDDED = Engine("hf", torch.float32, CPU)
LONGEST = tiny.CONTEXT - 1  # vLLM writes one token after a forced answer
CLOSE = 1e-3  # nats, between two engines
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 1.7},
    {"top_p": 0.6},
    {"temperature": 1.4, "top_p": 0.8},
]
needs_vllm = pytest.mark.skipif(
    vllm_backend.installed() is None and not os.environ.get("LORAZIP_REQUIRE_VLLM"), reason="needs vLLM"
)


# --- what both processes see ------------------------------------------------------------------------------------------


def originals(root: Path) -> list[Acting]:
    return [tiny.opened(root / "zoo" / name) for name in NAMES]


@contextmanager
def opened(
    root: Path, cache: str, engine: Engine = EMBEDDED, actings: Sequence[Acting] = ()
) -> Iterator[Session]:
    """A session; without `actings` one of the base alone."""
    canaries = [prompt for prompt in tiny.prompts(60, seed=50) if len(prompt) > 12][: len(actings)]
    store = Cache(root / cache)
    tokenizer = load_tokenizer(root / "base")
    try:
        with Session(root / "base", tokenizer, actings, canaries, engine, store, LONGEST, quiet) as one:
            yield one
    finally:
        store.close()


def drawn(keys: Sequence[str | None], n: int = 40, seed: int = 0, limit: int = 8) -> list[Call]:
    """Prompts of many lengths, all options."""
    found = []
    for i, prompt in enumerate(tiny.prompts(n, seed)):
        found.append(
            Sampled(keys[i % len(keys)], prompt, limit, seed=i, **OPTIONS[i % 5], stop=("q",) * (i % 2))
        )
    return list(found)


def ranked(keys: Sequence[str | None], n: int = 24, seed: int = 1) -> list[Ranked]:
    answers = tiny.prompts(n, seed + 1, longest=9)
    prompts = tiny.prompts(n, seed)
    return [Ranked(keys[i % len(keys)], prompts[i], (*answers[i], END), 1 + i) for i in range(n)]


def questions(keys: Sequence[str | None]) -> list[Call]:
    """All kinds, well mixed."""
    found = [*drawn(keys), *ranked(keys)]
    found += [Forced(c.adapter, c.prompt, c.answer) for c in ranked(keys)]
    found += [Greedy(c.adapter, c.prompt, 8) for c in ranked(keys)]
    return random.Random(0).sample(found, len(found))


def long_ones(n: int = 64) -> list[Call]:
    """More tokens than vLLM puts into one step: some prompt would be taken in parts."""
    prompts = [prompt for prompt in tiny.prompts(2 * n, seed=60, longest=300) if len(prompt) > 60][:n]
    assert sum(map(len, prompts)) > 2 * 4096
    return [Sampled(None, prompt, 12, seed=i) for i, prompt in enumerate(prompts)]


def once(n: int, **options: Any) -> list[Call]:
    """One token, many times."""
    return [Sampled(None, PROMPT, 1, seed=i, **options) for i in range(n)]


PROMPT = tiny.encode("any token")  # many could follow
DRAWS = 4000


# --- in the other process ---------------------------------------------------------------------------------------------


def in_worker(what: str, root: Path) -> Any:
    """What this file, run as a script, finds."""
    folders = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    variables = {"PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", __file__, what, str(root)]
    ended = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
    print(ended.stderr)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-6000:]
    return tiny.json_of(root / f"{what}.json")


def with_adapters(root: Path) -> dict[str, Any]:
    """Adapters and the base in one engine, its rows mixed, in another order, and alone."""
    calls = questions(KEYS)
    with opened(root, "with", sessions.engine("vllm", "float32", "cpu"), originals(root)) as session:
        found = session.ask(calls)
        backend = session._backend
        assert backend is not None
        back = dict(backend.run(calls[::-1]))
        some = [i for i, call in enumerate(calls) if isinstance(call, Sampled)]
        alone = {i: next(iter(backend.run([calls[i]])))[1] for i in some}
    return {
        "answers": [asdict(one) for one in found],
        "back": [asdict(back[len(calls) - 1 - i]) for i in range(len(calls))],
        "alone": {i: asdict(one) for i, one in alone.items()},
    }


def bare(root: Path) -> dict[str, Any]:
    """The base alone; then again from the cache."""
    engine = sessions.engine("vllm", "float32", "cpu")
    calls = [*questions([None]), *long_ones()]
    with opened(root, "bare", engine) as session:
        found = session.ask(calls)
        assert session.proof() == []
        first = session.cost.made
        backend = session._backend
        assert backend is not None
        alone = dict(backend.run(long_ones()[:8]))
        counts = {}
        for i, options in enumerate(OPTIONS):
            written = [one for _, one in backend.run(once(DRAWS, **options)) if isinstance(one, Written)]
            counts[i] = Counter(one.tokens[0] for one in written)
    with opened(root, "bare", engine) as session:
        again = session.ask(calls)
        second = session.cost.made
    return {
        "answers": [asdict(one) for one in found],
        "alone": [asdict(alone[i]) for i in range(8)],
        "again": again == found,
        "made": [first, second],
        "counts": counts,
    }


# --- tests ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    root: Path
    backend: TransformersBackend
    models: dict[str | None, Any]  # key -> PEFT's own model, None -> the base

    def ask(self, calls: Sequence[Call]) -> list[Any]:
        found = dict(self.backend.run(calls))
        return [found[i] for i in range(len(calls))]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    base = tiny.make_base(root / "base")
    adapters = tiny.make_adapters(root / "zoo", NAMES)
    models: dict[str | None, Any] = {f"original/{d.name}": tiny.peft(base, d) for d in adapters}
    models[None] = bases.load(base, torch.float32, CPU)
    tokenizer = load_tokenizer(base)
    backend = TransformersBackend(base, tokenizer, originals(root), dtype=torch.float32, device=CPU)
    return World(root, backend, models)


def chances(model: Any, prompt: Sequence[int], temperature: float = 1.0, top_p: float = 1.0) -> list[float]:
    """Of every token to come next."""
    p = (tiny.logprobs(model, prompt, (0,))[0].double() / temperature).softmax(-1)
    order = p.argsort(descending=True).tolist()
    kept, mass = [], 0.0
    for token in order:
        if mass < top_p:
            kept.append(token)
        mass += float(p[token])
    total = sum(float(p[token]) for token in kept)
    return [float(p[token]) / total if token in set(kept) else 0.0 for token in range(len(order))]


def assert_chances(counts: Mapping[Any, int], wanted: Mapping[Any, float]) -> None:
    """By a chi-square test; what is rare is taken together. Draws have seeds, so this fails always or never."""
    n = sum(counts.values())
    assert all(wanted[one] > 0 for one in counts)
    often = [one for one, p in wanted.items() if n * p >= 5]
    seen, expected = [counts.get(one, 0) for one in often], [n * wanted[one] for one in often]
    rest = n - sum(expected)
    if rest >= 5:
        seen, expected = [*seen, n - sum(seen)], [*expected, rest]
    assert len(seen) > 3
    found = chisquare(seen, [one * sum(seen) / sum(expected) for one in expected])
    assert found.pvalue > 1e-3


# --- drawn answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
def test_a_token_comes_as_often_as_it_is_likely(world: World, options: dict[str, Any]) -> None:
    counts = Counter(one.tokens[0] for one in world.ask(once(DRAWS, **options)))
    assert_chances(counts, dict(enumerate(chances(world.models[None], PROMPT, **options))))


def test_the_next_token_is_drawn_anew(world: World) -> None:
    """Pairs of tokens: the second one has chance of its own."""
    calls = [Sampled("original/bee", PROMPT, 2, seed=i) for i in range(DRAWS)]
    model = world.models["original/bee"]
    wanted: dict[tuple[int, ...], float] = {}
    for first, p in enumerate(chances(model, PROMPT)):
        if first == END:
            wanted[(END,)] = p
        else:
            wanted |= {(first, j): p * q for j, q in enumerate(chances(model, (*PROMPT, first)))}
    assert_chances(Counter(one.tokens for one in world.ask(calls)), wanted)


def test_what_else_is_asked_changes_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = questions(KEYS)
    found = world.ask(calls)
    assert {type(one) for one in found} == {Scores, Written, Tops}
    for i, call in enumerate(calls):
        if isinstance(call, Sampled):
            assert world.ask([call]) == [found[i]], call
    monkeypatch.setattr(world.backend, "_tokens", 60)
    for call, one, again in zip(calls, found, world.ask(calls[::-1])[::-1], strict=True):
        if isinstance(call, Sampled):
            assert again == one


def test_the_programs_own_chance_is_neither_used_nor_touched(world: World) -> None:
    calls = drawn(KEYS)
    found = world.ask(calls)
    with torch.random.fork_rng():
        torch.manual_seed(17)
        before = torch.get_rng_state()
        assert world.ask(calls) == found
        assert torch.equal(torch.get_rng_state(), before)


def test_another_seed_is_another_answer(world: World) -> None:
    for name in KEYS:
        found = world.ask([Sampled(name, PROMPT, 12, i, temperature=4) for i in (*range(50), 2**32 - 1)])
        assert len({one.tokens for one in found}) > 40
        assert world.ask([Sampled(name, PROMPT, 12, 49, temperature=4)]) == [found[49]]


def test_little_temperature_or_a_small_nucleus_is_greedy(world: World) -> None:
    prompts = tiny.prompts(12, seed=3)
    greedy = world.ask([Greedy(None, prompt, 8) for prompt in prompts])
    odd: list[dict[str, Any]] = [{"temperature": 1e-4}, {"top_p": 1e-6}, {"temperature": 1, "top_p": 1e-6}]
    for options in odd:
        assert world.ask([Sampled(None, prompt, 8, 5, **options) for prompt in prompts]) == greedy


def test_stops_and_ends_end_a_drawn_answer(world: World) -> None:
    """The seed gives the same tokens up to the stop; the last one completes it."""
    whole = [Sampled(key, p, 12, i) for key in KEYS for i, p in enumerate(tiny.prompts(6, seed=14))]
    plain = world.ask(whole)
    assert len({len(one.tokens) for one in plain}) > 3
    assert all(END not in one.tokens[:-1] for one in plain)
    assert all(len(one.tokens) == 12 or one.tokens[-1] == END for one in plain)
    stops = sorted({one.text[1:3] for one in plain[::4] if len(one.text) > 3})
    assert len(stops) > 2
    for stop in stops:
        found = world.ask([replace(call, stop=(stop, "\t")) for call in whole])
        for before, after in zip(plain, found, strict=True):
            at = before.text.find(stop)
            wanted = Written(before.text[:at], before.tokens[: at + len(stop)]) if at >= 0 else before
            assert after == wanted


# --- the most likely tokens -------------------------------------------------------------------------------------------


def assert_tops(found: Answer, model: Any, call: Ranked, close: float = 2e-5) -> None:
    """Tokens and log-probabilities are this model's; which of two equals comes first is open."""
    assert isinstance(found, Tops)
    own = tiny.logprobs(model, call.prompt, call.answer)
    best = torch.tensor(found.logprobs)
    assert best.shape == (len(call.answer), call.k)
    assert all(len(set(row)) == call.k for row in found.tokens)
    torch.testing.assert_close(best, own.topk(call.k, dim=-1).values, atol=close, rtol=0)
    torch.testing.assert_close(best, own.gather(1, torch.tensor(found.tokens)), atol=close, rtol=0)


def test_tops_are_those_of_pefts_own_model(world: World) -> None:
    calls = ranked(KEYS)
    for call, found in zip(calls, world.ask(calls), strict=True):
        assert_tops(found, world.models[call.adapter], call)


def test_all_tokens_together_are_certain(world: World) -> None:
    call = Ranked(None, PROMPT, tiny.encode("any"), END + 1)
    (found,) = world.ask([call])
    assert_tops(found, world.models[None], call)
    assert torch.tensor(found.logprobs).exp().sum(1).tolist() == pytest.approx([1, 1, 1])


def test_scores_beside_tops_are_scores(world: World) -> None:
    """They share a forward pass."""
    calls = ranked(KEYS)
    forced: list[Call] = [Forced(c.adapter, c.prompt, c.answer) for c in calls]
    alone = world.ask(forced)
    for one, beside in zip(alone, world.ask([*forced, *calls])[: len(forced)], strict=True):
        assert isinstance(beside, Scores)
        assert beside.logprobs == pytest.approx(one.logprobs, abs=2e-5)


# --- sessions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("actings", [True, False])
def test_a_killed_run_goes_on_to_the_same_answers(
    world: World, monkeypatch: pytest.MonkeyPatch, actings: bool
) -> None:
    """Half of the calls in one run, all in the next, none made in the last; also where there is only the base."""
    members = originals(world.root) if actings else []
    calls = questions(KEYS if actings else [None])
    caches = (f"{actings} one", f"{actings} two")
    with opened(world.root, caches[0], actings=members) as session:
        wanted = session.ask(calls)
        assert len(session.proof()) == len(members)
        assert session.cost.tokens > 0
    with opened(world.root, caches[1], actings=members) as session:
        session.ask(calls[::2])
    with opened(world.root, caches[1], actings=members) as session:
        found = session.ask(calls)
        assert session.cost.made == len(set(calls)) - len(set(calls[::2]))
    for call, one, other in zip(calls, wanted, found, strict=True):
        if isinstance(one, Written):
            assert other == one, call
    monkeypatch.setattr(bases, "load", lambda *_: pytest.fail("a model was loaded"))
    with opened(world.root, caches[0], actings=members) as session:
        assert session.ask(calls) == wanted
        assert session.cost.made == 0


def test_what_an_answer_depends_on_is_its_key(world: World) -> None:
    """And keys of answers that were cached before there were draws are what they were."""
    one, top = Sampled(None, (1, 2), 3, 4), Ranked(None, (1, 2), (3, 4), 5)
    calls: list[Call] = [one, replace(one, prompt=(1, 3)), replace(one, limit=4), replace(one, seed=5),
                         replace(one, temperature=0.9), replace(one, top_p=0.9), replace(one, stop=("a",)),
                         top, replace(top, answer=(3, 5)), replace(top, k=6), replace(top, adapter=KEYS[1]),
                         replace(one, adapter=KEYS[1]), Greedy(None, (1, 2), 3),
                         Forced(None, (1, 2), (3, 4))]  # fmt: skip
    assert top != Forced(None, (1, 2), (3, 4))
    with opened(world.root, "keys", actings=originals(world.root)) as session:
        assert len({session._key(call) for call in calls}) == len(calls)
        about = {
            "base": session.cache.model_digest(world.root / "base"),
            "engine": EMBEDDED.name,
            "dtype": "torch.float32",
            "by_hand": False,
            "adapter": None,
        }
        assert session._key(Forced(None, (1, 2), (3, 4))) == key(
            **about, kind="Forced", asked={"prompt": [1, 2], "answer": [3, 4]}
        )
        assert session._key(Greedy(None, (1, 2), 3, ("a",))) == key(
            **about, kind="Greedy", asked={"prompt": [1, 2], "limit": 3, "stop": ["a"]}
        )


# --- vLLM -------------------------------------------------------------------------------------------------------------


def assert_near(world: World, calls: Sequence[Call], found: Sequence[dict[str, Any]]) -> None:
    """All but draws are those of the embedded models."""
    for call, other in zip(calls, found, strict=True):
        model = world.models[call.adapter]
        if isinstance(call, Ranked):
            assert_tops(Tops(**other), model, call, CLOSE)
        elif isinstance(call, Forced):
            own = tiny.logprobs(model, call.prompt, call.answer).gather(1, torch.tensor(call.answer)[:, None])
            assert other["logprobs"] == pytest.approx(own[:, 0].tolist(), abs=CLOSE)
        elif isinstance(call, Greedy):
            assert tuple(other["tokens"]) == tiny.greedy(model, call.prompt, call.limit)


@needs_vllm
def test_vllm_draws_the_same_whatever_else_is_asked(world: World) -> None:
    found = in_worker("with_adapters", world.root)
    calls = questions(KEYS)
    assert_near(world, calls, found["answers"])
    texts = set()
    for i, call in enumerate(calls):
        if isinstance(call, Sampled):
            one = found["answers"][i]
            assert one == found["back"][i] == found["alone"][str(i)], call
            assert "q" not in one["text"] or not call.stop
            assert len(one["tokens"]) == call.limit or one["tokens"][-1] == END or call.stop
            texts.add(one["text"])
    assert len(texts) > 30


@needs_vllm
def test_vllm_with_the_base_alone(world: World) -> None:
    """Long prompts too, which a CPU cannot take in parts."""
    found = in_worker("bare", world.root)
    calls, long = questions([None]), long_ones()
    assert_near(world, calls, found["answers"][: len(calls)])
    assert found["alone"] == found["answers"][len(calls) :][: len(found["alone"])]
    assert found["again"] and found["made"] == [len({*calls, *long}), 0]
    for i, options in enumerate(OPTIONS):
        counts = {int(token): n for token, n in found["counts"][str(i)].items()}
        assert_chances(counts, dict(enumerate(chances(world.models[None], PROMPT, **options))))


if __name__ == "__main__":
    task, folder = sys.argv[1:]
    outcome = {"with_adapters": with_adapters, "bare": bare}[task](Path(folder))
    (Path(folder) / f"{task}.json").write_text(json.dumps(outcome))
