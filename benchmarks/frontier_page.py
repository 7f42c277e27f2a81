"""The page of frontier.py: tables, what can be read off them, and the picture, from the results that are there.

Cells that are not measured yet say …, settings that no budget allows say –. Of several results of one cell the last
counts; which versions of the code the page rests on stands at its end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import frontier_draw
from frontier_found import ABSENT, PENDING, Found, figure, named, table
from frontier_measure import Row, Store, Subset
from frontier_methods import TITLES, described

WITHIN = 1.02  # times the least error of the other methods: what auto's may be
POINTS = 0.03  # an adapter whose whole interval lies lower than this has lost something
PICTURE = "frontier.svg"


def write(path: Path, store: Store, subsets: Mapping[str, Subset], scores: Mapping[str, Row]) -> None:
    """Write the page, and the picture beside it."""
    found = Found.of(store, subsets)
    if not found.rows():
        raise SystemExit("nothing of these adapters is measured yet")
    drawn = frontier_draw.draw(path.with_name(PICTURE), points(found, "all"))
    parts = [
        head(found, scores),
        against(found),
        picture() if drawn else "",
        methods(found),
        times(found),
        peers(found),
        kept(found, scores),
        notes(found),
    ]
    path.write_text("\n\n".join(part for part in parts if part) + "\n")


def head(found: Found, scores: Mapping[str, Row]) -> str:
    """What was measured, on what, when."""
    rows = found.rows()
    dates = sorted({row["date"] for row in rows})
    period = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    machines = {
        f"{m['cpu']}, {m['cores']} cores, torch {m['torch']}, {m['gpu'] or 'no GPU'}": None
        for m in (row["machine"] for row in rows)
    }
    gpu = any(row["machine"]["gpu"] for row in rows)
    everyone = found.subsets["all"]
    starts = [scores[name].get("init") for name in everyone.names if name in scores]
    return f"""# Results

`auto` against the published methods at the same bytes, on {len(everyone.adapters)} real adapters
({starts.count("shared")} from one shared random A, {starts.count("own")} from their own),
{everyone.original_bytes / 1e6:.1f} MB. Made by

    .venv/bin/python benchmarks/frontier.py ZOO --base BASE --tasks TASKS --peers
    .venv/bin/python benchmarks/frontier.py ZOO --page docs/RESULTS.md

{period}; {"; ".join(machines)}. {"" if gpu else "Nothing here was measured on a GPU. "}*Ratio* is bytes of the
originals' files over every byte of the bundle, manifest and headers too; *error* is the mean over adapters of
‖D̂ − D‖² / ‖D‖² of what is stored. {PENDING} is not measured yet, {ABSENT} cannot be so small."""


def against(found: Found) -> str:
    """Ours, the best of the others, and their quotient."""
    lines, quotients = [], []
    for label, subset in found.subsets.items():
        for ratio in found.ratios(subset.digest):
            ours = found.cells.get((subset.digest, "auto", ratio))
            others = found.others(subset.digest, ratio)
            there = {m: row["figures"] for m, row in others.items() if row["figures"]}
            best = min(there, key=lambda m: float(there[m]["mean_error"])) if there else None
            whole = len(others) == len(TITLES) - 1
            quotient = PENDING
            if ours and ours["figures"] and best:
                value = ours["figures"]["mean_error"] / there[best]["mean_error"]
                if ours["figures"]["bundle_bytes"] > subset.original_bytes / ratio:
                    value = float("inf")  # it had more bytes than it was given
                quotient = f"{value:.3f}{'' if whole else ' ' + PENDING}"
                quotients += [value] if whole else []
            lines.append(
                [named(label, subset), f"{ratio:g}", figure(ours, "mean_error"), figure(ours, "max_error")]
                + ([f"{TITLES[best]}: {described(there[best]['setting'])}"] if best else [PENDING])
                + (
                    [f"{there[best]['ratio']:.1f}"] if best else [PENDING]
                )  # steps of ranks and bits are coarse
                + [figure(others[best], name) if best else PENDING for name in ("mean_error", "max_error")]
                + [quotient]
            )
    held = sum(value <= WITHIN for value in quotients)
    heads = [
        "adapters", "ratio", "auto: error", "worst", "method", "its ratio", "its error", "worst",
        "auto / best of the others",
    ]  # fmt: skip
    claim = f"The error of `auto` is at most {WITHIN} times the least of all other methods in {held} of "
    claim += f"{len(quotients)} places where all of them are measured"
    claim += f"; the largest quotient is {max(quotients):.3f}." if quotients else "."
    return f"## Against the best of the others\n\n{claim}\n\n{table(heads, lines)}"


def picture() -> str:
    """The picture's place."""
    return f"![Error against ratio of every method, all adapters, both axes logarithmic]({PICTURE})"


def methods(found: Found) -> str:
    """Every method's error and setting."""
    parts = ["## Every method", SETTINGS]
    for label, subset in found.subsets.items():
        lines = []
        for ratio in found.ratios(subset.digest):
            cells = [found.cells.get((subset.digest, method, ratio)) for method in TITLES]
            lines.append([f"{ratio:g}", *map(_cell, cells)])
        if lines:
            parts.append(f"{named(label, subset)}:\n\n{table(['ratio', *TITLES.values()], lines)}")
    return "\n\n".join(parts)


SETTINGS = """Each method has the setting of least error whose bundle is no larger than the budget; all are
stored in the same container. *svd, few bits*: `--bits` 1, 2, 2.5, 3, 4 at every rank. *LoRAQuant style*: the idea of
LoRAQuant ([2510.26690](https://arxiv.org/abs/2510.26690)), more bits for the first columns of a balanced SVD: k of r
columns in 2 bits and the rest in 1, or in 3 and 2, for all r and k (`--bits 1.25`, say); by our rounding, not theirs
([QUANTIZATION.md](QUANTIZATION.md)). *jd-full*, *jd-diag*: float16, one basis, 2 and 4 clusters, and the paper's
rule. *jd-full, few bits*: bases of 2 to 4 bits and cores of 2 to 4; 3 bits with 2 and 4 clusters. *eigenlora*, *svd*:
float16. The *mean adapter* has one size."""


def times(found: Found) -> str:
    """Auto's time in fits of jd-full."""
    lines = []
    for label, subset in found.subsets.items():
        for ratio in found.ratios(subset.digest):
            row = found.cells.get((subset.digest, "auto", ratio))
            if row and "reference_seconds" in row["figures"]:
                f = row["figures"]
                lines.append([
                    named(label, subset), f"{ratio:g}", f"{f['reference_seconds']:.1f}", f"{f['seconds']:.1f}",
                    f"{f['seconds'] / f['reference_seconds']:.1f}",
                    f"{f['cpu_seconds'] / f['reference_cpu_seconds']:.1f}", f"{f['peak_memory_bytes'] / 1e6:.0f}",
                ])  # fmt: skip
    if not lines:
        return ""
    heads = ["adapters", "ratio", "jd-full, s", "auto, s", "auto / jd-full", "of CPU time", "auto, peak MB"]
    return f"""## Time

One `jd-full` with its defaults, and `auto`, in the same run one after the other.

{table(heads, lines)}"""


def peers(found: Found) -> str:
    """Other tools at their defaults."""
    lines = []
    for label, subset in found.subsets.items():
        for (digest, peer), row in found.peers.items():
            if digest == subset.digest:
                f, ok = row["figures"], row["figures"]["status"] == "ok"
                figures = (f"{f['bundle_bytes'] / 1e6:.2f}", f"{f['ratio']:.2f}") if ok else ("", "")
                errors = (f"{f['mean_error']:.4f}", f"{f['max_error']:.4f}") if ok else ("", f["status"])
                seconds = f"{f['seconds']:.1f}" if ok else ""
                ours = _auto_within(found, digest, f["bundle_bytes"]) if ok else ("", "")
                lines.append([named(label, subset), peer, *figures, *errors, seconds, *ours])
    if not lines:
        return ""
    heads = ["adapters", "method", "MB", "ratio", "error", "worst", "seconds", "auto: ratio", "error"]
    return f"""## Other tools

At their defaults, as they store: float32. A ratio below 1 is more bytes than the originals; cut after ten minutes.
Beside them the nearest measured bundle of `auto` that is no larger.

{table(heads, lines)}"""


def _auto_within(found: Found, digest: str, nbytes: int) -> tuple[str, str]:
    """Ratio and error of the largest bundle of auto of at most so many bytes."""
    cells = [row["figures"] for key, row in found.cells.items() if key[:2] == (digest, "auto")]
    fitting = [f for f in cells if f and f["bundle_bytes"] <= nbytes]
    best = max(fitting, key=lambda f: int(f["bundle_bytes"]), default=None)
    return (PENDING, PENDING) if best is None else (f"{best['ratio']:.2f}", f"{best['mean_error']:.4f}")


def kept(found: Found, scores: Mapping[str, Row]) -> str:
    """Scores that bundles keep."""
    parts = []
    for label, subset in found.subsets.items():
        rows = {key[1:]: row for key, row in found.kept.items() if key[0] == subset.digest}
        if rows:
            most = max(row["key"]["examples"] for row in rows.values())
            rows = {key: row for key, row in rows.items() if row["key"]["examples"] == most}
            figures = next(iter(rows.values()))["figures"]
            parts.append(
                f"### {named(label, subset)}\n\n{len(figures['differences'])} of them that learned their task, "
                f"{most} examples each; {figures['kept_adapters']} are ten points above the base, on which *kept* "
                f"rests. {figures['engine']}, float32.\n\n{_kept_table(rows)}"
            )
            ours = {ratio: row for (method, ratio), row in sorted(rows.items()) if method == "auto"}
            if ours:
                parts.append(f"`auto`, adapter by adapter, in points:\n\n{_adapters(ours, scores)}")
    if not parts:
        return ""
    return "\n\n".join([f"## Scores kept\n\n{KEPT}", *parts])


KEPT = f"""Teacher-forced exact match on the adapters' own test examples, originals and bundle on the same ones. *Kept*
is Σ score(bundle) / Σ score(original), with its 95 % interval: bootstrap over examples, paired, stratified by adapter
([EVAL.md](EVAL.md)). *Lower*: adapters whose whole 95 % interval of the difference lies more than {100 * POINTS:g}
points below the original."""


def _kept_table(rows: Mapping[tuple[str, float], Row]) -> str:
    lines = []
    for ratio in sorted({ratio for _, ratio in rows}):
        for method in TITLES:
            if (method, ratio) in rows:
                f, setting = rows[method, ratio]["figures"], rows[method, ratio]["key"]["setting"]
                worst = min(f["differences"], key=lambda name: float(f["differences"][name][0]))
                lower = sum(high < -POINTS for _, _, high in f["differences"].values())
                k = f["kept"]
                lines.append([
                    f"{ratio:g}", TITLES[method], described(setting), f"{f['nbytes'] / 1e6:.3f}",
                    f"{f['mean_error']:.4f}", f"{100 * k['estimate']:.1f} %",
                    f"{100 * k['low']:.1f} to {100 * k['high']:.1f}", str(lower),
                    f"{100 * f['differences'][worst][0]:+.0f} {worst}",
                ])  # fmt: skip
    heads = ["ratio", "method", "setting", "MB", "error", "kept", "95 %", "lower", "worst, points"]
    return table(heads, lines)


def _adapters(ours: Mapping[float, Row], scores: Mapping[str, Row]) -> str:
    originals = next(iter(ours.values()))["figures"]["originals"]
    lines = []
    for name, score in originals.items():
        line = [name, str(scores.get(name, {}).get("init", "")), f"{100 * score:.0f}"]
        for row in ours.values():
            difference, low, high = row["figures"]["differences"].get(name, (float("nan"),) * 3)
            line.append(f"{100 * difference:+.0f} ({100 * low:+.0f} to {100 * high:+.0f})")
        lines.append(line)
    return table(["adapter", "start", "original", *(f"ratio {ratio:g}" for ratio in ours)], lines)


def notes(found: Found) -> str:
    """What the page rests on."""
    codes: dict[str, list[str]] = {}
    for row in found.rows():
        if "code" in row["key"]:
            kind = "auto" if row["key"]["method"] == "auto" else "the others"
            codes.setdefault(kind, [])
            codes[kind] += [row["key"]["code"]] * (row["key"]["code"] not in codes[kind])
    versions = "; ".join(f"{kind}: {', '.join(digests)}" for kind, digests in codes.items())
    several = any(len(digests) > 1 for digests in codes.values())
    mixed = " Several digests: parts were measured with an older version." if several else ""
    return f"Version and digest of the code that was measured: {versions}.{mixed}"


def points(found: Found, label: str) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """Of every method its real ratios and errors, each point once."""
    digest = found.subsets[label].digest
    for method, title in TITLES.items():
        figures = [r["figures"] for key, r in found.cells.items() if key[:2] == (digest, method)]
        some = {(float(f["ratio"]), float(f["mean_error"])) for f in figures if f}
        if some:
            yield title, sorted(some)


def _cell(row: Row | None) -> str:
    text = figure(row, "mean_error")
    if row is None or not row["figures"] or row["key"]["method"] == "auto":
        return text
    return f"{text}<br>{described(row['figures']['setting'])}"
