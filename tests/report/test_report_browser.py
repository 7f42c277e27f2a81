"""The report in a browser: silent, whole, on a phone too, and with hundreds of adapters."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from pathlib import Path

import torch
from browsing import Page, probe, visit

from lorazip.compress import report
from lorazip.compress.job import Outcome


def test_browser_console_is_silent(page: str, tmp_path: Path) -> None:
    dom, console = visit(page, tmp_path / "visit")
    assert console == []
    assert "</footer>" in dom


def test_browser_would_tell(dry: Outcome, tmp_path: Path) -> None:
    # The other tests are worth something: errors are seen, and the page's policy stops scripts and requests.
    attack = '<script>document.title = "owned"</script><img src="https://localhost:1/x.png">'
    dom, console = visit(report.render(dry).replace("</main>", f"{attack}</main>"), tmp_path / "visit")
    assert len([line for line in console if "Content Security Policy" in line]) == 2
    assert "owned</title>" not in dom


def test_browser_decodes_all_pictures(outcome: Outcome, page: str, tmp_path: Path) -> None:
    found = probe(page, tmp_path / "wide")
    assert [len(outcome.modules), len(outcome.inputs.adapters)] in found["sizes"]  # a pixel a cell
    assert len(found["sizes"]) == page.count("data:image/png")
    assert len(found["boxes"]) == 3
    assert all(side > 50 for box in found["boxes"] for side in box)
    assert found["overflow"] == 0


def test_browser_on_a_phone(page: str, tmp_path: Path) -> None:
    assert probe(page, tmp_path / "narrow", width=500)["overflow"] == 0


def many(outcome: Outcome, n: int, layers: int) -> Outcome:
    """An outcome like this one with n adapters and 7 modules a layer, its errors and fallbacks invented."""
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    modules = tuple(f"model.layers.{layer}.{kind}" for layer in range(layers) for kind in kinds)
    one = outcome.inputs.adapters[0]
    real, info = next(iter(one.modules.items()))
    adapters = []
    for i in range(n):
        adapter = copy.copy(one)
        adapter.name = f"adapter-{i:04d}"
        adapter.modules = dict.fromkeys(modules, info)
        adapter.low_rank = lambda module: one.low_rank(real)  # type: ignore[method-assign]
        adapters.append(adapter)
    generator = torch.Generator().manual_seed(0)
    errors = torch.rand(n, len(modules), generator=generator, dtype=torch.float64) ** 4
    return replace(
        outcome,
        inputs=replace(outcome.inputs, adapters=tuple(adapters)),
        errors=errors,
        adapter_errors=errors.mean(1),
        fallbacks=errors < 0.2,
        spectra=tuple(torch.tensor([0.5, 0.3, 0.2]) for _ in modules),
        modules=modules,
    )


def test_browser_takes_hundreds(dry: Outcome, tmp_path: Path) -> None:
    begun = time.perf_counter()
    html = report.render(many(dry, 500, 32))
    assert time.perf_counter() - begun < 60  # 3 s on one free core
    assert len(html.encode()) < 5e6
    assert "400 adapters more" in Page(html).text("fallbacks")
    found = probe(html, tmp_path / "visit")
    assert [224, 500] in found["sizes"]
    assert found["overflow"] == 0
