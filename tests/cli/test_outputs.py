"""What commands write: where it may be, the same bytes for the same inputs, nothing of the machine."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
from commandline import Run, content
from handmade import MakeAdapter

from lorazip.bundle import Bundle


def test_report(zoo: Path, lorazip: Run) -> None:
    ended = lorazip("compress", zoo, "-o", "team", "--report", "report.html", "--json")
    assert ended.code == 0 and ended.json["adapters"] == 3
    page = Path("report.html").read_text()
    assert page.startswith("<!") and "ant" in page
    Path("file").write_text("mine")
    for target in ("file/report.html", "/proc/report.html"):
        ended = lorazip("compress", zoo, "--dry-run", "--report", target)
        assert (ended.code, ended.out) == (2, "")
        assert f"{target} cannot be written" in ended.err


def test_names_of_all_scripts(make_adapter: MakeAdapter, zoo: Path, lorazip: Run, tmp_path: Path) -> None:
    for name in ("größe", "顧客-7", "Δx ½", "-".join("ab")):
        make_adapter(f"zoo/{name}")
    out = Path("büro/顧客 bundle")
    ended = lorazip("compress", zoo, "-o", out, "--json")
    assert ended.code == 0
    assert Bundle.open(out).names == sorted(["ant", "bee", "cat", "größe", "顧客-7", "Δx ½", "a-b"])
    assert lorazip("verify", out, "--against", zoo).code == 0
    ended = lorazip("export", out, "顧客-7", "größe", "-o", "peft-ü")
    assert ended.code == 0 and "顧客-7: peft-ü/顧客-7" in ended.out
    assert lorazip("remove", out, "größe").code == 0
    assert lorazip("add", out, "peft-ü/größe").code == 0
    assert "größe" in lorazip("info", out).out


@pytest.mark.parametrize(
    "output", ["team", "team/", "./team", "deep/er/team", "sub/../team", "{}/abs", "{}/abs/"]
)
def test_output_paths(zoo: Path, lorazip: Run, tmp_path: Path, output: str) -> None:
    (tmp_path / "sub").mkdir()
    output = output.format(tmp_path)
    assert lorazip("compress", zoo, "-o", output).code == 0
    assert lorazip("verify", output).code == 0
    assert not list(tmp_path.rglob("*.partial"))
    assert lorazip("export", output, "ant", "-o", "peft/").code == 0
    assert sorted(p.name for p in Path("peft").iterdir()) == ["ant"]
    assert lorazip("export", output, "ant", "--bundle", "-o", "small/").code == 0


def test_an_empty_directory_or_a_link_to_one_may_be_the_output(zoo: Path, lorazip: Run) -> None:
    Path("empty").mkdir()
    assert lorazip("compress", zoo, "-o", "empty").code == 0
    Path("real").mkdir()
    for link, target in (("link", "real"), ("dangling", "later")):
        Path(link).symlink_to(target)
        assert lorazip("compress", zoo, "-o", link).code == 0
        assert Path(link).is_symlink() and content(Path(target)) == content(Path("empty"))
    Path("real2").mkdir()
    Path("link2").symlink_to("real2")
    assert lorazip("export", "empty", "--bundle", "-o", "link2").code == 0
    assert Path("link2").is_symlink() and Bundle.open("real2").verify() == []
    Path("here").mkdir()
    os.chdir("here")
    assert lorazip("compress", "../zoo", "-o", ".").code == 0
    os.chdir("..")
    assert content(Path("here")) == content(Path("empty"))


@pytest.mark.parametrize(
    "options",
    [["--max-error", "0.3"], ["--method", "jd-full", "--max-error", "0.3", "--clusters", "2"]],
    ids=["auto", "jd-full"],
)
def test_the_same_inputs_give_the_same_bytes(
    zoo: Path, lorazip: Run, tmp_path: Path, options: list[str]
) -> None:
    assert lorazip("compress", zoo, "-o", "first", *options).code == 0
    expected = content(Path("first"))
    copy = tmp_path / "elsewhere" / "deep"
    shutil.copytree(zoo, copy, copy_function=shutil.copy)  # new times
    Path("list.txt").write_text("zoo/cat\nzoo/bee\nzoo/ant\n")
    for number, paths in enumerate((
        [zoo],
        [zoo / "cat", zoo / "ant", zoo / "bee"],
        [copy],
        ["zoo/*", "zoo/bee"],
        ["@list.txt"],
        ["ant=elsewhere/deep/ant", "zoo/[bc]*"],
    )):  # fmt: skip
        assert lorazip("compress", *paths, "-o", f"again{number}", *options, "--device", "cpu").code == 0
        assert content(Path(f"again{number}")) == expected, paths


def test_the_manifest_tells_nothing_about_the_machine(
    make_adapter: MakeAdapter, zoo: Path, lorazip: Run, tmp_path: Path
) -> None:
    (zoo / "gnu").mkdir()
    (zoo / "gnu" / "adapter_config.json").write_text("{")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_model.bin").write_bytes(b"pickle")
    arguments = [tmp_path / "zoo", tmp_path / "broken", tmp_path / "nowhere"]
    assert lorazip("compress", *arguments, "-o", "team", "--skip-bad").code == 0
    manifest = Bundle.open("team").manifest
    assert {line.split(":")[0] for line in manifest.skipped} == {"gnu", "broken", "nowhere"}
    text = (Path("team") / "bundle.json").read_text()
    for secret in (
        str(tmp_path),
        tmp_path.name,
        "/tmp",
        "--skip-bad",
        "skip_bad",
        os.uname().nodename,
        "device",
    ):
        assert secret not in text, secret
    assert not re.search(r"\b20\d\d-\d\d|\d\d:\d\d", text)
    assert "save_pretrained" not in text  # advice to whoever made the bundle is not for its readers
    assert str(tmp_path) not in (Path("team") / "README.md").read_text()
