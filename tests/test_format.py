"""docs/FORMAT.md holds: another reader gets the same numbers, old bundles stay readable."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import make, reader
from handmade import MakeAdapter
from safetensors import safe_open
from safetensors.torch import load_file

import lorazip
from lorazip import codecs, edit, export, numbers, trellis
from lorazip.bundle import Bundle

ROOT = Path(__file__).parents[1]
GOLDEN = sorted((ROOT / "tests" / "golden" / "v1").glob("*.lorazip"))
LATER = [
    path
    for folder in ("v1-integers", "v1-trellis")
    for path in sorted((ROOT / "tests" / "golden" / folder).glob("*.lorazip"))
]
ZOO = ROOT / "examples" / "zoo"
PREFIX = "base_model.model."
TINY = {"layers.0.k_proj": (8, 16), "layers.0.q_proj": (16, 16), "layers.1.q_proj": (16, 16)}


# bundles that are written by hand, and how many files each has
BY_HAND = [
    (make.example, 5), (make.forms, 6), (make.integers, 5),
    (make.rates, 5), (make.mixtures, 5), (make.parts, 6), (make.digit, 4), (make.digits, 4),
]  # fmt: skip


def assert_equal_readers(path: Path) -> reader.Bundle:
    """lorazip and the reader of docs/FORMAT.md see the same adapters, modules, configs, tensors and matrices."""
    ours, other = Bundle.open(path), reader.Bundle(path)
    assert ours.names == other.names
    for adapter in ours:
        assert adapter.config == other.config(adapter.name)
        matrices = other.matrices(adapter.name)
        assert list(adapter.modules) == list(matrices)
        for module, dense in matrices.items():
            factor = adapter.low_rank(module)
            product = factor.scale * factor.B.double().numpy() @ factor.A.double().numpy()
            assert product.shape == dense.shape
            assert np.linalg.norm(product - dense) <= 1e-6 * np.linalg.norm(dense)
        carried = other.carried(adapter.name)
        assert {k: (i.dtype, i.shape) for k, i in adapter.extras.items()} == {
            key: (dtype, shape) for key, (dtype, shape, _) in carried.items()
        }
        for key, (_, _, data) in carried.items():
            assert bytes(adapter.extra(key).flatten().view(torch.uint8).tolist()) == data
    return other


def test_the_fixtures_are_there() -> None:
    by_hand = {write.__name__ for write, _ in BY_HAND}
    compressed = {*make.COMPRESSED, *make.FEW_BITS, *make.TRELLIS}
    assert {path.stem for path in GOLDEN + LATER} == by_hand | compressed
    for folder in {path.parent for path in GOLDEN + LATER}:
        assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 100_000


@pytest.mark.parametrize("path", GOLDEN + LATER, ids=lambda path: path.stem)
def test_old_bundles_are_read(path: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(path)
    assert bundle.verify() == []
    assert bundle.strays() == []
    other = assert_equal_readers(path)
    with np.load(path.with_suffix(".npz"), allow_pickle=False) as expected:
        found = {f"{name}/{m}": d for name in other.names for m, d in other.matrices(name).items()}
        assert set(expected) == set(found)
        for key, dense in found.items():
            assert np.linalg.norm(dense - expected[key]) <= 1e-6 * np.linalg.norm(expected[key])


@pytest.mark.parametrize(
    "path",
    [p for p in GOLDEN + LATER if p.stem in {*make.COMPRESSED, *make.FEW_BITS, *make.TRELLIS}],
    ids=lambda path: path.stem,
)
def test_old_bundles_are_exported(path: Path, tmp_path: Path) -> None:
    other = reader.Bundle(path)
    for done in export.export(Bundle.open(path), [], tmp_path / "out"):
        tensors = load_file(done.directory / "adapter_model.safetensors")
        for module, dense in other.matrices(done.name).items():
            a, b = (tensors[f"{PREFIX}{module}.lora_{side}.weight"].double().numpy() for side in "AB")
            assert np.linalg.norm(b @ a - dense) <= 1e-6 * np.linalg.norm(dense)


@pytest.mark.parametrize("path", GOLDEN + LATER, ids=lambda path: path.stem)
def test_an_adapter_is_the_same_in_a_smaller_bundle(path: Path, tmp_path: Path) -> None:
    """Shared tensors that nobody else needs are left out, and the others renumbered."""
    whole = reader.Bundle(path)
    for name in whole.names:
        edit.subset(Bundle.open(path), [name], tmp_path / name)
        found = assert_equal_readers(tmp_path / name).matrices(name)
        assert all(np.array_equal(found[key], dense) for key, dense in whole.matrices(name).items())


@pytest.mark.parametrize(("write", "count"), BY_HAND, ids=lambda value: getattr(value, "__name__", ""))
def test_the_same_content_has_the_same_bytes_as_ever(
    write: Callable[[Path], None], count: int, tmp_path: Path
) -> None:
    write(tmp_path / "new")
    old = next(path for path in GOLDEN + LATER if path.stem == write.__name__)
    files = [path.relative_to(old) for path in old.rglob("*") if path.is_file()]
    assert len(files) == count
    for name in files:
        assert (tmp_path / "new" / name).read_bytes() == (old / name).read_bytes()


def test_forms_are_texts_where_that_is_much_shorter() -> None:
    read = {
        path.stem: [a["forms"] for a in reader.Bundle(path).manifest["adapters"]] for path in GOLDEN + LATER
    }
    texts = {name: [packed for packed in all_ if isinstance(packed, str)] for name, all_ in read.items()}
    assert [len(packed) for packed in texts.pop("digit")] == [20]
    assert [len(packed) for packed in texts.pop("digits")] == [2 * 75]
    assert not any(texts.values())  # so short that lists are left readable
    assert reader.runs("DAB", 3) == [2, -1, 0] and reader.runs("BAAAAB", 3) == [63, -1, 0]
    for values in ([2, -1, 0], [63, -1, 0], [-1, 61, 62] * 9, [4094, *range(400)], [*range(4095), 4095]):
        packed = numbers.shorter(values)
        assert reader.runs(packed, len(values)) == values
        assert isinstance(packed, str) == (len(values) in (27, 401))


def test_the_tables_are_those_of_the_specification() -> None:
    text = (ROOT / "docs" / "FORMAT.md").read_text()
    (digest,) = re.findall(r"The file has sha256\n`([0-9a-f]{64})`", text)
    assert digest == reader.TABLES_SHA256 == hashlib.sha256(trellis.TABLES.read_bytes()).hexdigest()
    for name, values in (("R", reader.STEPS), ("k", [k for k, _ in trellis.RATES.values()]),
                         ("v", [v for _, v in trellis.RATES.values()])):  # fmt: skip
        assert f"| {name} | " + " | ".join(map(str, values)) + " |\n" in text
    assert f"`0x{trellis.SIGNS:X}`" in text
    assert {k: v.shape for k, v in reader.tables().items()} == {
        trellis.name(rate): (1024, v) for rate, (_, v) in trellis.RATES.items()
    }
    # its example: byte 19 are the codes 3 0 1
    found = codecs.codec("tcq2u").decode([torch.tensor([19], dtype=torch.uint8), torch.zeros(0)], (1, 3))
    assert found[0].tolist() == reader.tables()["2"][[3, 12, 49], 0].tolist()


def test_the_worked_example_is_that_of_the_specification() -> None:
    text = (ROOT / "docs" / "FORMAT.md").read_text()
    (shown,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    path = ROOT / "tests" / "golden" / "v1" / "example.lorazip"
    assert shown.encode() == (path / "bundle.json").read_bytes()
    example = reader.Bundle(path)
    assert example.matrices("one")["a"].tolist() == [[4, 0, -4], [8, 0, -8]]
    assert example.matrices("one")["b"].tolist() == [[1, 3], [0, 0]]
    assert {k: d.tolist() for k, d in example.matrices("two").items()} == {"a": [[1, 1, 1], [2, 2, 2]]}
    shared = (path / "shared.safetensors").read_bytes()
    assert int.from_bytes(shared[:8], "little") == 64
    assert len(shared) == 82
    assert np.frombuffer(shared[76:], "<f2").tolist() == [1, 0, -1]
    for number in ("8 + 64 = 72", "72 + 2 · 2 = 76", "72 + 5 · 2 = 82"):
        assert number in text


# --- fresh bundles of every method ---------------------------------------------------------------------------------

SPECS = {
    "svd by energy": lorazip.Spec("svd", energy=0.9),
    "svd by error": lorazip.Spec("svd", max_error=0.02, dtype="bfloat16"),
    "jd-full in two clusters": lorazip.Spec("jd-full", rank=6, clusters=2),
    "jd-full by error": lorazip.Spec("jd-full", max_error=0.2, dtype="float32"),
    "jd-full with factored cores": lorazip.Spec("jd-full", rank=12),
    "jd-diag": lorazip.Spec("jd-diag", rank=5, clusters=2),
    "eigenlora": lorazip.Spec("eigenlora", rank=5),
    "mean": lorazip.Spec("mean"),
    "svd in 3 bits": lorazip.Spec("svd", rank=3, bits=3, group=8),
    "svd by error in 2 and 3 bits": lorazip.Spec("svd", max_error=0.3, bits=2.5),
    "jd-full in 4 bits": lorazip.Spec("jd-full", rank=6, clusters=2, bits=4),
    "jd-full by error in 4 bits": lorazip.Spec("jd-full", max_error=0.2, bits=4),
    "jd-full with mixed bases": lorazip.Spec("jd-full", rank=12, bits=3, basis_bits=1.5),
    "jd-diag in 6 bits": lorazip.Spec("jd-diag", rank=5, bits=6, core_bits=8),
    "eigenlora with bases in 2 bits": lorazip.Spec("eigenlora", rank=5, basis_bits=2),
    "mean in 1 bit": lorazip.Spec("mean", bits=1),
}


@pytest.fixture
def inputs(make_adapter: MakeAdapter) -> list[Path]:
    """Two adapters of one start and two others: several types and ranks, carried tensors, absent modules."""
    few = {name: TINY[name] for name in list(TINY)[1:2]}
    key = f"{PREFIX}layers.0.q_proj.lora_B.bias"
    return [
        make_adapter("in/ant", modules=TINY, a_seed=1, seed=2),
        make_adapter("in/bee", modules=TINY, a_seed=1, seed=2, dtype=torch.bfloat16, alpha=3),
        make_adapter("in/cat", modules=TINY, rank=2, dtype=torch.float16, use_rslora=True),
        make_adapter("in/dog", modules=few, tensors={key: torch.arange(16.0)}, lora_bias=True),
    ]


@pytest.mark.parametrize("name", SPECS)
def test_another_reader_gets_the_same_matrices(name: str, inputs: list[Path], tmp_path: Path) -> None:
    bundle = lorazip.compress(inputs, SPECS[name], tmp_path / "x.lorazip")
    other = assert_equal_readers(bundle.path)
    if name == "jd-full by error":
        forms = other.manifest["forms"]
        assert any(isinstance(term[0], int) for form in forms for term in form)
        assert any(isinstance(term[0], list) for form in forms for term in form)
    if name == "jd-full with factored cores":
        assert any(term[1][0] == "factored" for form in other.manifest["forms"] for term in form)
    if name == "jd-full in two clusters":
        assert max(len(layout) for layout in other.manifest["layouts"]) == 4
    assert list(other.carried("dog")) == [f"{PREFIX}layers.0.q_proj.lora_B.bias"]


def test_manifest_and_headers_are_small(tmp_path: Path) -> None:
    """At most 1.5 kB an adapter (issue: a header entry for each tensor would be 23 kB)."""
    bits = lorazip.Spec("jd-full", rank=6, bits=2.5, max_error=0.3)
    for spec in (lorazip.Spec("jd-full", rank=2, clusters=2), lorazip.Spec("svd", max_error=0.05), bits):
        path = lorazip.compress([ZOO], spec, tmp_path / f"{spec.method}{spec.bits}").path
        overhead = (path / "bundle.json").stat().st_size
        files = list(path.rglob("*.safetensors"))
        for file in files:
            with file.open("rb") as stream:
                overhead += 8 + int.from_bytes(stream.read(8), "little")
        assert len(list(path.glob("adapters/*"))) == 12
        assert overhead / 12 <= 1500
        for file in files:  # and they are ordinary safetensors files
            with safe_open(file, framework="np") as opened:
                assert set(opened.keys()) <= {"F32", "F16", "BF16", "U8"}
