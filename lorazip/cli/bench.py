"""`lorazip bench`: what compression costs and saves when adapters are used."""

from __future__ import annotations

import math
import re
from pathlib import Path

import click

from lorazip import units
from lorazip.cli import render
from lorazip.errors import ServeError, printable
from lorazip.eval import serve as serving
from lorazip.eval.serve_mix import Mix
from lorazip.eval.serve_records import Row, Settings

HELP = {
    "help_option_names": ["-h", "--help"]
}  # also where it is not called through the group of all commands
NOISE = 0.05  # share of the processors that others may take before the figures are called noisy

_UNITS = {"": 1} | {f"{u}B": 1000**i for i, u in enumerate("kMGT", 1)}
_UNITS |= {"B": 1} | {f"{u}iB": 1024**i for i, u in enumerate("KMGT", 1)}


class Size(click.ParamType[int]):
    """Bytes with a unit: 500MB, 4GiB, 1.5GB."""

    name = "SIZE"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]*)", str(value))
        names = {name.lower(): factor for name, factor in _UNITS.items()}
        if found is None or found[2].lower() not in names:
            self.fail(f"{value!r} is no size (write 500MB, 4GiB or a number of bytes)", param, ctx)
        return int(float(found[1]) * names[found[2].lower()])


@click.group(
    context_settings=HELP,
    epilog="Example: lorazip bench serve --base model/ --adapters adapters/ -o serving/ --json",
)
def bench() -> None:
    """Measure adapters in use. `lorazip bench COMMAND --help` tells more."""


@bench.command(
    context_settings=HELP,
    epilog="Example: lorazip bench serve --base model/ --adapters adapters/ --bundle team.lorazip -o serving/",
)
@click.option("--base", required=True, metavar="MODEL", help="Directory or Hub id of the base model.")
@click.option("--adapters", multiple=True, metavar="PATH",
              help="Adapters to serve, as for compress. Default: those of the first bundle.")  # fmt: skip
@click.option("--bundle", "bundles", multiple=True, type=click.Path(path_type=Path), metavar="BUNDLE",
              help="A bundle of the same adapters; may be repeated.")  # fmt: skip
@click.option("--requests", type=int, default=200, show_default=True, help="How many requests.")
@click.option("--mix", type=click.Choice(["uniform", "zipf"]), default="uniform", show_default=True,
              help="How they spread over the adapters.")  # fmt: skip
@click.option("--zipf-exponent", type=float, default=1.0, show_default=True,
              help="s of --mix zipf: the k-th adapter gets a share of 1/k^s.")  # fmt: skip
@click.option("--prompt-tokens", type=int, default=128, show_default=True, help="Length of every prompt.")
@click.option("--output-tokens", type=int, default=32, show_default=True, help="Length of every answer.")
@click.option(
    "--rate", type=float, default=math.inf, show_default=True, help="Requests a second; inf: all at once."
)
@click.option("--max-loras", type=int, default=8, show_default=True,
              help="Slots for adapters; vLLM gets one more, for a bug of its CPU build.")  # fmt: skip
@click.option("--max-cpu-loras", type=int, help="Adapters kept in host memory. Default: all.")
@click.option("--memory", type=Size(), default="4GiB", show_default=True, help="KV cache of every arm.")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto",
              show_default=True, help="Type of model and adapters; auto: as the model is stored.")  # fmt: skip
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Of adapters, arrivals and prompts drawn."
)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Directory to make.")
@click.option("--json", "as_json", is_flag=True, help="Print serve.json.")
def serve(
    base: str,
    adapters: tuple[str, ...],
    bundles: tuple[Path, ...],
    requests: int,
    mix: Mix,
    zipf_exponent: float,
    prompt_tokens: int,
    output_tokens: int,
    rate: float,
    max_loras: int,
    max_cpu_loras: int | None,
    memory: int,
    dtype: str,
    seed: int,
    output: Path,
    as_json: bool,
) -> None:
    """Throughput and latency of many adapters in vLLM: originals, bundles, one merged adapter, the base alone.

    All arms answer the same requests with the same KV cache, each in a process of its own, after the adapters were
    loaded once and some requests answered; loading is timed apart. Writes serve.json and serve.svg. A bundle is
    exported first: this measures stock multi-LoRA with its ranks.

    Exit code 2: an arm failed; the others are in serve.json.
    """
    settings = Settings(
        requests=requests,
        mix=mix,
        zipf_exponent=zipf_exponent,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        rate=rate,
        max_loras=max_loras,
        max_cpu_loras=max_cpu_loras,
        memory=memory,
        dtype=dtype,
        seed=seed,
    )
    with render.progress() as progress:
        outcome = serving.run(base, adapters, bundles, output, settings, progress)
    if as_json:
        render.as_json(outcome.document())
    elif outcome.rows:
        title = (
            f"{units.counted(requests, 'request')} of {prompt_tokens} + {output_tokens} tokens, "
            f"{units.counted(len(outcome.names), 'adapter')}, {mix}"
        )
        render.table(title, _COLUMNS, [_cells(row) for row in outcome.rows], numbers=len(_COLUMNS) - 1)
        click.echo(f"written: {output}")
    for row in outcome.rows:
        for note in _notes(row):
            click.echo(f"note: {printable(row.arm)}: {note}", err=True)
    if outcome.failures:
        raise ServeError("\n".join(failure.error for failure in outcome.failures))


_COLUMNS = [
    "arm", "requests/s", "tokens/s", "TTFT p50", "p90", "p99", "latency p50", "p90", "p99", "per token", "peak memory",
    "slots", "on disk", "load",
]  # fmt: skip


def _cells(row: Row) -> list[str]:
    """The table's line of an arm."""
    return [
        row.arm,
        f"{row.requests_per_second:.3g}",
        f"{row.output_tokens_per_second:,.0f}",
        *(_seconds(value) for q in (row.ttft, row.latency) for value in (q.p50, q.p90, q.p99)),
        _seconds(row.per_token.p50),
        units.size(row.memory_bytes),
        units.size(row.slot_bytes),
        units.size(row.disk_bytes),
        "-" if row.max_loras is None else _seconds(row.load_seconds),
    ]


def _notes(row: Row) -> list[str]:
    """What a reader has to know before trusting the line."""
    notes = []
    if row.same_as_base == 1:
        notes.append("answered every request as the base does: do these adapters have an effect?")
    if row.device_memory_bytes is None and (row.others_cpu_share or 0) > NOISE:
        share = units.share(row.others_cpu_share or 0)
        notes.append(f"other processes took {share} of the processors: measure again on a quiet machine")
    return notes


def _seconds(value: float) -> str:
    return f"{1000 * value:.3g} ms" if 0 < value < 1 else units.duration(value)
