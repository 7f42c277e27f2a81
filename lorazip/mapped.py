"""A safetensors file in memory-mapped form: the header checked, the tensors views of the map."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lorazip.header import DTYPE_BYTES, Header, read_header
from lorazip.peft_format import TORCH_DTYPE


class Mapped:
    """An open safetensors file. The map is private and holds no file descriptor.

    Attributes:
        header: its checked header.
    """

    def __init__(self, path: Path):
        """Raises FormatError when the file is not valid, OSError when it cannot be read."""
        self.header: Header = read_header(path)
        self._map = torch.from_file(str(path), shared=False, size=self.header.size, dtype=torch.uint8)

    def tensor(self, key: str) -> Tensor:
        """A tensor of the file, in its stored type; a copy only where its data are not aligned."""
        info, begin = self.header.tensors[key], self.header.begin[key]
        data = self._map[begin : begin + info.nbytes]
        if begin % DTYPE_BYTES[info.dtype]:
            data = data.clone()
        return data.view(TORCH_DTYPE[info.dtype]).view(info.shape)
