"""The report: its numbers, its words and its safety."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from browsing import Page
from handmade import MakeAdapter
from reporting import HOSTILE, WIDE

from lorazip import units
from lorazip.compress import findings, pictures, report
from lorazip.compress.job import Outcome, run
from lorazip.compress.spec import Spec
from lorazip.errors import Defect, TargetError
from lorazip.kinds import columns_by_kind


def test_bytes_are_those_on_disk(outcome: Outcome, page: str) -> None:
    assert outcome.bundle is not None
    rows = {row.name: row.nbytes for row in findings.byte_rows(outcome)}
    files = {
        p.relative_to(outcome.bundle.path).as_posix(): p
        for p in outcome.bundle.path.rglob("*")
        if p.is_file()
    }
    sizes = {name: path.stat().st_size for name, path in files.items()}
    assert sum(rows.values()) == sum(sizes.values()) == outcome.bundle.nbytes == outcome.bundle_bytes
    heads = {
        name: 8 + int.from_bytes(path.read_bytes()[:8], "little")
        for name, path in files.items()
        if name.endswith(".safetensors")
    }
    assert rows["Headers"] == sum(heads.values())
    assert rows["Shared tensors"] == sizes["shared.safetensors"] - heads["shared.safetensors"]
    assert rows["Carried tensors"] == (3 * 96 + 3) * 4
    assert rows["Manifest"] == sizes["bundle.json"]
    assert rows["Card"] == sizes["README.md"]
    assert rows["Fallbacks"] > 0
    for nbytes in (*rows.values(), outcome.bundle.nbytes):
        assert f"{nbytes:,}" in Page(page).sections["bytes"]


def test_fallback_bytes_are_the_own_factors(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    for name in "abcd":
        make_adapter(f"zoo/{name}", modules=WIDE, rank=2, dtype=torch.float16)
    found = run([tmp_path / "zoo"], Spec("jd-full", rank=1, max_error=0), tmp_path / "out.lorazip")
    assert bool(found.fallbacks.all())
    rows = {row.name: row.nbytes for row in findings.byte_rows(found)}
    assert rows["Fallbacks"] == 4 * 2 * 2 * sum(out + in_ for out, in_ in WIDE.values())
    assert "Adapters’ own tensors" not in rows


def test_svd_shares_nothing(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    make_adapter("zoo/a")
    found = run([tmp_path / "zoo"], Spec(method="svd", rank=2), tmp_path / "out.lorazip")
    rows = {row.name: row for row in findings.byte_rows(found)}
    assert "Shared tensors" not in rows
    assert rows["Adapters’ own tensors"].meaning.endswith("the factors of each adapter")
    seen = Page(report.render(found))
    assert "svd gives every adapter factors of its own" in seen.text("fallbacks")
    assert "None: no two adapters" in seen.text("groups")


def test_dry_run(dry: Outcome) -> None:
    seen = Page(report.render(dry))
    assert "nothing was written" in seen.text("")
    assert f"{dry.bundle_bytes:,}" in seen.sections["bytes"]
    assert "Own file" not in seen.text("errors")
    assert "no bound on the error was given" in seen.text("fallbacks")
    assert "every input is in the bundle" in seen.text("skipped")
    assert "low-rank factors only" in seen.text("carried")


def test_the_page_of_auto_says_what_it_chose(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    for name in "abcd":
        make_adapter(f"zoo/{name}", modules=WIDE, rank=2, a_seed=1)
    for output in (None, tmp_path / "out.lorazip"):
        found = run([tmp_path / "zoo"], Spec("auto", ratio=5.0), output)
        seen = Page(report.render(found))
        assert [choice.kind for choice in found.choices] == ["k_proj", "q_proj"]
        for choice in found.choices:
            assert f"{choice.sentence}." in seen.sections["choices"]
            assert units.size(choice.own_bytes) in seen.sections["choices"]
            assert units.share(choice.error or 0) in seen.sections["choices"]
        assert ("It is predicted" in seen.text("errors")) == (output is None)
        assert ("Mean error, predicted" in seen.sections[""]) == (output is None)
        assert "auto chooses" in seen.text("fallbacks")
        assert "Fallbacks" not in seen.sections[""]


def test_the_page_says_what_happened(outcome: Outcome, page: str) -> None:
    seen = Page(page)
    assert "7 LoRA adapters of" in seen.text("")
    for adapter in outcome.inputs.adapters:
        assert adapter.name in seen.sections["errors"]
    assert "a1, a2, a3" in seen.text("groups")
    assert "bad" in seen.text("skipped")
    assert "NaN" in seen.text("skipped")
    assert "base_model.model.classifier.weight" in seen.text("carried")
    assert "F32 3 × 96" in seen.text("carried")
    assert "max-error 0.3" in seen.text("options")
    for row in findings.fallback_rows(outcome, findings.kinds(outcome)):
        assert row.adapter in seen.sections["fallbacks"]
        assert f"{row.count} of {row.modules}" in seen.sections["fallbacks"]


def test_rows_are_worst_first_and_name_the_worst_module(outcome: Outcome) -> None:
    rows = findings.adapter_rows(outcome, [["a1", "a2"]])
    assert [row.error for row in rows] == sorted(outcome.adapter_errors.tolist(), reverse=True)
    assert {row.name: row.group for row in rows}["a2"] == 1
    for row in rows:
        i = [adapter.name for adapter in outcome.inputs.adapters].index(row.name)
        column = outcome.modules.index(row.worst_module)
        assert (
            row.worst_error
            == float(outcome.errors[i, column])
            == float(outcome.errors[i].nan_to_num(-1).max())
        )


def test_kinds(outcome: Outcome) -> None:
    k, q = findings.kinds(outcome)
    assert (k.name, q.name) == ("k_proj", "q_proj")
    layers = [outcome.modules[column].split(".")[2] for column in q.columns]
    assert layers == [str(layer) for layer in range(12)]  # 10 after 9
    assert q.shapes == ((48, 96),)
    assert q.fallbacks + k.fallbacks == int(outcome.fallbacks.sum())
    assert q.mean_error == pytest.approx(float(outcome.errors[:, list(q.columns)].nanmean()))
    assert q.mean[-1] == pytest.approx(1)
    assert all(low <= mean <= high for low, mean, high in zip(q.low, q.mean, q.high, strict=True))
    assert q.needed(0.5) == 1 + [share >= 0.5 for share in q.mean].index(True)
    assert replace(q, mean=(0.1, 0.2)).needed(0.9) is None


def test_kinds_of_odd_names() -> None:
    names = ["h.0.attn.c_proj", "h.0.mlp.c_proj", "h.1.attn.c_proj", "h.1.mlp.c_proj", "wte", "3"]
    assert columns_by_kind(names) == {
        "3": (5,),
        "attn.c_proj": (0, 2),
        "mlp.c_proj": (1, 3),
        "wte": (4,),
    }


def test_many_fallbacks_are_counted_by_kind(outcome: Outcome) -> None:
    all_fell = replace(outcome, fallbacks=outcome.errors.isfinite())
    rows = findings.fallback_rows(all_fell, findings.kinds(outcome))
    assert rows[0].places == "12 of 12 k_proj, 12 of 12 q_proj"
    assert rows[-1].places == "12 of 12 q_proj"


def test_long_lists_are_cut_and_said_to_be(outcome: Outcome) -> None:
    defects = tuple(Defect(f"/home/me/zoo/d{i}", "m", "t", "is bad") for i in range(report.LISTED + 7))
    seen = Page(report.render(replace(outcome, inputs=replace(outcome.inputs, skipped=defects))))
    assert "7 defects more" in seen.text("skipped")
    assert "d99" in seen.sections["skipped"]
    assert "/home/me" not in seen.text("skipped")


def test_same_outcome_same_page(outcome: Outcome, page: str) -> None:
    assert report.render(outcome) == page


def test_another_process() -> None:
    code = "import sys, torch, lorazip.compress.report; late = 'matplotlib' not in sys.modules; "
    code += "from lorazip.compress import pictures; "
    code += "print(late, pictures.heat_map(torch.arange(1., 7).view(2, 3), ['a', 'b'], [('k', 1), ('q', 2)]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = pictures.heat_map(torch.arange(1.0, 7).view(2, 3), ["a", "b"], [("k", 1), ("q", 2)])
    assert done.stdout == f"True {here}\n"  # matplotlib is imported late, and pictures are the same


def test_hostile_texts_are_escaped(outcome: Outcome) -> None:
    modules = list(outcome.modules)
    modules[3] = f"model.{HOSTILE}.font-family: x"
    shapes = {new: outcome.inputs.modules[old] for new, old in zip(modules, outcome.modules, strict=True)}
    inputs = replace(
        outcome.inputs,
        revision="<img src=x onerror=alert(1)>",
        skipped=(Defect(HOSTILE, HOSTILE, HOSTILE, f"{HOSTILE}\x1b[2J", "'\"><svg onload=alert(1)>"),),
    )
    inputs.__dict__["modules"] = shapes
    text = report.render(replace(outcome, inputs=inputs, modules=tuple(modules)))
    seen = Page(text)
    assert HOSTILE in seen.text("")
    assert "\x1b" not in text
    forbidden = {"script", "img", "iframe", "object", "embed", "link", "base", "form"}
    assert not forbidden.intersection(tag for tag, _ in seen.tags)
    assert not [name for _, attrs in seen.tags for name in attrs if name.startswith("on")]


def test_the_page_needs_nothing_but_itself(page: str) -> None:
    urls = set(re.findall(r"https?://[^\s\"'<>)]+", page))
    assert urls <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    sources = [
        value or ""
        for _, attrs in Page(page).tags
        for name, value in attrs.items()
        if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster")
    ]
    assert sources
    assert all(source.startswith(("#", "data:image/png;base64,")) for source in sources)
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)


def test_ids_are_unique_and_known(page: str) -> None:
    ids = [attrs["id"] for _, attrs in Page(page).tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]*)\)", page)) <= set(ids)
    assert set(re.findall(r'href="#([^"]*)"', page)) <= set(ids)


@pytest.mark.parametrize("fill", [0.0, 1e-12, 0.4])
def test_degenerate_errors(dry: Outcome, fill: float) -> None:
    errors = torch.full_like(dry.errors, fill)
    found = report.render(
        replace(dry, errors=errors, adapter_errors=torch.full_like(dry.adapter_errors, fill))
    )
    assert "viewBox" in found


def test_exact_cells_do_not_stretch_the_scale() -> None:
    errors = torch.tensor([[0.5, 1e-14, 0.0], [0.2, 0.01, torch.nan]], dtype=torch.float64)
    picture = pictures.heat_map(errors, ["a", "b"], [("k", 3)])
    labels = re.findall(r">([0-9.e-]+)</text>", picture)
    assert min(float(label) for label in labels) == 0.0001


def test_write_is_whole_or_not_at_all(dry: Outcome, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    report.write(path, dry)
    assert path.read_text(encoding="utf-8") == report.render(dry)
    with pytest.raises(TargetError):
        report.write(tmp_path / "no" / "report.html", dry)


def test_units() -> None:
    assert [units.size(n) for n in (0, 999, 1000, 2_471_300, 999_600, 9_400_000_000)] == [
        "0 B", "999 B", "1.00 kB", "2.47 MB", "1.00 MB", "9.40 GB",
    ]  # fmt: skip
    assert units.size(3 * 10**15) == "3,000 TB"
    assert [units.figure(x) for x in (0, 0.1634, 0.0123, 0.00123, 1.23e-7, 1)] == [
        "0", "0.163", "0.012", "0.0012", "1.23e-07", "1.000",
    ]  # fmt: skip
    assert [units.times(x) for x in (6.384, 24.13, 130.2)] == ["6.38×", "24.1×", "130×"]
    assert [units.share(x) for x in (0, 0.0001, 0.848, 1)] == ["0.0 %", "< 0.1 %", "84.8 %", "100.0 %"]
    assert [units.duration(x) for x in (4.81, 59.99, 726, 7200)] == ["4.81 s", "60.0 s", "12.1 min", "2.00 h"]
    assert units.counted(1, "adapter") == "1 adapter"
    assert units.counted(1200, "entry", "entries") == "1,200 entries"
