"""The vLLM backend, really run on a CPU, against the embedded one; and its faults against the canaries.

vLLM warns, forks and keeps state for a process, so all of it happens in another one: this file, run as a script. An
engine takes long to start, so one answers everything here, with three slots for two dozen adapters; the command line
starts a second one, in bfloat16.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from tiny import END, MODULES

import lorazip
from lorazip.base import load_tokenizer
from lorazip.errors import CheckError, InputError, UsageError
from lorazip.eval import session as sessions
from lorazip.eval import vllm_backend
from lorazip.eval.backend import Acting, Call, Forced, Greedy
from lorazip.eval.cache import Cache
from lorazip.eval.job import quiet
from lorazip.eval.session import Session
from lorazip.eval.transformers_backend import TransformersBackend
from lorazip.eval.vllm_backend import RANKS, VllmBackend, lora_arguments

NAMES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibis")
SLOTS = 3
LONGEST = 64
CLOSE = 1e-3  # nats
CPU = torch.device("cpu")
needs_vllm = pytest.mark.skipif(
    vllm_backend.installed() is None and not os.environ.get("LORAZIP_REQUIRE_VLLM"), reason="needs vLLM"
)


# --- what both processes see ------------------------------------------------------------------------------------------


def honest(root: Path) -> list[Acting]:
    """Nine PEFT directories, and the same adapters from a bundle."""
    originals = [tiny.opened(root / "zoo" / name) for name in NAMES]
    return [*originals, *(tiny.acting(adapter, "team") for adapter in lorazip.Bundle.open(root / "team"))]


def questions(actings: Sequence[Acting]) -> list[Call]:
    """Every kind of call for every adapter and the base, well mixed."""
    keys = [None, *(acting.key for acting in actings), None]
    found: list[Call] = []
    for seed, key in enumerate(keys * 2):
        for i, prompt in enumerate(tiny.prompts(5, seed)):
            (answer,) = tiny.prompts(1, 1000 + 5 * seed + i, longest=8)
            calls = (
                Forced(key, prompt, (*answer, END)),
                Greedy(key, prompt, 3 + i),
                Greedy(key, prompt, 8, ("a", "9")),
            )
            found += [calls[i % 3], Forced(key, prompt, answer)]
    return [found[i] for i in torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()]


def in_worker(what: str, root: Path) -> Any:
    """What this file, run as a script, finds."""
    folders = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    variables = {"PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", __file__, what, str(root)]
    ended = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
    print(ended.stderr)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-6000:]
    return tiny.json_of(root / f"{what}.json")


# --- in the other process ---------------------------------------------------------------------------------------------


class Shared(Session):
    """A session whose engine is there already, and goes on after it."""

    running: Any

    def _open(self) -> Any:
        return self.running


def answer_all(root: Path) -> dict[str, Any]:
    """One engine answers all calls and shows all canaries."""
    vllm_backend.SLOTS, vllm_backend.CHUNK = SLOTS, 50
    good, bad = honest(root), sabotaged(honest(root))
    write = vllm_backend._directory

    def directory(acting: Acting, scratch: Path, number: int) -> Path:
        if acting.key in bad:  # what it says of itself is right, what is written is not
            wrong = Acting(acting.key, bad[acting.key][1], None, "")
            return write(wrong, scratch, number)
        return write(acting, scratch, number)

    vllm_backend._directory = directory
    actings = [*good, *(acting for acting, _ in bad.values())]
    tokenizer = load_tokenizer(root / "base")
    backend = VllmBackend(root / "base", tokenizer, actings, dtype=torch.float32, longest=LONGEST)
    scratch = Path(backend._scratch.name)
    calls = questions(good)
    answers = dict(backend.run(calls))
    found: dict[str, Any] = {
        "scratch": [str(scratch), sorted(path.name for path in scratch.iterdir())],
        "slots": backend.engine.llm_engine.vllm_config.lora_config.max_loras,
        "answers": [asdict(answers[i]) for i in range(len(calls))],
        "wrong": {},
    }
    Shared.running = backend
    backend.close, close = lambda: None, backend.close  # type: ignore[method-assign]
    found["canaries"] = [asdict(one) for one in proof(root, good)]
    for key, (acting, _) in bad.items():
        try:
            proof(root, [good[0], acting])
        except CheckError as error:
            found["wrong"][key] = str(error)
    close()
    found["left"] = scratch.exists()
    return found


def sabotaged(good: Sequence[Acting]) -> dict[str, tuple[Acting, tiny.Changed]]:
    """Key -> an adapter as it should act, and as it does."""
    found = {}
    for source, other in ((good[0], good[2]), (good[len(NAMES)], good[len(NAMES) + 2])):
        for fault, changed in tiny.faults(source.adapter, other.adapter).items():
            key = f"{source.key.split('/')[0]}/{fault}"
            found[key] = Acting(key, source.adapter, None, f"{source.digest} {fault}"), changed
    return found


def proof(root: Path, actings: Sequence[Acting]) -> list[Any]:
    """A canary of each of these adapters, none of it from a cache."""
    engine = sessions.engine("vllm", "float32", "cpu")
    tokens = [prompt for prompt in tiny.prompts(200, seed=9, longest=40) if len(prompt) > 20][: len(actings)]
    with tempfile.TemporaryDirectory() as folder:
        cache = Cache(Path(folder))
        tokenizer = load_tokenizer(root / "base")
        with Shared(root / "base", tokenizer, actings, tokens, engine, cache, LONGEST, quiet) as session:
            return session.proof()


def command_line(root: Path) -> dict[str, Any]:
    """`lorazip eval` in bfloat16, all adapters in a few slots."""
    from lorazip.cli import main

    vllm_backend.SLOTS, scratch = SLOTS, root / "scratch"
    scratch.mkdir()
    below = SimpleNamespace(TemporaryDirectory=partial(tempfile.TemporaryDirectory, dir=scratch))
    vllm_backend.tempfile = below  # type: ignore[assignment]
    arguments = ["eval", "--base", root / "base", "--tasks", root / "tasks", "--adapters", root / "zoo", "--bundle",
                 root / "team", "-o", root / "results", "--cache", root / "cache", "--dtype", "bfloat16", "--limit", 4,
                 "--agreement", "--drift", "long", "--template", tiny.TEMPLATE]  # fmt: skip
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        return {"code": end.code, "left": [path.name for path in scratch.iterdir()]}
    raise AssertionError


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base, zoo, team."""
    root = tmp_path_factory.mktemp("vllm")
    tiny.make_base(root / "base")
    tiny.make_adapters(root / "zoo", NAMES[:-1])
    ranks = {"q_proj": 4, "v_proj": 4}  # of all that it adapts; vLLM looks at r all the same
    tiny.MakeAdapter(root / "zoo")(
        "ibis", modules=tiny.ATTENTION, r=600, rank_pattern=ranks, bias="lora_only"
    )
    lorazip.compress([str(root / "zoo")], lorazip.Spec("jd-full", rank=8, clusters=2), root / "team")
    return root


@pytest.fixture(scope="module")
def found(world: Path) -> Any:
    return in_worker("answer_all", world)


@needs_vllm
def test_answers_are_those_of_the_embedded_backend(world: Path, found: Any) -> None:
    """Two dozen adapters in three slots, base rows among them; decisions may differ only where two tokens are equal."""
    actings = honest(world)
    tokenizer = load_tokenizer(world / "base")
    backend = TransformersBackend(world / "base", tokenizer, actings, dtype=torch.float32, device=CPU)
    calls = questions(actings)
    answers = dict(backend.run(calls))
    assert found["slots"] == SLOTS + 1
    worst, close_calls, ended = 0.0, 0, 0
    for i, (call, other) in enumerate(zip(calls, found["answers"], strict=True)):
        own = asdict(answers[i])
        if isinstance(call, Greedy):
            assert other == {**own, "tokens": list(own["tokens"])}, call
            ended += own["tokens"][-1] == END
            continue
        differences = [abs(a - b) for a, b in zip(own["logprobs"], other["logprobs"], strict=True)]
        worst = max(worst, *differences)
        for a, b in zip(own["gaps"], other["gaps"], strict=True):
            assert abs(a - b) < 2 * CLOSE, call
            close_calls += (a >= 0) != (b >= 0)
            assert (a >= 0) == (b >= 0) or abs(a) < CLOSE, call
    assert worst < CLOSE
    assert close_calls <= 1 and ended > 10
    print(f"largest difference of log-probabilities: {worst:.2g}")


@needs_vllm
def test_scratch_directories_are_removed(found: Any) -> None:
    path, names = found["scratch"]
    assert len(names) > len(NAMES)
    assert not found["left"] and not Path(path).exists()


@needs_vllm
def test_honest_adapters_prove_themselves(found: Any) -> None:
    assert len(found["canaries"]) == 2 * len(NAMES)
    for canary in found["canaries"]:
        assert canary["ok"] and canary["effect"] > 1, canary
        assert canary["deviation"] < 1e-4 * canary["effect"], canary


@needs_vllm
def test_every_fault_is_found_and_named(world: Path, found: Any) -> None:
    wanted = sabotaged(honest(world))
    assert set(found["wrong"]) == set(wanted)
    for key, message in found["wrong"].items():
        assert message.startswith(f"{key}: "), message  # and the good adapter beside it is not named
        assert "\n" not in message
        assert ("it does nothing" if key.endswith("zeroed") else "not act as its factors say") in message


@needs_vllm
def test_the_command_line_in_bfloat16(world: Path) -> None:
    tiny.make_tasks(world / "tasks", world / "base", [world / "zoo" / name for name in NAMES], n=6)
    sizes = (tiny.CONTEXT - 4, tiny.CONTEXT - 3)  # and "=", the answer and its end
    rows = [{"input": "x" * size, "output": "y"} for size in sizes]
    (world / "tasks" / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended = in_worker("command_line", world)
    assert ended == {"code": 0, "left": []}
    results = tiny.json_of(world / "results" / "results.json")
    assert results["settings"]["engine"].startswith("vllm") and results["settings"]["dtype"] == "bfloat16"
    assert len(results["canaries"]) == 2 * len(NAMES) and all(canary["ok"] for canary in results["canaries"])
    assert [(one["what"], one["count"]) for one in results["left_out"]][-1] == ("long", 1)
    scores = {one["arm"]: one["score"]["estimate"] for one in results["summary"]}
    # In bfloat16 a poor bundle may answer nothing: how products are rounded is the CPU's
    assert scores["original"] > 0.6 > scores["team"] >= scores["base"]


# --- without an engine ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "built"), [((1,), 1), ((2, 7), 8), ((8,), 8), ((9, 3), 16), ((257,), 320)])
def test_ranks_are_rounded_to_what_the_engine_is_built_for(
    make_adapter: Any, ranks: tuple[int, ...], built: int
) -> None:
    actings = [tiny.opened(make_adapter(f"a{r}", modules=tiny.ATTENTION, rank=r)) for r in ranks]
    arguments = lora_arguments(actings)
    assert arguments["max_lora_rank"] == built and built in RANKS
    assert arguments["max_loras"] == len(ranks) + 1 <= arguments["max_cpu_loras"]
    assert arguments["lora_target_modules"] == ["q_proj", "v_proj"]


def test_a_rank_beyond_the_engines_is_refused(make_adapter: Any) -> None:
    good = tiny.opened(make_adapter("good", modules=tiny.ATTENTION, rank=512))
    bad = tiny.opened(make_adapter("bad", modules=tiny.ATTENTION, rank=513))
    assert lora_arguments([good])["max_lora_rank"] == 512
    with pytest.raises(InputError) as error:
        lora_arguments([good, bad])
    assert str(error.value) == "original/bad: has rank 513, vLLM takes at most 512 (use --backend hf)"


def test_slots_are_bounded_and_one_is_kept_free(make_adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_backend, "SLOTS", 3)
    actings = [tiny.opened(make_adapter(f"a{i}", modules=tiny.ATTENTION)) for i in range(8)]
    assert lora_arguments(actings)["max_loras"] == 4
    assert lora_arguments(actings[:1])["max_loras"] == 2
    assert lora_arguments([]) == {}


def test_without_vllm_the_way_to_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        vllm_backend, "version", lambda name: (_ for _ in ()).throw(vllm_backend.PackageNotFoundError)
    )
    assert vllm_backend.installed() is None
    for start in (lambda: sessions.engine("vllm"), vllm_backend._import):
        with pytest.raises(UsageError, match="pip install"):
            start()
    assert sessions.engine().kind == "hf"


def test_an_adapters_name_is_no_path(tmp_path: Path, make_adapter: Any) -> None:
    adapter = tiny.copied(tiny.opened(make_adapter("a", modules=MODULES)).adapter, name="../../x")
    written = vllm_backend._directory(Acting("team/../../x", adapter, None, ""), tmp_path / "scratch", 7)
    assert written == tmp_path / "scratch" / "7"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "scratch"]


if __name__ == "__main__":
    task, folder = sys.argv[1:]
    outcome = {"answer_all": answer_all, "command_line": command_line}[task](Path(folder))
    (Path(folder) / f"{task}.json").write_text(json.dumps(outcome))
