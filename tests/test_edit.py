"""Taking adapters out of a bundle, and smaller bundles of some: what stays is the same bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from handmade import MakeAdapter
from torch import Tensor

from lorazip import Bundle, Spec, edit, export, files
from lorazip.compress import check, job, join
from lorazip.errors import BundleError, TargetError, UsageError
from lorazip.sources import open_adapters
from lorazip.terms import shared_indices

HEAD = "base_model.model.head.weight"


def content(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def effect(bundle: Bundle, name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """module -> the decoded factors."""
    adapter = bundle.adapter(name)
    return {module: ((f := adapter.low_rank(module)).B, f.A) for module in adapter.modules}


def assert_same_effect(one: Bundle, two: Bundle, names: list[str]) -> None:
    """Bit for bit, with configs, errors and carried tensors."""
    for name in names:
        first, second = effect(one, name), effect(two, name)
        assert list(first) == list(second)
        for module in first:
            assert all(torch.equal(x, y) for x, y in zip(first[module], second[module], strict=True))
        a, b = one.adapter(name), two.adapter(name)
        assert (a.config, a.record.error, a.record.file) == (b.config, b.record.error, b.record.file)
        assert a.extras == b.extras
        assert all(torch.equal(a.extra(key), b.extra(key)) for key in a.extras)


@pytest.fixture
def zoo(make_adapter: MakeAdapter) -> Path:
    """Two groups that share their A, so that two clusters find them; ant-2 carries a tensor."""
    for i in range(4):
        make_adapter(f"zoo/ant-{i}", a_seed=1, modules_to_save=["head"] if i == 2 else None,
                     tensors={HEAD: torch.arange(6.0)} if i == 2 else {})  # fmt: skip
        make_adapter(f"zoo/bee-{i}", a_seed=2)
    return make_adapter.root / "zoo"


SPECS = {
    "clusters": Spec("jd-full", rank=4, clusters=2),
    "one basis": Spec("jd-full", rank=9, dtype="float32"),
    "diagonal": Spec(method="jd-diag", rank=4, clusters=2, dtype="bfloat16"),
    "fallbacks": Spec("jd-full", rank=4, clusters=2, max_error=0.25),
    "svd": Spec(method="svd", rank=2),
    "mean": Spec(method="mean"),
}


@pytest.fixture
def team(zoo: Path, tmp_path: Path) -> Path:
    job.run([zoo], SPECS["clusters"], tmp_path / "team")
    return tmp_path / "team"


def test_remove_takes_a_file_and_a_record(zoo: Path, team: Path) -> None:
    before, old = content(team), Bundle.open(team)
    made = {name: effect(old, name) for name in old.names}
    new = edit.remove(team, ["ant-1", "bee-3", "ant-1"])
    kept = [name for name in old.names if name not in ("ant-1", "bee-3")]
    assert new.names == kept
    after = content(team)
    assert set(before) - set(after) == {"adapters/ant-1.safetensors", "adapters/bee-3.safetensors"}
    assert {name for name in after if after[name] != before[name]} == {"bundle.json"}
    assert new.manifest.modules == old.manifest.modules and new.manifest.files == old.manifest.files
    for name in kept:
        for module, (b, a) in effect(new, name).items():
            assert torch.equal(b, made[name][module][0]) and torch.equal(a, made[name][module][1])
    assert new.verify() == [] and new.strays() == []
    assert new.nbytes == sum(map(len, after.values()))
    found = check.compare(new, open_adapters([str(zoo)]).adapters, torch.device("cpu"))
    assert [c.name for c in found if c.problems] == ["ant-1", "bee-3"]


def test_what_was_removed_can_join_again(zoo: Path, team: Path) -> None:
    """On the bases that it helped to fit: the same error, the same effect."""
    old = Bundle.open(team)
    error = old.adapter("bee-2").record.error
    edit.remove(team, ["bee-2"])
    new, _ = join.add(team, [str(zoo / "bee-2")], max_error=0.9)
    assert new.names == old.names
    assert new.adapter("bee-2").record.error == pytest.approx(error, rel=1e-4)
    assert new.verify() == []


def test_remove_refuses_what_makes_no_sense(team: Path, tmp_path: Path) -> None:
    before = content(team)
    names = Bundle.open(team).names
    with pytest.raises(UsageError, match="would have no adapter left"):
        edit.remove(team, names)
    with pytest.raises(UsageError, match="has no adapter 'cow'"):
        edit.remove(team, ["ant-1", "cow"])
    with pytest.raises(UsageError, match="does not exist"):
        edit.remove(tmp_path / "nowhere", ["ant-1"])
    with pytest.raises(BundleError, match="is not a bundle"):
        edit.remove(tmp_path / "zoo", ["ant-1"])
    assert content(team) == before


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_smaller_bundle_has_the_same_effect(zoo: Path, tmp_path: Path, spec: Spec) -> None:
    job.run([zoo], spec, tmp_path / "all")
    whole = Bundle.open(tmp_path / "all")
    before = content(tmp_path / "all")
    chosen = ["ant-0", "ant-2"]
    small = edit.subset(whole, ["ant-2", "ant-0", "ant-2"], tmp_path / "small")
    assert small.names == chosen
    assert small.verify() == [] and small.strays() == []
    assert_same_effect(whole, small, chosen)
    assert content(tmp_path / "all") == before
    for name in chosen:
        assert (tmp_path / "small" / "adapters" / f"{name}.safetensors").read_bytes() == before[
            f"adapters/{name}.safetensors"
        ]
    assert small.manifest.options == whole.manifest.options
    assert [m.name for m in small.manifest.modules] == [m.name for m in whole.manifest.modules]
    # Of the shared tensors, those that somebody uses, and each once.
    for at, module in enumerate(small.manifest.modules):
        used = {i for a in small.manifest.adapters for i in shared_indices(a.forms[at] or ())}
        assert used == set(range(len(module.layout)))
    assert ("shared.safetensors" in small.manifest.files) == any(m.layout for m in small.manifest.modules)
    if spec is SPECS["clusters"]:
        assert [len(m.layout) for m in whole.manifest.modules] == [4] * 6
        assert [len(m.layout) for m in small.manifest.modules] == [2] * 6
        sizes = [b.manifest.files["shared.safetensors"].nbytes for b in (whole, small)]
        assert sizes[1] < 0.6 * sizes[0]
    found = check.compare(
        small, open_adapters([str(zoo / name) for name in chosen]).adapters, torch.device("cpu")
    )
    assert [c.problems for c in found] == [(), ()]


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_bundle_of_all_is_the_bundle(zoo: Path, tmp_path: Path, spec: Spec) -> None:
    job.run([zoo], spec, tmp_path / "all")
    whole = Bundle.open(tmp_path / "all")
    edit.subset(whole, whole.names, tmp_path / "copy")
    assert content(tmp_path / "copy") == content(tmp_path / "all")


def test_a_smaller_bundle_can_be_changed_on(zoo: Path, team: Path, tmp_path: Path) -> None:
    edit.subset(Bundle.open(team), ["bee-0", "bee-1"], tmp_path / "small")
    added, _ = join.add(tmp_path / "small", [str(zoo / "bee-2"), str(zoo / "ant-0")])
    assert added.names == ["ant-0", "bee-0", "bee-1", "bee-2"]
    # The basis of the other group is gone, so its member keeps factors of its own.
    assert join.fallback_count(added, ["ant-0"]) == 6
    edit.remove(tmp_path / "small", ["bee-0"])
    again = edit.subset(added := Bundle.open(tmp_path / "small"), ["ant-0"], tmp_path / "tiny")
    assert "shared.safetensors" not in again.manifest.files
    assert_same_effect(added, again, ["ant-0"])
    assert again.verify() == []


def test_a_smaller_bundle_is_made_of_good_data_in_a_new_place_only(team: Path, tmp_path: Path) -> None:
    whole = Bundle.open(team)
    with pytest.raises(UsageError, match="has no adapter 'cow'"):
        edit.subset(whole, ["cow"], tmp_path / "small")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for output in ("full", "file", "team"):
        with pytest.raises(TargetError, match="exists"):
            edit.subset(whole, ["ant-0"], tmp_path / output)
    data = bytearray((team / "shared.safetensors").read_bytes())
    data[-1] ^= 1
    (team / "shared.safetensors").write_bytes(data)
    with pytest.raises(BundleError, match="its sha256 is not the recorded one"):
        edit.subset(whole, ["ant-0"], tmp_path / "small")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full", "team", "zoo"]


def test_a_file_that_changes_while_it_is_copied_is_noticed(
    team: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Bundle.open(team)
    monkeypatch.setattr(Bundle, "require", lambda self, names: None)  # it was good when it was checked
    data = bytearray((team / "adapters" / "ant-0.safetensors").read_bytes())
    data[-1] ^= 1
    (team / "adapters" / "ant-0.safetensors").write_bytes(data)
    with pytest.raises(BundleError, match="is damaged, or changed while it was copied"):
        edit.subset(whole, ["ant-0"], tmp_path / "small")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["team", "zoo"]


def test_what_a_killed_export_left_goes_with_the_next_one(team: Path, tmp_path: Path) -> None:
    """A folder that a running one holds stays."""
    bundle = Bundle.open(team)
    for name, write in (
        ("ant-0", lambda: export.export(bundle, ["ant-0"], tmp_path / "out")),
        ("small", lambda: edit.subset(bundle, ["ant-0"], tmp_path / "out" / "small")),
    ):
        left, held = (tmp_path / "out" / f".{name}.{digit * 16}.tmp" for digit in "07")
        other = tmp_path / "out" / f".other.{name}.{'0' * 16}.tmp"
        for folder in (left, held, other):
            folder.mkdir(parents=True)
            (folder / "x").touch()
        with files.locked(held):
            write()
        assert {p.name for p in (tmp_path / "out").glob(".*.tmp")} >= {held.name, other.name}
        assert not left.exists() and (tmp_path / "out" / name).is_dir()
