"""Bundles that are damaged, or whose manifests go beyond the limits of docs/FORMAT.md, are refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from golden import reader

from lorazip import cli, export
from lorazip.bundle import Bundle
from lorazip.errors import BundleError

PREFIX = "base_model.model."
GOLDEN = Path(__file__).parent / "golden" / "v1"


# --- damage --------------------------------------------------------------------------------------------------------


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A copy of an old bundle with everything in it: shared and own tensors, carried ones, three dtypes."""
    return Path(shutil.copytree(GOLDEN / "bound.lorazip", tmp_path / "victim.lorazip"))


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
