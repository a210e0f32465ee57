"""Result files of bench_scores.py, and the tables of docs/scores.md that are made of them.

A result file has ``cells`` (one run each), the ``settings`` and versions of each method and dataset,
the ``datasets`` that were learned from, and a ``summary``: interquartile means
and intervals over seeds.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from iql_torchrl.data import REFERENCE_RETURNS
from iql_torchrl.data.builtin import BUILTIN
from iql_torchrl.evaluation.statistics import (
    interquartile_mean,
    probability_of_improvement,
    stratified_interval,
)
from record import RESULTS, save
from report import replace_table
from score_datasets import CONTINUOUS, DATASETS, OURS, OWN, SEPSIS

import numpy as np

#: Of our own settings those that the page shows; the result file has all.
SHOWN = (*OURS, *SEPSIS, "schedule", "order", "standardise", "initialisation", "policy")
#: CORL's README at eeeeef2, "Last Scores": mean and deviation over its seeds.
PUBLISHED = {
    "d4rl-umaze": {"ours": (42.11, 0.58), "CORL": (42.11, 0.58), "cloning": (0.36, 8.69)},
    "d4rl-medium": {"ours": (34.85, 2.72), "CORL": (34.85, 2.72), "cloning": (0.79, 3.25)},
}
#: Updates that the table of published scores shows.
MILLION = (100_000, 200_000, 300_000, 400_000, 500_000, 700_000, 1_000_000)
#: Ends of the names of its result files, and what was changed in ours.
MILLION_SETTINGS = {
    "": "",
    "_torch": "torch's weights",
    "_corl_settings": "CORL's weights and order",
}


def read(path: Path) -> dict[str, Any]:
    """The results so far, without the description of the machine, which ``save`` adds."""
    if not path.is_file():
        return {"datasets": {}, "settings": {}, "cells": [], "summary": [], "unfinished": {}}
    content: dict[str, Any] = json.loads(path.read_text())
    results = {key: content[key] for key in ("datasets", "settings", "cells", "summary")}
    return results | {"unfinished": content.get("unfinished", {})}


def add(content: dict[str, Any], result: dict[str, Any]) -> None:
    """Put a cell into the results; ``SystemExit`` if its settings are not those of earlier cells."""
    name, method = result["dataset"], result["method"]
    settings = {k: v for k, v in result.pop("settings").items() if k not in ("seed", "updates")}
    versions = result.pop("versions")
    about = {"settings": settings, "versions": versions}
    known = content["settings"].setdefault(name, {}).setdefault(method, about)
    if known != about:
        raise SystemExit(
            f"{name}, {method}: the settings or versions are not those of the cells in the result "
            "file. Delete that file, or name another with --result."
        )
    content["cells"].append(result)
    content["summary"] = summarise(content["cells"])


def join(names: Sequence[str], path: Path) -> None:
    """Add the cells of the result files ``names``, next to ``path``, that it does not have yet."""
    content = read(path)
    for name in names:
        other = read(path.with_name(f"{name}.json"))
        for key, about in other["datasets"].items():
            if content["datasets"].setdefault(key, about) != about:
                raise SystemExit(f"{name}: {key} is another dataset than that of {path.name}")
        for each in other["cells"]:
            about = other["settings"][each["dataset"]][each["method"]]
            if identity(each) not in map(identity, content["cells"]):
                add(content, each | about)
    save(path, content, packages=("gymnasium", "mujoco"))


def identity(cell: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(cell[key] for key in ("dataset", "method", "seed", "updates"))


def summarise(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each dataset, number of updates and method: interquartile means over seeds, 95 % intervals.

    ``ours_better``: the probability that a run of ours has a higher score than one of this method.
    """
    groups: dict[tuple[str, int, str], list[Mapping[str, Any]]] = {}
    for each in cells:
        groups.setdefault((each["dataset"], each["updates"], each["method"]), []).append(each)
    lines = []
    for (name, updates, method), group in groups.items():
        line: dict[str, Any] = {
            "dataset": name,
            "updates": updates,
            "method": method,
            "seeds": len(group),
            "processors": sorted({each["processor"] for each in group}),
        }
        for quantity in ("score", "return"):
            values = np.array([each[quantity] for each in group])
            line[quantity] = float(interquartile_mean(values))
            line[f"{quantity}_interval"] = list(
                stratified_interval(interquartile_mean, [values], seed=0)
            )
        rivals = groups.get((name, updates, "ours"), [])
        if method != "ours" and rivals:
            both = [np.array([c["score"] for c in part]) for part in (rivals, group)]
            line["ours_better"] = float(probability_of_improvement(*both))
        lines.append(line)
    return lines


def score_cell(line: Mapping[str, Any]) -> str:
    """A score with its interval over seeds; with its number of seeds if they are fewer than three."""
    low, high = line["score_interval"]
    several = line["seeds"] > 2
    seeds = f"{line['seeds']} seed{'s' if line['seeds'] > 1 else ''}"
    return f"{line['score']:.1f}<br>({f'{low:.1f} to {high:.1f}' if several else seeds})"


def table(content: Mapping[str, Any]) -> str:
    """Markdown: a row a dataset, with the interquartile mean of the scores of each method."""
    methods = [m for m in CONTINUOUS if any(line["method"] == m for line in content["summary"])]
    head = ["dataset", "updates", "of the dataset", *methods, "processor"]
    text = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 2) + "|---|"]
    for name, updates in dict.fromkeys((e["dataset"], e["updates"]) for e in content["summary"]):
        lines = {
            line["method"]: line
            for line in content["summary"]
            if (line["dataset"], line["updates"]) == (name, updates)
        }
        cells = [score_cell(lines[m]) if m in lines else "-" for m in methods]
        about = content["datasets"][name]
        cells.append("; ".join(dict.fromkeys(each for e in lines.values() for each in _on(e))))
        text.append(
            "| " + " | ".join([name, f"{updates:,}", f"{about['score']:.1f}", *cells]) + " |"
        )
    return "\n".join(text)


def _on(line: Mapping[str, Any]) -> list[str]:
    return [each.replace("(R)", "").replace(" Processor", "") for each in line["processors"]]


def cost_table(content: Mapping[str, Any]) -> str:
    """Markdown: what the runs of each method cost, without their evaluations and populations."""
    text = [
        "| method | runs | seconds of 1,000 updates | hours of all runs |",
        "|---|---:|---:|---:|",
    ]
    for method in CONTINUOUS:
        cells = [cell for cell in content["cells"] if cell["method"] == method]
        cells = [cell for cell in cells if "cpu_seconds" in cell]
        if cells:
            each = [1000 * cell["cpu_seconds"] / cell["updates"] for cell in cells]
            hours = sum(cell["cpu_seconds"] for cell in cells) / 3600
            text.append(
                f"| {method} | {len(cells)} | {statistics.median(each):.1f} | {hours:.2f} |"
            )
    return "\n".join(text)


def curves(content: Mapping[str, Any]) -> dict[tuple[str, str], list[dict[int, float]]]:
    """For each dataset and method the scores of its runs by updates, unfinished ones too."""
    runs: dict[tuple[str, str], list[dict[int, float]]] = {}
    running = [(label.split(", "), part["curve"]) for label, part in content["unfinished"].items()]
    done = [((cell["dataset"], cell["method"]), cell["curve"]) for cell in content["cells"]]
    for (name, method, *_), curve in [*done, *running]:
        runs.setdefault((name, method), []).append({point: score for point, _, score in curve})
    return runs


def published_table(contents: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: means and deviations over seeds during training here, and those of CORL's README.

    ``contents``: result files, each by what its settings of ours are.
    """
    heads = [f"{point // 1000:,}" for point in MILLION]
    text = ["| dataset | method | seeds | " + " | ".join(heads) + " | CORL's README |"]
    text.append("|---|---|---:|" + "---:|" * (len(heads) + 1))
    groups = [
        (name, method, settings, runs)
        for settings, content in contents.items()
        for (name, method), runs in curves(content).items()
    ]
    for name, method, settings, runs in sorted(groups, key=lambda group: group[:3]):
        scores = [[run[point] for run in runs if point in run] for point in MILLION]
        cells = [_mean_and_deviation(each) for each in scores]
        published = PUBLISHED["-".join(name.split("-")[:2])][method]
        cells.append(f"{published[0]} ± {published[1]}")
        label = f"{method}, {settings}" if settings else method
        text.append("| " + " | ".join([name, label, str(len(runs)), *cells]) + " |")
    return "\n".join(text)


def _mean_and_deviation(scores: Sequence[float]) -> str:
    if not scores:
        return "-"
    return f"{np.mean(scores):.1f}" + (f" ± {np.std(scores):.1f}" if len(scores) > 1 else "")


def times_table(content: Mapping[str, Any]) -> str:
    """Markdown: a row a method, a column a dataset: seconds of 1,000 updates, their ratio to ours."""
    names = list(dict.fromkeys(line["dataset"] for line in content["times"]))
    labels = list(dict.fromkeys(line["method"] for line in content["times"]))
    text = ["| | " + " | ".join(names) + " |", "|---" + "|---:" * len(names) + "|"]
    lines = {(line["dataset"], line["method"]): line for line in content["times"]}
    for label in labels:
        found = [lines.get((name, label)) for name in names]
        cells = ["-" if e is None else f"{e['seconds']:.1f} ({e['of_ours']:.2f})" for e in found]
        text.append("| " + " | ".join([label, *cells]) + " |")
    return "\n".join(text)


def learning_table(content: Mapping[str, Any]) -> str:
    """Markdown: the mean score of the seeds at each evaluation, a row a dataset and method."""
    text = [
        "| dataset | method | mean score after a quarter, half, three quarters and all updates |"
    ]
    text.append("|---|---|---|")
    groups: dict[tuple[str, str], list[Any]] = {}
    for each in content["cells"]:
        groups.setdefault((each["dataset"], each["method"]), []).append(each["curve"])
    for (name, method), curves in sorted(groups.items(), key=_place):
        scores = np.array([[point[2] for point in curve] for curve in curves]).mean(0)
        cells = ", ".join(f"{score:.1f}" for score in scores)
        text.append(f"| {name} | {method} | {cells} |")
    return "\n".join(text)


def settings_table(content: Mapping[str, Any]) -> str:
    """Markdown: what each library was given, with its versions; datasets with the same share a row."""
    text = ["| method | datasets | settings | versions |", "|---|---|---|---|"]
    rows: dict[tuple[str, str, str], list[str]] = {}
    keys = [(name, method) for name, methods in content["settings"].items() for method in methods]
    for name, method in sorted(keys, key=lambda key: _place((key, None))[::-1]):
        about = content["settings"][name][method]
        shown = {k: v for k, v in about["settings"].items() if k in SHOWN or method not in OWN}
        cells = ", ".join(f"{key} {_short(value)}" for key, value in shown.items())
        versions = ", ".join(f"{key} {value}" for key, value in about["versions"].items())
        rows.setdefault((method, cells, versions), []).append(name)
    for (method, cells, versions), names in rows.items():
        text.append(f"| {method} | {', '.join(names)} | {cells} | {versions} |")
    return "\n".join(text)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace(" ", "")


def _place(group: tuple[tuple[str, str], Any]) -> tuple[int, int]:
    (name, method), _ = group
    return list(DATASETS).index(name), CONTINUOUS.index(method)


def tutorial_table(content: Mapping[str, Any]) -> str:
    """Markdown: what minari_tutorial.py wrote, a row a variant."""
    text = [
        "| | largest value of an observation in a batch | mean return at each evaluation | last |"
    ]
    text.append("|---|---:|---|---:|")
    for line in content["variants"]:
        points = zip(line["updates"], line["returns"], strict=True)
        returns = ", ".join(f"{value:.0f} after {updates:,}" for updates, value in points)
        largest = line["largest_value_of_a_batch"]["observation"]
        text.append(
            f"| {line['variant']} | {largest:.3g} | {returns} | {line['final_return']:.0f} |"
        )
    return "\n".join(text)


def corl_table(content: Mapping[str, Any]) -> str:
    """Markdown: compare_corl.py's largest differences of weights, and those of the disturbed copy."""
    names = [name for name, found in content.items() if "differences" in found]
    text = [f"| updates | {' | '.join(names)} |", "|---:" * (len(names) + 1) + "|"]
    for updates in content[names[0]]["differences"]:
        cells = []
        for name in names:
            kinds = [content[name][kind][updates] for kind in ("differences", "disturbed")]
            largest, disturbed = (max(kind.values()) for kind in kinds)
            cells.append(f"{largest:.0e} ({disturbed:.0e})")
        text.append("| " + " | ".join([f"{int(updates):,}", *cells]) + " |")
    return "\n".join(text)


def reference_table() -> str:
    """Markdown: the returns of score 0 and 100 of every dataset for which the package knows them."""
    text = ["| dataset | score 0 | score 100 | from |", "|---|---:|---:|---|"]
    rows = [(name, r.reference_scores, "its recipe") for name, r in BUILTIN.items()]
    rows += [(f'reference_scores="{n}"', pair, "D4RL") for n, pair in REFERENCE_RETURNS.items()]
    for name, pair, source in rows:
        text.append(f"| `{name}` | {pair[0]:.6g} | {pair[1]:.6g} | {source} |")
    return "\n".join(text)


def write_page(page: Path, result: str) -> None:
    """The tables between their markers in ``page``; those whose result file is missing stay."""
    makers = [
        ("scores table", result, table),
        ("long table", f"{result}_50k", table),
        ("first table", f"{result}_replay_first", table),
        ("cost table", f"{result}_50k", cost_table),
        ("learning table", result, learning_table),
        ("settings table", result, settings_table),
        ("times table", f"{result}_time", times_table),
        ("replay times table", f"{result}_replay_time", times_table),
        ("tutorial table", "minari_tutorial", tutorial_table),
        ("corl table", "compare_corl", corl_table),
    ]
    names = {file for _, file, _ in makers} | {f"{result}_million{end}" for end in MILLION_SETTINGS}
    contents = {
        name: json.loads(path.read_text())
        for name in names
        if (path := RESULTS / f"{name}.json").is_file()
    }
    texts = {name: maker(contents[file]) for name, file, maker in makers if file in contents}
    long = {
        settings: contents[f"{result}_million{end}"]
        for end, settings in MILLION_SETTINGS.items()
        if f"{result}_million{end}" in contents
    }
    texts |= {"published table": published_table(long)} if long else {}
    for name, text in (texts | {"reference table": reference_table()}).items():
        replace_table(page, text, f"<!-- {name} -->", f"<!-- /{name} -->")
