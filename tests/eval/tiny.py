"""A tiny world for tests of evaluations: a random Llama with a tokenizer, adapters that change its answers, tasks.

Random models seldom end an answer, so the end token's row of the output layer is made long: about every fifth token
ends. What an adapter writes greedily is taken as the right answer of most of its examples; so the originals score well,
the base does not, and a bad copy shows.
"""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from handmade import MakeAdapter
from torch import nn

from lorazip.adapter import LowRank, open_adapter
from lorazip.eval.backend import Acting, HasFactors, digest

CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " \n"
END = len(CHARACTERS)  # the end token's number
HIDDEN, INNER, KEYS, LAYERS, CONTEXT = 64, 96, 32, 2, 320
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
MODULES = {f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in LINEARS.items()}
ATTENTION = {name: shape for name, shape in MODULES.items() if name.endswith(("q_proj", "v_proj"))}
Q0 = "model.layers.0.self_attn.q_proj"
TEMPLATE = "{input}="


def make_tokenizer(directory: Path) -> None:
    """A token a character, ASCII only, so that every token is a text of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {_visible(character): i for i, character in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(directory)


def _visible(character: str) -> str:
    """How byte-level tokenizers write space and newline."""
    return chr(ord(character) + 256) if character in " \n" else character


def make_base(directory: Path, seed: int = 0) -> Path:
    """Write a random Llama with grouped queries and head size 32, float32, and its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=END + 1,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HIDDEN // 32,
        num_key_value_heads=KEYS // 32,
        max_position_embeddings=CONTEXT,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
        model.lm_head.weight[END].mul_(3)
    model.save_pretrained(directory)
    make_tokenizer(directory)
    return directory


def make_adapters(root: Path, names: Sequence[str]) -> list[Path]:
    """Write adapters of many kinds: ranks, scales, types, modules that some lack; the kinds repeat after six."""
    make = MakeAdapter(root)
    ranks = {module: 2 + i % 5 for i, module in enumerate(MODULES)}
    kinds: list[dict[str, Any]] = [
        {"modules": MODULES, "rank": 4},
        {"modules": ATTENTION, "rank": 8, "alpha": 32},
        {"modules": MODULES, "rank": ranks, "alpha": 6},
        {"modules": MODULES, "rank": 3, "alpha": 3, "use_rslora": True},
        {
            "modules": MODULES,
            "rank": 2,
            "alpha": 4,
            "alpha_pattern": {"q_proj": 8, "layers.1.mlp.up_proj": 1},
        },
        {"modules": MODULES, "rank": 5, "alpha": 12, "dtype": torch.bfloat16},
    ]
    return [make(name, **kinds[i % len(kinds)]) for i, name in enumerate(names)]


def acting(adapter: HasFactors, arm: str = "original", directory: Path | None = None) -> Acting:
    """An adapter as backends see it."""
    return Acting(f"{arm}/{adapter.name}", adapter, directory, digest(adapter))


def opened(directory: Path) -> Acting:
    """A PEFT directory as backends see it."""
    return acting(open_adapter(directory, directory.name), directory=directory)


@dataclass(frozen=True)
class Changed:
    """An adapter with other factors: a sabotaged one."""

    name: str
    config: dict[str, Any]
    factors: Mapping[str, LowRank]

    @property
    def modules(self) -> Mapping[str, object]:
        return self.factors

    @property
    def extras(self) -> Mapping[str, object]:
        return {}

    def low_rank(self, module: str) -> LowRank:
        return self.factors[module]


def copied(adapter: HasFactors, **changes: Any) -> Changed:
    """The same factors, held in memory; `changes` are of its fields."""
    return replace(
        Changed(adapter.name, adapter.config, {m: adapter.low_rank(m) for m in adapter.modules}), **changes
    )


def scaled(adapter: HasFactors, by: float) -> Changed:
    """The same adapter with another scale."""
    factors = {m: adapter.low_rank(m) for m in adapter.modules}
    return copied(adapter, factors={m: replace(f, scale=f.scale * by) for m, f in factors.items()})


def without(adapter: HasFactors, module: str) -> Changed:
    """The same adapter, one module missing."""
    return copied(adapter, factors={m: adapter.low_rank(m) for m in adapter.modules if m != module})


def encode(text: str) -> tuple[int, ...]:
    """Tokens of a text."""
    return tuple(CHARACTERS.index(character) for character in text)


def prompts(n: int, seed: int = 0, longest: int = 24) -> list[tuple[int, ...]]:
    """Random prompts of many lengths."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (n,), generator=random).tolist()
    return [tuple(torch.randint(0, END, (length,), generator=random).tolist()) for length in lengths]


@torch.inference_mode()
def greedy(model: nn.Module, prompt: Sequence[int], limit: int) -> tuple[int, ...]:
    """The most likely tokens, one whole forward pass a token: no cache, no padding, no generate()."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + limit:
        tokens.append(int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        if tokens[-1] == END:
            break
    return tuple(tokens[len(prompt) :])


@torch.inference_mode()
def logprobs(model: nn.Module, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """(answer, vocabulary): what a model gives for every token of an answer, one prompt at a time."""
    logits = model(input_ids=torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1].float().log_softmax(-1)


def peft(base: Path, directory: Path) -> nn.Module:
    """The base with an adapter, as PEFT itself loads it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), directory).eval()


def make_tasks(
    root: Path, base: Path, adapters: Sequence[Path], n: int = 24, right: float = 0.75, seed: int = 0
) -> Path:
    """A task for every adapter, of its name; to this share of the inputs it writes the right answer.

    Lines have the splits train (two) and test; answers are 1 to 8 characters, and end.
    """
    root.mkdir(parents=True, exist_ok=True)
    alphabet = string.ascii_lowercase
    random = torch.Generator().manual_seed(seed)
    for directory in adapters:
        model = peft(base, directory)
        rows: list[dict[str, Any]] = []
        while len(rows) < n + 2:
            letters = torch.randint(0, len(alphabet), (6,), generator=random).tolist()
            text = "".join(alphabet[i] for i in letters)
            written = greedy(model, encode(TEMPLATE.format(input=text)), 9)
            if written[-1] != END or len(written) == 1:
                continue
            answer = "".join(CHARACTERS[i] for i in written[:-1])
            if answer.strip() != answer:
                continue
            wrong = len(rows) - 2 >= right * n
            rows.append({"input": text, "output": answer[::-1] + "?" if wrong else answer})
        for i, row in enumerate(rows):
            row["split"] = "train" if i < 2 else "test"
        (root / f"{directory.name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def json_of(path: Path) -> Any:
    """What a JSON file holds."""
    return json.loads(path.read_text())


def faults(adapter: HasFactors, other: HasFactors) -> dict[str, Changed]:
    """Ways in which a backend can get an adapter wrong; each still looks like an adapter of this model."""
    own = {module: adapter.low_rank(module) for module in adapter.modules}
    flipped = {**own, Q0: replace(own[Q0], scale=-own[Q0].scale)}
    mixed = {m: _mixed(f, other.low_rank(m)) if m in other.modules else f for m, f in own.items()}
    return {
        "zeroed": scaled(adapter, 0.0),
        "swapped": copied(other, name=adapter.name),
        "twice": scaled(adapter, 2.0),
        "half": scaled(adapter, 0.5),
        "a fifth more": scaled(adapter, 1.2),
        "a fifth less": scaled(adapter, 0.8),
        "flipped": scaled(adapter, -1.0),
        "one flipped": copied(adapter, factors=flipped),
        "one missing": without(adapter, Q0),
        "another's core": copied(adapter, factors=mixed),
    }


def _mixed(one: LowRank, other: LowRank) -> LowRank:
    """The left factor of one adapter, the right factor of another: a wrong cluster's basis."""
    rank = min(one.B.shape[1], other.A.shape[0])
    return replace(one, B=one.B[:, :rank].float(), A=other.A[:rank].float())
