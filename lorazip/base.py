"""A base model: where it lies, its tokenizer, how much it takes, and its weights. The user names it, never a config."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorazip.errors import Defect, InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]


def locate(base: str) -> Path:
    """The directory of a base model: the path itself, or the Hub's files in the local cache.

    Raises:
        InputError: there is no such model, or its weights are not safetensors.
    """
    path = Path(base)
    if not path.exists() and base.count("/") == 1 and not base.startswith((".", "/")):
        from huggingface_hub import snapshot_download

        name, _, revision = base.partition("@")
        try:
            path = Path(snapshot_download(name, revision=revision or None, allow_patterns=MODEL_FILES))
        except Exception as error:  # the client lets through what its HTTP library raises
            remedy = "check the name and the network, or download it and give the directory"
            why = str(error).strip().partition("\n")[0]
            raise InputError(
                [Defect(base, problem=f"the Hub does not give it: {why}", remedy=remedy)]
            ) from error
    if not path.exists():
        remedy = "a base model is a directory, or a Hub id (org/name)"
        raise InputError([Defect(base, problem="does not exist", remedy=remedy)])
    if not (path / "config.json").is_file():
        raise InputError(
            [Defect(base, problem="is no base model: it has no config.json", remedy="give its own directory")]
        )
    if not any(path.glob("*.safetensors")):
        problem = "has no safetensors weights; pickles can run code when they are loaded, and are not read"
        raise InputError([Defect(base, problem=problem, remedy="save it with save_pretrained")])
    return path


def load_tokenizer(base: Path) -> PreTrainedTokenizerBase:
    """The base's own tokenizer. Raises InputError."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            base, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # a broken file makes the Rust library raise a bare Exception
        problem = f"its tokenizer cannot be loaded: {error}"
        raise InputError([Defect(str(base), problem=problem, remedy="save it beside the model")]) from error
    return tokenizer


def context_length(base: Path) -> int:
    """Tokens that the model takes. Raises InputError."""
    return _number(base, "max_position_embeddings", 2048)


def vocabulary(base: Path) -> int:
    """Different tokens that the model knows. Raises InputError."""
    return _number(base, "vocab_size", 2**31)


def load(base: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A causal language model from safetensors, without any code of its own.

    Raises:
        InputError: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    with _opening(base):
        model: Any = AutoModelForCausalLM.from_pretrained(
            base, dtype=dtype, use_safetensors=True, trust_remote_code=False, local_files_only=True
        )
        loaded: PreTrainedModel = model.to(device).eval()
    return loaded


def free(device: torch.device) -> None:
    """Give back the memory of a model that nothing refers to any more, to vLLM or another process."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def skeleton(base: Path) -> PreTrainedModel:
    """Its modules with their names and shapes, without weights.

    Raises:
        InputError: it cannot be made.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with _opening(base), torch.device("meta"):
        config = AutoConfig.from_pretrained(base, trust_remote_code=False, local_files_only=True)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, trust_remote_code=False
        )
    return model


@contextmanager
def _opening(base: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except torch.OutOfMemoryError as error:
        problem = f"does not fit: {str(error).partition('. ')[0]}"
        remedy = "free that device, or choose another one or a narrower --dtype"
        raise InputError([Defect(str(base), problem=problem, remedy=remedy)]) from error
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        problem = f"cannot be loaded as a base model: {error}"
        raise InputError([Defect(str(base), problem=problem, remedy="check its files")]) from error


def _number(base: Path, name: str, default: int) -> int:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=False, local_files_only=True)
        return int(getattr(config.get_text_config(), name, None) or default)
    except Exception as error:  # what a broken config makes the library raise is not listed anywhere
        problem = f"its config.json cannot be used: {error}"
        raise InputError([Defect(str(base), problem=problem, remedy="save it again")]) from error
