"""The frontier of `--method auto`: what each ratio costs in error, from one survey of the adapters.

For every ratio the bundle is made in BUNDLE.partial, measured, and discarded; a dry run predicts it instead. Whoever
calls can have the bundles judged before they go: this file knows nothing of evaluation.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lorazip import unfinished
from lorazip.compress import job, partial
from lorazip.compress.assemble import DirectorySink, SizeSink, adapter_errors, assemble
from lorazip.compress.curves import Curve
from lorazip.compress.job import Progress
from lorazip.compress.spec import Spec
from lorazip.errors import TargetError, UndecidedError, UsageError
from lorazip.files import write_bytes
from lorazip.sources import Inputs, open_adapters

SCHEMA = "lorazip.frontier/1"
RATIOS = (4.0, 8.0, 16.0, 32.0, 64.0)
FRONTIER, PICTURE = "frontier.json", "frontier.svg"


@dataclass(frozen=True)
class Point:
    """One ratio of the frontier.

    Attributes:
        asked: the ratio that was asked for.
        ratio: bytes of the originals over those of the bundle; None, as all that follows, where none is so small.
        bundle_bytes: every byte of the bundle.
        mean_error, max_error: of the adapters; measured on what is stored, or predicted.
        seconds: of this ratio alone, without the survey.
        problem: why there is no bundle, or "".
        score, kept: of the bundle on the tasks (docs/EVAL.md), {"estimate", "low", "high", "n"}; None where it was not
            evaluated, or where no adapter is far enough above the base to keep anything.
    """

    asked: float
    ratio: float | None = None
    bundle_bytes: int | None = None
    mean_error: float | None = None
    max_error: float | None = None
    seconds: float | None = None
    problem: str = ""
    score: Mapping[str, Any] | None = None
    kept: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Judgement:
    """What an evaluation says of some arms, JSON values only.

    Attributes:
        about: what was evaluated, and how.
        arms: by name, a bundle's being that of its directory: {"score": …, "kept": …}.
    """

    about: Mapping[str, Any]
    arms: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


Judge = Callable[[Inputs, Sequence[Path]], Judgement]  # the originals, and bundles of them


@dataclass(frozen=True)
class Frontier:
    """What a sweep found.

    Attributes:
        spec: the options that all ratios have in common.
        inputs: the adapters that went in, and what was skipped.
        predicted: nothing was encoded; errors are those that are expected (docs/AUTO.md).
        survey_seconds: of the survey that all ratios share.
        points: by rising ratio.
        evaluation: what the judge says of the originals; None without one.
    """

    spec: Spec
    inputs: Inputs
    predicted: bool
    survey_seconds: float
    points: tuple[Point, ...]
    evaluation: Judgement | None = None

    @property
    def original_bytes(self) -> int:
        """Bytes of the inputs' weights and configs."""
        return sum(adapter.nbytes for adapter in self.inputs.adapters)

    def document(self) -> dict[str, Any]:
        """The content of frontier.json, JSON values only."""
        from lorazip import __version__  # the package imports this module

        return {
            "schema": SCHEMA,
            "lorazip": __version__,
            "options": self.spec.recorded(),
            "inputs": {
                "base": self.inputs.base,
                "revision": self.inputs.revision,
                "adapters": [{"name": a.name, "bytes": a.nbytes} for a in self.inputs.adapters],
                "modules": len(self.inputs.modules),
                "original_bytes": self.original_bytes,
                "skipped": [str(defect) for defect in self.inputs.skipped],
            },
            "predicted": self.predicted,
            "survey_seconds": self.survey_seconds,
            "evaluation": None if self.evaluation is None else asdict(self.evaluation),
            "points": [asdict(point) for point in self.points],
        }


def run(
    paths: Sequence[str | Path],
    spec: Spec,
    ratios: Sequence[float],
    output: Path | None,
    *,
    dry_run: bool = False,
    judge: Judge | None = None,
    base: str | None = None,
    skip_bad: bool = False,
    force: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Frontier:
    """Find the frontier, and write frontier.json and frontier.svg.

    Args:
        paths, base, skip_bad: as `job.run` takes them.
        spec: auto, without ratio, budget and bound.
        output: directory to make; None, which only a dry run may be, writes nothing.
        dry_run: predict; nothing is encoded.
        judge: asked for its word on the originals before anything is encoded, so that its own faults show at once, and
            then on all bundles together.
        force: replace a frontier that is there.
    Raises:
        UsageError: the options contradict each other; TargetError: the output; InputError: the adapters.
    """
    _check(spec, ratios, output, dry_run, judge)
    if output is not None:
        output = Path(os.path.realpath(output))
        _check_target(output, force)
    inputs = open_adapters(
        [str(p) for p in paths],
        base=base,
        skip_bad=skip_bad,
        progress=lambda done, total: progress("reading", done, total),
    )
    if output is None:
        return _found(inputs, spec, ratios, None, None, progress)
    partial.check_inputs(output, inputs)
    with unfinished.working(output, partial.identity(inputs, spec), False, force, keep=False) as folder:
        found = _found(inputs, spec, ratios, None if dry_run else folder, judge, progress)
        _write(folder / unfinished.BUNDLE, found)
        unfinished.publish(folder, output, force, FRONTIER)
    return found


def _check(
    spec: Spec, ratios: Sequence[float], output: Path | None, dry_run: bool, judge: Judge | None
) -> None:
    if spec.method != "auto":
        raise UsageError(f"a sweep is over the ratios of auto (leave --method {spec.method} out)")
    if (spec.ratio, spec.budget, spec.max_error) != (None, None, None):
        raise UsageError("a sweep has its own ratios: --ratios (leave --ratio, --budget and --max-error out)")
    if not ratios or not all(1 <= ratio < math.inf for ratio in ratios):
        raise UsageError("ratios must be at least 1, and there must be at least one (--ratios 4,8,16)")
    if len(set(ratios)) < len(ratios):
        raise UsageError("a ratio is asked for twice (leave one out of --ratios)")
    if output is None and not dry_run:
        raise UsageError("say where to write the frontier: -o FOLDER (or --dry-run)")
    if dry_run and judge is not None:
        raise UsageError("a dry run makes no bundles to evaluate (leave --dry-run or --eval out)")


def _check_target(output: Path, force: bool) -> None:
    """Refuse before any work what could not be written after it."""
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        foreign = not output.is_dir() or {path.name for path in output.iterdir()} - {FRONTIER, PICTURE}
        if foreign or not _ours(output / FRONTIER):
            raise TargetError(f"{output} exists and holds more than a frontier (choose another name)")
        if not force:
            raise TargetError(f"{output} exists (use --force to replace it, or choose another name)")
    left = unfinished.folder(output)
    if left.exists() and not force:
        raise TargetError(f"{left} is an unfinished run (--force discards it)")
    unfinished.check_place(output)


def _ours(path: Path) -> bool:
    try:
        return str(json.loads(path.read_bytes())["schema"]).startswith(SCHEMA.partition("/")[0] + "/")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _found(
    inputs: Inputs,
    spec: Spec,
    ratios: Sequence[float],
    folder: Path | None,
    judge: Judge | None,
    progress: Progress,
) -> Frontier:
    """The frontier; with a folder the bundles are made in it, and are gone afterwards."""
    originals = judge(inputs, []) if judge else None
    begun = time.perf_counter()
    surveyed = job.survey(inputs, spec, progress)
    survey_seconds = time.perf_counter() - begun
    points: list[Point] = []
    bundles: dict[float, Path] = {}
    for done, ratio in enumerate(sorted(ratios)):
        progress("ratios", done, len(ratios))
        place = None if folder is None else folder / f"ratio-{named(ratio)}"
        points.append(_point(inputs, replace(spec, ratio=ratio), surveyed, place, progress))
        if place is not None and judge is None:
            shutil.rmtree(place, ignore_errors=True)
        elif place is not None and not points[-1].problem:
            bundles[ratio] = place
    if judge and bundles:
        arms = judge(inputs, list(bundles.values())).arms
        points = [replace(p, **arms[bundles[p.asked].name]) if p.asked in bundles else p for p in points]
    return Frontier(spec, inputs, folder is None, survey_seconds, tuple(points), originals)


def named(ratio: float) -> str:
    """A ratio without a needless point: 16, 2.5."""
    return str(ratio).removesuffix(".0")


def _point(
    inputs: Inputs, spec: Spec, surveyed: Sequence[Curve], place: Path | None, progress: Progress
) -> Point:
    """One ratio: made at this place and measured, or predicted."""
    begun = time.perf_counter()
    ratio = spec.ratio or 0.0
    modules = place and place.with_name(f"{place.name}-modules")
    if modules is not None:
        modules.mkdir()

    def here(what: str, done: int, total: int) -> None:
        progress(f"ratio {named(ratio)}: {what}", done, total)

    try:
        encoded = job.encode_planned(inputs, spec, surveyed, modules, here)
    except UndecidedError as error:
        return Point(ratio, problem=str(error))
    nbytes = assemble(inputs, spec, encoded, DirectorySink(place) if place else SizeSink(), here)
    errors = adapter_errors(inputs, encoded)
    seconds = time.perf_counter() - begun
    if modules is not None:
        del encoded  # some file systems keep a file, and so its folder, as long as it is mapped
        shutil.rmtree(modules, ignore_errors=True)
    originals = sum(adapter.nbytes for adapter in inputs.adapters)
    return Point(ratio, originals / nbytes, nbytes, float(errors.mean()), float(errors.max()), seconds)


def _write(folder: Path, found: Frontier) -> None:
    from lorazip.compress import sweep_plot  # imports matplotlib, which takes a second

    folder.mkdir()
    text = json.dumps(found.document(), indent=2, ensure_ascii=False) + "\n"
    write_bytes(folder / PICTURE, sweep_plot.plot(found).encode())
    write_bytes(folder / FRONTIER, text.encode())
