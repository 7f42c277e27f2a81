"""Rounding that knows the product, against numpy: feedback by explicit least squares, errors by the second reader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import reader
from hypothesis import given
from hypothesis import strategies as st
from reference import dense, modules, related, stacked, steady, tails, unimodular, zoo
from torch import Tensor

import lorazip
from lorazip import cli, codecs
from lorazip.adapter import LowRank
from lorazip.compress import join, quantize
from lorazip.compress.encode import ModuleCode, encode, prepare
from lorazip.compress.quantize import gauge, product, rounded
from lorazip.compress.spec import Spec
from lorazip.errors import UsageError
from lorazip.manifest import pack_term

ZOO = Path(__file__).parents[2] / "examples" / "zoo"
JOINT = ["jd-full", "jd-diag", "eigenlora", "mean"]
METHODS = ["svd", *JOINT]


def spec(method: str, **options: Any) -> Spec:
    return Spec(method, **{"clusters": None if method == "svd" else 1, **options})


class Parts(reader.Cursor):
    """The second reader on the parts of one adapter or module."""

    def __init__(self, parts: Sequence[Tensor]):
        super().__init__(reader.Tensors({}, b""))
        self.parts = list(parts)

    def run(self, dtype: str, count: int) -> Any:
        part = self.parts.pop(0)
        assert (part.dtype, len(part)) == (codecs.DTYPES[dtype], count)
        return part.float().numpy()


def restored(code: ModuleCode, out: int, in_: int) -> np.ndarray:
    """All D^_i (n, out, in), float64, straight from the stored parts."""
    layout = [[s.side, s.columns, s.codec] for s in code.layout]
    shared = [
        Parts(parts).take(name, columns, out if side == "left" else in_)
        for (side, columns, name), parts in zip(layout, code.shared, strict=True)
    ]
    found = []
    for form, own in zip(code.forms, code.own, strict=True):
        cursor = Parts(own)
        terms = (reader.product(pack_term(t), shared, layout, out, in_, cursor) for t in form)
        found.append(sum(terms, np.zeros((out, in_))))
        assert not cursor.parts
    return np.stack(found)


def errors(code: ModuleCode, factors: Sequence[LowRank]) -> np.ndarray:
    """err of every adapter, dense; 0 for zero matrices."""
    matrices = stacked(list(factors), unit=False).numpy()
    energies = (matrices**2).sum((1, 2))
    lost = ((restored(code, *matrices.shape[1:]) - matrices) ** 2).sum((1, 2))
    return np.asarray(lost / np.where(energies > 0, energies, 1))


def measured(code: ModuleCode) -> np.ndarray:
    energies = code.energies.numpy()
    return np.asarray(code.residuals.numpy() / np.where(energies > 0, energies, 1))


def size(code: ModuleCode) -> int:
    return sum(p.nbytes for parts in (*code.shared, *code.own) for p in parts)


def apart(factors: Sequence[LowRank], rank: int, bits: int) -> float:
    """Mean err of balanced factors that are rounded by themselves, in numpy (a fine search for every scale)."""

    def by_itself(row: np.ndarray) -> np.ndarray:
        most, found, least = 2**bits - 1, row, np.inf
        for scale in np.geomspace(np.abs(row).max() / most / 12, np.abs(row).max() / most, 200):
            tried = scale * np.clip(2 * np.floor(row / scale / 2) + 1, -most, most)
            error = ((tried - row) ** 2).sum()
            if error < least:
                found, least = tried, error
        return found

    lost = []
    for factor in factors:
        matrix = dense(factor).numpy()
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
        left = np.stack([by_itself(u[:, j] * s[j] ** 0.5) for j in range(rank)])
        right = np.stack([by_itself(vt[j] * s[j] ** 0.5) for j in range(rank)])
        lost.append(((left.T @ right - matrix) ** 2).sum() / (s**2).sum())
    return float(np.mean(lost))


# --- the parts of the rounding ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int2", "int4g5", "int3*2+int1"])
def test_feedback_is_least_squares_over_the_rows_that_are_left(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """min ||F (T - Q)|| with the rows so far fixed and the others free, by numpy: that is where row j is rounded."""
    monkeypatch.setattr(quantize, "SWEEPS", 0)
    random = np.random.default_rng(0)
    f, target = random.normal(size=(9, 4)), random.normal(size=(4, 23))
    found = rounded(torch.tensor(target)[None], torch.tensor(f.T @ f)[None], name)
    fixed = np.zeros((0, 23))
    for j in range(4):
        wanted = f @ target - f[:, :j] @ fixed
        row = np.linalg.lstsq(f[:, j:], wanted, rcond=None)[0][:1]
        one = quantize.pieces(name, 4)[j][0]
        tensor = torch.tensor(row, dtype=torch.float32)
        rounded_row = one.decode(one.encode(tensor), (1, 23)).double().numpy()
        assert np.allclose(rounded_row, found.values[0, j].numpy(), rtol=1e-2, atol=1e-6)
        fixed = np.concatenate([fixed, found.values[0, j : j + 1].double().numpy()])


def test_the_last_row_is_the_best_for_all_others() -> None:
    """No other code of any of its numbers lowers the error, by trying all."""
    random = np.random.default_rng(1)
    f, target = random.normal(size=(9, 3)), random.normal(size=(3, 40))
    found = rounded(torch.tensor(target)[None], torch.tensor(f.T @ f)[None], "int2")
    q = found.values[0].double().numpy()
    scale = float(found.scales[2][0, 0])

    def error(candidate: np.ndarray) -> np.ndarray:
        return np.asarray(((f @ (target - candidate)) ** 2).sum(0))

    for odd in (-3, -1, 1, 3):
        other = q.copy()
        other[2] = odd * scale
        assert (error(other) >= error(q) * (1 - 1e-5)).all()


def test_what_is_decoded_is_what_was_rounded() -> None:
    target = torch.randn(3, 5, 37, generator=torch.Generator().manual_seed(0))
    metric = target @ target.mT
    for name in ("int1", "int3g8", "int4t", "int4*2+int2t", "int6t*1+int3*2+int1g7"):
        found = rounded(target, metric, name)
        for i in range(3):
            decoded = codecs.codec(name).decode(found.parts(i), (5, 37))
            assert torch.equal(decoded, found.values[i])


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 13, 16, 29])
@pytest.mark.parametrize("name", ["int4", "int3*3+int2"])
def test_a_gauge_is_orthogonal_and_flat(rows: int, name: str) -> None:
    turn = gauge(name, rows)
    assert torch.allclose(turn @ turn.T, torch.eye(rows).double(), atol=1e-12)
    if name == "int4":
        assert float(turn.abs().max()) <= (2 / rows) ** 0.5 + 1e-12
    elif rows > 3:
        assert (
            not turn[:3, 3:].any() and not turn[3:, :3].any()
        )  # energy stays with the rows that have more bits


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("rank", [2, 4, 8])
def test_the_product_is_nearer_than_that_of_factors_rounded_apart(bits: int, rank: int) -> None:
    """Real adapters, the same bytes: what the truncation leaves out stays, a good part of the rest goes."""
    factors = zoo("8.q_proj")[:4]
    found = float(errors(encode("m", factors, spec("svd", rank=rank, bits=bits)), factors).mean())
    cut = float(np.mean([float(tails(dense(f))[rank]) for f in factors]))
    bare = apart(factors, rank, bits)
    assert cut <= found
    assert found - cut <= {2: 0.9, 4: 0.75, 8: 0.5}[rank] * (bare - cut)


def test_every_step_pays_on_real_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = zoo("20.v_proj")[:6]
    asked = spec("svd", rank=4, bits=2)

    def error() -> float:
        return float(measured(encode("m", factors, asked)).mean())

    whole = error()
    monkeypatch.setattr(quantize, "ROUNDS", 1)
    once = error()
    monkeypatch.setattr(quantize, "SWEEPS", 0)
    unswept = error()
    monkeypatch.setattr(quantize, "gauge", lambda name, rows: torch.eye(rows, dtype=torch.float64))
    straight = error()
    assert whole < 0.98 * once < 0.98 * 0.98 * unswept < 0.8 * straight


# --- what is stored ---------------------------------------------------------------------------------------------------

FEW = [
    {"bits": 4},
    {"bits": 1},
    {"bits": 2.5, "group": 8},
    {"bits": 3, "max_error": 0.2, "rank": None},
]


@given(modules(), st.sampled_from(METHODS), st.sampled_from(FEW), st.integers(1, 6))
@steady
def test_the_measured_error_is_the_dense_one(
    factors: list[LowRank], method: str, options: dict[str, Any], rank: int
) -> None:
    code = encode("m", factors, spec(method, **{"rank": rank, **options}))
    found, wanted = measured(code), errors(code, factors)
    assert (np.abs(np.sqrt(found) - np.sqrt(wanted)) <= 3e-6).all()
    if "max_error" in options:
        assert found.max() <= options["max_error"]


@pytest.mark.parametrize("bound", [0.5, 0.1, 1e-3, 0.0])
@pytest.mark.parametrize("bits", [1, 2.5, 4, 8])
@pytest.mark.parametrize("method", METHODS)
def test_every_adapter_keeps_the_bound(method: str, bits: float, bound: float) -> None:
    for factors in (
        related((4, 3, 4, 2), 24, 40, noise=0.1, scale=16 / 6),
        [LowRank(f.B * 1e-20, f.A, f.scale) for f in related((3, 2), 24, 40)],
        [LowRank(f.B * 1e6, f.A * 1e6, f.scale) for f in related((3, 2), 24, 40)],
    ):
        code = encode("m", factors, spec(method, max_error=bound, bits=bits))
        assert measured(code).max() <= bound
        assert errors(code, factors).max() <= bound + 1e-12


@pytest.mark.parametrize("method", ["svd", "jd-full"])
def test_a_bound_costs_less_with_bits(method: str) -> None:
    factors = zoo("8.q_proj")
    sixteen, few = (encode("m", factors, spec(method, max_error=0.2, bits=b)) for b in (None, 3))
    assert size(few) < 0.4 * size(sixteen)


@pytest.mark.parametrize("method", METHODS)
def test_many_bits_are_the_method_itself(method: str) -> None:
    factors = zoo("15.k_proj")
    plain = measured(encode("m", factors, spec(method, rank=8, dtype="float32")))
    found = measured(encode("m", factors, spec(method, rank=8, bits=8)))
    assert float(np.abs(found - plain).mean()) < 2e-3


def test_bytes_are_bits() -> None:
    """Codes and a scale a column; cores one scale; bases once."""
    factors = zoo("8.q_proj")
    code = encode("m", factors, spec("svd", rank=4, bits=3))
    assert size(code) == 12 * 2 * (4 * 576 * 3 // 8 + 4 * 2)
    code = encode("m", factors, spec("jd-full", rank=10, bits=4, core_bits=6))
    assert size(code) == 2 * (10 * 576 // 2 + 10 * 2) + 12 * (10 * 10 * 6 // 8 + 2)
    assert {name for s in code.layout for name in [s.codec]} == {"int4"}
    assert {form[0].core.codec for form in code.forms} == {"int6t"}


def test_cores_and_bases_have_bits_of_their_own() -> None:
    factors = related((4,) * 6, 40, 48)
    code = encode("m", factors, spec("jd-full", rank=6, basis_bits=2.5, dtype="bfloat16"))
    assert [s.codec for s in code.layout] == ["int3*3+int2", "int3*3+int2"]
    assert code.forms[0][0].core.codec == "bfloat16"
    code = encode("m", factors, spec("jd-full", rank=6, core_bits=2))
    assert [s.codec for s in code.layout] == ["float16"] * 2 and code.forms[0][0].core.codec == "int2t"
    wide = encode("m", factors, spec("jd-full", rank=20, bits=3))  # rank 4 between 20 columns: factored
    assert wide.forms[0][0].core.kind == "factored" and errors(wide, factors).max() < 0.2


def test_bases_make_good_for_rounded_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = zoo("8.q_proj")
    asked = spec("jd-full", rank=16, bits=2)
    together = measured(encode("m", factors, asked)).mean()
    real = quantize.bases
    monkeypatch.setattr(quantize, "bases", lambda *given: real(*given[:5], None))
    assert together < 0.9 * measured(encode("m", factors, asked)).mean()


def test_adapters_of_rank_one_on_bases() -> None:
    factors = related((1,) * 5, 24, 32, noise=0.1)
    for rank in (1, 2, 4):
        code = encode("m", factors, spec("jd-full", rank=rank, bits=6))
        plain = encode("m", factors, spec("jd-full", rank=rank, dtype="float32"))
        assert np.abs(measured(code) - measured(plain)).max() < 0.03


def test_gauge_of_the_adapters_changes_little() -> None:
    plain = related((4, 3, 4), 40, 48, dtype=torch.float32)
    turned = []
    for i, f in enumerate(plain):
        g, inverse = unimodular(f.A.shape[0], seed=i, size=2)
        turned.append(LowRank((f.B.double() @ g).float(), (inverse @ f.A.double()).float(), f.scale))
    asked = spec("svd", rank=3, bits=4)
    one, two = measured(encode("m", plain, asked)), measured(encode("m", turned, asked))
    assert np.abs(one - two).max() < 0.1 * one.max()


def test_the_same_twice_gives_the_same_bytes() -> None:
    factors = zoo("3.q_proj")
    one, two = (encode("m", factors, spec("jd-full", rank=8, bits=2.5)) for _ in range(2))
    for a, b in zip((*one.shared, *one.own), (*two.shared, *two.own), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    module, _ = prepare("m", related((4,) * 7, 40, 48), spec("svd", rank=4))
    sides = module.stack.pad(module.stack.left), module.stack.pad(module.stack.right)
    whole = product(*sides, 3, ("int3", "int3"))
    monkeypatch.setattr(quantize, "CHUNK_ELEMENTS", 1000)
    for one, two in zip(whole, product(*sides, 3, ("int3", "int3")), strict=True):
        assert torch.equal(one.values, two.values)


# --- options and commands ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"bits": 0.5}, "bits must be from 1 to 8, not 0.5"),
        ({"bits": 9}, "bits must be from 1 to 8"),
        ({"bits": "4"}, "bits must be a number"),
        ({"bits": True}, "bits must be a number"),
        ({"bits": float("nan")}, "bits must be from 1 to 8"),
        ({"core_bits": 5}, "core-bits must be one of 1, 2, 3, 4, 6, 8, not 5"),
        ({"core_bits": 2.5}, "core-bits must be a whole number"),
        ({"basis_bits": 0}, "basis-bits must be from 1 to 8"),
        ({"method": "svd", "core_bits": 4}, "svd has no cores"),
        ({"method": "svd", "basis_bits": 4}, "svd has no cores"),
        ({"group": 64}, "give it with bits"),
        ({"bits": 4, "group": 4}, "group must be at least 8"),
        ({"bits": 4, "group": 64.0}, "group must be a whole number"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        Spec(**options)


def test_bits_that_are_not_used_are_not_recorded() -> None:
    assert not {"bits", "core_bits", "basis_bits", "group"} & set(Spec().recorded())
    recorded = Spec("jd-full", bits=4, group=64).recorded()
    assert (recorded["bits"], recorded["group"]) == (4, 64) and "core_bits" not in recorded
    assert Spec(**recorded) == Spec("jd-full", bits=4, group=64)  # type: ignore[arg-type]


def run(*arguments: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(a) for a in arguments])
    assert ended.value.code == 0, arguments


@pytest.mark.parametrize("method", ["svd", "jd-full"])
def test_all_commands_work_on_few_bits(method: str, tmp_path: Path) -> None:
    adapters = [path for path in sorted(ZOO.iterdir()) if path.is_dir()][:4]
    bundle = tmp_path / "team.lorazip"
    options = ["--method", method, "--bits", 3, "--max-error", 0.4, "--report", tmp_path / "page.html"]
    run("compress", *adapters[:3], "-o", bundle, *options)
    run("compress", *adapters[:3], "-o", bundle, *options[:-2], "--resume")  # the same job: nothing to do
    run("verify", bundle, *(x for path in adapters[:3] for x in ("--against", path)))
    run("add", bundle, adapters[3])
    run("verify", bundle, *(x for path in adapters for x in ("--against", path)))
    run("info", bundle)
    run("remove", bundle, adapters[0].name)
    run("export", bundle, "-o", tmp_path / "out")
    opened = lorazip.Bundle.open(bundle)
    assert all(record.error <= 0.4 for record in opened.manifest.adapters)
    names = {
        t.left.codec
        for a in opened.manifest.adapters
        for f in a.forms
        for t in f or ()
        if hasattr(t.left, "codec")
    }
    assert names <= {"int3", "float16"}
    assert join._spec(opened, None, "cpu").bits == 3  # an added one is stored alike


def test_bits_of_the_command(tmp_path: Path) -> None:
    adapters = [path for path in sorted(ZOO.iterdir()) if path.is_dir()][:2]
    options = ["--method", "jd-full", "--rank", 4, "--bits", 2.5, "--core-bits", 6, "--basis-bits", 3]
    run("compress", *adapters, "-o", tmp_path / "x.lorazip", *options, "--group", 64)
    bundle = lorazip.Bundle.open(tmp_path / "x.lorazip")
    assert replace(Spec(**bundle.manifest.options), clusters=None, weights="unit") == Spec(
        "jd-full", rank=4, bits=2.5, core_bits=6, basis_bits=3, group=64
    )
    assert {s.codec for m in bundle.manifest.modules for s in m.layout} == {"int3g64"}
