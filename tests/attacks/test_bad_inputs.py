"""Adapters made to break the reader: each is refused with words that a person understands, and exit code 2.

Every attack changes one good adapter of three. The whole job must be refused with the adapter, module and tensor
named and a way out; with skip_bad the two others must come through untouched.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import MakeAdapter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorazip import peft_format
from lorazip.errors import InputError
from lorazip.sources import open_adapters, resolve

MODULE = "model.layers.0.self_attn.q_proj"
A = f"base_model.model.{MODULE}.lora_A.weight"
B = f"base_model.model.{MODULE}.lora_B.weight"
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite the header of an adapter's weights; the data stays as it is."""
    data = (path / WEIGHTS).read_bytes()
    size = int.from_bytes(data[:8], "little")
    document = json.loads(data[8 : 8 + size])
    document = change(document) or document
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    (path / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def config(path: Path, **fields: Any) -> None:
    text = json.loads((path / CONFIG).read_text()) | fields
    (path / CONFIG).write_text(json.dumps(text))


def flip(path: Path, position: int) -> None:
    data = bytearray((path / WEIGHTS).read_bytes())
    data[position] ^= 1
    (path / WEIGHTS).write_bytes(data)


def append(path: Path, data: bytes) -> None:
    (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes() + data)


def truncate(path: Path, size: int) -> None:
    (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:size])


def claim(path: Path, size: int) -> None:
    """Let the file claim a header of this size."""
    (path / WEIGHTS).write_bytes(struct.pack("<Q", size) + (path / WEIGHTS).read_bytes()[8:])


def sparse(path: Path, size: int) -> None:
    """A file that is as large as its header claims, without using the disk."""
    with (path / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", size))
        file.truncate(size + 8)


def value(path: Path, key: str, number: float) -> None:
    """Set the first value of a tensor."""
    data = bytearray((path / WEIGHTS).read_bytes())
    size = int.from_bytes(data[:8], "little")
    begin = 8 + size + json.loads(data[8 : 8 + size])[key]["data_offsets"][0]
    data[begin : begin + 4] = struct.pack("<f", number)
    (path / WEIGHTS).write_bytes(data)


def as_pickle(path: Path, name: str) -> None:
    """The weights as a pickle that runs code when it is loaded."""
    (path / WEIGHTS).unlink()
    (path / name).write_bytes(pickle.dumps(Bomb(path / "exploded")))


class Bomb:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


def rename(key: str, new: str) -> Callable[[dict[str, Any]], None]:
    return lambda document: document.__setitem__(new, document.pop(key))


def entry(key: str, **fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document[key].update(fields)


def duplicate_key(document: dict[str, Any]) -> bytes:
    """A JSON object with one key twice, which Python's parser accepts."""
    return json.dumps(document).encode()[:-1] + b"," + json.dumps({A: document[A]}).encode()[1:]


# name -> (attack, what the message must say besides the adapter and a remedy)
ATTACKS: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "weights of 0 bytes": (lambda p: truncate(p, 0), (WEIGHTS, "too few")),
    "weights of 5 bytes": (lambda p: truncate(p, 5), (WEIGHTS, "too few")),
    "truncated in the header": (lambda p: truncate(p, 500), (WEIGHTS, "the header claims")),
    "truncated in the data": (lambda p: truncate(p, -10), (WEIGHTS, "truncated")),
    "bytes appended": (lambda p: append(p, b"xx"), (WEIGHTS, "longer than its header says")),
    "flipped header length": (lambda p: flip(p, 7), (WEIGHTS, "the header claims 72057594")),
    "flipped brace": (lambda p: flip(p, 8), (WEIGHTS, "not JSON")),
    "huge header length": (lambda p: claim(p, 2**63 - 1), (WEIGHTS, "the header claims 9223372036854775807")),
    "largest header length": (
        lambda p: claim(p, 2**64 - 1),
        (WEIGHTS, "the header claims 18446744073709551615"),
    ),
    "a sparse file of 2 TB": (lambda p: sparse(p, 2 * 10**12), (WEIGHTS, "at most 16777216 are accepted")),
    "header no UTF-8": (lambda p: header(p, lambda _: b'{"\xff":1}'), (WEIGHTS, "not UTF-8")),
    "header no object": (lambda p: header(p, lambda _: b"[1]"), (WEIGHTS, "not a JSON object")),
    "header deep": (lambda p: header(p, lambda _: b"[" * 10**6), (WEIGHTS, "nested too deeply")),
    "duplicate key": (lambda p: header(p, duplicate_key), (MODULE, A, "appears twice")),
    "key twice by case": (
        lambda p: header(p, rename(A, A.replace("lora_A", "lora_a"))),
        (MODULE, "lora_a.weight"),
    ),
    "huge shape": (lambda p: header(p, entry(A, shape=[2**62, 2**62])), (MODULE, A, "too many elements")),
    "negative shape": (lambda p: header(p, entry(A, shape=[-4, -24])), (MODULE, A, "its shape is not")),
    "shape of a thousand": (lambda p: header(p, entry(A, shape=[1] * 1000)), (MODULE, A, "its shape is not")),
    "shape of booleans": (lambda p: header(p, entry(A, shape=[True, True])), (MODULE, A, "its shape is not")),
    "other shape": (lambda p: header(p, entry(A, shape=[24, 4])), (MODULE, A, "its rank is 24")),
    "flat shape": (lambda p: header(p, entry(A, shape=[96])), (MODULE, A, "not a matrix")),
    "other type": (lambda p: header(p, entry(A, dtype="I32")), (MODULE, A, "its type is I32")),
    "unknown type": (
        lambda p: header(p, entry(A, dtype="F128")),
        (MODULE, A, "its type 'F128' is not known"),
    ),
    "type no string": (lambda p: header(p, entry(A, dtype=[[]])), (MODULE, A, "is not known")),
    "overlap": (lambda p: header(p, entry(A, data_offsets=[0, 384])), ("overlaps", "the file is damaged")),
    "hole": (lambda p: header(p, lambda d: d.pop(A) and None), ("leaves a hole",)),
    "offsets beyond the file": (
        lambda p: header(p, entry(A, data_offsets=[2**40, 2**40 + 384])),
        ("leaves a hole",),
    ),
    "offsets reversed": (lambda p: header(p, entry(A, data_offsets=[384, 0])), (MODULE, A, "-384 bytes")),
    "offsets of floats": (
        lambda p: header(p, entry(A, data_offsets=[0.0, 384.0])),
        (MODULE, A, "not two positions"),
    ),
    "entry no object": (lambda p: header(p, lambda d: d.update({A: 3})), (MODULE, A, "header entry")),
    "entry with more": (lambda p: header(p, entry(A, url="http://x")), (MODULE, A, "header entry")),
    "control characters in a key": (
        lambda p: header(p, rename(A, A + "\x1b[2J")),
        ("\\x1b[2J", "control characters"),
    ),
    "path in a key": (lambda p: header(p, rename(A, "../../x")), ("../../x", "does not start with")),
    "a key of 100 kB": (lambda p: header(p, rename(A, A + "x" * 10**5)), ("more than 512 characters",)),
    "A without B": (lambda p: header(p, rename(B, B + "x")), (MODULE, A, "lora_B.weight is missing")),
    "NaN": (lambda p: value(p, A, float("nan")), (MODULE, A, "NaN or infinite")),
    "infinity": (lambda p: value(p, B, float("inf")), (MODULE, B, "NaN or infinite")),
    "a pickle": (
        lambda p: as_pickle(p, "adapter_model.bin"),
        ("adapter_model.bin", "pickle", "save_pretrained"),
    ),
    "a checkpoint": (
        lambda p: as_pickle(p, "adapter_model.pt"),
        ("adapter_model.pt", "pickle", "save_pretrained"),
    ),
    "a pickle in the place of the weights": (
        lambda p: (p / WEIGHTS).write_bytes(pickle.dumps(Bomb(p / "exploded")) * 9),
        (WEIGHTS, "the header claims"),
    ),
    "no weights": (lambda p: (p / WEIGHTS).unlink(), (WEIGHTS, "is missing")),
    "weights are a directory": (
        lambda p: [(p / WEIGHTS).unlink(), (p / WEIGHTS).mkdir()],
        (WEIGHTS, "not a regular file"),
    ),
    "weights are a pipe": (
        lambda p: [(p / WEIGHTS).unlink(), os.mkfifo(p / WEIGHTS)],
        (WEIGHTS, "not a regular file"),
    ),
    "weights link to themselves": (
        lambda p: [(p / WEIGHTS).unlink(), (p / WEIGHTS).symlink_to(WEIGHTS)],
        (WEIGHTS, "cannot be read"),
    ),
    "no config": (lambda p: (p / CONFIG).unlink(), (CONFIG, "is missing")),
    "config is a pipe": (
        lambda p: [(p / CONFIG).unlink(), os.mkfifo(p / CONFIG)],
        (CONFIG, "not a regular file"),
    ),
    "config empty": (lambda p: (p / CONFIG).write_text(""), (CONFIG, "not JSON")),
    "config no object": (lambda p: (p / CONFIG).write_text("[]"), (CONFIG, "not a JSON object")),
    "config no UTF-8": (lambda p: (p / CONFIG).write_bytes(b'{"r": "\xe9"}'), (CONFIG, "not UTF-8")),
    "config deep": (lambda p: (p / CONFIG).write_text('{"a":' * 10**5), (CONFIG, "nested too deeply")),
    "config just too deep": (
        lambda p: config(p, bias=json.loads("[" * 500 + "]" * 500)),
        (CONFIG, "too deeply"),
    ),
    "config of 2 MB": (lambda p: config(p, note="x" * 2 * 10**6), (CONFIG, "more than 1048576 bytes")),
    "config with NaN": (lambda p: config(p, lora_alpha=float("nan")), (CONFIG, "NaN")),
    "config with 1e999": (
        lambda p: (p / CONFIG).write_text('{"peft_type":"LORA","r":4,"lora_alpha":1e999}'),
        (CONFIG, "1e999"),
    ),
    "config with a key twice": (
        lambda p: (p / CONFIG).write_text('{"r": 4, "r": 8}'),
        (CONFIG, "r", "twice"),
    ),
    "config with half a character": (lambda p: config(p, note="\ud800"), (CONFIG, "surrogate")),
    "alpha 1e308": (lambda p: config(p, lora_alpha=1e308), (CONFIG, "lora_alpha is 1e+308")),
    "alpha of 4000 digits": (lambda p: config(p, lora_alpha=10**4000), (CONFIG, "lora_alpha is 1000")),
    "alpha a bool": (lambda p: config(p, lora_alpha=True), (CONFIG, "lora_alpha is True")),
    "alpha negative": (lambda p: config(p, lora_alpha=-8), (CONFIG, "lora_alpha is -8")),
    "alpha tiny": (lambda p: config(p, lora_alpha=1e-300), (MODULE, "the scale 2.5e-301")),
    "r a string": (lambda p: config(p, r="4"), (CONFIG, "r is '4'")),
    "r zero": (lambda p: config(p, r=0), (CONFIG, "r is 0")),
    "r huge": (lambda p: config(p, r=10**9), (CONFIG, "r is 1000000000")),
    "r other than the factors": (lambda p: config(p, r=8), (MODULE, A, "its rank is 4", "the config says 8")),
    "regular expression in rank_pattern": (
        lambda p: config(p, rank_pattern={"(a+)+$": 4}),
        (CONFIG, "'(a+)+$'", "write the module names out"),
    ),
    "regular expression in alpha_pattern": (
        lambda p: config(p, alpha_pattern={".*" * 30 + "x": 4}),
        (CONFIG, "alpha_pattern", "write the module names out"),
    ),
    "a pickled type in the config": (
        lambda p: config(p, peft_type={"__reduce__": "os.system"}),
        (CONFIG, "peft_type"),
    ),
    "half a variant": (lambda p: config(p, use_dora=True), (MODULE, "magnitude vector is missing")),
    "another base": (
        lambda p: config(p, base_model_name_or_path="evil/base"),
        ("evil/base", "--base org/base"),
    ),
    "a base with a terminal escape": (
        lambda p: config(p, base_model_name_or_path="x\x1b]0;owned\x07"),
        ("x\\x1b]0;owned\\x07",),
    ),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_bad_adapter_is_refused_and_the_others_survive(
    attack: str, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    for name in ("good", "victim", "zebra"):
        make_adapter(f"zoo/{name}")
    change, words = ATTACKS[attack]
    change(tmp_path / "zoo" / "victim")
    start = time.monotonic()
    with pytest.raises(InputError) as caught:
        open_adapters([str(tmp_path / "zoo")])
    assert time.monotonic() - start < 5
    text = str(caught.value)
    assert caught.value.exit_code == 2
    assert {defect.adapter for defect in caught.value.defects} == {"victim"}
    assert all(defect.problem and defect.remedy for defect in caught.value.defects)
    assert text.startswith("victim: ")
    assert all(line.isprintable() for line in text.split("\n"))
    every = "\n".join(map(str, caught.value.defects))  # the message tells one of many that are alike
    for word in words:
        assert word in every
    inputs = open_adapters([str(tmp_path / "zoo")], skip_bad=True)
    assert [adapter.name for adapter in inputs.adapters] == ["good", "zebra"]
    assert inputs.skipped == caught.value.defects
    assert not (tmp_path / "zoo" / "victim" / "exploded").exists()


def test_another_shape_is_another_base(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    for name in ("good", "zebra"):
        make_adapter(f"zoo/{name}")
    make_adapter("zoo/victim", modules={MODULE: (24, 48)})
    with pytest.raises(
        InputError, match=rf"^victim: {MODULE}: is 24 x 48, .* another base model\? \(leave it out"
    ):
        open_adapters([str(tmp_path / "zoo")])


def test_all_defects_of_all_inputs_are_listed(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    make_adapter("zoo/good")
    config(make_adapter("zoo/a"), r="4", lora_alpha=-1, use_qalora=True)
    value(make_adapter("zoo/b"), A, float("nan"))
    truncate(make_adapter("zoo/c"), -10)
    config(make_adapter("zoo/d"), base_model_name_or_path="other/base")
    make_adapter("zoo/e", modules={MODULE: (3, 5)}, tensors={A: torch.zeros(2, 5)})
    with pytest.raises(InputError) as caught:
        open_adapters([str(tmp_path / "zoo"), "nowhere"])
    assert [defect.adapter for defect in caught.value.defects] == [
        "a",
        "a",
        "a",
        "b",
        "c",
        "d",
        "e",
        "nowhere",
    ]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../x", "the name has /"),
        ("..", "starts with '.'"),
        (".x", "starts with '.'"),
        ("-rf", "starts with '-'"),
        ("a\nb", "control"),
        ("a\x1b[2J", "control"),
        ("a\u202etxt", "control or invisible"),
        ("x" * 129, "at most 128"),
        ("NUL", "reserved"),
        ("a\\b", "the name has \\"),
        ("x.", "ends with '.'"),
        ("cafe\u0301", "normal form"),
    ],
)
def test_unsafe_names_are_refused(name: str, words: str, make_adapter: MakeAdapter) -> None:
    path = make_adapter("fine")
    with pytest.raises(InputError) as caught:
        open_adapters([f"{name}={path}"])
    text = str(caught.value)
    assert caught.value.exit_code == 2
    assert words in text
    assert "give it a name: NAME=PATH" in text
    assert text.isprintable()


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2J", "con", "x" * 200, "\udcff"])
def test_directories_with_unsafe_names_are_refused(
    name: str, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    make_adapter("zoo/good")
    try:
        (tmp_path / "zoo" / name).mkdir()
    except OSError:
        pytest.skip("this file system refuses the name itself")
    (tmp_path / "zoo" / name / CONFIG).write_text("{}")
    with pytest.raises(InputError, match="the name ") as caught:
        resolve([str(tmp_path / "zoo")])
    assert len(caught.value.defects) == 1
    assert str(caught.value).isprintable()
    assert [a.name for a in open_adapters([str(tmp_path / "zoo")], skip_bad=True).adapters] == ["good"]


def test_case_twins_and_equal_names_are_refused(make_adapter: MakeAdapter) -> None:
    paths = [str(make_adapter(name)) for name in ("x/fox", "y/Fox", "z/cow", "w/cow")]
    with pytest.raises(InputError) as caught:
        open_adapters(paths)
    text = str(caught.value)
    assert "Fox: the name differs from fox in case only" in text
    assert "fox: the name differs from Fox in case only" in text
    assert text.count("cow: 2 adapters have this name") == 2
    assert text.count("NAME=PATH") == 4


FIELDS = [
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "peft_type",
    "use_rslora",
    "use_dora",
    "bias",
    "revision",
]
FIELDS += [
    "modules_to_save",
    "init_lora_weights",
    "base_model_name_or_path",
    "task_type",
    "trainable_token_indices",
]
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(FIELDS)
)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner)
)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3))
def test_any_value_of_any_field_is_accepted_or_refused_in_words(
    fields: dict[str, Any], make_adapter: MakeAdapter
) -> None:
    path = make_adapter("a", modules={MODULE: (3, 5)}, **fields)
    try:
        (adapter,) = open_adapters([str(path)], base="org/base").adapters
    except InputError as error:
        assert all(defect.problem and defect.remedy for defect in error.defects)
        assert all(line.isprintable() for line in str(error).split("\n"))
    else:
        exported = peft_format.export_config(adapter.config, {MODULE: 2})
        json.dumps(exported, allow_nan=False)


def test_a_config_of_many_patterns_is_not_slow(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    modules = {f"model.layers.{i}.q": (2, 2) for i in range(2000)}
    make_adapter("a", modules=modules, rank=1, rank_pattern={f"layers.{i}.no": 3 for i in range(30_000)})
    start = time.monotonic()
    assert len(open_adapters([str(tmp_path / "a")]).modules) == 2000
    assert time.monotonic() - start < 5
