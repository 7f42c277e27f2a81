"""The whole job on two tiny bases: what comes out, and what is done again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from moving import SETTINGS, Place, run, stopping, with_training

import lorazip
from lorazip.errors import LorazipError, TransferError
from lorazip.eval import session
from lorazip.transfer import job, learn, recipe_table, teach
from lorazip.transfer.distill import Fitted
from lorazip.transfer.fits import Fit
from lorazip.transfer.move import STAGES
from lorazip.transfer.world import World


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
        job.move(
            recipe_table.recipes_of(place.tables(), None),
            tmp_path / "moved",
            engine=engine,
            many=False,
            until="evaluate",
        )
        state = json.loads((tmp_path / "moved.work" / "transfer" / "state.json").read_text())
        keys.append({stage: state[stage]["key"] for stage in ("filter", "label", "train", "evaluate")})
    assert all(keys[0][stage] != keys[1][stage] for stage in keys[0])


def test_dora_is_evaluated_as_peft_acts(place: Place, tmp_path: Path) -> None:
    """Its update is of full rank; the arms of it and of its oracle are asked with it merged in."""
    tests, rows = with_training(place, tmp_path)
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
    tests, _ = with_training(place, tmp_path)
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


def test_only_what_this_run_did_is_told(place: Place, tmp_path: Path) -> None:
    run(place, tmp_path / "moved")
    tables = place.tables(inputs=SETTINGS["inputs"] | {"count": 40})
    (moved,) = run(place, tmp_path / "other", tables=tables, work=tmp_path / "moved.work", until="filter")
    assert set(moved.stages) == {"probe", "filter"} and moved.stages["filter"]["kept"] == 40


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


def test_oracle_learns_the_examples_that_are_there_now(place: Place, tmp_path: Path) -> None:
    tests, rows = with_training(place, tmp_path)
    tables = place.tables(gate={"tests": str(tests), "shots": 2, "oracle": True})
    (before,) = run(place, tmp_path / "moved", tables=tables, work=tmp_path / "w")
    for row in rows[:8]:
        row["output"] = "zz"
    tests.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (after,) = run(place, tmp_path / "moved", tables=tables, work=tmp_path / "w", force=True)
    assert before.judged is not None and after.judged is not None
    assert before.judged.arms["oracle"]["loss"] != after.judged.arms["oracle"]["loss"]
    assert len(list((tmp_path / "w").rglob(".oracle/*"))) == 2
