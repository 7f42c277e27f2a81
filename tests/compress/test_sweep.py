"""The frontier: every ratio measured or predicted from one survey, nothing left behind, nothing overwritten."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import MakeAdapter

from lorazip.bundle import Bundle
from lorazip.compress import job, planning, sweep
from lorazip.compress.spec import Spec
from lorazip.compress.sweep import Frontier, Judgement, Point
from lorazip.compress.sweep_plot import plot
from lorazip.errors import TargetError, UsageError
from lorazip.sources import Inputs

ZOO = Path(__file__).parents[2] / "examples" / "zoo"
MODULES = {"a.q_proj": (96, 160), "a.k_proj": (48, 160), "b.q_proj": (96, 160), "b.k_proj": (48, 160)}
SPEC = Spec("auto", device="cpu")
HOPELESS = 1e4  # times smaller: names and headers alone take more


@pytest.fixture
def zoo(make_adapter: MakeAdapter) -> Path:
    """Four adapters that differ in modules and rank; nothing else is below tmp_path."""
    make_adapter("zoo/ant", modules=MODULES)
    make_adapter("zoo/bee", modules=dict(list(MODULES.items())[:2]), rank=3)
    make_adapter("zoo/cat", modules=MODULES, dtype=torch.bfloat16)
    return make_adapter("zoo/dog", modules=MODULES, rank=6).parent


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modules that were surveyed, one entry each time."""
    seen: list[str] = []
    survey = planning.survey

    def counting(inputs: Inputs, spec: Spec, name: str, *rest: Any) -> Any:
        seen.append(name)
        return survey(inputs, spec, name, *rest)

    monkeypatch.setattr(planning, "survey", counting)
    return seen


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def figures(point: Point) -> tuple[Any, ...]:
    return point.bundle_bytes, point.ratio, point.mean_error, point.max_error


def test_the_points_are_those_of_single_runs(zoo: Path, tmp_path: Path, counted: list[str]) -> None:
    found = sweep.run([zoo], SPEC, [6, 2, 3.5, HOPELESS], tmp_path / "f")
    assert sorted(counted) == sorted(MODULES)
    assert [point.asked for point in found.points] == [2, 3.5, 6, HOPELESS]
    for point in found.points[:-1]:
        one = job.run([zoo], Spec("auto", device="cpu", ratio=point.asked), tmp_path / "b", force=True)
        errors = one.adapter_errors
        same = (
            one.bundle_bytes,
            one.original_bytes / one.bundle_bytes,
            float(errors.mean()),
            float(errors.max()),
        )
        assert figures(point) == same
        assert point.ratio is not None and point.ratio >= point.asked
    last = found.points[-1]
    assert figures(last) == (None,) * 4
    assert "are too few" in last.problem
    assert files(tmp_path / "f") == {"frontier.json", "frontier.svg"}
    assert not (tmp_path / "f.partial").exists()


def test_a_dry_run_predicts(
    zoo: Path, tmp_path: Path, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job.sides, "encode_planned", None)
    before = files(tmp_path)
    found = sweep.run([zoo], SPEC, [2, 4, HOPELESS], None, dry_run=True)
    assert files(tmp_path) == before
    assert sorted(counted) == sorted(MODULES)
    one = job.run([zoo], Spec("auto", device="cpu", ratio=4), None)
    assert found.predicted and one.predicted
    assert found.points[1].bundle_bytes == one.bundle_bytes
    assert found.points[1].mean_error == float(one.adapter_errors.mean())
    assert found.points[2].problem
    written = sweep.run([zoo], SPEC, [2, 4, HOPELESS], tmp_path / "f", dry_run=True)
    assert [figures(p) for p in written.points] == [figures(p) for p in found.points]
    assert files(tmp_path / "f") == {"frontier.json", "frontier.svg"}


def test_the_file_says_all(zoo: Path, tmp_path: Path) -> None:
    found = sweep.run([zoo], SPEC, [3, HOPELESS], tmp_path / "f", dry_run=True)
    document = json.loads((tmp_path / "f" / "frontier.json").read_text())
    assert document == json.loads(json.dumps(found.document()))
    assert document["schema"] == "lorazip.frontier/1"
    assert document["options"]["method"] == "auto"
    assert [a["name"] for a in document["inputs"]["adapters"]] == ["ant", "bee", "cat", "dog"]
    assert document["inputs"]["original_bytes"] == sum(a["bytes"] for a in document["inputs"]["adapters"])
    assert document["predicted"] is True and document["evaluation"] is None
    assert [bool(point["problem"]) for point in document["points"]] == [False, True]
    assert (tmp_path / "f" / "frontier.svg").read_text().rstrip().endswith("</svg>")


def test_real_adapters(tmp_path: Path) -> None:
    """Three of the zoo: what a dry run predicts comes out within two per cent."""
    names = ["ii_sum", "fv_product_company", "lre_landmark_on_continent"]
    paths = [ZOO / name for name in names]
    predicted = sweep.run(paths, SPEC, [8, 40], None, dry_run=True)
    measured = sweep.run(paths, SPEC, [8, 40], tmp_path / "f")
    for one, other in zip(predicted.points, measured.points, strict=True):
        assert one.bundle_bytes == pytest.approx(other.bundle_bytes, rel=0.001)
        assert one.mean_error == pytest.approx(other.mean_error, rel=0.02)
    first, second = measured.points
    assert first.mean_error is not None and second.mean_error is not None
    assert first.mean_error < second.mean_error


def test_a_judge_sees_the_originals_first_and_then_all_bundles(zoo: Path, tmp_path: Path) -> None:
    asked: list[list[str]] = []

    def judge(inputs: Inputs, bundles: Sequence[Path]) -> Judgement:
        assert [adapter.name for adapter in inputs.adapters] == ["ant", "bee", "cat", "dog"]
        asked.append([path.name for path in bundles])
        sizes = {path.name: Bundle.open(path).nbytes for path in bundles}
        return Judgement({"model": "m"}, {"original": {}} | {n: interval(size) for n, size in sizes.items()})

    def interval(size: float) -> dict[str, Any]:
        value = {"estimate": size, "low": size, "high": size, "n": 1}
        return {"score": value, "kept": value}

    found = sweep.run([zoo], SPEC, [2, 3.5, HOPELESS], tmp_path / "f", judge=judge)
    assert asked == [[], ["ratio-2", "ratio-3.5"]]
    for point in found.points[:2]:
        assert point.kept is not None and point.kept["estimate"] == point.bundle_bytes
    assert found.points[2].kept is None
    document = json.loads((tmp_path / "f" / "frontier.json").read_text())
    assert document["evaluation"] == {"about": {"model": "m"}, "arms": {"original": {}}}
    assert files(tmp_path / "f") == {"frontier.json", "frontier.svg"}


def test_a_judge_that_fails_leaves_nothing(zoo: Path, tmp_path: Path, counted: list[str]) -> None:
    def judge(inputs: Inputs, bundles: Sequence[Path]) -> Judgement:
        raise UsageError("no such model")

    with pytest.raises(UsageError):
        sweep.run([zoo], SPEC, [2], tmp_path / "f", judge=judge)
    assert counted == []
    assert {path.name for path in tmp_path.iterdir()} == {"zoo"}


@pytest.mark.parametrize("where", ["survey", "encode_planned", "assemble"])
def test_an_interrupted_sweep_leaves_nothing_new(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    sweep.run([zoo], SPEC, [2], tmp_path / "f", dry_run=True)
    before = (tmp_path / "f" / "frontier.json").read_bytes()

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep if where == "assemble" else job, where, stop)
    with pytest.raises(KeyboardInterrupt):
        sweep.run([zoo], SPEC, [2, 4], tmp_path / "f", force=True)
    assert (tmp_path / "f" / "frontier.json").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"zoo", "f"}


def test_a_frontier_is_replaced_only_by_force(zoo: Path, tmp_path: Path) -> None:
    sweep.run([zoo], SPEC, [2], tmp_path / "f", dry_run=True)
    with pytest.raises(TargetError, match="use --force"):
        sweep.run([zoo], SPEC, [3], tmp_path / "f", dry_run=True)
    sweep.run([zoo], SPEC, [3], tmp_path / "f", dry_run=True, force=True)
    assert json.loads((tmp_path / "f" / "frontier.json").read_text())["points"][0]["asked"] == 3


def with_a_note(folder: Path, zoo: Path) -> None:
    sweep.run([zoo], SPEC, [2], folder, dry_run=True)
    (folder / "note.txt").write_text("mine")


def a_bundle(folder: Path, zoo: Path) -> None:
    job.run([zoo], Spec("svd", rank=1), folder)


def a_file(folder: Path, zoo: Path) -> None:
    folder.write_text("mine")


def anothers(folder: Path, zoo: Path) -> None:
    folder.mkdir()
    (folder / "frontier.json").write_text('{"schema": "other/1"}')


@pytest.mark.parametrize("make", [with_a_note, a_bundle, a_file, anothers])
def test_what_is_not_ours_is_never_replaced(
    zoo: Path, tmp_path: Path, make: Callable[[Path, Path], None]
) -> None:
    make(tmp_path / "f", zoo)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(TargetError, match="more than a frontier"):
        sweep.run([zoo], SPEC, [2], tmp_path / "f", dry_run=True, force=True)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_an_unfinished_run_is_in_the_way(zoo: Path, tmp_path: Path) -> None:
    (tmp_path / "f.partial").mkdir()
    (tmp_path / "f.partial" / "job.json").write_text('{"job": "another"}')
    with pytest.raises(TargetError, match="--force discards it"):
        sweep.run([zoo], SPEC, [2], tmp_path / "f", dry_run=True)
    sweep.run([zoo], SPEC, [2], tmp_path / "f", dry_run=True, force=True)
    assert not (tmp_path / "f.partial").exists()


def test_its_own_inputs_are_no_target(zoo: Path, tmp_path: Path) -> None:
    shutil.rmtree(zoo / "ant")
    with pytest.raises(TargetError):
        sweep.run([zoo], SPEC, [2], zoo, dry_run=True, force=True)
    assert (zoo / "bee" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("options", "ratios", "message"),
    [
        ({"method": "svd"}, [4], "leave --method svd out"),
        ({"ratio": 4.0}, [4], "--ratios"),
        ({"budget": 4000}, [4], "--ratios"),
        ({"max_error": 0.1}, [4], "--ratios"),
        ({}, [], "at least one"),
        ({}, [4, 0], "at least 1"),
        ({}, [float("nan")], "at least 1"),
        ({}, [float("inf")], "at least 1"),
        ({}, [0.5], "at least 1"),
        ({}, [4, 4.0], "twice"),
    ],
)
def test_what_makes_no_sense_is_refused(
    zoo: Path, options: dict[str, Any], ratios: list[float], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        sweep.run([zoo], Spec(**options), ratios, None, dry_run=True)


def test_without_an_output_nothing_is_encoded(zoo: Path) -> None:
    with pytest.raises(UsageError, match="-o FOLDER"):
        sweep.run([zoo], SPEC, [2], None)
    with pytest.raises(UsageError, match="no bundles to evaluate"):
        sweep.run([zoo], SPEC, [2], None, dry_run=True, judge=lambda inputs, bundles: Judgement({}))


def test_pictures_of_odd_frontiers(zoo: Path) -> None:
    """No point, one point, exact bundles: a picture all the same, without a warning."""
    inputs = sweep.run([zoo], SPEC, [2], None, dry_run=True).inputs
    exact, one = Point(1.0, 1.0, 10, 0.0, 0.0, 1.0), Point(4.0, 4.1, 3, 0.1, 0.2, 1.0)
    lost = Point(9.0, problem="too few")
    for points in ((lost,), (one,), (exact,), (exact, one, lost)):
        assert "times smaller" in plot(Frontier(SPEC, inputs, True, 1.0, points))
