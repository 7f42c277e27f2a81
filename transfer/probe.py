"""Which ways from one base to another there are: `lorazip transfer probe`.

What is compared: shapes of the adapted modules; the tokenizers; weights, module by module, by their cosine; and what
both bases compute on plain texts, by linear centred kernel alignment (CKA, Kornblith et al. 2019) with the unbiased
estimator of HSIC (Song et al. 2012), which does not reward the mere number of dimensions.

Unlike the paper we give every state length 1 first. The next block reads it through a norm anyway, and a few very long
states would outweigh all others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from lorazip import base as bases
from lorazip.errors import Defect, InputError
from lorazip.eval.backend import HasFactors
from lorazip.generic import PROMPTS
from lorazip.header import FormatError, parse_json
from lorazip.mapped import Mapped
from lorazip.transfer import activations
from lorazip.transfer.activations import Shapes, at_depth, layer_of

COPY = 0.9  # mean cosine of weights: a base that was trained on stays near 1, of two runs it is about 0
SHOWN = 0.4  # mean CKA: untrained models have at most 0.3 with trained ones, SmolLM2-135M has 0.56 with Gemma 3 270M
INDEX = "model.safetensors.index.json"
_WITHIN = re.compile(r"[^.]+\.\d+\..*")  # layers.0.self_attn.q_proj


@dataclass(frozen=True)
class Route:
    """A way to the target, and whether it is open."""

    possible: bool
    why: str


@dataclass(frozen=True)
class Match:
    """A module of the adapter: its shape (out, in), and that of the target's module of this name, if there is one."""

    shape: tuple[int, int]
    target: tuple[int, int] | None


@dataclass(frozen=True)
class Pair:
    """Two layers at the same relative depth, and the CKA of the states after them."""

    source: int
    target: int
    cka: float


@dataclass(frozen=True)
class Probe:
    """What was found.

    Attributes:
        modules: of the adapter.
        same_shape: how many of them the target has under the same name and in the same shape.
        tokenizers_equal: same vocabulary, and every text has the same tokens.
        vocabulary_shared: share of the target's tokens whose text is a token of the source too.
        weights: layer -> mean cosine of the adapted modules' weights; None where shapes differ.
        layers: every layer of the source with its counterpart.
        places: tokens that `layers` rests on.
        routes: copy, warm-copy, warm-map, logits, labels.
        advised: the name of one, and why.
    """

    modules: dict[str, Match]
    same_shape: int
    tokenizers_equal: bool
    vocabulary_shared: float
    weights: dict[int, float | None]
    layers: list[Pair]
    places: int
    routes: dict[str, Route]
    advised: dict[str, str]

    def document(self) -> dict[str, Any]:
        """JSON values."""
        found: dict[str, Any] = json.loads(
            json.dumps(asdict(self))
        )  # tuples are lists, layers are strings there
        return found


def probe(adapter: HasFactors, source: Path, target: Path, device: torch.device) -> Probe:
    """Compare two bases for one adapter; `device` computes activations, of one base at a time.

    Raises:
        InputError: the adapter does not belong to the source base; or a base cannot be read.
    """
    ours, theirs = shapes(source), shapes(target)
    modules = {name: Match(shape, theirs.get(name)) for name, shape in _own(adapter, ours).items()}
    same = [name for name, match in modules.items() if match.shape == match.target]
    equal, shared = tokenizers(source, target)
    cosines = _cosines({name: modules[name].shape for name in same}, source, target)
    cosine = fmean(cosines.values()) if cosines else None
    layers, places = _layers(source, target, device)
    near = fmean(pair.cka for pair in layers)
    lost = activations.unmatched(modules, activations.counterparts(modules, ours, theirs))
    routes = _routes(modules, lost, cosine, equal, near)
    return Probe(
        modules,
        len(same),
        equal,
        round(shared, 4),
        _by_layer(modules, cosines),
        layers,
        places,
        routes,
        _advised(routes, cosine, near, shared),
    )


def _own(adapter: HasFactors, source: Shapes) -> Shapes:
    """The adapter's modules, all of which are in its base."""
    found = {}
    for name in adapter.modules:
        factor = adapter.low_rank(name)
        found[name] = shape = factor.B.shape[0], factor.A.shape[1]
        there = source.get(name)
        if there != shape:
            problem = "is not in the source base"
            if there is not None:
                problem = f"is {shape[0]} x {shape[1]}, the source base has {there[0]} x {there[1]}"
            remedy = "name the base that it was trained on: source.base"
            raise InputError([Defect(adapter.name, name, "", problem, remedy)])
    return found


def shapes(base: Path) -> Shapes:
    """Every linear layer of a base -> (out, in); no weight is read.

    Raises:
        InputError: its config cannot be used.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)  # type: ignore[no-untyped-call]
    except Exception as error:  # what a broken config makes the library raise is not listed anywhere
        problem = f"its config.json cannot be used: {error}"
        raise InputError([Defect(str(base), problem=problem, remedy="save it again")]) from error
    linear = ((name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear))
    return {name: (m.out_features, m.in_features) for name, m in linear}


def tokenizers(source: Path, target: Path) -> tuple[bool, float]:
    """Whether both make the same tokens; and the share of the target's tokens whose text is one of the source's too.

    Equal are those with one vocabulary that cut the plain texts, and the text of every single token, alike; the latter
    needs all merges. Which token ends a text is of no account: a chat model often differs there from its base.
    """
    one, other = bases.load_tokenizer(source), bases.load_tokenizer(target)
    # Decoded, for families write the same space in different letters. Parts of characters have no text.
    ours, theirs = (
        tokenizer.batch_decode([[i] for i in sorted(tokenizer.get_vocab().values())])
        for tokenizer in (one, other)
    )
    texts = [*PROMPTS, *theirs]
    equal = one.get_vocab() == other.get_vocab() and one(texts)["input_ids"] == other(texts)["input_ids"]
    known = {text for text in theirs if "\ufffd" not in text}
    return equal, len(known & set(ours)) / max(len(known), 1)


def _cosines(modules: Shapes, source: Path, target: Path) -> dict[str, float]:
    """Module -> cosine of both bases' weights, one pair in memory at a time; without those that files do not name."""
    first, second = _Weights(source), _Weights(target)
    found = {}
    for name, shape in modules.items():
        a, b = first.get(name, shape), second.get(name, shape)
        if a is not None and b is not None:
            found[name] = float(torch.nn.functional.cosine_similarity(a, b, dim=0))
    return found


class _Weights:
    """The weights of a base, in one file or several."""

    def __init__(self, base: Path):
        self._base = base
        try:
            index = base / INDEX
            named = set(parse_json(index.read_bytes())["weight_map"].values()) if index.is_file() else set()
            files = [base / Path(name).name for name in named] or sorted(base.glob("*.safetensors"))
            self._files = {key: file for file in map(Mapped, files) for key in file.header.tensors}
        except (FormatError, OSError, KeyError, TypeError, AttributeError) as error:
            raise self._damaged(error) from error

    def get(self, name: str, shape: tuple[int, int]) -> Tensor | None:
        """The weight of a linear layer, flat and float32; None where no tensor, or more than one, could be it.

        Some files leave the first part of a name out, some have one more. A head that is missing is the embedding.
        """
        within = _WITHIN.search(name)
        for end in (f"{name}.weight", f"{within[0]}.weight" if within else "embed_tokens.weight"):
            found = [
                key for key in self._files if f".{key}".endswith(f".{end}") and self._shape(key) == shape
            ]
            if len(found) == 1:
                try:
                    return self._files[found[0]].tensor(found[0]).flatten().float()
                except FormatError as error:
                    raise self._damaged(error) from error
        return None

    def _shape(self, key: str) -> tuple[int, ...]:
        return self._files[key].header.tensors[key].shape

    def _damaged(self, error: Exception) -> InputError:
        problem = f"its weights cannot be read: {error}"
        return InputError([Defect(str(self._base), problem=problem, remedy="copy or download it again")])


def _by_layer(modules: Mapping[str, Match], cosines: Mapping[str, float]) -> dict[int, float | None]:
    found: dict[int, list[float]] = {}
    for name in modules:
        layer = layer_of(name)
        if layer is not None:
            found.setdefault(layer, []).extend([cosines[name]] if name in cosines else [])
    return {layer: round(fmean(some), 4) if some else None for layer, some in sorted(found.items())}


@lru_cache(maxsize=1)  # a job probes many adapters of the same two bases
def _layers(source: Path, target: Path, device: torch.device) -> tuple[list[Pair], int]:
    places = activations.aligned(source, target, PROMPTS)
    first = activations.collect(source, PROMPTS, places[0], device).states
    second = activations.collect(target, PROMPTS, places[1], device).states
    pairs = [(layer, at_depth(layer, len(first), len(second))) for layer in range(len(first))]
    found = [Pair(i, k, round(cka(_unit(first[i]), _unit(second[k])), 4)) for i, k in pairs]
    return found, len(first[0])


def _unit(states: Tensor) -> Tensor:
    return torch.nn.functional.normalize(states, dim=1)


def cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of two sets of activations of the same n places: 1 for equal geometry, about 0 for none.

    Args:
        x: (n, p); y: (n, q); n > 3.
    """
    k, m = _hollow(x.double()), _hollow(y.double())
    cross, own, other = _hsic(k, m), _hsic(k, k), _hsic(m, m)
    return cross / (own * other) ** 0.5 if own > 0 and other > 0 else 0.0


def _hollow(x: Tensor) -> Tensor:
    """The Gram matrix of the rows, its diagonal zero. The estimator centres it by itself."""
    return (x @ x.T).fill_diagonal_(0)


def _hsic(k: Tensor, m: Tensor) -> float:
    """Song et al. 2012, eq. 5: (n, n) and (n, n), diagonals zero."""
    n = len(k)
    whole = (
        (k * m).sum() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k.sum(0) * m.sum(0)).sum()
    )
    return float(whole / (n * (n - 3)))


def _routes(
    modules: Mapping[str, Match], lost: Sequence[str], cosine: float | None, equal: bool, near: float
) -> dict[str, Route]:
    """Lost are kinds of modules without a counterpart; cosine and near are means over modules and over layers."""
    same = sum(match.shape == match.target for match in modules.values())
    fits = same == len(modules)
    shape = f"{same} of {len(modules)} modules have the target's names and shapes"
    tokens = "the tokenizers are equal" if equal else "the tokenizers differ"
    copy = shape
    if fits and cosine is None:
        copy = f"{shape}, but their weights are not found in the files"
    elif fits:
        copy = f"{shape}, {tokens}, the mean cosine of the weights is {cosine:.2f} (at least {COPY} is asked)"
    return {
        "copy": Route(fits and equal and (cosine or 0) >= COPY, copy),
        "warm-copy": Route(fits, shape),
        "warm-map": Route(
            not lost,
            f"the target has nothing for {', '.join(lost)}"
            if lost
            else f"mean CKA at equal depth {near:.2f}",
        ),
        "logits": Route(equal, tokens),
        "labels": Route(True, "answers are texts, which any model can learn"),
    }


def _advised(routes: Mapping[str, Route], cosine: float | None, near: float, shared: float) -> dict[str, str]:
    alike = cosine or 0
    if routes["copy"].possible:
        why = f"the bases are nearly one (mean cosine of weights {alike:.2f}, CKA {near:.2f}): measure the copy first"
        return {"route": "copy", "why": why}
    if routes["logits"].possible:
        name, why = "logits", f"equal tokenizers: learn the expert's probabilities (CKA {near:.2f})"
    else:
        name = "labels"
        why = f"the tokenizers differ ({shared:.0%} of the target's tokens are the source's): learn answers as texts"
    if routes["warm-copy"].possible and alike >= COPY:
        why += f'; a start from the copy (train.warm = "copy") may save epochs (mean cosine {alike:.2f})'
    elif routes["warm-map"].possible and near >= SHOWN:
        why += f'; a start from mapped factors (train.warm = "map") may save epochs (CKA {near:.2f})'
    return {"route": name, "why": why}
