"""The page of benchmarks/transfer.py: docs/TRANSFER-RESULTS.md, from the lines of its results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from frontier_measure import machine

from lorazip.eval import compare
from lorazip.eval.results import Interval

FREE = ("unfiltered", "discriminator", "excess")  # routes that need no data but seeds
ROUTES = ("retained", *FREE, "seeds", "generic")

Row = dict[str, Any]


def scores(folder: Path) -> dict[str, Any]:
    """Every arm's scores and losses, example by example, as the job left them; none where it did not come so far."""
    path = folder / "scores.jsonl"
    if not path.exists():
        return {}
    _, *rows = map(json.loads, path.read_text().splitlines())  # the first says what they depend on
    return {row["arm"]: {"scores": row["scores"], "losses": row["losses"]} for row in rows}


def write(path: Path, results: Path) -> None:
    """Write the page."""
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    path.write_text("\n".join(_page(rows)) + "\n")


@dataclass(frozen=True)
class Group:
    """Rows that were measured alike."""

    setting: Row  # of the first one
    rows: list[Row]

    @property
    def title(self) -> str:
        return f"{self.setting['count']} inputs, at most {self.setting['epochs']} epochs"

    @property
    def measured(self) -> str:
        """What its rows have in common, in words."""
        setting = self.setting
        return (
            f"Learning rate {', '.join(f'{rate:g}' for rate in setting['rates'])}, bases in {setting['dtype']} while "
            f"training, seed {setting['seed']}; up to {setting['limit']} test examples." + self._epochs
        )

    @property
    def _epochs(self) -> str:
        """How older rows' epochs were chosen: the figures of a fit say it."""
        fits = [
            r["stages"]["train"]
            for row in self.rows
            for r in row["routes"].values()
            if "train" in r["stages"]
        ]
        if all("errors" in fit for fit in fits):
            return ""
        return " The saved epochs are those of least held-out loss, as was done then; now it is the error."

    @property
    def routes(self) -> list[str]:
        found: list[str] = self.setting["routes"]
        return found

    def commands(self, script: str) -> list[str]:
        """That measure it."""
        alike: dict[str, list[str]] = {}
        directions = {row["setting"]["direction"] for row in self.rows}
        for row in self.rows:
            setting = row["setting"]
            flags = f"--count {setting['count']} --epochs {setting['epochs']} --limit {setting['limit']}"
            if "discriminator" in self.routes:
                flags += f" --judge-epochs {setting['judge_epochs']}"
            if self.routes != list(ROUTES):
                flags += "".join(f" --route {route}" for route in self.routes)
            flags += (
                f" --rates {' '.join(f'{rate:g}' for rate in setting['rates'])} --dtype {setting['dtype']}"
            )
            flags += f" --seed {setting['seed']}"
            if len(directions) == 1:
                flags += f' --direction "{setting["direction"]}"'
            alike.setdefault(flags, []).append(setting["task"])
        return [
            f"{script} {flags}" + "".join(f" --task {name}" for name in dict.fromkeys(names))
            for flags, names in sorted(alike.items())
        ]


def _groups(rows: Sequence[Row]) -> list[Group]:
    """Rows of one setting, the tasks' discriminators apart; those with all routes first."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        setting = row["setting"]
        same = [setting[name] for name in ("count", "epochs", "limit", "rates", "dtype", "seed", "routes")]
        key = (len(ROUTES) - len(setting["routes"]), setting["count"], json.dumps(same))
        found.setdefault(key, []).append(row)
    return [
        Group(
            some[0]["setting"],
            sorted(some, key=lambda row: (row["setting"]["task"], row["setting"]["direction"] == "G->S")),
        )
        for _, some in sorted(found.items())
    ]


def _page(rows: Sequence[Row]) -> list[str]:
    groups = _groups(rows)
    chosen, means = _route(rows)
    script = "    .venv/bin/python benchmarks/transfer.py SMOLLM GEMMA TASKS"
    lines = [
        "# Moving adapters to another base: results",
        "",
        "Made by",
        "",
        *(command for group in groups for command in group.commands(script)),
        f"{script} --page docs/TRANSFER-RESULTS.md",
        "",
        f"{date.today().isoformat()}; {_machine()}. Nothing here was measured on a GPU.",
        "",
        "S is SmolLM2-135M-Instruct, G is Gemma 3 270M (pretrained). Exact match in per cent, with 95 % bootstrap "
        "intervals.",
        "",
        "## Scores",
        "",
        "*Target base* is the better of zero-shot and five-shot. *Oracle* is trained on the target with the task's own "
        "labelled data, as the source adapter was on the source, with the whole train split. *Retained* has its inputs "
        "without the answers, at most as many as the other routes have.",
    ]
    for group in groups:
        lines += ["", f"### {group.title}", "", group.measured, "", *_scores(group)]
    told = ", ".join(f"{route} {100 * mean:.1f} %" for route, mean in means.items())
    lines += ["", "## The fixed route", ""]
    lines += [
        f"Chosen on the validation splits, by the mean over tasks and directions: **{chosen}** ({told})."
    ]
    for group in groups:
        if chosen in group.routes:
            lines += ["", f"### {group.title}: {chosen}", "", *_fixed(group.rows, chosen)]
    lines += ["", "## Filters", ""]
    for group in groups:
        lines += _filters(group)
    lines += ["", "## Inputs and time"]
    for group in groups:
        lines += ["", f"### {group.title}", "", *_inputs(group)]
    return lines


def _scores(group: Group) -> list[str]:
    columns = [*group.routes, *(["oracle"] if "retained" in group.routes else [])]
    return [
        "| task | | source base | source adapter | target base | " + " | ".join(columns) + " |",
        "| --- | --- " + "| ---: " * (3 + len(columns)) + "|",
        *(_line(row) for row in group.rows),
    ]


def _machine() -> str:
    found = machine()
    return f"{found['cpu']}, {found['cores']} cores, torch {found['torch']}"


def _base(arms: Row) -> Any:
    """The better of the target base's arms."""
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
    arms: Row = {}  # those of no route are the same in each
    for found in row["routes"].values():
        arms |= found["scores"]
    cells = [_shown(arms[name]["scores"]) for name in ("source base", "source adapter")]
    cells.append(_shown(_base(arms)["scores"]))
    for route in row["setting"]["routes"]:
        moved = _moved(row, route)
        cells.append(_shown(None if moved is None else moved["scores"]))
    if "retained" in row["setting"]["routes"]:
        cells.append(_shown(arms["oracle"]["scores"] if "oracle" in arms else None))
    return f"| {row['setting']['task']} | {row['setting']['direction']} | " + " | ".join(cells) + " |"


def _route(rows: Sequence[Row]) -> tuple[str, dict[str, float]]:
    """The data-free route of the best mean score on the validation splits, where there was a choice."""
    have = [row for row in rows if row["validation"]]
    if not have:
        raise SystemExit(f"no cell has all of {', '.join(FREE)}: there is no route to choose")
    means = {route: sum(row["validation"].get(route, 0.0) for row in have) / len(have) for route in FREE}
    return max(means, key=lambda route: means[route]), means


def _interval(value: Interval, scale: float = 100) -> str:
    return f"{scale * value.estimate:+.1f} ({scale * value.low:+.1f} to {scale * value.high:+.1f})"


def _fixed(rows: Sequence[Row], chosen: str) -> list[str]:
    have = [row for row in rows if _moved(row, chosen)]
    moved = [_moved(row, chosen)["scores"] for row in have]
    expert = [row["routes"][chosen]["scores"]["source adapter"]["scores"] for row in have]
    base = [_base(row["routes"][chosen]["scores"])["scores"] for row in have]
    lines = [
        f"On the test splits: {100 * compare.macro(moved).estimate:.1f} % on average; the source adapters "
        f"{100 * compare.macro(expert).estimate:.1f} %, the target bases {100 * compare.macro(base).estimate:.1f} %. "
        f"Against the source adapters {_interval(compare.difference(moved, expert))} points, against the bases "
        f"{_interval(compare.difference(moved, base))}.",
        *_by_direction(have, moved, expert),
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


def _by_direction(
    rows: Sequence[Row], moved: Sequence[list[float]], expert: Sequence[list[float]]
) -> list[str]:
    """The means of either direction, where both were measured."""
    names = list(dict.fromkeys(row["setting"]["direction"] for row in rows))
    lines = []
    for name in names if len(names) > 1 else ():
        mine, theirs = (
            [values for row, values in zip(rows, some, strict=True) if row["setting"]["direction"] == name]
            for some in (moved, expert)
        )
        lines += [
            "",
            f"{name}: {100 * compare.macro(mine).estimate:.1f} %, the source adapters "
            f"{100 * compare.macro(theirs).estimate:.1f} %; {_interval(compare.difference(mine, theirs))} points.",
        ]
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


def _filters(group: Group) -> list[str]:
    lines = []
    for route in FREE[1:]:
        have = [row for row in group.rows if _moved(row, route) and _moved(row, "unfiltered")]
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


def _inputs(group: Group) -> list[str]:
    free = [route for route in FREE if route in group.routes]
    judged = "discriminator" in free
    columns = ["discriminator: epochs", "accuracy"] if judged else []
    columns += [f"written: {route}" for route in free]
    columns += ["nearest to a seed", "threads", "minutes a cell", "training, minutes an adapter"]
    parts = ["a source adapter"] + ["a discriminator"] * judged
    parts += [f"{len(group.routes)} transfer{'s' * (len(group.routes) > 1)}"]
    parts += ["an oracle"] * ("retained" in group.routes)
    splits = ", all scored on two splits" if set(FREE) <= set(free) else ""
    lines = [
        f"A cell is {', '.join(parts)}{splits}. With one thread, two cells ran side by side on the two cores.",
        "",
        "| task | | " + " | ".join(columns) + " |",
        "| --- | --- " + "| ---: " * len(columns) + "|",
    ]
    for row in group.rows:
        setting = row["setting"]
        cells = [setting["task"], setting["direction"]]
        if judged:
            cells += [str(setting["judge_epochs"]), f"{100 * row['discriminator_accuracy']:.0f} %"]
        for route in free:
            found = row["routes"][route]["stages"].get("filter")
            cells.append(f"{found['kept']} of {found['asked']}" if found else "–")
        stages = row["routes"][(free or group.routes)[0]]["stages"]
        near = stages["filter"]["overlap"]["nearest"] if free and "filter" in stages else None
        cells += ["–" if near is None else f"{100 * near:.0f} %", str(row["threads"]), str(row["minutes"])]
        cells.append(f"{stages['train']['seconds'] / 60:.1f}" if "train" in stages else "–")
        lines.append(f"| {' | '.join(cells)} |")
    refused = [
        f"{row['setting']['task']} {row['setting']['direction']} {route}"
        for row in group.rows
        for route, found in row["routes"].items()
        if found["error"]
    ]
    if refused:
        lines += ["", "Refused by the gate, or ended with an error: " + "; ".join(refused) + "."]
    return lines
