"""The stage `label` between its inputs and its file, with scripted answers in the models' place."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny

from lorazip.adapter import open_adapter
from lorazip.errors import LorazipError, TransferError
from lorazip.eval import session
from lorazip.eval.backend import Answer, Call, Forced, Greedy, Ranked, Scores, Tops, Written, digest
from lorazip.eval.cache import Cache
from lorazip.transfer import gather, teach
from lorazip.transfer import recipe as recipes
from lorazip.transfer.move import Move
from lorazip.transfer.teach import ASIDE, HELD_OUT, TEST, TRAIN, Labelled
from lorazip.transfer.world import Ask, Base, World

PROMPTS = {"prompts": "prompts.txt", "count": 0}

Script = Callable[[Call], Answer]


class Scripted(World):
    """A world whose models answer by a script; what they were asked is kept."""

    script: Script
    asked: list[Call]

    def ask(self, base: Base, asks: Sequence[Ask], what: str) -> Mapping[str, list[Answer] | LorazipError]:  # type: ignore[override]
        assert base == self.source
        for ask in asks:
            self.asked.extend(ask.calls)
            assert {call.adapter for call in ask.calls} - {None} <= set(ask.adapters)
        return {ask.name: [self.script(call) for call in ask.calls] for ask in asks if ask.calls}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Base("old", tiny.make_base(tmp_path_factory.mktemp("base") / "old"), "d1gest")


@pytest.fixture(scope="module")
def ant(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_adapters(tmp_path_factory.mktemp("zoo"), ["ant"])[0]


class School:
    """Makes worlds and transfers below a folder."""

    def __init__(self, base: Base, ant: Path, root: Path):
        self.base, self.adapter, self.root = base, open_adapter(ant, "ant"), root

    def world(self, script: Script) -> Scripted:
        def silent(*told: Any, **more: Any) -> None: ...

        cache = Cache(self.root)
        cache.close()
        world = Scripted(self.base, self.base, session.engine("hf", "float32", "cpu"), cache, silent)
        object.__setattr__(world, "script", script)
        object.__setattr__(world, "asked", [])
        return world

    def move(self, world: Scripted, some: Sequence[str], **tables: dict[str, Any]) -> Move:
        least = {
            "source": {"base": "old", "adapter": "ant", "template": tiny.TEMPLATE},
            "target": {"base": "new"},
            "inputs": PROMPTS,
        }
        parsed = recipes.parse(least | tables)
        move = Move(
            "ant", parsed, self.adapter, digest(self.adapter), [], list(some), self.root, self.root / "out"
        )
        rows = ({"input": text, "kind": "retained"} for text in some)
        move.write(gather.INPUTS, gather.key(move, world, True), rows)
        return move

    def label(self, script: Script, some: Sequence[str], **tables: dict[str, Any]) -> tuple[Move, Scripted]:
        world = self.world(script)
        move = self.move(world, some, **tables)
        teach.label(world, [move])
        return move, world

    def read(self, move: Move) -> list[Labelled]:
        return teach.read(self.world(plainly), move)


@pytest.fixture
def school(base: Base, ant: Path, tmp_path: Path) -> School:
    return School(base, ant, tmp_path)


def inputs(n: int) -> list[str]:
    return [f"q{i:03}" for i in range(n)]


def answer_of(text: str) -> tuple[int, ...]:
    """Tokens of q007 -> a007 and the end."""
    return (*tiny.encode(f"a{text[1:]}"), tiny.END)


def told(tokens: Sequence[int]) -> str:
    return "".join(tiny.CHARACTERS[token] for token in tokens if token != tiny.END)


def gain(text: str) -> float:
    """How much more the expert expects of an answer: another order than that of the inputs."""
    return (int(text[1:]) * 37 % 101) / 10


def plainly(call: Call) -> Answer:
    """Every question answered; the expert's gain spread unevenly over the tokens."""
    if isinstance(call, Greedy):
        tokens = answer_of(told(call.prompt).removesuffix("="))
        return Written(told(tokens), tokens)
    assert isinstance(call, Forced)
    n = len(call.answer)
    if isinstance(call, Ranked):
        return Tops(tuple((token, 0) for token in call.answer), ((-0.1, -math.inf),) * n)
    own = gain(told(call.answer)) if call.adapter else 0.0
    spread = tuple(-20.0 + own + (i - (n - 1) / 2 if call.adapter else 0) for i in range(n))
    return Scores(spread, (0.0,) * n)


def parts(labelled: Sequence[Labelled]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {part: set() for part in (TRAIN, HELD_OUT, TEST, ASIDE)}
    for one in labelled:
        found[one.part].add(one.input)
    return found


def test_expert_is_asked_every_input_in_its_own_prompt(school: School) -> None:
    move, world = school.label(plainly, inputs(10), filter={"kind": "none"}, label={"new_tokens": 9})
    assert move.failed is None
    assert world.asked == [Greedy("expert/ant", tiny.encode(f"{text}="), 9) for text in inputs(10)]
    labelled = school.read(move)
    assert [(one.input, one.output, one.tokens) for one in labelled] == [
        (text, f"a{text[1:]}", answer_of(text)) for text in inputs(10)
    ]
    assert all(one.excess == () and one.tops is None for one in labelled)


@pytest.mark.parametrize("n", [4, 7, 40, 101])
def test_shares_of_the_parts(school: School, n: int) -> None:
    move, _ = school.label(plainly, inputs(n), filter={"kind": "none"}, train={"held_out": 0.25})
    found = parts(school.read(move))
    tested = max(2, round(0.2 * n))
    held = max(1, round(0.25 * (n - tested)))
    assert {part: len(some) for part, some in found.items()} == {
        TEST: tested, HELD_OUT: held, TRAIN: n - tested - held, ASIDE: 0,
    }  # fmt: skip
    figures = move.known("label")
    assert figures["answers"] == {"kept": n, "unfinished": 0, "empty": 0}
    assert figures["parts"] == {part: len(some) for part, some in found.items() if some}


def test_filter_keeps_the_best_and_does_not_choose_its_test(school: School) -> None:
    n = 50
    bare, _ = school.label(plainly, inputs(n), filter={"kind": "none"})
    test = parts(school.read(bare))[TEST]
    move, world = school.label(plainly, inputs(n), filter={"kind": "excess", "keep_samples": 0.3})
    labelled = school.read(move)
    found = parts(labelled)
    assert found[TEST] == test
    rest = sorted(set(inputs(n)) - test, key=gain, reverse=True)
    assert found[TRAIN] | found[HELD_OUT] == set(rest[:12])  # 0.3 of 40
    assert found[ASIDE] == set(rest[12:])
    assert len(found[HELD_OUT]) == 1  # 0.1 of 12
    for one in labelled:
        width = len(one.tokens)
        spread = [gain(one.input) + i - (width - 1) / 2 for i in range(width)]
        assert one.excess == pytest.approx(spread)
    weighed = [call for call in world.asked if isinstance(call, Forced)]
    assert [call.adapter for call in weighed] == ["expert/ant", None] * n
    # Another teacher's gains change what is set aside, not what is tested on.
    other, _ = school.label(
        lambda call: plainly(call) if not isinstance(call, Forced) else Scores((-1.0,) * 5, (0.0,) * 5),
        inputs(n),
        filter={"kind": "excess"},
        label={"new_tokens": 63},
    )
    assert parts(school.read(other))[TEST] == test


def test_parts_are_a_function_of_the_seed(school: School, base: Base, ant: Path, tmp_path: Path) -> None:
    one = school.read(school.label(plainly, inputs(40))[0])
    again = School(base, ant, tmp_path / "again")
    (tmp_path / "again").mkdir()
    assert school.read(again.label(plainly, inputs(40))[0]) == one
    other = school.read(school.label(plainly, inputs(40), inputs=PROMPTS | {"seed": 1})[0])
    assert parts(other)[TEST] != parts(one)[TEST]


def test_with_a_labelled_test_no_answer_is_held_back_for_one(school: School) -> None:
    move, _ = school.label(plainly, inputs(20), filter={"kind": "none"}, gate={"tests": "t.jsonl"})
    found = parts(school.read(move))
    assert (len(found[TEST]), len(found[HELD_OUT]), len(found[TRAIN])) == (0, 2, 18)


def test_logits_bring_the_likeliest_tokens(school: School) -> None:
    tables: dict[str, dict[str, Any]] = {"train": {"loss": "logits"}, "label": {"top_k": 2}}
    move, world = school.label(plainly, inputs(8), filter={"kind": "excess"}, **tables)
    for one in school.read(move):
        assert one.tops == Tops(tuple((token, 0) for token in one.tokens), ((-0.1, -math.inf),) * 5)
        assert len(one.excess) == 5
    assert {call.k for call in world.asked if isinstance(call, Ranked)} == {2}


def test_unfinished_and_empty_answers_are_counted(school: School) -> None:
    def script(call: Call) -> Answer:
        answer = plainly(call)
        assert isinstance(answer, Written)
        number = int(told(call.prompt)[1:-1])
        if number % 3 == 1:
            return Written("x" * 9, tiny.encode("x" * 9))
        return Written(" \n", (tiny.END,)) if number % 3 == 2 else answer

    move, _ = school.label(script, inputs(20), filter={"kind": "none"}, label={"new_tokens": 9})
    assert move.known("label")["answers"] == {"kept": 7, "unfinished": 7, "empty": 6}
    assert Counter(one.input for one in school.read(move)) == Counter(inputs(20)[::3])


def test_answer_whose_end_is_the_last_token_allowed_is_finished(school: School) -> None:
    move, _ = school.label(plainly, inputs(9), label={"new_tokens": len(answer_of("q000"))})
    assert move.known("label")["answers"] == {"kept": 9, "unfinished": 0, "empty": 0}


def test_options_that_are_not_used_redo_nothing(school: School) -> None:
    world = school.world(plainly)

    def key(**tables: dict[str, Any]) -> str:
        return teach.key(school.move(world, inputs(4), **tables), world)

    assert key() == key(label={"top_k": 8}) == key(filter={"keep_samples": 0.3, "keep_tokens": 0.2})
    logits = {"loss": "logits"}
    assert key(train=logits) != key(train=logits, label={"top_k": 8})
    excess = {"kind": "excess"}
    assert key(filter=excess) != key(filter=excess | {"keep_samples": 0.3})
    assert key(filter=excess) == key(filter=excess | {"keep_tokens": 0.3})  # of answers' tokens: learn.key


def test_answer_cut_by_the_context_is_unfinished(school: School) -> None:
    long = "y" * (school.base.context - 6)  # with "=" after it, five tokens are left

    def script(call: Call) -> Answer:
        if told(call.prompt) == f"{long}=":
            assert isinstance(call, Greedy) and call.limit == 5
            return Written("xxxxx", tiny.encode("xxxxx"))
        return plainly(call)

    move, _ = school.label(script, [long, *inputs(9)], filter={"kind": "none"})
    assert move.known("label")["answers"] == {"kept": 9, "unfinished": 1, "empty": 0}


def failure(move: Move) -> str:
    assert isinstance(move.failed, TransferError)
    assert not (move.work / teach.LABELLED).exists() and move.figures("label", "") is None
    assert "q0" not in str(move.failed) and "a0" not in str(move.failed)
    return str(move.failed)


def test_too_few_answers_end_the_transfer(school: School) -> None:
    def script(call: Call) -> Answer:
        return plainly(call) if told(call.prompt) < "q003" else Written("", (tiny.END,))

    move, _ = school.label(script, inputs(9), filter={"kind": "none"})
    assert "3 of 9 answers of the source adapter can be used" in failure(move)
    assert "6 were empty" in failure(move)


@pytest.mark.parametrize(("n", "share"), [(4, 0.5), (12, 0.1)])
def test_too_few_after_the_filter_end_the_transfer(school: School, n: int, share: float) -> None:
    move, _ = school.label(plainly, inputs(n), filter={"kind": "excess", "keep_samples": share})
    assert "1 left to train on and hold out" in failure(move)


def test_input_without_room_for_an_answer_ends_the_transfer(school: School) -> None:
    move, world = school.label(plainly, [*inputs(9), "y" * school.base.context])
    assert "leaves the source base no room" in failure(move)
    assert world.asked == []


def test_what_is_labelled_is_not_asked_again(school: School) -> None:
    school.label(plainly, inputs(9))
    move, world = school.label(plainly, inputs(9))
    assert world.asked == [] and len(school.read(move)) == 9
