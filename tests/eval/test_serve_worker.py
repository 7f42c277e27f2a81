"""The process that measures, with vLLM itself where it is installed."""

from __future__ import annotations

import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from serving import HEAD, VOCABULARY, needs_vllm

from lorazip.eval import serve, serve_mix, serve_worker
from lorazip.eval.serve_plot import plot
from lorazip.eval.serve_records import Outcome, Quantiles, Row, Settings


def test_the_machine_is_named() -> None:
    found = serve_worker.machine()
    assert found["processor"]
    assert found["cores"] >= 1
    assert found["versions"]["torch"] == torch.__version__


def test_slots_are_counted() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    for layer in model:
        layer.lora_a_stacked = (torch.zeros(3, 1, 4, 2), torch.zeros(3, 1, 4, 2))
        layer.lora_b_stacked = (torch.zeros(3, 1, 2, 4, dtype=torch.bfloat16),)
    assert serve_worker._slot_bytes(model) == 2 * (2 * 24 * 4 + 24 * 2)


def test_others_are_those_that_are_not_this_process() -> None:
    with serve_worker._Others() as others:
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            pass
    assert others.share is not None
    assert 0 <= others.share < 1


@pytest.fixture(scope="module")
def real(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """All arms in vLLM."""
    settings = Settings(
        requests=12,
        prompt_tokens=8,
        output_tokens=6,
        memory=32 * 2**20,
        dtype="float32",
        max_loras=2,
        rate=200,
    )
    outcome = serve.run(
        str(shop / "model"),
        [str(shop / "adapters")],
        [shop / "team.lorazip"],
        tmp_path_factory.mktemp("real") / "out",
        settings,
    )
    assert outcome.failures == []
    return outcome


@needs_vllm
def test_vllm_answers_all_arms_with_the_same_requests_and_memory(real: Outcome) -> None:
    assert [row.arm for row in real.rows] == ["base", "merged", "originals", "team"]
    assert len({row.requests_sha256 for row in real.rows}) == 1
    assert len({row.kv_cache_tokens for row in real.rows}) == 1
    assert real.rows[0].kv_cache_tokens == 32 * 2**20 // (
        4 * 2 * 2 * HEAD
    )  # float32, K and V, two layers, one head
    assert {row.dtype for row in real.rows} == {"float32"}
    assert "vllm" in " ".join(real.machine["versions"])
    for row in real.rows:
        assert 0 < row.ttft.p50 <= row.latency.p50 <= row.latency.p99 <= row.seconds < 60
        assert row.per_token.mean > 0
        assert 10**8 < row.host_memory_bytes < 10**10
        assert (row.slot_bytes > 0) == (row.max_loras is not None)
    base, _, originals, bundle = real.rows
    assert (originals.max_lora_rank, originals.max_loras) == (16, 3)
    assert originals.slot_bytes == 3 * 16 * 4 * sum(out + in_ for out, in_ in PACKED)
    assert bundle.slot_bytes > 0
    assert base.same_as_base is None


# vLLM sets slots aside in the layers as it packs them: q, k, v each have their own input factor.
PACKED = [(64, 64), (32, 64), (32, 64), (64, 96)] * 2


@needs_vllm
def test_a_merged_adapter_answers_as_stock_lora_does(real: Outcome, shop: Path) -> None:
    requests = serve_mix.draw(
        12, 3, mix="uniform", exponent=1, rate=200, prompt_tokens=8, vocabulary=VOCABULARY, seed=0
    )
    own = [i for i, request in enumerate(requests) if request.adapter == 0]
    assert own
    for i in own:
        assert real.outputs["merged"][i] == real.outputs["originals"][i]
    same = [row.same_as_base for row in real.rows if row.same_as_base is not None]
    assert max(same) < 0.5  # no arm answers like the base


def test_the_plot_bears_any_names(real_row: Row) -> None:
    svg = plot([real_row], 3.0)
    assert "3 requests a second" in svg
    assert "a&lt;$b$&amp;" in svg
    ElementTree.fromstring(svg)


@pytest.fixture
def real_row() -> Row:
    q = Quantiles(1.0, 1.0, 2.0, 3.0)
    return Row(
        arm="a<$b$&" + "x" * 50,
        kind="bundle",
        path="p",
        adapters=1,
        max_lora_rank=8,
        max_loras=2,
        seconds=1.0,
        requests_per_second=1.0,
        output_tokens_per_second=1.0,
        ttft=q,
        latency=q,
        per_token=q,
        start_seconds=1.0,
        load_seconds=1.0,
        host_memory_bytes=1,
        device_memory_bytes=None,
        disk_bytes=1,
        loaded_bytes=1,
        slot_bytes=1,
        kv_cache_tokens=1,
        dtype="float32",
        same_as_base=0.0,
        others_cpu_share=None,
        requests_sha256="",
    )
