"""The cache: what is put is there, after a kill too; a damaged file is refused; a key tells all parts apart."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
from collections.abc import Iterator
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorazip.errors import TargetError
from lorazip.eval.cache import FILE, Cache, default_directory, key


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    made = Cache(tmp_path / "deep" / "cache")
    yield made
    made.close()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)

# --- keys -------------------------------------------------------------------------------------------------------------


PARTS = st.dictionaries(st.sampled_from(["base", "prompt", "kind"]), JSON)


@settings(deadline=None)
@given(one=PARTS, other=PARTS)
def test_keys_differ_where_anything_does(one: dict[str, Any], other: dict[str, Any]) -> None:
    same = json.dumps(one, sort_keys=True) == json.dumps(
        other, sort_keys=True
    )  # 1, 1.0 and true are three values
    assert (key(**one) == key(**other)) == same
    assert len(key(**one)) == 32
    assert key(**one) == key(**dict(reversed(list(one.items()))))


TOKENS = st.lists(st.integers(0, 9), max_size=4).map(tuple)


@given(TOKENS, TOKENS, TOKENS, TOKENS)
def test_a_token_that_moves_from_prompt_to_answer_is_another_question(
    a: tuple[int, ...], b: tuple[int, ...], c: tuple[int, ...], d: tuple[int, ...]
) -> None:
    assert (key(prompt=a, answer=b) == key(prompt=c, answer=d)) == ((a, b) == (c, d))


# --- answers ----------------------------------------------------------------------------------------------------------


def test_what_is_put_is_there(cache: Cache) -> None:
    answers = {key(i=i): {"logprobs": [-0.1 * i, -1e-300], "text": f"ü\n{i}"} for i in range(1700)}
    assert cache.get([]) == {}
    assert cache.get(list(answers)) == {}
    cache.put(answers)
    assert cache.get([*answers, key(i=-1)]) == answers  # more keys than SQLite takes at once
    cache.put({key(i=0): "another"})
    assert cache.get([key(i=0), key(i=0)]) == {key(i=0): "another"}
    cache.put({})
    again = Cache(cache.path.parent)
    assert again.get(list(answers)) == answers | {key(i=0): "another"}
    again.close()


@settings(deadline=None, max_examples=30)
@given(answers=st.dictionaries(st.binary(min_size=32, max_size=32), JSON, max_size=5))
def test_any_answer_comes_back(tmp_path_factory: pytest.TempPathFactory, answers: dict[bytes, Any]) -> None:
    made = Cache(tmp_path_factory.mktemp("cache"))
    made.put(answers)
    assert made.get(list(answers)) == answers
    made.close()


def test_numbers_come_back_to_the_last_bit(cache: Cache) -> None:
    values = [0.1, -1 / 3, 5e-324, -1.7976931348623157e308, -0.0]
    cache.put({b"k": values})
    found = cache.get([b"k"])[b"k"]
    assert [v.hex() for v in found] == [v.hex() for v in values]


def puts(directory: Path, numbers: range, done: Connection, half: bool = False) -> None:
    """What another process does; with `half` it is in the middle of a further answer until it is killed."""
    cache = Cache(directory)
    for i in numbers:
        cache.put({key(i=i): i})
    if half:
        cache._file.execute("BEGIN IMMEDIATE")
        cache._file.execute("INSERT INTO answers VALUES (x'00', '1')")
    done.send("done")
    if half:
        signal.pause()


def start(*arguments: Any) -> tuple[BaseProcess, Connection]:
    there, here = Pipe()
    process = get_context("fork").Process(target=puts, args=(*arguments[:2], here, *arguments[2:]))
    process.start()
    here.close()
    return process, there


def test_a_killed_process_keeps_what_it_put(tmp_path: Path) -> None:
    process, done = start(tmp_path, range(20), True)
    assert done.recv() == "done"
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    made = Cache(tmp_path)
    assert made.get([key(i=i) for i in range(20)]) == {key(i=i): i for i in range(20)}
    assert made.get([b"\0"]) == {}  # what was half done is not there, and holds no lock
    made.put({b"\0": 2})
    made.close()


def test_processes_at_once(tmp_path: Path) -> None:
    """All begin the file, and write to it at the same time."""
    runs = [start(tmp_path / "new", range(20 * n, 20 * n + 40)) for n in range(4)]
    for process, _ in runs:
        process.join()
    assert [process.exitcode for process, _ in runs] == [0, 0, 0, 0]
    made = Cache(tmp_path / "new")
    assert made.get([key(i=i) for i in range(100)]) == {key(i=i): i for i in range(100)}
    made.close()


# --- damage -----------------------------------------------------------------------------------------------------------


def test_a_file_that_is_no_cache_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"not a database, but longer than its header would be" * 100)
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(
        TargetError,
        match=rf"{FILE} cannot be used: .* \(delete it, or name another: --cache, of a transfer --work\)",
    ):
        Cache(tmp_path)
    assert (tmp_path / FILE).read_bytes() == before


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    made = Cache(tmp_path)
    keys = [key(i=i) for i in range(3000)]
    made.put(dict.fromkeys(keys, "x" * 50))
    made.close()
    path = tmp_path / FILE
    data = bytearray(path.read_bytes())
    data[8192:-4096] = b"\xa5" * (len(data) - 12288)
    path.write_bytes(data)
    with pytest.raises(TargetError, match="delete it, or name another: --cache"):
        Cache(tmp_path).get(keys)


@pytest.mark.parametrize("answer", ["{", "", "\0", b"\xff\xfe"])
def test_a_damaged_answer_is_refused(cache: Cache, answer: str | bytes) -> None:
    cache.put({b"k": 1})
    with sqlite3.connect(cache.path) as file:
        file.execute("UPDATE answers SET answer = ?", (answer,))
    file.close()
    with pytest.raises(TargetError, match=r"is damaged: .*delete it, or name another: --cache"):
        cache.get([b"k"])


def test_another_programs_tables_are_refused(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / FILE) as file:
        file.execute("CREATE TABLE answers (x)")
    file.close()
    made = Cache(tmp_path)
    with pytest.raises(TargetError, match="is damaged: no such column"):
        made.get([b"k"])
    with pytest.raises(TargetError, match="cannot be written"):
        made.put({b"k": 1})
    made.close()


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for directory in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/lorazip")):
        with pytest.raises(TargetError, match=f"{FILE} cannot be used: "):
            Cache(directory)
    (tmp_path / "folder" / FILE).mkdir(parents=True)
    with pytest.raises(TargetError, match=f"{FILE} cannot be used: "):
        Cache(tmp_path / "folder")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_cache_that_cannot_be_written_later(cache: Cache) -> None:
    cache._file.execute("PRAGMA query_only = ON")
    with pytest.raises(TargetError, match="cannot be written"):
        cache.put({b"k": 1})


def test_where_it_lies_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert default_directory() == Path("/caches/lorazip")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert default_directory() == Path.home() / ".cache" / "lorazip"


# --- the base model's bytes -------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.model", "chat_template.jinja", "merges.txt"):
        (path / name).write_text(f"content of {name}")
    return path


def test_the_digest_is_of_names_and_bytes(cache: Cache, model: Path) -> None:
    before = cache.model_digest(model)
    assert len(before) == 64
    assert cache.model_digest(model) == before
    found = {before}
    for path in sorted(model.iterdir()):
        content = path.read_bytes()
        path.write_bytes(content[:-1] + b"!")  # of the same length
        found.add(cache.model_digest(model))
        path.write_bytes(content)
        assert cache.model_digest(model) == before
        path.rename(model / f"x{path.name}")
        found.add(cache.model_digest(model))
        (model / f"x{path.name}").rename(path)
    (model / "more.json").write_text("")
    found.add(cache.model_digest(model))
    assert len(found) == 2 + 2 * 5


def test_the_digest_is_of_nothing_else(cache: Cache, model: Path, tmp_path: Path) -> None:
    before = cache.model_digest(model)
    os.utime(model / "config.json", (1, 1))
    (model / "README.md").write_text("# a model")
    (model / "model.safetensors.lock").write_text("")
    (model / "folder.json").mkdir()
    os.chmod(model / "config.json", 0o600)
    assert cache.model_digest(model) == before
    (tmp_path / "copy").mkdir()
    for path in model.glob("*.*"):
        if path.is_file():
            (tmp_path / "blobs").mkdir(exist_ok=True)
            (tmp_path / "blobs" / path.name).write_bytes(path.read_bytes())
            (tmp_path / "copy" / path.name).symlink_to(
                tmp_path / "blobs" / path.name
            )  # as the Hub's cache does
    assert cache.model_digest(tmp_path / "copy") == before


def test_files_that_lie_about_their_time_are_read_again(cache: Cache, model: Path) -> None:
    """Archives that are made reproducibly give all files one time; weights of one shape have one size."""
    path = model / "model.safetensors"
    os.utime(path, (1, 1))
    before = cache.model_digest(model)
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, (1, 1))
    assert cache.model_digest(model) != before


def test_a_file_that_has_not_changed_is_not_read_again(
    cache: Cache, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = cache.model_digest(model)
    monkeypatch.setattr(Path, "open", None)
    assert cache.model_digest(model) == before


def test_the_digest_needs_a_cache_that_works(cache: Cache, model: Path) -> None:
    cache._file.execute("DROP TABLE files")
    with pytest.raises(TargetError, match="cannot be used: no such table"):
        cache.model_digest(model)
