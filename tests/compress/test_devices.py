"""Tensors of two devices never meet: the mathematics run on a pretended GPU, for there is none where the tests run.

A mode of torch sees every call. A tensor that was moved to "cuda", or made from one that was, is marked; it stays in
main memory, but says that it is on the GPU, and a call that mixes it with an unmarked one fails as it would there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from planned import task
from reference import errors, related
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from lorazip.adapter import LowRank
from lorazip.compress import cluster, frame, joint, quantize
from lorazip.compress.auto import Plan
from lorazip.compress.curves import Curve, curve
from lorazip.compress.encode import ModuleCode, encode, prepare
from lorazip.compress.methods import METHODS
from lorazip.compress.profile import INT8, ORIGINAL, WHOLE, Bases, Basis, Profile
from lorazip.compress.sides import encode_planned
from lorazip.compress.spec import Spec

GPU, CPU = torch.device("cuda"), torch.device("cpu")


def place(tensor: Tensor) -> torch.device:
    return GPU if getattr(tensor, "on_gpu", False) else CPU


class Pretended(TorchFunctionMode):
    """Marks tensors that would be on the GPU and refuses to mix them with others."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            return place(tensors[0])
        name = getattr(func, "__name__", "")
        target = self._target(name, tensors, args, kwargs)
        args, kwargs = tree_map(lambda x: CPU if isinstance(x, torch.device) else x, (tuple(args), kwargs))
        if kwargs.get("device") is not None:
            kwargs["device"] = CPU
        result = func(*args, **kwargs)
        if name in ("to", "cpu") and result is tensors[0] and place(result) != target:
            result = result.clone()  # a move makes a new tensor
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                tensor.on_gpu = target == GPU  # type: ignore[attr-defined]
        return result

    def _target(
        self, name: str, tensors: list[Tensor], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> torch.device:
        """Where the result lies; raises where operands lie apart."""
        if name == "cpu":
            return CPU
        given = [x for x in (*args, kwargs.get("device")) if isinstance(x, torch.device)]
        if name == "to":
            others = [place(t) for t in tensors[1:]]
            return (given or others or [place(tensors[0])])[0]
        if given:
            if given[0] == GPU and kwargs.get("generator") is not None:
                raise RuntimeError("a generator of the CPU on the GPU")
            return given[0]
        if name == "numpy" and place(tensors[0]) == GPU:
            raise RuntimeError("numpy of a tensor on the GPU")
        if not tensors:
            return CPU
        if name in ("__getitem__", "__setitem__") and place(tensors[0]) == GPU:
            return GPU  # an index may lie in main memory, and so may a scalar
        places = {place(t) for t in tensors if t.ndim > 0} or {place(t) for t in tensors}
        if len(places) > 1:
            raise RuntimeError(f"{name}: operands on two devices")
        return places.pop()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Spec, "torch_device", lambda self: GPU)
    with Pretended():
        yield


def small() -> list[LowRank]:
    zero = LowRank(torch.zeros(20, 2), torch.ones(2, 30), 1.0)
    return [*related((3, 2, 4, 3, 3, 2), 20, 30, clusters=2, noise=0.2), zero]


CASES: list[dict[str, Any]] = [
    {"rank": 4},
    {"rank": 4, "clusters": 3},
    {"rank": 18},
    {"rank": 4, "max_error": 0.1},
    {"max_error": 0.3, "clusters": 2},
    {"energy": 0.6},
    {"rank": 4, "weights": "trained"},
]


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("method", ["svd", *METHODS])
def test_what_is_encoded_on_a_gpu_is_what_is_encoded_without(
    monkeypatch: pytest.MonkeyPatch, method: str, options: dict[str, Any]
) -> None:
    options = {"clusters": 1, **options}
    if method == "mean" and "energy" in options:
        options["energy"] = 0.05  # a mean does not hold much more
    if method == "svd":
        del options["clusters"]
    monkeypatch.setattr(joint, "ROUNDS", 4)  # every call is seen by a mode written in Python: slow
    factors = small()
    plain = encode("m", factors, Spec(method, **options, device="cpu"))
    monkeypatch.setattr(Spec, "torch_device", lambda self: GPU)
    with Pretended():
        code = encode("m", factors, Spec(method, **options))
        places = [place(t) for parts in (*code.shared, *code.own) for t in parts]
        places += [place(t) for t in (code.residuals, code.energies, code.spectrum)]
    assert set(places) == {CPU}  # what goes to disk has left the GPU
    assert code.forms == plain.forms and code.layout == plain.layout
    assert torch.allclose(errors(code, factors), errors(plain, factors), atol=1e-6)


FEW_BITS: list[dict[str, Any]] = [
    {"rank": 4, "bits": 3},
    {"rank": 4, "bits": 2.5, "group": 8},
    {"max_error": 0.2, "bits": 4},
]


@pytest.mark.parametrize("options", FEW_BITS, ids=str)
@pytest.mark.parametrize("method", ["svd", *METHODS])
def test_few_bits_on_a_gpu_are_those_without(
    monkeypatch: pytest.MonkeyPatch, method: str, options: dict[str, Any]
) -> None:
    options = {**options, **({} if method == "svd" else {"clusters": 1})}
    monkeypatch.setattr(joint, "ROUNDS", 4)
    monkeypatch.setattr(quantize, "ROUNDS", 1)
    factors = small()
    plain = encode("m", factors, Spec(method, **options, device="cpu"))
    monkeypatch.setattr(Spec, "torch_device", lambda self: GPU)
    with Pretended():
        code = encode("m", factors, Spec(method, **options))
        places = {place(t) for parts in (*code.shared, *code.own) for t in parts}
    assert places <= {CPU}
    assert code.forms == plain.forms and code.layout == plain.layout
    assert torch.allclose(code.residuals, plain.residuals, rtol=1e-3)


def test_factors_that_cancel_and_large_modules(monkeypatch: pytest.MonkeyPatch, gpu: None) -> None:
    """The paths that small healthy modules do not take: QR of a bad gauge, Krylov steps, a sketch, float32 frames."""
    bad = related((4,), 20, 30)[0]
    bad = LowRank(bad.B * torch.logspace(0, 5, 4), bad.A / torch.logspace(0, 5, 4)[:, None] + 1e-3, 1.0)
    encode("m", [bad, *small()], Spec("jd-full", rank=3, clusters=1))
    monkeypatch.setattr(frame, "PRECISE", 0)
    many = related((8,) * 30, 192, 384, clusters=3)
    encode("m", many, Spec("jd-full", rank=10, clusters=1))
    monkeypatch.setattr(cluster, "EXACT_ROWS", 10)
    monkeypatch.setattr(cluster, "SKETCH", 64)
    module, _ = prepare("m", many, Spec("jd-full", rank=10))
    args = module.stack, module.weights, module.energies, 10
    assert 1 <= cluster.paper_clusters(METHODS["jd-full"], *args) <= 30


def test_the_pretended_gpu_notices_what_a_real_one_would(gpu: None) -> None:
    here, there = torch.ones(3), torch.ones(3).to(GPU)
    assert there.device == GPU and here.device == CPU and (there * 2).sum().device == GPU
    with pytest.raises(RuntimeError, match="two devices"):
        here + there
    with pytest.raises(RuntimeError, match="two devices"):
        torch.cat([here, there])
    with pytest.raises(RuntimeError, match="two devices"):
        here.index_copy(0, torch.tensor([0, 1, 2]).to(GPU), here)
    with pytest.raises(RuntimeError, match="numpy"):
        there.numpy()
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, device=GPU, generator=torch.Generator())
    assert there[torch.tensor([0, 1])].device == GPU and there.cpu().device == CPU
    assert (there + torch.tensor(1.0)).device == GPU


def test_auto_on_a_gpu_is_auto_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves, shared bases, rows of every kind and loadings."""
    monkeypatch.setattr(joint, "ROUNDS", 4)
    factors = [*related((4, 3, 5, 4, 4, 2), 20, 30), small()[-1]]
    bases = Bases(Basis(4, 3), Basis(4, 2))
    profiles = (
        Profile((2.0, 2.0, 0.0), (1.0, 0.5, 0.5), (True, True)),
        Profile((WHOLE, INT8), (4.0, 0.0), (False, True)),
        Profile((INT8,), (WHOLE,), (True, False)),
        *[Profile((1.5,), (2.5,))] * 2,
        ORIGINAL,
        Profile((2.0,), (2.0,)),  # of zeros
    )
    one = task("m", factors, Plan(bases, profiles))

    def run() -> tuple[Curve, ModuleCode]:
        found = curve(prepare("m", factors, Spec())[0], range(7))
        (code,) = encode_planned([one], Spec())
        return found, code

    known, plain = run()
    monkeypatch.setattr(Spec, "torch_device", lambda self: GPU)
    with Pretended():
        there, code = run()
        parts = [t for parts in (*code.shared, *code.own) for t in parts]
        others = [
            code.residuals,
            code.energies,
            code.spectrum,
            there.sigma,
            there.original_bytes,
            *there.outside,
        ]
        assert {place(t) for t in (*parts, *others)} == {CPU}
    assert code.forms == plain.forms and code.layout == plain.layout
    assert torch.allclose(code.residuals, plain.residuals, rtol=1e-3)
    assert torch.allclose(there.sigma, known.sigma)
