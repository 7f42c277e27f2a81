"""The names of the tensors in a PEFT adapter: which is a factor, which is carried, which is refused.

A key is `base_model.model.<module>.lora_A.weight` or a relative of it. Read from PEFT 0.21
(utils/save_and_load.py, tuners/tuners_utils.py, utils/other.py).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
MAX_KEY = 512  # characters; real keys have about a hundred

A, B = ".lora_A.weight", ".lora_B.weight"
EMBEDDING_A, EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"
LORA_BIAS = ".lora_B.bias"
MAGNITUDES = (".lora_magnitude_vector", ".lora_magnitude_vector.weight")
PAIRS = ((A, B), (EMBEDDING_A, EMBEDDING_B))

# Input and output embeddings as transformers names them: PEFT saves their whole weights when they were
# resized.
_EMBEDDINGS = frozenset({
    "embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings", "tok_embeddings",
    "embed_tokens_per_layer", "shared", "output_projection", "decoder",
})  # fmt: skip
# What PEFT adds to modules_to_save by itself, by task_type.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
RESAVE = "load it with PEFT and save it again with save_pretrained"


def split_factor(key: str) -> tuple[str, str] | None:
    """Split the key of a factor of any kind into module and suffix.

    Returns:
        ("m", ".lora_A.weight") for "base_model.model.m.lora_A.weight"; None if the key does not belong to a factor.
    """
    if not _well_formed(key):
        return None
    for suffix in (A, B, EMBEDDING_A, EMBEDDING_B):
        module = key.removeprefix(PREFIX).removesuffix(suffix)
        if key.endswith(suffix) and module and "base_layer" not in module.split("."):
            return module, suffix
    return None


def module_of(key: str) -> str:
    """The module that a key belongs to, as well as it can be told; for messages."""
    path = key.removeprefix(PREFIX)
    for mark in (".lora_", ".token_adapter.", ".base_layer."):
        if mark in path:
            return path.split(mark)[0]
    return path.rpartition(".")[0]


def _well_formed(key: str) -> bool:
    return key.startswith(PREFIX) and len(key) <= MAX_KEY and key.isprintable()


def refusal(
    key: str, config: Mapping[str, Any], adapted: Mapping[str, Collection[str]]
) -> tuple[str, str] | None:
    """Why a tensor that is no factor cannot be carried, with the way out; None if it is carried.

    Args:
        key: its key in the file.
        config: adapter_config.json; `peft_config.problems` found nothing in it.
        adapted: module -> suffixes of its factors, for all modules with factors.
    """
    if len(key) > MAX_KEY or not key.isprintable():
        return f"its name has control characters or more than {MAX_KEY} characters", RESAVE
    if not key.startswith(PREFIX):
        return f"its name does not start with {PREFIX!r}", RESAVE
    path = key.removeprefix(PREFIX)
    if ".lora_" in path:
        return _lora_refusal(path, config, adapted)
    module, _, parameter = path.rpartition(".")
    owner = module.removesuffix(".base_layer")
    if _is_saved_module(path, config):
        return None
    if parameter == "bias" and (
        config.get("bias") == "all" or (config.get("bias") == "lora_only" and owner in adapted)
    ):
        return None
    if ".token_adapter." in path and config.get("trainable_token_indices"):
        return None
    if parameter in ("weight", "bias") and owner.rpartition(".")[2] in _EMBEDDINGS:
        return None
    if owner != module and owner in adapted and EMBEDDING_A in adapted[owner]:
        return None
    return (
        "this tensor is not understood",
        "add its module to modules_to_save if it was trained, else remove it",
    )


def _lora_refusal(
    path: str, config: Mapping[str, Any], adapted: Mapping[str, Collection[str]]
) -> tuple[str, str] | None:
    for suffixes, name, flag in (
        (MAGNITUDES, "magnitude vector", "use_dora"),
        ((LORA_BIAS,), "bias of lora_B", "lora_bias"),
    ):
        if not path.endswith(suffixes):
            continue
        if not config.get(flag):
            return f"is a {name}, but {flag} is not set", f"set {flag} in adapter_config.json, or {RESAVE}"
        if path.split(".lora_")[0] not in adapted:
            return f"is a {name}, but its module has no factors", RESAVE
        return None
    return "this part of a LoRA layer is not understood", f"{RESAVE}, or leave this adapter out"


def _is_saved_module(path: str, config: Mapping[str, Any]) -> bool:
    # PEFT saves every module whose name ends with one of the names, with all its parameters.
    names = {*(config.get("modules_to_save") or ()), *_HEADS.get(str(config.get("task_type")), ())}
    return any(f"{name}." in path for name in names)
