"""The streaming job: inputs -> one module of all adapters at a time -> shards -> bundle."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from lorazip import unfinished
from lorazip.adapter import LowRank
from lorazip.bundle import MANIFEST, Bundle
from lorazip.compress import cluster, encode, finished, partial, planning, shards, sides
from lorazip.compress.assemble import DirectorySink, SizeSink, assemble
from lorazip.compress.auto import Plan
from lorazip.compress.curves import Curve
from lorazip.compress.encode import ModuleCode
from lorazip.compress.methods import METHODS
from lorazip.compress.outcome import Outcome, outcome
from lorazip.compress.planning import Choice
from lorazip.compress.shards import Shard
from lorazip.compress.spec import Spec
from lorazip.errors import Defect, InputError
from lorazip.memory import PeakMemory
from lorazip.sources import Inputs, open_adapters

WORKERS = 4  # modules at a time at most: each needs memory for its factors of all adapters
TOGETHER = 2**24  # numbers of factors that auto encodes together: many rows of every rate, in some 100 MB
ERROR = (
    0.1  # of every adapter, when auto is asked for nothing else: docs/AUTO.md says what tasks notice of it
)
SVD_ENERGY = 0.9  # of each adapter and module, when nothing else is asked for
Progress = Callable[[str, int, int], None]  # what, done, total
Known = dict[tuple[int, Plan], Shard]
Done = TypeVar("Done")


def compress(
    paths: str | Path | Sequence[str | Path],
    spec: Spec | None = None,
    output: str | Path = "bundle.lorazip",
    *,
    base: str | None = None,
    skip_bad: bool = False,
    resume: bool = False,
    force: bool = False,
) -> Bundle:
    """Compress adapters into one bundle: the Python face of `lorazip compress`.

    Args:
        paths: PEFT directories, directories of them, globs, `@list.txt`, Hub ids, NAME=PATH.
        spec: method and options; the default is auto with a bound of 0.1 on every adapter's error.
        output: directory to make.
        base: the base model, where the adapters' configs disagree about its name.
        skip_bad: leave adapters with defects out and record them.
        resume: continue an interrupted run of the same job.
        force: replace a bundle that is there.
    Raises:
        InputError: with all defects of all adapters; UsageError, TargetError, UndecidedError: see their classes.
    """
    outcome = run(
        [paths] if isinstance(paths, str | Path) else paths,
        spec or Spec(),
        Path(output),
        base=base,
        skip_bad=skip_bad,
        resume=resume,
        force=force,
    )
    assert outcome.bundle is not None
    return outcome.bundle


def run(
    paths: Sequence[str | Path],
    spec: Spec,
    output: Path | None,
    *,
    base: str | None = None,
    skip_bad: bool = False,
    resume: bool = False,
    force: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Outcome:
    """The job with all its figures. `output` None is a dry run: nothing is written.

    All is computed then, but for auto, which knows what will come out before it encodes.
    """
    started = time.perf_counter()
    with PeakMemory() as memory:
        if output is not None:
            output = Path(os.path.realpath(output))  # a link stays; what it names is written
            partial.check_target(output, resume, force)
        inputs = open_adapters(
            [str(p) for p in paths],
            base=base,
            skip_bad=skip_bad,
            progress=lambda done, total: progress("reading", done, total),
        )
        if output is not None:
            partial.check_inputs(output, inputs)
        spec = resolve(inputs, spec)
        if output is None:
            encoded = _encode_all(inputs, spec, None, progress)
            bundle, size = None, assemble(inputs, spec, encoded, SizeSink(), progress)
        else:
            bundle, encoded = _write(inputs, spec, output, resume, force, progress)
            size = bundle.nbytes
    return outcome(inputs, spec, encoded, bundle, size, time.perf_counter() - started, memory.peak)


def resolve(inputs: Inputs, spec: Spec) -> Spec:
    """Fill in what was left open by the paper's rule (Compress-then-Serve §6.4; METHODS.md §2).

    auto: an error of 0.1. svd: SVD_ENERGY. mean: the widest rank. The others, with n <= 100: one basis of n/2 + 7
    columns; above: 16 columns and the least number of clusters with a mean squared relative error below 0.6 on a
    middle module.
    """
    n = len(inputs.adapters)
    if spec.method == "auto":
        aims = (spec.max_error, spec.ratio, spec.budget)
        return replace(spec, max_error=ERROR) if aims == (None, None, None) else spec
    if spec.rank is None and spec.energy is None and spec.max_error is None:
        if spec.method == "svd":
            return replace(spec, energy=SVD_ENERGY)
        widest = max(info.rank for adapter in inputs.adapters for info in adapter.modules.values())
        rank = widest if spec.method == "mean" else n // 2 + 7 if n <= 100 else cluster.PAPER_RANK
        spec = replace(spec, rank=rank)
    if spec.method == "svd" or spec.clusters is not None:
        return spec
    if n <= 100 or spec.method == "mean":
        return replace(spec, clusters=1)
    names = list(inputs.modules)
    middle = names[len(names) // 2]
    factors = [adapter.low_rank(middle) for adapter in inputs.adapters if middle in adapter.modules]
    module, _ = encode.prepare(middle, factors, spec)
    method, rank = METHODS[spec.method], spec.rank or cluster.PAPER_RANK
    count = cluster.paper_clusters(method, module.stack, module.weights, module.energies, rank)
    return replace(spec, clusters=count)


def _encode_all(inputs: Inputs, spec: Spec, folder: Path | None, progress: Progress) -> list[Shard]:
    """Every module in order; from its shard where that is there."""
    if spec.method == "auto":
        return encode_planned(inputs, spec, survey(inputs, spec, progress), folder, progress)

    def one(indices: Sequence[int]) -> list[Shard]:
        paths = [folder and folder / f"{index:05d}.safetensors" for index in indices]
        return _encode_some(
            inputs, indices, paths, lambda found: [encode.encode(name, own, spec) for _, name, own in found]
        )

    return _each([[index] for index in range(len(inputs.modules))], spec, one, "compressing", progress)


def survey(inputs: Inputs, spec: Spec, progress: Progress) -> list[Curve]:
    """What auto knows of every module before it chooses: the same for every ratio, budget and bound."""
    names = list(inputs.modules)
    worth: dict[str, float] = {}
    if spec.calibrate is not None:
        from lorazip.compress import calibrate  # loads transformers

        worth = calibrate.weights(spec.calibrate, spec.prompts, inputs.modules, spec.torch_device(), progress)

    def some(indices: Sequence[int]) -> list[Curve]:
        return [planning.survey(inputs, spec, names[i], worth.get(names[i], 1.0)) for i in indices]

    return _each([[index] for index in range(len(names))], spec, some, "choosing", progress)


def encode_planned(
    inputs: Inputs, spec: Spec, surveyed: Sequence[Curve], folder: Path | None, progress: Progress
) -> list[Shard]:
    """Choose for all modules, encode them, and choose again where a bound is missed.

    Args:
        surveyed: by `survey`.
        folder: of the shards; None to predict what would come out.
    Raises:
        UndecidedError: what is asked for cannot be reached.
    """
    choice = planning.choose(inputs, spec, surveyed)
    if folder is None:
        return planning.foreseen(inputs, spec, choice)
    done: Known = {}
    while True:
        plans = choice.plans

        def some(indices: Sequence[int], choice: Choice = choice) -> list[Shard]:
            paths = [folder / f"{i:05d}-{choice.plans[i].digest}.safetensors" for i in indices]
            return _encode_some(
                inputs,
                indices,
                paths,
                lambda ms: sides.encode_planned([choice.task(*module) for module in ms], spec),
            )

        todo = [i for i, plan in enumerate(plans) if (i, plan) not in done]
        fresh = _each(_bunches(inputs, todo), spec, some, "compressing", progress)
        done = {(i, plans[i]): shard for i, shard in zip(todo, fresh, strict=True)} | {
            key: shard for key, shard in done.items() if key[1] == plans[key[0]]
        }
        encoded = [done[i, plan] for i, plan in enumerate(plans)]
        again = planning.repaired(inputs, spec, choice, encoded)
        if again is None:
            return encoded
        choice = again


def _bunches(inputs: Inputs, indices: Sequence[int]) -> list[list[int]]:
    """The modules that are encoded together: neighbours, as many as fit, and a bunch for each of two workers."""
    shapes = list(inputs.modules.values())
    widest = max(info.rank for adapter in inputs.adapters for info in adapter.modules.values())
    sizes = [len(inputs.adapters) * widest * sum(shapes[index]) for index in indices]
    room = min(TOGETHER, -(-sum(sizes) // 2))
    bunches: list[list[int]] = []
    filled = room
    for index, size in zip(indices, sizes, strict=True):
        if filled + size > room and (not bunches or bunches[-1]):
            bunches.append([])
            filled = 0
        bunches[-1].append(index)
        filled += size
    return bunches


def _each(
    bunches: Sequence[Sequence[int]],
    spec: Spec,
    work: Callable[[Sequence[int]], list[Done]],
    what: str,
    progress: Progress,
) -> list[Done]:
    """Something for every bunch of modules, in order, several bunches at a time.

    Modules are independent, and most of their steps are too small to keep several cores busy: two modules side by side
    on one core each are faster than one after the other on both. A GPU gets one at a time.
    """
    threads = torch.get_num_threads()
    workers = min(WORKERS, threads) if spec.torch_device().type == "cpu" else 1
    pool = ThreadPoolExecutor(
        workers, initializer=torch.set_num_threads, initargs=(max(1, threads // workers),)
    )
    total = sum(map(len, bunches))
    try:
        futures = [pool.submit(work, bunch) for bunch in bunches]
        done: list[Done] = []
        for future in futures:
            done += future.result()
            progress(what, len(done), total)
        return done
    finally:
        pool.shutdown(cancel_futures=True)


Loaded = tuple[
    int, str, Sequence[LowRank]
]  # a module's place and name, and its factors of the adapters that have it


def _encode_some(
    inputs: Inputs,
    indices: Sequence[int],
    paths: Sequence[Path | None],
    encoder: Callable[[Sequence[Loaded]], list[ModuleCode]],
) -> list[Shard]:
    """Some modules: their shards, made and written (paths None: described), all of them where one is not there."""
    names = list(inputs.modules)
    shapes = [inputs.modules[names[index]] for index in indices]
    found = [shards.read(path, *shape) if path else None for path, shape in zip(paths, shapes, strict=True)]
    whole = [shard for shard in found if shard is not None]
    if len(whole) == len(found):
        return whole
    loaded = []
    for index in indices:
        having = [adapter for adapter in inputs.adapters if names[index] in adapter.modules]
        loaded.append((index, names[index], [adapter.low_rank(names[index]) for adapter in having]))
    made = []
    try:
        codes = encoder(loaded)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        problem = "its factors are too large or too small to be computed on by this method"
        remedy = "try --method svd, or leave out adapters with values near 1e-38 or 1e38"
        raise InputError(
            [Defect("", name, problem=problem, remedy=remedy) for _, name, _ in loaded]
        ) from error
    for code, path, shape in zip(codes, paths, shapes, strict=True):
        if path is None:
            made.append(shards.describe(code, *shape))
            continue
        shards.write(path, code)
        written = shards.read(path, *shape)
        assert written is not None, path
        made.append(written)
    return made


def _write(
    inputs: Inputs, spec: Spec, output: Path, resume: bool, force: bool, progress: Progress
) -> tuple[Bundle, list[Shard]]:
    done = finished.find(output, inputs, spec, force, progress) if resume else None
    with unfinished.working(output, partial.identity(inputs, spec), resume, force) as folder:
        if done is not None:
            unfinished.discard(folder, output)
            return Bundle.open(output), done
        encoded = _encode_all(inputs, spec, folder, progress)
        assemble(inputs, spec, encoded, DirectorySink(folder / unfinished.BUNDLE), progress)
        # Without the maps: some file systems keep a file, and so its folder, as long as it is mapped.
        encoded = [replace(shard, file=None) for shard in encoded]
        unfinished.publish(folder, output, force, MANIFEST)
    return Bundle.open(output), encoded
