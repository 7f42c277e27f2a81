"""Directories and bundles from strangers: nothing outside is followed, nothing foreign is deleted or overridden."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from handmade import MakeAdapter
from safetensors.torch import load_file, save_file

import lorazip
from lorazip import Bundle, Spec
from lorazip.cli import main
from lorazip.edit import remove
from lorazip.errors import BundleError, CodecError, UsageError
from lorazip.export import export
from lorazip.manifest import dumps, loads


@pytest.fixture
def zoo(make_adapter: MakeAdapter) -> Path:
    for seed, name in enumerate(("ant", "bee")):
        make_adapter(f"zoo/{name}", seed=seed)
    return make_adapter.root / "zoo"


@pytest.fixture
def team(zoo: Path, tmp_path: Path) -> Bundle:
    return lorazip.compress(zoo, Spec(dtype="float32"), tmp_path / "team")


def ended(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def resigned(bundle: Bundle, name: str) -> None:
    """Make the manifest agree with what adapters/NAME.safetensors holds now, as a forger would."""
    path = bundle.path / "adapters" / f"{name}.safetensors"
    old = next(a.file.sha256 for a in bundle.manifest.adapters if a.name == name)
    size = next(a.file.nbytes for a in bundle.manifest.adapters if a.name == name)
    data = (bundle.path / "bundle.json").read_bytes().partition(b"\n")[2]
    new = hashlib.sha256(path.read_bytes()).hexdigest()
    lines = data.split(b"\n")
    at = next(i for i, line in enumerate(lines) if old.encode() in line)
    lines[at] = lines[at].replace(old.encode(), new.encode())
    lines[at] = lines[at].replace(f'"bytes":{size}'.encode(), f'"bytes":{path.stat().st_size}'.encode())
    data = b"\n".join(lines)
    first = b'{"digest":"' + hashlib.sha256(data).hexdigest().encode() + b'",\n'
    (bundle.path / "bundle.json").write_bytes(first + data)


def test_a_link_in_place_of_a_temporary_file_is_not_followed(team: Bundle, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (team.path / ".bundle.json.tmp").symlink_to(precious)
    remove(team.path, ["ant"])
    assert precious.read_text() == "mine"
    assert not (team.path / "bundle.json").is_symlink()
    assert Bundle.open(team.path).names == ["bee"]


def test_a_linked_folder_of_adapters_is_refused(team: Bundle, tmp_path: Path) -> None:
    (team.path / "adapters").rename(tmp_path / "elsewhere")
    (team.path / "adapters").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="is a link"):
        remove(team.path, ["ant"])
    assert len(list((tmp_path / "elsewhere").iterdir())) == 2


@pytest.mark.parametrize("own", [True, False])
def test_force_deletes_nothing_but_a_bundle(
    zoo: Path, team: Bundle, tmp_path: Path, own: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    target = team.path if own else tmp_path / "project"
    target.mkdir(exist_ok=True)
    if not own:
        (target / "bundle.json").write_text("{}")
    (target / "thesis.txt").write_text("mine")
    assert ended("compress", zoo, "-o", target, "--force") == 2
    assert "choose another name" in capsys.readouterr().err
    assert (target / "thesis.txt").read_text() == "mine"


def test_a_report_replaces_nothing(zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notes, weights = tmp_path / "notes.html", zoo / "ant" / "adapter_model.safetensors"
    notes.write_text("mine")
    before = weights.read_bytes()
    assert ended("compress", zoo, "--dry-run", "--report", notes) == 2
    assert ended("compress", zoo, "--dry-run", "--force", "--report", weights) == 2
    assert ended("compress", zoo, "-o", tmp_path / "new", "--report", tmp_path / "new" / "page.html") == 2
    assert (notes.read_text(), weights.read_bytes()) == ("mine", before)
    assert not (tmp_path / "new").exists()
    assert "exists" in capsys.readouterr().err


def test_a_carried_tensor_cannot_take_the_place_of_a_factor(team: Bundle, tmp_path: Path) -> None:
    path = team.path / "adapters" / "ant.safetensors"
    tensors = load_file(path)
    module = team.manifest.modules[0]
    key = f"base_model.model.{module.name}.lora_A.weight"
    save_file({**tensors, key: torch.full((4, module.in_), 666.0)}, path)
    resigned(team, "ant")
    forged = Bundle.open(team.path)
    assert [p.problem for p in forged.verify() if "no tensor that an adapter carries" in p.problem]
    with pytest.raises(BundleError, match="carries"):
        export(forged, ["ant"], tmp_path / "out")


def test_sixteen_bit_exports_overflow_loudly(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    module, (out, in_) = next(iter(make_adapter.modules.items()))
    tensors = {
        f"base_model.model.{module}.lora_B.weight": torch.full((out, 4), 1e12),
        f"base_model.model.{module}.lora_A.weight": torch.full((4, in_), 1.0),
    }
    path = make_adapter("huge", rank=4, tensors=tensors)
    bundle = lorazip.compress(path, Spec("svd", rank=4, dtype="float32"), tmp_path / "huge.lorazip")
    with pytest.raises(CodecError, match=r"huge: .* does not fit"):
        export(bundle, [], tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out" / "huge").exists()


@pytest.mark.parametrize("base", ["", " ", "\udcff"])
def test_an_empty_base_is_no_base(zoo: Path, tmp_path: Path, base: str) -> None:
    with pytest.raises(UsageError, match="not the name of a model"):
        lorazip.compress(zoo, Spec(), tmp_path / "out", base=base)


def test_one_path_is_a_list_of_one(team: Bundle) -> None:
    assert (len(team), "ant" in team, "nobody" in team) == (2, True, False)
    assert team["ant"].name == "ant"


def test_a_manifest_needs_an_adapter(team: Bundle) -> None:
    data = dumps(team.manifest)
    assert loads(data) == team.manifest
    start, end = data.index(b'"adapters":'), data.index(b'"files":')
    rest = data.partition(b"\n")[2].replace(data[start:end], b'"adapters":[],\n')
    first = b'{"digest":"' + hashlib.sha256(rest).hexdigest().encode() + b'",\n'
    with pytest.raises(BundleError, match="at least one"):
        loads(first + rest)
