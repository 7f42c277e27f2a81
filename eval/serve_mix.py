"""The request mix of a serving benchmark: which adapter is asked when, and for what; the same for every arm.

Everything comes from a seed, by one random stream a subject: another arrival rate leaves adapters and prompts as they
were, another prompt length leaves adapters and arrivals.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Literal

Mix = Literal["uniform", "zipf"]


@dataclass(frozen=True)
class Request:
    """One request.

    Attributes:
        adapter: index among the served adapters. An arm without adapters answers it with its model.
        arrival: seconds after the start.
        prompt: token ids.
    """

    adapter: int
    arrival: float
    prompt: tuple[int, ...]


def shares(adapters: int, mix: Mix, exponent: float) -> list[float]:
    """The probability of the k-th most popular adapter, k = 1 … n.

    uniform: 1/n. zipf: k^-s / Σ_j j^-s, the truncated Zipf law with exponent s (scipy.stats.zipfian).
    """
    weights = [1.0 if mix == "uniform" else k**-exponent for k in range(1, adapters + 1)]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def draw(
    count: int,
    adapters: int,
    *,
    mix: Mix,
    exponent: float,
    rate: float,
    prompt_tokens: int,
    vocabulary: int,
    seed: int,
) -> list[Request]:
    """Draw independent requests, sorted by arrival.

    Args:
        count: how many.
        adapters: how many to choose from; a seeded permutation says which is the most popular.
        mix, exponent: see `shares`.
        rate: requests a second of a Poisson process; infinite: all arrive at 0.
        prompt_tokens: length of every prompt; its ids are uniform below `vocabulary`.
        seed: of everything.
    """
    popularity = list(range(adapters))
    Random(f"{seed}/popularity").shuffle(popularity)
    chosen = Random(f"{seed}/adapters").choices(popularity, shares(adapters, mix, exponent), k=count)
    gaps, ids, now = Random(f"{seed}/arrivals"), Random(f"{seed}/prompts"), 0.0
    requests = []
    for adapter in chosen:
        prompt = tuple(ids.randrange(vocabulary) for _ in range(prompt_tokens))
        requests.append(Request(adapter, now, prompt))
        if not math.isinf(rate):
            now += gaps.expovariate(rate)
    return requests


def digest(requests: Sequence[Request]) -> str:
    """sha256 (hex) of a mix: equal if and only if two arms were asked the same."""
    text = json.dumps([asdict(request) for request in requests], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
