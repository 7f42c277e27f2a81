"""Where training may start: the source's factors as they are, or mapped by what both bases compute.

For a module m of the target, and the source's module of the same name at the same relative depth, with activations on
generic texts (centred, at aligned places)

    x_s ~ P x_t    (the source's input from the target's)        y_t ~ Q y_s    (the target's output from the source's)

are fitted by ridge regression, each penalty by texts held out. The mapped adapter does to the target what the source's
does to the source: D' = Q D P, that is B' = Q B and A' = A P. Its rank stays.

Q knows only what the source's module writes by itself. What B writes elsewhere is lost, however well Q predicts: half
of it in a layer with twice as many outputs as inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from lorazip.errors import Defect, InputError
from lorazip.eval.backend import HasFactors
from lorazip.generic import PROMPTS
from lorazip.transfer import activations
from lorazip.transfer.activations import Places
from lorazip.transfer.probe import shapes

HELD_OUT = 5  # every fifth text chooses the penalty: neighbours in one text are too much alike to judge by
PENALTIES = tuple(10.0**k for k in range(-9, 4))  # times the mean square of an input

Factors = dict[str, tuple[Tensor, Tensor]]  # module -> B (out, r) and A (r, in) float32, D = B A


@dataclass(frozen=True)
class Mapped:
    """Mapped factors.

    Attributes:
        inputs, outputs: mean over modules of the held-out R² of P and Q: 1 for a perfect map, 0 for none.
    """

    factors: Factors
    inputs: float
    outputs: float


def copied(adapter: HasFactors, target: Path) -> Factors:
    """The source's factors, where every one of them fits.

    Raises:
        InputError: naming the first that does not.
    """
    there = shapes(target)
    found = {}
    for name in adapter.modules:
        factor = adapter.low_rank(name)
        shape = factor.B.shape[0], factor.A.shape[1]
        if there.get(name) != shape:
            problem = (
                "is not in the target base" if name not in there else "has another shape in the target base"
            )
            raise InputError([Defect(adapter.name, name, "", problem, 'give train.warm = "map" or "none"')])
        found[name] = factor.scale * factor.B.float(), factor.A.float()
    return found


def mapped(adapter: HasFactors, source: Path, target: Path, device: torch.device) -> Mapped:
    """Map an adapter through activations; `device` computes them, of one base at a time.

    Raises:
        InputError: a module has no counterpart in the target; a base cannot be read.
    """
    pairs = activations.counterparts(adapter.modules, shapes(source), shapes(target))
    lost = activations.unmatched(adapter.modules, pairs)
    if lost:
        problem = "has no counterpart in the target base, and would be lost"
        raise InputError(
            [Defect(adapter.name, name, "", problem, 'give train.warm = "none"') for name in lost]
        )
    places = activations.aligned(source, target, PROMPTS)
    ours = activations.collect(source, PROMPTS, places[0], device, sorted(set(pairs.values())))
    theirs = activations.collect(target, PROMPTS, places[1], device, sorted(pairs))
    held = held_out(places[1])
    read: dict[tuple[int, int], tuple[Tensor, float]] = {}  # q, k and v read the same
    factors: Factors = {}
    scores: list[tuple[float, float]] = []
    for name, origin in pairs.items():
        factor = adapter.low_rank(origin)
        x, x_source = theirs.inputs[name], ours.inputs[origin]
        if (id(x), id(x_source)) not in read:
            read[id(x), id(x_source)] = ridge(x, x_source, held)
        p, first = read[id(x), id(x_source)]
        q, second = ridge(ours.outputs[origin], theirs.outputs[name], held)
        factors[name] = q @ (factor.scale * factor.B.float()), factor.A.float() @ p
        scores.append((first, second))
    return Mapped(factors, *(fmean(some) for some in zip(*scores, strict=True)))


def held_out(places: Places) -> Tensor:
    """(n,) bool: which places are of a held-out text, every HELD_OUT-th that has any."""
    texts = (some for some in places if some)
    return torch.tensor([i % HELD_OUT == 0 for i, some in enumerate(texts) for _ in some])


def ridge(x: Tensor, y: Tensor, held: Tensor) -> tuple[Tensor, float]:
    """W (q, p) of least ||Y - X W^T||^2 + penalty ||W||^2 on centred data, and R^2 of the penalty on what was held out.

    The penalty is chosen by places held out; W is then fitted to all. The singular vectors of X serve every penalty,
    also where there are fewer places than dimensions.

    Args:
        x: (n, p); y: (n, q) of the same places.
        held: (n,) bool.
    """
    part = _Solved(x[~held], y[~held])
    x_held, y_held = (x[held] - part.x_mean).double(), (y[held] - part.y_mean).double()
    whole = float(y_held.square().sum().clamp_min(1e-300))
    lost = {k: float((y_held - x_held @ part.at(k).T).square().sum()) for k in PENALTIES}
    best = min(PENALTIES, key=lost.__getitem__)
    return _Solved(x, y).at(best).float(), 1 - lost[best] / whole


class _Solved:
    """X = U S V^T, both sides centred; then W^T = V S (S^2 + penalty)^-1 U^T Y."""

    def __init__(self, x: Tensor, y: Tensor):
        self.x_mean, self.y_mean = x.mean(0), y.mean(0)
        u, self._values, self._right = torch.linalg.svd((x - self.x_mean).double(), full_matrices=False)
        self._cross = u.T @ (y - self.y_mean).double()  # (min(n, p), q)

    def at(self, penalty: float) -> Tensor:
        """(q, p), the penalty in units of the mean eigenvalue of X^T X."""
        squares = self._values.square()
        scale = penalty * squares.sum().clamp_min(1e-300) / self._right.shape[1]
        left: Tensor = (self._values / (squares + scale))[:, None] * self._cross
        return torch.mm(left.T, self._right)
