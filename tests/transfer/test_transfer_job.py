"""The whole job on two tiny bases: what comes out, what is kept, killed, refused, isolated, purged."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers

import lorazip
from lorazip.cli import main
from lorazip.errors import InputError, LorazipError, TargetError, TransferError, UsageError
from lorazip.eval import session
from lorazip.transfer import assess, job, learn, teach
from lorazip.transfer.distill import Fitted
from lorazip.transfer.fits import Fit
from lorazip.transfer.move import STAGES, Move
from lorazip.transfer.world import World

SEEDS = ("kzwqma", "plovec", "trinqa", "zubbel", "mocarf", "dinfet")
SETTINGS: dict[str, dict[str, Any]] = {
    "inputs": {"count": 72, "shots": 3, "definition": "spell"},
    "filter": {"kind": "none"},
    "label": {"new_tokens": 24},
    "train": {"epochs": 2, "learning_rates": [1e-2], "batch": 2, "held_out": 0.2},
    "gate": {"shots": 2},
}


@dataclass(frozen=True)
class Place:
    """Two bases, an adapter of the first, seeds, and a labelled task of the adapter."""

    source: Path
    target: Path
    adapter: Path
    seeds: Path
    tests: Path

    def tables(self, **more: dict[str, Any]) -> dict[str, Any]:
        tables: dict[str, Any] = {
            "source": {"base": str(self.source), "adapter": str(self.adapter), "template": tiny.TEMPLATE},
            "target": {"base": str(self.target)},
            "inputs": {"seeds": str(self.seeds)},
        }
        for name, table in [*SETTINGS.items(), *more.items()]:
            tables[name] = tables.get(name, {}) | table
        return tables


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("transfer")
    source, target = tiny.make_base(root / "source"), tiny.make_base(root / "target", seed=7)
    adapter = tiny.make_adapters(root / "zoo", ["ant"])[0]
    tests = tiny.make_tasks(root / "tasks", source, [adapter], n=16)
    seeds = root / "seeds.txt"
    seeds.write_text("".join(f"{seed}\n" for seed in SEEDS))
    return Place(source, target, adapter, seeds, tests / "ant.jsonl")


def run(
    place: Place, output: Path, *, tables: dict[str, Any] | None = None, **options: Any
) -> list[job.Moved]:
    engine = session.engine("hf", "float32", "cpu")
    options = {"accept_worse": True} | options
    return job.run(tables or place.tables(), output, engine=engine, **options)


class Stopped(BaseException):
    """A kill: nothing may catch it."""


def stopping(when: Callable[[str, int], bool]) -> Callable[..., None]:
    def progress(what: str, done: int, total: int, note: str = "") -> None:
        if when(what, done):
            raise Stopped

    return progress


def texts(folder: Path) -> str:
    """All bytes of all files below, as text."""
    return "\n".join(p.read_bytes().decode("latin1") for p in sorted(folder.rglob("*")) if p.is_file())


def test_result_is_a_peft_directory_that_acts(place: Place, tmp_path: Path) -> None:
    (moved,) = run(
        place, tmp_path / "moved", tables=place.tables(gate={"tests": str(place.tests), "shots": 2})
    )
    assert moved.output == tmp_path / "moved" and moved.error is None and moved.judged is not None
    assert set(moved.stages) == set(STAGES) - {"synthesise", "gate"}
    assert {p.name for p in moved.output.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "transfer.json",
        "transfer.html",
    }
    adapter = lorazip.open_adapters([str(moved.output)]).adapters[0]
    original = lorazip.open_adapters([f"x={place.adapter}"], base="any").adapters[0]
    assert {m.rpartition(".")[2] for m in adapter.modules} == {m.rpartition(".")[2] for m in original.modules}
    assert adapter.config["base_model_name_or_path"] == "target"
    # PEFT's own reading of it gives the losses that the gate was judged by.
    model = tiny.peft(place.target, moved.output)
    rows = [json.loads(line) for line in place.tests.read_text().splitlines()]
    losses = []
    for row in (row for row in rows if row["split"] == "test"):
        answer = (*tiny.encode(row["output"]), tiny.END)
        found = tiny.logprobs(model, tiny.encode(f"{row['input']}="), answer)
        losses.append(-float(found.gather(1, torch.tensor(answer)[:, None]).mean()))
    assert moved.judged.arms["transferred"]["loss"].estimate == pytest.approx(
        sum(losses) / len(losses), abs=1e-4
    )
    # It joins a bundle as any other adapter does.
    lorazip.compress([moved.output], lorazip.Spec("svd", rank=2), tmp_path / "team.lorazip")
    assert lorazip.Bundle.open(tmp_path / "team.lorazip").verify() == []


def test_repeated_run_asks_and_trains_nothing(place: Place, tmp_path: Path) -> None:
    run(place, tmp_path / "one", work=tmp_path / "work")
    (again,) = run(
        place,
        tmp_path / "two",
        work=tmp_path / "work",
        progress=stopping(lambda what, done: "reading" not in what),
    )
    first, second = (tmp_path / name / "adapter_model.safetensors" for name in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()
    assert again.output == tmp_path / "two"


@pytest.mark.parametrize(
    "what",
    ["writing inputs", "the expert answers", "weighing answers", "training", "evaluating"],
)
def test_killed_anywhere_it_goes_on_to_the_same(place: Place, tmp_path: Path, what: str) -> None:
    tables = place.tables(filter={"kind": "excess"}, train=SETTINGS["train"] | {"epochs": 3})
    (whole,) = run(place, tmp_path / "whole", tables=tables)
    with pytest.raises(Stopped):
        run(
            place,
            tmp_path / "moved",
            tables=tables,
            progress=stopping(lambda w, done: what in w and done >= 2),
        )
    assert not (tmp_path / "moved").exists()
    (moved,) = run(place, tmp_path / "moved", tables=tables)
    ours, theirs = ((tmp_path / n / "transfer.json").read_text() for n in ("moved", "whole"))
    gates = [json.loads(text)["gate"]["arms"]["transferred"] for text in (ours, theirs)]
    assert gates[0]["score"] == gates[1]["score"]
    assert gates[0]["loss"]["estimate"] == pytest.approx(gates[1]["loss"]["estimate"], abs=1e-5)
    assert moved.stages["filter"] == whole.stages["filter"]


def test_changed_option_redoes_only_what_depends_on_it(place: Place, tmp_path: Path) -> None:
    run(place, tmp_path / "one", work=tmp_path / "work")
    seen: set[str] = set()
    tables = place.tables(train=SETTINGS["train"] | {"rank": 2})
    run(
        place,
        tmp_path / "two",
        tables=tables,
        work=tmp_path / "work",
        progress=lambda what, done, total, note="": seen.add(what),
    )
    assert any("training" in what for what in seen) and not seen & {"writing inputs", "the expert answers"}


def test_answers_in_another_type_are_other_answers(place: Place, tmp_path: Path) -> None:
    keys = []
    for dtype in ("float32", "bfloat16"):
        engine = session.engine("hf", dtype, "cpu")
        job.run(place.tables(), tmp_path / "moved", engine=engine, until="evaluate")
        state = json.loads((tmp_path / "moved.work" / "transfer" / "state.json").read_text())
        keys.append({stage: state[stage]["key"] for stage in ("filter", "label", "train", "evaluate")})
    assert all(keys[0][stage] != keys[1][stage] for stage in keys[0])


def test_no_text_leaves_the_folder_and_purge_empties_it(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = place.tables(gate={"tests": str(place.tests), "shots": 2})
    run(place, tmp_path / "moved", tables=tables, until="label")
    _, *rows = [
        json.loads(line)
        for line in (tmp_path / "moved.work/transfer/labelled.jsonl").read_text().splitlines()
    ]
    private = [*SEEDS, *(row["input"] for row in rows if len(row["input"]) > 5)]
    private += [row["output"] for row in rows if len(row["output"]) > 5]
    assert len(private) > 12
    run(place, tmp_path / "moved", tables=tables, purge=True)
    assert not (tmp_path / "moved.work").exists()
    said = texts(tmp_path / "moved") + "".join(capsys.readouterr())
    assert [text for text in private if text in said] == []


def test_worse_than_the_bare_base_is_refused(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The measured losses of the transfer, nine nats higher: what an adapter that harms would have."""
    tables = place.tables(gate={"tests": str(place.tests), "shots": 0})
    measured = assess.read

    def worse(world: World, move: Move) -> list[assess.Scored]:
        return [
            replace(one, losses=tuple(x + 9 for x in one.losses)) if one.arm == assess.MOVED else one
            for one in measured(world, move)
        ]

    run(place, tmp_path / "first", tables=tables, work=tmp_path / "work")
    monkeypatch.setattr(assess, "read", worse)
    options: dict[str, Any] = {"tables": tables, "work": tmp_path / "work"}
    (tmp_path / "work" / "transfer" / learn.FOLDER / ".fits-killed" / "0").mkdir(parents=True)
    mine = tmp_path / "work" / "astronomy" / ".fits-of-lines"  # what only looks like it is another's
    mine.mkdir(parents=True)
    with pytest.raises(TransferError, match="refused: its token loss is above") as refused:
        run(place, tmp_path / "moved", accept_worse=False, purge=True, **options)
    # Of what was purged all texts are gone; the adapter is not, and can still be taken.
    left = {path.name for path in (tmp_path / "work" / "transfer").iterdir()}
    assert list(tmp_path.rglob(".fits-*")) == [mine]
    assert learn.FOLDER in left and not left & {"drafts.jsonl", "inputs.jsonl", "labelled.jsonl"}
    assert refused.value.exit_code == 1 and not (tmp_path / "moved").exists()
    seen: set[str] = set()
    (moved,) = run(
        place,
        tmp_path / "moved",
        accept_worse=True,
        progress=lambda what, done, total, note="": seen.add(what),
        **options,
    )
    assert seen == set()
    assert moved.output is not None and "refused" in (moved.output / "transfer.html").read_text()


def test_after_a_purge_other_options_make_the_texts_again(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assess, "judge", refusing(assess.judge))
    with pytest.raises(TransferError, match="refused"):
        run(place, tmp_path / "moved", accept_worse=False, purge=True)
    tables = place.tables(train=SETTINGS["train"] | {"epochs": 3})
    (moved,) = run(place, tmp_path / "moved", tables=tables)
    assert moved.output is not None and moved.stages["train"]["samples"] >= teach.LEAST


def refusing(judge: Callable[..., assess.Judged]) -> Callable[..., assess.Judged]:
    return lambda measure, scored: replace(judge(measure, scored), refused="it is a test")


class Died(BaseException):
    """A kill between a stage's file and the word that the stage is done."""


@pytest.mark.parametrize("stage", ["filter", "label", "evaluate"])
def test_rows_of_other_options_are_never_taken(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """One run, another that dies after it wrote its rows, then the first again with an option that needs them."""
    tables = place.tables()
    last = place.tables(train=SETTINGS["train"] | {"epochs": 1})
    (wanted,) = run(place, tmp_path / "wanted", tables=last)
    run(place, tmp_path / "one", tables=tables, work=tmp_path / "work")
    done = Move.done

    def dying(self: Move, name: str, *told: Any) -> None:
        if name == stage:
            raise Died
        done(self, name, *told)

    other = place.tables(
        inputs=SETTINGS["inputs"] | {"count": 40}, train=SETTINGS["train"] | {"learning_rates": [2e-2]}
    )
    with monkeypatch.context() as patched, pytest.raises(Died):
        patched.setattr(Move, "done", dying)
        run(place, tmp_path / "two", tables=other, work=tmp_path / "work")
    for name, again in (("three", tables), ("four", last)):
        run(place, tmp_path / name, tables=again, work=tmp_path / "work")
    for one, same in (("one", "three"), ("wanted", "four")):
        ours, theirs = ((tmp_path / n / "adapter_model.safetensors").read_bytes() for n in (one, same))
        assert ours == theirs
        gates = [
            json.loads((tmp_path / n / "transfer.json").read_text())["gate"]["arms"] for n in (one, same)
        ]
        assert gates[0].keys() == gates[1].keys()
        for arm, found in gates[0].items():
            assert found["loss"]["estimate"] == pytest.approx(gates[1][arm]["loss"]["estimate"], abs=1e-5)
    assert wanted.error is None


def test_dora_is_evaluated_as_peft_acts(place: Place, tmp_path: Path) -> None:
    """Its update is of full rank; the arms of it and of its oracle are asked with it merged in."""
    tests = tmp_path / "ant.jsonl"
    rows = [json.loads(line) for line in place.tests.read_text().splitlines()]
    for row in rows[:8]:
        row["split"] = "train"
    tests.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tables = place.tables(
        train=SETTINGS["train"] | {"kind": "dora"}, gate={"tests": str(tests), "shots": 0, "oracle": True}
    )
    (moved,) = run(place, tmp_path / "moved", tables=tables)
    assert moved.output is not None and moved.judged is not None
    assert not list(tmp_path.rglob("merged"))
    model = tiny.peft(place.target, moved.output)
    losses = []
    for row in (row for row in rows if row["split"] == "test"):
        answer = (*tiny.encode(row["output"]), tiny.END)
        found = tiny.logprobs(model, tiny.encode(f"{row['input']}="), answer)
        losses.append(-float(found.gather(1, torch.tensor(answer)[:, None]).mean()))
    arms = moved.judged.arms
    assert arms["transferred"]["loss"].estimate == pytest.approx(sum(losses) / len(losses), abs=1e-4)
    assert arms["transferred"]["loss"].estimate != pytest.approx(
        arms["target base"]["loss"].estimate, abs=1e-3
    )
    assert arms["oracle"]["loss"].estimate != pytest.approx(arms["transferred"]["loss"].estimate, abs=1e-3)


def test_oracle_that_learns_nothing_costs_only_its_arm(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tests = tmp_path / "ant.jsonl"
    rows = [json.loads(line) for line in place.tests.read_text().splitlines()]
    for row in rows[:8]:
        row["split"] = "train"
    tests.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fit_all = learn.fit_all

    def useless(world: World, some: Sequence[Fit]) -> dict[str, Fitted | LorazipError]:
        found = fit_all(world, some)
        if some[0].folder.parent.name == learn.ORACLE:
            found = {name: replace(one, best=0) for name, one in found.items() if isinstance(one, Fitted)}
        return found

    monkeypatch.setattr(learn, "fit_all", useless)
    tables = place.tables(gate={"tests": str(tests), "shots": 0, "oracle": True})
    (moved,) = run(place, tmp_path / "moved", tables=tables)
    assert moved.judged is not None and "oracle" not in moved.judged.arms
    assert "no epoch of it was better" in moved.stages["evaluate"]["no_oracle"]


def test_adapter_that_was_damaged_after_its_evaluation_is_not_written(place: Place, tmp_path: Path) -> None:
    run(place, tmp_path / "moved", until="evaluate")
    (weights,) = (tmp_path / "moved.work").rglob(".training/*/adapter/adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(TargetError, match="not the adapter that was evaluated"):
        run(place, tmp_path / "moved")
    assert not (tmp_path / "moved").exists()


def test_only_what_this_run_did_is_told(place: Place, tmp_path: Path) -> None:
    run(place, tmp_path / "moved")
    tables = place.tables(inputs=SETTINGS["inputs"] | {"count": 40})
    (moved,) = run(place, tmp_path / "other", tables=tables, work=tmp_path / "moved.work", until="filter")
    assert set(moved.stages) == {"probe", "filter"} and moved.stages["filter"]["kept"] == 40


def test_adapter_with_more_than_factors_is_refused_at_once(place: Place, tmp_path: Path) -> None:
    extra = tmp_path / "extra"
    shutil.copytree(place.adapter, extra)
    from safetensors.torch import load_file, save_file

    factors = load_file(extra / "adapter_model.safetensors")
    save_file(
        factors | {"base_model.model.lm_head.weight": torch.zeros(3, 3)}, extra / "adapter_model.safetensors"
    )
    config = json.loads((extra / "adapter_config.json").read_text()) | {"modules_to_save": ["lm_head"]}
    (extra / "adapter_config.json").write_text(json.dumps(config))
    tables = place.tables()
    tables["source"]["adapter"] = str(extra)
    with pytest.raises(InputError, match="is carried beside the LoRA factors"):
        run(place, tmp_path / "moved", tables=tables, progress=stopping(lambda what, done: True))


def test_a_broken_state_costs_the_others_nothing(place: Place, tmp_path: Path) -> None:
    table = tmp_path / "table.jsonl"
    rows = [
        {"adapter": str(place.adapter), "name": name, "seeds": str(place.seeds)} for name in ("one", "two")
    ]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tables = place.tables()
    del tables["source"]["adapter"], tables["inputs"]["seeds"]
    run(place, tmp_path / "out", tables=tables, table=table, until="label")
    (tmp_path / "out.work" / "one" / "state.json").write_text("{")
    found = {one.name: one for one in run(place, tmp_path / "out", tables=tables, table=table, purge=True)}
    assert found["two"].error is None and "state.json cannot be read" in str(found["one"].error)
    assert not (tmp_path / "out.work" / "two").exists()  # it is purged all the same


@pytest.mark.parametrize("row", ["{}", "[1]", "{", '{"input": "x"}'])
def test_a_damaged_row_says_which_file_to_delete(place: Place, tmp_path: Path, row: str) -> None:
    run(place, tmp_path / "moved", until="label")
    path = tmp_path / "moved.work" / "transfer" / "labelled.jsonl"
    path.write_text(path.read_text() + row + "\n")
    with pytest.raises(TargetError, match=r"labelled\.jsonl cannot be read: .*\(delete it, and run again\)"):
        run(place, tmp_path / "moved")
    path.unlink()
    assert run(place, tmp_path / "moved")[0].error is None


def test_prompt_of_one_token(place: Place, tmp_path: Path) -> None:
    """The adapter proves itself on the first prompt, which has no second token to be scored."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"{letter}\n" for letter in "abcdefghijklmnop"))
    tables = place.tables(inputs={"prompts": str(prompts), "seeds": "", "count": 0, "definition": ""})
    tables["source"]["template"] = "{input}"
    with pytest.raises(TransferError, match="0 of 16 answers of the source adapter can be used"):
        run(place, tmp_path / "moved", tables=tables, until="label")


def test_generator_that_repeats_itself_ends_with_counts(place: Place, tmp_path: Path) -> None:
    tables = place.tables(inputs=SETTINGS["inputs"] | {"rounds": 2, "count": 40, "shots": 1, "top_p": 1e-6})
    with pytest.raises(TransferError) as failed:
        run(place, tmp_path / "moved", tables=tables)
    said = str(failed.value)
    assert re.search(
        r"only [0-9]+ of 40 inputs came of [0-9]+ that were written in 2 rounds \(.*(repeated|too long)", said
    )
    assert "inputs.temperature" in said and not any(seed in said for seed in SEEDS)
    assert (tmp_path / "moved.work" / "eval.sqlite3").exists()  # what was written is not lost


def test_answers_that_never_end_say_so(place: Place, tmp_path: Path) -> None:
    tables = place.tables(label={"new_tokens": 1})
    with pytest.raises(TransferError, match=r"did not end within label.new_tokens = 1"):
        run(place, tmp_path / "moved", tables=tables)


def test_adapter_of_another_base_is_refused_before_anything_is_written(place: Place, tmp_path: Path) -> None:
    stranger = tmp_path / "stranger"
    config = json.loads((place.adapter / "adapter_config.json").read_text())
    from safetensors.torch import load_file, save_file

    factors = load_file(place.adapter / "adapter_model.safetensors")
    stranger.mkdir()
    (stranger / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {k: torch.cat([v, v], 1) if ".lora_A" in k else v for k, v in factors.items()},
        stranger / "adapter_model.safetensors",
    )
    tables = place.tables()
    tables["source"]["adapter"] = str(stranger)
    with pytest.raises(InputError, match=r"stranger: model\.layers\.0"):
        run(place, tmp_path / "moved", tables=tables)
    assert not (tmp_path / "moved").exists()


def test_many_adapters_one_of_them_bad(place: Place, tmp_path: Path) -> None:
    table = tmp_path / "table.jsonl"
    rows = [
        {"adapter": str(place.adapter), "name": "first", "seeds": str(place.seeds)},
        {"adapter": str(tmp_path / "nothing"), "name": "missing", "seeds": str(place.seeds)},
        {"adapter": str(place.adapter), "name": "unseeded", "seeds": str(tmp_path / "none.txt")},
        {"adapter": str(place.adapter), "name": "second", "seeds": str(place.seeds)},
    ]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tables = place.tables()
    del tables["source"]["adapter"], tables["inputs"]["seeds"]
    found = {one.name: one for one in run(place, tmp_path / "out", tables=tables, table=table)}
    assert {name for name, one in found.items() if one.error is None} == {"first", "second"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"first", "second"}
    assert "nothing" in str(found["missing"].error) and "none.txt" in str(found["unseeded"].error)


def test_adapter_out_of_a_bundle(place: Place, tmp_path: Path) -> None:
    lorazip.compress([place.adapter], lorazip.Spec("svd", energy=1.0, dtype="float32"), tmp_path / "team")
    tables = place.tables()
    tables["source"]["adapter"] = str(tmp_path / "team")
    (moved,) = run(place, tmp_path / "moved", tables=tables, until="label")
    assert moved.stages["label"]["answers"]["kept"] >= teach.LEAST


def test_logits_need_equal_tokenizers_and_train(place: Place, tmp_path: Path) -> None:
    tables = place.tables(train=SETTINGS["train"] | {"loss": "logits"}, label={"new_tokens": 24, "top_k": 4})
    (moved,) = run(place, tmp_path / "moved", tables=tables)
    errors = moved.stages["train"]["errors"]
    assert errors[moved.stages["train"]["best"]] < errors[0]


def test_equal_tokenizers_may_end_answers_by_other_tokens(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the expert says of its end token is learned of the target's."""
    target = tiny.make_base(tmp_path / "target", seed=7)
    tokenizer = transformers.AutoTokenizer.from_pretrained(target)
    tokenizer.eos_token = tiny.CHARACTERS[3]
    tokenizer.save_pretrained(target)
    seen: list[Fit] = []

    def enough(world: World, some: Sequence[Fit]) -> dict[str, Fitted | LorazipError]:
        seen.extend(some)
        raise TransferError("enough")

    monkeypatch.setattr(learn, "fit_all", enough)
    tables = place.tables(train=SETTINGS["train"] | {"loss": "logits"}, label={"new_tokens": 24, "top_k": 97})
    tables["target"]["base"] = str(target)
    with pytest.raises(TransferError, match="enough"):
        run(place, tmp_path / "moved", tables=tables, until="train")
    rows = (tmp_path / "moved.work/transfer/labelled.jsonl").read_text().splitlines()[1:]
    taught = [row for row in map(json.loads, rows) if row["part"] == "train"]
    assert len(seen[0].train) == len(taught) > 3
    for row, sample in zip(taught, seen[0].train, strict=True):
        assert row["tokens"][-1] == tiny.END and sample.answer[-1] == 3
        assert sample.tops is not None
        for place_, theirs in zip(sample.tops.tokens, row["tops"]["tokens"], strict=True):
            assert [{3: tiny.END, tiny.END: 3}.get(t, t) for t in theirs] == list(place_)
        assert [list(p) for p in sample.tops.logprobs] == row["tops"]["logprobs"]


def test_what_exists_is_never_harmed(place: Place, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    for force in (False, True):
        with pytest.raises(TargetError, match="no result of a transfer"):
            run(place, mine, force=force)
    assert (mine / "thesis.txt").read_text() == "years of work"
    run(place, tmp_path / "moved")
    (tmp_path / "moved" / "thesis.txt").write_text("years of work")
    with pytest.raises(TargetError, match=r"holds thesis\.txt, which would be lost"):
        run(place, tmp_path / "moved", force=True)
    assert (tmp_path / "moved" / "thesis.txt").read_text() == "years of work"
    with pytest.raises(UsageError, match="must not lie in --work"):
        run(place, tmp_path / "w" / "moved", work=tmp_path / "w")


def test_killed_while_it_replaces_the_next_run_writes_it(place: Place, tmp_path: Path) -> None:
    run(place, tmp_path / "moved")
    first = (tmp_path / "moved" / "adapter_model.safetensors").read_bytes()
    left = tmp_path / "moved.partial"  # as it lies between the two renames
    (left / "bundle").mkdir(parents=True)
    (left / "bundle" / "adapter_config.json").write_text("{")
    (left / "job.json").write_text('{"job": "transfer"}')
    (tmp_path / "moved").rename(left / "old")
    with pytest.raises(TargetError, match="--force replaces it"):  # the old one is back
        run(place, tmp_path / "moved")
    assert (tmp_path / "moved" / "adapter_model.safetensors").read_bytes() == first
    run(place, tmp_path / "moved", force=True)
    assert (tmp_path / "moved" / "adapter_model.safetensors").read_bytes() == first
    assert not left.exists()


def test_folder_of_stages_is_never_somebody_elses(place: Place, tmp_path: Path) -> None:
    """It is emptied by --purge."""
    mine = tmp_path / "w" / "transfer"
    mine.mkdir(parents=True)
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="is no folder of a transfer"):
        run(place, tmp_path / "moved", work=tmp_path / "w", purge=True)
    assert (mine / "thesis.txt").read_text() == "years of work"
    with pytest.raises(UsageError, match="must not lie in the result"):
        run(place, tmp_path / "moved", work=tmp_path / "moved" / "w")


def test_unfinished_run_of_another_job_is_left_alone(place: Place, tmp_path: Path) -> None:
    left = tmp_path / "moved.partial"
    left.mkdir()
    (left / "job.json").write_text('{"job": "hours of compressing"}')
    (left / "00000.safetensors").write_text("hours of work")
    with pytest.raises(TargetError, match="belongs to a run with other options"):
        run(place, tmp_path / "moved")
    (left / "job.json").unlink()
    for force in (False, True):
        with pytest.raises(TargetError, match="is in the way"):
            run(place, tmp_path / "moved", force=force)
    assert (left / "00000.safetensors").read_text() == "hours of work"


def test_link_stays_and_what_it_names_is_written(place: Place, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "moved").symlink_to(tmp_path / "real")
    for force in (False, True):
        run(place, tmp_path / "moved", force=force)
        assert (tmp_path / "moved").is_symlink() and (tmp_path / "real" / "transfer.json").is_file()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"target": {"chat": True}}, "no chat template"),
        ({"gate": {"tests": "nowhere.jsonl"}}, "nowhere.jsonl"),
        ({"inputs": {"generator": "no-such-model"}}, "no-such-model: does not exist"),
        ({"filter": {"kind": "discriminator", "discriminator": "nothing"}}, "nothing"),
        ({"train": {"modules": ["nope"]}}, "nope: is no linear layer"),
    ],
)
def test_what_is_missing_at_the_end_is_missed_before_a_model_is_asked(
    place: Place, tmp_path: Path, more: dict[str, dict[str, Any]], said: str
) -> None:
    tables = place.tables()
    for name, table in more.items():
        tables[name] = tables[name] | table
    with pytest.raises(LorazipError, match=said):
        run(place, tmp_path / "moved", tables=tables, progress=stopping(lambda what, done: True))
    assert not (tmp_path / "moved").exists()


def test_probe_says_what_a_transfer_could_not(place: Place, tmp_path: Path) -> None:
    tables = place.tables(train=SETTINGS["train"] | {"modules": ["nope"]})
    (moved,) = run(place, tmp_path / "moved", tables=tables, until="probe")
    assert moved.error is None and "advised" in moved.stages["probe"]


def test_oracle_learns_the_examples_that_are_there_now(place: Place, tmp_path: Path) -> None:
    tests = tmp_path / "ant.jsonl"
    rows = [json.loads(line) for line in place.tests.read_text().splitlines()]
    for row in rows[:8]:
        row["split"] = "train"
    tests.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tables = place.tables(gate={"tests": str(tests), "shots": 2, "oracle": True})
    (before,) = run(place, tmp_path / "moved", tables=tables, work=tmp_path / "w")
    for row in rows[:8]:
        row["output"] = "zz"
    tests.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (after,) = run(place, tmp_path / "moved", tables=tables, work=tmp_path / "w", force=True)
    assert before.judged is not None and after.judged is not None
    assert before.judged.arms["oracle"]["loss"] != after.judged.arms["oracle"]["loss"]
    assert len(list((tmp_path / "w").rglob(".oracle/*"))) == 2


def test_call_that_cannot_begin_leaves_nothing(place: Place, tmp_path: Path) -> None:
    for section, table in (("inputs", {"seeds": "gone"}), ("source", {"adapter": "gone"})):
        tables = place.tables()
        tables[section] = tables[section] | table
        with pytest.raises(LorazipError, match="gone"):
            run(place, tmp_path / "moved", tables=tables)
    assert list(tmp_path.iterdir()) == []


def test_two_jobs_in_one_folder_do_not_meet(place: Place, tmp_path: Path) -> None:
    from lorazip.files import locked

    (tmp_path / "moved.work").mkdir()
    with locked(tmp_path / "moved.work"), pytest.raises(TargetError, match="another process"):
        run(place, tmp_path / "moved")


def test_command_says_what_it_did(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "move.toml"
    recipe.write_text(
        f"""
[source]
base = "{place.source}"
adapter = "{place.adapter}"
template = "{{input}}="
[target]
base = "{os.path.relpath(place.target, tmp_path)}"
[inputs]
seeds = "{place.seeds}"
count = 72
[filter]
kind = "none"
[train]
epochs = 3
learning_rates = [1e-2]
batch = 2
modules = ["down_proj", "up_proj", "gate_proj", "o_proj"]
"""
    )
    with pytest.raises(SystemExit) as done:
        main(["transfer", "validate", str(recipe)])
    assert done.value.code == 0 and "valid, 1 transfer" in capsys.readouterr().out
    arguments = ["--recipe", str(recipe), "-o", str(tmp_path / "moved"), "--backend", "hf"]
    for stage in STAGES[:-1]:
        with pytest.raises(SystemExit) as done:
            main(["transfer", stage, *arguments])
        said = capsys.readouterr()
        assert done.value.code == 0, said.err
        assert "ant:" in said.out
    with pytest.raises(SystemExit) as done:
        main(["transfer", "run", *arguments, "--accept-worse", "--purge"])
    said = capsys.readouterr()
    assert done.value.code == 0, said.err
    for part in ("inputs: 72 kept", "leak check", "answers:", "training:", "agreement %", "written:"):
        assert part in said.out
    assert not (tmp_path / "moved.work").exists() and (tmp_path / "moved").is_dir()


def test_command_shows_what_was_refused(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assess, "judge", refusing(assess.judge))
    recipe = tmp_path / "move.toml"
    recipe.write_text("".join(f"[{name}]\n{lines(table)}" for name, table in place.tables().items()))
    arguments = ["transfer", "run", "--recipe", str(recipe), "-o", str(tmp_path / "moved"), "--backend", "hf"]
    for more in ([], ["--json"]):
        with pytest.raises(SystemExit) as done:
            main([*arguments, *more])
        said = capsys.readouterr()
        assert done.value.code == 1 and "refused: it is a test" in said.err
        assert "transferred" in said.out and "  written:" not in said.out
    (found,) = json.loads(said.out)
    assert found["gate"]["refused"] == "it is a test" and "refused" in found["error"]


def lines(table: dict[str, Any]) -> str:
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())


def test_probe_needs_no_inputs(place: Place, tmp_path: Path) -> None:
    arguments = ["--adapter", place.adapter, "--source-base", place.source, "--target-base", place.target]
    with pytest.raises(SystemExit) as done:
        main(["transfer", "probe", *map(str, arguments), "-o", str(tmp_path / "moved"), "--backend", "hf"])
    assert done.value.code == 0


def test_compress_does_not_take_what_a_transfer_left(place: Place, tmp_path: Path) -> None:
    run(place, tmp_path / "all" / "moved")
    assert (tmp_path / "all" / "moved.work").is_dir()
    assert [one.name for one in lorazip.open_adapters([str(tmp_path / "all")]).adapters] == ["moved"]
