"""What a serving benchmark is asked and what it found: plain data, and the content of serve.json."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import lorazip
from lorazip.errors import UsageError
from lorazip.eval.serve_mix import Mix

SCHEMA = "lorazip.serve/1"
BASE, MERGED, ORIGINALS = "base", "merged", "originals"

Kind = Literal["base", "merged", "originals", "bundle"]


@dataclass(frozen=True)
class Settings:
    """What is asked of every arm.

    Attributes:
        requests, prompt_tokens, output_tokens: how many, and their lengths.
        mix, zipf_exponent: which adapters they ask for, see `serve_mix.shares`.
        rate: requests a second; infinite: all at once.
        max_loras: distinct adapters in one batch at most.
        max_cpu_loras: adapters kept in host memory; None: all.
        memory: bytes of the KV cache.
        dtype: of the model and the adapters in it, as vLLM names it.
        seed: of the mix.
    """

    requests: int = 200
    mix: Mix = "uniform"
    zipf_exponent: float = 1.0
    prompt_tokens: int = 128
    output_tokens: int = 32
    rate: float = math.inf
    max_loras: int = 8
    max_cpu_loras: int | None = None
    memory: int = 4 * 2**30
    dtype: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("requests", "prompt_tokens", "output_tokens", "max_loras", "max_cpu_loras", "memory"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name.replace('_', '-')} must be at least 1, not {value}")
        if not self.rate > 0:
            raise UsageError(f"rate must be positive, not {self.rate}")
        if not 0 <= self.zipf_exponent < math.inf:
            raise UsageError(f"zipf-exponent must be 0 or more, not {self.zipf_exponent}")
        if self.mix not in ("uniform", "zipf"):
            raise UsageError(f"mix must be uniform or zipf, not {self.mix!r}")


@dataclass(frozen=True)
class Quantiles:
    """Mean and percentiles over the requests, seconds."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quantiles:
        """Percentiles with linear interpolation, as numpy's default."""
        ordered = sorted(values)

        def at(share: float) -> float:
            position = share * (len(ordered) - 1)
            low = math.floor(position)
            high = min(low + 1, len(ordered) - 1)
            return ordered[low] + (position - low) * (ordered[high] - ordered[low])

        return cls(statistics.fmean(ordered), at(0.5), at(0.9), at(0.99))


@dataclass(frozen=True)
class Row:
    """What one arm did.

    Attributes:
        arm, kind: its name, and what it is.
        path: the bundle, or of a merged model its adapter's name; empty for originals and the base.
        adapters: how many it served; 0 for the base.
        max_lora_rank, max_loras: the size and number of vLLM's slots; None without LoRA.
        seconds: from the start to the last answer.
        requests_per_second, output_tokens_per_second: over these seconds.
        ttft: time to the first token, from a request's arrival.
        latency: time to the last token, from a request's arrival.
        per_token: time between tokens after the first: (latency - ttft) / (tokens - 1); zero for one token.
        start_seconds: until the engine was ready. load_seconds: to read all adapters and put each in a slot once.
        host_memory_bytes: peak of the process, without mapped files. device_memory_bytes: peak on the GPU, or None.
        disk_bytes: of the adapters as they are stored; of the whole model where one is merged.
        loaded_bytes: of the factors in the engine's type, what host memory holds of the adapters.
        slot_bytes: what the model's layers set aside for adapters.
        kv_cache_tokens: tokens that the KV cache holds.
        dtype: of the model.
        same_as_base: share of requests that got the base's answer, token by token; None for the base.
        others_cpu_share: of all processor time during the measurement, what other processes took; None: unknown.
        requests_sha256: of the requests as the process got them: the same for all arms.
    """

    arm: str
    kind: Kind
    path: str
    adapters: int
    max_lora_rank: int | None
    max_loras: int | None
    seconds: float
    requests_per_second: float
    output_tokens_per_second: float
    ttft: Quantiles
    latency: Quantiles
    per_token: Quantiles
    start_seconds: float
    load_seconds: float
    host_memory_bytes: int
    device_memory_bytes: int | None
    disk_bytes: int
    loaded_bytes: int
    slot_bytes: int
    kv_cache_tokens: int
    dtype: str
    same_as_base: float | None
    others_cpu_share: float | None
    requests_sha256: str

    @property
    def memory_bytes(self) -> int:
        """Peak memory of what the model runs on."""
        return self.host_memory_bytes if self.device_memory_bytes is None else self.device_memory_bytes


@dataclass(frozen=True)
class Failure:
    """An arm that did not finish, and why."""

    arm: str
    error: str


@dataclass
class Outcome:
    """A benchmark, as far as it got.

    Attributes:
        base, names: the model, and the adapters in the order of their indices.
        settings: what was asked.
        counts: requests for each adapter.
        machine: what it ran on; empty before the first arm finished.
        rows, failures: arms that finished, in order, and those that did not.
        outputs: the answers of every finished arm; not saved.
    """

    base: str
    names: list[str]
    settings: Settings
    counts: list[int]
    machine: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    outputs: dict[str, list[list[int]]] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """The content of serve.json."""
        settings = asdict(self.settings)
        settings["rate"] = None if math.isinf(self.settings.rate) else self.settings.rate
        return {
            "schema": SCHEMA,
            "lorazip": lorazip.__version__,
            "machine": self.machine,
            "base": self.base,
            "settings": settings,
            "adapters": dict(zip(self.names, self.counts, strict=True)),
            "rows": [asdict(row) for row in self.rows],
            "failures": [asdict(failure) for failure in self.failures],
        }
