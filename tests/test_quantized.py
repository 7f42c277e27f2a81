"""Numbers of few bits: packing against numpy's bits, scales against a fine search, levels against all of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorazip import quantized, trellis
from lorazip.codecs import DTYPES, MAX_NAME, Integers, codec, integers, unstored
from lorazip.errors import BundleError, CodecError

steady = settings(derandomize=True, deadline=None, max_examples=40)
NAMES = [
    f"int{bits}{scope}" for bits, scope in itertools.product(quantized.BITS, ("", "t", "g1", "g5", "g64"))
]
MIXED = ["int4*2+int1", "int8g3*1+int3t", "int2t*3+int1*1+int6g4"]
CODED = [f"tcq{rate:g}{u}" for rate in trellis.RATES for u in ("", "u")] + ["tcq0"]
OTHERS = [
    "float16*1+int8*1+tcq3*2+tcq0", "tcq0*1+float32", "tcq1.5u*2+bfloat16*1+int4g5", "tcq5*1+tcq0.5u", "int4t*3+tcq2",
]  # fmt: skip
names = st.sampled_from([*NAMES, *MIXED])
shapes = st.one_of(
    st.tuples(st.integers(0, 200)),
    st.tuples(st.integers(0, 6), st.integers(0, 40)),
)


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def numpy_bits(codes: np.ndarray, bits: int) -> bytes:
    """The same packing, bit by bit."""
    digits = [(int(code) >> k) & 1 for code in codes for k in range(bits)]
    return np.packbits(np.array(digits, np.uint8), bitorder="little").tobytes()


@given(st.sampled_from(quantized.BITS), st.integers(0, 300), st.integers(0, 2**31))
@steady
def test_codes_of_every_length_come_back(bits: int, count: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(seed))
    octets = quantized.pack(codes, bits)
    assert octets.dtype == torch.uint8 and len(octets) == -(-count * bits // 8)
    assert bytes(octets.tolist()) == numpy_bits(codes.numpy(), bits)
    assert torch.equal(quantized.unpack(octets, bits, count), codes)


def test_the_example_of_the_specification() -> None:
    assert quantized.pack(torch.tensor([5, 1, 7, 0, 2]), 3).tolist() == [205, 33]


@given(st.sampled_from([*NAMES, *MIXED, *CODED, *OTHERS]), shapes, st.integers(0, 2**31))
@settings(derandomize=True, deadline=None, max_examples=120)
def test_parts_describe_what_is_stored(name: str, shape: tuple[int, ...], seed: int) -> None:
    described, made = codec(name).parts(shape), codec(name).encode(normal(shape, seed))
    assert [(DTYPES[p.dtype], p.count) for p in described] == [(m.dtype, m.numel()) for m in made]
    back = codec(name).decode(made, shape)
    assert back.dtype == torch.float32 and tuple(back.shape) == shape
    assert torch.equal(codec(name).decode([part.clone() for part in made], shape), back)


@pytest.mark.parametrize("name", OTHERS)
def test_a_mixture_is_its_codecs_one_after_the_other(name: str) -> None:
    x = normal((7, 70), 0)
    at = 0
    parts: list[Tensor] = []
    values: list[Tensor] = []
    for piece in name.split("+"):
        one, _, count = piece.partition("*")
        some = x[at : at + int(count)] if count else x[at:]
        parts += codec(one).encode(some)
        values.append(codec(one).decode(codec(one).encode(some), some.shape))
        at += len(some)
    made = codec(name).encode(x)
    assert len(made) == len(parts)
    assert all(torch.equal(a, b) for a, b in zip(made, parts, strict=True))
    assert torch.allclose(codec(name).decode(made, x.shape), torch.cat(values), atol=1e-6)


def test_rows_of_nothing_are_counted() -> None:
    counts = {
        "tcq0": 5,
        "tcq0.5": 0,
        "int4*2+tcq0": 3,
        "tcq0*2+int4*1+tcq0": 4,
        "tcq0*9+int4": 5,
        "int4*9+tcq0": 0,
    }
    assert {name: unstored(name, 5) for name in counts} == counts


@pytest.mark.parametrize("name", ["int1", "int2", "int3", "int4", "int6", "int8"])
def test_nothing_is_wasted(name: str) -> None:
    """576 numbers: their bits, and 16 more a row."""
    bits = int(name[3:])
    assert sum(p.nbytes for p in codec(name).parts((5, 576))) == 5 * 576 * bits / 8 + 5 * 2
    assert sum(p.nbytes for p in codec(name + "t").parts((3, 3))) == -(-9 * bits // 8) + 2
    assert sum(p.nbytes for p in codec(name + "g64").parts((1, 576))) == 576 * bits / 8 + 9 * 2


def groups_of(name: str, x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(bits, numbers) of every group, written out."""
    found = codec(name)
    assert isinstance(found, Integers)
    for row in [x.flatten()] if found.group == -1 else x.view(-1, x.shape[-1]):
        size = found.group if found.group > 0 else len(row)
        yield from ((found.bits, row[at : at + size]) for at in range(0, len(row), size))


@given(st.sampled_from(NAMES), st.integers(0, 1000), st.sampled_from([1.0, 1e-20, 1e20]))
@steady
def test_each_number_is_on_the_nearest_level(name: str, seed: int, size: float) -> None:
    """Within a step of s where the outermost level reaches, and beyond it on that level."""
    x = normal((3, 37), seed) ** 3 * size
    back = codec(name).decode(codec(name).encode(x), x.shape)
    pairs = zip(groups_of(name, x), groups_of(name, back), strict=True)
    for (bits, numbers), (_, decoded) in pairs:
        scale = float(decoded.abs().min()) if bits == 1 else _scale(decoded, bits)
        most = (2**bits - 1) * scale
        inside = numbers.abs() <= most + scale
        assert bool(((numbers - decoded).abs()[inside] <= scale * (1 + 1e-5)).all())
        assert bool((decoded.abs()[~inside] >= most * (1 - 1e-5)).all())


def _scale(decoded: Tensor, bits: int) -> float:
    """The s of which all are odd multiples: the largest that is (most s to begin with need it)."""
    largest = float(decoded.abs().max())
    for odd in range(1, 2**bits, 2):
        steps = decoded.double() / (largest / odd)
        if bool(((steps - steps.round()).abs() < 1e-4).all() and (steps.round() % 2 != 0).all()):
            return largest / odd
    raise AssertionError(decoded)


@pytest.mark.parametrize("bits", quantized.BITS)
@pytest.mark.parametrize("power", [1, 2, 3])
def test_the_scale_is_near_the_best_of_a_fine_search(bits: int, power: int) -> None:
    """Gaussian numbers and heavy tails; the search of numpy tries 4000 scales."""
    for seed in range(3):
        x = normal((1, 300), seed)
        x = x.sign() * x.abs() ** power
        name = f"int{bits}"
        found = float((codec(name).decode(codec(name).encode(x), x.shape) - x).square().sum())
        values, most = x.numpy().astype(np.float64), 2**bits - 1
        tried = []
        for scale in np.geomspace(np.abs(values).max() / most / 30, 2 * np.abs(values).max() / most, 4000):
            odd = np.clip(2 * np.floor(values / scale / 2) + 1, -most, most)
            tried.append(((values - odd * scale) ** 2).sum())
        assert found <= {6: 1.04, 8: 1.1}.get(bits, 1.01) * min(tried) + 1e-12


def test_gaussian_errors_are_those_of_the_best_uniform_quantisers() -> None:
    """Max (1960): mean squared error of the optimal uniform quantiser of a normal variable of 2^b levels."""
    x = normal((1, 200_000), 0)
    for bits, wanted in ((1, 0.3634), (2, 0.1188), (3, 0.03744), (4, 0.01154)):
        found = codec(f"int{bits}")
        error = float((found.decode(found.encode(x), x.shape) - x).square().mean())
        assert error == pytest.approx(wanted, rel=0.03)


@pytest.mark.parametrize("name", [*NAMES, *MIXED])
def test_zeros_are_exact_and_constants_to_half_a_bit_of_the_scale(name: str) -> None:
    for value in (0.0, 0.5, -3.0, 1e-30):
        x = torch.full((5, 13), value)
        assert torch.allclose(codec(name).decode(codec(name).encode(x), x.shape), x, rtol=2**-8, atol=0)


@given(names, st.integers(0, 1000))
@steady
def test_what_is_decoded_depends_on_nothing_but_the_bytes(name: str, seed: int) -> None:
    """s q is exact in float32: float64 gives the same, and so will a GPU."""
    x = normal((4, 33), seed)
    parts = codec(name).encode(x)
    back = codec(name).decode(parts, x.shape)
    assert torch.equal(codec(name).encode(x.double())[0], parts[0])
    assert torch.equal(back.double().float(), back)
    scales = torch.cat([part.double() for part in parts if part.dtype == torch.bfloat16])
    steps = back.double().flatten()[:, None] / scales
    assert bool(((steps - steps.round()).abs().amin(1) == 0).all())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", [*NAMES, *MIXED])
def test_a_gpu_decodes_the_same_bits(name: str) -> None:
    x = normal((5, 130), 0)
    parts = codec(name).encode(x)
    there = codec(name).decode([p.cuda() for p in parts], x.shape)
    assert there.is_cuda and torch.equal(there.cpu(), codec(name).decode(parts, x.shape))
    assert [p.device.type for p in codec(name).encode(x.cuda())] == ["cpu"] * len(parts)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused(value: float) -> None:
    for name in ("int4", "int4*1+int1", "tcq2", "tcq2u", "tcq0", "int4*1+tcq2"):
        with pytest.raises(CodecError):
            codec(name).encode(torch.tensor([[0.0, value], [0.0, value]]))


@pytest.mark.parametrize(
    "name",
    ["int", "int5", "int7", "int04", "int4g0", "int4g", "int4tt", "int4g64t", "int4*0+int1", "int4*2", "int4+int1",
     "int4*1+", "*1+int4", "int4*1+float8", "float16*1+int5", "int4 ", "int4\n", "INT4", "int4g12345678",
     "int4*1+" * 18 + "int1", "int١", "tcq", "tcq7", "tcq6", "tcq0u", "tcq1.0", "tcq0.50", "tcq.5", "tcq01", "tcq-1",
     "tcq1uu", "tcq1g64", "tcq١", "tcq3.5", "tcq0.25", "tcq1*1+tcq7", "tcq0u*1+int4", "TCQ1"],
)  # fmt: skip
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(BundleError, match="is not known to this version"):
        codec(name)


def test_a_name_has_128_characters_at_most() -> None:
    longest = "int4*1+" * 17 + "int4g1234"
    assert len(longest) == MAX_NAME == 128
    codec(longest)
    with pytest.raises(BundleError):
        codec(longest + "5")


def test_names_for_bits() -> None:
    assert [integers(b, 4) for b in (1, 2, 3, 4, 6, 8)] == ["int1", "int2", "int3", "int4", "int6", "int8"]
    assert integers(2.5, 4) == "int3*2+int2" and integers(5, 3, "g64") == "int6g64*2+int4g64"
    assert integers(1.01, 8) == "int1" and integers(7.9, 8, "t") == "int8t" and integers(1.5, 1) == "int2"
