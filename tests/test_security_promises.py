"""The promises of SECURITY.md that no other test covers, and that every test it names exists."""

from __future__ import annotations

import ast
import re
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from handmade import MakeAdapter

import lorazip
from lorazip import cli, edit, export, sources
from lorazip.errors import BundleError, InputError

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path for folder in ("lorazip", "compress", "eval", "transfer") for path in (ROOT / folder).rglob("*.py")
)


def test_every_promise_names_tests_that_exist() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    promises, rest = text.split("## What is not promised")
    for promise in promises.split("\n\n**")[1:]:
        assert re.search(r"^- `tests/", promise, re.MULTILINE), promise[:60]
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) >= 20
    assert len(re.findall(r"^- `tests/.*", text, re.MULTILINE)) == len(named)
    for file, name in named:
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE), (file, name)
    assert "tests/" not in rest


# What turns data into code, directly or by a name that the data give.
CODE = {"eval", "exec", "compile", "__import__"}
CODE_OF = {
    "torch": {"load", "hub", "jit", "compile"},
    "numpy": {"load"},
    "np": {"load"},
    "os": {"system", "popen", "execv", "execve", "spawnv"},
}
MODULES = {
    "pickle",
    "marshal",
    "shelve",
    "dill",
    "joblib",
    "importlib",
    "subprocess",
    "ctypes",
    "runpy",
    "yaml",
}
STARTERS = {"serve.py", "fits.py"}  # they start this package's own workers as processes
BASES = {"transformers", "peft", "vllm", "accelerate"}  # what would open a base model


def imported(tree: ast.AST) -> set[str]:
    """Top-level names of all modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [node.module]
        # What is installed may be asked: that imports nothing.
        found |= {
            name.split(".")[0] for name in names if name not in ("importlib.metadata", "importlib.util")
        }
    return found


def calls(tree: ast.AST) -> set[str]:
    """Everything that is called, as "name" or "module.name"."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                found.add(node.func.id)
            elif isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
                found.add(f"{node.func.value.id}.{node.func.attr}")
    return found


def test_the_package_has_no_way_to_run_code_from_files() -> None:
    forbidden = CODE | {f"{module}.{name}" for module, names in CODE_OF.items() for name in names}
    assert len(SOURCES) > 40
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        allowed = {"subprocess"} if path.name in STARTERS else set()
        assert not imported(tree) & (MODULES - allowed), path
        assert not calls(tree) & forbidden, path


def test_no_model_may_bring_code() -> None:
    """Every call that could run a model's or a tokenizer's own code says that it must not."""
    asked = 0
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".from_pretrained", ".LLM")):
                given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert given.get("trust_remote_code") == "False", f"{path}:{node.lineno}"
                asked += 1
    assert asked >= 4


def test_the_base_that_a_file_names_is_never_touched(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    for path in SOURCES:
        # These open bases that the user names.
        if path.parent.name not in ("eval", "transfer") and path.name != "base.py":
            assert not imported(ast.parse(path.read_text())) & BASES, path
    base = tmp_path / "base"
    base.mkdir()
    opened: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event in ("open", "os.listdir", "os.scandir") and str(base) in str(arguments[0]):
            opened.append(str(arguments[0]))

    watching = True
    sys.addaudithook(watch)  # hooks cannot be taken away again; this one is told to stop
    try:
        path = make_adapter("in/a", base_model_name_or_path=str(base))
        bundle = lorazip.compress([path], output=tmp_path / "x")
        assert bundle.verify() == []
        export.export(bundle, [], tmp_path / "out")
    finally:
        watching = False
    assert bundle.manifest.base == str(base)
    assert not opened


def test_local_work_opens_no_connection(
    make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: object) -> None:
        raise AssertionError(f"a connection to {arguments}")

    monkeypatch.chdir(make_adapter.root)
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    make_adapter("in/a")
    make_adapter("in/b")
    for line in (
        "inspect in",
        "compress in -o x --report r.html",
        "info x",
        "verify x --against in",
        "export x -o out",
        "remove x b",
        "add x in/b",
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(line.split())
        assert ended.value.code == 0, (line, capsys.readouterr().err)


def test_of_a_repository_two_files_are_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def snapshot(repo: str, **options: Any) -> str:
        asked.append((repo, options))
        return str(tmp_path)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    with pytest.raises(InputError, match="the repository has no adapter_config"):
        sources.resolve(["org/name@abc"])
    names = ["adapter_config.json", "adapter_model.safetensors"]
    assert asked == [("org/name", {"revision": "abc", "allow_patterns": names})]


def test_a_huge_manifest_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "bundle.json").open("wb") as file:
        file.truncate(2**40)  # a terabyte that takes no disk
    with pytest.raises(BundleError, match="more than 268435456 bytes"):
        lorazip.Bundle.open(tmp_path)


def test_damaged_bytes_never_get_into_an_export(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    paths = [make_adapter(f"in/{name}") for name in ("a", "b")]
    bundle = lorazip.compress(paths, lorazip.Spec("jd-full", rank=4), tmp_path / "x")
    for file in (bundle.path / "adapters" / "a.safetensors", bundle.path / "shared.safetensors"):
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(BundleError, match="sha256"):
            export.export(bundle, ["a"], tmp_path / "out")
        with pytest.raises(BundleError, match="sha256"):
            edit.subset(bundle, ["a"], tmp_path / "sub")
        file.write_bytes(whole)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "sub").exists()
    export.export(bundle, ["a"], tmp_path / "out")
