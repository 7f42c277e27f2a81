"""What is foreseen for twelve real adapters and what is encoded of them; what adapters of one start share."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from planned import task
from reference import ZOO

from lorazip.compress import planning
from lorazip.compress.curves import Curve
from lorazip.compress.sides import encode_planned
from lorazip.compress.spec import Spec
from lorazip.sources import Inputs, open_adapters

SPEC = Spec(ratio=4.0, device="cpu")


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return open_adapters([str(ZOO)])


@pytest.fixture(scope="module")
def surveyed(inputs: Inputs) -> list[Curve]:
    """Of all modules of the zoo."""
    return [planning.survey(inputs, SPEC, name) for name in inputs.modules]


@pytest.mark.parametrize(
    ("ratio", "near"), [(1.5, 0.03), (2.0, 0.03), (3.0, 0.02), (4.0, 0.02), (16.0, 0.01), (64.0, 0.01)]
)
def test_errors_are_foreseen(inputs: Inputs, surveyed: list[Curve], ratio: float, near: float) -> None:
    """Every tenth module of twelve real adapters, chosen among all: the sum of the adapters' shares of energy."""
    spec = replace(SPEC, ratio=ratio)
    choice = planning.choose(inputs, spec, surveyed)
    foreseen = choice.table.residuals.gather(2, choice.chosen[..., None])[..., 0]
    at = range(0, len(surveyed), 10)
    names = list(inputs.modules)
    tasks = [
        task(names[m], [adapter.low_rank(names[m]) for adapter in inputs.adapters], choice.plans[m])
        for m in at
    ]
    found = torch.stack([code.residuals for code in encode_planned(tasks, spec)], 1)
    shares = [
        (residuals.sum(1) / choice.table.energies).sum() for residuals in (foreseen[:, list(at)], found)
    ]
    assert float(shares[0]) == pytest.approx(float(shares[1]), rel=near)


def test_adapters_of_one_start_share_their_right_sides(inputs: Inputs, surveyed: list[Curve]) -> None:
    """Their A began as one: it is stored for most modules, and rows of their own take fewer bits than the others'."""
    starts = {r["task"]: r["init"] for r in map(json.loads, (ZOO / "scores.jsonl").read_text().splitlines())}
    together = [starts[adapter.name] == "shared" for adapter in inputs.adapters]
    assert sum(together) == 6
    bits: dict[bool, list[float]] = {True: [], False: []}
    loaded = 0
    for plan in planning.choose(inputs, replace(SPEC, ratio=16.0), surveyed).plans:
        for same, profile in zip(together, plan.profiles, strict=True):
            bits[same].append(sum(profile.right) / max(profile.rank, 1))
            loaded += same and profile.loaded[1]
    assert loaded > 0.75 * len(bits[True])
    assert sum(bits[True]) < 0.85 * sum(bits[False])
