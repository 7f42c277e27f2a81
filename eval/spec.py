"""What an evaluation is asked to do, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lorazip.errors import UsageError, printable
from lorazip.eval import gate
from lorazip.eval.metrics import METRICS
from lorazip.eval.prompts import TEMPLATE

AUTO = "auto"
AGREEMENT = "agreement"
PRIMARY = tuple(
    name for name, metric in METRICS.items() if metric.higher_is_better
)  # the gate asks what was lost
ALWAYS = ("exact_match", "loss")  # one forward pass gives both


@dataclass(frozen=True)
class EvalSpec:
    """How tasks are read, put and scored, and what the gate asks.

    Attributes:
        split: of the data that have splits.
        limit: examples of a task, None for all.
        columns: field -> column; see `tasks.read`.
        template, chat: see `prompts.Prompter`.
        definition: the instruction of tasks whose index has none.
        metric: the primary one: a name of PRIMARY, or `auto`: what the task's index says, else by the kind of its
            answers. Exact match and token loss are always given too.
        agreement: also measure how often an arm gives the original's own answer.
        max_tokens: examples of more tokens, prompt and answer, are left out; None for what the model takes.
        new_tokens: where answers are written, at most so many tokens.
        shots: a further arm, the base with so many solved examples before each question; 0 for none.
        min_retention, max_drop, point: see `gate`.
    """

    split: str = "test"
    limit: int | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    template: str = TEMPLATE
    chat: bool = False
    definition: str | None = None
    metric: str = AUTO
    agreement: bool = False
    max_tokens: int | None = None
    new_tokens: int = 512
    shots: int = 0
    min_retention: float | None = None
    max_drop: float | None = None
    point: bool = False

    @property
    def gated(self) -> bool:
        """Whether a gate was asked for."""
        return self.min_retention is not None or self.max_drop is not None

    def __post_init__(self) -> None:
        for name, least in {"limit": 1, "max_tokens": 2, "new_tokens": 1, "shots": 0}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
        if self.metric != AUTO and self.metric not in PRIMARY:
            raise UsageError(
                f"metric must be one of {', '.join((AUTO, *PRIMARY))}, not {printable(self.metric)!r}"
            )
        gate.check_thresholds(self.min_retention, self.max_drop)
