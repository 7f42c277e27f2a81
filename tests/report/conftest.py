"""Outcomes and a page that the tests of the report look at."""

from __future__ import annotations

import pytest
from handmade import MakeAdapter
from reporting import make_varied

from lorazip.compress import report
from lorazip.compress.job import Outcome, run
from lorazip.compress.spec import Spec


@pytest.fixture(scope="module")
def made() -> dict[str, Outcome]:
    """Outcomes that several tests look at and none changes, by name: each is made once."""
    return {}


@pytest.fixture
def outcome(
    made: dict[str, Outcome], make_adapter: MakeAdapter, tmp_path_factory: pytest.TempPathFactory
) -> Outcome:
    """Seven adapters with groups, fallbacks, carried tensors, absent modules, and one that is left out."""
    if "outcome" not in made:
        make_adapter.root = tmp_path_factory.mktemp("outcome")
        make_varied(make_adapter)
        spec, out = Spec("jd-full", rank=6, max_error=0.3), make_adapter.root / "out.lorazip"
        made["outcome"] = run([make_adapter.root / "zoo"], spec, out, skip_bad=True)
    return made["outcome"]


@pytest.fixture
def page(outcome: Outcome) -> str:
    """Its page."""
    return report.render(outcome)


@pytest.fixture
def dry(
    made: dict[str, Outcome], make_adapter: MakeAdapter, tmp_path_factory: pytest.TempPathFactory
) -> Outcome:
    """A dry run of three plain adapters."""
    if "dry" not in made:
        make_adapter.root = tmp_path_factory.mktemp("dry")
        for name in "abc":
            make_adapter(name)
        made["dry"] = run([make_adapter.root], Spec("jd-full", rank=4), None)
    return made["dry"]
