"""What in PEFT's files is refused, accepted or carried, and that all defects are listed."""

from __future__ import annotations

import math
from typing import Any

import pytest
from handmade import MakeAdapter

from lorazip import peft_config, peft_format
from lorazip.adapter import open_adapter
from lorazip.errors import InputError
from lorazip.header import TensorInfo

P = "base_model.model."


ATTENTION = ["q_proj", "k_proj", "v_proj"]


FINE = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


def matrix(rank: int = 4) -> dict[str, TensorInfo]:
    return {
        f"{P}m.lora_A.weight": TensorInfo("F32", (rank, 3)),
        f"{P}m.lora_B.weight": TensorInfo("F32", (5, rank)),
    }


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"init_lora_weights": "pissa"}, "changed base weights"),
        ({"init_lora_weights": "pissa_niter_16"}, "changed base weights"),
        ({"init_lora_weights": "olora"}, "changed base weights"),
        ({"init_lora_weights": "loftq"}, "changed base weights"),
        ({"init_lora_weights": "corda"}, "changed base weights"),
        ({"init_lora_weights": "lora_ga"}, "changed base weights"),
        ({"init_lora_weights": 1}, "changed base weights"),
        ({"use_qalora": True}, "use_qalora"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ({"alora_invocation_tokens": [1, 2]}, "aLoRA"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
        ({"arrow_config": {"top_k": 3}}, "arrow_config"),
        ({"kasa_config": {"beta": 1e-4}}, "kasa_config"),
        ({"monteclora_config": {"num_samples": 8}}, "monteclora_config"),
        ({"velora_config": {"num_groups": 64}}, "velora_config"),
        ({"use_something_new": True}, "not known"),
        ({"bias": "some"}, "bias is 'some'"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
        ({"modules_to_save": "head"}, "modules_to_save"),
        ({"modules_to_save": [""]}, "modules_to_save"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path"),
        ({"r": 0}, "r is 0"),
        ({"r": True}, "r is True"),
        ({"r": 4.0}, "r is 4.0"),
        ({"r": 10**30}, "r is 1000"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"lora_alpha": -1}, "lora_alpha is -1"),
        ({"lora_alpha": False}, "lora_alpha is False"),
        ({"lora_alpha": math.nan}, "lora_alpha is nan"),
        ({"rank_pattern": [1]}, "rank_pattern is not an object"),
        ({"rank_pattern": {"q_proj": "8"}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": -8}}, "alpha_pattern"),
        ({"alpha_pattern": {".*q_proj": 8}}, "regular expression"),
        ({"rank_pattern": {r"layers\.\d": 8}}, "regular expression"),
    ],
)
def test_configs_that_are_refused(fields: dict[str, Any], words: str) -> None:
    (problem,) = peft_config.problems(FINE | fields)
    assert words in problem.problem
    assert problem.remedy


def test_configs_that_are_accepted() -> None:
    for fields in (
        {},
        {
            "use_qalora": False,
            "qalora_group_size": 16,
            "arrow_config": None,
            "loftq_config": {},
            "rank_pattern": None,
        },
        {"init_lora_weights": "Gaussian"},
        {"init_lora_weights": None},
        {"megatron_config": {"x": 1}, "layer_replication": [[0, 2]], "revision": "abc", "something_else": 5},
    ):
        assert peft_config.problems(FINE | fields) == []


def test_a_missing_rank_is_refused() -> None:
    assert [p.problem for p in peft_config.problems({"peft_type": "LORA"})] == [
        "r is None, not an integer from 1 to 4096",
        "lora_alpha is None, not a positive number up to 1e12",
    ]


@pytest.mark.parametrize(
    ("tensors", "fields", "tensor", "words"),
    [
        ({"m.lora_B.weight": None}, {}, "m.lora_A.weight", "lora_B.weight is missing"),
        ({"m.lora_A.weight": None}, {}, "m.lora_B.weight", "lora_A.weight is missing"),
        ({"m.lora_A.weight": ("F32", (2, 3))}, {}, "m.lora_A.weight", "its rank is 2"),
        ({"m.lora_B.weight": ("F32", (5, 2))}, {}, "m.lora_B.weight", "its rank is 2"),
        ({}, {"rank_pattern": {"m": 2}}, "m.lora_A.weight", "the config says 2"),
        ({"m.lora_A.weight": ("F32", (4,))}, {}, "m.lora_A.weight", "not a matrix"),
        ({"m.lora_A.weight": ("F32", (4, 0))}, {}, "m.lora_A.weight", "empty"),
        ({"m.lora_B.weight": ("F32", (5, 4, 1))}, {}, "m.lora_B.weight", "does not fit"),
        ({"m.lora_A.weight": ("I8", (4, 3))}, {}, "m.lora_A.weight", "its type is I8"),
        ({"m.lora_A.weight": ("F64", (4, 3))}, {}, "m.lora_A.weight", "its type is F64"),
        ({"m.lora_A.default.weight": ("F32", (4, 3))}, {}, "m.lora_A.default.weight", "not understood"),
        ({"m.lora_E": ("F32", (4, 1))}, {}, "m.lora_E", "not understood"),
        ({"m.lora_velora_embed": ("F32", (4,))}, {}, "m.lora_velora_embed", "not understood"),
        ({"m.base_layer.lora_A.weight": ("F32", (4, 3))}, {}, "m.base_layer.lora_A.weight", "not understood"),
        ({"m.weight": ("F32", (5, 3))}, {}, "m.weight", "not understood"),
        ({"m.bias": ("F32", (5,))}, {}, "m.bias", "not understood"),
        ({"n.bias": ("F32", (5,))}, {"bias": "lora_only"}, "n.bias", "not understood"),
        ({"m.lora_B.bias": ("F32", (5,))}, {}, "m.lora_B.bias", "lora_bias is not set"),
        ({"n.lora_B.bias": ("F32", (5,))}, {"lora_bias": True}, "n.lora_B.bias", "no factors"),
        ({"m.lora_magnitude_vector": ("F32", (5,))}, {}, "m.lora_magnitude_vector", "use_dora is not set"),
        (
            {"e.token_adapter.trainable_tokens_delta": ("F32", (2, 3))},
            {},
            "e.token_adapter.trainable_tokens_delta",
            "not",
        ),
        (
            {"m.lora_embedding_A": ("F32", (4, 3)), "m.lora_embedding_B": ("F32", (3, 4))},
            {},
            "",
            "and of an embedding",
        ),
        ({"m\n.weight": ("F32", (5, 3))}, {}, "m\n.weight", "control characters"),
        ({"m" * 600 + ".weight": ("F32", (5, 3))}, {}, "m" * 600 + ".weight", "more than"),
        ({}, {"use_dora": True}, "", "magnitude vector is missing"),
        ({}, {"alpha_pattern": {"m": 1e-9}}, "", "scale 2.5e-10"),
        ({}, {"alpha_pattern": {"m": 1e11}}, "", "scale 2.5e+10"),
    ],
)
def test_tensors_that_are_refused(
    tensors: dict[str, Any], fields: dict[str, Any], tensor: str, words: str
) -> None:
    header = matrix() | {P + key: TensorInfo(*info) for key, info in tensors.items() if info}
    header = {key: info for key, info in header.items() if tensors.get(key.removeprefix(P), 1) is not None}
    (defect,) = peft_format.parse("name", header, FINE | fields).defects
    assert defect.adapter == "name"
    assert defect.tensor == (P + tensor if tensor else "")
    assert defect.module
    assert words in defect.problem
    assert defect.remedy


def test_a_key_without_the_prefix_is_refused() -> None:
    header = matrix() | {"m.lora_A.weight": TensorInfo("F32", (4, 3))}
    (defect,) = peft_format.parse("name", header, FINE).defects
    assert "does not start with" in defect.problem


@pytest.mark.parametrize("header", [{}, {f"{P}c.lora_A.weight": (4, 3, 3), f"{P}c.lora_B.weight": (5, 4, 1)}])
def test_an_adapter_without_a_matrix_is_refused(header: dict[str, tuple[int, ...]]) -> None:
    tensors = {key: TensorInfo("F32", shape) for key, shape in header.items()}
    (defect,) = peft_format.parse("name", tensors, FINE).defects
    assert defect.remedy


@pytest.mark.parametrize(
    ("key", "fields"),
    [
        ("score.weight", {"task_type": "SEQ_CLS"}),
        ("classifier.dense.bias", {"task_type": "TOKEN_CLS"}),
        ("qa_outputs.weight", {"task_type": "QUESTION_ANS"}),
        ("model.head.0.weight", {"modules_to_save": ["head"]}),
        ("lm_head.weight", {"modules_to_save": ["head"]}),
        ("model.embed_tokens.weight", {}),
        ("model.embed_tokens.base_layer.weight", {}),
        ("transformer.wte.weight", {}),
        ("m.bias", {"bias": "lora_only"}),
        ("m.base_layer.bias", {"bias": "lora_only"}),
        ("other.norm.bias", {"bias": "all"}),
        ("model.embed_tokens.token_adapter.trainable_tokens_delta", {"trainable_token_indices": [3]}),
        ("m.lora_B.bias", {"lora_bias": True}),
        ("m.lora_magnitude_vector", {"use_dora": True}),
        ("m.lora_magnitude_vector.weight", {"use_dora": True}),
    ],
)
def test_tensors_that_are_carried(key: str, fields: dict[str, Any]) -> None:
    parsed = peft_format.parse("name", matrix() | {P + key: TensorInfo("F32", (5,))}, FINE | fields)
    assert parsed.defects == ()
    assert list(parsed.extras) == [P + key]
    assert list(parsed.modules) == ["m"]


def test_the_weights_of_an_adapted_embedding_are_carried() -> None:
    keys = {
        "words.lora_embedding_A": (4, 9),
        "words.lora_embedding_B": (6, 4),
        "words.base_layer.weight": (9, 6),
    }
    header = matrix() | {P + key: TensorInfo("F32", shape) for key, shape in keys.items()}
    parsed = peft_format.parse("name", header, FINE)
    assert parsed.defects == ()
    assert set(parsed.extras) == {P + key for key in keys}


def test_all_defects_are_listed(make_adapter: MakeAdapter) -> None:
    path = make_adapter("a", r="8", lora_alpha=-1, peft_type="LORA", use_qalora=True)
    with pytest.raises(InputError) as caught:
        open_adapter(path, "a")
    assert len(caught.value.defects) == 3
