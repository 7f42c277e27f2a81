"""The methods that frontier.py compares, their settings, and how many bytes a setting takes before anything is fitted.

Bytes do not depend on the data: a setting says the shapes and codecs of all tensors, and what manifest and headers add
is nearly the same for all ranks. So of every method only the largest settings that fit into a budget are run:

- A ladder is a row of settings that grow in bytes and fall in error, such as svd in 3 bits at rank 1, 2 …
- Of every ladder the last setting that fits is fitted and measured; if it turns out too large (names of clusters and
  digits of errors move the manifest by some bytes), the one before it.
- Ladders of one group are tried in order of falling bits; after two that are worse than the best so far, the rest of
  the group is left out.
- The method's point is the one of least measured mean error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from lorazip import Spec
from lorazip.compress import allocate, job, shards
from lorazip.compress.assemble import SizeSink, assemble
from lorazip.compress.encode import ModuleCode
from lorazip.compress.methods import METHODS as JOINT
from lorazip.sources import Inputs
from lorazip.terms import Core, Form, Layout, Own, Shared, Term, own_slots, shared_slots

TITLES = {
    "auto": "auto",
    "svd-bits": "svd, few bits",
    "jd-full": "jd-full",
    "jd-full-bits": "jd-full, few bits",
    "svd-split": "LoRAQuant style",
    "svd": "svd",
    "jd-diag": "jd-diag",
    "eigenlora": "eigenlora",
    "mean": "mean adapter",
}
BITS = (4, 3, 2.5, 2, 1)  # of svd
JOINT_BITS = ((4, 4), (3, 4), (3, 3), (2.5, 3), (2, 4), (2, 2))  # of bases and cores
CLUSTERS = (1, 2, 4)
TYPICAL = 0.12345678  # an error of as many digits as a manifest writes


@dataclass(frozen=True)
class Ladder:
    """Settings `at(1)` … `at(most)` that grow in bytes and fall in error."""

    at: Callable[[int], Spec]
    most: int


def ladders(method: str, inputs: Inputs) -> list[list[Ladder]]:
    """All settings of a method that are worth trying on these adapters, in groups.

    Within a group bits fall, or ranks rise: at any budget the error of what fits first falls and then rises.
    """
    n = len(inputs.adapters)
    ranks = [max(info.rank for info in adapter.modules.values()) for adapter in inputs.adapters]
    most, span = max(ranks), sum(ranks)
    joint = min(span, max(max(shape) for shape in inputs.modules.values()))
    clusters = [c for c in CLUSTERS if c < n]
    match method:
        case "svd":
            return [[_by_rank(most, "svd")]]
        case "svd-bits":
            return [[_by_rank(most, "svd", bits=bits) for bits in BITS]]
        case "svd-split":
            return [[_split(rank) for rank in range(2, most + 1)]]
        case "jd-full":
            return [[_by_rule(inputs, method)], *([_by_rank(joint, method, clusters=c)] for c in clusters)]
        case "jd-diag":
            return [[_by_rule(inputs, method)], *([_by_rank(span, method, clusters=c)] for c in clusters)]
        case "jd-full-bits":
            one = [_by_rank(joint, "jd-full", clusters=1, basis_bits=b, core_bits=c) for b, c in JOINT_BITS]
            return [one, [_by_rank(joint, "jd-full", clusters=c, bits=3) for c in clusters[1:]]]
        case "eigenlora":
            return [[_by_rank(joint, "eigenlora", clusters=1)]]
        case "mean":
            return [[_by_rule(inputs, "mean")]]
    raise ValueError(method)


def _by_rank(most: int, method: str, **fixed: Any) -> Ladder:
    return Ladder(lambda rank: Spec(method, rank=rank, **fixed), most)


def _by_rule(inputs: Inputs, method: str) -> Ladder:
    """The method's own default, in the one size that it has."""
    return Ladder(lambda _: job.resolve(inputs, Spec(method)), 1)


def _split(rank: int) -> Ladder:
    """The first k of so many columns have 2 bits and the rest 1, then 3 and 2: up to 3 bits."""
    return Ladder(lambda k: Spec("svd", rank=rank, bits=round(1 + k / rank, 4)), 2 * rank - 1)


@dataclass(frozen=True)
class Sizes:
    """Bytes of bundles of some adapters that are not made yet."""

    inputs: Inputs
    _beside: dict[Spec, int] = field(default_factory=dict)  # what is no tensor, of the first of each ladder

    def last_that_fits(self, ladder: Ladder, budget: float) -> int:
        """The last setting of at most so many bytes, about; 0 for none."""
        first = ladder.at(1)
        if first not in self._beside:
            self._beside[first] = self.of_bundle(first) - self.of_tensors(first)
        beside = self._beside[first]
        low, high = 0, ladder.most + 1
        while high - low > 1:
            middle = (low + high) // 2
            fits = self.of_tensors(ladder.at(middle)) + beside <= budget
            low, high = (middle, high) if fits else (low, middle)
        return low

    @cached_property
    def _alike(self) -> Counter[tuple[int, int, tuple[int, ...]]]:
        """How many modules have the same shape and the same ranks."""
        return Counter((*shape, ranks) for shape, ranks in self._modules())

    def _modules(self) -> Iterator[tuple[tuple[int, int], tuple[int, ...]]]:
        for name, shape in self.inputs.modules.items():
            yield shape, tuple(a.modules[name].rank for a in self.inputs.adapters if name in a.modules)

    def of_tensors(self, spec: Spec) -> int:
        """What the stored numbers of a setting take."""
        total = 0
        for (out, in_, ranks), count in self._alike.items():
            layout, forms = stored(spec, out, in_, ranks)
            slots = shared_slots(layout, out, in_)
            slots += [s for form, k in Counter(forms).items() for s in own_slots(form, layout, out, in_) * k]
            total += count * sum(part.nbytes for slot in slots for part in slot.parts())
        return total

    def of_bundle(self, spec: Spec) -> int:
        """What a whole bundle takes, headers and manifest too."""
        found = []
        for (out, in_), ranks in self._modules():
            layout, forms = stored(spec, out, in_, ranks)
            ones = torch.ones(len(forms), dtype=torch.float64)
            none = (False,) * len(forms)
            code = ModuleCode(layout, (), tuple(forms), (), TYPICAL * ones, ones, none, ones[:1])
            found.append(shards.describe(code, out, in_))
        return assemble(self.inputs, spec, found, SizeSink(), lambda what, done, total: None)


def stored(spec: Spec, out: int, in_: int, ranks: Sequence[int]) -> tuple[Layout, list[Form]]:
    """What a setting stores of one module: its shared tensors, and the form of each adapter.

    Clusters are taken as equally large; which adapters are in which does not change the bytes.
    """
    assert spec.rank is not None
    if spec.method == "svd":
        owns = [Own(k, spec.own_codec(k)) for k in (min(spec.rank, r) for r in ranks)]
        return (), [(Term(own, Core("scalar"), own),) for own in owns]
    layout: list[Shared] = []
    forms: list[Form] = []
    count = min(spec.clusters or 1, len(ranks))
    for c in range(count):
        members = ranks[c * len(ranks) // count : (c + 1) * len(ranks) // count]
        a, b = _columns(spec, out, in_, sum(members))
        at = len(layout), len(layout) + 1
        layout += [Shared("left", a, spec.basis_codec(a)), Shared("right", b, spec.basis_codec(b))]
        forms += [(Term(at[0], _core(spec, a, b, rank), at[1]),) for rank in members]
    return tuple(layout), forms


def _columns(spec: Spec, out: int, in_: int, span: int) -> tuple[int, int]:
    """Columns of both bases for adapters that have `span` directions together."""
    assert spec.rank is not None
    if spec.method == "jd-diag":
        return (min(spec.rank, span),) * 2
    if spec.method == "eigenlora":
        return min(spec.rank, out), min(spec.rank, in_)
    # Fits run in the span of the adapters only where that is clearly smaller: compress/frame.py
    left, right = (min(spec.rank, span if 4 * span <= 3 * d else d) for d in (out, in_))
    return (min(left, right),) * 2 if spec.method == "mean" else (left, right)


def _core(spec: Spec, a: int, b: int, rank: int) -> Core:
    kind = JOINT[spec.method].core
    if kind == "scalar":
        return Core("scalar")
    factored = len(allocate.core_shape(kind, a, b, rank)) == 2
    return Core("factored", spec.core_codec(), rank) if factored else Core(kind, spec.core_codec())


def described(setting: Mapping[str, Any]) -> str:
    """A setting in a few words: "rank 3, 2.5 bits"."""
    words = []
    if setting.get("ratio") is not None:
        words.append(f"ratio {setting['ratio']:g}")
    if setting.get("rank") is not None:
        words.append(f"rank {setting['rank']}")
    if (setting.get("clusters") or 1) > 1:
        words.append(f"{setting['clusters']} clusters")
    if setting.get("bits") is not None:
        words.append(f"{setting['bits']:.4g} bits")
    if setting.get("basis_bits") is not None:
        words.append(f"bases {setting['basis_bits']:g} bits, cores {setting['core_bits']}")
    return ", ".join(words)
