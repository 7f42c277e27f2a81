"""What a compression did: its figures, as the summary, the report and other callers read them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorazip.bundle import Bundle
from lorazip.choices import Choice, choices
from lorazip.compress.assemble import adapter_errors, module_errors, stored
from lorazip.compress.shards import Shard
from lorazip.compress.spec import Spec
from lorazip.sources import Inputs
from lorazip.terms import described


@dataclass(frozen=True)
class Outcome:
    """What a compression did.

    Attributes:
        bundle: the result; None after a dry run.
        spec: resolved options.
        inputs: the adapters that went in, and what was skipped.
        errors: (n, m) err of every adapter and module, NaN where an adapter lacks the module.
        adapter_errors: (n,) err_i over all modules of an adapter.
        fallbacks: (n, m) bool, own factors although the method shares.
        spectra: per module (r_max,) mean share of energy of each singular value.
        modules: their names, the columns above.
        predicted: errors are those that are expected (docs/AUTO.md says how near): a dry run of auto.
        storage: how many modules of adapters are stored in which way, the most frequent first.
        choices: the same by kind of module, and what of the error is where.
        bundle_bytes: every byte of the bundle, whether written or not.
        seconds: wall time of the whole run.
        peak_memory: bytes of anonymous memory.
    """

    bundle: Bundle | None
    spec: Spec
    inputs: Inputs
    errors: Tensor
    adapter_errors: Tensor
    fallbacks: Tensor
    spectra: tuple[Tensor, ...]
    modules: tuple[str, ...]
    predicted: bool
    storage: dict[str, int]
    choices: tuple[Choice, ...]
    bundle_bytes: int
    seconds: float
    peak_memory: int

    @property
    def original_bytes(self) -> int:
        """Bytes of the inputs' weights and configs."""
        return sum(adapter.nbytes for adapter in self.inputs.adapters)

    def summary(self) -> dict[str, object]:
        """The figures of `lorazip compress --json`."""
        return {
            "adapters": len(self.inputs.adapters),
            "modules": len(self.modules),
            "original_bytes": self.original_bytes,
            "bundle_bytes": self.bundle_bytes,
            "ratio": self.original_bytes / self.bundle_bytes,
            "mean_error": float(self.adapter_errors.mean()),
            "max_error": float(self.adapter_errors.max()),
            "fallbacks": int(self.fallbacks.sum()),
            "predicted": self.predicted,
            "storage": self.storage,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory,
            "skipped": [str(defect) for defect in self.inputs.skipped],
            "options": self.spec.recorded(),
        }


def outcome(
    inputs: Inputs,
    spec: Spec,
    encoded: Sequence[Shard],
    bundle: Bundle | None,
    size: int,
    seconds: float,
    peak: int,
) -> Outcome:
    """The figures of finished modules.

    Args:
        bundle: None after a dry run.
        size: bytes of the bundle, written or not.
        seconds, peak: of the run.
    """
    residuals, energies = module_errors(inputs, encoded)
    errors = torch.where(energies > 0, residuals / energies.clamp_min(1e-300), residuals * 0)
    whole = energies.nansum(1, keepdim=True).clamp_min(1e-300)
    lost = (residuals / whole).nansum(0) / len(inputs.adapters)
    fallbacks = torch.zeros(errors.shape, dtype=torch.bool)
    for column, code in enumerate(encoded):
        rows = (~energies[:, column].isnan()).nonzero()[:, 0]
        fallbacks[rows, column] = torch.tensor(code.fallbacks)
    return Outcome(
        bundle,
        spec,
        inputs,
        errors,
        adapter_errors(inputs, encoded),
        fallbacks,
        tuple(code.spectrum for code in encoded),
        tuple(inputs.modules),
        bundle is None and spec.method == "auto",
        dict(Counter(described(form) for code in encoded for form in code.forms).most_common()),
        choices(*stored(inputs, encoded), lost.tolist()),
        size,
        seconds,
        peak,
    )
