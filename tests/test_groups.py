"""Shared-init groups: found through any gauge and rank, on real adapters, quickly for many."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path

import pytest
import torch
from handmade import MakeAdapter
from torch import Tensor

from lorazip.adapter import open_adapter
from lorazip.compress.groups import THRESHOLD, excess, shared_init_groups
from lorazip.sources import open_adapters

ZOO = Path(__file__).parents[1] / "examples" / "zoo"
WIDE = {f"model.layers.{layer}.self_attn.q_proj": (32, 96) for layer in range(3)}


def started(seed: int, rank: int = 8, width: int = 256, moved: float = 0.0) -> Tensor:
    """A random A (rank, width) of this seed; `moved` is how far it went from there, as a share of its norm."""
    random = torch.Generator().manual_seed(seed)
    start = torch.randn(rank, width, generator=random)
    return start + moved * torch.randn(rank, width)


def test_zoo_groups_are_those_of_its_scores() -> None:
    records = [json.loads(line) for line in (ZOO / "scores.jsonl").read_text().splitlines()]
    adapters = open_adapters([str(ZOO)]).adapters
    present = {adapter.name for adapter in adapters}
    shared = sorted(r["task"] for r in records if r["init"] == "shared" and r["task"] in present)
    assert len(shared) == 6
    assert shared_init_groups(adapters) == [shared]


def test_zoo_separates_widely() -> None:
    records = [json.loads(line) for line in (ZOO / "scores.jsonl").read_text().splitlines()]
    init = {record["task"]: record["init"] for record in records}
    adapters = open_adapters([str(ZOO)]).adapters
    shared = torch.tensor([init[adapter.name] == "shared" for adapter in adapters])
    same = (shared[:, None] & shared).triu(1)
    other = ~(shared[:, None] & shared) & torch.ones_like(same).triu(1)
    for module in list(adapters[0].modules)[::15]:
        found = excess([adapter.low_rank(module).A for adapter in adapters])
        assert float(found[same].min()) > 0.75 > THRESHOLD > 0.1 > float(found[other].max())


def test_excess_is_one_for_equal_and_zero_for_random_row_spaces() -> None:
    found = excess([started(1), started(1, moved=1e-4), started(2), started(3)])
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, found.T)
    assert float(found[0, 1]) > 0.999
    assert float(found[2:, :2].abs().max()) < 0.05


def test_excess_agrees_with_principal_angles() -> None:
    torch.manual_seed(0)
    factors = [torch.randn(rank, 50) for rank in (3, 7, 5)]
    factors[2][:2] = factors[0][:2] + 0.3 * torch.randn(2, 50)
    found = excess(factors)
    for i, first in enumerate(factors):
        for j, second in enumerate(factors):
            cosines = torch.linalg.svdvals(torch.linalg.qr(first.T).Q.T @ torch.linalg.qr(second.T).Q)
            overlap = float(cosines.square().sum()) / min(len(first), len(second))
            chance = max(len(first), len(second)) / 50
            assert float(found[i, j]) == pytest.approx((overlap - chance) / (1 - chance), abs=1e-5)


def test_gauge_changes_nothing() -> None:
    torch.manual_seed(0)
    factors = [started(1, moved=0.3), started(1, moved=0.3), started(2)]
    gauges = [torch.randn(8, 8) * 10.0**power for power in (-4, 0, 4)]
    turned = [gauge @ factor for gauge, factor in zip(gauges, factors, strict=True)]
    torch.testing.assert_close(excess(turned), excess(factors), rtol=0, atol=1e-4)


def test_ranks_may_differ() -> None:
    small, large = started(1, rank=8), torch.cat([started(1, rank=8), started(5, rank=24)])
    assert float(excess([small, large])[0, 1]) == pytest.approx(1, abs=1e-5)
    assert abs(float(excess([started(2, rank=8), large])[0, 1])) < 0.1


def test_dependent_rows_and_zeros_do_not_make_groups() -> None:
    thin = started(1)
    thin[4:] = thin[:4]
    found = excess([thin, started(2), torch.zeros(8, 256), torch.zeros(8, 256), torch.zeros(0, 256)])
    assert float(found[0, 0]) == pytest.approx(1, abs=1e-5)
    assert float(found[0, 1]) < 0.05
    assert float(found[2:].abs().max()) == 0


def test_a_whole_row_space_says_nothing() -> None:
    assert excess([torch.randn(16, 16), torch.randn(16, 16)]).abs().max() == 0


def test_blocks_and_half_precision_agree() -> None:
    factors = [started(seed % 40, rank=8 + seed % 3, moved=0.2) for seed in range(150)]  # several blocks
    found = excess(factors)
    torch.testing.assert_close(found, found.T)
    alone = excess([factors[3], factors[120]])
    assert float(found[3, 120]) == pytest.approx(float(alone[0, 1]), abs=1e-6)
    torch.testing.assert_close(excess([f.bfloat16() for f in factors]), found, rtol=0, atol=1e-2)


def test_components_of_several_module_sets(make_adapter: MakeAdapter) -> None:
    other = {name.replace("q_proj", "v_proj"): shape for name, shape in WIDE.items()}
    made = {
        "b": make_adapter("b", modules=WIDE, a_seed=1),
        "a": make_adapter("a", modules=WIDE | other, a_seed=1),
        "c": make_adapter("c", modules=other, a_seed=7),
        "d": make_adapter("d", modules=other, a_seed=7),
        "e": make_adapter("e", modules=WIDE, seed=5),
        "f": make_adapter("f", modules=WIDE | other, seed=6),
    }
    adapters = [open_adapter(path, name) for name, path in made.items()]
    assert shared_init_groups(adapters) == [["a", "b"], ["c", "d"]]
    assert shared_init_groups(adapters[::-1]) == [["a", "b"], ["c", "d"]]


def test_late_adapters_join_earlier_groups(make_adapter: MakeAdapter) -> None:
    other = {name.replace("q_proj", "v_proj"): shape for name, shape in WIDE.items()}
    a, b = (make_adapter(name, modules=other | WIDE, a_seed=1) for name in "ab")
    c = make_adapter("c", modules=other, a_seed=1)  # the same generator gives its v_proj the same A
    found = shared_init_groups([open_adapter(path, path.name) for path in (c, a, b)])
    assert found == [["a", "b", "c"]]


def test_no_groups(make_adapter: MakeAdapter) -> None:
    alone = open_adapter(make_adapter("a", modules=WIDE), "a")
    assert shared_init_groups([alone]) == []
    assert shared_init_groups([]) == []
    bare = copy.copy(alone)
    bare.modules = {}
    assert shared_init_groups([bare, bare]) == []


def test_hundreds_take_seconds() -> None:
    factors = [torch.randn(16, 4096).half() for _ in range(100)] * 5  # 500 of rank 16
    begun = time.perf_counter()
    found = excess(factors)
    assert time.perf_counter() - begun < 60  # 4 s on one free core
    assert int((found >= THRESHOLD).sum()) == 500 * 5
