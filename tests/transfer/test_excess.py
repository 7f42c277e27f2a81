"""TiTok's filter: what tokens say more than the base, carried from one tokenisation to another, and what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lorazip.transfer import excess

VALUES = st.floats(-50, 50)
WIDTHS = st.lists(
    st.integers(0, 4), max_size=12
)  # characters of each token; 0: first bytes of the next one's


def byte_level(*merges: tuple[str, str]) -> Tokenizer:
    """A token a byte, and these merged."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


BYTES = byte_level()
MERGED = byte_level(("a", "b"), ("b", "Ã"), ("ð", "Ł"))  # the second ends within é, the third within 😀


def ends(tokenizer: Tokenizer, text: str) -> list[int]:
    return excess.ends(tokenizer.encode(text).ids, lambda tokens: tokenizer.decode(list(tokens)))


def test_excess_is_the_difference() -> None:
    assert excess.excess([-1.0, -0.5], [-3.0, -0.25]) == (2.0, -0.25)
    with pytest.raises(ValueError, match="longer"):
        excess.excess([-1.0], [-3.0, -0.25])


def test_ends_where_characters_are_several_tokens() -> None:
    assert ends(BYTES, "aé😀b") == [1, 1, 2, 2, 2, 2, 3, 4]
    assert MERGED.encode("abé😀").tokens == ["ab", "Ã", "©", "ðŁ", "ĺ", "Ģ"]
    assert ends(MERGED, "abé😀") == [2, 2, 3, 3, 3, 4]
    assert MERGED.encode("bé").tokens == ["bÃ", "©"]
    assert ends(MERGED, "bé") == [0, 2]  # b's token is not whole before é is
    assert ends(BYTES, "") == []


@given(st.text(st.characters(blacklist_categories=["Cs"]), max_size=12))
def test_ends_of_bytes_are_those_of_utf8(text: str) -> None:
    found = ends(BYTES, text)
    counted: list[int] = []
    for i, character in enumerate(text):
        counted += [i] * (len(character.encode()) - 1) + [i + 1]
    assert len(found) == len(counted)
    # A replacement character in the text cannot be told from bytes that are not yet whole.
    if "\ufffd" not in text:
        assert found == counted
    assert found == sorted(found) and (not found or found[-1] == len(text))


def grouped(values: Sequence[float], widths: Sequence[int]) -> tuple[list[list[int]], dict[int, Fraction]]:
    """Tokens that end a character together, and the mean value of those that each character came from."""
    groups: list[list[int]] = [[]]
    characters: dict[int, Fraction] = {}
    for i, width in enumerate(widths):
        groups[-1].append(i)
        if width:
            mean = sum((Fraction(values[j]) for j in groups[-1]), Fraction(0)) / len(groups[-1])
            for _ in range(width):
                characters[len(characters)] = mean
            groups.append([])
    return groups, characters


def by_characters(values: Sequence[float], source: Sequence[int], target: Sequence[int]) -> list[float]:
    """Each character's own value, and each target token's mean of its characters', one at a time."""
    _, characters = grouped(values, source)
    groups, _ = grouped([0.0] * len(target), target)
    found = [0.0] * len(target)
    position = 0
    for group in groups:
        width = target[group[-1]] if group else 0
        mine = [characters[position + i] for i in range(width)]
        position += width
        if not mine and characters:  # bytes after the last whole character
            mine = [characters[len(characters) - 1]]
        for i in group:
            found[i] = float(sum(mine, Fraction(0)) / len(mine)) if mine else 0.0
    return found


@st.composite
def tokenised(draw: st.DrawFn) -> tuple[list[float], list[int], list[int]]:
    """A text in two tokenisations, with the first one's values and the end token's."""
    source = draw(WIDTHS)
    target: list[int] = []
    while sum(target) < sum(source):
        target.append(draw(st.integers(0 if len(target) < 20 else 1, sum(source) - sum(target))))
    target += [0] * draw(st.integers(0, 2))
    return draw(st.lists(VALUES, min_size=len(source) + 1, max_size=len(source) + 1)), source, target


@given(tokenised())
def test_carried_is_the_mean_over_characters(
    drawn: tuple[list[float], list[int], list[int]],
) -> None:
    values, source, target = drawn
    found = excess.carried(values, list(accumulate(source)), list(accumulate(target)))
    assert len(found) == len(target) + 1 and found[-1] == values[-1]
    if source != target:
        assert found[:-1] == pytest.approx(by_characters(values[:-1], source, target), abs=1e-9)


@given(tokenised())
def test_carried_between_equal_tokenisations_changes_nothing(
    drawn: tuple[list[float], list[int], list[int]],
) -> None:
    values, source, _ = drawn
    assert excess.carried(values, list(accumulate(source)), list(accumulate(source))) == tuple(values)


def test_carried_by_hand() -> None:
    # ab|cd|e -> a|bcd|e: a has 1, bcd (1 + 3 + 3) / 3, e 9; then the end's 5.
    assert excess.carried([1, 3, 9, 5], [2, 4, 5], [1, 4, 5]) == pytest.approx((1, 7 / 3, 9, 5))
    # The two bytes of é are one token there: nothing of the first is lost. And back: both get its value.
    text = "aé"
    one = byte_level(("Ã", "©"))
    assert excess.carried([1, 2, 6, 0], ends(BYTES, text), ends(one, text)) == (1, 4, 0)
    assert excess.carried([1, 4, 0], ends(one, text), ends(BYTES, text)) == (1, 4, 4, 0)
    assert excess.carried([7], [], []) == (7,)


@given(st.lists(VALUES, min_size=1, max_size=60), st.integers(1, 100))
def test_best_samples_are_the_stated_share(means: list[float], percent: int) -> None:
    kept = excess.best_samples(means, percent / 100)
    count = max(1, -(-percent * len(means) // 100))  # rounded up, in whole numbers
    assert sum(kept) == count
    worst = min(m for m, k in zip(means, kept, strict=True) if k)
    assert all(m <= worst for m, k in zip(means, kept, strict=True) if not k)


def test_rounding_keeps_no_sample_more() -> None:
    assert 0.55 * 100 > 55 and sum(excess.best_samples([0.0] * 100, 0.55)) == 55
    assert sum(excess.best_samples([0.0] * 101, 0.55)) == 56


def test_of_equal_samples_the_first_are_kept() -> None:
    assert excess.best_samples([1, 2, 1, 1], 0.5) == [True, True, False, False]
    assert excess.best_samples([0.0] * 3, 1e-6) == [True, False, False]


@given(st.lists(VALUES, min_size=1, max_size=40), st.integers(1, 100))
def test_best_tokens_are_the_share_and_the_end(values: list[float], percent: int) -> None:
    trained = excess.best_tokens(values, percent / 100)
    assert trained[-1]
    kept = excess.best_samples(values, percent / 100)
    assert list(trained[:-1]) == kept[:-1]
    assert sum(kept) <= sum(trained) <= sum(kept) + 1
