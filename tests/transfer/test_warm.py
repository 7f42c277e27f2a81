"""Starting points: copies, and maps that undo a change of the hidden space that is known."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lorazip.adapter import Adapter, open_adapter
from lorazip.errors import InputError
from lorazip.transfer import activations, warm

CPU = torch.device("cpu")
FILE = "model.safetensors"
FEW = {
    f"model.layers.0.self_attn.{kind}_proj" for kind in "qkv"
}  # they read no more than the letters of the texts
UNSEEN = (
    "The old man asked the children how far the river was from the house and why it was so cold.",
    "She paid the bill for her brother, and then the train left for the city without them.",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_base(tmp_path_factory.mktemp("source") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path) -> Adapter:
    """On all linear layers, with ranks and scales that differ."""
    ranks = {module: 2 + i % 5 for i, module in enumerate(tiny.MODULES)}
    make = tiny.MakeAdapter(base.parent)
    return open_adapter(make("ant", modules=tiny.MODULES, rank=ranks, alpha=6), "ant")


def turned(base: Path, directory: Path, seed: int = 3) -> tuple[Path, Tensor]:
    """The same function in another hidden space: every state h is R h, which norms without gain do not notice."""
    shutil.copytree(base, directory)
    random = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(tiny.HIDDEN, tiny.HIDDEN, generator=random))[0]
    weights = load_file(directory / FILE)
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = turn @ weight
        elif weight.ndim == 2:
            weights[name] = weight @ turn.T
    save_file({n: w.contiguous() for n, w in weights.items()}, directory / FILE, metadata={"format": "pt"})
    return directory, turn


def make_wide(directory: Path) -> Path:
    """Another width, depth and number of heads."""
    config = LlamaConfig(
        vocab_size=tiny.END + 1,
        hidden_size=96,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=3,
        bos_token_id=None,
        eos_token_id=tiny.END,
        pad_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(5)
        LlamaForCausalLM(config).save_pretrained(directory)
    tiny.make_tokenizer(directory)
    return directory


def update(adapter: Adapter, name: str) -> Tensor:
    factor = adapter.low_rank(name)
    return factor.scale * factor.B.float() @ factor.A.float()


def inputs(base: Path) -> dict[str, Tensor]:
    places = [[*range(1, len(text))] for text in UNSEEN]
    return activations.collect(base, UNSEEN, places, CPU, [*tiny.MODULES]).inputs


def far(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


# --- copies -----------------------------------------------------------------------------------------------------------


def test_copy_has_the_same_effect(base: Path, adapter: Adapter) -> None:
    found = warm.copied(adapter, base)
    assert set(found) == set(tiny.MODULES)
    for name, (b, a) in found.items():
        assert b.dtype == a.dtype == torch.float32
        torch.testing.assert_close(b @ a, update(adapter, name))


def test_copy_that_does_not_fit(adapter: Adapter, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ant: model\.layers\.0\.mlp\.down_proj: has another shape in the"):
        warm.copied(adapter, make_wide(tmp_path / "wide"))


# --- maps -------------------------------------------------------------------------------------------------------------


def reachable(base: Path, name: str) -> Tensor:
    """The projection (out, out) on what the module writes by itself: what else an update writes, no map can know."""
    weight = load_file(base / FILE)[f"{name}.weight"]
    return weight @ torch.linalg.pinv(weight)


def test_map_to_the_same_base_is_the_adapter_itself(base: Path, adapter: Adapter) -> None:
    found = warm.mapped(adapter, base, base, CPU)
    assert set(found.factors) == set(tiny.MODULES)
    assert found.inputs > 0.999 and found.outputs > 0.999
    seen = inputs(base)
    for name, (b, a) in found.factors.items():
        factor = adapter.low_rank(name)
        assert b.shape == factor.B.shape and a.shape == factor.A.shape
        assert b.dtype == a.dtype == torch.float32
        x, wanted = seen[name], seen[name] @ update(adapter, name).T
        if name not in FEW:
            assert far(x @ (b @ a).T, wanted @ reachable(base, name).T) < 0.06
        if name not in FEW and not name.endswith(("gate_proj", "up_proj")):  # these write all that they can
            assert far(x @ (b @ a).T, wanted) < 0.06


def test_map_undoes_a_turn_of_the_hidden_space(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    target, turn = turned(base, tmp_path / "turned")
    found = warm.mapped(adapter, base, target, CPU)
    assert found.inputs > 0.999 and found.outputs > 0.999
    ours, theirs = inputs(base), inputs(target)
    for name in sorted(set(found.factors) - FEW):
        b, a = found.factors[name]
        wanted = ours[name] @ update(adapter, name).T @ reachable(base, name).T
        if name.endswith(("o_proj", "down_proj")):  # they write into the hidden space
            wanted = wanted @ turn.T
        assert far(theirs[name] @ (b @ a).T, wanted) < 0.06
        assert (
            far(theirs[name] @ update(adapter, name).T, wanted) > 0.5
        )  # as they are, the factors do something else


def test_map_to_another_width_and_depth(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    target = make_wide(tmp_path / "wide")
    found = warm.mapped(adapter, base, target, CPU)
    assert set(found.factors) == {
        f"model.layers.{layer}.{kind}" for layer in range(3) for kind in tiny.LINEARS
    }
    ranks = {0: 0, 1: 0, 2: 1}  # the target's layer -> the source's
    for name, (b, a) in found.factors.items():
        layer = activations.layer_of(name)
        assert layer is not None
        origin = name.replace(f".{layer}.", f".{ranks[layer]}.")
        assert b.shape[1] == a.shape[0] == adapter.low_rank(origin).A.shape[0]
    assert {name: (len(b), a.shape[1]) for name, (b, a) in found.factors.items()} == {
        name: shape for name, shape in warm.shapes(target).items() if name != "lm_head"
    }
    assert (
        found.inputs < 0.99 and found.outputs < 0.99
    )  # random models of different seeds are not one another


def test_kind_that_the_target_lacks_would_be_lost(base: Path, tmp_path: Path) -> None:
    modules = {tiny.Q0: tiny.MODULES[tiny.Q0], "lm_head": (tiny.END + 1, tiny.HIDDEN)}
    adapter = open_adapter(tiny.MakeAdapter(tmp_path)("bee", modules=modules), "bee")
    with pytest.raises(
        InputError, match=r'bee: lm_head: has no counterpart .* \(give train\.warm = "none"\)'
    ):
        warm.mapped(adapter, base, make_wide(tmp_path / "wide"), CPU)


def test_nan_is_refused(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "bad")
    weights = load_file(tmp_path / "bad" / FILE)
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, tmp_path / "bad" / FILE, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"bad: model\.layers\.1\.mlp.*NaN"):
        warm.mapped(adapter, base, tmp_path / "bad", CPU)


# --- ridge ------------------------------------------------------------------------------------------------------------


def reference(x: Any, y: Any, held: Any) -> tuple[Any, float]:
    """Normal equations in numpy, one penalty after the other."""

    def solved(x: Any, y: Any, penalty: float) -> tuple[Any, Any, Any]:
        xm, ym = x.mean(0), y.mean(0)
        gram = (x - xm).T @ (x - xm)
        scale = penalty * np.trace(gram) / len(gram)
        return np.linalg.solve(gram + scale * np.eye(len(gram)), (x - xm).T @ (y - ym)).T, xm, ym

    scores = {}
    for penalty in warm.PENALTIES:
        w, xm, ym = solved(x[~held], y[~held], penalty)
        rest = y[held] - ym - (x[held] - xm) @ w.T
        scores[penalty] = 1 - (rest**2).sum() / ((y[held] - ym) ** 2).sum()
    best = max(scores, key=scores.__getitem__)
    return solved(x, y, best)[0], scores[best]


@pytest.mark.parametrize(("n", "p", "noise"), [(60, 7, 0.0), (60, 7, 1.0), (40, 90, 0.3), (60, 59, 3.0)])
def test_ridge_is_that_of_the_normal_equations(n: int, p: int, noise: float) -> None:
    random = torch.Generator().manual_seed(n + p)
    x = torch.randn(n, p, generator=random) * torch.linspace(0.1, 3, p) + 5
    y = x @ torch.randn(p, 4, generator=random) + noise * torch.randn(n, 4, generator=random) - 2
    held = torch.arange(n) % 4 == 1
    w, score = warm.ridge(x, y, held)
    wanted, best = reference(*(t.double().numpy() for t in (x, y)), held.numpy())
    assert w.shape == (4, p) and w.dtype == torch.float32
    torch.testing.assert_close(w.double(), torch.from_numpy(wanted), atol=1e-4, rtol=1e-4)
    assert score == pytest.approx(best, abs=1e-5)
    assert score > 0.999 if noise == 0 else score < 0.999


def test_ridge_on_noise_predicts_nothing() -> None:
    random = torch.Generator().manual_seed(0)
    x, y = torch.randn(400, 30, generator=random), torch.randn(400, 5, generator=random)
    w, score = warm.ridge(x, y, torch.arange(400) % 5 == 0)
    assert abs(score) < 0.02 and float(w.norm()) < 0.4


def test_whole_texts_are_held_out() -> None:
    places = [[1, 2], [], [3], [1, 2, 3], [5], [6], [7, 8], [9]]
    assert warm.held_out(places).tolist() == [
        True,
        True,
        False,
        *[False] * 3,
        False,
        False,
        True,
        True,
        False,
    ]
