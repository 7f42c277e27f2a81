"""What we ship: wheel and sdist of real files under one top-level name, and a tree that names no machine."""

from __future__ import annotations

import ast
import re
import stat
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKED = ("compress", "transfer", "eval")
# Not written by us, or not text: git's folder, what make and the tools leave behind, tensors.
MADE = (
    r"^(\.git|\.venv[\w-]*|build|dist|\.hypothesis|\.\w+_cache|\w+\.egg-info)/"
    r"|^\.coverage|__pycache__|\.safetensors$"
)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one wheel, built from the sdist beside it, as `make test` and a release build them."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=out, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return out


@pytest.fixture(scope="session")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


def expected_files() -> dict[str, bytes]:
    """Everything that belongs into the package, by its name inside it; the links are followed."""
    package = ROOT / "lorazip"
    folders = (package, *(package / name for name in LINKED))
    patterns = ("*.py", "*.j2", "py.typed", "trellis.safetensors")
    files = {path for folder in folders for pattern in patterns for path in folder.rglob(pattern)}
    return {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in files}


def test_wheel_has_one_top_level_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        top = {name.split("/")[0] for name in archive.namelist()}
    info = {name for name in top if name.endswith(".dist-info")}
    assert len(info) == 1
    assert top - info == {"lorazip"}


def test_wheel_holds_the_real_files(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name: archive.read(name) for name in archive.namelist() if name.startswith("lorazip/")}
        modes = {entry.filename: entry.external_attr >> 16 for entry in archive.infolist()}
    assert held == expected_files()
    assert "lorazip/compress/lowrank.py" in held
    assert any(name.startswith("lorazip/templates/") for name in held)
    assert "lorazip/trellis.safetensors" in held
    assert not [name for name, mode in modes.items() if stat.S_ISLNK(mode)]


def test_sdist_holds_the_real_files(built: Path) -> None:
    held = {}
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        members = archive.getmembers()
        assert not [member.name for member in members if not (member.isfile() or member.isdir())]
        for member in members:
            name = member.name.partition("/")[2]
            stream = archive.extractfile(member)
            if name.startswith("lorazip/") and stream is not None:
                held[name] = stream.read()
    assert held == expected_files()


def test_wheel_names_its_command_and_its_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (info,) = {name.split("/")[0] for name in archive.namelist() if not name.startswith("lorazip/")}
        assert "lorazip = lorazip.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"


def test_wheel_works_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    program = f"""if True:
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import lorazip.cli, lorazip.compress.svd  # lorazip.compress itself is the function of the public API
        import lorazip.trellis
        assert lorazip.trellis.trellis(1.5).table.shape == (1024, 2)
        print(lorazip.cli.__file__, sys.modules["lorazip.compress.svd"].__file__, sep="\\n", flush=True)
        lorazip.cli.main(["--help"])
    """
    command = [sys.executable, "-I", "-c", program]  # -I: nothing is taken from the working directory
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr
    assert all(line.startswith(str(tmp_path)) for line in result.stdout.splitlines()[:2])


def test_links_are_relative() -> None:
    for name in LINKED:
        link = ROOT / "lorazip" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..", name)


def test_constraints_pin_one_version_each() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)  # and no local suffix such as +cpu
    (torch,) = re.findall(r"torch==[\d.]+", (ROOT / "Makefile").read_text())
    assert torch in pins


def test_no_file_names_a_path_of_a_machine() -> None:
    # /home/me is nobody's: tests use it as an example.
    pattern = re.compile(rb"(?<![\w.~-])/(?:work|root|home|farm|Users)/(?!me\b)\w+")
    found = []
    for path in ROOT.rglob("*"):
        name = path.relative_to(ROOT).as_posix()
        if not re.search(MADE, name) and path.is_file() and not path.is_symlink():
            found += [f"{name}: {hit.group().decode()}" for hit in pattern.finditer(path.read_bytes())]
    assert not found


ARROWS = {  # folder -> other parts of the package that its files may import
    "lorazip": set(),
    "compress": set(),
    "eval": {"compress.check"},  # a bundle holds these very originals
    "transfer": {"eval"},
    "lorazip/cli": {"compress", "eval", "transfer"},
}


@pytest.mark.parametrize("folder", ARROWS)
def test_imports_point_one_way(folder: str) -> None:
    """The command line -> jobs -> core; no circles. `__init__` is the face, which hands out all."""
    wrong = []
    for path in sorted((ROOT / folder).glob("*.py")):
        if path == ROOT / "lorazip" / "__init__.py":
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            found = []
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                found = [node.module, *(f"{node.module}.{name.name}" for name in node.names)]
            elif isinstance(node, ast.Import):
                found = [name.name for name in node.names]
            for name in found:
                part = name.removeprefix("lorazip.")
                other = part.split(".")[0] in LINKED and part.split(".")[0] != folder
                allowed = any(
                    part == one or part.startswith(one + ".") or one.startswith(part + ".")
                    for one in ARROWS[folder]
                )
                if other and not allowed:
                    wrong.append(f"{path.relative_to(ROOT)}: {name}")
    assert wrong == []
