"""`--resume` of a job that is finished: its bundle is there, is proven to be what the job would make, and is reported.

A run can be killed after its bundle got its name and before it could say so; whoever repeats it with --resume wants to
hear the same figures and exit code 0.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lorazip.bundle import MANIFEST, Bundle
from lorazip.compress import check, encode, shards
from lorazip.compress.allocate import Module
from lorazip.compress.assemble import adapter_errors, skipped
from lorazip.compress.encode import ModuleCode
from lorazip.compress.lowrank import norms2, untangled
from lorazip.compress.methods import METHODS
from lorazip.compress.shards import Shard
from lorazip.compress.spec import Spec
from lorazip.errors import BundleError, TargetError
from lorazip.sources import Inputs
from lorazip.terms import shared_indices


def find(
    output: Path, inputs: Inputs, spec: Spec, force: bool, progress: Callable[[str, int, int], None]
) -> list[Shard] | None:
    """The finished modules of this job's bundle, measured again; None when there is none.

    Args:
        force: whether a bundle of another job may be replaced.
    Raises:
        TargetError: the bundle is of another job; BundleError: it is damaged, and not to be replaced.
    """
    if not (output / MANIFEST).is_file():
        return None
    try:
        bundle = Bundle.open(output)
        same = _same_job(bundle, inputs, spec)
        if same:
            bundle.require(bundle.names)
    except BundleError:
        if force:  # damaged: replaced as any other bundle
            return None
        raise
    if same:
        pairs = list(zip(inputs.adapters, bundle, strict=True))
        if not any(check.differences(original, stored) for original, stored in pairs):
            done = _measured(bundle, inputs, spec, progress)
            errors = adapter_errors(inputs, done).tolist()
            if all(check.agree(e, stored.record.error) for e, (_, stored) in zip(errors, pairs, strict=True)):
                return done
    if not force:
        raise TargetError(
            f"{output} exists, made with other options or inputs (--force replaces it; or choose another name)"
        )
    return None


def _same_job(bundle: Bundle, inputs: Inputs, spec: Spec) -> bool:
    """Whether all that the manifest records of a job is the same."""
    manifest = bundle.manifest
    return (
        (manifest.base, manifest.revision, manifest.skipped)
        == (inputs.base, inputs.revision, skipped(inputs))
        and manifest.options == spec.recorded()
        and {m.name: (m.out, m.in_) for m in manifest.modules} == inputs.modules
        and [(a.name, a.original_bytes) for a in manifest.adapters]
        == [(a.name, a.nbytes) for a in inputs.adapters]
    )


def _measured(
    bundle: Bundle, inputs: Inputs, spec: Spec, progress: Callable[[str, int, int], None]
) -> list[Shard]:
    """Every module as `encode` left it: the errors of what is stored against the inputs, one module at a time."""
    stored = list(bundle)
    done = []
    for at, module in enumerate(bundle.manifest.modules):
        having = [i for i, adapter in enumerate(inputs.adapters) if module.name in adapter.modules]
        factors = [inputs.adapters[i].low_rank(module.name) for i in having]
        ready, loaded = encode.prepare(module.name, factors, spec)
        again = untangled(encode.load([stored[i].low_rank(module.name) for i in having], spec.torch_device()))
        forms = tuple(form for i in having if (form := stored[i].record.forms[at]) is not None)
        code = ModuleCode(
            layout=module.layout,
            shared=(),
            forms=forms,
            own=(),
            residuals=encode.residuals2(loaded, again).cpu(),
            energies=norms2(loaded).cpu(),
            fallbacks=tuple(spec.method in METHODS and len(f) > 0 and not shared_indices(f) for f in forms),
            spectrum=_mean_spectrum(ready),
        )
        done.append(shards.describe(code, module.out, module.in_))
        progress("checking", at + 1, len(bundle.manifest.modules))
    return done


def _mean_spectrum(module: Module) -> Tensor:
    """Mean share of energy of each singular value, (r_max,)."""
    return (
        (module.sigma.square() / module.energies.clamp_min(torch.finfo(torch.float64).tiny)[:, None])
        .mean(0)
        .cpu()
    )
