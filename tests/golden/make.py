"""Made the bundles of format version 1 that every later lorazip must read. Never run again for a folder that is there.

    PYTHONPATH=tests .venv/bin/python -m golden.make tests/golden/v1
    PYTHONPATH=tests .venv/bin/python -m golden.make tests/golden/v1-integers    # codecs of few bits, added later
    PYTHONPATH=tests .venv/bin/python -m golden.make tests/golden/v1-trellis     # trellis codes, sides in part shared

Some bundles are written by hand, with every kind of term, side and codec; the others are what `compress` made of small
random adapters. Beside each NAME.lorazip lies NAME.npz: the dense matrices,
"adapter/module" -> D, as the independent reader (reader.py) gave them on that day.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from golden import reader
from handmade import MakeAdapter

import lorazip
from lorazip import manifest as manifests
from lorazip.bundle import ADAPTERS, MANIFEST, SHARED, adapter_path
from lorazip.codecs import DTYPES
from lorazip.files import Entry, write_bytes, write_safetensors
from lorazip.manifest import AdapterRecord, FileRecord, Manifest, Module
from lorazip.sources import fingerprint
from lorazip.terms import Core, Form, Own, Shared, Side, Slot, Term, own_slots, shared_slots

SIDES: tuple[Side, Side] = ("left", "right")
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


def streams(slots: list[Slot]) -> Streams:
    """Some content for these slots; scales are not negative."""
    parts = [part for slot in slots for part in slot.parts()]
    found: Streams = {}
    for dtype in ("U8", "BF16", "F16", "F32"):
        count = sum(p.count for p in parts if p.dtype == dtype)
        if dtype == "U8":
            found[dtype] = [float((i * 37 + 11 * len(parts)) % 256) for i in range(count)]
        elif count:
            found[dtype] = [abs(x) for x in numbers(count, len(parts))]
    return found


INTEGERS = ("int1", "int2", "int3g2", "int4t", "int6", "int8g3", "int4*1+int1", "int8*2+int3g4*1+int2t")


def integers(path: Path) -> None:
    """Every number of bits, scope of a scale and mixture, for own factors, shared ones and cores, by hand."""
    layout = tuple(Shared(side, 3, name) for name in INTEGERS for side in SIDES)
    modules = (Module("x.q", 5, 7, layout), Module("x.v", 1, 3, ()))
    cores: Form = tuple(
        Term(2 * i, core, 2 * i + 1)
        for i, name in enumerate(INTEGERS)
        for core in (Core("full", name), Core("diagonal", name), Core("factored", name, 2))
    )
    own: Form = tuple(Term(Own(3, name), Core("scalar", value=0.5), Own(3, name)) for name in INTEGERS)
    small: Form = (Term(Own(1, "int3"), Core("scalar"), Own(1, "int3")),)

    by_hand(
        path,
        modules,
        streams(shared_slots(layout, 5, 7)),
        {
            "cores": ((cores, None), streams(own_slots(cores, layout, 5, 7)), CONFIG),
            "own": (
                (own, small),
                streams(own_slots(own, layout, 5, 7) + own_slots(small, (), 1, 3)),
                {**CONFIG, "r": 2},
            ),
        },
    )


RATES = ("0.5", "1", "1.5", "2", "2.5", "3", "4", "5")
WIDE = Module("x.q", 65, 6, ())  # a block that is turned, and a number that is not
LONG = Module("x.v", 3, 130, ())


def rates(path: Path) -> None:
    """Every rate with and without scales, for shared tensors, cores and own factors."""
    names = [f"tcq{rate}{u}" for rate in RATES for u in ("", "u")]
    layout = tuple(Shared(side, 2, name) for name in names for side in SIDES)
    modules = (replace(WIDE, layout=layout), LONG)
    cores: Form = tuple(
        Term(2 * i, core, 2 * i + 1)
        for i, name in enumerate(names)
        for core in (Core("full", name), Core("diagonal", name), Core("factored", name, 1))
    )
    own: Form = tuple(Term(Own(2, name), Core("scalar", value=0.5), Own(2, name)) for name in names)
    slots = own_slots(cores, layout, 65, 6) + own_slots(own, (), 3, 130)
    by_hand(
        path,
        modules,
        streams(shared_slots(layout, 65, 6)),
        {
            "all": ((cores, own), streams(slots), CONFIG),
            "turned": ((own, None), streams(own_slots(own, layout, 65, 6)), CONFIG),
        },
    )


MIXED = (
    "float16*1+tcq2", "tcq1.5u*2+int4*1+bfloat16", "tcq3*1+tcq1*1+tcq0", "float32*1+int8g3*1+tcq5u*1+tcq0.5",
    "tcq0*1+tcq4", "int2t*1+tcq2.5*1+float16", "tcq1*2+tcq2u", "tcq2*9+int1", "tcq0",
)  # fmt: skip


def mixtures(path: Path) -> None:
    """Plain, integer and trellis codecs in one tensor, of more and of fewer rows than the first ones."""
    layout = tuple(
        Shared(side, 4, name) for name in MIXED if "tcq0" not in name[:4] + name[-4:] for side in SIDES
    )
    own: Form = tuple(Term(Own(4, name), Core("scalar"), Own(4, MIXED[0])) for name in MIXED)
    few: Form = tuple(Term(Own(1, name), Core("full", MIXED[1]), Own(2, name)) for name in MIXED)
    cores: Form = tuple(
        Term(2 * i, Core(kind, shared.codec, 3 if kind == "factored" else 0), 2 * i + 1)
        for i, shared in enumerate(layout[::2])
        for kind in ("full", "diagonal", "factored")
    )
    modules = (replace(WIDE, layout=layout), LONG)
    slots = own_slots(cores, layout, 65, 6) + own_slots(few, (), 3, 130)
    by_hand(
        path,
        modules,
        streams(shared_slots(layout, 65, 6)),
        {
            "cores": ((cores, few), streams(slots), CONFIG),
            "own": ((None, own), streams(own_slots(own, (), 3, 130)), CONFIG),
        },
    )


def parts(path: Path) -> None:
    """Factors in part shared on either side and on both, between all kinds of cores."""
    layout = (
        Shared("right", 4, "tcq3u"),
        Shared("left", 3, "tcq2u"),
        Shared("left", 2, "float16"),
        Shared("right", 1, "int4"),
    )
    both: Form = (Term(Own(2, "tcq1", 1, "int4"), Core("scalar"), Own(2, "tcq2u", 0, "int6")),)
    left: Form = (Term(Own(3, "float16*1+tcq0", 2, "int8*1+int4"), Core("scalar", value=2), Own(3, "tcq4")),)
    right: Form = (
        Term(Own(2, "tcq2"), Core("full", "float32"), Own(3, "tcq0", 0, "bfloat16")),
        Term(1, Core("diagonal", "float16"), Own(3, "int8", 3, "tcq5")),
    )
    several: Form = (
        *both,
        Term(
            Own(2, "tcq0", 2, "float32"), Core("factored", "float16", 1), Own(3, "tcq1.5u", 3, "tcq2*1+int3t")
        ),
        Term(Own(1, "float32", 2, "float16"), Core("scalar"), 3),
    )
    shapes = (65, 6), (3, 130)
    modules = tuple(replace(m, layout=layout) for m in (WIDE, LONG))
    shared = [slot for shape in shapes for slot in shared_slots(layout, *shape)]

    def adapter(*forms: Form) -> tuple[Any, ...]:
        slots = [
            s for form, shape in zip(forms, shapes, strict=True) for s in own_slots(form, layout, *shape)
        ]
        return forms, streams(slots), CONFIG

    adapters = {"both": adapter(both, both), "left": adapter(left, right), "right": adapter(right, several)}
    by_hand(path, modules, streams(shared), adapters)


def digit(path: Path, count: int = 5, length: int = 20) -> None:
    """Forms as a text, without a module: so many of them, in so many modules."""
    layout = (Shared("left", 1, "float16"), Shared("right", 1, "float16"))
    known: list[Form] = [(Term(0, Core("scalar", value=i + 0.5), 1),) for i in range(count)]
    modules = tuple(Module(f"m{i:02}", 1, 2, layout) for i in range(length))
    chosen = tuple(None if i == 3 else known[i * i % count if i < 9 else i % count] for i in range(length))
    by_hand(path, modules, {"F16": numbers(3 * length, 1)}, {"alone": (chosen, {}, CONFIG)})


def digits(path: Path) -> None:
    """The same with more forms than one digit can name."""
    digit(path, 66, 75)


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

FEW_BITS = {
    "svd-3": lorazip.Spec("svd", rank=3, bits=3),
    "svd-bound": lorazip.Spec("svd", max_error=0.1, bits=2.5, group=8),
    "jd-4": lorazip.Spec("jd-full", rank=6, bits=4, clusters=2),
    "jd-mixed": lorazip.Spec("jd-full", rank=9, bits=2.5, core_bits=8, dtype="bfloat16"),
    "diag-cores": lorazip.Spec("jd-diag", rank=6, core_bits=6, dtype="float32"),
}


TRELLIS = {
    "auto-bound": lorazip.Spec("auto", max_error=0.1),
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


def main(target: Path, which: str) -> None:
    target.mkdir(parents=True)  # fails when it is there: old fixtures are never made again
    by_hand, compressed = SETS[which]
    for write in by_hand:
        write(target / f"{write.__name__}.lorazip")
    with tempfile.TemporaryDirectory() as folder:
        paths = adapters(MakeAdapter(Path(folder)))
        for name, spec in compressed.items():
            lorazip.compress(paths, spec, target / f"{name}.lorazip")
    for path in sorted(target.glob("*.lorazip")):
        bundle = reader.Bundle(path)
        dense = {f"{name}/{m}": d for name in bundle.names for m, d in bundle.matrices(name).items()}
        single = {key: matrix.astype(np.float32) for key, matrix in dense.items()}
        np.savez_compressed(path.with_suffix(".npz"), **single)


SETS = {
    "v1": ([example, forms], COMPRESSED),
    "v1-integers": ([integers], FEW_BITS),
    "v1-trellis": ([rates, mixtures, parts, digit, digits], TRELLIS),
}

if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[1]).name)
