"""docs/FORMAT.md holds: another reader gets the same numbers, old bundles stay readable, limits and checksums bite."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import make, reader
from handmade import MakeAdapter
from safetensors import safe_open
from safetensors.torch import load_file

import lorazip
from lorazip import cli, codecs, edit, export, numbers, trellis
from lorazip.bundle import Bundle
from lorazip.errors import BundleError

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


# --- damage --------------------------------------------------------------------------------------------------------


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A copy of an old bundle with everything in it: shared and own tensors, carried ones, three dtypes."""
    return Path(shutil.copytree(GOLDEN[0].parent / "bound.lorazip", tmp_path / "victim.lorazip"))


def verify(path: Path) -> int:
    """The exit code of `lorazip verify`."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["verify", str(path)])
    code = ended.value.code
    assert isinstance(code, int)
    return code


def positions(size: int, most: int) -> Iterator[int]:
    """All positions of a small file; else evenly many, and both ends."""
    return iter(sorted({0, size - 1, *range(0, size, max(1, size // most))}))


def test_a_whole_bundle_verifies(victim: Path) -> None:
    assert verify(victim) == 0


def test_a_flipped_bit_of_the_manifest_fails(victim: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = victim / "bundle.json"
    whole = file.read_bytes()
    for at in positions(len(whole), 4000):
        for bit in range(8) if at < reader.FIRST_LINE else [at % 8]:
            data = bytearray(whole)
            data[at] ^= 1 << bit
            file.write_bytes(data)
            assert verify(victim) == 1, (at, bit)
    out, err = capsys.readouterr()
    assert out == ""
    assert all(line.startswith("error: ") for line in err.splitlines())


@pytest.mark.parametrize(
    "name", ["shared.safetensors", "adapters/cow.safetensors", "adapters/fox.safetensors", "README.md"]
)
def test_a_flipped_bit_of_a_file_fails(name: str, victim: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = victim / name
    whole = file.read_bytes()
    for at in positions(len(whole), 600):
        data = bytearray(whole)
        data[at] ^= 1 << (at % 8)
        file.write_bytes(data)
        assert verify(victim) == 1, at
    assert name.split("/")[-1] in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file.unlink(),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        lambda file: file.write_bytes(file.read_bytes() + b"\n"),
    ],
    ids=["missing", "empty", "truncated", "longer"],
)
def test_a_missing_or_resized_file_fails(change: Callable[[Path], Any], victim: Path) -> None:
    files = [path for path in sorted(victim.rglob("*")) if path.is_file()]
    assert len(files) == 6
    for file in files:
        whole = file.read_bytes()
        change(file)
        assert verify(victim) == 1, file
        file.write_bytes(whole)


def test_swapped_adapters_fail(victim: Path) -> None:
    """The checksum belongs to the name, and D of one adapter is never given out as another's."""
    cow, emu = (victim / "adapters" / f"{name}.safetensors" for name in ("cow", "emu"))
    cow.rename(victim / "x")
    emu.rename(cow)
    (victim / "x").rename(emu)
    assert verify(victim) == 1


# --- limits: manifests with a right digest that are wrong ----------------------------------------------------------

Body = dict[str, Any]


def rewrite(path: Path, change: Callable[[Body], Any]) -> None:
    """Change the manifest and give it its right digest: a bundle made by somebody else."""
    body = json.loads((path / "bundle.json").read_bytes())
    del body["digest"]
    change(body)
    rest = json.dumps(body)[1:].encode()
    first = b'{"digest":"%s",\n' % hashlib.sha256(rest).hexdigest().encode()
    (path / "bundle.json").write_bytes(first + rest)


def adapter(**values: Any) -> Callable[[Body], Any]:
    return lambda body: body["adapters"][0].update(values)


def form(*terms: Any) -> Callable[[Body], Any]:
    return lambda body: body["forms"].__setitem__(0, list(terms))


OWN = [1, "float16"]
LIMITS: dict[str, tuple[Callable[[Body], Any], str]] = {
    "format": (lambda b: b.update(format="zip"), "format 'zip'"),
    "version 2": (lambda b: b.update(version=2), "version 2; this lorazip reads 1 (upgrade it)"),
    "version true": (lambda b: b.update(version=True), "version True"),
    "a key is missing": (lambda b: b.pop("forms"), "KeyError('forms')"),
    "config no object": (lambda b: b.update(config=[["r", 8]]), "is not an object"),
    "options no object": (lambda b: b.update(options=[]), "is not an object"),
    "skipped no list": (lambda b: b.update(skipped="abc"), "is not a list"),
    "base no object": (lambda b: b.update(base="x"), "TypeError"),
    "deep": (lambda b: b.update(options=json.loads('{"a":' * 40 + "1" + "}" * 40)), "nested too deeply"),
    "unknown codec of a shared tensor": (
        lambda b: b["layouts"][0].append(["left", 1, "int9"]),
        "codec 'int9' is not known",
    ),
    "a codec of 5 bits": (form([0, ["full", "int5"], 1]), "codec 'int5' is not known"),
    "a codec of no group": (form([0, ["full", "int4g0"], 1]), "codec 'int4g0' is not known"),
    "a mixture of a mixture": (form([0, ["full", "int4*1+int1*1"], 1]), "codec 'int4*1+int1*1' is not known"),
    "a trellis code of 7 bits": (form([0, ["full", "tcq7"], 1]), "codec 'tcq7' is not known"),
    "a core of nothing": (form([0, ["full", "tcq0"], 1]), "codec 'tcq0' has tcq0, which only"),
    "a core of nothing in its last rows": (form([0, ["full", "int4*1+tcq0"], 1]), "has tcq0, which only"),
    "a shared tensor of nothing": (
        lambda b: b["layouts"][0].append(["left", 2**40, "tcq0"]),
        "has tcq0, which only",
    ),
    "loadings of nothing": (
        form([[2, "tcq0", 0, "tcq0"], ["scalar", 1], [2, "int4"]]),
        "has tcq0, which only",
    ),
    "2**40 columns of nothing": (
        form([[2**40, "tcq0"], ["scalar", 1], [2**40, "tcq0"]]),
        "2199023255552 columns of nothing",
    ),
    "many columns of nothing in a mixture": (
        form([[2**25, "tcq0*9999999+int1t"], ["scalar", 1], [2**25, "int1t*1+tcq0"]]),
        "43554430 columns of nothing",
    ),
    "many terms of nothing": (
        form(*[[[2**18, "tcq0"], ["scalar", 1], [2**18, "tcq0"]]] * 64),
        "columns of nothing",
    ),
    "in part shared beyond the layout": (
        form([[1, "float16", 2, "int4"], ["scalar", 1], OWN]),
        "no shared left tensor 2",
    ),
    "in part shared on a right tensor": (
        form([[1, "float16", 1, "int4"], ["scalar", 1], OWN]),
        "no shared left tensor 1",
    ),
    "in part shared on a left tensor": (
        form([OWN, ["scalar", 1], [1, "float16", 0, "int4"]]),
        "no shared right tensor 0",
    ),
    "in part shared on tensor -1": (
        form([[1, "float16", -1, "int4"], ["scalar", 1], OWN]),
        "-1 is not a count",
    ),
    "in part shared on tensor true": (
        form([[1, "float16", True, "int4"], ["scalar", 1], OWN]),
        "True is not a count",
    ),
    "loadings of an unknown codec": (
        form([[1, "float16", 0, "int5"], ["scalar", 1], OWN]),
        "codec 'int5' is not known",
    ),
    "loadings without a codec": (form([[1, "float16", 0], ["scalar", 1], OWN]), "not enough values"),
    "a factor of five things": (form([[1, "float16", 0, "int4", 0], ["scalar", 1], OWN]), "too many values"),
    "a factor that is a text": (form(["ab", ["scalar", 1], OWN]), "is not a count"),
    "a codec of many names": (form([0, ["full", "int4*1+" * 20 + "int1"], 1]), "is not known"),
    "a codec that is no text": (form([0, ["full", ["int4"]], 1]), "is not a text"),
    "unknown codec": (form([0, ["full", "int9"], 1]), "codec 'int9' is not known"),
    "unknown core": (form([0, ["sparse", "float16"], 1]), "core ['sparse', 'float16']"),
    "unknown side": (lambda b: b["layouts"][0].append(["top", 1, "float16"]), "side 'top'"),
    "shared index beyond the layout": (form([2, ["full", "float16"], 1]), "no shared left tensor 2"),
    "negative shared index": (form([-1, ["full", "float16"], 1]), "no shared left tensor -1"),
    "right tensor on the left": (form([1, ["full", "float16"], 1]), "no shared left tensor 1"),
    "columns do not meet": (form([0, ["diagonal", "float16"], OWN]), "2 columns meet 1"),
    "factored wider than its sides": (form([0, ["factored", "float16", 3], 1]), "rank 3 between [2, 2]"),
    "no columns": (form([[0, "float16"], ["scalar", 1], [0, "float16"]]), "0 is not a count"),
    "2**60 columns": (form([[2**60, "float16"], ["scalar", 1], OWN]), "is not a count"),
    "columns of 1.0": (form([[1.0, "float16"], ["scalar", 1], OWN]), "1.0 is not a count"),
    "a scalar of 400 digits": (form([OWN, ["scalar", 10**400], OWN]), "is not a number of float32"),
    "a scalar of 1e39": (form([OWN, ["scalar", 1e39], OWN]), "is not a number of float32"),
    "a scalar of true": (form([OWN, ["scalar", True], OWN]), "True is not a number"),
    "65 terms": (form(*[[0, ["scalar", 1], 1]] * 65), "a form has 65 terms, at most 64"),
    "a run that is too long": (adapter(forms=[[0, 10**15]]), "forms of cow: [0, 1000000000000000]"),
    "many runs": (adapter(forms=[[0, 2]] * 10**4), "forms of cow: [0, 2]"),
    "too few forms": (adapter(forms=[0]), "forms of cow has 1 entries for 2 modules"),
    "a form that is not there": (adapter(forms=[0, 99]), "forms of cow: 99"),
    "forms of another digit": (adapter(forms="B-"), "'-' is not a digit of base 64"),
    "forms of a digit of another script": (adapter(forms="B١"), "is not a digit of base 64"),
    "forms of a few digits": (adapter(forms="B"), "a text of 1 digits for 2 modules"),
    "forms of no digits": (adapter(forms=""), "a text of 0 digits for 2 modules"),
    "forms of three digits for two": (adapter(forms="ABA"), "a text of 3 digits for 2 modules"),
    "forms of three digits each": (adapter(forms="AAAAAA"), "a text of 6 digits for 2 modules"),
    "forms of a digit too far": (adapter(forms="BF"), "forms of cow: 4"),
    "forms of two digits too far": (adapter(forms="AB//"), "forms of cow: 4094"),
    "layouts as a text": (lambda b: b.update(module_layouts="AA"), "is not a manifest of version 1"),
    "form -2": (adapter(forms=[0, -2]), "forms of cow: -2"),
    "a layout that is not there": (lambda b: b.update(module_layouts=[0, 2]), "module_layouts: 2"),
    "an error below 0": (adapter(error=-1), "error of cow is -1.0"),
    "an error of 400 digits": (adapter(error=10**400), "is not a number of float32"),
    "negative bytes": (adapter(bytes=-1), "-1 is not a count"),
    "a checksum of other letters": (adapter(sha256="x" * 64), "is not a sha256"),
    "a path as a name": (adapter(name="../cow"), "adapter name '../cow' the name has /"),
    "an absolute path as a name": (adapter(name="/etc/passwd"), "the name has /"),
    "a hidden name": (adapter(name=".cow"), "starts with '.'"),
    "a name with an escape": (adapter(name="c\x1b[2J"), "control or invisible"),
    "a name twice": (adapter(name="emu"), "the same adapter twice"),
    "names that differ in case": (adapter(name="Emu"), "Emu, emu differ in case only"),
    "a module twice": (lambda b: b["modules"].__setitem__(0, b["modules"][1]), "the same module twice"),
    "a module of no rows": (lambda b: b["modules"][0].__setitem__(1, 0), "0 is not a count"),
    "a path among the files": (lambda b: b["files"].update({"../x": [1, "0" * 64]}), "file name '../x'"),
    "the manifest among the files": (
        lambda b: b["files"].update({"bundle.json": [1, "0" * 64]}),
        "file name 'bundle.json'",
    ),
    "adapters times modules": (
        lambda b: b.update(modules=[["m", 1, 1]] * 12_000, adapters=[{}] * 12_000),
        "adapters times modules is more than 134217728",
    ),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", LIMITS)
def test_manifests_beyond_the_limits_are_refused(
    name: str, victim: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, words = LIMITS[name]
    rewrite(victim, change)
    with pytest.raises(BundleError) as caught:
        Bundle.open(victim)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert verify(victim) == 1
    assert all(line.isprintable() for line in capsys.readouterr().err.splitlines())


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b["modules"][0].__setitem__(1, 2**50),  # a shared tensor of petabytes
        form([[2**40, "float16"], ["scalar", 1], [2**40, "float16"]]),
        form(),
        form([0, ["full", "float32"], 1]),
        lambda b: b["files"].pop("shared.safetensors"),
    ],
    ids=["huge module", "huge own factor", "data without a term", "another dtype", "nothing shared"],
)
def test_files_that_do_not_have_the_layout_are_refused(change: Callable[[Body], Any], victim: Path) -> None:
    """Sizes are compared with the files before anything of these sizes is made."""
    rewrite(victim, change)
    assert verify(victim) == 1
    with pytest.raises(BundleError, match=r"does not have the layout|does not list|has more than"):
        Bundle.open(victim).adapter("cow").low_rank("layers.0.k_proj")


def test_keys_of_later_versions_are_ignored(victim: Path) -> None:
    rewrite(victim, lambda body: body.update(signature="x"))
    assert verify(victim) == 0


def test_a_pipe_is_not_waited_for(victim: Path) -> None:
    for name in ("shared.safetensors", "bundle.json"):
        (victim / name).unlink()
        os.mkfifo(victim / name)
        assert verify(victim) == 1


def test_a_bundle_with_a_hostile_config_is_not_exported(victim: Path, tmp_path: Path) -> None:
    rewrite(victim, adapter(config={"rank_pattern": {"(a+)+$": 3}}))
    with pytest.raises(
        BundleError, match=r"cow: its config cannot be used: the key .* is a regular expression"
    ):
        export.export(Bundle.open(victim), ["emu", "cow"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_reader_of_the_specification_checks_too(victim: Path) -> None:
    (victim / "README.md").unlink()
    reader.Bundle(victim).matrices("cow")  # it needs only what it reads
    file = victim / "adapters" / "cow.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(reader.FormatError, match=r"cow\.safetensors is not the file"):
        reader.Bundle(victim).matrices("cow")
