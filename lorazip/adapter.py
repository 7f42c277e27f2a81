"""One LoRA adapter on disk: checked when it is opened, its data mapped and read one module at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorazip import peft_config, peft_format, peft_keys
from lorazip.errors import Defect, InputError
from lorazip.header import FormatError, Header, TensorInfo, parse_json, read_header
from lorazip.mapped import Mapped
from lorazip.peft_format import ModuleInfo

__all__ = ["Adapter", "LowRank", "ModuleInfo", "TensorInfo", "open_adapter"]

_CONVERT = "load the adapter in PEFT where you trust it and call save_pretrained, which writes safetensors"
_DAMAGED = "the file is damaged: copy or download it again"


@dataclass(frozen=True)
class LowRank:
    """A matrix D = scale * B @ A that is never formed.

    Attributes:
        B: (out, r).
        A: (r, in).
        scale: alpha / r, or alpha / sqrt(r) for rsLoRA.
    """

    B: Tensor
    A: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.B.ndim != 2 or self.A.ndim != 2 or self.B.shape[1] != self.A.shape[0]:
            raise ValueError(f"factors do not fit: B {tuple(self.B.shape)}, A {tuple(self.A.shape)}")


class Adapter:
    """An opened adapter: header and config checked, data on disk.

    Attributes:
        name: unique name of the adapter.
        directory: where it lies.
        config: adapter_config.json, verbatim.
        modules: module -> sizes and scale, sorted; a module is a dotted name in the base model.
        extras: key in the file -> type and shape of every tensor that is carried as it is, sorted.
        nbytes: bytes of the weights file and the config file.
    """

    def __init__(
        self,
        name: str,
        directory: Path,
        config: dict[str, Any],
        header: Header,
        modules: Mapping[str, ModuleInfo],
        extras: Mapping[str, TensorInfo],
    ):
        self.name = name
        self.directory = directory
        self.config = config
        self.modules = dict(modules)
        self.extras = dict(extras)
        self._file = Mapped(directory / peft_keys.WEIGHTS_FILE, header)
        self.nbytes = header.size + (directory / peft_config.CONFIG_FILE).stat().st_size

    def __repr__(self) -> str:
        return f"Adapter({self.name!r}, {len(self.modules)} modules, {len(self.extras)} extras)"

    def low_rank(self, module: str) -> LowRank:
        """The factors of one module, in their stored types, straight from the mapped file.

        Args:
            module: a key of `modules`.
        Raises:
            InputError: the file changed since it was opened.
        """
        info = self.modules[module]
        prefix = peft_keys.PREFIX + module
        return LowRank(self._tensor(prefix + peft_keys.B), self._tensor(prefix + peft_keys.A), info.scale)

    def extra(self, key: str) -> Tensor:
        """One extra tensor, bit for bit, straight from the mapped file.

        Args:
            key: a key of `extras`.
        Raises:
            InputError: the file changed since it was opened.
        """
        if key not in self.extras:
            raise KeyError(key)
        return self._tensor(key)

    def not_finite(self) -> list[Defect]:
        """Read all factors once and list those with NaN or infinite values.

        Extras that are no LoRA tensors are not judged: they are carried, whatever they hold.
        """
        judged = [
            key for key, info in self._file.header.tensors.items() if ".lora_" in key and _is_float(info)
        ]
        bad = [key for run in self._runs(judged) if not _finite(self._span(run)) for key in run]
        found = [
            Defect(
                self.name,
                peft_keys.module_of(key),
                key,
                "has NaN or infinite values",
                "train or export it again",
            )
            for key in bad
            if not _finite(self._tensor(key))
        ]
        self._file.close()
        return found

    def _runs(self, keys: Sequence[str]) -> Iterator[list[str]]:
        """Group keys, in the order of the data, into runs of one type without a gap, to be read in one pass."""
        run: list[str] = []
        for key in keys:
            if run:
                last, info = self._file.header.tensors[run[-1]], self._file.header.tensors[key]
                if (
                    last.dtype != info.dtype
                    or self._file.header.begin[run[-1]] + last.nbytes != self._file.header.begin[key]
                ):
                    yield run
                    run = []
            run.append(key)
        if run:
            yield run

    def _tensor(self, key: str) -> Tensor:
        return self._span([key]).view(self._file.header.tensors[key].shape)

    def _span(self, run: Sequence[str]) -> Tensor:
        """The values of neighbouring tensors of one type, flat."""
        try:
            return self._file.span(run[0], run[-1])
        except FormatError as error:
            raise InputError(
                [Defect(self.name, "", self._file.path.name, str(error), "run again")]
            ) from error


def open_adapter(directory: Path, name: str) -> Adapter:
    """Read and check config and header of a PEFT adapter; no tensor is read.

    Args:
        directory: a directory with adapter_config.json and adapter_model.safetensors.
        name: the name that the adapter gets.
    Raises:
        InputError: with every defect that was found.
    """
    config, defects = _read_config(directory, name)
    header, more = _read_weights(directory, name)
    defects += more
    if config is not None:
        defects += [
            Defect(name, "", peft_config.CONFIG_FILE, p.problem, p.remedy)
            for p in peft_config.problems(config)
        ]
    if defects or config is None or header is None:
        raise InputError(defects)
    parsed = peft_format.parse(name, header.tensors, config)
    if parsed.defects:
        raise InputError(parsed.defects)
    return Adapter(name, directory, config, header, parsed.modules, parsed.extras)


def _read_config(directory: Path, name: str) -> tuple[dict[str, Any] | None, list[Defect]]:
    file = peft_config.CONFIG_FILE
    try:
        if not (directory / file).exists():
            raise FileNotFoundError
        if not (directory / file).is_file():
            raise FormatError("is not a regular file")
        with (directory / file).open("rb") as stream:
            data = stream.read(peft_config.MAX_CONFIG + 1)
        if len(data) > peft_config.MAX_CONFIG:
            raise FormatError(f"has more than {peft_config.MAX_CONFIG} bytes")
        config = parse_json(data)
        if not isinstance(config, dict):
            raise FormatError("is not a JSON object")
    except FileNotFoundError:
        return None, [Defect(name, "", file, "is missing", "save the adapter with PEFT's save_pretrained")]
    except FormatError as error:
        return None, [Defect(name, "", file, str(error), "write it again with PEFT's save_pretrained")]
    except OSError as error:
        return None, [
            Defect(name, "", file, f"cannot be read: {error.strerror}", "check the file and its rights")
        ]
    return config, []


def _read_weights(directory: Path, name: str) -> tuple[Header | None, list[Defect]]:
    file = peft_keys.WEIGHTS_FILE
    try:
        return read_header(directory / file), []
    except FileNotFoundError:
        pickles = sorted(
            p.name for p in directory.glob("adapter_model*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt")
        )
        if pickles:
            problem = "is a pickle, which can run code when it is loaded; only safetensors is read"
            return None, [Defect(name, "", pickles[0], problem, _CONVERT)]
        return None, [Defect(name, "", file, "is missing", "save the adapter with PEFT's save_pretrained")]
    except FormatError as error:
        module = peft_keys.module_of(error.tensor) if error.tensor else ""
        return None, [Defect(name, module, error.tensor or file, str(error), _DAMAGED)]
    except OSError as error:
        return None, [
            Defect(name, "", file, f"cannot be read: {error.strerror}", "check the file and its rights")
        ]


def _is_float(info: TensorInfo) -> bool:
    return info.dtype in peft_format.FACTOR_DTYPES


def _finite(tensor: Tensor) -> bool:
    """Whether all values are finite; the minimum and maximum carry NaN along and cost one fast pass."""
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))
