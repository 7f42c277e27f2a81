"""The page of benchmarks/transfer.py: docs/TRANSFER-RESULTS.md, from the lines of its results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from frontier_measure import machine

from lorazip.eval import compare
from lorazip.eval.results import Interval

FREE = ("unfiltered", "discriminator", "excess")  # routes that need no data but seeds
ROUTES = ("retained", *FREE, "seeds", "generic")
ARMS = ("source base", "source adapter", "target base")

Row = dict[str, Any]


def scores(folder: Path) -> dict[str, Any]:
    """Every arm's scores and losses, example by example, as the job left them; none where it did not come so far."""
    path = folder / "scores.jsonl"
    if not path.exists():
        return {}
    rows = map(json.loads, path.read_text().splitlines())
    return {row["arm"]: {"scores": row["scores"], "losses": row["losses"]} for row in rows}


def write(path: Path, results: Path) -> None:
    """Write the page."""
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    path.write_text("\n".join(_page(rows)) + "\n")


def _page(rows: Sequence[Row]) -> list[str]:
    chosen, means = _route(rows)
    settings = rows[0]["setting"]
    flags = f"--count {settings['count']} --epochs {settings['epochs']} --limit {settings['limit']}"
    groups: dict[int, list[str]] = {}
    for row in rows:
        groups.setdefault(row["setting"]["judge_epochs"], []).append(row["setting"]["task"])
    script = "    .venv/bin/python benchmarks/transfer.py SMOLLM GEMMA TASKS"
    lines = [
        "# Moving adapters to another base: results",
        "",
        "Made by",
        "",
        *(
            f"{script} {flags} --judge-epochs {epochs}"
            + "".join(f" --task {name}" for name in dict.fromkeys(names))
            for epochs, names in sorted(groups.items())
        ),
        f"{script} --page docs/TRANSFER-RESULTS.md",
        "",
        f"{date.today().isoformat()}; {_machine()}. Nothing here was measured on a GPU.",
        "",
        f"S is SmolLM2-135M-Instruct, G is Gemma 3 270M (pretrained). {settings['count']} inputs, at most "
        f"{settings['epochs']} epochs, learning rate {', '.join(f'{rate:g}' for rate in settings['rates'])}, bases in "
        f"{settings['dtype']} while training, seed {settings['seed']}. Exact match on up to {settings['limit']} test "
        "examples, in per cent, with 95 % bootstrap intervals.",
        "",
        "## Scores",
        "",
        "*Target base* is the better of zero-shot and five-shot. *Oracle* is trained on the target with the task's own "
        "labelled data, as the source adapter was on the source: with the whole train split, where *retained* has "
        f"{settings['count']} inputs of it.",
        "",
        "| task | | source base | source adapter | target base | " + " | ".join(ROUTES) + " | oracle |",
        "| --- | --- " + "| ---: " * (4 + len(ROUTES)) + "|",
    ]
    lines += [_line(row) for row in rows]
    lines += ["", "## The fixed route", ""]
    lines += _fixed(rows, chosen, means)
    lines += ["", "## Filters", "", *_filters(rows)]
    lines += ["", "## Inputs and time", "", *_inputs(rows)]
    return lines


def _machine() -> str:
    found = machine()
    return f"{found['cpu']}, {found['cores']} cores, torch {found['torch']}"


def _base(row: Row, route: str) -> Any:
    """The better of the target base's arms."""
    arms = row["routes"][route]["scores"]
    bare = [arm for name, arm in arms.items() if name.startswith("target base")]
    return max(bare, key=lambda arm: sum(arm["scores"]))


def _shown(values: Sequence[float] | None) -> str:
    if values is None:
        return "–"
    found = compare.mean(values)
    return f"{100 * found.estimate:.0f} ({100 * found.low:.0f}–{100 * found.high:.0f})"


def _moved(row: Row, route: str) -> Any:
    return row["routes"].get(route, {}).get("scores", {}).get("transferred")


def _line(row: Row) -> str:
    arms = row["routes"]["retained"]["scores"]
    cells = [_shown(arms[name]["scores"]) for name in ARMS[:2]] + [_shown(_base(row, "retained")["scores"])]
    for route in ROUTES:
        moved = _moved(row, route)
        cells.append(_shown(None if moved is None else moved["scores"]))
    cells.append(_shown(arms["oracle"]["scores"] if "oracle" in arms else None))
    return f"| {row['setting']['task']} | {row['setting']['direction']} | " + " | ".join(cells) + " |"


def _route(rows: Sequence[Row]) -> tuple[str, dict[str, float]]:
    """The data-free route of the best mean score on the validation splits."""
    means = {route: sum(row["validation"].get(route, 0.0) for row in rows) / len(rows) for route in FREE}
    return max(means, key=lambda route: means[route]), means


def _interval(value: Interval, scale: float = 100) -> str:
    return f"{scale * value.estimate:+.1f} ({scale * value.low:+.1f} to {scale * value.high:+.1f})"


def _fixed(rows: Sequence[Row], chosen: str, means: dict[str, float]) -> list[str]:
    told = ", ".join(f"{route} {100 * mean:.1f} %" for route, mean in means.items())
    have = [row for row in rows if _moved(row, chosen)]
    moved = [_moved(row, chosen)["scores"] for row in have]
    expert = [row["routes"][chosen]["scores"]["source adapter"]["scores"] for row in have]
    base = [_base(row, chosen)["scores"] for row in have]
    lines = [
        f"Chosen on the validation splits, by the mean over tasks and directions: **{chosen}** ({told}).",
        "",
        f"On the test splits: {100 * compare.macro(moved).estimate:.1f} % on average; the source adapters "
        f"{100 * compare.macro(expert).estimate:.1f} %, the target bases {100 * compare.macro(base).estimate:.1f} %. "
        f"Against the source adapters {_interval(compare.difference(moved, expert))} points, against the bases "
        f"{_interval(compare.difference(moved, base))}.",
        "",
        "| task | | against target base, points | token loss, base → moved | against source adapter, points |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    worse = 0
    for row, mine, own, bare in zip(have, moved, expert, base, strict=True):
        arms = row["routes"][chosen]["scores"]
        least = min(
            sum(arm["losses"]) / len(arm["losses"])
            for name, arm in arms.items()
            if name.startswith("target base")
        )
        loss = sum(arms["transferred"]["losses"]) / len(mine)
        gain = compare.difference([mine], [bare])
        worse += gain.high < 0 or loss > least
        lines.append(
            f"| {row['setting']['task']} | {row['setting']['direction']} | {_interval(gain)} | "
            f"{least:.3f} → {loss:.3f} | {_interval(compare.difference([mine], [own]))} |"
        )
    lines += ["", f"Below the target base, by score (interval) or by token loss: {worse} of {len(have)}."]
    lines += ["", *_oracle(rows)]
    return lines


def _oracle(rows: Sequence[Row]) -> list[str]:
    have = [
        row for row in rows if _moved(row, "retained") and "oracle" in row["routes"]["retained"]["scores"]
    ]
    if not have:
        return []
    moved = [_moved(row, "retained")["scores"] for row in have]
    oracle = [row["routes"]["retained"]["scores"]["oracle"]["scores"] for row in have]
    ratio = compare.macro(moved).estimate / compare.macro(oracle).estimate
    return [
        f"Retained prompts reach {ratio:.2f} of the oracles' mean score "
        f"({_interval(compare.difference(moved, oracle))} points)."
    ]


def _filters(rows: Sequence[Row]) -> list[str]:
    lines = []
    for route in FREE[1:]:
        have = [row for row in rows if _moved(row, route) and _moved(row, "unfiltered")]
        if not have:
            continue
        gain = compare.difference(
            [_moved(row, route)["scores"] for row in have],
            [_moved(row, "unfiltered")["scores"] for row in have],
        )
        certain = "outside" if gain.low > 0 or gain.high < 0 else "within"
        lines.append(
            f"- *{route}* against *unfiltered*, mean of {len(have)}: {_interval(gain)} points, {certain} the interval."
        )
    return lines


def _inputs(rows: Sequence[Row]) -> list[str]:
    lines = [
        "A cell is a source adapter, a discriminator, six transfers and an oracle, all scored on two splits. With one "
        "thread, two cells ran side by side on the two cores.",
        "",
        "| task | | discriminator: epochs | accuracy | written: unfiltered | discriminator | excess | nearest to "
        "a seed | threads | minutes a cell | training, minutes an adapter |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        cells = []
        for route in FREE:
            found = row["routes"][route]["stages"].get("filter")
            cells.append(f"{found['kept']} of {found['asked']}" if found else "–")
        found = row["routes"]["unfiltered"]["stages"].get("filter")
        near = f"{100 * found['overlap']['nearest']:.0f} %" if found else "–"
        lines.append(
            f"| {row['setting']['task']} | {row['setting']['direction']} | {row['setting']['judge_epochs']} | "
            f"{100 * row['discriminator_accuracy']:.0f} % | {' | '.join(cells)} | {near} | {row['threads']} | "
            f"{row['minutes']} | {row['routes']['unfiltered']['stages']['train']['seconds'] / 60:.1f} |"
        )
    refused = [
        f"{row['setting']['task']} {row['setting']['direction']} {route}"
        for row in rows
        for route, found in row["routes"].items()
        if found["error"]
    ]
    if refused:
        lines += ["", "Refused by the gate, or ended with an error: " + "; ".join(refused) + "."]
    return lines
