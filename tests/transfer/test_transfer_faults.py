"""Killed, damaged, purged, refused: what a transfer comes to all the same, and what it never gives away."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from moving import SEEDS, SETTINGS, Place, Stopped, refusing, run, stopping

from lorazip.errors import TargetError, TransferError
from lorazip.eval.session import Session
from lorazip.transfer import assess, learn, teach
from lorazip.transfer.move import Move
from lorazip.transfer.world import World


def texts(folder: Path) -> str:
    """All bytes of all files below, as text."""
    return "\n".join(p.read_bytes().decode("latin1") for p in sorted(folder.rglob("*")) if p.is_file())


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


def test_adapter_that_was_damaged_after_its_evaluation_is_not_written(place: Place, tmp_path: Path) -> None:
    run(place, tmp_path / "moved", until="evaluate")
    (weights,) = (tmp_path / "moved.work").rglob(".training/*/adapter/adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(TargetError, match="not the adapter that was evaluated"):
        run(place, tmp_path / "moved")
    assert not (tmp_path / "moved").exists()


def listed(place: Place, folder: Path, **moves: dict[str, str]) -> tuple[dict[str, Any], Path]:
    """A recipe for many, and the table of them: name -> what differs from this place's adapter and seeds."""
    own = {"adapter": str(place.adapter), "seeds": str(place.seeds)}
    table = folder / "table.jsonl"
    table.write_text("".join(json.dumps({"name": name} | own | row) + "\n" for name, row in moves.items()))
    tables = place.tables()
    del tables["source"]["adapter"], tables["inputs"]["seeds"]
    return tables, table


def test_a_broken_state_costs_the_others_nothing(place: Place, tmp_path: Path) -> None:
    tables, table = listed(place, tmp_path, one={}, two={})
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


def test_many_adapters_one_of_them_bad(place: Place, tmp_path: Path) -> None:
    missing, unseeded = {"adapter": str(tmp_path / "nothing")}, {"seeds": str(tmp_path / "none.txt")}
    tables, table = listed(place, tmp_path, first={}, missing=missing, unseeded=unseeded, second={})
    found = {one.name: one for one in run(place, tmp_path / "out", tables=tables, table=table)}
    assert {name for name, one in found.items() if one.error is None} == {"first", "second"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"first", "second"}
    assert "nothing" in str(found["missing"].error) and "none.txt" in str(found["unseeded"].error)


def test_running_out_of_memory_costs_the_others_nothing(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables, table = listed(place, tmp_path, one={}, two={})
    ask = Session.ask

    def short(self: Session, calls: Any, what: str = "scoring") -> Any:
        if any("two" in acting.key for acting in self.actings):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
        return ask(self, calls, what)

    monkeypatch.setattr(Session, "ask", short)
    found = {one.name: one for one in run(place, tmp_path / "out", tables=tables, table=table, until="label")}
    assert found["one"].error is None
    assert re.search("CUDA out of memory .free it, or take another device.", str(found["two"].error))
