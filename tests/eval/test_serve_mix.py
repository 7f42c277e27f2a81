"""Who asks for which adapter, when: the serving benchmark's mix against scipy's laws, and settings out of range."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from scipy import stats

from lorazip.cli.bench import Size
from lorazip.errors import UsageError
from lorazip.eval import serve_mix
from lorazip.eval.serve_records import Quantiles, Settings

if TYPE_CHECKING:
    from lorazip.eval.serve_mix import Mix


def draw(count: int = 2000, adapters: int = 20, **changes: Any) -> list[serve_mix.Request]:
    options: dict[str, Any] = {
        "mix": "zipf",
        "exponent": 1.0,
        "rate": math.inf,
        "prompt_tokens": 4,
        "vocabulary": 50,
        "seed": 0,
    }
    return serve_mix.draw(count, adapters, **options | changes)


@pytest.mark.parametrize(("mix", "exponent"), [("zipf", 1.0), ("zipf", 1.7), ("zipf", 0.0), ("uniform", 1.0)])
@pytest.mark.parametrize("adapters", [1, 2, 100])
def test_shares_are_the_laws_of_scipy(mix: Mix, exponent: float, adapters: int) -> None:
    ranks = np.arange(1, adapters + 1)
    flat = mix == "uniform" or exponent == 0
    law = stats.randint(1, adapters + 1) if flat else stats.zipfian(exponent, adapters)
    assert serve_mix.shares(adapters, mix, exponent) == pytest.approx(law.pmf(ranks), rel=1e-12)


@pytest.mark.parametrize(("mix", "exponent"), [("zipf", 1.0), ("zipf", 1.7), ("uniform", 1.0)])
def test_requests_follow_the_law(mix: Mix, exponent: float) -> None:
    adapters = 20
    asked = Counter(r.adapter for r in draw(20000, adapters, mix=mix, exponent=exponent, prompt_tokens=1))
    assert set(asked) == set(range(adapters))
    law = stats.zipfian(exponent, adapters) if mix == "zipf" else stats.randint(1, adapters + 1)
    expected = 20000 * law.pmf(np.arange(1, adapters + 1))
    found = sorted(asked.values(), reverse=True)
    order = [asked[a] for a in range(adapters)] if mix == "uniform" else found
    assert stats.chisquare(order, expected).pvalue > 0.001
    if mix == "zipf":  # the popular ones are not the first by name
        assert [a for a, _ in asked.most_common()] != list(range(adapters))


def test_the_seed_decides_everything_by_one_stream_a_subject() -> None:
    assert draw() == draw()
    other = draw(seed=1)
    assert [r.adapter for r in other] != [r.adapter for r in draw()]
    assert [r.prompt for r in other] != [r.prompt for r in draw()]
    slow = draw(rate=2.0)
    assert [(r.adapter, r.prompt) for r in slow] == [(r.adapter, r.prompt) for r in draw()]
    longer = draw(rate=2.0, prompt_tokens=9)
    assert [(r.adapter, r.arrival) for r in longer] == [(r.adapter, r.arrival) for r in slow]


def test_arrivals_are_a_poisson_process() -> None:
    assert {r.arrival for r in draw()} == {0.0}
    arrivals = [r.arrival for r in draw(rate=4.0)]
    assert arrivals == sorted(arrivals)
    assert stats.kstest(np.diff(arrivals), stats.expon(scale=1 / 4).cdf).pvalue > 0.001


def test_prompts_have_their_length_and_are_all_different() -> None:
    requests = draw(500, prompt_tokens=8)
    assert {len(r.prompt) for r in requests} == {8}
    assert {i for r in requests for i in r.prompt} == set(range(50))
    assert len({r.prompt for r in requests}) == 500


def test_the_digest_tells_any_difference() -> None:
    requests = draw(5, rate=1.0)
    found = {serve_mix.digest(requests), serve_mix.digest(requests[:-1]), serve_mix.digest(draw(5))}
    assert len(found) == 3
    again = json.loads(json.dumps([vars(r) for r in requests]))
    assert serve_mix.digest([serve_mix.Request(**r) for r in again]) == serve_mix.digest(requests)


def test_quantiles_are_those_of_numpy() -> None:
    values = np.random.default_rng(0).exponential(size=37)
    found = Quantiles.of(values.tolist())
    expected = [values.mean(), *np.quantile(values, [0.5, 0.9, 0.99])]
    assert [found.mean, found.p50, found.p90, found.p99] == pytest.approx(expected)
    assert Quantiles.of([2.0]) == Quantiles(2.0, 2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"requests": 0},
        {"prompt_tokens": 0},
        {"output_tokens": -1},
        {"max_loras": 0},
        {"max_cpu_loras": 0},
        {"memory": 0},
        {"rate": 0.0},
        {"rate": math.nan},
        {"zipf_exponent": -1.0},
        {"zipf_exponent": math.inf},
        {"mix": "none"},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong)).replace("_", "-")):
        Settings(**wrong)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("4GiB", 4 * 2**30), ("500MB", 5 * 10**8), ("1.5 kB", 1500), ("7", 7), ("2kib", 2048), ("3B", 3)],
)
def test_sizes_are_read(text: str, nbytes: int) -> None:
    assert Size()(text) == nbytes
