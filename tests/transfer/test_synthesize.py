"""What a generator is asked: seeds and nothing else, the same when it is asked again; and who judges its texts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from handmade import MakeAdapter
from hypothesis import given
from hypothesis import strategies as st

from lorazip.base import load_tokenizer
from lorazip.errors import InputError, TransferError
from lorazip.eval.backend import Forced, Sampled, Scores, Written
from lorazip.eval.prompts import Prompter
from lorazip.transfer import discriminator, synthesize
from lorazip.transfer.discriminator import Record
from lorazip.transfer.recipe import Inputs
from lorazip.transfer.synthesize import Draft

SEEDS = ["How far?", "Who was it, then?", "1. or 2.", "{input} or {definition}?", "why not", "last"]
SPEC = Inputs(
    definition="Answer the {input}.", seeds="seeds.txt", shots=4, temperature=0.7, top_p=0.8, seed=3
)


@pytest.fixture(scope="module")
def prompter(tmp_path_factory: pytest.TempPathFactory) -> Prompter:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.make_tokenizer(folder)
    return Prompter(load_tokenizer(folder), "{input}")


def asked(
    prompter: Prompter, spec: Inputs, seeds: list[str], round_: int, count: int, context: int = 10**6
) -> list[Sampled]:
    return synthesize.calls(prompter, spec, seeds, None, round_, count, context)


def shown(prompter: Prompter, call: Sampled) -> str:
    return prompter.decode(call.prompt)


def test_prompt_holds_the_definition_and_only_seeds(prompter: Prompter) -> None:
    calls = synthesize.calls(prompter, SPEC, SEEDS, "expert/ant", 0, 60, 10**6)
    assert len(calls) == 60
    drawn = set()
    for call in calls:
        definition, empty, heading, empty_too, *numbered = shown(prompter, call).split("\n")
        assert (definition, empty, empty_too) == (SPEC.definition, "", "")
        assert heading == "Here are 5 different inputs of this task."
        assert [line.partition(" ")[0] for line in numbered] == ["1.", "2.", "3.", "4.", "5."]
        some = [line.partition(" ")[2] for line in numbered]
        assert some.pop() == "" and len(set(some)) == 4 and set(some) <= set(SEEDS)
        drawn.add(tuple(some))
        assert (call.adapter, call.temperature, call.top_p, call.stop) == ("expert/ant", 0.7, 0.8, ("\n",))
    assert len(drawn) > 50 and {seed for some in drawn for seed in some} == set(SEEDS)


def test_without_a_definition_nothing_stands_before(prompter: Prompter) -> None:
    (call,) = asked(prompter, replace(SPEC, definition="", shots=50), SEEDS, 0, 1)
    assert call.adapter is None
    assert shown(prompter, call).startswith("Here are 7 different inputs of this task.\n\n1. ")
    assert sorted(re.findall(r"^\d\. (.*)$", shown(prompter, call), re.M)) == sorted(SEEDS)


def test_same_recipe_asks_the_same(prompter: Prompter) -> None:
    one = asked(prompter, SPEC, SEEDS, 1, 20)
    assert asked(prompter, SPEC, SEEDS, 1, 20) == one
    # A round that asks for more begins with the same.
    assert asked(prompter, SPEC, SEEDS, 1, 30)[:20] == one


def test_every_call_has_its_own_chance(prompter: Prompter) -> None:
    numbers = [call.seed for round_ in range(3) for call in asked(prompter, SPEC, SEEDS, round_, 200)]
    numbers += [call.seed for call in asked(prompter, replace(SPEC, seed=4), SEEDS, 0, 200)]
    assert len(set(numbers)) == 800
    assert all(0 <= number < 2**32 for number in numbers)


def test_seeds_of_several_lines_are_parted_by_empty_ones(prompter: Prompter) -> None:
    seeds = ["a\nb", "c", "d\ne\nf"]
    (call,) = asked(prompter, replace(SPEC, shots=3), seeds, 0, 1)
    body = shown(prompter, call).partition("task.\n\n")[2]
    parts = body.split("\n\n")
    assert [part[:2] for part in parts] == ["1.", "2.", "3.", "4."]
    assert sorted(part[3:] for part in parts[:3]) == sorted(seeds)
    assert call.stop == ("\n5.",)  # the number of the input after it


def test_limit_has_room_for_the_longest_seed(prompter: Prompter) -> None:
    (call,) = asked(prompter, SPEC, SEEDS, 0, 1)
    longest = max(map(len, SEEDS))  # a token a character
    assert call.limit > longest + 2  # the space before it, and what ends it
    assert call.limit <= 2 * longest + synthesize.SLACK


def test_short_context_is_shown_fewer_seeds(prompter: Prompter) -> None:
    (whole,) = asked(prompter, SPEC, SEEDS, 0, 1)
    room = len(whole.prompt) + whole.limit
    assert asked(prompter, SPEC, SEEDS, 0, 1, room) == [whole]
    for context in (room - 1, room - 30, 120):
        (call,) = asked(prompter, SPEC, SEEDS, 0, 1, context)
        assert len(call.prompt) + call.limit <= context
        numbered = shown(prompter, call).split("\n")[4:]
        assert 2 <= len(numbered) < 5 and numbered[-1] == f"{len(numbered)}."
        assert {line[3:] for line in numbered[:-1]} <= set(SEEDS)
    with pytest.raises(TransferError, match="no room") as caught:
        asked(prompter, SPEC, SEEDS, 0, 1, 60)
    assert not any(seed in str(caught.value) for seed in SEEDS)


def test_texts_are_stripped_and_say_whether_they_ended() -> None:
    calls = [Sampled(None, (1,), 3, seed) for seed in range(3)]
    answers = [Written(" ab\n", (1, 2)), Written(" abc", (1, 2, 3)), Written("", (tiny.END,))]
    assert synthesize.texts(calls, answers) == [Draft("ab", True), Draft("abc", False), Draft("", True)]
    with pytest.raises(ValueError, match="shorter"):
        synthesize.texts(calls, answers[:2])


@given(st.integers(1, 10**5), st.integers(1, 10**5), st.data())
def test_planned_is_bounded_and_grows_as_the_yield_falls(
    missing: int, asked: int, data: st.DataObject
) -> None:
    kept = sorted(data.draw(st.lists(st.integers(0, asked), min_size=2, max_size=2)))
    more, fewer = (synthesize.planned(missing, asked, some) for some in kept)
    assert more >= fewer >= min(missing, 4 * max(missing, 8))
    assert more <= synthesize.MOST * max(missing, 8)
    assert missing <= synthesize.planned(missing, 0, 0) <= 2 * missing + 1
    # All that was written was kept: what is missing is asked for, and one more.
    assert synthesize.planned(missing, asked, asked) == missing + 1


# The discriminator

RECORD = Record("5ha", real=80, synthetic=79, accuracy=0.925, held_out=40, template="{input} ?")


@given(st.lists(st.integers(), unique=True, min_size=2, max_size=60), st.integers(1, 59), st.integers(0, 9))
def test_split_is_balanced_and_disjoint(numbers: list[int], cut: int, seed: int) -> None:
    real, synthetic = [f"r{n}" for n in numbers[:cut]], [f"s{n}" for n in numbers[cut:]]
    train, held_out = discriminator.split(real, synthetic, seed)
    count = min(len(real), len(synthetic))
    for kind, some in enumerate((real, synthetic)):
        assert set(train[kind]) | set(held_out[kind]) <= set(some)
        assert not set(train[kind]) & set(held_out[kind])
        assert len(train[kind]) + len(held_out[kind]) == count
    assert len(train[0]) == len(train[1]) and len(held_out[0]) == len(held_out[1])
    if count:
        assert len(held_out[0]) == max(1, round(0.2 * count))
    assert discriminator.split(real, synthetic, seed) == (train, held_out)


def test_split_is_drawn_and_not_the_first() -> None:
    some = [f"r{i}" for i in range(50)], [f"s{i}" for i in range(30)]
    train, held_out = discriminator.split(*some, 0)
    assert discriminator.split(*some, 1) != (train, held_out)
    assert held_out[0] != some[0][:6] and train[0] != some[0][6:30]


def test_judge_is_trained_and_asked_in_the_same_words(prompter: Prompter) -> None:
    asking = replace(prompter, template=discriminator.TEMPLATE)
    found = discriminator.samples(asking, ["How far?", "{input}"], ["blah"])
    assert [prompter.decode(one.answer) for one in found] == [" yes", " yes", " no"]
    assert all(one.trained == (True,) * len(one.answer) and one.answer[-1] != tiny.END for one in found)
    calls = discriminator.calls(asking, "judge", ["How far?", "{input}", "blah"])
    assert calls == [
        Forced("judge", one.prompt, prompter.answer(word, end=False))
        for one in found
        for word in (" yes", " no")
    ]
    for one, text in zip(found, ("How far?", "{input}", "blah"), strict=True):
        assert prompter.decode(one.prompt) == discriminator.TEMPLATE.replace("{input}", text)


def test_verdict_is_the_likelier_word() -> None:
    def scores(*logprobs: float) -> Scores:
        return Scores(logprobs, (0.0,) * len(logprobs))

    answers = [
        (scores(-1.0, -1.0), scores(-3.0)),  # the whole word counts, not its last token
        (scores(-0.1, -9.0), scores(-3.0)),
        (scores(-2.0), scores(-2.0)),  # p(yes) > p(no): even is no
    ]
    assert discriminator.verdicts([one for pair in answers for one in pair]) == [True, False, False]
    with pytest.raises(ValueError, match=r"longer|shorter"):
        discriminator.verdicts([scores(-1.0)])


def test_record_comes_back(make_adapter: MakeAdapter) -> None:
    folder = make_adapter("judge")
    discriminator.write_record(folder, RECORD)
    found = discriminator.read(folder)
    assert found.record == RECORD
    assert found.adapter.name == "discriminator judge" and len(found.adapter.modules) == 6
    assert json.loads((folder / "discriminator.json").read_text()) == {
        "schema": "lorazip.discriminator/1", **asdict(RECORD),
    }  # fmt: skip


Document = dict[str, Any]
DAMAGES: dict[str, Callable[[Document], Any]] = {
    "no object": lambda document: [document],
    "of another version": lambda document: document | {"schema": "lorazip.discriminator/2"},
    "without schema": lambda document: {key: document[key] for key in document if key != "schema"},
    "a key less": lambda document: {key: document[key] for key in document if key != "accuracy"},
    "a key more": lambda document: document | {"inputs": ["a text"]},
    "a text for a number": lambda document: document | {"real": "80"},
    "a number for a text": lambda document: document | {"base": 5},
    "nothing for a number": lambda document: document | {"accuracy": None},
    "no place in the template": lambda document: document | {"template": "Is it?"},
    "huge": lambda document: document | {"template": "{input}" + "x" * 2**16},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_record_is_refused(make_adapter: MakeAdapter, damage: str) -> None:
    folder = make_adapter("judge")
    discriminator.write_record(folder, RECORD)
    path = folder / "discriminator.json"
    path.write_text(json.dumps(DAMAGES[damage](json.loads(path.read_text()))))
    with pytest.raises(InputError, match=r"judge: discriminator\.json: .*lorazip transfer discriminator"):
        discriminator.read(folder)


@pytest.mark.parametrize("data", [b"", b"{", b'{"schema": "\xff"}', b'{"real": NaN}', None])
def test_no_record_is_refused(make_adapter: MakeAdapter, data: bytes | None) -> None:
    folder = make_adapter("judge")
    if data is not None:
        (folder / "discriminator.json").write_bytes(data)
    with pytest.raises(InputError, match=r"discriminator\.json"):
        discriminator.read(folder)


def test_no_adapter_is_no_discriminator(tmp_path: Path) -> None:
    discriminator.write_record(tmp_path, RECORD)
    with pytest.raises(InputError, match="discriminator"):
        discriminator.read(tmp_path)
