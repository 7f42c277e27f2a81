"""Tasks: what is found where, and what an index says of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from tasks_on_disk import LINE, put, read, refused

from lorazip.errors import InputError
from lorazip.eval import tasks


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` reads is copied into a cache; not into the user's."""
    import datasets

    cache = tmp_path_factory.mktemp("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)


# --- where tasks lie --------------------------------------------------------------------------------------------------


def test_a_directory_is_searched_below(tmp_path: Path) -> None:
    put(tmp_path / "sums.jsonl", LINE)
    put(tmp_path / "deep" / "er" / "words.jsonl", LINE)
    put(tmp_path / "gsm8k" / "train.jsonl", LINE)
    put(tmp_path / "gsm8k" / "test.jsonl", LINE)
    put(tmp_path / "gsm8k" / "more.jsonl", LINE)
    put(tmp_path / ".hidden" / "secret.jsonl", LINE)
    put(tmp_path / "deep" / ".cache" / "secret.jsonl", LINE)
    put(tmp_path / ".secret.jsonl", LINE)
    put(tmp_path / "README.md", "# not a task")
    put(tmp_path / "tasks.jsonl", {"task": "sums"})
    found = tasks.find([str(tmp_path)])
    assert sorted(found) == ["gsm8k", "more", "sums", "words"]
    assert {str(split): path.name for split, path in found["gsm8k"][0].files.items()} == {
        "train": "train.jsonl",
        "test": "test.jsonl",
    }
    assert all(len(places) == 1 for places in found.values())


def test_a_hidden_directory_that_is_named_is_searched(tmp_path: Path) -> None:
    put(tmp_path / ".tasks" / "sums.jsonl", LINE)
    assert list(tasks.find([str(tmp_path / ".tasks")])) == ["sums"]


def test_a_circle_of_links_ends(tmp_path: Path) -> None:
    put(tmp_path / "a" / "sums.jsonl", LINE)
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    (tmp_path / "a" / "self.jsonl").symlink_to("self.jsonl")
    found = tasks.find([str(tmp_path)])
    assert sorted(found) == ["self", "sums"]
    with pytest.raises(InputError, match=r"self\.jsonl: cannot be read: Too many levels of symbolic links"):
        tasks.read(found["self"][0], split="test", limit=None, columns={})


def test_a_link_to_a_file_is_that_file(tmp_path: Path) -> None:
    put(tmp_path / "store" / "blob", LINE)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "sums.jsonl").symlink_to(tmp_path / "store" / "blob")
    assert read(tmp_path / "tasks", "sums").examples[0].output == "2"


def test_names_that_occur_twice_are_an_error_only_where_they_are_wanted(tmp_path: Path) -> None:
    put(tmp_path / "one" / "sums.jsonl", LINE)
    put(tmp_path / "two" / "sums.jsonl", LINE)
    put(tmp_path / "two" / "words.jsonl", LINE)
    assert len(read(tmp_path, "words").examples) == 1
    with pytest.raises(InputError) as caught:
        read(tmp_path, "sums")
    assert f"sums: lies in {tmp_path}/one/sums.jsonl and in {tmp_path}/two/sums.jsonl" in str(caught.value)


@pytest.mark.parametrize("name", ["nowhere", "nowhere.jsonl", "/no/where", "./no/where", "a/b/c", "", "a\0b"])
def test_what_is_no_source_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if name:
        assert "is no source of tasks (name a directory of JSONL files" in refused(name)
    else:
        assert "holds no tasks" in refused(name)  # "" is the working directory


def test_a_directory_without_tasks_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "empty" / ".hidden.jsonl", LINE)
    put(tmp_path / "empty" / "table.csv", "input,output")
    put(tmp_path / "sums.jsonl", LINE)
    with pytest.raises(InputError, match=r"empty: holds no tasks: there is no JSONL file below it .*CSV"):
        tasks.find([str(tmp_path / "sums.jsonl"), str(tmp_path / "empty")])


def test_a_directory_that_cannot_be_searched_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "open" / "sums.jsonl", LINE)
    (tmp_path / "shut").mkdir()
    scan = os.scandir

    def scandir(path: Any) -> Any:
        if Path(path).name == "shut":  # the tests may run as root, whom no rights stop
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert "shut: cannot be searched: Permission denied" in refused(tmp_path)


@pytest.mark.parametrize("name", ["sums.jsonl", "sums.csv"])
def test_a_file_that_cannot_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = put(tmp_path / name, LINE)
    opened = Path.open

    def refuse(self: Path, *arguments: Any, **options: Any) -> Any:
        if self == path:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    assert f"{name}: cannot be read: Permission denied" in refused(path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "sums.jsonl")
    assert "sums.jsonl: is no file" in refused(tmp_path)


def test_names_from_files_are_no_paths_and_are_escaped(tmp_path: Path) -> None:
    put(tmp_path / "in" / "sums.jsonl", LINE)
    put(tmp_path / "secret.jsonl", LINE)
    put(tmp_path / "in" / "tasks.jsonl", {"task": "../secret"}, {"task": "/etc/passwd"}, {"task": "\x1b[2J"})
    assert list(tasks.find([str(tmp_path / "in")])) == ["sums"]
    put(tmp_path / "odd" / "\x1b[2J\n.jsonl", "{")
    message = refused(tmp_path / "odd")
    assert "\x1b" not in message and "\\x1b[2J\\n.jsonl: line 1" in message


# --- the index --------------------------------------------------------------------------------------------------------


def test_the_index_beside_a_task_describes_it(tmp_path: Path) -> None:
    put(tmp_path / "sums.jsonl", LINE)
    put(tmp_path / "words.jsonl", LINE)
    put(tmp_path / "mute.jsonl", LINE)
    put(tmp_path / "gsm" / "test.jsonl", LINE)
    put(tmp_path / "gsm" / "tasks.jsonl", {"task": "gsm", "definition": "Solve."})
    put(
        tmp_path / "tasks.jsonl",
        {
            "task": "sums",
            "definition": "Add.",
            "instruction": "ignored",
            "metric": "choice",
            "choices": [1, "2"],
        },
        {"task": "words", "instruction": "Spell.", "definition": None},
        {"task": "mute", "definition": ""},
    )
    sums = read(tmp_path, "sums")
    assert (sums.definition, sums.metric) == ("Add.", "choice")
    assert sums.examples[0].choices == ("1", "2")
    assert read(tmp_path, "words").definition == "Spell."
    assert read(tmp_path, "mute").definition is None
    assert read(tmp_path, "gsm").definition == "Solve."
    assert read(tmp_path / "sums.jsonl").definition == "Add."  # the file alone has its index too
    assert read(tmp_path / "gsm" / "test.jsonl", "gsm").definition == "Solve."


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"name": "sums"}, 'line 2: has no "task"'),
        ({"task": 5}, 'line 2: has no "task"'),
        ({"task": "first"}, "line 2: names the task 'first' again"),
        ({"task": "sums", "definition": ["Add.", "Sum."]}, "line 2: its definition is no text"),
        ({"task": "sums", "instruction": 5}, "line 2: its instruction is no text"),
        ({"task": "sums", "metric": ["loss"]}, "line 2: its metric is no text"),
        ({"task": "sums", "choices": "ABC"}, "line 2: its choices are not a list of texts"),
        ({"task": "sums", "choices": 3}, "line 2: its choices are not a list of texts"),
        ({"task": "sums", "choices": ["a", None]}, "line 2: its choices are not a list of texts"),
        ("{", "line 2: cannot be read: not JSON"),
        ("[]", "line 2: is not a JSON object"),
    ],
)
def test_a_broken_index_is_refused(tmp_path: Path, row: Any, problem: str) -> None:
    put(tmp_path / "sums.jsonl", LINE)
    put(tmp_path / "tasks.jsonl", {"task": "first"}, row)
    assert f"{tmp_path}/tasks.jsonl: {problem}" in refused(tmp_path)
