"""Means, differences and ratios of scores, paired by example, with bootstrap intervals.

The tasks are what they are; their examples are a sample. So an interval resamples the examples of every task and keeps
the tasks (stratified percentile bootstrap, Efron & Tibshirani 1993 §8, §13). From n examples n - 1 are drawn, as in
the sampling of strata (McCarthy & Snowden 1985): n draws would give (n - 1)/n of the variance, which is small for one
task but the same for a mean over any number of small ones. A task of a single example shows no spread of its own.

A bootstrap of ten right answers claims certainty, and so does one of ten pairs that agree. Where scores are bounded by
0 and 1, every resample is therefore drawn from the data and a little pseudo-data: one best and one worst example for a
mean (the idea of Agresti & Coull 1998), one fix and one break for a pair of arms (Bonett & Price 2012: +1 on each
discordant cell). They are one for ALL tasks together, shared out in proportion to 1/n_t, the task's part in the
variance of the mean over tasks. So n right answers give about [1 - 3/n, 1], in one task or in a hundred, and a hundred
small tasks are not drowned in pseudo-data. It widens the interval only; every estimate is that of the data.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lorazip.eval.results import Interval

LEVEL = 0.95
RESAMPLES = 10_000
SEED = 0
MIN_LIFT = 0.10  # what an adapter must add to the base, so that keeping it can be measured
RIGHT = 0.5  # from this score on an answer is right

_CHUNK = 2**16  # random numbers at a time: they stay in the cache
_ROUNDING = 1e-9

Floats = NDArray[np.float64]

# Pseudo-examples, a row each. Columns: a mean or a difference; arm and original; arm - base and original - base.
# The last are the six ways in which (arm, original, base) in {0, 1} can differ, each with weight 1/2: so each of the
# three differences gets one +1 and one -1 in all, as a pair of arms does.
_BEST_WORST = np.array([[1.0], [0.0]])
_UP_DOWN = np.array([[1.0], [-1.0]])
_FIX_BREAK = np.array([[1.0, 0.0], [0.0, 1.0]])
_THREE_ARMS = np.array([[1.0, 0], [0, 1], [-1, -1], [-1, 0], [0, -1], [1, 1]])
_NONE = np.empty((0, 0))


def mean(scores: ArrayLike, bounded: bool = True) -> Interval:
    """The mean score of one arm on one task."""
    return macro([scores], bounded)


def macro(rows: Sequence[ArrayLike], bounded: bool = True) -> Interval:
    """The mean over tasks of the mean score: (1/T) Σ_t (1/n_t) Σ_i x_ti.

    Args:
        rows: for every task its (n_t,) scores.
        bounded: scores lie in [0, 1]; otherwise (a token loss) there are no pseudo-examples.
    Raises:
        ValueError: no task, no example, a score that is not finite, or out of bounds.
    """
    tasks = _paired(bounded, rows)
    sums = _resampled(tasks, _BEST_WORST if bounded else _NONE)
    return _interval(_total(tasks, 0) / len(tasks), sums[:, 0] / len(tasks), tasks)


def difference(
    arm_rows: Sequence[ArrayLike], original_rows: Sequence[ArrayLike], bounded: bool = True
) -> Interval:
    """Arm - original, mean over tasks, paired by example. One task is a list of length one.

    Raises:
        ValueError: as `macro`; or the rows are not pairs.
    """
    tasks = [pair[:, :1] - pair[:, 1:] for pair in _paired(bounded, arm_rows, original_rows)]
    sums = _resampled(tasks, _UP_DOWN if bounded else _NONE)
    return _interval(_total(tasks, 0) / len(tasks), sums[:, 0] / len(tasks), tasks)


def flips(arm: ArrayLike, original: ArrayLike) -> tuple[int, int, float]:
    """Examples that only the arm got right, that only the original did, and McNemar's exact p-value.

    If a discordant pair is as likely to be a break as a fix, breaks ~ Binomial(fixes + breaks, 1/2); two-sided.
    """
    from scipy.stats import binomtest  # takes a second to import

    (pair,) = _paired(False, [arm], [original])
    right = pair >= RIGHT
    fixes = int((right[:, 0] & ~right[:, 1]).sum())
    breaks = int((right[:, 1] & ~right[:, 0]).sum())
    return fixes, breaks, float(binomtest(breaks, fixes + breaks).pvalue) if fixes + breaks else 1.0


def kept(
    arm_rows: Sequence[ArrayLike], original_rows: Sequence[ArrayLike], base_rows: Sequence[ArrayLike]
) -> tuple[Interval | None, list[int]]:
    """Σ arm / Σ original of task means, over the tasks whose original is at least `MIN_LIFT` above the base.

    Which tasks those are is decided once, on the data, and not again in every resample.

    Returns:
        The ratio, None without such a task; and the indices of those tasks.
    Raises:
        ValueError: as `difference`; all scores lie in [0, 1].
    """
    triples = _paired(True, arm_rows, original_rows, base_rows)
    chosen = [
        i for i, task in enumerate(triples) if task[:, 1].mean() - task[:, 2].mean() >= MIN_LIFT - _ROUNDING
    ]
    tasks = [triples[i][:, :2] for i in chosen]
    return (_ratio(tasks, _FIX_BREAK) if tasks else None), chosen


def lift(
    arm_rows: Sequence[ArrayLike],
    original_rows: Sequence[ArrayLike],
    base_rows: Sequence[ArrayLike],
    bounded: bool = True,
) -> Interval | None:
    """(Σ arm - Σ base) / (Σ original - Σ base) of task means; None unless original and base differ for certain.

    For certain: the interval of `difference(original, base)` excludes zero, on either side of it. A loss falls.

    Raises:
        ValueError: as `difference`.
    """
    triples = _paired(bounded, arm_rows, original_rows, base_rows)
    gain = difference(original_rows, base_rows, bounded)
    if gain.low <= _ROUNDING and gain.high >= -_ROUNDING:
        return None
    sign = 1.0 if gain.estimate > 0 else -1.0
    tasks = [sign * (task[:, :2] - task[:, 2:]) for task in triples]
    return _ratio(tasks, _THREE_ARMS if bounded else _NONE, weight=0.5)


def _paired(bounded: bool, *arms: Sequence[ArrayLike]) -> list[Floats]:
    """For every task its (n_t, arms) scores.

    Raises:
        ValueError: they are not what `macro` and `difference` ask for.
    """
    if len({len(rows) for rows in arms}) > 1:
        raise ValueError(f"arms of {[len(rows) for rows in arms]} tasks are not paired")
    if not arms[0]:
        raise ValueError("there is no task to compare")
    tasks = []
    for i, rows in enumerate(zip(*arms, strict=True)):
        scores = [np.asarray(row, dtype=np.float64) for row in rows]
        if any(row.ndim != 1 for row in scores):
            raise ValueError(f"task {i}: the scores of an arm are one row, not of shape {scores[0].shape}")
        if len({len(row) for row in scores}) > 1:
            raise ValueError(f"task {i}: {[len(row) for row in scores]} scores are not paired by example")
        if not len(scores[0]):
            raise ValueError(f"task {i}: there is no example to compare")
        task = np.stack(scores, axis=1)
        if not np.isfinite(task).all():
            raise ValueError(f"task {i}: a score is not a finite number")
        if bounded and (task.min() < 0 or task.max() > 1):
            raise ValueError(f"task {i}: a bounded score lies outside 0 to 1")
        tasks.append(task)
    return tasks


def _total(tasks: Sequence[Floats], column: int) -> float:
    """Σ_t of task means."""
    return float(sum(sorted(float(task[:, column].mean()) for task in tasks)))


def _resampled(tasks: Sequence[Floats], pseudo: Floats, weight: float = 1.0) -> Floats:
    """Σ_t of task means in every resample.

    Args:
        tasks: for each its (n_t, k) data.
        pseudo: (p, k) pseudo-examples, to be shared among the tasks; may be none.
        weight: how many examples each of them counts for.
    Returns:
        (RESAMPLES, k); the same for every order of tasks and of examples.
    """
    random = np.random.default_rng(SEED)
    # In an order of their own: the interval must not depend on the names of adapters.
    ordered = sorted((task[np.lexsort(task.T)] for task in tasks), key=lambda task: task.tolist())
    shares = np.array([1 / len(task) for task in ordered])
    masses = weight * len(pseudo) * shares / shares.sum()
    columns = ordered[0].shape[1]
    sums = np.zeros((RESAMPLES, columns))
    for task, mass in zip(ordered, masses.tolist(), strict=True):
        pool = np.vstack([task, pseudo.reshape(-1, columns)]).T.copy()  # (k, n + p)
        draws = max(len(task) - 1, 1)
        step = max(_CHUNK // draws, 1)
        for first in range(0, RESAMPLES, step):
            part = sums[first : first + step]
            index = random.integers(len(task), size=(len(part), draws))
            if len(pseudo):
                # A draw is a pseudo-example with probability mass / (n + mass).
                replaced = random.binomial(draws, mass / (len(task) + mass), size=len(part))
                gone = np.arange(draws) < replaced[:, None]  # draws are in random order: the first will do
                index[gone] = len(task) + random.integers(len(pseudo), size=replaced.sum())
            # Column by column: ten times as fast as rows at a time.
            part += np.stack([np.take(column, index).mean(axis=1) for column in pool], axis=1)
    return sums


def _interval(estimate: float, resampled: Floats, tasks: Sequence[Floats]) -> Interval:
    """The percentile interval, stretched to the estimate where pseudo-data or rounding push it aside."""
    low, high = _ends(resampled, resampled)
    return Interval(estimate, min(low, estimate), max(high, estimate), sum(len(task) for task in tasks))


def _ends(lower: Floats, upper: Floats) -> tuple[float, float]:
    """Percentiles that are values of the resamples: the outer of two neighbours, never a number between them."""
    tail = (1 - LEVEL) / 2
    low = np.quantile(lower, tail, method="lower")
    high = np.quantile(upper, 1 - tail, method="higher")
    return float(low), float(high)


def _ratio(tasks: Sequence[Floats], pseudo: Floats, weight: float = 1.0) -> Interval:
    """Σ first column / Σ second column of task means; the denominator of the data is above zero.

    A resample whose denominator is not above zero says nothing about the ratio. It counts as the smallest ratio of all
    others at the lower end and as the largest at the upper end: the interval gets wider, and stays finite.
    """
    above, below = _resampled(tasks, pseudo, weight).T
    usable = below > _ROUNDING
    ratios = above[usable] / below[usable]
    silent = np.ones((~usable).sum())
    low, high = _ends(
        np.concatenate([ratios, silent * ratios.min()]), np.concatenate([ratios, silent * ratios.max()])
    )
    estimate = _total(tasks, 0) / _total(tasks, 1)
    return Interval(estimate, min(low, estimate), max(high, estimate), sum(len(task) for task in tasks))
