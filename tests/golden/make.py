"""Made tests/golden/v1: bundles of format version 1 that every later lorazip must read. Never run again for v1.

    PYTHONPATH=tests .venv/bin/python -m golden.make tests/golden/v1

Two bundles are written by hand, with numbers that every codec holds exactly and every kind of term; the others are
what `compress` made of small random adapters. Beside each NAME.lorazip lies NAME.npz: the dense matrices,
"adapter/module" -> D, as the independent reader (reader.py) gave them on that day.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from golden import reader

import lorazip
from lorazip import manifest as manifests
from lorazip.bundle import ADAPTERS, MANIFEST, SHARED, adapter_path
from lorazip.codecs import DTYPES
from lorazip.files import Entry, write_bytes, write_safetensors
from lorazip.manifest import AdapterRecord, FileRecord, Manifest, Module
from lorazip.sources import fingerprint
from lorazip.terms import Core, Form, Own, Shared, Term

if TYPE_CHECKING:
    from tests.conftest import MakeAdapter

Streams = dict[str, list[float]]
PREFIX = "base_model.model."
BASE = "org/base"
CONFIG = {"base_model_name_or_path": BASE, "lora_alpha": 8, "peft_type": "LORA", "r": 4}


def by_hand(
    path: Path, modules: tuple[Module, ...], shared: Streams, adapters: dict[str, tuple[Any, ...]]
) -> None:
    """Write a bundle of given streams; adapters: name -> (forms, streams, config)."""
    (path / ADAPTERS).mkdir(parents=True)
    files = {"README.md": write_bytes(path / "README.md", b"# By hand\n")}
    files[SHARED] = write_streams(path / SHARED, shared)
    records = tuple(
        AdapterRecord(name, config, forms, 0.0, 1000, write_streams(adapter_path(path, name), streams))
        for name, (forms, streams, config) in adapters.items()
    )
    shape = fingerprint({m.name: (m.out, m.in_) for m in modules})
    options = {"method": "svd", "rank": 1, "energy": None, "max_error": None, "clusters": None}
    options |= {"weights": "unit", "dtype": "float16"}
    manifest = Manifest(BASE, None, shape, options, modules, records, files)
    write_bytes(path / MANIFEST, manifests.dumps(manifest))


def write_streams(path: Path, streams: Streams) -> FileRecord:
    return write_safetensors(
        path, [Entry(d, d, (len(v),), [torch.tensor(v).to(DTYPES[d])]) for d, v in streams.items()]
    )


def example(path: Path) -> None:
    """The worked example of docs/FORMAT.md."""
    modules = (
        Module("a", 2, 3, (Shared("left", 1, "float16"), Shared("right", 1, "float16"))),
        Module("b", 2, 2, ()),
    )
    full: Form = (Term(0, Core("full", "float16"), 1),)
    own: Form = (Term(Own(1, "float32"), Core("scalar", value=0.5), Own(1, "float32")),)
    mixed: Form = (Term(0, Core("diagonal", "float16"), Own(1, "bfloat16")),)
    by_hand(
        path,
        modules,
        {"F16": [1, 2, 1, 0, -1]},
        {
            "one": ((full, own), {"F16": [4], "F32": [1, 0, 2, 6]}, CONFIG),
            "two": ((mixed, None), {"F16": [0.5], "BF16": [2, 2, 2]}, {**CONFIG, "lora_alpha": 4}),
        },
    )


def numbers(count: int, start: int) -> list[float]:
    """Small multiples of 1/4, which all codecs hold exactly."""
    return [((i * 7 + start) % 11 - 5) / 4 for i in range(count)]


def forms(path: Path) -> None:
    """Every kind of core between every pair of sides, in every codec; several terms, the empty form, absent modules."""
    left, right = Shared("left", 3, "float16"), Shared("right", 3, "bfloat16")
    modules = (
        Module("x.q", 5, 4, (left, Shared("right", 2, "float32"), right)),
        Module("x.v", 3, 6, (Shared("right", 2, "float16"),)),
        Module("y.q", 4, 4, ()),
    )
    shared = {
        "F16": numbers(3 * 5 + 2 * 6, 1),
        "F32": numbers(2 * 4, 2),
        "BF16": numbers(3 * 4, 3),
    }
    all_shared: Form = (
        Term(0, Core("full", "float32"), 1),  # F32: 3 * 2
        Term(0, Core("diagonal", "bfloat16"), 2),  # BF16: 3
        Term(0, Core("factored", "float16", 1), 2),  # F16: 1 * 3 + 1 * 3
        Term(0, Core("scalar", value=-0.25), 2),
    )
    half_shared: Form = (
        Term(Own(2, "float16"), Core("full", "bfloat16"), 0),  # F16: 2 * 3, BF16: 2 * 2
        Term(Own(2, "float32"), Core("scalar", value=3), 0),  # F32: 2 * 3
    )
    half_left: Form = (Term(0, Core("full", "float16"), Own(1, "float32")),)  # F16: 3 * 1, F32: 1 * 4
    own: Form = (
        Term(Own(2, "bfloat16"), Core("factored", "float32", 2), Own(3, "float16")),
        # BF16: 2 * 4; F32: 2 * 2 + 2 * 3; F16: 3 * 4
        Term(Own(1, "float16"), Core("diagonal", "float32"), Own(1, "bfloat16")),
        # F16: 4; F32: 1; BF16: 4
    )
    by_hand(
        path,
        modules,
        shared,
        {
            "all": (
                (all_shared, half_shared, own),
                {
                    "F16": numbers(6 + 6 + 12 + 4, 4),
                    "F32": numbers(6 + 6 + 10 + 1, 5),
                    "BF16": numbers(3 + 4 + 8 + 4, 6),
                },
                CONFIG,
            ),
            "left": ((half_left, None, ()), {"F16": numbers(3, 7), "F32": numbers(4, 8)}, {**CONFIG, "r": 2}),
            "nothing": (((), (), None), {}, {k: v for k, v in CONFIG.items() if k != "r"}),
        },
    )


SHAPES = {"layers.0.k_proj": (4, 16), "layers.0.q_proj": (12, 16)}
COMPRESSED = {
    "svd": lorazip.Spec("svd", energy=0.8),
    "jd-full": lorazip.Spec("jd-full", rank=6, clusters=2),  # cores of rank 4 between 6 columns: full
    "jd-factored": lorazip.Spec("jd-full", rank=9, dtype="bfloat16"),  # the same between 9: factored
    "jd-diag": lorazip.Spec("jd-diag", rank=6, dtype="float32"),
    "eigenlora": lorazip.Spec("eigenlora", rank=5),
    "mean": lorazip.Spec("mean", rank=4),
    "bound": lorazip.Spec("jd-full", max_error=0.05),
}


def adapters(make: MakeAdapter) -> list[Path]:
    """Three adapters, two of one start, of several types; one with carried tensors, one without a module."""
    few = {name: shape for name, shape in SHAPES.items() if "q_proj" in name}
    extras = {
        f"{PREFIX}layers.0.q_proj.lora_B.bias": torch.linspace(-1, 1, 12),
        f"{PREFIX}classifier.weight": torch.arange(6, dtype=torch.float16).view(2, 3),
    }
    bf16 = torch.bfloat16
    return [
        make("in/cow", modules=SHAPES, a_seed=1, seed=2, dtype=torch.float32),
        make("in/emu", modules=SHAPES, a_seed=1, seed=2, dtype=bf16, alpha=16),
        make(
            "in/fox", modules=few, dtype=torch.float16, tensors=extras, lora_bias=True,
            modules_to_save=["classifier"], use_rslora=True,
        ),
    ]  # fmt: skip


def main(target: Path) -> None:
    from conftest import MakeAdapter

    target.mkdir(parents=True)  # fails when it is there: old fixtures are never made again
    example(target / "example.lorazip")
    forms(target / "forms.lorazip")
    with tempfile.TemporaryDirectory() as folder:
        paths = adapters(MakeAdapter(Path(folder)))
        for name, spec in COMPRESSED.items():
            lorazip.compress(paths, spec, target / f"{name}.lorazip")
    for path in sorted(target.glob("*.lorazip")):
        bundle = reader.Bundle(path)
        dense = {f"{name}/{m}": d for name in bundle.names for m, d in bundle.matrices(name).items()}
        single = {key: matrix.astype(np.float32) for key, matrix in dense.items()}
        np.savez_compressed(path.with_suffix(".npz"), **single)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
