"""From arguments to opened adapters: names, lists, globs, links, the Hub's cache, and checks among adapters."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch
from handmade import MakeAdapter
from huggingface_hub import constants

from lorazip.errors import InputError
from lorazip.sources import examine, open_adapters, resolve

PREFIX = "base_model.model."

ZOO = Path(__file__).parents[1] / "examples" / "zoo"


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def found(*paths: str) -> list[tuple[str, str]]:
    return [(source.name, str(source.directory)) for source in resolve(paths)]


def refused(*paths: str) -> str:
    with pytest.raises(InputError) as caught:
        resolve(paths)
    assert caught.value.exit_code == 2
    assert all(defect.remedy for defect in caught.value.defects)
    return str(caught.value)


def test_an_adapter_is_named_by_its_directory(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    make_adapter("zoo/fox")
    assert found("zoo/fox") == [("fox", "zoo/fox")]
    assert found("zoo/fox/") == [("fox", "zoo/fox")]
    assert found(str(tmp_path / "zoo" / "fox")) == [("fox", str(tmp_path / "zoo" / "fox"))]
    os.chdir("zoo/fox")
    assert found(".") == [("fox", ".")]
    os.mkdir("sub")
    assert found("sub/..") == [("fox", "sub/..")]


def test_a_tree_is_named_by_the_path_below_it(make_adapter: MakeAdapter) -> None:
    for path in (
        "runs/b",
        "runs/a/checkpoint-100",
        "runs/a/checkpoint-20",
        "runs/b/checkpoint-5",
        "runs/.old/c",
    ):
        make_adapter(path)
    (Path("runs") / "README.md").write_text("")
    assert found("runs") == [
        ("a--checkpoint-100", "runs/a/checkpoint-100"),
        ("a--checkpoint-20", "runs/a/checkpoint-20"),
        ("b", "runs/b"),
    ]


def test_globs(make_adapter: MakeAdapter) -> None:
    for path in ("runs/a/final", "runs/b/final", "runs/.c/final", "runs/d/x/y", "other/final"):
        make_adapter(path)
    os.mkdir("runs/empty")
    (Path("runs") / "notes.txt").write_text("")
    assert found("runs/*/final") == [("a--final", "runs/a/final"), ("b--final", "runs/b/final")]
    assert found("runs/[ab]*") == [("a--final", "runs/a/final"), ("b--final", "runs/b/final")]
    assert found("**/y") == [("runs--d--x--y", "runs/d/x/y")]
    assert [name for name, _ in found("runs/*")] == ["a--final", "b--final", "d--x--y"]
    assert "matches no adapter" in refused("runs/z*")


def test_a_path_with_glob_characters_is_taken_as_it_is(make_adapter: MakeAdapter) -> None:
    make_adapter("runs[1]/a")
    make_adapter("runs1/b")
    assert found("runs[1]/a") == [("a", "runs[1]/a")]
    assert found("runs[1]") == [("a", "runs[1]/a")]


def test_lists(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    for name in "abcd":
        make_adapter(f"lists/{name}")
    (tmp_path / "lists" / "one.txt").write_text("\ufeff# first\n\n  a  \nfirst=b\n@two.txt\n")
    (tmp_path / "lists" / "two.txt").write_text(f"c\r\n{tmp_path}/lists/d\n")
    assert [name for name, _ in found("@lists/one.txt")] == ["a", "c", "d", "first"]
    (tmp_path / "loop.txt").write_text("@loop.txt")
    assert "names itself" in refused("@loop.txt")
    (tmp_path / "empty.txt").write_text("# nothing\n")
    assert "the list is empty" in refused("@empty.txt")
    assert "cannot be read" in refused("@missing.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe")
    assert "not UTF-8" in refused("@binary.txt")


def test_names_can_be_given(make_adapter: MakeAdapter) -> None:
    make_adapter("runs/x/final")
    make_adapter("runs/y/final")
    make_adapter("lr=3")
    assert found("x=runs/x/final", "y=runs/y") == [("x", "runs/x/final"), ("y", "runs/y/final")]
    assert found("lr=3") == [("lr=3", "lr=3")]
    assert found("three=lr=3") == [("three", "lr=3")]
    assert "one name for 2 adapters" in refused("x=runs")
    assert "does not exist" in refused("x=nowhere")
    assert "the name has /" in refused("../x=lr=3")


def test_a_directory_counts_once_for_each_name(make_adapter: MakeAdapter) -> None:
    make_adapter("zoo/a")
    os.symlink("zoo", "link")
    assert len(found("zoo", "zoo/a", "link/a", "zoo/*")) == 1
    assert [name for name, _ in found("zoo", "b=zoo/a")] == ["a", "b"]


def test_equal_names_are_refused(make_adapter: MakeAdapter) -> None:
    for path in ("x/final", "y/final", "z/Final", "w/other"):
        make_adapter(path)
    text = refused("x/final", "y/final", "w/other")
    assert "final: 2 adapters have this name (x/final) (give it a name: NAME=PATH" in text
    assert "other" not in text
    assert "final: the name differs from Final in case only" in refused("x/final", "z/Final")


def test_what_is_no_adapter_is_refused(make_adapter: MakeAdapter) -> None:
    make_adapter("a")
    os.mkdir("empty")
    assert "holds no adapter" in refused("empty")
    assert "nowhere: does not exist" in refused("nowhere")
    assert "name its directory: a" in refused("a/adapter_config.json")
    assert "no adapter is named" in refused()
    assert refused("empty", "nowhere", "a/adapter_config.json").count("\n") == 2
    for odd in ("\x00", "~nobody-of-this-name/x/y", "x" * 5000, "[", "**x/*", "=", "@", ""):
        with pytest.raises(InputError):
            resolve([odd])


@pytest.mark.timeout(20)
def test_loops_of_links_end(make_adapter: MakeAdapter) -> None:
    make_adapter("zoo/a")
    make_adapter("far/b")
    for i in range(5):
        os.symlink("..", f"zoo/loop{i}")
    os.symlink("self", "zoo/self")
    os.symlink("../far", "zoo/far")
    os.symlink("a", "zoo/twin")
    os.symlink("nowhere", "zoo/dangling")
    names = [name for name, _ in found("zoo")]
    assert names == ["a", "far--b", "twin"]
    assert "a" in [name for name, _ in found("zoo/**")]


def test_a_directory_that_cannot_be_read_is_reported(
    make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter("zoo/a")
    make_adapter("zoo/closed/b")
    listdir = os.listdir

    def refuse(path: Path) -> list[str]:
        if path.name == "closed":
            raise PermissionError(13, "Permission denied")
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)
    assert "zoo/closed: cannot be read: Permission denied (check its rights)" in refused("zoo")
    assert "zoo/closed: cannot be read: Permission denied (check its rights)" in refused("z*")


@pytest.fixture
def hub(make_adapter: MakeAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An offline cache of the Hub with org/fox, at main and v2, and org/empty without an adapter."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit = "0123456789abcdef0123456789abcdef01234567"
    for repo in (cache / "models--org--fox", cache / "models--org--empty"):
        (repo / "refs").mkdir(parents=True)
        (repo / "snapshots" / commit).mkdir(parents=True)
        for ref in ("main", "v2"):
            (repo / "refs" / ref).write_text(commit)
    make_adapter(cache / "models--org--fox" / "blobs")
    for file in (cache / "models--org--fox" / "blobs").iterdir():
        link = cache / "models--org--fox" / "snapshots" / commit / file.name
        link.symlink_to(Path("..") / ".." / "blobs" / file.name)
    return cache


@pytest.mark.usefixtures("hub")
def test_hub_ids_come_from_the_offline_cache() -> None:
    inputs = open_adapters(["org/fox", "new=org/fox@v2"])
    assert [(adapter.name, len(adapter.modules)) for adapter in inputs.adapters] == [
        ("new", 6),
        ("org--fox", 6),
    ]
    text = refused("org/bear", "org/empty", "org/fox@v3", "org/-x", "org/fox/x")
    lines = text.split("\n")
    assert len(lines) == 5
    assert lines[0] == "org/-x: does not exist (name a directory, a glob, @list.txt or org/name)"
    assert lines[1].startswith("org/bear: there is no such path, and the Hub did not give it: ")
    assert lines[2].startswith("org/empty: the repository has no adapter_config.json at its top (download it")
    assert lines[3].startswith("org/fox/x: does not exist")
    assert lines[4].startswith("org/fox@v3: there is no such path, and the Hub did not give it: ")


def test_a_path_goes_before_the_hub(make_adapter: MakeAdapter) -> None:
    make_adapter("org/fox")
    assert found("org/fox") == [("fox", "org/fox")]


def test_inputs(make_adapter: MakeAdapter) -> None:
    make_adapter("zoo/b", revision="main")
    make_adapter("zoo/a", modules={"model.layers.0.mlp.up_proj": (48, 24)})
    calls: list[tuple[int, int]] = []
    inputs = open_adapters(["zoo"], progress=lambda done, total: calls.append((done, total)))
    assert [adapter.name for adapter in inputs.adapters] == ["a", "b"]
    assert (inputs.base, inputs.revision, inputs.skipped) == ("org/base", None, ())
    assert inputs.modules == dict(
        sorted((make_adapter.modules | {"model.layers.0.mlp.up_proj": (48, 24)}).items())
    )
    lines = [f"{module} {out} {in_}\n" for module, (out, in_) in inputs.modules.items()]
    assert inputs.fingerprint() == hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
    assert calls == [(1, 2), (2, 2)]


def test_one_revision_is_kept(make_adapter: MakeAdapter) -> None:
    make_adapter("zoo/a", revision="abc")
    make_adapter("zoo/b", revision="abc")
    assert open_adapters(["zoo"]).revision == "abc"
    assert open_adapters(["zoo"], base="org/base").revision == "abc"
    assert open_adapters(["zoo"], base="other").revision is None


def messages(*paths: str, **options: str) -> str:
    with pytest.raises(InputError) as caught:
        open_adapters(paths, **options)  # type: ignore[arg-type]
    return str(caught.value)


def test_another_base_needs_the_option(make_adapter: MakeAdapter) -> None:
    for name in "abc":
        make_adapter(f"zoo/{name}", base_model_name_or_path="org/base" if name != "b" else "/models/base")
    text = messages("zoo")
    assert text.startswith("b: its base is /models/base, most adapters have org/base (")
    assert "--base org/base" in text
    inputs = open_adapters(["zoo"], base="org/base")
    assert (len(inputs.adapters), inputs.base) == (3, "org/base")
    inputs = open_adapters(["zoo"], skip_bad=True)
    assert [adapter.name for adapter in inputs.adapters] == ["a", "c"]
    assert [defect.adapter for defect in inputs.skipped] == ["b"]
    assert messages("zoo/a", "zoo/b").count("the others disagree") == 2


def test_another_revision_needs_the_option(make_adapter: MakeAdapter) -> None:
    for name, revision in {"a": None, "b": "v2", "c": None}.items():
        make_adapter(f"zoo/{name}", revision=revision)
    assert "b: its base is org/base at revision v2, most adapters have org/base" in messages("zoo")
    inputs = open_adapters(["zoo"], base="org/base")
    assert (inputs.base, inputs.revision) == ("org/base", None)


@pytest.mark.parametrize("base", [None, ""])
def test_a_config_without_a_base_needs_the_option(make_adapter: MakeAdapter, base: str | None) -> None:
    make_adapter("a", base_model_name_or_path=base)
    assert "a: its config does not name the base model (name it: --base MODEL)" in messages("a")
    assert open_adapters(["a"], base="org/base").base == "org/base"


def test_another_shape_is_another_base(make_adapter: MakeAdapter) -> None:
    for name in "abc":
        make_adapter(f"zoo/{name}")
    make_adapter("zoo/d", modules={module: (out, 32) for module, (out, _) in make_adapter.modules.items()})
    first = min(make_adapter.modules)
    expected = (
        f"d: {first}: is 8 x 32, most adapters have 8 x 24, and 5 more modules differ: another base model?"
    )
    assert messages("zoo").startswith(expected)
    assert messages("zoo", base="org/base").startswith(expected)
    assert messages("zoo/a", "zoo/d").count("no shape has a majority") == 2


def test_skip_bad_leaves_out_and_records(make_adapter: MakeAdapter) -> None:
    for name in "abc":
        make_adapter(f"zoo/{name}")
    make_adapter(
        "zoo/nan",
        tensors={PREFIX + "model.layers.0.self_attn.q_proj.lora_B.weight": torch.full((24, 4), torch.nan)},
    )
    make_adapter("zoo/pissa", init_lora_weights="pissa", lora_alpha="8")
    inputs = open_adapters(["zoo", "nowhere"], skip_bad=True)
    assert [adapter.name for adapter in inputs.adapters] == ["a", "b", "c"]
    assert [defect.adapter for defect in inputs.skipped] == ["nan", "nowhere", "pissa", "pissa"]
    assert messages("zoo", "nowhere") == "\n".join(str(defect) for defect in inputs.skipped)
    with pytest.raises(InputError):
        open_adapters(["zoo/nan"], skip_bad=True)


def test_examine_gives_both(make_adapter: MakeAdapter) -> None:
    make_adapter("zoo/a")
    make_adapter("zoo/b", r=3)
    adapters, defects = examine(["zoo"])
    assert [adapter.name for adapter in adapters] == ["a"]
    assert {defect.adapter for defect in defects} == {"b"}
    assert len(defects) == len(make_adapter.modules)


def test_a_bad_path_does_not_hit_an_adapter_of_its_name(make_adapter: MakeAdapter) -> None:
    make_adapter("zoo/a")
    adapters, defects = examine(["zoo", "a"])
    assert [adapter.name for adapter in adapters] == ["a"]
    assert [defect.adapter for defect in defects] == ["a"]


def test_the_examples_are_one_job() -> None:
    inputs = open_adapters([str(ZOO)])
    assert len(inputs.adapters) == 12
    assert inputs.base == "HuggingFaceTB/SmolLM2-135M-Instruct"
