"""The results of one zoo, found in the file of frontier.py, and how the page writes them.

A cell is a method at a ratio. One that is not measured yet is written as …, one that no budget allows as –.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from frontier_measure import Row, Store, Subset
from frontier_methods import TITLES

PENDING, ABSENT = "…", "–"


@dataclass(frozen=True)
class Found:
    """The results of one zoo.

    Attributes:
        cells, kept: by digest of the adapters, method and ratio.
        peers: by digest of the adapters and name.
    """

    subsets: Mapping[str, Subset]
    cells: dict[tuple[str, str, float], Row]
    kept: dict[tuple[str, str, float], Row]
    peers: dict[tuple[str, str], Row]

    @staticmethod
    def of(store: Store, subsets: Mapping[str, Subset]) -> Found:
        """Those of these adapters, the last of each kind."""
        found = Found(subsets, {}, {}, {})
        for row in store.rows:
            key = row["key"]
            if key["kind"] in ("cell", "kept"):
                table = found.cells if key["kind"] == "cell" else found.kept
                table[key["adapters"], key["method"], key["ratio"]] = row
            elif key["kind"] == "peer":
                found.peers[key["adapters"], key["peer"]] = row
        return found

    def rows(self) -> list[Row]:
        """All that the page shows."""
        known = {subset.digest for subset in self.subsets.values()}
        rows = [*self.cells.values(), *self.kept.values(), *self.peers.values()]
        return [row for row in rows if row["key"]["adapters"] in known]

    def ratios(self, digest: str) -> list[float]:
        """The ratios at which anything of these adapters is measured."""
        return sorted({ratio for known, _, ratio in self.cells if known == digest})

    def others(self, digest: str, ratio: float) -> dict[str, Row]:
        """The published methods' cells that are measured, by method."""
        methods = [method for method in TITLES if method != "auto"]
        return {m: self.cells[digest, m, ratio] for m in methods if (digest, m, ratio) in self.cells}


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown, numbers on the right."""
    marks = ["---" if name in ("method", "setting", "adapters", "adapter") else "---:" for name in heads]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [heads, marks, *rows])


def named(label: str, subset: Subset) -> str:
    """A subset in words."""
    count = len(subset.adapters)
    return {"all": f"all {count}", "shared": f"{count}, shared start", "own": f"{count}, own starts"}.get(
        label, label
    )


def figure(row: Row | None, name: str) -> str:
    """One figure of a cell."""
    if row is None:
        return PENDING
    return f"{row['figures'][name]:.4f}" if row["figures"] else ABSENT
