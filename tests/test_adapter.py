"""An adapter on disk: what is read is what was written, checked before it is trusted."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from handmade import MakeAdapter
from hypothesis import given, settings
from hypothesis import strategies as st

from lorazip import names
from lorazip.adapter import Adapter, LowRank, open_adapter
from lorazip.errors import InputError
from lorazip.header import FormatError, TensorInfo, parse_json, read_header

PREFIX = "base_model.model."

ZOO = Path(__file__).parents[1] / "examples" / "zoo"


def rewrite(path: Path, change: dict[str, object] | None = None, pad: int = 0) -> None:
    """Write the header of a safetensors file anew, with some entries changed and spaces appended."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]) | (change or {})).encode() + b" " * pad
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])


def test_modules_extras_and_sizes(make_adapter: MakeAdapter) -> None:
    rank = {module: 2 if "k_proj" in module else 4 for module in make_adapter.modules}
    score = torch.arange(6.0).view(2, 3)
    path = make_adapter(
        "a", rank=rank, alpha=6, modules_to_save=["score"], tensors={PREFIX + "score.weight": score}
    )
    adapter = open_adapter(path, "name")
    assert adapter.name == "name"
    assert list(adapter.modules) == sorted(make_adapter.modules)
    info = adapter.modules["model.layers.1.self_attn.k_proj"]
    assert (info.out, info.in_, info.rank, info.scale, info.dtype) == (8, 24, 2, 3.0, "float32")
    assert adapter.extras == {PREFIX + "score.weight": TensorInfo("F32", (2, 3))}
    assert torch.equal(adapter.extra(PREFIX + "score.weight"), score)
    assert adapter.nbytes == sum(file.stat().st_size for file in path.iterdir())
    assert adapter.config == json.loads((path / "adapter_config.json").read_text())
    assert repr(adapter) == "Adapter('name', 6 modules, 1 extras)"
    with pytest.raises(KeyError):
        adapter.extra(PREFIX + "other")


@pytest.mark.parametrize("pad", [0, 1, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_factors_are_read_bit_for_bit(make_adapter: MakeAdapter, dtype: torch.dtype, pad: int) -> None:
    path = make_adapter("a", dtype=dtype)
    rewrite(path / "adapter_model.safetensors", pad=pad)  # headers of any length are legal
    adapter = open_adapter(path, "a")
    expected = safetensors.torch.load_file(path / "adapter_model.safetensors")
    for module in adapter.modules:
        factors = adapter.low_rank(module)
        assert factors.B.dtype == dtype
        assert torch.equal(factors.A, expected[f"{PREFIX}{module}.lora_A.weight"])
        assert torch.equal(factors.B, expected[f"{PREFIX}{module}.lora_B.weight"])
    assert adapter.not_finite() == []


def test_every_type_of_extra_is_carried(make_adapter: MakeAdapter) -> None:
    types = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float64]
    types += [
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.uint16,
        torch.uint32,
        torch.uint64,
        torch.complex64,
    ]
    extras = {f"{PREFIX}head.x{i}": torch.tensor([0, 1, 1]).to(dtype) for i, dtype in enumerate(types)}
    extras[PREFIX + "head.empty"] = torch.zeros(0, 4)
    extras[PREFIX + "head.scalar"] = torch.tensor(3.0)
    path = make_adapter("a", modules_to_save=["head"], tensors=extras)
    adapter = open_adapter(path, "a")
    assert set(adapter.extras) == set(extras)
    for key, tensor in extras.items():
        read = adapter.extra(key)
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(read.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_mixed_types_and_memory_layout(make_adapter: MakeAdapter) -> None:
    key = f"{PREFIX}m.lora_A.weight"
    path = make_adapter(
        "a", modules={"m": (5, 7)}, rank=2, tensors={key: torch.ones(2, 7, dtype=torch.float16)}
    )
    adapter = open_adapter(path, "a")
    assert adapter.modules["m"].dtype == "float32"
    factors = adapter.low_rank("m")
    assert (factors.A.dtype, factors.B.dtype) == (torch.float16, torch.float32)
    assert adapter.not_finite() == []
    assert factors.A.is_contiguous()
    assert factors.B.is_contiguous()


def test_nothing_stays_open(make_adapter: MakeAdapter) -> None:
    path = make_adapter("a")
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    adapters = [open_adapter(path, f"a{i}") for i in range(50)]
    for adapter in adapters:
        adapter.low_rank("model.layers.0.self_attn.q_proj")
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_writing_to_a_factor_does_not_reach_the_file(make_adapter: MakeAdapter) -> None:
    path = make_adapter("a")
    before = (path / "adapter_model.safetensors").read_bytes()
    open_adapter(path, "a").low_rank("model.layers.0.self_attn.q_proj").B.zero_()
    assert (path / "adapter_model.safetensors").read_bytes() == before


def test_a_file_that_changes_is_noticed(make_adapter: MakeAdapter) -> None:
    path = make_adapter("a")
    adapter = open_adapter(path, "a")
    kept = adapter.low_rank("model.layers.0.self_attn.q_proj").B.clone()
    assert adapter.not_finite() == []  # forgets the map
    assert torch.equal(adapter.low_rank("model.layers.0.self_attn.q_proj").B, kept)
    file = path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"a: adapter_model\.safetensors: the file changed"):
        adapter.low_rank("model.layers.0.self_attn.q_proj")
    file.unlink()
    with pytest.raises(InputError, match=r"a: adapter_model\.safetensors: the file changed"):
        adapter.low_rank("model.layers.0.self_attn.q_proj")


def test_files_may_be_links(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    path = make_adapter("a")
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in path.iterdir():
        (linked / file.name).symlink_to(Path("..") / "a" / file.name)
    assert open_adapter(linked, "b").modules == open_adapter(path, "a").modules


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite_are_found(
    make_adapter: MakeAdapter, dtype: torch.dtype, value: float
) -> None:
    bad = torch.zeros(24, 4, dtype=dtype)
    bad[17, 3] = value
    key = PREFIX + "model.layers.0.self_attn.q_proj.lora_B.weight"
    other = {PREFIX + "head.weight": torch.tensor([float("nan")])}
    path = make_adapter("a", dtype=dtype, tensors={key: bad} | other, modules_to_save=["head"])
    (defect,) = open_adapter(path, "a").not_finite()
    assert (defect.adapter, defect.module, defect.tensor) == ("a", "model.layers.0.self_attn.q_proj", key)


def test_factors_must_fit() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        LowRank(torch.zeros(3, 2), torch.zeros(4, 3), 1.0)


def example(tmp_path: Path) -> tuple[Path, bytes]:
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(2, 2, dtype=torch.float16)}
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    return path, path.read_bytes()


def test_the_header_is_read_as_safetensors_reads_it(tmp_path: Path) -> None:
    path, data = example(tmp_path)
    header = read_header(path)
    assert header.tensors == {"b": TensorInfo("F32", (2, 3)), "a": TensorInfo("F16", (2, 2))}
    assert header.size == len(data)
    assert data[header.begin["a"] :][:8] == bytes(torch.ones(4, dtype=torch.float16).numpy())


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_what_safetensors_refuses_is_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Flip bytes of the length and the header: what we accept, safetensors accepts, with the same meaning."""
    path, content = example(tmp_path_factory.mktemp("x"))
    broken = bytearray(content)
    end = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        broken[data.draw(st.integers(0, end - 1))] = data.draw(
            st.sampled_from(b'0123456789{}[]",: FUabx\x00\xff')
        )
    path.write_bytes(broken[: data.draw(st.integers(0, len(broken))) or None])
    try:
        header = read_header(path)
    except FormatError:
        return
    read = safetensors.torch.load_file(path)
    assert {key: tuple(tensor.shape) for key, tensor in read.items()} == {
        key: info.shape for key, info in header.tensors.items()
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"[1, NaN]", "NaN"),
        (b"[1e999]", "1e999"),
        (b"-Infinity", "-Infinity"),
        (b'{"a": 1, "b": 2, "a": 3}', "twice"),
        (b"[" * 100_000, "deep"),
        (b"[" * 40 + b"]" * 40, "deep"),
        (b'{"a":' * 40 + b"1" + b"}" * 40, "deep"),
        (b'"\xff"', "not UTF-8 at byte 1"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\uD800": 1}', "surrogate"),
        (b"1" * 5000, "not JSON"),
        (b"{", "not JSON"),
        (b"", "not JSON"),
    ],
)
def test_json_that_is_refused(text: bytes, words: str) -> None:
    with pytest.raises(FormatError, match=words):
        parse_json(text)


def test_json_that_is_accepted() -> None:
    assert parse_json('{"a": [1, 2.5, "\\ud83d\\ude00 ü", null]}'.encode()) == {
        "a": [1, 2.5, "\U0001f600 ü", None]
    }


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "empty"),
        ("../x", "has /"),
        ("..", "starts with '.'"),
        (".hidden", "starts with '.'"),
        ("-rf", "starts with '-'"),
        (" x", "starts with ' '"),
        ("x ", "ends with ' '"),
        ("x.", "ends with '.'"),
        ("a/b", "has /"),
        ("a\\b", "has \\"),
        ("a:b", "has :"),
        ("a*b?", "has * ?"),
        ('a"b', 'has "'),
        ("a<b>|", "has < > |"),
        ("a\nb", "control"),
        ("a\x00b", "control"),
        ("a\x1b[31mb", "control"),
        ("a\u202eb", "control or invisible"),
        ("a\u200bb", "control or invisible"),
        ("a\ud800b", "control or invisible"),
        ("e\u0301", "normal form"),
        ("x" * 129, "129 bytes"),
        ("ü" * 65, "130 bytes"),
        ("con", "reserved"),
        ("NUL", "reserved"),
        ("Aux.txt", "reserved"),
        ("com1", "reserved"),
        ("LPT9.x.y", "reserved"),
    ],
)
def test_names_that_are_refused(name: str, words: str) -> None:
    problem = names.problem_with(name)
    assert problem is not None
    assert words in problem


@pytest.mark.parametrize(
    "name", ["a", "x" * 128, "ü" * 64, "a b", "a--b", "é", "日本語", "console", "com", "a.b", "a=b", "~x"]
)
def test_names_that_are_accepted(name: str) -> None:
    assert names.problem_with(name) is None


def test_twins() -> None:
    found = names.twins(["a", "A", "b", "straße", "STRASSE", "c", "c"])
    assert found == {
        "a": ("A", "a"),
        "A": ("A", "a"),
        "straße": ("STRASSE", "straße"),
        "STRASSE": ("STRASSE", "straße"),
        "c": ("c", "c"),
    }


def test_the_examples_open() -> None:
    for path in sorted(path for path in ZOO.iterdir() if path.is_dir()):
        adapter = open_adapter(path, path.name)
        assert isinstance(adapter, Adapter)
        assert adapter.modules
        assert adapter.not_finite() == []
