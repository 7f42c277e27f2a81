"""What two bases compute, place by place: against texts decoded again, and against the model's own layers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from lorazip import base as bases
from lorazip.base import load_tokenizer
from lorazip.errors import InputError
from lorazip.generic import PROMPTS
from lorazip.transfer import activations
from lorazip.transfer.activations import at_depth, counterparts, layer_of, unmatched

CPU = torch.device("cpu")
TEXTS = (*PROMPTS[:12], "Das naïve Café am Fluß kostet 12 €, sagt 小林さん 😀😀 heute.")


def byte_level(directory: Path, size: int = 400) -> Path:
    """Trained as GPT-2's and Llama 3's are: characters may be several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*TEXTS, "😀" * 9], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(directory)
    return directory


def pieces(directory: Path, size: int = 300) -> Path:
    """Trained as Gemma's and T5's are: pieces with a mark for the space, and a token that begins every text."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    special = ["<s>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(directory)
    return directory


def prefixes(directory: Path, text: str) -> dict[int, str]:
    """Place -> the text up to its end, decoded; without the first place, and those in the middle of a character."""
    tokenizer = load_tokenizer(directory)
    ids = tokenizer(text)["input_ids"]
    found = {i: tokenizer.decode(ids[: i + 1], skip_special_tokens=True) for i in range(1, len(ids))}
    return {
        i: one for i, one in found.items() if "\ufffd" not in one and ids[i] not in tokenizer.all_special_ids
    }


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return byte_level(root / "bytes"), pieces(root / "pieces")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_base(tmp_path_factory.mktemp("base") / "base")


# --- places -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 0)])
def test_texts_before_aligned_places_are_equal_and_none_is_missed(
    both: tuple[Path, Path], order: tuple[int, int]
) -> None:
    sides = [both[i] for i in order]
    found = activations.aligned(*sides, TEXTS)
    for i, text in enumerate(TEXTS):
        known = [prefixes(side, text) for side in sides]
        texts = [
            [one[place] for place in side[i] if place in one] for one, side in zip(known, found, strict=True)
        ]
        assert texts[0] == texts[1]
        assert len(texts[0]) == len(found[0][i]) == len(found[1][i])  # every place is one of a whole text
        assert set(texts[0]) == set(known[0].values()) & set(known[1].values())
    assert sum(map(len, found[0])) > 100


def test_last_of_a_characters_tokens_is_taken(both: tuple[Path, Path]) -> None:
    texts = ["ab小c" * 40]
    (places,), _ = activations.aligned(both[0], both[0], texts)
    tokens = load_tokenizer(both[0])(texts[0])["input_ids"]
    assert len(tokens) > len(places) + 1  # 小 is several tokens
    assert [*places] == list(prefixes(both[0], texts[0]))


def test_token_that_shares_a_character_with_the_next_ends_nowhere(tmp_path: Path) -> None:
    """The bytes of é are C3 A9; here A9 and x are one token, so that no token ends between é and x."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "©x"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("©", "x")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    text = "aéxb" * 40
    assert load_tokenizer(tmp_path).tokenize("aéxb") == ["a", "Ã", "©x", "b"]
    (places,), _ = activations.aligned(tmp_path, tmp_path, [text])
    assert places == [place for place in range(1, 160) if place % 4 != 1]


def test_places_are_bounded_and_spread(both: tuple[Path, Path]) -> None:
    whole = activations.aligned(*both, TEXTS)
    few = activations.aligned(*both, TEXTS, most=70)
    assert 35 <= sum(map(len, few[0])) <= 70
    assert [bool(some) for some in few[0]] == [bool(some) for some in whole[0]]
    for side in (0, 1):
        assert all(set(some) <= set(all_) for some, all_ in zip(few[side], whole[side], strict=True))


def test_tokenizer_without_offsets(both: tuple[Path, Path], tmp_path: Path) -> None:
    ByT5Tokenizer().save_pretrained(tmp_path / "slow")
    with pytest.raises(InputError, match=r"slow: its tokenizer cannot say where .*tokenizer\.json"):
        activations.aligned(both[0], tmp_path / "slow", TEXTS)


def test_too_few_places(both: tuple[Path, Path]) -> None:
    with pytest.raises(InputError, match=r"do at \d places, at least 64"):
        activations.aligned(both[0], both[0], ["😀😀😀", ""])


# --- states, inputs, outputs ------------------------------------------------------------------------------------------


def test_states_are_those_after_every_layer(base: Path) -> None:
    texts, places = PROMPTS[:3], [[1, 5, 6], [], [2]]
    found = activations.collect(base, texts, places, CPU)
    assert not found.inputs and not found.outputs
    model, tokenizer = bases.load(base, torch.float32, CPU), load_tokenizer(base)
    with torch.no_grad():
        wanted = [
            model(torch.tensor([tokenizer(text)["input_ids"]]), output_hidden_states=True).hidden_states
            for text in texts
        ]
    assert len(found.states) == tiny.LAYERS
    for layer, states in enumerate(found.states, 1):
        rows = [wanted[i][layer][0, place] for i, some in enumerate(places) for place in some]
        torch.testing.assert_close(states, torch.stack(rows))


def test_inputs_and_outputs_are_those_of_the_layers(base: Path) -> None:
    names = [*tiny.MODULES]
    text, rows = PROMPTS[0], [3, 4, 9]
    found = activations.collect(base, [text], [rows], CPU, names)
    assert not found.states and set(found.inputs) == set(found.outputs) == set(names)
    model, tokenizer = bases.load(base, torch.float32, CPU), load_tokenizer(base)
    for name, (out, in_) in tiny.MODULES.items():
        x, y = found.inputs[name], found.outputs[name]
        assert x.shape == (3, in_) and y.shape == (3, out) and x.dtype == y.dtype == torch.float32
        torch.testing.assert_close(y, x @ model.get_submodule(name).weight.detach().T)
    with torch.no_grad():
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        states = model(ids, output_hidden_states=True).hidden_states
        for i in range(tiny.LAYERS):
            read = model.model.layers[i].input_layernorm(states[i])[0, rows]
            torch.testing.assert_close(found.inputs[f"model.layers.{i}.self_attn.v_proj"], read)
    # What is read by three modules is kept once.
    q, k, o = (found.inputs[f"model.layers.0.self_attn.{kind}"] for kind in ("q_proj", "k_proj", "o_proj"))
    assert q is k and q is not o


def test_module_that_is_not_there(base: Path) -> None:
    with pytest.raises(InputError, match=r"base: model\.layers\.9\.mlp\.up_proj: is not in the base"):
        activations.collect(base, PROMPTS[:1], [[1]], CPU, ["model.layers.9.mlp.up_proj"])


def test_module_that_is_not_run(base: Path) -> None:
    with pytest.raises(InputError, match="lm_head: is not run on every token"):
        activations.collect(base, PROMPTS[:1], [[1]], CPU, ["lm_head"])


@pytest.mark.parametrize(
    ("modules", "where"), [(None, "layer 1"), ([tiny.Q0, "model.layers.1.mlp.up_proj"], "model.layers.1")]
)
def test_nan_is_refused_where_it_begins(
    base: Path, tmp_path: Path, modules: Sequence[str] | None, where: str
) -> None:
    shutil.copytree(base, tmp_path / "bad")
    file = tmp_path / "bad" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.self_attn.o_proj.weight"][3, 3] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"bad: {where}.*: computes NaN"):
        activations.collect(tmp_path / "bad", PROMPTS[:2], [[1, 2], [1]], CPU, modules)


def test_base_that_is_no_model(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "bad")
    config = json.loads((tmp_path / "bad" / "config.json").read_text())
    (tmp_path / "bad" / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))
    with pytest.raises(InputError, match="bad: cannot be loaded as a base model"):
        activations.collect(tmp_path / "bad", PROMPTS[:1], [[1]], CPU)


# --- counterparts -----------------------------------------------------------------------------------------------------


def linears(layers: int, *kinds: str, head: bool = True) -> dict[str, tuple[int, int]]:
    names = [f"model.layers.{i}.{kind}" for i in range(layers) for kind in kinds]
    return dict.fromkeys([*names, "lm_head"] if head else names, (8, 8))


def test_layer_numbers() -> None:
    assert layer_of("model.layers.12.self_attn.q_proj") == 12
    assert layer_of("h.3.attn.c_attn") == layer_of("3.attn.c_attn") == 3
    assert layer_of("model.layers.5.mlp.experts.7.up_proj") == 5
    assert layer_of("lm_head") is None


def test_depth_keeps_ends_and_order() -> None:
    for ours, theirs in ((30, 18), (18, 30), (1, 5), (5, 1), (7, 7)):
        found = [at_depth(layer, ours, theirs) for layer in range(ours)]
        assert found == sorted(found) and found[0] == 0
        assert ours == 1 or found[-1] == theirs - 1
    assert at_depth(3, 8, 5) == 2  # 1.7
    assert [at_depth(layer, 7, 7) for layer in range(7)] == [*range(7)]


def test_counterparts_at_the_same_depth_under_the_same_name() -> None:
    source, target = linears(5, "self_attn.q_proj", "mlp.up_proj"), linears(3, "attn.q_proj", "mlp.up_proj")
    adapter = [name for name in source if name != "lm_head"]
    assert counterparts(adapter, source, target) == {
        f"model.layers.{i}.{theirs}": f"model.layers.{2 * i}.{ours}"
        for i in range(3)
        for theirs, ours in (("attn.q_proj", "self_attn.q_proj"), ("mlp.up_proj", "mlp.up_proj"))
    }


def test_name_that_several_have_is_no_counterpart_unless_all_of_it_agrees() -> None:
    source = linears(2, "attn.c_proj", "mlp.c_proj")
    adapter = [name for name in source if name != "lm_head"]
    assert counterparts(adapter, source, source) == {name: name for name in adapter}
    found = counterparts(adapter, source, linears(2, "attention.c_proj"))
    assert found == {} and unmatched(adapter, found) == ["attn.c_proj", "mlp.c_proj"]


def test_unmatched_kinds_are_named() -> None:
    source, target = linears(2, "self_attn.q_proj", "mlp.fc1"), linears(4, "self_attn.q_proj")
    found = counterparts(source, source, target)
    assert set(found) == {f"model.layers.{i}.self_attn.q_proj" for i in range(4)}
    assert unmatched(source, found) == ["lm_head", "mlp.fc1"]
