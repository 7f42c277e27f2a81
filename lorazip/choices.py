"""How a bundle stores each kind of module, and what paid: read off the forms and layouts of its modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from lorazip import units
from lorazip.codecs import DTYPES, Coded, Integers, Mixed, Single, codec
from lorazip.kinds import columns_by_kind
from lorazip.manifest import Module
from lorazip.terms import Form, Layout, Own, Side, own_slots, rank, shared_slots

SIDES: tuple[Side, Side] = ("left", "right")


@dataclass(frozen=True)
class SideChoice:
    """One side of a kind of module.

    Attributes:
        columns: that a module's adapters share, mean over the modules.
        bases: tensors that these columns are in, mean over the modules that have any.
        width: columns of one of these, in the mean.
        bits: a number of the shared columns, in the mean; None where there are none.
        used: share of the adapters' modules that use shared columns.
        adapters: how many adapters use them in at least half of their modules.
        own_bits: a number of the adapters' own rows, in the mean; None where there are none.
    """

    columns: float
    bases: float
    width: float
    bits: float | None
    used: float
    adapters: int
    own_bits: float | None


@dataclass(frozen=True)
class Choice:
    """One kind of module.

    Attributes:
        kind: its name.
        modules: how many there are.
        adapters: how many adapters have some of them.
        left, right: the sides.
        rank: mean over the adapters' modules.
        own_bytes, shared_bytes: of the tensors of all these modules.
        error: part of the mean error of the adapters that lies in these modules; None where only the bundle is known,
            which does not say.
    """

    kind: str
    modules: int
    adapters: int
    left: SideChoice
    right: SideChoice
    rank: float
    own_bytes: int
    shared_bytes: int
    error: float | None

    @property
    def sentence(self) -> str:
        """What paid."""
        if not self.rank:
            return f"{self.kind}: nothing is kept of it"
        if self.left == self.right and self.left.used:
            told = [self._shared("both sides", self.left)]
        else:
            sides = (("the right side", self.right), ("the left side", self.left))
            told = [self._shared(name, side) for name, side in sides if side.used]
        if not told:
            return f"{self.kind}: nothing is shared; rank {_number(self.rank)} in the mean, {self._own()} a number"
        part = units.share(self.shared_bytes / max(1, self.own_bytes + self.shared_bytes))
        return f"{self.kind}: {'; '.join(told)}; what is shared takes {part} of the bytes"

    def _shared(self, name: str, side: SideChoice) -> str:
        """31 of 45 adapters share the right side, in half of their modules or more: 16 columns, 3 bits."""
        many = f"{_number(side.bases)} bases of " if side.bases > 1 else ""
        what = f"{many}{_number(side.width, 'column')}, {_number(side.bits or 0, 'bit')}"
        if not side.adapters:
            return f"{units.share(side.used)} of the adapters’ modules share {name}: {what}"
        verb = "shares" if side.adapters == 1 else "share"
        users = f"{side.adapters} of {self.adapters} adapters {verb}"
        if side.adapters == self.adapters:
            few = {1: "the adapter shares", 2: "both adapters share"}
            users = few.get(self.adapters, f"all {self.adapters} adapters share")
        whose = "its" if side.adapters == 1 else "their"
        everywhere = side.used * self.adapters > side.adapters - 1e-6
        where = "" if everywhere else f", in half of {whose} modules or more"
        return f"{users} {name}{where}: {what}"

    def _own(self) -> str:
        left, right = (_number(side.own_bits or 0, "bit") for side in (self.left, self.right))
        return left if left == right else f"{left} left and {right} right"

    def document(self) -> dict[str, object]:
        """JSON values only."""
        return {**asdict(self), "sentence": self.sentence}


def choices(
    modules: Sequence[Module], forms: Sequence[Sequence[Form | None]], lost: Sequence[float] | None = None
) -> tuple[Choice, ...]:
    """The choice of every kind, sorted by name.

    Args:
        modules: m.
        forms: n rows of m: how each adapter stores each module; None where it lacks it.
        lost: m, the part of the adapters' mean error in each module, where that is known.
    """
    found = []
    for kind, columns in columns_by_kind([module.name for module in modules]).items():
        tally = _Tally(len(forms))
        for column in columns:
            tally.add(modules[column], [row[column] for row in forms])
        error = None
        if lost is not None:
            error = sum(lost[column] for column in columns) / (sum(lost) or 1.0)
        found.append(tally.choice(kind, len(columns), error))
    return tuple(found)


@dataclass(frozen=True)
class _Use:
    """What one form is in one module; pairs are of the left and the right side."""

    shares: tuple[bool, bool]
    own_rows: tuple[int, int]
    own_bits: tuple[float, float]  # of all rows together
    rank: int
    nbytes: int

    @staticmethod
    def of(form: Form, module: Module) -> _Use:
        shares, rows, bits = [], [], []
        for factors in ([term.left for term in form], [term.right for term in form]):
            own = [factor for factor in factors if isinstance(factor, Own)]
            shares.append(any(not isinstance(f, Own) or f.basis is not None for f in factors))
            rows.append(sum(factor.columns for factor in own))
            bits.append(sum(_row_bits(factor.codec, factor.columns) for factor in own))
        slots = own_slots(form, module.layout, module.out, module.in_)
        nbytes = sum(part.nbytes for slot in slots for part in slot.parts())
        (l_shares, r_shares), (l_rows, r_rows), (l_bits, r_bits) = shares, rows, bits
        return _Use(
            (l_shares, r_shares), (l_rows, r_rows), (l_bits, r_bits), rank(form, module.layout), nbytes
        )


class _Tally:
    """Sums over the modules of one kind."""

    def __init__(self, adapters: int):
        self.having = [0] * adapters
        self.sharing = ([0] * adapters, [0] * adapters)
        self.own_rows, self.own_bits = [0, 0], [0.0, 0.0]
        self.ranks = self.own_bytes = self.shared_bytes = 0
        self.layouts: list[Layout] = []

    def add(self, module: Module, forms: Sequence[Form | None]) -> None:
        """Count one module of all adapters."""
        self.layouts.append(module.layout)
        slots = shared_slots(module.layout, module.out, module.in_)
        self.shared_bytes += sum(part.nbytes for slot in slots for part in slot.parts())
        known: dict[Form, _Use] = {}  # few forms are in many adapters
        for i, form in enumerate(forms):
            if form is None:
                continue
            if form not in known:
                known[form] = _Use.of(form, module)
            use = known[form]
            self.having[i] += 1
            self.ranks += use.rank
            self.own_bytes += use.nbytes
            for side in (0, 1):
                self.sharing[side][i] += use.shares[side]
                self.own_rows[side] += use.own_rows[side]
                self.own_bits[side] += use.own_bits[side]

    def choice(self, kind: str, modules: int, error: float | None) -> Choice:
        """What was counted."""
        return Choice(
            kind,
            modules,
            sum(count > 0 for count in self.having),
            self._side(0),
            self._side(1),
            self.ranks / max(1, sum(self.having)),
            self.own_bytes,
            self.shared_bytes,
            error,
        )

    def _side(self, side: int) -> SideChoice:
        shared = [[s for s in layout if s.side == SIDES[side]] for layout in self.layouts]
        columns = sum(s.columns for each in shared for s in each)
        bits = sum(_row_bits(s.codec, s.columns) for each in shared for s in each)
        bases = sum(map(len, shared))
        sharing = self.sharing[side]
        rows = self.own_rows[side]
        return SideChoice(
            columns=columns / len(self.layouts),
            bases=bases / max(1, sum(map(bool, shared))),
            width=columns / max(1, bases),
            bits=bits / columns if columns else None,
            used=sum(sharing) / max(1, sum(self.having)),
            adapters=sum(2 * s >= h > 0 for s, h in zip(sharing, self.having, strict=True)),
            own_bits=self.own_bits[side] / rows if rows else None,
        )


def _row_bits(name: str, rows: int) -> float:
    """Bits a number of a tensor of so many rows, summed over the rows; scales do not count."""
    by, total = codec(name), 0.0
    while isinstance(by, Mixed):
        first = min(by.count, rows)
        total, rows, by = total + first * _bits_of(by.first), rows - first, by.rest
    return total + rows * _bits_of(by)


def _bits_of(by: Single) -> float:
    match by:
        case Coded():
            return by.rate
        case Integers():
            return by.bits
        case _:
            return 8 * DTYPES[by.dtype].itemsize


def _number(value: float, noun: str = "") -> str:
    """16 columns; 1 column; 14.5."""
    figure = f"{value:.1f}".removesuffix(".0")
    return f"{figure} {noun}{'' if figure == '1' else 's'}" if noun else figure
