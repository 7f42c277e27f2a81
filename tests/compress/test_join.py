"""Adapters that join later: on the bases where these hold them, else with factors of their own; measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import MakeAdapter

from lorazip import Bundle, LowRank, Spec
from lorazip.compress import check, job, join
from lorazip.errors import InputError, UsageError
from lorazip.sources import fingerprint, open_adapters
from lorazip.terms import shared_indices

Q, V, UP = "l.0.q_proj", "l.0.v_proj", "l.0.up_proj"
MODULES = {Q: (24, 20), V: (8, 20)}
SPEC = Spec("jd-full", rank=10, dtype="float32")


def dense(factor: LowRank) -> torch.Tensor:
    return factor.scale * (factor.B.double() @ factor.A.double())


def error(bundle: Bundle, name: str, original: Path) -> float:
    """||D^ - D||^2 / ||D||^2 by dense float64 matrices."""
    adapter = open_adapters([str(original)]).adapters[0]
    pairs = [(dense(adapter.low_rank(m)), dense(bundle.adapter(name).low_rank(m))) for m in adapter.modules]
    return float(sum((d - e).square().sum() for d, e in pairs) / sum(d.square().sum() for d, _ in pairs))


def on_bases(bundle: Bundle, name: str) -> list[bool]:
    """Whether each module of an adapter refers to shared tensors."""
    return [bool(shared_indices(form)) for form in bundle.adapter(name).record.forms if form is not None]


@pytest.fixture
def zoo(make_adapter: MakeAdapter) -> Path:
    for name in ("ant", "bee", "cat"):
        make_adapter(f"zoo/{name}", modules=MODULES, rank=3)
    return make_adapter.root / "zoo"


def mixture(make_adapter: MakeAdapter, zoo: Path, directory: str, **config: Any) -> Path:
    """D_new = D_ant / 2 - 3 D_bee, as factors of rank 6."""
    ant, bee = open_adapters([str(zoo / "ant"), str(zoo / "bee")]).adapters
    tensors = {}
    for module in MODULES:
        one, two = ant.low_rank(module), bee.low_rank(module)
        b = torch.cat([one.B * one.scale / 2, two.B * two.scale * -3], dim=1)
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.cat([one.A, two.A])
    return make_adapter(directory, modules=MODULES, rank=6, alpha=6, tensors=tensors, **config)


def test_what_the_bases_span_joins_on_them(make_adapter: MakeAdapter, zoo: Path, tmp_path: Path) -> None:
    job.run([zoo], SPEC, tmp_path / "team")
    new = mixture(make_adapter, zoo, "new")
    bundle, inputs = join.add(tmp_path / "team", [str(new)], max_error=1e-6)
    assert [adapter.name for adapter in inputs.adapters] == ["new"]
    assert bundle.names == ["ant", "bee", "cat", "new"]
    assert on_bases(bundle, "new") == [True, True]
    assert join.fallback_count(bundle, ["new"]) == 0
    record = bundle.adapter("new").record
    assert record.error < 1e-12
    assert error(bundle, "new", new) < 1e-12
    assert record.file.nbytes < 0.6 * (new / "adapter_model.safetensors").stat().st_size
    assert bundle.verify() == [] and bundle.strays() == []


@pytest.mark.parametrize("method", ["jd-full", "jd-diag", "eigenlora", "mean"])
def test_what_the_bases_do_not_span_keeps_factors_of_its_own(
    make_adapter: MakeAdapter, zoo: Path, tmp_path: Path, method: str
) -> None:
    job.run([zoo], Spec(method=method, rank=9, max_error=0.1), tmp_path / "team")
    new = make_adapter("new", modules=MODULES, rank=5)
    bundle, _ = join.add(tmp_path / "team", [str(new)])
    record = bundle.adapter("new").record
    assert on_bases(bundle, "new") == [False, False]
    assert record.error <= 0.1
    assert error(bundle, "new", new) == pytest.approx(record.error, rel=1e-4)
    bases = [m for m in bundle.manifest.modules if m.layout]
    assert join.fallback_count(bundle, ["new"]) == len(bases)
    assert bundle.verify() == []


@pytest.mark.parametrize("option", [{"rank": 2}, {"energy": 0.8}, {"max_error": 0.3}], ids=str)
def test_svd_bundles_take_more_as_they_took_the_first(
    make_adapter: MakeAdapter, zoo: Path, tmp_path: Path, option: dict[str, Any]
) -> None:
    spec = Spec(method="svd", **option)
    job.run([zoo], spec, tmp_path / "team")
    new = make_adapter("new", modules=MODULES, rank=5)
    bundle, _ = join.add(tmp_path / "team", [str(new)])
    job.run([zoo, new], spec, tmp_path / "all")
    both = [Bundle.open(tmp_path / which).adapter("new") for which in ("team", "all")]
    assert both[0].record.error == both[1].record.error == pytest.approx(error(bundle, "new", new), rel=1e-4)
    for module in MODULES:
        assert torch.equal(dense(both[0].low_rank(module)), dense(both[1].low_rank(module)))
    assert join.fallback_count(bundle, ["new"]) == 0


def test_the_bound_is_the_bundles_own_or_its_worst_error(
    make_adapter: MakeAdapter, zoo: Path, tmp_path: Path
) -> None:
    new = make_adapter("new", modules=MODULES, rank=5)
    job.run([zoo], Spec("jd-full", rank=3), tmp_path / "worst")
    worst = max(a.error for a in Bundle.open(tmp_path / "worst").manifest.adapters)
    assert 0.05 < worst < 0.99
    added, _ = join.add(tmp_path / "worst", [str(new)])
    assert added.adapter("new").record.error <= worst
    job.run([zoo], Spec("jd-full", max_error=0.02), tmp_path / "bound")
    assert join.add(tmp_path / "bound", [str(new)])[0].adapter("new").record.error <= 0.02
    looser, _ = join.add(tmp_path / "bound", [f"loose={new}"], max_error=0.5)
    assert 0.02 < looser.adapter("loose").record.error <= 0.5
    assert looser.manifest.options["max_error"] == 0.02  # the bundle's options are its own


def test_what_was_there_is_not_changed(make_adapter: MakeAdapter, zoo: Path, tmp_path: Path) -> None:
    bundle = job.run([zoo], Spec("jd-full", rank=4, clusters=2), tmp_path / "team").bundle
    assert bundle is not None
    before = {p: p.read_bytes() for p in (tmp_path / "team").rglob("*") if p.is_file()}
    old = bundle.manifest
    made = {name: {m: dense(bundle.adapter(name).low_rank(m)) for m in MODULES} for name in bundle.names}
    make_adapter("more/dog", modules={**MODULES, UP: (30, 20)}, rank=2)
    make_adapter("more/aardvark", modules={Q: MODULES[Q]}, rank=2)
    after, _ = join.add(tmp_path / "team", [str(tmp_path / "more")])
    for path, data in before.items():
        if path.name != "bundle.json":
            assert path.read_bytes() == data
    assert after.names == ["aardvark", "ant", "bee", "cat", "dog"]
    # The new module comes last, so that the layout of old files still follows from the manifest.
    assert [m.name for m in after.manifest.modules] == [Q, V, UP]
    assert after.manifest.fingerprint == fingerprint({**MODULES, UP: (30, 20)})
    assert after.manifest.modules[:2] == old.modules
    assert (after.manifest.options, after.manifest.files) == (old.options, old.files)
    for record in old.adapters:
        again = after.adapter(record.name)
        assert again.record.forms == (*record.forms, None)
        assert (again.record.file, again.record.error) == (record.file, record.error)
        assert list(again.modules) == [Q, V]
        assert all(torch.equal(dense(again.low_rank(m)), made[record.name][m]) for m in MODULES)
    assert list(after.adapter("dog").modules) == [Q, V, UP]
    assert list(after.adapter("aardvark").modules) == [Q]
    originals = open_adapters([str(zoo), str(tmp_path / "more")]).adapters
    assert all(not c.problems for c in check.compare(after, originals, torch.device("cpu")))
    # And once more, with the new module known.
    make_adapter("even_more", modules={UP: (30, 20)}, rank=2)
    again_, _ = join.add(tmp_path / "team", [str(tmp_path / "even_more")])
    assert list(again_.adapter("even_more").modules) == [UP]
    assert again_.verify() == []


def test_each_adapter_joins_the_cluster_that_fits_it(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    """Two groups with spaces of their own; a newcomer of either group costs a core and no more."""
    generator = torch.Generator().manual_seed(3)
    left, right = (
        torch.linalg.qr(torch.randn(20, 8, generator=generator))[0].reshape(20, 2, 4) for _ in "lr"
    )

    def member(directory: str, group: int) -> Path:
        b = left[:, group] @ torch.randn(4, 2, generator=generator)
        a = (torch.randn(2, 4, generator=generator) @ right[:, group].T).contiguous()
        tensors = {"base_model.model.m.lora_B.weight": b, "base_model.model.m.lora_A.weight": a}
        return make_adapter(directory, modules={"m": (20, 20)}, rank=2, tensors=tensors)

    for i in range(12):
        member(f"zoo/x{i}", i % 2)
    job.run([tmp_path / "zoo"], Spec("jd-full", rank=4, clusters=2, dtype="float32"), tmp_path / "team")
    bundle = Bundle.open(tmp_path / "team")
    homes = [shared_indices(bundle.adapter(f"x{i}").record.forms[0] or ()) for i in (0, 1)]
    assert sorted(homes) == [[0, 1], [2, 3]]
    for group in (0, 1):
        member(f"new/y{group}", group)
    after, _ = join.add(tmp_path / "team", [str(tmp_path / "new")], max_error=1e-6)
    for group in (0, 1):
        record = after.adapter(f"y{group}").record
        assert shared_indices(record.forms[0] or ()) == homes[group]
        assert record.error < 1e-10


def test_carried_tensors_and_zero_modules_come_along(
    make_adapter: MakeAdapter, zoo: Path, tmp_path: Path
) -> None:
    job.run([zoo], SPEC, tmp_path / "team")
    head = torch.arange(6.0).reshape(2, 3)
    zero = {f"base_model.model.{V}.lora_B.weight": torch.zeros(8, 3)}
    new = make_adapter(
        "new", modules=MODULES, rank=3, modules_to_save=["head"],
        tensors={**zero, "base_model.model.head.weight": head},
    )  # fmt: skip
    bundle, _ = join.add(tmp_path / "team", [str(new)], max_error=0.5)
    adapter = bundle.adapter("new")
    assert torch.equal(adapter.extra("base_model.model.head.weight"), head)
    assert float(dense(adapter.low_rank(V)).abs().max()) == 0
    assert adapter.config == open_adapters([str(new)]).adapters[0].config


def refused(team: Path, *arguments: str, **options: Any) -> str:
    before = {p: p.read_bytes() for p in team.rglob("*") if p.is_file()}
    with pytest.raises(InputError) as caught:
        join.add(team, arguments, **options)
    assert {p: p.read_bytes() for p in team.rglob("*") if p.is_file()} == before
    return str(caught.value)


def test_what_may_not_join(make_adapter: MakeAdapter, zoo: Path, tmp_path: Path) -> None:
    team = tmp_path / "team"
    make_adapter("zoo/größe", modules=MODULES)
    job.run([zoo], SPEC, team)
    new = make_adapter("new", modules=MODULES)
    for name in ("ant", "ANT", "Größe", "GRÖSSE"):
        assert f"{name}: the bundle has an adapter of this name (remove it first" in refused(
            team, f"{name}={new}"
        )
    other = make_adapter("other", modules=MODULES, base_model_name_or_path="org/other")
    assert "base model is 'org/other', the bundle's is 'org/base'" in refused(team, str(other))
    assert "the bundle's base model is 'org/base', not 'org/third'" in refused(
        team, str(other), base="org/third"
    )
    wide = make_adapter("wide", modules={Q: (24, 21)})
    assert f"wide: {Q}: is 24x21, in the bundle 24x20" in refused(team, str(wide))
    nan = {f"base_model.model.{Q}.lora_A.weight": torch.full((4, 20), torch.nan)}
    bad = make_adapter("bad", modules=MODULES, tensors=nan)
    assert "NaN" in refused(team, str(bad), str(new))
    # All that is wrong is told at once.
    both = refused(team, str(wide), f"ant={new}", base="org/base")
    assert "wide: " in both and "ant: " in both
    with pytest.raises(UsageError, match="max-error"):
        join.add(team, [str(new)], max_error=1.0)
    # What the user vouches for is taken.
    assert "other" in join.add(team, [str(other)], base="org/base")[0].names
    bundle, inputs = join.add(team, [str(bad), str(new)], skip_bad=True)
    assert "new" in bundle.names and "bad" not in bundle.names
    assert [defect.adapter for defect in inputs.skipped] == ["bad"]


def test_adapter_joins_a_bundle_of_auto_with_factors_of_its_own(tmp_path: Path) -> None:
    """Real adapters, of some modules of which auto shares both sides; one that was left out joins in their bound."""
    zoo = Path(__file__).parents[2] / "examples" / "zoo"
    paths = sorted(path for path in zoo.iterdir() if path.is_dir())
    left_out = paths[3]
    job.run([str(path) for path in paths if path != left_out], Spec("auto", ratio=24), tmp_path / "team")
    before = Bundle.open(tmp_path / "team")
    sides = [[shared.side for shared in module.layout] for module in before.manifest.modules]
    assert ["left", "right"] in sides
    bundle, _ = join.add(tmp_path / "team", [str(left_out)])
    worst = max(before.adapter(name).record.error for name in before.names)
    record = bundle.adapter(left_out.name).record
    assert record.error <= worst
    assert record.error == pytest.approx(error(bundle, left_out.name, left_out), rel=1e-5)
    assert not any(on_bases(bundle, left_out.name)) and bundle.verify() == []
    assert record.file.nbytes < record.original_bytes / 16  # auto at this error, alone
    for name in before.names:
        assert bundle.adapter(name).record == before.adapter(name).record
