"""Examples of tasks: what a line, a cell or a row is, and that every defect names its file and line."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tasks_on_disk import LINE, put, read, refused

from lorazip import rows
from lorazip.errors import UsageError
from lorazip.eval import tasks
from lorazip.eval.tasks import Example


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` reads is copied into a cache; not into the user's."""
    import datasets

    cache = tmp_path_factory.mktemp("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)


# --- examples ---------------------------------------------------------------------------------------------------------


def test_an_example_is_what_its_line_says(tmp_path: Path) -> None:
    put(
        tmp_path / "all.jsonl",
        {"input": " a\n{input} ", "output": "ü", "references": ["u", "ü", "u"], "other": {"x": [1]}},
        {"input": 7, "output": 1.5, "choices": [1.5, "two", 3]},
        "",
        "   ",
        {"input": "", "output": "", "references": None, "choices": []},
        {"input": "n", "output": -0.0, "references": [10**30]},
    )
    assert read(tmp_path).examples == (
        Example(" a\n{input} ", "ü", ("ü", "u")),
        Example("7", "1.5", ("1.5",), ("1.5", "two", "3")),
        Example("", "", ("",)),
        Example("n", "-0.0", ("-0.0", str(10**30))),
    )


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(
        st.fixed_dictionaries({"input": TEXT, "output": TEXT, "references": st.lists(TEXT)}), min_size=1
    ),
    ascii_only=st.booleans(),
    limit=st.none() | st.integers(1, 5),
)
def test_whatever_text_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    rows: Sequence[dict[str, Any]],
    ascii_only: bool,
    limit: int | None,
) -> None:
    path = tmp_path_factory.mktemp("tasks") / "any.jsonl"
    put(path, *(json.dumps(row, ensure_ascii=ascii_only) for row in rows))
    found = read(path, limit=limit)
    assert [(e.input, e.output) for e in found.examples] == [(r["input"], r["output"]) for r in rows][:limit]
    for example, row in zip(found.examples, rows, strict=False):
        assert example.references[0] == example.output
        assert set(example.references) == {row["output"], *row["references"]}
        assert len(set(example.references)) == len(example.references)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    put(tmp_path / "sums.jsonl", b"\xef\xbb\xbf" + json.dumps(LINE).encode() + b"\r", LINE)
    assert len(read(tmp_path).examples) == 2


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("{", "cannot be read: not JSON: "),
        ('{"input": "a", "output": "b"', "cannot be read: not JSON: "),
        ("\0", "cannot be read: not JSON: "),
        (b'{"input": "\xff", "output": "b"}', "cannot be read: not UTF-8 at byte 11"),
        (b"\xff\xfe{\0}\0", "cannot be read: not UTF-8"),
        (b'{"input": "\xed\xa0\x80", "output": "b"}', "cannot be read: not UTF-8"),
        ('{"input": "\\ud800", "output": "b"}', "cannot be read: has half a surrogate pair"),
        ("[" * 100_000, "cannot be read: nested too deeply"),
        ('{"input": "a", "output": ' + "[" * 500 + "]" * 500 + "}", "cannot be read: nested too deeply"),
        ('{"input": "a", "output": NaN}', "cannot be read: NaN is not a finite number"),
        ('{"input": "a", "output": 1e999}', "cannot be read: 1e999 is not a finite number"),
        ('{"input": "a", "output": ' + "9" * 5000 + "}", "cannot be read: not JSON: "),
        ('{"input": "a", "output": "b", "output": "c"}', "cannot be read: the same key appears twice"),
        ("[1]", "is not a JSON object"),
        ('"text"', "is not a JSON object"),
        ("null", "is not a JSON object"),
        ({"question": "a", "answer": "b"}, "has no text 'input' (it has answer, question) (a line is"),
        ({"input": "a"}, "has no text 'output' (it has input)"),
        ({"input": "a", "output": None}, "has no text 'output'"),
        ({"input": "a", "output": True}, "has no text 'output'"),
        ({"input": "a", "output": ["b"]}, "has no text 'output'"),
        ({"input": {"text": "a"}, "output": "b"}, "has no text 'input'"),
        ({**LINE, "references": "b"}, "its references are not a list of texts"),
        ({**LINE, "references": [["b"]]}, "its references are not a list of texts"),
        ({**LINE, "references": [True]}, "its references are not a list of texts"),
        ({**LINE, "choices": {"A": "2"}}, "its choices are not a list of texts"),
        ({**LINE, "choices": ["1", "3"]}, "its output '2' is not among its choices"),
        ({**LINE, "choices": ["2", "2"]}, "has fewer than two different choices"),
        ({**LINE, "split": 1}, "its split 1 is no text"),
        ({**LINE, "split": ["test"]}, "its split ['test'] is no text"),
    ],
)  # fmt: skip
def test_a_line_that_is_no_example_is_named(tmp_path: Path, row: Any, problem: str) -> None:
    path = put(tmp_path / "sums.jsonl", LINE, "", row)
    message = refused(path)
    assert message.startswith(f"{path}: line 3: {problem}"), message
    assert len(message) < 500


def test_a_huge_line_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_MAX_LINE", 100)
    fits = {**LINE, "pad": ""}
    fits["pad"] = "x" * (99 - len(json.dumps(fits)))
    assert len(read(put(tmp_path / "fits.jsonl", fits)).examples) == 1
    with (tmp_path / "huge.jsonl").open("wb") as file:
        file.truncate(2**40)  # sparse: a terabyte of zeros
    assert "huge.jsonl: line 1: has more than 100 bytes" in refused(tmp_path / "huge.jsonl")


def test_an_empty_file_has_no_examples(tmp_path: Path) -> None:
    assert "sums.jsonl: has no examples" in refused(put(tmp_path / "sums.jsonl"))
    assert "blank.jsonl: has no examples" in refused(put(tmp_path / "blank.jsonl", "", "  "))


# --- splits and columns -----------------------------------------------------------------------------------------------


def rows_of(split: str, n: int) -> Iterator[dict[str, Any]]:
    return ({"input": f"{split} {i}", "output": str(i), "split": split} for i in range(n))


def test_lines_may_name_their_split(tmp_path: Path) -> None:
    path = put(tmp_path / "sums.jsonl", *rows_of("train", 3), *rows_of("test", 4), *rows_of("dev", 2))
    task = read(path, limit=2)
    assert [e.input for e in task.examples] == ["test 0", "test 1"]
    assert [e.input for e in task.shots] == ["train 0", "train 1", "train 2"]
    assert len(read(path, split="dev").examples) == 2
    task = read(path, split="train")
    assert (len(task.examples), task.shots) == (3, ())  # what is scored is never shown
    assert "has no examples of the split 'validation' (there are: dev, test, train; --split)" in refused(
        path, split="validation"
    )


def test_lines_without_a_split_are_all_scored_but_not_beside_others(tmp_path: Path) -> None:
    path = put(tmp_path / "sums.jsonl", LINE, LINE)
    assert len(read(path, split="anything").examples) == 2
    put(path, LINE, {**LINE, "split": "test"}, {**LINE, "split": None})
    assert "2 examples name no split, the others do" in refused(path)


GSM = {"input": "question", "output": "answer"}


def test_a_folder_of_splits_with_other_columns(tmp_path: Path) -> None:
    folder = tmp_path / "gsm8k"
    for split, n in (("train", 3), ("test", 2)):
        put(
            folder / f"{split}.jsonl",
            *({"question": f"{split} {i}", "answer": f"#### {i}"} for i in range(n)),
        )
    task = read(folder, "gsm8k", columns=GSM)
    assert [e.input for e in task.examples] == ["test 0", "test 1"]
    assert len(task.shots) == 3
    assert (task.name, task.source) == ("gsm8k", f"{folder}/test.jsonl")
    assert "has no examples of the split 'validation' (there are: test, train" in refused(
        folder, columns=GSM, split="validation"
    )
    # One of the files alone is that split of the task.
    assert len(read(folder / "test.jsonl", "gsm8k", columns=GSM).examples) == 2
    assert "there are: train; --split" in refused(folder / "train.jsonl", columns=GSM)
    # A defect names its own file, not the first one.
    put(folder / "train.jsonl", {"question": "q", "answer": "a"}, {"question": "q"})
    assert f"{folder}/train.jsonl: line 2: has no text 'answer'" in refused(folder, columns=GSM)
    assert "has no text 'input' (it has answer, question)" in refused(folder)


def test_columns_are_given_as_field_and_column() -> None:
    assert tasks.parse_columns(["input=question", "output=a=b"]) == {"input": "question", "output": "a=b"}
    assert tasks.parse_columns([]) == {}
    for bad in ("input", "input=", "=x", "question=input", "", "Input=x"):
        with pytest.raises(UsageError, match="is no FIELD=COLUMN with a field of input, output, references"):
            tasks.parse_columns([bad])


# --- what datasets reads ----------------------------------------------------------------------------------------------


def test_a_csv_file_holds_texts(tmp_path: Path) -> None:
    """Not numbers, truth values or missing ones that only look like it."""
    outputs = ["007", "True", "None", "NA", "null", "1.50", "nan", 'a "b", c\nd', "ünï"]
    path = tmp_path / "odd [1]*.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(
            [["question", "output", "split"], *([f"q {o}", o, "test"] for o in outputs)]
        )
    task = read(path, columns={"input": "question"})
    assert [e.output for e in task.examples] == outputs
    assert task.name == "odd [1]*"
    path.write_text("input,output\na,b\nc,\n")
    assert f"{path}: line 3: has no text 'output'" in refused(path)
    path.write_text("\ufeffinput,output\na,b\n", encoding="utf-8")
    assert read(path).examples == (Example("a", "b", ("b",)),)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"input,output\n\xe9,b\n", "cannot be read after line 0: 'utf-8' codec can't decode"),
        (b"input,output\na,b,c\n", "line 2: has more cells than the header"),
        (b'input,output\na,"b\n', "cannot be read after line 0: unexpected end of data"),
        (b'input,output\na,"b"c\n', "cannot be read after line 0: "),
        (b"input,output\na," + b"b" * 200_000 + b"\n", "cannot be read after line 0: field larger than"),
        (b"input,output\na\n", "line 2: has no text 'output'"),
        (b"a,b\n", "has no examples"),
        (b"", "has no examples"),
    ],
)
def test_a_broken_csv_file_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "table.csv").write_bytes(content)
    assert refused(tmp_path / "table.csv").startswith(f"{tmp_path}/table.csv: {problem}")


def test_a_json_file_that_is_one_list(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(json.dumps([LINE, {**LINE, "output": "3"}]))
    assert [e.output for e in read(tmp_path / "list.json").examples] == ["2", "3"]
    (tmp_path / "list.json").write_text("[{")
    assert "list.json: cannot be read by datasets" in refused(tmp_path / "list.json")


def test_a_parquet_file(tmp_path: Path) -> None:
    from datasets import Dataset

    path = tmp_path / "odd [1]*.parquet"
    rows = {
        "input": ["a", "b"],
        "output": [1, 2],
        "references": [["x"], None],
        "choices": [["1", "3"], ["2", "3"]],
    }
    Dataset.from_dict(rows).to_parquet(path)
    assert read(path).examples == (
        Example("a", "1", ("1", "x"), ("1", "3")),
        Example("b", "2", ("2",), ("2", "3")),
    )
    Dataset.from_dict({"input": ["a"], "output": [float("nan")]}).to_parquet(path)
    assert f"{path}: line 1: has no text 'output'" in refused(path)
    path.write_bytes(b"PAR1 and no more")
    assert f"{path}: cannot be read by datasets" in refused(path)


def test_what_datasets_saved(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    parts = {"train": [0, 1], "test": [1], "unlabelled": [-1]}
    data = DatasetDict({
        split: Dataset.from_dict({"text": ["t"] * len(labels), "label": labels}, features=features)
        for split, labels in parts.items()
    })  # fmt: skip
    data.save_to_disk(tmp_path / "many")
    data["test"].save_to_disk(tmp_path / "one")
    columns = {"input": "text", "output": "label"}
    only_good = DatasetDict({split: data[split] for split in ("train", "test")})
    only_good.save_to_disk(tmp_path / "good")
    task = read(tmp_path / "good", "good", columns=columns)
    assert [e.output for e in task.examples] == ["good"]  # the label's name, not its number
    assert [e.output for e in task.shots] == ["bad", "good"]
    assert len(read(tmp_path / "one", "one", columns=columns).examples) == 1
    assert "many, split unlabelled: line 1: has no text 'label'" in refused(
        tmp_path / "many", columns=columns
    )
    (tmp_path / "good" / "dataset_dict.json").write_text("{")
    assert "good: cannot be read by datasets" in refused(tmp_path / "good", columns=columns)


@pytest.mark.parametrize("source", ["org/name", "org/name:config", "data/typo"])
def test_a_data_set_of_the_hub_that_cannot_be_had(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    found = tasks.find([source])
    assert list(found) == [source.split("/")[1].split(":")[0]]  # nothing is asked before it is wanted
    message = refused(source)
    assert message.startswith(f"{source.split(':')[0]}: cannot be read by datasets: ")
    assert message.endswith("(check the name and the network; there is no such file here)")


def test_a_data_set_of_the_hub_with_its_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(path: str, **options: Any) -> Any:
        asked.append((path, options))
        return {s: datasets.Dataset.from_dict({"question": [s], "answer": ["4"]}) for s in ("train", "test")}

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = read("openai/gsm8k:main", columns=GSM)
    assert asked == [("openai/gsm8k", {"name": "main"})]
    assert (task.name, [e.input for e in task.examples], len(task.shots)) == ("gsm8k", ["test"], 1)
