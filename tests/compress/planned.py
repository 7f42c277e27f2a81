"""Options of auto, and modules to encode as planned, without the job that surveys and plans them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lorazip.adapter import LowRank
from lorazip.compress.auto import Plan
from lorazip.compress.curves import directions
from lorazip.compress.encode import prepare
from lorazip.compress.sides import Task
from lorazip.compress.spec import Spec


def spec(**options: Any) -> Spec:
    return Spec("auto", device="cpu", **options)


def task(name: str, factors: Sequence[LowRank], plan: Plan) -> Task:
    gains = torch.ones(len(factors), dtype=torch.float64)
    return Task(name, factors, plan, directions(prepare(name, factors, Spec(device="cpu"))[0]), gains)
