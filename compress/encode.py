"""One module of all adapters -> its stored form, with the error of what is stored: the unit of work of the job.

A pure function of the factors and the resolved spec, so that it can be resumed, tested and sent to another machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import frexp

import torch
from torch import Tensor

from lorazip.adapter import LowRank
from lorazip.codecs import CODECS
from lorazip.compress import allocate, joint, quantize
from lorazip.compress.allocate import Module
from lorazip.compress.joint import Pair
from lorazip.compress.lowrank import Stack, canonical, inner, untangled
from lorazip.compress.methods import METHODS
from lorazip.compress.own import own_factors
from lorazip.compress.spec import Spec
from lorazip.compress.svd import OwnFactors
from lorazip.errors import CodecError
from lorazip.terms import (
    Core,
    Form,
    Layout,
    Shared,
    Slot,
    Term,
    decode,
    own_slots,
    renumbered,
    shared_indices,
    shared_slots,
)


@dataclass(frozen=True)
class ModuleCode:
    """One module as it goes to disk.

    Attributes:
        layout: its shared tensors.
        shared: their parts, tensor by tensor.
        forms: (n) the terms of each adapter.
        own: (n) the parts of each adapter's own tensors, in file order.
        residuals: (n,) ||D^_i - D_i||^2 of what is stored, float64, CPU.
        energies: (n,) ||D_i||^2.
        fallbacks: (n,) bool, the adapter keeps own factors although the method shares.
        spectrum: (r_max,) mean over adapters of sigma_j^2 / ||D_i||^2.
    """

    layout: Layout
    shared: tuple[tuple[Tensor, ...], ...]
    forms: tuple[Form, ...]
    own: tuple[tuple[Tensor, ...], ...]
    residuals: Tensor
    energies: Tensor
    fallbacks: tuple[bool, ...]
    spectrum: Tensor


def load(factors: Sequence[LowRank], device: torch.device) -> Stack:
    """Copy the factors of one module into one stack on the device; the scale goes to the left rows.

    float32 holds them exactly unless a scale is no power of two: those rows are float64, so that D is what was trained.
    """
    # A zero adapter read from a bundle has rank 0: one row of zeros keeps the stack regular.
    ranks = tuple(max(1, f.A.shape[0]) for f in factors)
    exact = all(abs(frexp(f.scale)[0]) in (0.0, 0.5) for f in factors)
    left = torch.zeros(sum(ranks), factors[0].B.shape[0], dtype=torch.float32 if exact else torch.float64)
    right = torch.zeros(sum(ranks), factors[0].A.shape[1])
    at = 0
    for factor, rank in zip(factors, ranks, strict=True):
        filled = slice(at, at + factor.A.shape[0])
        left[filled].copy_(factor.B.T).mul_(factor.scale)
        right[filled].copy_(factor.A)
        at += rank
    return Stack(left.to(device), right.to(device), ranks)


def prepare(name: str, factors: Sequence[LowRank], spec: Spec) -> tuple[Module, Stack]:
    """The balanced stack with its weights, and the stack as loaded, against which errors are measured."""
    loaded = untangled(load(factors, spec.torch_device()))
    stack, sigma = canonical(loaded)
    energies = sigma.square().sum(1)
    each = energies.clamp_min(torch.finfo(torch.float64).tiny)
    mean = each.mean()
    match spec.weights:
        case "unit":
            weights = torch.where(energies > 0, 1 / each, 0)
        case "strength":
            weights = torch.where(energies > 0, 1 / (each * mean).sqrt(), 0)
        case _:
            weights = (1 / mean).expand_as(energies).clone()
    original = torch.tensor([f.B.nbytes + f.A.nbytes for f in factors], dtype=torch.float64)
    return Module(name, stack, sigma, energies, weights, original), loaded


def encode(name: str, factors: Sequence[LowRank], spec: Spec) -> ModuleCode:
    """Compress one module.

    Args:
        name: dotted module name, for messages.
        factors: the module of each adapter that has it, all (out, in).
        spec: resolved: clusters is a number, and one of rank, energy and max_error is given.

    Raises:
        CodecError: a value does not fit the dtype.
        UndecidedError: no rank reaches the energy asked for.
    """
    module, loaded = prepare(name, factors, spec)
    try:
        if spec.method == "svd":
            encoded: Encoded = ((), (), own_factors(module, range(len(factors)), spec, factors))
        else:
            encoded = _encode_joint(module, spec)
        layout, shared, own = encoded
        if spec.max_error is not None:
            own = [o if o.exact or _fits(o.tensors, spec.dtype) else OwnFactors((), ()) for o in own]
        code = measured(module, loaded, layout, shared, own)
        if spec.max_error is not None and spec.method != "svd":
            code = with_fallbacks(module, loaded, factors, spec, code, own)
    except CodecError as error:
        raise CodecError(f"{name}: {error}") from error
    return code


def _fits(tensors: Sequence[Tensor], dtype: str) -> bool:
    """Whether the codec can hold these numbers; with a bound, what does not fit falls back instead of failing."""
    most = torch.finfo(getattr(torch, dtype)).max
    return all(float(t.abs().max()) <= most for t in tensors)


Encoded = tuple[Layout, tuple[tuple[Tensor, ...], ...], list[OwnFactors]]


def _encode_joint(module: Module, spec: Spec) -> Encoded:
    clusters = allocate.fit(module, spec)
    if clusters is None:
        return (), (), [OwnFactors((), ()) for _ in module.stack.ranks]
    layout: list[Shared] = []
    parts: list[tuple[Tensor, ...]] = []
    own: list[OwnFactors] = [OwnFactors((), ())] * len(module.stack)
    for c, pair in enumerate(clusters.pairs):
        members = [i for i, label in enumerate(clusters.labels) if label == c and module.energies[i] > 0]
        sides = pair.left.T, pair.right.T  # (a, out), (b, in)
        names = [spec.basis_codec(len(side)) for side in sides]
        plain = names[0] in CODECS
        if not members or (spec.max_error is not None and plain and not _fits(sides, spec.dtype)):
            continue
        slots = [Slot(tuple(side.shape), name) for side, name in zip(sides, names, strict=True)]
        if plain:
            stored = [slot.encode(side) for slot, side in zip(slots, sides, strict=True)]
        else:
            stored = _rounded_bases(module, members, pair, spec, (names[0], names[1]))
        layout += [Shared("left", len(sides[0]), names[0]), Shared("right", len(sides[1]), names[1])]
        parts += stored
        decoded = [s.decode(p).T.to(pair.left.device) for s, p in zip(slots, stored, strict=True)]
        at = len(layout) - 2, len(layout) - 1
        # Cores are fitted to the bases as stored, so that their rounding is made good where it can be.
        for i, factors in zip(members, cores(module.stack, members, Pair(*decoded), spec, at), strict=True):
            own[i] = factors
    return tuple(layout), tuple(parts), own


def _rounded_bases(
    module: Module, members: Sequence[int], pair: Pair, spec: Spec, names: tuple[str, str]
) -> list[tuple[Tensor, ...]]:
    """The parts of both bases, rounded to few bits for these adapters."""
    core, method = spec.core_codec(), METHODS[spec.method]
    bases = quantize.bases(
        module.stack.select(members),
        module.weights[list(members)],
        pair,
        method.core,
        names,
        None if core in CODECS else core,
        method.refit,
    )
    return [side.parts(0) for side in bases]


def cores(
    stack: Stack, members: Sequence[int], pair: Pair, spec: Spec, at: tuple[int, int]
) -> list[OwnFactors]:
    """The least-squares cores of some adapters on one stored pair, in the smaller of their exact storages.

    Args:
        at: the pair's indices in the module's layout.
    """
    part = stack.select(members)
    kind = METHODS[spec.method].core
    if kind == "scalar":
        return [OwnFactors((Term(at[0], Core("scalar"), at[1]),), ())] * len(members)
    if kind == "diagonal":
        form = (Term(at[0], Core("diagonal", spec.core_codec()), at[1]),)
        return [OwnFactors(form, (sigma.float(),)) for sigma in joint.diagonal_cores(part, pair)]
    p, q = joint.full_cores(part, pair)
    name = spec.core_codec()
    found = [OwnFactors((), ())] * len(members)
    for rank in sorted(set(part.ranks)):
        same = [i for i, r in enumerate(part.ranks) if r == rank]
        factored = len(allocate.core_shape(kind, p.shape[1], q.shape[1], rank)) == 2
        core = Core("factored", name, rank) if factored else Core("full", name)
        form = (Term(at[0], core, at[1]),)
        if name not in CODECS:
            stored = _rounded_cores(p[same, :, :rank], q[same, :, :rank], pair, name, factored)
            for i, each in zip(same, stored, strict=True):
                found[i] = OwnFactors(form, (), parts=each)
            continue
        for i in same:
            left, right = _balanced(p[i, :, :rank], q[i, :, :rank])
            tensors = (left.T.float(), right.T.float()) if factored else ((p[i] @ q[i].T).float(),)
            found[i] = OwnFactors(form, tensors)
    return found


def _rounded_cores(
    p: Tensor, q: Tensor, pair: Pair, name: str, factored: bool
) -> list[tuple[tuple[Tensor, ...], ...]]:
    """The parts of the cores P Q^T, p (n, a, r), q (n, b, r)."""
    if factored:
        left, right = quantize.product(p.mT, q.mT, p.shape[2], (name, name))
        return [(left.parts(i), right.parts(i)) for i in range(len(p))]
    core = quantize.cores(p @ q.mT, pair.left.T, name)
    return [(core.parts(i),) for i in range(len(p))]


def _balanced(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of p and q scaled to equal length, which keeps p q^T and halves the range that a codec must hold."""
    size = (q.norm(dim=0).clamp_min(1e-300) / p.norm(dim=0).clamp_min(1e-300)).sqrt()
    return p * size, q / size


def measured(
    module: Module,
    loaded: Stack,
    layout: Layout,
    shared: tuple[tuple[Tensor, ...], ...],
    own: Sequence[OwnFactors],
    bases: dict[int, Tensor] | None = None,
) -> ModuleCode:
    """Encode the adapters' own tensors and measure what is stored, through the decoder that readers use.

    Args:
        bases: the decoded shared tensors where they are stored already; else they are decoded from `shared`.
    """
    out, in_ = loaded.left.shape[1], loaded.right.shape[1]
    device = loaded.left.device
    if bases is None:
        slots = shared_slots(layout, out, in_)
        bases = {i: s.decode(p) for i, (s, p) in enumerate(zip(slots, shared, strict=True))}
    bases = {i: tensor.to(device) for i, tensor in bases.items()}
    parts, lefts, rights, ranks = [], [], [], []
    for factors in own:
        slots = own_slots(factors.form, layout, out, in_)
        encoded = factors.stored(slots)
        tensors = [slot.decode(e).to(device) for slot, e in zip(slots, encoded, strict=True)]
        b, a = decode(factors.form, bases, tensors, out, in_)
        parts.append(tuple(p for e in encoded for p in e))
        # An empty form has no rows; one row of zeros keeps the stack regular.
        lefts.append(b.T if b.shape[1] else b.new_zeros(1, out))
        rights.append(a if len(a) else a.new_zeros(1, in_))
        ranks.append(len(lefts[-1]))
    stored = Stack(
        torch.cat([x.to(device) for x in lefts]), torch.cat([x.to(device) for x in rights]), tuple(ranks)
    )
    residuals = residuals2(loaded, stored).cpu()
    residuals[[i for i, factors in enumerate(own) if factors.exact]] = 0
    return described(module, loaded, layout, shared, [o.form for o in own], parts, residuals)


def described(
    module: Module,
    loaded: Stack,
    layout: Layout,
    shared: tuple[tuple[Tensor, ...], ...],
    forms: Sequence[Form],
    parts: Sequence[tuple[Tensor, ...]],
    residuals: Tensor,
) -> ModuleCode:
    """A module whose parts and residuals are known."""
    spectrum = module.sigma.square() / module.energies.clamp_min(torch.finfo(torch.float64).tiny)[:, None]
    return ModuleCode(
        layout,
        shared,
        tuple(forms),
        tuple(parts),
        residuals,
        loaded.energies.cpu(),
        (False,) * len(forms),
        spectrum.mean(0).cpu(),
    )


def residuals2(first: Stack, second: Stack) -> Tensor:
    """||D_i - E_i||^2, (n,), float64: ||D||^2 - 2 <D, E> + ||E||^2.

    In float64 the subtraction bottoms out near 1e-15 of ||D||^2 (in float32 it would near 1e-7; METHODS.md, "Error").
    """
    return (first.energies - 2 * inner(first, second) + second.energies).clamp_min(0)


def missed(code: ModuleCode, spec: Spec) -> list[bool]:
    """Which adapters are stored with more than the bound allows."""
    assert spec.max_error is not None
    return [bool(r > spec.max_error * e) for r, e in zip(code.residuals, code.energies, strict=True)]


def with_fallbacks(
    module: Module,
    loaded: Stack,
    factors: Sequence[LowRank],
    spec: Spec,
    code: ModuleCode,
    own: list[OwnFactors],
) -> ModuleCode:
    """Give adapters that miss the bound factors of their own, drop bases that nobody is left to use, measure again."""
    fallen = missed(code, spec)
    if not any(fallen):
        return code
    which = [i for i, fell in enumerate(fallen) if fell]
    alone = dict(zip(which, own_factors(module, which, spec.alone(), factors), strict=True))
    own = [alone.get(i, o) for i, o in enumerate(own)]
    used = sorted({index for o in own for index in shared_indices(o.form)})
    place = {index: at for at, index in enumerate(used)}
    own = [replace(o, form=renumbered(o.form, place)) for o in own]
    layout = tuple(code.layout[i] for i in used)
    again = measured(module, loaded, layout, tuple(code.shared[i] for i in used), own)
    return replace(again, fallbacks=tuple(fallen))
