"""PEFT directories out of a bundle: which, where, how; their effect in PEFT is tested in test_roundtrip.py."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import MakeAdapter
from safetensors.torch import load_file

from lorazip import Bundle, Spec, open_adapter
from lorazip.compress import job
from lorazip.edit import commit
from lorazip.errors import BundleError, TargetError, UsageError
from lorazip.export import Exported, export, write_card

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def team(make_adapter: MakeAdapter) -> Bundle:
    """Three adapters: mixed ranks in bee, zero everywhere in cat."""
    make_adapter("zoo/ant")
    make_adapter("zoo/bee", rank={module: 1 + i for i, module in enumerate(make_adapter.modules)})
    zero = {
        f"base_model.model.{m}.lora_B.weight": torch.zeros(o, 4) for m, (o, _) in make_adapter.modules.items()
    }
    make_adapter("zoo/cat", tensors=zero)
    job.run(
        [make_adapter.root / "zoo"],
        Spec(method="svd", max_error=0, dtype="float32"),
        make_adapter.root / "team",
    )
    return Bundle.open(make_adapter.root / "team")


def test_all_or_some(team: Bundle, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    done = export(team, [], tmp_path / "all", progress=lambda *step: told.append(step))
    assert done == [
        Exported(name, tmp_path / "all" / name, rank) for name, rank in (("ant", 4), ("bee", 6), ("cat", 1))
    ]
    assert told == [("exporting", i, 3) for i in (1, 2, 3)]
    assert export(team, ["bee", "ant", "bee"], tmp_path / "some") == [
        Exported("bee", tmp_path / "some" / "bee", 6),
        Exported("ant", tmp_path / "some" / "ant", 4),
    ]
    for name in ("ant", "bee"):
        for file in (CONFIG, WEIGHTS):
            one, two = (tmp_path / which / name / file for which in ("all", "some"))
            assert one.read_bytes() == two.read_bytes()
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["ant", "bee", "cat"]


def test_the_directories_are_what_peft_and_vllm_read(team: Bundle, tmp_path: Path) -> None:
    export(team, [], tmp_path / "peft")
    for name in team.names:
        config = json.loads((tmp_path / "peft" / name / CONFIG).read_text())
        tensors = load_file(tmp_path / "peft" / name / WEIGHTS)
        adapter = open_adapter(tmp_path / "peft" / name, name)
        ranks = {module: info.rank for module, info in adapter.modules.items()}
        assert (
            config["r"] == config["lora_alpha"] == max(ranks.values()) == {"ant": 4, "bee": 6, "cat": 1}[name]
        )
        assert {info.scale for info in adapter.modules.values()} == {1.0}
        assert (
            config["bias"] == "none" and config["peft_type"] == "LORA" and config["task_type"] == "CAUSAL_LM"
        )
        assert set(tensors) == {
            f"base_model.model.{module}.lora_{side}.weight"
            for module in team.adapter(name).modules
            for side in "AB"
        }
        for module in adapter.modules:
            exact, found = team.adapter(name).low_rank(module), adapter.low_rank(module)
            assert torch.equal(found.B @ found.A, exact.B @ exact.A)
    # A zero has no rank, PEFT has no rank 0: one column of zeros.
    assert all(not tensor.any() for tensor in load_file(tmp_path / "peft" / "cat" / WEIGHTS).values())


def test_nothing_is_written_over(team: Bundle, tmp_path: Path) -> None:
    (tmp_path / "out" / "bee").mkdir(parents=True)
    (tmp_path / "out" / "cat").mkdir()
    (tmp_path / "out" / "cat" / "mine").write_text("mine")
    for names in ([], ["ant", "cat"]):
        with pytest.raises(TargetError, match="out/cat exists"):
            export(team, names, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["bee", "cat"]
    export(team, ["ant", "bee"], tmp_path / "out")  # an empty directory may be filled
    (tmp_path / "out" / "dog").write_text("mine")
    with pytest.raises(TargetError, match="out/ant exists"):
        export(team, ["ant"], tmp_path / "out")
    with pytest.raises(TargetError, match="dog"):
        export(team, ["ant"], tmp_path / "out" / "dog")


def test_what_cannot_be_exported(team: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no adapter 'cow'"):
        export(team, ["ant", "cow"], tmp_path / "out")
    with pytest.raises(UsageError, match="dtype must be one of float32, float16, bfloat16"):
        export(team, [], tmp_path / "out", dtype="int4")
    file = team.path / "adapters" / "bee.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(BundleError, match=r"adapters/bee\.safetensors: its sha256 is not"):
        export(team, [], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export(team, ["ant"], tmp_path / "out")  # whose bytes are good


@pytest.mark.parametrize("fields", [{"r": -1}, {"peft_type": "LOHA"}, {"use_qalora": True}], ids=str)
def test_a_config_that_compress_would_refuse(team: Bundle, tmp_path: Path, fields: dict[str, Any]) -> None:
    """A bundle may come from anybody."""
    ant, *rest = team.manifest.adapters
    hostile = replace(ant, config={**ant.config, **fields})
    commit(team.path, replace(team.manifest, adapters=(hostile, *rest)))
    with pytest.raises(BundleError, match="ant: its config cannot be used"):
        export(Bundle.open(team.path), [], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_card_tells_the_errors_and_is_data_only(team: Bundle, tmp_path: Path) -> None:
    hostile = 'org/x"\nlicense: mit\n---\n# owned'
    bundle = Bundle(team.path, replace(team.manifest, base=hostile), 0)
    (tmp_path / "out").mkdir()
    write_card(tmp_path / "out", bundle, ["bee", "ant"])
    card = (tmp_path / "out" / "README.md").read_text()
    head, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert json.loads(head.splitlines()[0].removeprefix("base_model: ")) == hostile
    assert not any(line.startswith("license") for line in card.splitlines())
    assert body.count("| bee | ") == 1 and "| cat |" not in body
    with pytest.raises(TargetError, match=r"README\.md exists"):
        write_card(tmp_path / "out", bundle, ["ant"])
