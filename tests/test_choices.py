"""What is said of a bundle's choices: figures by kind of module that are counted here another way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from handmade import MakeAdapter

from lorazip.bundle import Bundle
from lorazip.choices import choices
from lorazip.cli import group
from lorazip.compress import job
from lorazip.compress.spec import Spec
from lorazip.manifest import Module
from lorazip.terms import Core, Form, Own, Shared, Term

BASIS = (Shared("left", 4, "tcq2u"), Shared("right", 16, "tcq3u"))
Q0, Q1, K0 = (
    Module("m.0.q", 40, 80, (BASIS[1],)),
    Module("m.1.q", 40, 80, (BASIS[1],)),
    Module("m.0.k", 20, 80, BASIS),
)
SCALAR = Core("scalar")


def own(left: Own, right: Own) -> Form:
    return (Term(left, SCALAR, right),)


ALONE = own(Own(4, "tcq3*1+tcq2*2+tcq1"), Own(4, "tcq2u"))
ON_RIGHT = own(Own(2, "tcq2"), Own(2, "tcq1u*1+tcq0", 0, "int4"))
ON_BOTH = own(Own(1, "tcq3", 0, "int6"), Own(1, "tcq0", 1, "int4"))


def test_a_kind_by_hand() -> None:
    """Three adapters, two modules: the shares, ranks, bits and bytes are sums that fit on a page."""
    k, q = choices([Q0, Q1, K0], [[ON_RIGHT, ON_RIGHT, ON_BOTH], [ON_RIGHT, ALONE, None], [ALONE, (), None]])
    assert (q.kind, q.modules, q.adapters, q.error) == ("q", 2, 3, None)
    assert (q.right.columns, q.right.bases, q.right.width, q.right.bits) == (16, 1, 16, 3)
    assert (q.right.used, q.right.adapters) == (3 / 6, 2)
    assert (q.left.columns, q.left.bits, q.left.used, q.left.adapters) == (0, None, 0, 0)
    assert q.rank == (3 * 2 + 2 * 4 + 0) / 6
    assert q.left.own_bits == (2 * (3 + 2 + 2 + 1) + 3 * (2 + 2)) / (2 * 4 + 3 * 2)
    assert q.right.own_bits == (2 * 4 * 2 + 3 * (1 + 0)) / (2 * 4 + 3 * 2)
    assert (k.modules, k.adapters) == (1, 1)
    assert (k.left.columns, k.left.adapters, k.right.adapters) == (4, 1, 1)
    assert (k.left.own_bits, k.right.own_bits) == (3, 0)
    assert (
        "2 of 3 adapters share the right side, in half of their modules or more: 16 columns, 3 bits; what"
        in q.sentence
    )
    assert k.sentence.startswith(
        "k: the adapter shares the right side: 16 columns, 3 bits; the adapter shares the left side: 4 columns"
    )


def test_other_sentences() -> None:
    plain = own(Own(2, "float16"), Own(2, "float16"))
    (alone,) = choices([Q0], [[ALONE], [plain]])
    assert alone.sentence == "q: nothing is shared; rank 3 in the mean, 6.7 bits a number"
    (apart,) = choices([Q0], [[own(Own(1, "tcq3"), Own(1, "int4"))]])
    assert apart.sentence == "q: nothing is shared; rank 1 in the mean, 3 bits left and 4 bits right a number"
    (same,) = choices([Q0], [[plain]])
    assert same.sentence == "q: nothing is shared; rank 2 in the mean, 16 bits a number"
    (none,) = choices([Q0], [[()], [None]])
    assert none.sentence == "q: nothing is kept of it"
    assert none.adapters == 1
    (both,) = choices([Q0], [[ON_RIGHT], [ON_RIGHT]])
    assert both.sentence.startswith("q: both adapters share the right side: 16 columns")
    (one,) = choices([Q0, Q1], [[ON_RIGHT, ALONE]])
    assert one.sentence.startswith("q: the adapter shares the right side, in half of its modules or more: 16")
    many = [replace(Q0, name=f"m.{i}.q") for i in range(4)]
    (few,) = choices(many, [[ON_RIGHT, ALONE, ALONE, ALONE]])
    assert few.sentence.startswith(
        "q: 25.0 % of the adapters’ modules share the right side: 16 columns, 3 bits"
    )
    layout = tuple(Shared(side, 6, "int4") for side in ("left", "right") for _ in range(3))  # type: ignore[arg-type]
    core: Form = (Term(0, Core("full", "float16"), 3),)
    (bases,) = choices([replace(Q0, layout=layout)], [[core], [core]])
    assert bases.sentence.startswith("q: both adapters share both sides: 3 bases of 6 columns, 4 bits; ")
    assert (bases.rank, bases.left.own_bits) == (6, None)


def test_the_error_is_parted() -> None:
    k, q = choices([Q0, Q1, K0], [[ALONE, ALONE, ALONE]], [0.01, 0.02, 0.07])
    assert (k.error, q.error) == pytest.approx((0.7, 0.3))
    assert [c.error for c in choices([Q0, K0], [[(), ()]], [0.0, 0.0])] == [0, 0]


MODULES = {"a.q_proj": (96, 160), "a.k_proj": (48, 160), "b.q_proj": (96, 160), "b.k_proj": (48, 160)}


@pytest.fixture
def zoo(make_adapter: MakeAdapter) -> Path:
    """Six adapters from one start, so that sharing pays."""
    for name in ("ant", "bee", "cat", "dog", "elk", "fox"):
        make_adapter(f"zoo/{name}", modules=MODULES, a_seed=1)
    return make_adapter.root / "zoo"


@pytest.mark.parametrize(
    "options",
    [{"method": "auto", "ratio": 6.0}, {"method": "jd-full", "rank": 3}, {"method": "svd", "rank": 1}],
)
def test_the_bytes_are_those_on_disk(zoo: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    outcome = job.run([zoo], Spec(**options, device="cpu"), tmp_path / "b")
    assert outcome.bundle is not None
    sizes: dict[str, int] = {"shared": 0, "own": 0}
    for path in (tmp_path / "b").rglob("*.safetensors"):
        head = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        sizes["shared" if path.name == "shared.safetensors" else "own"] += path.stat().st_size - head
    assert sum(c.shared_bytes for c in outcome.choices) == sizes["shared"]
    assert sum(c.own_bytes for c in outcome.choices) == sizes["own"]
    assert sum(c.error or 0 for c in outcome.choices) == pytest.approx(1)
    if options["method"] == "auto":
        assert all(c.right.used >= 0.5 for c in outcome.choices)  # they have one A


def test_a_dry_run_knows_them_too(zoo: Path, tmp_path: Path) -> None:
    spec = Spec("auto", ratio=6.0, device="cpu")
    dry, wet = job.run([zoo], spec, None), job.run([zoo], spec, tmp_path / "b")
    assert [replace(c, error=None) for c in dry.choices] == [replace(c, error=None) for c in wet.choices]


def test_info_says_what_the_outcome_says(zoo: Path, tmp_path: Path) -> None:
    outcome = job.run([zoo], Spec("auto", ratio=6.0, device="cpu"), tmp_path / "b")
    manifest = Bundle.open(tmp_path / "b").manifest
    found = choices(manifest.modules, [a.forms for a in manifest.adapters])
    assert found == tuple(replace(c, error=None) for c in outcome.choices)
    told = CliRunner().invoke(group, ["info", str(tmp_path / "b")]).output
    assert all(choice.sentence in told for choice in found)
    listed = json.loads(CliRunner().invoke(group, ["info", str(tmp_path / "b"), "--json"]).output)["choices"]
    assert [c["sentence"] for c in listed] == [c.sentence for c in found]
    assert [c["right"]["used"] for c in listed] == [c.right.used for c in found]
