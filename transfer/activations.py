"""What two bases compute on the same texts, place by place, though their tokens differ.

A token stands for the text up to its end. Places where a token of either tokenizer ends at the same character are
compared; the first of a text is left out, for attention that has nowhere to go goes there, and its states dwarf others.
The bases are read one after the other and are never in memory together. What is kept takes at most PLACES rows of
float32 for every layer, or for every input and output that was asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from lorazip import base as bases
from lorazip.errors import Defect, InputError

PLACES = 1024  # at most, spread over all texts: a Gram matrix of them takes 8 MB
LEAST = 64  # fewer say little: the error of a CKA falls with their number
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")

Places = list[list[int]]  # for every text the tokens that are looked at
Shapes = dict[str, tuple[int, int]]  # linear layer -> (out, in)


@dataclass(frozen=True)
class Activations:
    """Of n places.

    Attributes:
        states: after every layer (n, hidden), float32, the last behind the final norm; none where modules are wanted.
        inputs, outputs: module -> (n, in) and (n, out) of linear layers. Modules that read the same have one tensor.
    """

    states: tuple[Tensor, ...]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


def aligned(source: Path, target: Path, texts: Sequence[str], most: int = PLACES) -> tuple[Places, Places]:
    """Places of both tokenizers that end at the same characters, at most `most` in all, evenly thinned.

    Raises:
        InputError: a tokenizer cannot say where its tokens lie, or the two seldom meet.
    """
    ends = [_ends(base, texts) for base in (source, target)]
    shared = [sorted(a.keys() & b.keys()) for a, b in zip(*ends, strict=True)]
    flat = [
        (i, end) for i, some in enumerate(shared) for end in some if min(ends[0][i][end], ends[1][i][end]) > 0
    ]
    if len(flat) < LEAST:
        problem = (
            f"its tokens end where those of {source} do at {len(flat)} places, at least {LEAST} are needed"
        )
        raise InputError([Defect(str(target), problem=problem, remedy="are both tokenizers whole?")])
    step = -(-len(flat) // most)
    found: tuple[Places, Places] = [[] for _ in texts], [[] for _ in texts]
    for i, end in flat[::step]:
        for side in (0, 1):
            found[side][i].append(ends[side][i][end])
    return found


def _ends(base: Path, texts: Sequence[str]) -> list[dict[int, int]]:
    """For every text: the character where a token ends -> its place among the tokens."""
    tokenizer = bases.load_tokenizer(base)
    found = []
    for text in texts:
        try:
            offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        except (NotImplementedError, ValueError, KeyError) as error:
            problem = "its tokenizer cannot say where in a text its tokens lie (it is none of the fast ones)"
            raise InputError(
                [Defect(str(base), problem=problem, remedy="save tokenizer.json beside it")]
            ) from error
        found.append(_whole(offsets))
    return found


def _whole(offsets: Sequence[tuple[int, int]]) -> dict[int, int]:
    """Ends of tokens after which no token goes back: of bytes of one character the last is where it is known."""
    found: dict[int, int] = {}
    least: float = torch.inf  # where tokens further on begin
    for place, (start, end) in reversed(list(enumerate(offsets))):
        if end > start:  # special tokens are no text
            if end <= least:
                found[end] = place
            least = min(least, start)
    return found


@torch.inference_mode()
def collect(
    base: Path,
    texts: Sequence[str],
    places: Places,
    device: torch.device,
    modules: Sequence[str] | None = None,
) -> Activations:
    """Run a base over the texts.

    Args:
        modules: linear layers whose inputs and outputs are wanted; None for the states after every layer instead.
    Raises:
        InputError: it has no such module, or computes what is no number.
    """
    model = bases.load(base, torch.float32, device)
    tokenizer = bases.load_tokenizer(base)
    states, inputs, outputs = (_Rows(sum(map(len, places))) for _ in range(3))
    same: dict[str, str] = {}  # module -> the first that reads the same
    last: list[tuple[str, Tensor]] = []
    for name in modules or ():
        _module(model, name, base).register_forward_hook(_hook(name, inputs, outputs, same, last))
    for text, wanted in zip(texts, places, strict=True):
        if wanted:
            ids = torch.tensor([tokenizer(text)["input_ids"]], device=device)
            for rows in (states, inputs, outputs):
                rows.begin(wanted, ids.shape[1])
            # Without the head, which would take most of a small model's time.
            made = model.base_model(ids, output_hidden_states=modules is None, use_cache=False)
            for layer, state in enumerate((made.hidden_states or ())[1:]):
                states.put(str(layer), state)
    del model
    bases.free(device)
    for rows in (states, inputs, outputs):
        rows.check(base)
    for name in modules or ():
        if name not in outputs.kept:
            problem = "is not run on every token, so that it has no map"
            raise InputError([Defect(str(base), name, "", problem, "leave it out")])
    return Activations(
        tuple(states.kept.values()),
        {name: inputs.kept[same[name]] for name in modules or ()},
        outputs.kept,
    )


@dataclass
class _Rows:
    """Tables of `total` rows that are filled text by text."""

    total: int
    kept: dict[str, Tensor] = field(default_factory=dict)
    wanted: Sequence[int] = ()
    length: int = 0
    filled: int = 0

    def begin(self, wanted: Sequence[int], length: int) -> None:
        """The next text has so many tokens, and these are looked at."""
        self.filled += len(self.wanted)
        self.wanted, self.length = wanted, length

    def put(self, name: str, tensor: Tensor) -> None:
        """Keep these rows of (1, length, width)."""
        if tensor.ndim != 3 or tensor.shape[1] != self.length:
            return  # experts see some tokens only
        if name not in self.kept:
            self.kept[name] = torch.empty(self.total, tensor.shape[2])
        self.kept[name][self.filled : self.filled + len(self.wanted)] = tensor[0, self.wanted]

    def check(self, base: Path) -> None:
        """Raises InputError where something is no number."""
        for name, table in self.kept.items():
            if not bool(table.isfinite().all()):
                where = f"layer {name}" if name.isdecimal() else name
                problem = "computes NaN or infinities on plain texts"
                remedy = "is the file damaged? copy or download it again"
                raise InputError([Defect(str(base), where, "", problem, remedy)])


def _hook(
    name: str, inputs: _Rows, outputs: _Rows, same: dict[str, str], last: list[tuple[str, Tensor]]
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    """Keeps what a module reads, unless the module before it read the same tensor, and what it writes."""

    def hook(module: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        if not last or last[0][1] is not given[0]:
            last[:] = [(name, given[0])]
            inputs.put(name, given[0])
        same[name] = last[0][0]
        outputs.put(name, made)

    return hook


def _module(model: nn.Module, name: str, base: Path) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        problem = "is not in the base model"
        raise InputError([Defect(str(base), name, "", problem, "name the right base")]) from error


def layer_of(module: str) -> int | None:
    """The number of the layer that a module is in; None outside of them."""
    found = _LAYER.search(module)
    return None if found is None else int(found[1])


def at_depth(layer: int, layers: int, others: int) -> int:
    """The layer of another model at the same relative depth."""
    return round(layer * (others - 1) / max(layers - 1, 1))


def counterparts(modules: Iterable[str], ours: Shapes, theirs: Shapes) -> dict[str, str]:
    """Module of the target -> the adapter's module that stands for it: at the same relative depth, of the same name.

    The name is what follows the layer's number, or where the target has none such its last part, if only one has that.

    Args:
        modules: of the adapter.
        ours, theirs: all linear layers of source and target.
    """
    depth, others = (1 + max((layer_of(n) or 0 for n in some), default=0) for some in (ours, theirs))
    own: dict[int | None, list[str]] = {}
    for name in modules:
        own.setdefault(layer_of(name), []).append(name)
    found = {}
    for name in theirs:
        layer = layer_of(name)
        if layer is not None:
            here = own.get(at_depth(layer, others, depth), [])
            alike = [m for m in here if _after_layer(m) == _after_layer(name)]
            alike = alike or [m for m in here if m.rpartition(".")[2] == name.rpartition(".")[2]]
            if len(alike) == 1:
                found[name] = alike[0]
    return found


def unmatched(modules: Iterable[str], pairs: Mapping[str, str]) -> list[str]:
    """Kinds of modules (self_attn.q_proj) that the adapter has and nothing in the target stands for."""
    return sorted({_after_layer(name) for name in modules} - {_after_layer(name) for name in pairs.values()})


def _after_layer(module: str) -> str:
    found = _LAYER.search(module)
    return module if found is None else module[found.end() :]
