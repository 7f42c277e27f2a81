"""What a transfer is asked to do: a TOML file of seven tables, or flags that set single keys of it.

Every key has a type, a range and, but for the paths, a default. A key that is not known is refused, with the name that
it may have been meant for: a misspelt option that is silently not used would be another experiment.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lorazip import __version__
from lorazip.errors import UsageError, printable
from lorazip.eval.prompts import TEMPLATE
from lorazip.eval.spec import AUTO, PRIMARY

Filter = Literal["none", "discriminator", "excess", "both"]
Warm = Literal["none", "copy", "map"]
Loss = Literal["labels", "logits"]


@dataclass(frozen=True)
class Source:
    """Where from.

    Attributes:
        base: the base model that the adapter was trained on: a directory or a Hub id.
        adapter: a PEFT directory, a Hub id, or a bundle.
        name: which adapter of the bundle; of a directory, the name that the result gets.
        template, chat: how the adapter was prompted when it was trained; see `lorazip.eval.prompts`.
    """

    base: str = ""
    adapter: str = ""
    name: str = ""
    template: str = TEMPLATE
    chat: bool = False


@dataclass(frozen=True)
class Target:
    """Where to. A template that is not given is the source's.

    Attributes:
        base: the new base model.
        template, chat: how the new adapter will be prompted.
    """

    base: str = ""
    template: str | None = None
    chat: bool | None = None


@dataclass(frozen=True)
class Inputs:
    """What the task is, and where its inputs come from.

    Attributes:
        definition: the instruction that goes before every input, where there is one.
        seeds: file of example inputs (JSON lines with "input", or plain lines); five or more to synthesise from.
        prompts: file of retained inputs, unlabelled; used as they are, equal ones once.
        count: inputs to synthesise, after filtering. 0 with prompts: none.
        generator: who writes new inputs: the `target` base, the `source` base, the source `expert` (base and adapter),
            or another model.
        shots: seeds shown in a prompt.
        temperature, top_p: of sampling.
        rounds: at most so many rounds of synthesis; what they yield is counted.
        seed: of sampling, shuffling and training.
    """

    definition: str = ""
    seeds: str = ""
    prompts: str = ""
    count: int = 250
    generator: str = "target"
    shots: int = 5
    temperature: float = 1.0
    top_p: float = 0.95
    rounds: int = 8
    seed: int = 0


@dataclass(frozen=True)
class Filtering:
    """Which synthetic inputs and which tokens of answers are trained on.

    Attributes:
        kind: `discriminator` judges inputs, `excess` answers, their tokens too; both, or none.
        discriminator: directory of a trained one, for the first.
        keep_samples, keep_tokens: shares that `excess` keeps, the best first (TiTok: one half and 0.7).
    """

    kind: Filter = "none"
    discriminator: str = ""
    keep_samples: float = 0.5
    keep_tokens: float = 0.7


@dataclass(frozen=True)
class Labelling:
    """The teacher's answers.

    Attributes:
        new_tokens: of an answer, at most; one that does not end by then is dropped.
        top_k: also keep so many of the most likely tokens at every position (equal tokenizers), for loss = "logits".
    """

    new_tokens: int = 64
    top_k: int = 32


@dataclass(frozen=True)
class Training:
    """The new adapter, by AdamW without weight decay and with linear decay, as in Trans-LoRA (LoRA, 20 epochs of 8).

    Attributes:
        kind: lora or dora.
        rank, alpha: of the new adapter; 0: the source's largest rank, and twice the rank.
        modules: leaf names, such as q_proj; empty for those of the source adapter that the target has.
        epochs, batch, accumulation: at most so many epochs of batches of `batch` x `accumulation` samples.
        learning_rates: the best of them on held-out samples after `search_epochs` is taken; one is not searched.
        patience: epochs without a better held-out error (batches.py), after which training ends.
        held_out: share of the samples that is not trained on.
        loss: labels (hard), or logits (Kullback-Leibler divergence from the teacher's, equal tokenizers).
        warm: start from nothing, from a copy of the source's factors, or from a map fitted on activations.
        dtype: of the base; auto: float32 on a CPU, bfloat16 on a GPU. The adapter is trained and saved in float32.
    """

    kind: Literal["lora", "dora"] = "lora"
    rank: int = 0
    alpha: int = 0
    modules: tuple[str, ...] = ()
    epochs: int = 10
    batch: int = 8
    accumulation: int = 1
    learning_rates: tuple[float, ...] = (3e-4, 1e-3)
    search_epochs: int = 1
    patience: int = 2
    held_out: float = 0.1
    loss: Loss = "labels"
    warm: Warm = "none"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"


@dataclass(frozen=True)
class Gating:
    """The arms of the evaluation, and when a transfer is refused.

    Attributes:
        tests: labelled task file, as lorazip eval reads it; without one the gate is agreement with the teacher.
        split, limit: which examples, and how many at most.
        shots: solved examples before the question of the target base's second arm.
        metric: of the labelled task: auto, or a name of lorazip eval --metric.
        oracle: train an oracle on the labelled task's train split, too, as the ceiling.
    """

    tests: str = ""
    split: str = "test"
    limit: int = 200
    shots: int = 5
    metric: str = "auto"
    oracle: bool = False


@dataclass(frozen=True)
class Recipe:
    """All of it."""

    source: Source = field(default_factory=Source)
    target: Target = field(default_factory=Target)
    inputs: Inputs = field(default_factory=Inputs)
    filter: Filtering = field(default_factory=Filtering)
    label: Labelling = field(default_factory=Labelling)
    train: Training = field(default_factory=Training)
    gate: Gating = field(default_factory=Gating)

    def document(self) -> dict[str, Any]:
        """As JSON values."""
        found: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return found

    @property
    def prompting(self) -> tuple[tuple[str, bool], tuple[str, bool]]:
        """Template and chat of source and target."""
        source = self.source.template, self.source.chat
        chat = self.source.chat if self.target.chat is None else self.target.chat
        return source, (self.source.template if self.target.template is None else self.target.template, chat)


TEXTS = (("inputs", "definition"),)  # keys whose values no message repeats


def parse(tables: Mapping[str, Any], where: str = "recipe", *, probed: bool = False) -> Recipe:
    """Check all of it, and say all that is wrong at once.

    Args:
        probed: it is only for the stage `probe`, which needs no inputs.
    Raises:
        UsageError: a line for every key that is unknown, of another type, or out of range.
    """
    wrong: list[str] = []
    tables = _counted(tables)
    sections = {f.name: typing.get_type_hints(Recipe)[f.name] for f in dataclasses.fields(Recipe)}
    made = {}
    for name, table in tables.items():
        if name not in sections:
            wrong.append(f"unknown table [{printable(name)}]{_meant(name, sections)}")
        elif not isinstance(table, dict):
            wrong.append(f"{printable(name)} is a table: [{name}]")
        else:
            made[name] = _section(name, sections[name], table, wrong)
    broken = [line.partition(" ")[0] for line in wrong]  # what they depend on is not looked at
    recipe = Recipe(**made)
    wrong += [line for line in _out_of_range(recipe, probed) if not any(key in line for key in broken)]
    if wrong:
        raise UsageError("\n".join(f"{where}: {line}" for line in wrong))
    return recipe


def _counted(tables: Mapping[str, Any]) -> Mapping[str, Any]:
    """Retained prompts alone, and no word of a count: none are written."""
    inputs = tables.get("inputs")
    if (
        isinstance(inputs, dict)
        and inputs.get("prompts")
        and not inputs.get("seeds")
        and "count" not in inputs
    ):
        return {**tables, "inputs": {**inputs, "count": 0}}
    return tables


def _section(name: str, kind: Any, table: Mapping[str, Any], wrong: list[str]) -> Any:
    types_of = typing.get_type_hints(kind)
    values = {}
    for key, value in table.items():
        if key not in types_of:
            wrong.append(f"unknown key {name}.{printable(key)}{_meant(key, types_of)}")
            continue
        try:
            values[key] = _value(types_of[key], value)
        except TypeError as error:
            told = "what it is" if (name, key) in TEXTS else printable(repr(value))
            wrong.append(f"{name}.{key} {error}, not {told}")
    return kind(**values)


def _meant(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    return f" (did you mean {near[0]}?)" if near else f" (there are {', '.join(known)})"


def _value(kind: Any, value: Any) -> Any:
    """The value in the type of its field. Raises TypeError, whose text follows the key's name."""
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise TypeError(f"must be one of {', '.join(typing.get_args(kind))}")
        return value
    if typing.get_origin(kind) is tuple:
        each = typing.get_args(kind)[0]
        if not isinstance(value, list):
            raise TypeError("must be a list")
        return tuple(_value(each, one) for one in value)
    if isinstance(kind, types.UnionType):
        kind = typing.get_args(kind)[0]
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
        raise TypeError(f"must be {names[kind]}")
    return value


def _out_of_range(recipe: Recipe, probed: bool) -> list[str]:
    """What is wrong with values that are of their types."""
    i, f, t, g = recipe.inputs, recipe.filter, recipe.train, recipe.gate
    rules = [
        (
            bool(recipe.source.base),
            "source.base (--source-base) is not given: the model that the adapter was trained on",
        ),
        (bool(recipe.source.adapter), "source.adapter (--adapter) is not given"),
        (bool(recipe.target.base), "target.base (--target-base) is not given: the model to move to"),
        ("{input}" in recipe.source.template, "source.template must hold {input}"),
        ("{input}" in (recipe.target.template or "{input}"), "target.template must hold {input}"),
        (
            bool(i.seeds or i.prompts) or probed,
            "give inputs.seeds (--seeds), inputs.prompts (--prompts) or both: nothing else tells the task",
        ),
        (i.count >= 0, "inputs.count must not be negative"),
        (
            i.count == 0 or bool(i.seeds) or probed,
            "inputs.count asks for synthetic inputs: give inputs.seeds, or count = 0",
        ),
        (i.count > 0 or bool(i.prompts), "inputs.count = 0 needs inputs.prompts"),
        (1 <= i.shots <= 50, "inputs.shots must be from 1 to 50"),
        (0 < i.temperature <= 5, "inputs.temperature must be above 0 and at most 5"),
        (0 < i.top_p <= 1, "inputs.top_p must be above 0 and at most 1"),
        (1 <= i.rounds <= 1000, "inputs.rounds must be from 1 to 1000"),
        (0 <= i.seed < 2**32, "inputs.seed must be from 0 to 4294967295"),
        (
            f.kind not in ("discriminator", "both") or bool(f.discriminator),
            f'filter.kind = "{f.kind}" needs filter.discriminator (see lorazip transfer discriminator)',
        ),
        (0 < f.keep_samples <= 1, "filter.keep_samples must be above 0 and at most 1"),
        (0 < f.keep_tokens <= 1, "filter.keep_tokens must be above 0 and at most 1"),
        (recipe.label.new_tokens >= 1, "label.new_tokens must be at least 1"),
        (1 <= recipe.label.top_k <= 1000, "label.top_k must be from 1 to 1000"),
        (t.rank >= 0 and t.alpha >= 0, "train.rank and train.alpha must not be negative"),
        (t.epochs >= 1, "train.epochs must be at least 1"),
        (t.batch >= 1 and t.accumulation >= 1, "train.batch and train.accumulation must be at least 1"),
        (bool(t.learning_rates), "train.learning_rates must not be empty"),
        (all(0 < lr < 1 for lr in t.learning_rates), "train.learning_rates must lie between 0 and 1"),
        (
            t.search_epochs >= 1 and t.patience >= 1,
            "train.search_epochs and train.patience must be at least 1",
        ),
        (0 < t.held_out <= 0.5, "train.held_out must be above 0 and at most 0.5"),
        (t.kind == "lora" or t.warm == "none", 'train.warm needs train.kind = "lora"'),
        (g.limit >= 1, "gate.limit must be at least 1"),
        (g.metric in (AUTO, *PRIMARY), f"gate.metric must be one of {', '.join((AUTO, *PRIMARY))}"),
        (g.shots >= 0, "gate.shots must not be negative"),
        (not g.oracle or bool(g.tests), "gate.oracle needs gate.tests"),
    ]
    return [text for good, text in rules if not good]


def digest(*parts: Any) -> str:
    """sha256 (hex, 16 digits) of JSON values: the name of what depends on these and on lorazip, and on nothing else."""
    told = [__version__, *parts]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
