"""Codecs: what goes in comes out, rounded once, or is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorazip.codecs import CODECS, DTYPES, Part, codec
from lorazip.errors import BundleError, CodecError

TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
steady = settings(derandomize=True, deadline=None, max_examples=30)


@given(
    st.sampled_from(sorted(CODECS)),
    st.lists(st.integers(0, 7), min_size=1, max_size=3),
    st.integers(0, 2**31),
    st.sampled_from([1.0, 1e-3, 1e3]),
)
@steady
def test_a_tensor_comes_back_rounded_once(name: str, shape: list[int], seed: int, size: float) -> None:
    tensor = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size
    parts = codec(name).encode(tensor)
    assert [(part.dtype, part.ndim) for part in parts] == [(TORCH[name], 1)]
    back = codec(name).decode(parts, shape)
    assert back.dtype == torch.float32 and list(back.shape) == shape
    assert torch.equal(back, tensor.to(TORCH[name]).float())
    again = codec(name).encode(back)
    assert torch.equal(again[0], parts[0])  # a second time nothing is lost


@given(st.sampled_from(sorted(CODECS)), st.lists(st.integers(0, 9), min_size=1, max_size=3))
@steady
def test_parts_describe_what_is_encoded(name: str, shape: list[int]) -> None:
    described, made = codec(name).parts(shape), codec(name).encode(torch.zeros(shape))
    assert [(DTYPES[p.dtype], p.count) for p in described] == [(m.dtype, m.numel()) for m in made]
    assert [p.nbytes for p in described] == [m.nbytes for m in made]


def test_bytes_of_a_part() -> None:
    assert [Part(name, 3).nbytes for name in DTYPES] == [12, 6, 6, 3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_tensor_in_its_own_type_is_kept_bit_for_bit(dtype: torch.dtype) -> None:
    """Zeros of both signs, the least and the largest numbers."""
    info = torch.finfo(dtype)
    tensor = torch.tensor(
        [0.0, -0.0, info.tiny, -info.smallest_normal / 4, info.max, info.min, 1.0], dtype=dtype
    )
    (part,) = codec(str(dtype).removeprefix("torch.")).encode(tensor)
    whole = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(part.view(whole), tensor.view(whole))


def test_rows_that_are_not_contiguous_are_stored_in_reading_order() -> None:
    tensor = torch.arange(6.0).view(2, 3).T
    (part,) = codec("float16").encode(tensor)
    assert part.tolist() == [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize(
    ("name", "value", "dtype"),
    [
        ("float16", 65520.0, "F16"),
        ("float16", -1e9, "F16"),
        ("bfloat16", 3.4e38, "BF16"),
        ("float32", 1e39, "F32"),
    ],
)
def test_a_value_that_does_not_fit_is_refused(name: str, value: float, dtype: str) -> None:
    with pytest.raises(CodecError, match=f"does not fit {dtype} .use --dtype bfloat16 or float32"):
        codec(name).encode(torch.tensor([1.0, value], dtype=torch.float64))


@pytest.mark.parametrize("name", sorted(CODECS))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused(name: str, value: float) -> None:
    with pytest.raises(CodecError):
        codec(name).encode(torch.tensor([0.0, value]))


def test_the_largest_value_fits() -> None:
    (part,) = codec("float16").encode(torch.tensor([65504.0, -65504.0]))
    assert part.tolist() == [65504.0, -65504.0]


def test_an_unknown_codec_is_named() -> None:
    with pytest.raises(BundleError, match="codec 'int5' is not known to this version"):
        codec("int5")
