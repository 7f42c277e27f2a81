"""`lorazip compress --sweep --eval`: the kept score along the frontier, on a tiny model."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch

from lorazip.cli import main
from lorazip.cli import sweep as command
from lorazip.eval.job import evaluate
from lorazip.eval.session import Engine
from lorazip.eval.spec import EvalSpec

NAMES = ("ant", "bee", "cat")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ zoo/ tasks/: each adapter answers most of its task rightly."""
    root = tmp_path_factory.mktemp("world")
    tiny.make_base(root / "base")
    adapters = tiny.make_adapters(root / "zoo", NAMES)
    tiny.make_tasks(root / "tasks", root / "base", adapters, 12)
    return root


def sweep(world: Path, *options: str) -> int:
    line = ["compress", str(world / "zoo"), "--sweep", "--eval", str(world / "base"), *options]
    with pytest.raises(SystemExit) as end:
        main(line)
    assert isinstance(end.value.code, int)
    return end.value.code


def test_kept_scores(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    engine = Engine("hf", torch.float32, torch.device("cpu"))
    tinily = partial(evaluate, spec=EvalSpec(template=tiny.TEMPLATE), backend=engine)
    monkeypatch.setattr(command, "evaluate", tinily)
    output = tmp_path / "f"
    assert sweep(world, "--tasks", str(world / "tasks"), "--ratios", "1.5,6,10000", "-o", str(output)) == 0
    table = capsys.readouterr().out
    document = json.loads((output / "frontier.json").read_text())
    near, far, lost = document["points"]
    assert near["kept"]["estimate"] > 0.9 > far["kept"]["estimate"]
    for point in (near, far):
        assert point["kept"]["low"] <= point["kept"]["estimate"] <= point["kept"]["high"]
        assert f"{100 * point['kept']['estimate']:.1f} (" in table
    assert lost["kept"] is None and lost["problem"]
    assert document["evaluation"]["about"]["tasks"] == [str(world / "tasks")]
    assert document["evaluation"]["arms"]["original"]["score"]["n"] == 12 * len(NAMES)
    assert "score kept" in (output / "frontier.svg").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "f"}


def test_what_eval_refuses_is_refused_before_anything_is_encoded(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(world, "--tasks", str(tmp_path / "none"), "-o", str(tmp_path / "f")) == 2
    told = capsys.readouterr().err
    assert "none: is no source of tasks" in told and "surveyed" not in told and "choosing" not in told
    assert list(tmp_path.iterdir()) == []
