"""Trellis codes: decoding against a walk step by step, encoding against all paths, errors against the table."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from golden import reader
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from lorazip import trellis
from lorazip.codecs import Coded, codec
from lorazip.errors import CodecError
from lorazip.trellis import BLOCK, DISTORTION, RATES, SIGNS, STATE, turned

steady = settings(derandomize=True, deadline=None, max_examples=30)
rates = st.sampled_from(list(RATES))
every_rate = pytest.mark.parametrize("rate", RATES)


def normal(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def walked(codes: Tensor, rate: float) -> NDArray[np.float64]:
    """(n, steps * v) numbers of codes (n, steps), one state after the other, before they are turned back."""
    k, table = RATES[rate][0], reader.tables()[f"{rate:g}"].astype(np.float64)
    rows = []
    for row in codes.tolist():
        state, numbers = 0, []
        for code in row:
            state = (state * 2**k + code) % 2**STATE
            numbers.append(table[state])
        rows.append(np.concatenate(numbers))
    return np.array(rows)


def hadamard() -> NDArray[np.float64]:
    """What a block is multiplied with from the right when it is turned back."""
    matrix: NDArray[Any] = np.ones((1, 1))
    while len(matrix) < 64:
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    signs = [-1 if SIGNS >> j & 1 else 1 for j in range(64)]
    found: NDArray[np.float64] = matrix * signs / 8
    return found


def section(whole: int) -> int:
    """The step between the places of successive numbers: the golden section, or the next that visits all places."""
    return next(
        g for g in range(whole * 40503 // 65536, whole) if len({g * i % whole for i in range(whole)}) == whole
    )


def left(name: str, rows: Tensor) -> Tensor:
    """What a codec leaves of the energy of each row."""
    back = codec(name).decode(codec(name).encode(rows), rows.shape)
    return (back - rows).square().sum(1) / rows.square().sum(1)


@given(rates, st.integers(1, 4), st.integers(1, 200), st.integers(0, 2**31))
@steady
def test_decoding_is_a_walk_from_state_to_state(rate: float, count: int, width: int, seed: int) -> None:
    code = trellis.trellis(rate)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**code.k, (count, code.steps(width)), generator=generator)
    expected = walked(codes, rate)[:, :width]
    whole = width // 64 * 64
    turned_back = np.concatenate(
        [expected[:, at : at + 64] @ hadamard() for at in range(0, whole, 64)] or [expected[:, :0]], axis=1
    )
    for at in range(whole):
        expected[:, at * section(whole) % whole] = turned_back[:, at]
    found = code.decode(codes, width)
    assert found.dtype == torch.float32
    assert np.allclose(found.numpy(), expected, atol=1e-5)


@every_rate
def test_no_path_is_nearer_than_the_one_found(rate: float) -> None:
    """All sequences of codes, for as many steps as there are few of them."""
    code = trellis.trellis(rate)
    for steps in range(1, 10 // code.k + 1):
        paths = torch.tensor(list(itertools.product(range(2**code.k), repeat=steps)))
        rows = normal(6, steps * code.v, seed=steps)
        ends = walked(paths, rate)
        distances = ((rows.double().numpy()[:, None] - ends) ** 2).sum(2)
        found = walked(code.encode(rows), rate)
        assert np.allclose(((rows.double().numpy() - found) ** 2).sum(1), distances.min(1), atol=1e-5)


@every_rate
@pytest.mark.parametrize("width", [1, 60, 700])
def test_both_searches_find_paths_that_are_as_near(rate: float, width: int) -> None:
    """The compiled one and torch's, which runs on other devices; where paths are equally near they may differ."""
    code = trellis.trellis(rate)
    rows = normal(70, width, seed=width)  # more than stand side by side
    padded = torch.nn.functional.pad(turned(rows), (0, -width % code.v)).view(70, -1, code.v)
    found, other = code.encode(rows), code.by_torch(padded)
    distances = [(code.decode(codes, width) - rows).square().sum(1) for codes in (found, other)]
    assert torch.allclose(*distances, rtol=1e-3, atol=1e-5)
    assert float((found == other).all(1).float().mean()) > 0.8


@every_rate
def test_the_error_is_that_of_the_table(rate: float) -> None:
    error = float(left(f"tcq{rate:g}", normal(96, 576, seed=5)).mean())
    assert error == pytest.approx(DISTORTION[rate], rel=0.03)
    assert error > 4**-rate  # nothing does better


@every_rate
def test_without_scales_the_error_of_rows_of_unit_variance_is_the_same(rate: float) -> None:
    rows = normal(48, 192, seed=6)
    rows /= rows.square().mean(1, keepdim=True).sqrt()
    assert float(left(f"tcq{rate:g}u", rows).mean()) <= 1.04 * DISTORTION[rate]


@every_rate
@pytest.mark.parametrize("width", [2, 63, 64, 65, 100, 192])
def test_short_and_ragged_rows(rate: float, width: int) -> None:
    """Paths begin in one state, which costs or saves short rows a little."""
    rows = normal(256, width, seed=width)
    error = float(left(f"tcq{rate:g}", rows).mean())
    assert error <= (1.12 if width >= 63 else 1.5) * DISTORTION[rate]


@every_rate
def test_one_number_is_all_scale(rate: float) -> None:
    rows = normal(20, 1, seed=1)
    assert float(left(f"tcq{rate:g}", rows).max()) <= 2**-16


@every_rate
def test_long_rows_are_decided_as_well_as_if_they_were_decided_at_once(
    rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step is worse than others where a span ends, and the rows together hardly."""
    code = trellis.trellis(rate)
    rows, width = 24, 4096
    x = normal(rows, width, seed=3)
    error = (code.decode(code.encode(x), width) - x).square()
    monkeypatch.setattr(trellis, "SPAN", width)
    at_once = (code.decode(code.encode(x), width) - x).square()
    assert float(error.mean()) <= 1.01 * float(at_once.mean())
    assert float(error.mean(1).div(at_once.mean(1)).max()) <= 1.03
    assert float(error.mean()) == pytest.approx(DISTORTION[rate], rel=0.04)


@every_rate
def test_spans_of_any_length_give_whole_paths(rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even deciding a few steps at a time, of rows that end anywhere in a span, never makes a wrong number."""
    code = trellis.trellis(rate)
    for width in (120, 127):
        x = normal(32, width, seed=width)
        best = float((code.decode(code.encode(x), width) - x).square().mean())
        monkeypatch.setattr(trellis, "SPAN", 7)
        monkeypatch.setattr(trellis, "SURE", 24)
        codes = code.encode(x)
        assert int(codes.min()) >= 0 and int(codes.max()) < 2**code.k
        assert float((code.decode(codes, width) - x).square().mean()) <= 1.1 * best
        monkeypatch.undo()


def test_many_rows_are_encoded_as_they_are_alone() -> None:
    x = normal(trellis.ROWS + 3, 70)
    code = trellis.trellis(2)
    assert torch.equal(code.encode(x)[-5:], code.encode(x[-5:]))


@pytest.mark.parametrize("rate", [rate for rate in RATES if rate < 5])
def test_rows_with_an_outlier_of_ten_deviations_are_coded_nearly_as_well(rate: float) -> None:
    rows = normal(48, 576, seed=4)
    rows[torch.arange(48), torch.arange(48) * 11] = 10
    assert float(left(f"tcq{rate:g}", rows).mean()) <= 1.3 * DISTORTION[rate]


@pytest.mark.parametrize("rate", [rate for rate in RATES if rate < 5])
def test_rows_of_heavy_tails_are_coded_nearly_as_well(rate: float) -> None:
    """Student's t with four degrees of freedom, of infinite kurtosis."""
    generator = np.random.default_rng(0)
    rows = torch.tensor(generator.standard_t(4, (48, 576)), dtype=torch.float32)
    assert float(left(f"tcq{rate:g}", rows).mean()) <= 1.2 * DISTORTION[rate]


@every_rate
@pytest.mark.parametrize("size", [1e-30, 1e-4, 1e30])
def test_the_strength_of_a_row_changes_nothing_but_its_scale(rate: float, size: float) -> None:
    rows = normal(3, 130)
    by = codec(f"tcq{rate:g}")
    strong, plain = by.encode(rows * size), by.encode(rows)
    assert torch.allclose(strong[1].double() / size, plain[1].double(), rtol=2**-7)
    error = (by.decode(strong, rows.shape).double() / size - rows).square().sum(1)
    assert torch.allclose(error, (by.decode(plain, rows.shape) - rows).double().square().sum(1), rtol=0.05)


@every_rate
def test_rows_of_zeros_are_exact(rate: float) -> None:
    rows = normal(3, 70)
    rows[1] = 0
    by = codec(f"tcq{rate:g}")
    parts = by.encode(rows)
    assert float(parts[1][1]) == 0
    assert not by.decode(parts, rows.shape)[1].any()


def test_a_scale_that_bfloat16_cannot_hold_is_refused() -> None:
    with pytest.raises(CodecError, match="scale does not fit"):
        codec("tcq3").encode(torch.full((1, 64), 3.4e38) * normal(1, 64).sign())


def test_the_scale_is_that_of_least_squares() -> None:
    by = codec("tcq1")
    assert isinstance(by, Coded)
    rows = 3 * normal(20, 192)
    _, scales, values = by.fitted(rows)
    along = (rows * values).sum(1) / values.square().sum(1)
    assert torch.allclose(along, torch.ones(20), atol=2**-8)
    assert torch.equal(by.decode(by.encode(rows), rows.shape), values)
    assert torch.equal(by.encode(rows)[1].float(), scales)


def test_bytes_are_the_rate() -> None:
    for rate, (k, v) in RATES.items():
        assert rate == k / v
        coded, scales = codec(f"tcq{rate:g}").parts((5, 576))
        assert (coded.nbytes, scales.nbytes) == (5 * 576 * rate / 8, 10)
        assert sum(part.nbytes for part in codec(f"tcq{rate:g}u").parts((5, 576))) == 5 * 576 * rate / 8
    assert [part.nbytes for part in codec("tcq0").parts((5, 576))] == [0, 0]
    # rows follow one another without gaps: three rows of five codes of one bit
    assert codec("tcq1u").parts((3, 5))[0].count == 2


@given(st.integers(0, 4), st.integers(0, 200), st.integers(0, 2**31))
@steady
def test_turning_is_orthogonal_and_undone(rows: int, width: int, seed: int) -> None:
    x = normal(rows, width, seed)
    there = turned(x)
    assert there.shape == x.shape
    assert torch.allclose(turned(there, back=True), x, atol=1e-5)
    assert torch.allclose(there.square().sum(1), x.square().sum(1), rtol=1e-5)
    whole = width // BLOCK * BLOCK
    assert torch.equal(there[:, whole:], x[:, whole:])


def test_turning_is_the_matrix_of_the_specification() -> None:
    places = [i * section(BLOCK) % BLOCK for i in range(BLOCK)]
    back = turned(torch.eye(BLOCK), back=True).double().numpy()[:, places]
    assert np.allclose(back, hadamard(), atol=1e-7) and np.allclose(back, reader.TURN, atol=1e-7)
    assert np.allclose(back @ back.T, np.eye(BLOCK), atol=1e-6)


def test_an_outlier_is_spread_over_its_block() -> None:
    x = torch.zeros(1, 2 * BLOCK)
    x[0, 70 * section(2 * BLOCK) % (2 * BLOCK)] = 8
    assert turned(x).abs().tolist() == [[0.0] * BLOCK + [1.0] * BLOCK]


@given(st.integers(2, 60), st.sampled_from([32, 64, 96, 128, 192]))
@steady
def test_blocks_take_alike_from_every_head(blocks: int, head: int) -> None:
    """A head of attention that holds all the energy is spread: no block has four numbers more than its share."""
    width = BLOCK * blocks
    for at in range(0, width - head + 1, head):
        x = torch.zeros(1, width)
        x[0, at : at + head] = 1
        counts = turned(x).view(blocks, BLOCK).square().sum(1)
        mean = head / blocks
        assert float(counts.max()) <= mean + 4


@every_rate
def test_entries_of_a_table_are_conditional_means(rate: float) -> None:
    """What is decoded needs no shrinking: the error is orthogonal to it."""
    rows = normal(64, 576, seed=8)
    rows /= rows.square().mean(1, keepdim=True).sqrt()
    values = codec(f"tcq{rate:g}u").decode(codec(f"tcq{rate:g}u").encode(rows), rows.shape)
    assert float((rows * values).sum() / values.square().sum()) == pytest.approx(1, abs=0.01)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@every_rate
def test_a_gpu_decodes_the_same_numbers(rate: float) -> None:
    rows = normal(5, 130)
    by = codec(f"tcq{rate:g}")
    parts = by.encode(rows)
    there = by.decode([part.cuda() for part in parts], rows.shape)
    assert there.is_cuda and torch.allclose(there.cpu(), by.decode(parts, rows.shape), atol=1e-6)
    assert (
        float((by.decode(by.encode(rows.cuda()), rows.shape) - rows).square().mean())
        <= 1.3 * DISTORTION[rate]
    )
