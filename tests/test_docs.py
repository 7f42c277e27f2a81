"""The docs are true: every command and every line of Python in them runs, and the pages that are made are current."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
from handmade import MakeAdapter

import lorazip
from lorazip import cli
from lorazip.eval import vllm_backend
from lorazip.eval.results import SCHEMA, Arm, Canary, Check, Comparison, LeftOut, Results, Row, Summary

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
PAGES += sorted(ROOT.glob("docs/*.md"))
# Not run here: make (CI runs `make test`; the script behind `make demo` is run below) and pip (test_packaging.py
# builds the wheel and uses it).
ELSEWHERE = re.compile(r"(make|python -m pip) ")
MODELS = ("eval", "bench", "transfer")  # they load a model, so they run in processes of their own


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def lines(page: Path) -> list[str]:
    """The command lines of all sh blocks, without comments."""
    found = [line.split("#")[0].strip() for block in blocks(page, "sh") for line in block.splitlines()]
    return [line for line in found if line]


def command_line(*arguments: str) -> int:
    """The exit code of `lorazip ARGUMENTS`, in this process."""
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the README and the demo share, so that the base model is made once and asked once: build/ and a cache."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def examples(tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh working directory with copies of examples/ and benchmarks/, and answers of models kept apart."""
    for name in ("examples", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / "build").mkdir()
    if (kept / "smollm2-135m").exists():
        (tmp_path / "build" / "smollm2-135m").symlink_to(kept / "smollm2-135m")
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def keep_the_base(directory: Path, kept: Path) -> None:
    """The base model that a run made, for the next one."""
    made = directory / "build" / "smollm2-135m"
    if made.is_dir() and not made.is_symlink():
        shutil.move(made, kept)


def in_a_process(line: str) -> None:
    """Run a command that loads a model as a user would, with the package's own environment first on the path."""
    done = subprocess.run(shlex.split(line), capture_output=True, text=True, check=False)
    assert done.returncode == 0, (line, done.stderr[-3000:])


@pytest.mark.timeout(900)
def test_the_readme_runs(examples: Path, kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its commands in order, then its Python, in one directory as a reader would."""
    commands = [line for line in lines(ROOT / "README.md") if not ELSEWHERE.match(line)]
    assert len(commands) >= 10
    for line in commands:
        program, *arguments = shlex.split(line)
        if program == "python" and (examples / arguments[-1]).exists():
            continue  # the base model, made by the demo
        if program == "python" or arguments[0] in MODELS:
            if arguments[0] != "bench" or vllm_backend.installed():
                in_a_process(line)
            continue
        assert program == "lorazip", line
        assert command_line(*arguments) == 0, (line, capsys.readouterr().err)
    gated = json.loads((examples / "gated" / "results.json").read_text())
    assert gated["cost"]["made"] == 0 and gated["gate"]["verdict"] == "pass"
    keep_the_base(examples, kept)
    space: dict[str, Any] = {}
    python = blocks(ROOT / "README.md", "python")
    assert len(python) >= 3
    for block in python:
        exec(compile(block, "README.md", "exec"), space)  # noqa: S102 - our own text
    assert space["D"].shape == (576, 576)
    assert (examples / "report.html").stat().st_size > 10_000
    assert_the_table_tells("auto, error 0.1", lorazip.Bundle.open("zoo.lorazip"))
    assert_the_table_tells("svd, error 0.1", lorazip.Bundle.open("python.lorazip"))


def assert_the_table_tells(row: str, bundle: lorazip.Bundle) -> None:
    """The README's measured figures are still those of the code: bytes, ratio and errors, not seconds."""
    cells = next(
        line.split("|")
        for line in (ROOT / "README.md").read_text().splitlines()
        if line.startswith(f"| {row} |")
    )
    errors = [adapter.record.error for adapter in bundle]
    ratio = bundle.original_bytes / bundle.nbytes
    measured = [bundle.nbytes / 1e6, ratio, sum(errors) / len(errors), max(errors)]
    assert [float(cell) for cell in cells[2:6]] == pytest.approx(measured, rel=0.01)


def test_other_pages_have_no_commands_that_nobody_runs() -> None:
    for page in PAGES[1:]:
        assert not [line for line in lines(page) if not ELSEWHERE.match(line)], page
        assert not blocks(page, "python"), page


@pytest.mark.timeout(900)
def test_the_demo_runs(examples: Path, kept: Path) -> None:
    """What `make demo` runs after the installation; the adapters score as they did when they were trained."""
    script = examples / "examples" / "demo.sh"
    done = subprocess.run(["sh", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "12 adapters" in done.stdout
    results = json.loads((examples / "build" / "demo" / "eval" / "results.json").read_text())
    recorded = [
        json.loads(line) for line in (examples / "examples" / "zoo" / "scores.jsonl").read_text().splitlines()
    ]
    mean = sum(row["lora"]["exact_match"] for row in recorded) / len(recorded)
    (original,) = (one for one in results["summary"] if one["arm"] == "original")
    assert original["score"]["n"] == 120
    assert original["score"]["low"] <= mean <= original["score"]["high"]
    keep_the_base(examples, kept)
    assert (examples / "build" / "demo" / "report.html").is_file()
    assert list((examples / "build" / "demo" / "exported").glob("*/adapter_model.safetensors"))


# --- commands ------------------------------------------------------------------------------------------------------


def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_commands", ROOT / "docs" / "commands.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_of_commands_is_current() -> None:
    current = (ROOT / "docs" / "COMMANDS.md").read_text()
    assert reference().reference() == current, "run: .venv/bin/python docs/commands.py > docs/COMMANDS.md"


COMMANDS: dict[str, click.Command] = dict(cli.group.commands)


def example(command: click.Command) -> str:
    assert command.epilog is not None
    (line,) = re.findall(r"\AExample: lorazip (.+)\Z", command.epilog)
    return str(line)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_documented(name: str) -> None:
    command = COMMANDS[name]
    text = command.get_help(click.Context(command, info_name=name, terminal_width=100))
    assert text.rstrip().endswith(f"Example: lorazip {example(command)}")
    assert "--json" in text
    assert all(isinstance(p, click.Argument) or getattr(p, "help", None) for p in command.params)
    assert any(line.startswith(f"lorazip {name} ") for line in lines(ROOT / "README.md"))


def test_every_field_of_the_results_is_documented() -> None:
    page = (ROOT / "docs" / "EVAL.md").read_text()
    records = (Arm, Row, Comparison, Summary, Check, Canary, LeftOut, Results)
    for name in {field.name for record in records for field in dataclasses.fields(record)}:
        assert f"`{name}`" in page, name
    assert SCHEMA in page


def test_the_group_has_an_example_too() -> None:
    assert example(cli.group).split()[0] in COMMANDS


def test_the_examples_of_the_help_run(make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(make_adapter.root)
    for name in ("customer-6", "customer-7"):
        make_adapter(f"adapters/{name}")
    for name in ("inspect", "compress", "info", "verify", "export"):
        assert command_line(*shlex.split(example(COMMANDS[name]))) == 0, name
    make_adapter("adapters/customer-8")
    for name in ("add", "remove"):
        assert command_line(*shlex.split(example(COMMANDS[name]))) == 0, name
    assert set(COMMANDS) == {"inspect", "compress", "info", "verify", "export", "add", "remove", *MODELS}


# --- links and names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target


def test_the_tree_of_the_readme_is_the_tree() -> None:
    (tree,) = (block for block in blocks(ROOT / "README.md", "text") if "lorazip/" in block)
    folder = ROOT
    for line in tree.splitlines():
        names = re.match(r"( *)((?:[\w*./]+ )+)", line + " ")
        assert names is not None, line
        for name in names[2].split():
            if names[1]:
                assert list(folder.glob(name.rstrip("/"))), line
            else:
                folder = ROOT / name
                assert folder.is_dir(), line
