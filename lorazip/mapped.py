"""A safetensors file in memory-mapped form: the header checked, the tensors views of the map."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from lorazip.header import FormatError, Header, read_header, stamp_of

# safetensors' names of the types that a file may hold
TORCH_DTYPE: dict[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16, "I16": torch.int16, "F16": torch.float16, "BF16": torch.bfloat16,
    "U32": torch.uint32, "I32": torch.int32, "F32": torch.float32,
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "C64": torch.complex64,
}  # fmt: skip


class Mapped:
    """An open safetensors file. Its map is private, holds no file descriptor, and is made when first needed.

    Attributes:
        path: the file.
        header: its checked header.
    """

    def __init__(self, path: Path, header: Header | None = None):
        """Open a file, whose header may have been read before.

        Raises:
            FormatError: the file is not valid.
            OSError: it cannot be read.
        """
        self.path = path
        self.header = read_header(path) if header is None else header
        self._map: Tensor | None = None

    def tensor(self, key: str) -> Tensor:
        """A tensor in its stored type; a copy only where its data are not aligned. Raises FormatError as `span`."""
        return self.span(key, key).view(self.header.tensors[key].shape)

    def span(self, first: str, last: str) -> Tensor:
        """The values of neighbouring tensors of one type, from the first to the last, flat.

        Raises:
            FormatError: the file changed since its header was read.
        """
        begin, info = self.header.begin[first], self.header.tensors[last]
        data = self._data()[begin : self.header.begin[last] + info.nbytes]
        dtype = TORCH_DTYPE[info.dtype]
        if begin % dtype.itemsize:
            data = data.clone()  # headers of a length that is no multiple of 8 are rare but legal
        return data.view(dtype)

    def close(self) -> None:
        """Forget the map; it is made again when needed. Tensors that were handed out stay valid."""
        self._map = None

    def _data(self) -> Tensor:
        # Reading beyond the end of a map kills the process, so a file that shrank is noticed before.
        try:
            same = stamp_of(os.stat(self.path)) == self.header.stamp
        except OSError:
            same = False
        if not same:
            raise FormatError("the file changed while it was in use")
        if self._map is None:
            try:
                self._map = torch.from_file(
                    str(self.path), shared=False, size=self.header.size, dtype=torch.uint8
                )
            except RuntimeError as error:  # a path that is not UTF-8, a file system without maps
                raise FormatError("cannot be mapped into memory (is its path not UTF-8?)") from error
        return self._map
