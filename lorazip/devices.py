"""Which device to compute on."""

from __future__ import annotations

import torch

from lorazip.errors import UsageError


def find_device(name: str) -> torch.device:
    """The device of this name; auto is CUDA where there is any.

    Raises:
        UsageError: it is not known, or not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device {name!r} is not known (auto, cpu or cuda)") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device must be auto, cpu or cuda, not {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("device cuda: this torch sees no CUDA device (use --device cpu)")
    return device
