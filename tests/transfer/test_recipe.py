"""A recipe is checked whole: every unknown, mistyped or absurd key is named, and nothing is quietly not used."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorazip.errors import InputError, UsageError
from lorazip.transfer import recipe as recipes
from lorazip.transfer import recipe_file, recipe_table
from lorazip.transfer.recipe import Recipe

LEAST: dict[str, dict[str, Any]] = {
    "source": {"base": "org/old", "adapter": "zoo/ant"},
    "target": {"base": "org/new"},
    "inputs": {"seeds": "seeds.txt"},
}


def tables(**more: Any) -> dict[str, Any]:
    """The least recipe, and these keys: train__rank=4."""
    found: dict[str, Any] = {name: dict(table) for name, table in LEAST.items()}
    for place, value in more.items():
        table, key = place.split("__")
        found.setdefault(table, {})[key] = value
    return found


def complaints(wrong: dict[str, Any]) -> list[str]:
    with pytest.raises(UsageError) as caught:
        recipes.parse(wrong, "move.toml")
    lines = str(caught.value).splitlines()
    assert all(line.startswith("move.toml: ") for line in lines)
    return [line.removeprefix("move.toml: ") for line in lines]


def test_least_recipe_is_all_defaults() -> None:
    found = recipes.parse(LEAST)
    assert found.source == recipes.Source("org/old", "zoo/ant")
    assert found.inputs == recipes.Inputs(seeds="seeds.txt")
    assert (found.filter, found.label) == (recipes.Filtering(), recipes.Labelling())
    assert (found.train, found.gate) == (recipes.Training(), recipes.Gating())


def test_unknown_names_are_refused_with_the_near_one() -> None:
    assert complaints(tables() | {"trian": {"rank": 4}}) == ["unknown table [trian] (did you mean train?)"]
    assert complaints(tables(train__epoch=4)) == ["unknown key train.epoch (did you mean epochs?)"]
    (far,) = complaints(tables(filter__zzz=4))
    assert far == "unknown key filter.zzz (there are kind, discriminator, keep_samples, keep_tokens)"
    (line,) = complaints(tables() | {"x\x1b[2J": {}})
    assert "\x1b" not in line


WRONG_TYPES = {
    "source__base": 5,
    "source__template": True,
    "source__chat": "yes",
    "source__name": 1.5,
    "target__template": 1,
    "target__chat": 1,
    "inputs__count": 2.0,
    "inputs__seed": True,
    "inputs__temperature": "hot",
    "inputs__top_p": False,
    "filter__kind": "exces",
    "filter__keep_tokens": [0.5],
    "label__top_k": "all",
    "train__kind": "ia3",
    "train__rank": True,
    "train__modules": "q_proj",
    "train__learning_rates": [1e-3, "x"],
    "train__loss": True,
    "train__dtype": "float16",
    "gate__limit": {"a": 1},
    "gate__oracle": 1,
}
OUT_OF_RANGE = {
    "source__template": "no place for it",
    "target__template": "{definition}",
    "inputs__count": -1,
    "inputs__shots": 0,
    "inputs__temperature": 0.0,
    "inputs__top_p": 1.01,
    "inputs__rounds": 0,
    "inputs__seed": -1,
    "filter__kind": "both",
    "filter__keep_samples": 0,
    "filter__keep_tokens": 1.5,
    "label__new_tokens": 0,
    "label__top_k": 0,
    "train__rank": -1,
    "train__alpha": -2,
    "train__epochs": 0,
    "train__batch": 0,
    "train__accumulation": 0,
    "train__learning_rates": [],
    "train__search_epochs": 0,
    "train__patience": 0,
    "train__held_out": 0.6,
    "gate__limit": 0,
    "gate__metric": "nope",
    "gate__shots": -1,
    "gate__oracle": True,
}


@pytest.mark.parametrize("place", WRONG_TYPES)
def test_wrong_type_names_its_key(place: str) -> None:
    (line,) = complaints(tables(**{place: WRONG_TYPES[place]}))
    assert line.startswith(place.replace("__", ".") + " must be ")


@pytest.mark.parametrize("place", OUT_OF_RANGE)
def test_out_of_range_names_its_key(place: str) -> None:
    lines = complaints(tables(**{place: OUT_OF_RANGE[place]}))
    assert all(place.replace("__", ".") in line for line in lines)


@pytest.mark.parametrize("rates", [[0.0], [1.0], [-1e-3], [float("nan")], [1e-3, float("inf")]])
def test_learning_rates_are_small_numbers(rates: list[float]) -> None:
    assert complaints(tables(train__learning_rates=rates)) == [
        "train.learning_rates must lie between 0 and 1"
    ]


def test_all_that_is_wrong_is_said_at_once() -> None:
    lines = complaints(tables(**WRONG_TYPES) | {"gaet": {}})
    assert len(lines) == len(WRONG_TYPES) + 1
    lines = complaints(tables(**OUT_OF_RANGE))
    for place in OUT_OF_RANGE:
        assert any(place.replace("__", ".") in line for line in lines), place
    # What is mistyped does not hide what is out of range, and is not complained of twice.
    lines = complaints(tables(train__batch="x", inputs__rounds=0, source__base=3))
    assert [line.split()[0] for line in lines] == ["source.base", "train.batch", "inputs.rounds"]


def test_what_is_missing_is_named() -> None:
    assert [line.split()[0] for line in complaints({})] == [
        "source.base", "source.adapter", "target.base", "give", "inputs.count",
    ]  # fmt: skip
    recipes.parse(tables(inputs__seeds="", inputs__prompts="p.txt", inputs__count=0))
    assert complaints(tables(inputs__count=0)) == ["inputs.count = 0 needs inputs.prompts"]
    assert complaints(tables(train__kind="dora", train__warm="copy")) == [
        'train.warm needs train.kind = "lora"'
    ]
    assert complaints(tables() | {"train": 5}) == ["train is a table: [train]"]


def test_whole_numbers_are_numbers_but_truth_values_are_not() -> None:
    found = recipes.parse(tables(inputs__temperature=1, train__learning_rates=[1e-3]))
    assert found.inputs.temperature == 1.0 and type(found.inputs.temperature) is float
    for place in ("inputs__temperature", "train__rank", "gate__shots"):
        (line,) = complaints(tables(**{place: True}))
        assert line.endswith("not True")


TEXT = st.text(st.characters(blacklist_categories=["Cs"]), max_size=20)
RECIPES = st.builds(
    Recipe,
    source=st.builds(
        recipes.Source,
        base=st.just("org/old"),
        adapter=st.just("org/ant"),
        name=TEXT,
        template=TEXT.map(lambda text: text + "{input}"),
        chat=st.booleans(),
    ),
    target=st.builds(
        recipes.Target,
        base=st.just("org/new"),
        template=st.none() | TEXT.map(lambda text: "{input}" + text),
        chat=st.none() | st.booleans(),
    ),
    inputs=st.builds(
        recipes.Inputs,
        definition=TEXT,
        seeds=st.just("/data/seeds.txt"),
        count=st.integers(1, 10**6),
        generator=st.sampled_from(["target", "source", "expert", "org/other"]),
        shots=st.integers(1, 50),
        temperature=st.floats(0.01, 5),
        top_p=st.floats(0.01, 1),
        rounds=st.integers(1, 1000),
        seed=st.integers(0, 2**32 - 1),
    ),
    train=st.builds(
        recipes.Training,
        modules=st.lists(TEXT, max_size=3).map(tuple),
        learning_rates=st.lists(st.floats(1e-9, 0.99), min_size=1, max_size=3).map(tuple),
        held_out=st.floats(0.01, 0.5),
    ),
)


def toml(document: dict[str, dict[str, Any]]) -> str:
    """JSON's texts, numbers, truth values and lists are TOML's; but TOML has no null, and escapes DEL."""
    lines = []
    for name, table in document.items():
        lines.append(f"[{name}]")
        for key, value in table.items():
            if value is not None:
                lines.append(f"{key} = {json.dumps(value, ensure_ascii=False)}".replace("\x7f", "\\u007f"))
    return "\n".join(lines)


@given(RECIPES)
def test_toml_gives_the_recipe_back(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> None:
    path = tmp_path_factory.getbasetemp() / "round" / "trip.toml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(toml(recipe.document()), encoding="utf-8", newline="")
    assert recipes.parse(recipe_file.read(path)) == recipe


def test_target_is_prompted_as_the_source_unless_told() -> None:
    assert recipes.parse(tables(source__template="{input}!", source__chat=True)).prompting == (
        ("{input}!", True), ("{input}!", True),
    )  # fmt: skip
    both = tables(source__template="{input}!", target__template="{input}?", target__chat=True)
    assert recipes.parse(both).prompting == (("{input}!", False), ("{input}?", True))
    assert recipes.parse(tables(source__chat=True, target__chat=False)).prompting[1][1] is False


def test_settings_override_the_file() -> None:
    file = tables(train__rank=4)
    found = recipe_file.overridden(
        file,
        [
            "train.rank=16",
            "train.learning_rates=[1e-4, 2e-4]",
            "train.modules=['q_proj']",
            'inputs.definition="Say" # of: a=b',
            'source.name="12"',
            "source.template={input}=",
            "target.chat=true",
            "filter.kind=none",
            "inputs.seeds=",
        ],
    )
    assert found["train"] == {"rank": 16, "learning_rates": [1e-4, 2e-4], "modules": ["q_proj"]}
    assert found["inputs"] == {"seeds": "", "definition": '"Say" # of: a=b'}
    assert found["source"]["name"] == "12" and found["source"]["template"] == "{input}="
    assert found["target"]["chat"] is True and found["filter"] == {"kind": "none"}
    assert file == tables(train__rank=4)  # a copy
    assert complaints(recipe_file.overridden(file, ["trian.rank=1"])) == [
        "unknown table [trian] (did you mean train?)"
    ]


@pytest.mark.parametrize("setting", ["rank=4", "train.rank", "=4", ".rank=4", "train.=4", "", "train rank"])
def test_setting_of_another_form_is_refused(setting: str) -> None:
    with pytest.raises(UsageError, match=r"TABLE\.KEY=VALUE"):
        recipe_file.overridden({}, [setting])


def test_a_definition_is_never_repeated() -> None:
    with pytest.raises(UsageError) as refused:
        recipe_file.overridden({}, ["definition=SECRET"])
    assert "SECRET" not in str(refused.value) and "definition" in str(refused.value)
    (said,) = complaints(tables(inputs__definition=["SECRET"]))
    assert said.startswith("inputs.definition must be a text") and "SECRET" not in said


def test_paths_are_relative_to_the_recipe_and_hub_ids_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "recipes"
    (folder / "zoo" / "ant").mkdir(parents=True)
    (folder / "seeds.txt").touch()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    path = folder / "move.toml"
    path.write_text(
        '[source]\nbase = "org/old"\nadapter = "zoo/ant"\nname = "seeds.txt"\n[target]\nbase = "org/new"\n'
        f'[inputs]\nseeds = "{folder / "seeds.txt"}"\nprompts = "seeds.txt"\ngenerator = "target"\n'
    )
    found = recipes.parse(recipe_file.read(path))
    assert found.source.base == "org/old" and found.target.base == "org/new"
    assert Path(found.source.adapter) == folder / "zoo" / "ant"
    assert found.source.name == "seeds.txt"  # no path
    assert Path(found.inputs.seeds) == Path(found.inputs.prompts) == folder / "seeds.txt"
    assert found.inputs.generator == "target"


def test_file_of_the_working_directory_is_not_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    here = tmp_path / "here"
    (here / "org" / "old").mkdir(parents=True)
    (here / "seeds.txt").touch()
    monkeypatch.chdir(here)
    path = tmp_path / "recipes" / "move.toml"
    path.write_text('[source]\nbase = "org/old"\nadapter = "ant"\n[inputs]\nseeds = "seeds.txt"\n')
    found = recipe_file.read(path)
    assert found["source"] == {"base": str(path.parent / "org/old"), "adapter": str(path.parent / "ant")}
    assert found["inputs"] == {"seeds": str(path.parent / "seeds.txt")}


def test_names_of_a_table_are_different(tmp_path: Path) -> None:
    table = tmp_path / "table.jsonl"
    table.write_text('{"adapter": "a/ant"}\n{"adapter": "b/Ant"}\n')
    with pytest.raises(UsageError, match=r"two transfers are called ant \(Ant, ant\)"):
        recipe_table.recipes_of(LEAST, table)


def test_all_bad_lines_of_a_table_are_told_at_once(tmp_path: Path) -> None:
    table = tmp_path / "table.jsonl"
    lines = [
        '{"adapter": "a", "sneeds": "s"}',
        '{"adapter": "b"}',
        '{"name": "c"}',
        '{"adapter": 4}',
        '{"adapter": ""}',
    ]
    table.write_text("\n".join(lines))
    with pytest.raises(InputError) as caught:
        recipe_table.recipes_of(LEAST, table)
    told = str(caught.value)
    assert [number for number in range(1, 6) if f"line {number}: " in told] == [1, 3, 4, 5]
    for text in (
        "'sneeds' is no column",
        "names no adapter",
        "more than texts",
        "source.adapter (--adapter) is not given",
    ):
        assert told.count(text) == 1
    table.write_text('{"name": "c"}\n{"adapter": \n{"name": "d"}\n')
    with pytest.raises(InputError, match=r'line 1: names no adapter(?s:.)*line 2: cannot be read.*"adapter"'):
        recipe_table.recipes_of(LEAST, table)
    table.write_text('{"adapter": "a"}\n')
    with pytest.raises(InputError, match=r"line 1: source is a table"):
        recipe_table.recipes_of(tables() | {"source": 3}, table)


def test_prompts_alone_are_all_there_is(tmp_path: Path) -> None:
    """Without a word of a count, in a recipe and in a line of a table."""
    assert recipes.parse(tables(inputs__seeds="", inputs__prompts="p.txt")).inputs.count == 0
    table = tmp_path / "table.jsonl"
    table.write_text('{"adapter": "a", "prompts": "p.txt", "seeds": ""}\n{"adapter": "b"}\n')
    assert [one.inputs.count for one in recipe_table.recipes_of(tables(), table)] == [0, 250]


@pytest.mark.parametrize("data", [b"[source\n", b"\xff\xfe", b"[a]\nb = 1\nb = 2\n", None])
def test_no_toml_is_refused_by_name(tmp_path: Path, data: bytes | None) -> None:
    path = tmp_path / "move.toml"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UsageError, match=r"move\.toml cannot be read as a recipe"):
        recipe_file.read(path)


def test_digest_is_of_the_values() -> None:
    one, other = recipes.parse(LEAST), recipes.parse(tables(train__rank=4))
    assert recipes.digest("a", one.document()) == recipes.digest("a", recipes.parse(LEAST).document())
    assert recipes.digest("a", one.document()) != recipes.digest("a", other.document())
    assert recipes.digest("a", "b") != recipes.digest("ab")
    assert recipes.digest({"a": 1, "b": 2}) == recipes.digest({"b": 2, "a": 1})
    assert dataclasses.asdict(one) != one.document()  # tuples are lists there
