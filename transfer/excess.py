"""TiTok's filter: how much more the expert expects each token of an answer than its bare base does.

    excess_t = log p(y_t | source base + adapter) - log p(y_t | source base)

What both expect teaches nothing that the adapter knows. Samples are kept by the mean of their excess, tokens of a kept
sample by their own. The two models have different tokens: a target token gets the mean, over its characters, of the
excess of the source tokens that these characters came from. Bytes of one character may be several tokens; these are
taken together, on either side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]


def excess(expert: Sequence[float], base: Sequence[float]) -> tuple[float, ...]:
    """Per token; both are log-probabilities of the same answer."""
    return tuple(a - b for a, b in zip(expert, base, strict=True))


def ends(tokens: Sequence[int], decode: Decode) -> list[int]:
    """For every token, how many characters of the whole text there are up to its end.

    Bytes of one character may be several tokens: then the text does not grow until the last of them.
    """
    whole = decode(tokens)
    found, last = [], 0
    for i in range(1, len(tokens) + 1):
        part = decode(tokens[:i])
        if whole.startswith(part):
            last = max(last, len(part))
        found.append(last)
    return found


def carried(
    excess: Sequence[float], source_ends: Sequence[int], target_ends: Sequence[int]
) -> tuple[float, ...]:
    """The excess of every target token. The last token of both is the end token.

    Args:
        excess: of every source token, the end token's last.
        source_ends, target_ends: by `ends`, of the tokens without the end token, of the same text.
    """
    if list(source_ends) == list(target_ends):
        return tuple(excess)
    characters: list[float] = []
    together: list[float] = []
    for value, end in zip(excess[:-1], source_ends, strict=True):
        together.append(value)
        if end > len(characters):
            characters += [sum(together) / len(together)] * (end - len(characters))
            together = []
    found = []
    for i in range(len(target_ends)):
        start = target_ends[i - 1] if i else 0
        end = next((end for end in target_ends[i:] if end > start), start)
        some = characters[start:end] or characters[-1:] or [0.0]
        found.append(sum(some) / len(some))
    return (*found, excess[-1])


def best_samples(means: Sequence[float], share: float) -> list[bool]:
    """Which samples are kept: the best share of them, at least one; of equal ones the first."""
    order = sorted(range(len(means)), key=lambda i: (-means[i], i))
    count = math.ceil(share * len(means) - 1e-9)  # 0.55 * 100 is more than 55
    kept = set(order[: max(1, count)])
    return [i in kept for i in range(len(means))]


def best_tokens(values: Sequence[float], share: float) -> tuple[bool, ...]:
    """Which tokens of an answer are trained on: the best share, and the end token, without which no answer ends."""
    kept = best_samples(values, share)
    return (*kept[:-1], True)
