"""The meaning of PEFT's adapter_config.json: rank and scale of each module, and what is refused.

Behaviour follows PEFT 0.21 (tuners/lora/config.py, tuners/lora/layer.py, utils/other.py:get_pattern_key) and
is compared with it in the tests. PEFT compiles the keys of rank_pattern and alpha_pattern as regular
expressions; a config is untrusted input, so here only literal names are understood and nothing is ever
compiled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CONFIG_FILE = "adapter_config.json"
MAX_CONFIG = 2**20  # bytes; real configs have one to a hundred kB

MAX_RANK = 4096
SCALE_RANGE = (1e-6, 1e6)

# Fields that change what PEFT computes with the factors; not empty means refused.
_OTHER_FORWARD = {
    "alora_invocation_tokens": "aLoRA applies the adapter to a part of the tokens only",
    "arrow_config": "Arrow routes between several adapters",
    "kasa_config": "KaSA changes the base weights and scales the factors by a diagonal",
    "monteclora_config": "MonteCLoRA adds sampled noise to the factors",
    "target_parameters": "factors of bare parameters (mixture of experts) are stacked per expert",
    "use_bdlora": "BD-LoRA factors are block-diagonal",
    "use_qalora": "QA-LoRA pools the inputs before the factors",
    "velora_config": "VeLoRA stores projections beside the factors",
}
# Fields that match the naming of such variants but leave the forward pass alone, or are handled here.
_HARMLESS = frozenset({
    "use_rslora", "use_dora", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_config",
    "runtime_config",
})  # fmt: skip
# Initialisations that leave the base weights as they were, so that D = scale B A is the whole effect.
_BASE_UNTOUCHED = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_BOOLEANS = ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out")


def parse_pattern(key: str) -> tuple[str, bool] | None:
    r"""Understand a key of rank_pattern or alpha_pattern without a regular expression.

    PEFT matches `(.*\.)?(key)$` against the module name: for a key of plain characters the name is the key,
    or ends with a dot and the key. Letters, digits, `_`, `-`, `.`, escaped punctuation, `^` in front and `$`
    at the end are understood. An unescaped dot is a dot here and any character in PEFT; module names that
    differ only there do not occur together in practice.

    Returns:
        The name and whether it is the whole name (`^`), or None if the key needs a regular expression.
    """
    body = key.removeprefix("^")
    whole = body != key
    if body.endswith("$") and not body.endswith("\\$"):
        body = body[:-1]
    chars: list[str] = []
    escaped = False
    for c in body:
        if escaped:
            if c.isalnum() or c == "_":  # \d, \w, \b ... are classes, not characters
                return None
            chars.append(c)
            escaped = False
        elif c == "\\":
            escaped = True
        elif c.isalnum() or c in "_-.":
            chars.append(c)
        else:
            return None
    return ("".join(chars), whole) if chars and not escaped else None


class PatternTable:
    """rank_pattern or alpha_pattern: the first key that matches a module wins, as in PEFT's get_pattern_key.

    Looked up by the dotted endings of the module name, so that thousands of keys cost nothing.
    """

    def __init__(self, table: Mapping[str, Any] | None):
        self._values: dict[tuple[str, bool], tuple[int, Any]] = {}
        for position, (key, value) in enumerate((table or {}).items()):
            parsed = parse_pattern(key)
            if parsed is not None:
                self._values.setdefault(parsed, (position, value))

    def get(self, module: str, default: Any) -> Any:
        """The value for a module, or the default if no key matches."""
        if not self._values:
            return default
        found = [self._values.get((module, True))]
        found += [self._values.get((ending, False)) for ending in endings(module)]
        return min((hit for hit in found if hit is not None), key=lambda hit: hit[0], default=(0, default))[1]


def endings(module: str) -> list[str]:
    """The dotted endings of a module name, shortest first: "a.b.c" gives "c", "b.c", "a.b.c"."""
    parts = module.split(".")
    return [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]


@dataclass(frozen=True)
class ConfigProblem:
    """A field of the config that cannot be used: what is wrong with it, and the way out."""

    problem: str
    remedy: str


class ScaleRule:
    """Rank and alpha of every module, as PEFT derives them from a config that `problems` found nothing in."""

    def __init__(self, config: Mapping[str, Any]):
        self._rslora = bool(config.get("use_rslora"))
        self._rank = config["r"]
        self._alpha = config["lora_alpha"]
        self._ranks = PatternTable(config.get("rank_pattern"))
        self._alphas = PatternTable(config.get("alpha_pattern"))

    def rank(self, module: str) -> int:
        """The rank that PEFT gives the module."""
        return int(self._ranks.get(module, self._rank))

    def scale(self, module: str) -> float:
        """The factor s of D = s B A: alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732)."""
        rank, alpha = self.rank(module), self._alphas.get(module, self._alpha)
        return float(alpha / (math.sqrt(rank) if self._rslora else rank))

    def scale_problem(self, module: str) -> ConfigProblem | None:
        """What is wrong with the scale of the module: far outside of what training uses, or None."""
        low, high = SCALE_RANGE
        scale = self.scale(module)
        if low <= scale <= high:
            return None
        return ConfigProblem(
            f"alpha and rank give the scale {scale:g}, outside {low:g} to {high:g}",
            f"correct it in {CONFIG_FILE}",
        )


def problems(config: Mapping[str, Any]) -> list[ConfigProblem]:
    """Everything in a config that cannot be represented as D = scale B A plus tensors carried as they are.

    Args:
        config: the parsed adapter_config.json.
    Returns:
        One entry a problem, in a fixed order; empty if the config can be used.
    """
    found: list[ConfigProblem] = []
    kind = config.get("peft_type")
    if kind != "LORA":
        return [
            ConfigProblem(
                f"peft_type is {_short(kind)}, not 'LORA'", "only LoRA adapters can be read; leave it out"
            )
        ]
    found += _variant_problems(config)
    found += [
        ConfigProblem(
            f"{field} is {_short(config[field])}, not true or false", f"write true or false in {CONFIG_FILE}"
        )
        for field in _BOOLEANS
        if not isinstance(config.get(field), bool | None)
    ]
    if config.get("bias") not in (None, "none", "all", "lora_only"):
        found.append(
            ConfigProblem(f"bias is {_short(config['bias'])}", "PEFT knows 'none', 'all' and 'lora_only'")
        )
    found += _list_problems(config)
    return found + _number_problems(config)


def _variant_problems(config: Mapping[str, Any]) -> list[ConfigProblem]:
    found = []
    for field, value in config.items():
        if not value or field in _HARMLESS:
            continue
        if field in _OTHER_FORWARD:
            found.append(ConfigProblem(f"{field} is set: {_OTHER_FORWARD[field]}", "leave this adapter out"))
        elif field.startswith("use_") or field.endswith("_config"):
            # PEFT names its variants so; a newer one would be ignored here and give wrong results.
            found.append(
                ConfigProblem(
                    f"{_short(field)} is set and not known to this version", "leave this adapter out"
                )
            )
    init = config.get("init_lora_weights", True)
    known = init.lower() if isinstance(init, str) else init
    if not any(known is value or (isinstance(value, str) and known == value) for value in _BASE_UNTOUCHED):
        found.append(
            ConfigProblem(
                f"init_lora_weights is {_short(init)}: the factors belong to changed base weights",
                "convert with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)",
            )
        )
    return found


def _list_problems(config: Mapping[str, Any]) -> list[ConfigProblem]:
    found = []
    saved = config.get("modules_to_save")
    if not (
        saved is None or (isinstance(saved, list) and all(isinstance(name, str) and name for name in saved))
    ):
        found.append(ConfigProblem("modules_to_save is not a list of names", f"correct it in {CONFIG_FILE}"))
    for field in ("base_model_name_or_path", "revision"):
        if not isinstance(config.get(field), str | None):
            found.append(ConfigProblem(f"{field} is not a string", f"correct it in {CONFIG_FILE}"))
    return found


def _number_problems(config: Mapping[str, Any]) -> list[ConfigProblem]:
    found = []
    if not _is_rank(config.get("r")):
        found.append(_not_a_rank("r", config.get("r")))
    if not _is_alpha(config.get("lora_alpha")):
        found.append(_not_an_alpha("lora_alpha", config.get("lora_alpha")))
    for field, valid, complaint in (
        ("rank_pattern", _is_rank, _not_a_rank),
        ("alpha_pattern", _is_alpha, _not_an_alpha),
    ):
        table = config.get(field)
        if table is None:
            continue
        if not isinstance(table, dict):
            found.append(ConfigProblem(f"{field} is not an object", f"correct it in {CONFIG_FILE}"))
            continue
        for key, value in table.items():
            if parse_pattern(key) is None:
                found.append(
                    ConfigProblem(
                        f"the key {_short(key)} of {field} is a regular expression",
                        "patterns are matched literally: write the module names out",
                    )
                )
            if not valid(value):
                found.append(complaint(f"{field}[{_short(key)}]", value))
    return found


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_RANK


def _is_alpha(value: Any) -> bool:
    # Integers of JSON have no bound; the comparison comes before any conversion to float could overflow.
    return type(value) in (int, float) and 0 < value <= 1e12


def _not_a_rank(field: str, value: Any) -> ConfigProblem:
    return ConfigProblem(
        f"{field} is {_short(value)}, not an integer from 1 to {MAX_RANK}", f"correct it in {CONFIG_FILE}"
    )


def _not_an_alpha(field: str, value: Any) -> ConfigProblem:
    return ConfigProblem(
        f"{field} is {_short(value)}, not a positive number up to 1e12", f"correct it in {CONFIG_FILE}"
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
