"""Encodings chosen by rate and distortion: ranks and bits of every module of every adapter (METHODS.md §5).

A candidate is a truncated SVD of some rank in some bits. What it leaves out is known from the singular values; what its
rounding adds is, for balanced factors turned so that all rows carry the same energy (`quantize`), nearly

    kappa(rank, bits) E (F / E)^1.8        E = s_1^2 + ... + s_rank^2, F = (s_1 + ... + s_rank)^2 / rank

F is the energy of the turned rows, which feedback between them spends again the better the more F / E is below 1. The
power was fitted to real adapters, where it halves the spread of kappa (to 8 %); kappa is measured on a few
adapters of a few modules at hand. So one pass over the factors gives every candidate's bytes and error without encoding
it; `rate.choose` picks, the job encodes and measures what it stored. Where an adapter then misses its bound, the
predictions of its modules are corrected by what was measured and it chooses again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256

import torch
from torch import Tensor

from lorazip import quantized
from lorazip.adapter import LowRank
from lorazip.compress import encode, quantize, rate, svd
from lorazip.compress.allocate import Module, codec_bytes
from lorazip.compress.encode import ModuleCode
from lorazip.compress.spec import Spec
from lorazip.compress.svd import OwnFactors
from lorazip.errors import UndecidedError
from lorazip.terms import Core, Form, Own, Term

ALL_RANKS = 16  # every rank up to here is a candidate, above that steps of a quarter
MEASURED_BITS = (1, 2, 3, 4)
MEASURED_RANKS = (1, 2, 4, 8)
POWER = 1.8
FINER = 1 / 14  # what kappa falls by for two bits more, beyond those measured
PLAIN = 1e-7  # kappa of a floating-point type, about
SAMPLES = 8  # adapters of a module that kappa is measured on
TRIES = 8  # plans whose bytes are counted to meet a budget
REPAIRS = 8  # rounds of choosing again before an adapter that misses its bound is stored as it was


@dataclass(frozen=True)
class Choice:
    """How one adapter is stored in one module: rank and codec of its own factors; the codec "" is the original."""

    rank: int
    codec: str


NOTHING = Choice(0, "-")
ORIGINAL = Choice(0, "")
Plan = tuple[Choice, ...]  # of the adapters that have the module


@dataclass(frozen=True)
class Curve:
    """What is known of one module before anything is encoded.

    Attributes:
        having: the adapters that have it.
        shape: (out, in).
        sigma: (n, r_max) singular values of those.
        ranks: rank of each.
        original_bytes: (n,) of the original factors.
    """

    having: tuple[int, ...]
    shape: tuple[int, int]
    sigma: Tensor
    ranks: tuple[int, ...]
    original_bytes: Tensor

    @property
    def energies(self) -> Tensor:
        """||D_i||^2 (n,)."""
        return self.sigma.square().sum(1)


def form(choice: Choice, factor: LowRank | None) -> Form:
    """The terms of a choice; only the original needs the factor."""
    if choice == ORIGINAL:
        assert factor is not None
        return svd.original(factor).form
    side = Own(choice.rank, choice.codec)
    return (Term(side, Core("scalar"), side),) if choice.rank else ()


Samples = dict[tuple[int, int], Tensor]  # (rank, bits) -> kappa of some adapters
Noise = Mapping[tuple[int, int], float]  # (rank, bits) -> kappa, for the measured ones


def curve(module: Module, having: Sequence[int]) -> Curve:
    """The curve of a module: its singular values."""
    shape = module.stack.left.shape[1], module.stack.right.shape[1]
    return Curve(
        tuple(having), shape, module.sigma.cpu(), module.stack.ranks, module.original_bytes.cpu().double()
    )


def noise(module: Module) -> Samples:
    """kappa of a few adapters (k,) for the ranks and bits that are measured."""
    kept = [i for i in range(len(module.stack)) if module.energies[i] > 0]
    kept = kept[:: max(1, len(kept) // SAMPLES)][:SAMPLES]
    if not kept:
        return {}
    stack, sigma = module.stack.select(kept), module.sigma[kept]
    left, right = stack.pad(stack.left), stack.pad(stack.right)
    found: Samples = {}
    for rank in MEASURED_RANKS:
        whole = [i for i, r in enumerate(stack.ranks) if r >= rank]
        if not whole:
            break
        tail, head = sigma[whole, rank:].square().sum(1), _rounding(sigma[whole], rank)
        for bits in MEASURED_BITS:
            name = f"int{bits}"
            one, two = (
                x.values.double() for x in quantize.product(left[whole], right[whole], rank, (name, name))
            )
            cross = (one @ left[whole].double().mT) * (two @ right[whole].double().mT)
            own = (one @ one.mT) * (two @ two.mT)
            error = sigma[whole].square().sum(1) - 2 * cross.sum((1, 2)) + own.sum((1, 2))
            found[rank, bits] = ((error - tail) / head).cpu()
    return found


def _rounding(sigma: Tensor, rank: int) -> Tensor:
    """E (F / E)^1.8 of singular values (n, r), see above: (n,)."""
    energy = sigma[:, :rank].square().sum(1).clamp_min(1e-300)
    rounding: Tensor = energy * (sigma[:, :rank].sum(1).square() / rank / energy) ** POWER
    return rounding


def averaged(samples: Sequence[Samples]) -> Noise:
    """The mean kappa over the modules that it was measured on."""
    keys = dict.fromkeys(key for sample in samples for key in sample)
    return {key: float(torch.cat([s[key] for s in samples if key in s]).mean()) for key in keys}


def kappa(noise: Noise, rank: int, codec: str) -> float:
    """Between the measured ranks kappa changes as a line over log(rank), beyond them not at all."""
    bits = int(codec.removeprefix("int")) if codec.startswith("int") else 0
    if not bits:
        return PLAIN
    known = min(bits, max(MEASURED_BITS))
    ranks = sorted(r for r, b in noise if b == known)
    if not ranks:
        return 1.0  # all adapters are zero
    low = max([r for r in ranks if r <= rank], default=ranks[0])
    high = min([r for r in ranks if r >= rank], default=ranks[-1])
    share = 0.0 if low == high else float(torch.tensor(rank / low).log2() / torch.tensor(high / low).log2())
    value: float = noise[low, known] * (1 - share) + noise[high, known] * share
    finer: float = value * FINER ** ((bits - known) / 2)
    return finer


def menu(rank: int, dtype: str) -> list[Choice]:
    """All candidates for modules of adapters of at most that rank: nothing first, the original last."""
    ranks, at = [], 1
    while at <= rank:
        ranks.append(at)
        at = at + 1 if at < ALL_RANKS else -(-at * 5 // 4)
    if ranks[-1] != rank:
        ranks.append(rank)
    codecs = [*(f"int{bits}" for bits in quantized.BITS), dtype]
    return [NOTHING, *(Choice(r, c) for r in ranks for c in codecs), ORIGINAL]


@dataclass(frozen=True)
class Tables:
    """Bytes and residuals of every adapter, module and candidate, (n, m, c); infinite residuals where there is none."""

    menu: list[Choice]
    nbytes: Tensor
    residuals: Tensor
    energies: Tensor  # (n,)


def tables(curves: Sequence[Curve], noise: Noise, adapters: int, dtype: str) -> Tables:
    """Predict every candidate."""
    choices = menu(max(max(c.ranks) for c in curves), dtype)
    nbytes = torch.zeros(adapters, len(curves), len(choices), dtype=torch.float64)
    residuals = torch.full_like(nbytes, torch.inf)
    residuals[..., 0] = 0  # a module that an adapter lacks
    energies = torch.zeros(adapters, dtype=torch.float64)
    for m, each in enumerate(curves):
        rows = list(each.having)
        tails = torch.nn.functional.pad(each.sigma.square(), (0, 1)).flip(1).cumsum(1).flip(1)  # (n, r + 1)
        ranks = torch.tensor(each.ranks)
        energies[rows] += each.energies
        for c, choice in enumerate(choices):
            if choice is ORIGINAL:
                nbytes[rows, m, c] = each.original_bytes
                residuals[rows, m, c] = 0
            elif choice is NOTHING:
                residuals[rows, m, c] = tails[:, 0]
            else:
                k = min(choice.rank, each.sigma.shape[1])
                out, in_ = each.shape
                nbytes[rows, m, c] = float(codec_bytes(choice.codec, (choice.rank, out), (choice.rank, in_)))
                predicted = tails[:, k] + kappa(noise, k, choice.codec) * _rounding(each.sigma, k)
                residuals[rows, m, c] = torch.where(ranks >= choice.rank, predicted, torch.inf)
    return Tables(choices, nbytes, residuals, energies)


def within_bytes(table: Tables, budget: float, weights: Tensor) -> Tensor:
    """(n, m) candidates of least sum_i w_i residual_i whose own tensors take at most so many bytes."""
    value = (table.residuals * weights[:, None, None]).flatten(0, 1)[None]
    chosen, _ = rate.choose(value, table.nbytes.flatten(0, 1)[None], value.new_tensor([budget]))
    return chosen.view(table.nbytes.shape[:2])


def within_errors(table: Tables, allowed: Tensor) -> Tensor:
    """(n, m) candidates of least bytes, every adapter's residuals at most `allowed` (n,)."""
    there = table.residuals.isfinite()
    value = torch.where(there, table.nbytes, torch.inf)
    chosen, _ = rate.choose(value, torch.where(there, table.residuals, 1e300), allowed)
    return chosen


def plans(table: Tables, curves: Sequence[Curve], chosen: Tensor) -> list[Plan]:
    """The choices module by module."""
    return [tuple(table.menu[int(chosen[i, m])] for i in each.having) for m, each in enumerate(curves)]


def for_budget(
    table: Tables,
    curves: Sequence[Curve],
    budget: int,
    weights: Tensor,
    size: Callable[[Sequence[Plan]], int],
) -> Tensor:
    """The least mean error whose bundle has at most `budget` bytes, headers and manifest counted.

    Args:
        size: bytes of the bundle of these plans.
    Raises:
        UndecidedError: not even a bundle of nothing is so small.
    """
    chosen = torch.zeros(table.nbytes.shape[:2], dtype=torch.long)
    least = size(plans(table, curves, chosen))
    if least > budget:
        raise UndecidedError(
            f"{budget} bytes are too few: names, configs and headers alone take {least} (allow more bytes)"
        )
    best, best_loss = chosen, float("inf")
    around = float(least)  # bytes of the bundle that are not own tensors
    for _ in range(TRIES):
        tried = within_bytes(table, budget - around, weights)
        own = float(table.nbytes.gather(2, tried[..., None]).sum())
        nbytes = size(plans(table, curves, tried))
        loss = float((table.residuals.gather(2, tried[..., None])[..., 0].sum(1) * weights).sum())
        if nbytes <= budget and loss < best_loss:
            best, best_loss = tried, loss
        if 0 <= budget - nbytes <= 1e-4 * budget:
            break
        around = nbytes - own if nbytes - own != around else around + max(1.0, nbytes - budget)
    return best


def corrected(table: Tables, chosen: Tensor, measured: Tensor) -> Tables:
    """The tables after what was chosen was measured: a unit that erred once errs alike in its other candidates.

    Args:
        chosen: (n, m).
        measured: (n, m) residuals, NaN where an adapter lacks the module.
    """
    predicted = table.residuals.gather(2, chosen[..., None])[..., 0]
    known = ~measured.isnan() & (predicted > 0) & (measured > 0)
    factor = torch.where(known, measured / predicted.clamp_min(1e-300), 1)
    return replace(table, residuals=table.residuals * factor[..., None])


def repaired(
    table: Tables, chosen: Tensor, measured: Tensor, bound: float, attempt: int
) -> tuple[Tables, Tensor] | None:
    """Choose again for adapters that miss the bound; None when all meet it.

    Args:
        measured: (n, m) residuals of what is stored.
        attempt: 0, 1 ...: later ones aim lower.
    """
    missed = measured.nansum(1) > bound * table.energies
    if not bool(missed.any()):
        return None
    table = corrected(table, chosen, measured)
    again = within_errors(table, (1 - 0.004 * attempt) * bound * table.energies)
    if attempt >= REPAIRS:
        again = torch.where(measured.isnan(), 0, len(table.menu) - 1)
    return table, torch.where(missed[:, None], again, chosen)


def digest(plan: Plan) -> str:
    """A name for a plan."""
    return sha256(repr(plan).encode()).hexdigest()[:12]


def encode_planned(name: str, factors: Sequence[LowRank], spec: Spec, plan: Plan) -> ModuleCode:
    """Encode one module as planned: a pure function of the factors, the options and the plan."""
    module, loaded = encode.prepare(name, factors, spec)
    own = [OwnFactors((), ())] * len(plan)
    for choice in dict.fromkeys(plan):
        members = [i for i, each in enumerate(plan) if each == choice]
        for i, stored in zip(members, _stored(module, members, choice, factors), strict=True):
            own[i] = stored
    return encode.measured(module, loaded, (), (), own)


def _stored(
    module: Module, members: Sequence[int], choice: Choice, factors: Sequence[LowRank]
) -> list[OwnFactors]:
    """Some adapters in the same way."""
    if choice == ORIGINAL:
        return [svd.original(factors[i]) if module.energies[i] > 0 else OwnFactors((), ()) for i in members]
    if choice == NOTHING:
        return [OwnFactors((), ())] * len(members)
    stack = module.stack.select(members)
    if not choice.codec.startswith("int"):
        rows = [(stack.starts[i], stack.starts[i + 1]) for i in range(len(members))]
        return [svd.truncated(stack.left[a:b], stack.right[a:b], choice.rank, choice.codec) for a, b in rows]
    names = choice.codec, choice.codec
    one, two = quantize.product(stack.pad(stack.left), stack.pad(stack.right), choice.rank, names)
    terms = form(choice, None)
    return [OwnFactors(terms, (), parts=(one.parts(i), two.parts(i))) for i in range(len(members))]
