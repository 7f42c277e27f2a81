"""Real adapters that several files of tests compress."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

ZOO = Path(__file__).parents[2] / "examples" / "zoo"


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every tenth module, three of each kind, of six of the real adapters, three of them with a shared start."""
    folder = tmp_path_factory.mktemp("few")
    inits = {
        row["task"]: row["init"] for row in map(json.loads, (ZOO / "scores.jsonl").read_text().splitlines())
    }
    for start in ("own", "shared"):
        for name in sorted(n for n, init in inits.items() if init == start)[:3]:
            tensors = load_file(ZOO / name / "adapter_model.safetensors")
            modules = sorted({key.split(".lora_")[0] for key in tensors})[::10]
            assert {module.rpartition(".")[2] for module in modules} == {"q_proj", "k_proj", "v_proj"}
            (folder / name).mkdir()
            kept = {key: tensor for key, tensor in tensors.items() if key.split(".lora_")[0] in modules}
            save_file(kept, folder / name / "adapter_model.safetensors")
            shutil.copy(ZOO / name / "adapter_config.json", folder / name)
    return folder
