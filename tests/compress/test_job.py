"""The streaming job: figures, the paper's rule, interruption and resumption in one process, every byte counted."""

from __future__ import annotations

import json
from math import sqrt
from pathlib import Path

import pytest
import torch
from handmade import MakeAdapter

import lorazip
from lorazip import Bundle, Spec
from lorazip.compress import encode, job, partial
from lorazip.errors import BundleError, CodecError, InputError, TargetError, UsageError
from lorazip.sources import open_adapters

MODULES = {"a.q_proj": (24, 20), "a.v_proj": (8, 20), "b.q_proj": (24, 20)}


@pytest.fixture
def zoo(make_adapter: MakeAdapter) -> Path:
    """Four adapters; one lacks a module, one carries a tensor, one is zero in a module."""
    make_adapter("zoo/ant", modules=MODULES)
    make_adapter("zoo/bee", modules={name: MODULES[name] for name in ("a.q_proj", "b.q_proj")}, rank=3)
    bias = torch.randn(5, generator=torch.Generator().manual_seed(0))
    make_adapter(
        "zoo/cat", modules=MODULES, modules_to_save=["head"], tensors={"base_model.model.head.weight": bias}
    )
    zero = {"base_model.model.a.v_proj.lora_B.weight": torch.zeros(8, 4)}
    make_adapter("zoo/dog", modules=MODULES, tensors=zero)
    return make_adapter.root / "zoo"


def dense(factor: lorazip.LowRank) -> torch.Tensor:
    return factor.scale * factor.B.double() @ factor.A.double()


def close(measured: float, exact: float) -> bool:
    """Equal but for the rounding of alpha / r * B to float32, which moves D by 6e-8 of its norm."""
    return abs(sqrt(measured) - sqrt(exact)) <= 1e-7 + 1e-7 * sqrt(exact)


def content(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


ALL = [
    Spec(method="svd", rank=2),
    Spec(method="svd", max_error=0.05, dtype="bfloat16"),
    Spec(method="jd-full", rank=3, clusters=2, weights="trained"),
    Spec(method="jd-full", max_error=0.1),
    Spec(method="jd-diag", rank=3),
    Spec(method="eigenlora", rank=4, dtype="float32"),
    Spec(method="mean", rank=2, max_error=0.9),
]


@pytest.mark.parametrize("spec", ALL, ids=lambda spec: f"{spec.method}-{spec.rank}-{spec.max_error}")
def test_the_figures_are_what_the_bundle_holds(zoo: Path, tmp_path: Path, spec: Spec) -> None:
    """Errors by dense float64 matrices, from nothing but the originals and what the bundle gives back."""
    outcome = job.run([zoo], spec, tmp_path / "team")
    assert outcome.bundle is not None
    inputs = open_adapters([str(zoo)])
    names = [adapter.name for adapter in inputs.adapters]
    for i, original in enumerate(inputs.adapters):
        stored = outcome.bundle.adapter(original.name)
        assert set(stored.modules) == set(original.modules)
        left_out, whole = 0.0, 0.0
        for column, module in enumerate(outcome.modules):
            if module not in original.modules:
                assert outcome.errors[i, column].isnan()
                continue
            d, found = dense(original.low_rank(module)), dense(stored.low_rank(module))
            residual, energy = float((found - d).square().sum()), float(d.square().sum())
            left_out, whole = left_out + residual, whole + energy
            expected = residual / energy if energy else 0.0
            assert close(float(outcome.errors[i, column]), expected)
            own = outcome.bundle.manifest.adapters[i].forms[column]
            assert own is not None
            if outcome.fallbacks[i, column]:
                assert spec.max_error is not None and expected <= spec.max_error * (1 + 1e-6)
                assert not any(isinstance(side, int) for term in own for side in (term.left, term.right))
            assert found.shape == d.shape
        assert close(float(outcome.adapter_errors[i]), left_out / whole)
        assert close(stored.record.error, left_out / whole)
        if spec.max_error is not None:
            assert left_out / whole <= spec.max_error * (1 + 1e-6)
    assert names == outcome.bundle.names == ["ant", "bee", "cat", "dog"]
    assert outcome.fallbacks.shape == outcome.errors.shape == (4, 3)
    assert outcome.bundle_bytes == sum(map(len, content(tmp_path / "team").values()))
    assert outcome.original_bytes == sum(map(len, content(zoo).values()))
    summary = outcome.summary()
    assert summary["fallbacks"] == int(outcome.fallbacks.sum())
    assert summary["max_error"] == float(outcome.adapter_errors.max())
    json.dumps(summary, allow_nan=False)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("after", ["reading 4", "compressing 1", "compressing 3", "writing 1", "writing 4"])
def test_an_interrupted_job_goes_on_where_it_was(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    spec = Spec("jd-full", rank=3)
    torch.set_num_threads(1)  # modules one after the other
    job.run([zoo], spec, tmp_path / "calm")

    def stop(what: str, done: int, total: int) -> None:
        if f"{what} {done}" == after:
            raise Interrupted

    with pytest.raises(Interrupted):
        job.run([zoo], spec, tmp_path / "team", progress=stop)
    assert not (tmp_path / "team").exists()
    encoded: list[str] = []
    real = encode.encode
    monkeypatch.setattr(encode, "encode", lambda name, *rest: encoded.append(name) or real(name, *rest))
    before = len(list((tmp_path / "team.partial").glob("0*"))) if not after.startswith("reading") else 0
    outcome = job.run([zoo], spec, tmp_path / "team", resume=True)
    assert content(tmp_path / "team") == content(tmp_path / "calm")
    assert len(encoded) == 3 - before
    assert before >= (1 if "compressing" in after else 3 if "writing" in after else 0)
    assert not (tmp_path / "team.partial").exists()
    assert outcome.bundle is not None


def test_a_shard_that_is_damaged_is_made_again(zoo: Path, tmp_path: Path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what == "writing":
            raise Interrupted

    job.run([zoo], Spec("jd-full", rank=3), tmp_path / "calm")
    for damage in (b"", b"\x00" * 100):
        with pytest.raises(Interrupted):
            job.run([zoo], Spec("jd-full", rank=3), tmp_path / "team", progress=stop, force=True)
        (tmp_path / "team.partial" / "00001.safetensors").write_bytes(damage)
        job.run([zoo], Spec("jd-full", rank=3), tmp_path / "team", resume=True, force=True)
        assert content(tmp_path / "team") == content(tmp_path / "calm")


def test_a_finished_bundle_that_is_damaged_is_replaced_if_told_to(zoo: Path, tmp_path: Path) -> None:
    job.run([zoo], Spec("jd-full", rank=3), tmp_path / "calm")
    for file in ("bundle.json", "shared.safetensors"):
        job.run([zoo], Spec("jd-full", rank=3), tmp_path / file)
        (tmp_path / file / file).write_bytes((tmp_path / "calm" / file).read_bytes()[:-9])
        with pytest.raises(BundleError):
            job.run([zoo], Spec("jd-full", rank=3), tmp_path / file, resume=True)
        job.run([zoo], Spec("jd-full", rank=3), tmp_path / file, resume=True, force=True)
        assert content(tmp_path / file) == content(tmp_path / "calm")


def test_errors_that_a_resumed_run_would_meet_again_leave_nothing(
    zoo: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    big = {"base_model.model.b.q_proj.lora_A.weight": torch.full((4, 20), 1e30)}
    make_adapter("zoo/elk", modules=MODULES, tensors=big)
    with pytest.raises(CodecError, match=r"b\.q_proj: a value of .* does not fit"):
        job.run([zoo], Spec("jd-full", rank=3), tmp_path / "team")
    assert not (tmp_path / "team.partial").exists()


def test_an_input_that_changes_while_the_job_runs_stops_it(
    zoo: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    def change(what: str, done: int, total: int) -> None:
        if what == "reading" and done == total:
            make_adapter("zoo/dog", modules=MODULES, rank=5)

    with pytest.raises(InputError, match=r"dog: .*the file changed while it was in use"):
        job.run([zoo], Spec("jd-full", rank=3), tmp_path / "team", progress=change)
    assert [path.name for path in tmp_path.iterdir()] == ["zoo"]


def test_the_job_is_known_by_options_inputs_and_program(
    zoo: Path, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = Spec("jd-full", rank=2, clusters=1)

    def known(spec: Spec = usual, skip_bad: bool = False, only: str = "") -> str:
        return partial.identity(open_adapters([str(zoo / only)], skip_bad=skip_bad), spec)

    first = known()
    assert known() == first
    others = {
        known(Spec("jd-full", rank=3, clusters=1)),
        known(Spec("jd-full", rank=2, clusters=2)),
        known(Spec("jd-full", rank=2, clusters=1, dtype="bfloat16")),
        known(Spec("jd-full", rank=2, clusters=1, weights="trained")),
        known(only="ant"),
    }
    (zoo / "sick").mkdir()
    (zoo / "sick" / "adapter_config.json").write_text("{")
    others.add(known(skip_bad=True))
    (zoo / "sick" / "adapter_config.json").unlink()
    (zoo / "sick").rmdir()
    monkeypatch.setattr(lorazip, "__version__", "99")
    others.add(known())
    monkeypatch.undo()
    assert known() == first
    make_adapter("zoo/ant", modules=MODULES, seed=77)  # as large as before, written later
    others.add(known())
    assert len(others) == 8 and first not in others


def test_what_is_left_open_is_filled_in(zoo: Path) -> None:
    """auto: the bound of 0.1; the others: the paper's rule."""
    few = open_adapters([str(zoo)])
    assert Spec() == Spec("auto")
    assert job.resolve(few, Spec()) == Spec("auto", max_error=0.1)
    for given in (Spec(max_error=0.02), Spec(ratio=5.0), Spec(budget=10_000)):
        assert job.resolve(few, given) == given
    assert job.resolve(few, Spec("jd-full")) == Spec("jd-full", rank=4 // 2 + 7, clusters=1)
    assert job.resolve(few, Spec(method="svd")) == Spec(method="svd", energy=0.9)
    assert job.resolve(few, Spec(method="mean")) == Spec(method="mean", rank=4, clusters=1)
    assert job.resolve(few, Spec("jd-full", max_error=0.1)) == Spec("jd-full", max_error=0.1, clusters=1)
    assert job.resolve(few, Spec("jd-full", energy=0.5, clusters=3)) == Spec(
        "jd-full", energy=0.5, clusters=3
    )
    assert job.resolve(few, Spec("jd-full", rank=5, clusters=2)) == Spec("jd-full", rank=5, clusters=2)


def test_above_a_hundred_adapters_the_papers_rule_is_rank_16_and_clusters(make_adapter: MakeAdapter) -> None:
    """Five planted groups in spaces of their own: the rule takes the least number of bases with an error below 0.6."""
    generator = torch.Generator().manual_seed(5)
    left, right = (
        torch.linalg.qr(torch.randn(104, 100, generator=generator))[0].reshape(104, 5, 20) for _ in range(2)
    )
    for i in range(102):
        b = left[:, i % 5] @ torch.randn(20, 2, generator=generator)
        a = torch.randn(2, 20, generator=generator) @ right[:, i % 5].T
        tensors = {"base_model.model.m.lora_B.weight": b, "base_model.model.m.lora_A.weight": a.contiguous()}
        make_adapter(f"crowd/x{i:03d}", modules={"m": (104, 104)}, rank=2, tensors=tensors)
    inputs = open_adapters([str(make_adapter.root / "crowd")])
    factors = [adapter.low_rank("m") for adapter in inputs.adapters]
    codes = [encode.encode("m", factors, Spec("jd-full", rank=16, clusters=count)) for count in (1, 2, 3)]
    least = 1 + [float((c.residuals / c.energies).mean()) < 0.6 for c in codes].index(True)
    assert least > 1
    assert job.resolve(inputs, Spec("jd-full")) == Spec("jd-full", rank=16, clusters=least)
    assert job.resolve(inputs, Spec("jd-full", clusters=2, rank=4)) == Spec("jd-full", rank=4, clusters=2)


@pytest.mark.parametrize("spec", [Spec("jd-full", rank=3), Spec("auto", ratio=4.0)])
def test_more_than_one_thread_gives_the_same_order_of_modules(spec: Spec, zoo: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    bundles = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            job.run([zoo], spec, tmp_path / str(count))
            assert torch.get_num_threads() == count
            bundles.append(Bundle.open(tmp_path / str(count)))
    finally:
        torch.set_num_threads(threads)
    for other in bundles[1:]:
        assert [m.name for m in other.manifest.modules] == list(MODULES)
        for one, two in zip(bundles[0], other, strict=True):
            for module in one.modules:
                difference = dense(one.low_rank(module)) - dense(two.low_rank(module))
                assert float(difference.norm()) <= 1e-3 * float(dense(one.low_rank(module)).norm())


def test_the_python_api(zoo: Path, tmp_path: Path) -> None:
    bundle = lorazip.compress(
        [zoo / "ant", str(zoo / "cat")], lorazip.Spec("jd-full", rank=4), tmp_path / "team"
    )
    assert isinstance(bundle, lorazip.Bundle)
    assert bundle.names == ["ant", "cat"]
    again = lorazip.Bundle.open(tmp_path / "team").adapter("cat")
    assert isinstance(again, lorazip.BundleAdapter)
    factor = again.low_rank("a.q_proj")
    assert isinstance(factor, lorazip.LowRank)
    assert (factor.B.shape[0], factor.A.shape[1], factor.scale) == (24, 20, 1.0)
    assert lorazip.open_adapters([str(zoo)]).adapters[1].name == "bee"
    with pytest.raises(TargetError, match="exists"):
        lorazip.compress([zoo], output=tmp_path / "team")
    lorazip.compress([zoo], output=tmp_path / "team", force=True)
    with pytest.raises(lorazip.LorazipError):
        lorazip.compress([tmp_path / "nowhere"], output=tmp_path / "other")
    with pytest.raises(UsageError, match="rank must be"):
        lorazip.Spec("jd-full", rank=0)


def test_the_default_output_is_in_the_working_directory(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert lorazip.compress([zoo]).names == ["ant", "bee", "cat", "dog"]
    assert Bundle.open("bundle.lorazip").verify() == []


def test_numbers_beyond_a_method_end_in_words(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    """Squares of 1e-40 are below what float32 and float64 have: an eigendecomposition of them does not converge."""
    for name in ("ant", "bee", "cat"):
        factors = {}
        for module, (out, in_) in MODULES.items():
            random = torch.Generator().manual_seed(len(factors))
            factors[f"base_model.model.{module}.lora_B.weight"] = 1e-40 * torch.randn(
                out, 4, generator=random
            )
            factors[f"base_model.model.{module}.lora_A.weight"] = 1e-40 * torch.randn(
                4, in_, generator=random
            )
        make_adapter(f"tiny/{name}", modules=MODULES, tensors=factors)
    with pytest.raises(
        InputError, match=r"too large or too small to be computed on by this method .*--method svd"
    ):
        job.run([str(tmp_path / "tiny")], Spec("jd-diag"), tmp_path / "team")
    assert not (tmp_path / "team.partial").exists()
