"""The probe: its numbers against their definitions, and what it advises for bases that are and are not alike."""

from __future__ import annotations

import gc
import itertools
import json
import shutil
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorazip import base as bases
from lorazip.adapter import Adapter, open_adapter
from lorazip.base import load_tokenizer
from lorazip.errors import InputError
from lorazip.generic import PROMPTS
from lorazip.transfer import probe
from lorazip.transfer.probe import Probe, Route

CPU = torch.device("cpu")
ROUTES = ("copy", "warm-copy", "warm-map", "logits", "labels")
FILE = "model.safetensors"


def make_base(directory: Path, seed: int = 0, **changes: Any) -> Path:
    """A random Llama of hidden size 32 with tiny's tokenizer."""
    sizes = {
        "vocab_size": 400,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = LlamaConfig(**(sizes | changes), bos_token_id=None, eos_token_id=tiny.END, pad_token_id=None)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(directory)
    tiny.make_tokenizer(directory)
    return directory


def make_bpe(
    directory: Path, edit: Callable[[dict[str, Any]], None] = lambda found: None, **fields: Any
) -> None:
    """A tokenizer that was trained on the plain texts, and edited."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=399, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([*PROMPTS, "qz " * 99], trainer)
    found = json.loads(tokenizer.to_str())
    edit(found)
    tokenizer = Tokenizer.from_str(json.dumps(found))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **({"eos_token": "</s>"} | fields)).save_pretrained(
        directory
    )


def train_on(base: Path, directory: Path, steps: int = 12) -> Path:
    """The same base after a few real steps on the plain texts."""
    shutil.copytree(base, directory)
    model, tokenizer = LlamaForCausalLM.from_pretrained(base), load_tokenizer(base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    for text in PROMPTS[:steps]:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)
    return directory


def edit_weights(
    base: Path, directory: Path, edit: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
) -> Path:
    """The same base with another file of weights."""
    shutil.copytree(base, directory)
    found = edit(load_file(directory / FILE))
    save_file(
        {name: t.contiguous() for name, t in found.items()}, directory / FILE, metadata={"format": "pt"}
    )
    return directory


def make_adapter(directory: Path, base: Path, *kinds: str, rank: int = 3) -> Adapter:
    """An adapter of these kinds of modules of a base."""
    shapes = {name: shape for name, shape in probe.shapes(base).items() if name.endswith(kinds)}
    made = tiny.MakeAdapter(directory.parent)(directory.name, modules=shapes, rank=rank)
    return open_adapter(made, directory.name)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("source") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path) -> Adapter:
    return make_adapter(base.parent / "ant", base, "q_proj", "k_proj", "v_proj")


def possible(found: Probe) -> set[str]:
    assert tuple(found.routes) == ROUTES
    assert all(route.why for route in found.routes.values())
    assert found.routes[found.advised["route"]].possible
    document = found.document()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    return {name for name, route in found.routes.items() if route.possible}


# --- CKA --------------------------------------------------------------------------------------------------------------


def direct_hsic(k: Tensor, m: Tensor) -> float:
    """The U-statistic itself: the mean over all four different places (Song et al. 2012, eq. 4)."""
    terms = [
        k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q]) for i, j, q, r in itertools.permutations(range(len(k)), 4)
    ]
    return float(torch.stack(terms).mean())


def test_cka_is_that_of_the_direct_formula() -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(8, 5, generator=random, dtype=torch.float64)
    y = x @ torch.randn(5, 3, generator=random, dtype=torch.float64) + torch.randn(8, 3, generator=random)
    k, m = x @ x.T, y @ y.T
    wanted = direct_hsic(k, m) / (direct_hsic(k, k) * direct_hsic(m, m)) ** 0.5
    assert probe.cka(x, y) == pytest.approx(wanted, abs=1e-12)
    assert 0.1 < wanted < 0.99  # it says something


def test_cka_knows_neither_rotation_nor_scale_nor_shift() -> None:
    random = torch.Generator().manual_seed(1)
    x, y = torch.randn(50, 20, generator=random), torch.randn(50, 20, generator=random)
    y[:, :5] = x[:, :5]
    turn = torch.linalg.qr(torch.randn(20, 20, generator=random))[0]
    wanted = probe.cka(x, y)
    assert 0.1 < wanted < 0.9
    assert probe.cka(x, 7 * y @ turn + 3) == pytest.approx(wanted, abs=1e-5)
    assert probe.cka(x @ turn, y) == pytest.approx(wanted, abs=1e-5)
    assert probe.cka(y, x) == pytest.approx(wanted, abs=1e-9)
    assert probe.cka(x, 0.1 * x @ turn) == pytest.approx(1, abs=1e-5)
    # It does know a change that is none of these.
    assert abs(probe.cka(x, y * torch.linspace(0.1, 5, 20)) - wanted) > 0.05


def test_cka_of_unrelated_states_is_zero_however_many_dimensions_there_are() -> None:
    random = torch.Generator().manual_seed(2)
    found = [
        probe.cka(torch.randn(40, 400, generator=random), torch.randn(40, 400, generator=random))
        for _ in range(20)
    ]
    assert abs(sum(found) / 20) < 0.02  # the plain estimator gives 0.9 here
    assert probe.cka(torch.ones(9, 3), torch.randn(9, 3, generator=random)) == 0


# --- routes and advice ------------------------------------------------------------------------------------------------


def test_the_same_base(base: Path, adapter: Adapter) -> None:
    found = probe.probe(adapter, base, base, CPU)
    assert possible(found) == set(ROUTES) and found.advised["route"] == "copy"
    assert found.weights == {0: 1.0, 1: 1.0, 2: 1.0}
    assert [(pair.source, pair.target) for pair in found.layers] == [(0, 0), (1, 1), (2, 2)]
    assert all(pair.cka == pytest.approx(1, abs=1e-4) for pair in found.layers)
    assert found.tokenizers_equal and found.vocabulary_shared == 1 and found.same_shape == 9
    assert 500 < found.places <= 1024
    assert found.document()["modules"][tiny.Q0] == {"shape": [32, 32], "target": [32, 32]}
    assert "1.00" in found.advised["why"]


def test_a_base_that_was_trained_on(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    target = train_on(base, tmp_path / "next")
    found = probe.probe(adapter, base, target, CPU)
    assert possible(found) == set(ROUTES) and found.advised["route"] == "copy"
    ours, theirs = load_file(base / FILE), load_file(target / FILE)
    for layer in range(3):
        keys = [f"model.layers.{layer}.self_attn.{kind}.weight" for kind in ("q_proj", "k_proj", "v_proj")]
        cosines = [
            float((ours[key] * theirs[key]).sum() / (ours[key].norm() * theirs[key].norm())) for key in keys
        ]
        assert found.weights[layer] == pytest.approx(sum(cosines) / 3, abs=1e-4)
        assert 0.9 < sum(cosines) / 3 < 0.9999
    assert f"{sum(filter(None, found.weights.values())) / 3:.2f}" in found.advised["why"]


def test_another_run_of_the_same_shape(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    found = probe.probe(adapter, base, make_base(tmp_path / "other", seed=1), CPU)
    assert possible(found) == {"warm-copy", "warm-map", "logits", "labels"}
    assert found.advised["route"] == "logits"
    assert all(value is not None and abs(value) < 0.1 for value in found.weights.values())
    assert "at least 0.9" in found.routes["copy"].why


def test_another_shape_and_depth(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    target = make_base(tmp_path / "wide", hidden_size=48, intermediate_size=64, num_hidden_layers=2)
    found = probe.probe(adapter, base, target, CPU)
    assert possible(found) == {"warm-map", "logits", "labels"} and found.advised["route"] == "logits"
    assert found.weights == {0: None, 1: None, 2: None} and found.same_shape == 0
    assert [(pair.source, pair.target) for pair in found.layers] == [(0, 0), (1, 0), (2, 1)]
    modules = found.document()["modules"]
    assert modules["model.layers.1.self_attn.k_proj"] == {"shape": [16, 32], "target": [24, 48]}
    assert modules["model.layers.2.self_attn.q_proj"] == {"shape": [32, 32], "target": None}
    assert found.routes["copy"] == Route(False, "0 of 9 modules have the target's names and shapes")


def test_another_tokenizer(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    target = make_base(tmp_path / "other", hidden_size=48)
    make_bpe(target)
    found = probe.probe(adapter, base, target, CPU)
    assert possible(found) == {"warm-map", "labels"} and found.advised["route"] == "labels"
    assert f"{found.vocabulary_shared:.0%}" in found.advised["why"]


def test_the_same_weights_with_another_tokenizer(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "other")
    make_bpe(tmp_path / "other")
    found = probe.probe(adapter, base, tmp_path / "other", CPU)
    assert possible(found) == {"warm-copy", "warm-map", "labels"} and found.advised["route"] == "labels"
    assert '"copy"' in found.advised["why"] and "tokenizers differ" in found.routes["copy"].why


def test_some_shapes_differ(base: Path, tmp_path: Path) -> None:
    """Keys and values are narrower in the target: only the queries are compared."""
    adapter = make_adapter(tmp_path / "ant", base, "q_proj", "v_proj")
    target = make_base(tmp_path / "narrow", num_key_value_heads=1)
    found = probe.probe(adapter, base, target, CPU)
    assert found.same_shape == 3 and "copy" not in possible(found)
    ours, theirs = (load_file(path / FILE)[f"{tiny.Q0}.weight"].flatten() for path in (base, target))
    assert found.weights[0] == pytest.approx(
        float(torch.corrcoef(torch.stack([ours, theirs]))[0, 1]), abs=2e-3
    )


def test_a_kind_that_the_target_lacks(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "ant", base, "q_proj", "lm_head")
    found = probe.probe(adapter, base, make_base(tmp_path / "other", hidden_size=48), CPU)
    assert found.routes["warm-map"] == Route(False, "the target has nothing for lm_head")
    assert set(found.weights) == {0, 1, 2}


# --- the adapter and the files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (
            {"hidden_size": 48},
            r"model\.layers\.0\.self_attn\.k_proj: is 24 x 48, the source base has 16 x 32",
        ),
        ({"num_hidden_layers": 5}, r"model\.layers\.3\.self_attn\.k_proj: is not in the source base"),
    ],
)
def test_adapter_of_another_base(base: Path, tmp_path: Path, changes: dict[str, Any], what: str) -> None:
    stranger = make_adapter(tmp_path / "bee", make_base(tmp_path / "own", **changes), "q_proj", "k_proj")
    with pytest.raises(InputError, match=rf"bee: {what} \(name the base that it was trained on"):
        probe.probe(stranger, base, base, CPU)


def sharded(base: Path, directory: Path) -> Path:
    shutil.copytree(base, directory, ignore=shutil.ignore_patterns(FILE))
    LlamaForCausalLM.from_pretrained(base).save_pretrained(directory, max_shard_size="30KB")
    # A file that the index does not name is none of the model's.
    save_file({f"{tiny.Q0}.weight": torch.zeros(32, 32)}, directory / "z.safetensors")
    assert len([*directory.glob("model-*")]) > 2
    return directory


def stripped(base: Path, directory: Path) -> Path:
    return edit_weights(base, directory, lambda w: {name.removeprefix("model."): t for name, t in w.items()})


def nested(base: Path, directory: Path) -> Path:
    def edit(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        vision = {f"vision.{name}": torch.zeros(5, 7) for name in weights}
        return vision | {f"language_{name}": t for name, t in weights.items()}

    return edit_weights(base, directory, edit)


@pytest.mark.parametrize("store", [sharded, stripped, nested])
def test_weights_are_found_however_they_are_stored(
    base: Path, adapter: Adapter, tmp_path: Path, store: Callable[[Path, Path], Path]
) -> None:
    shapes = {name: match.shape for name, match in probe.probe(adapter, base, base, CPU).modules.items()}
    target = store(train_on(base, tmp_path / "next", 3), tmp_path / "stored")
    wanted = probe._cosines(shapes, base, tmp_path / "next")
    assert len(wanted) == 9 and 0.9 < min(wanted.values()) < 0.99999
    assert probe._cosines(shapes, base, target) == wanted


def twice(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{tower}_{name}": t.clone() for name, t in weights.items() for tower in ("vision", "language")}


def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"x{i}": t for i, t in enumerate(weights.values())}


@pytest.mark.parametrize("edit", [twice, renamed])
def test_weights_that_cannot_be_told_are_no_similarity(
    base: Path, tmp_path: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    assert probe._cosines({tiny.Q0: (32, 32)}, base, edit_weights(base, tmp_path / "other", edit)) == {}


def test_tied_head_is_the_embedding(tmp_path: Path) -> None:
    base = make_base(tmp_path / "tied", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(base / FILE)
    found = probe.probe(make_adapter(tmp_path / "ant", base, "lm_head"), base, base, CPU)
    assert found.advised["route"] == "copy" and found.weights == {}


@pytest.mark.parametrize("name", [FILE, probe.INDEX])
def test_damaged_weights(base: Path, adapter: Adapter, tmp_path: Path, name: str) -> None:
    shutil.copytree(base, tmp_path / "bad")
    (tmp_path / "bad" / name).write_bytes(b'{"weight_map": 3}')
    with pytest.raises(InputError, match="bad: its weights cannot be read"):
        probe.probe(adapter, base, tmp_path / "bad", CPU)


def test_config_that_cannot_be_used(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "bad")
    (tmp_path / "bad" / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(InputError, match=r"bad: its config\.json cannot be used"):
        probe.probe(adapter, base, tmp_path / "bad", CPU)


def test_bases_are_never_in_memory_together(
    base: Path, adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[torch.nn.Module]] = []
    load = bases.load

    def watched(*arguments: Any) -> Any:
        assert all(model() is None for model in loaded)
        model = load(*arguments)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(bases, "load", watched)
    gc.disable()  # it must not take a collection
    try:
        probe.probe(adapter, base, make_base(tmp_path / "other", seed=1), CPU)
    finally:
        gc.enable()
    assert len(loaded) == 2


# --- tokenizers -------------------------------------------------------------------------------------------------------


def drop_merge(found: dict[str, Any]) -> None:
    found["model"]["merges"].pop()


def drop_unseen(found: dict[str, Any]) -> None:
    """No plain text has qz: only the token itself shows that it is not made any more."""
    merges = found["model"]["merges"]
    kept = [pair for pair in merges if "qz" not in "".join(pair)]
    assert len(kept) < len(merges)
    merges[:] = kept


def rename(found: dict[str, Any]) -> None:
    vocabulary = found["model"]["vocab"]
    vocabulary["¬"], vocabulary["®"] = vocabulary["®"], vocabulary["¬"]


def test_tokenizers_that_are_equal(tmp_path: Path) -> None:
    make_bpe(tmp_path / "one")
    make_bpe(tmp_path / "chat", eos_token="</s>", pad_token="</s>", chat_template="{{ messages }}")
    assert probe.tokenizers(tmp_path / "one", tmp_path / "chat") == (True, 1)


@pytest.mark.parametrize("edit", [drop_merge, drop_unseen, rename])
def test_tokenizers_of_the_same_size_that_differ(
    tmp_path: Path, edit: Callable[[dict[str, Any]], None]
) -> None:
    make_bpe(tmp_path / "one")
    make_bpe(tmp_path / "other", edit)
    equal, shared = probe.tokenizers(tmp_path / "one", tmp_path / "other")
    assert not equal and shared == 1


def test_special_tokens_count(tmp_path: Path) -> None:
    make_bpe(tmp_path / "one")
    make_bpe(tmp_path / "other", eos_token="<end>")
    assert not probe.tokenizers(tmp_path / "one", tmp_path / "other")[0]


def test_vocabulary_shared_is_of_texts(tmp_path: Path) -> None:
    """A space is a letter of its own in each family; the texts are the same."""
    for name, unit in (("bytes", pre_tokenizers.ByteLevel(add_prefix_space=False)), ("marks", None)):
        words = [" the", " cat", "s"] if unit is None else [" the", " cat", "dog", "ps"]
        unit = unit or pre_tokenizers.Metaspace(prepend_scheme="never")
        decoder = decoders.ByteLevel() if name == "bytes" else decoders.Metaspace(prepend_scheme="never")
        sign = "Ġ" if name == "bytes" else "▁"
        vocabulary = {word.replace(" ", sign): i for i, word in enumerate(words)}
        tokenizer = Tokenizer(models.WordLevel(vocabulary | {"<unk>": 9}, unk_token="<unk>"))
        tokenizer.pre_tokenizer, tokenizer.decoder = unit, decoder
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(
            tmp_path / name
        )
    equal, shared = probe.tokenizers(tmp_path / "bytes", tmp_path / "marks")
    assert not equal and shared == pytest.approx(3 / 4)  # the, cat, <unk> of four
    assert probe.tokenizers(tmp_path / "marks", tmp_path / "bytes")[1] == pytest.approx(3 / 5)
