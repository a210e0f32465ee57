"""Time of one member's update as a population grows, and of the same number of single runs.

    python benchmarks/bench_population.py
    python benchmarks/bench_population.py --device cuda --widths 256 --only shared,single,floor
    python benchmarks/bench_population.py --members 1,8 --widths 64 --only shared,single

HalfCheetah's sizes, sampling included. Blocks of all competitors alternate and have about the same
duration; times are those of one member's update. P single runs one after the other take P times as
long as one, so one of each form is timed, in the same rounds. ``floor`` is the matrix products of the
updates of P members: one batched product for all, or P products; on CUDA as a graph. Writes
benchmarks/results/population_DEVICE[_NAME].json and its picture.
"""

from __future__ import annotations

import argparse
import gc
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path

from iql_torchrl import IQLPopulation, OfflineDataset, captured, make_agent
from iql_torchrl.report.figures import save as save_figure
from measuring import Results, add_options, integers, measure, show, summarise
from record import machine, place, save
from step_floors import products, replayed
from step_rivals import Made, Rival, Sizes, config_of, dataset_of, in_form

import numpy as np
import torch
from tensordict import TensorDict

MEMBERS = {"cpu": [1, 2, 4, 8, 16, 32], "cuda": [1, 4, 16, 64, 256, 512]}
SINGLES = ("single captured", "single compiled")
#: competitor: colour, marker and dashes of its line
LOOKS = {
    "shared captured": ("#1f77b4", "D", "-"),
    "shared eager": ("#1f77b4", "o", ":"),
    "own captured": ("#2ca02c", "D", "-"),
    "own eager": ("#2ca02c", "o", ":"),
    "single captured": ("#d62728", "", "-"),
    "single compiled": ("#d62728", "", "--"),
    "floor batched": ("black", "", "-"),
    "floor one by one": ("black", "", ":"),
}


def single(
    form: str, dataset: OfflineDataset, updates: int, _: TensorDict, sizes: Sizes, device: str
) -> Made:
    step = make_agent(config_of(sizes, device), dataset).step
    return in_form(step, form, dataset.transitions, sizes, device, updates)


def population(
    batches: str,
    form: str,
    dataset: OfflineDataset,
    updates: int,
    count: int,
    _: TensorDict,
    sizes: Sizes,
    device: str,
) -> Made:
    # settings differ between members, so that none is a constant of the program
    configs = [
        config_of(sizes, device, seed=number, temperature=float(number % 4), expectile=expectile)
        for number, expectile in zip(range(count), np.linspace(0.5, 0.9, count), strict=True)
    ]
    runs = IQLPopulation(configs, dataset, batches=batches)
    if form == "captured":
        return captured(runs.step, runs.sampler, updates=updates), updates * count
    return (lambda: runs.step(runs.sampler.sample())), count


def floor(count: int, batched: bool, _: TensorDict, sizes: Sizes, device: str) -> Made:
    """Operands of one shape share their memory, so that it stays in the cache where it fits."""
    operand = lru_cache(None)(lambda *shape: torch.randn(shape, device=device))
    result = lru_cache(None)(lambda *shape: torch.empty(shape, device=device))
    work = [
        (operand(count, *a), operand(count, *b), result(count, a[0], b[1]))
        for a, b in products(sizes)
    ]
    multiply = torch.bmm if batched else torch.mm
    if not batched:
        work = [piece for triple in work for piece in zip(*triple, strict=True)]

    def update() -> object:
        return [multiply(a, b, out=out) for a, b, out in work][-1]

    return (replayed(update, work) if device.startswith("cuda") else update), count


def competitors(dataset: OfflineDataset, updates: int, count: int) -> dict[str, Rival]:
    rivals: dict[str, Rival] = {
        name: partial(single, name.split()[1], dataset, updates) for name in SINGLES
    }
    for batches in ("shared", "own"):
        for form in ("captured", "eager"):
            rivals[f"{batches} {form}"] = partial(
                population, batches, form, dataset, updates, count
            )
    rivals["floor batched"] = partial(floor, count, True)
    return rivals | {"floor one by one": partial(floor, count, False)}


def draw(path: Path, points: list[Results], title: str) -> None:
    """Time of a member's update against the number of members, one panel per width."""
    from matplotlib.figure import Figure

    widths = list(dict.fromkeys(point["sizes"]["width"] for point in points))
    figure = Figure(figsize=(5.2 * len(widths), 4.4), layout="constrained")
    figure.suptitle(title, fontsize=10)
    for axes, width in zip(figure.subplots(1, len(widths), squeeze=False)[0], widths, strict=True):
        of_width = {p["members"]: p for p in points if p["sizes"]["width"] == width}
        for name, (colour, marker, dashes) in LOOKS.items():
            entries = {n: p["competitors"].get(name, {}) for n, p in of_width.items()}
            costs = {n: e["median_ms"] for n, e in entries.items() if "median_ms" in e}
            if costs:
                axes.plot(costs.keys(), costs.values(), color=colour, marker=marker,
                          linestyle=dashes, markersize=4, linewidth=1.4, label=name)  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="members P", ylabel="ms per member's update")
        axes.set_xticks(list(of_width), [str(count) for count in of_width])
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.tick_params(axis="y", which="minor", labelsize=7)
        axes.set_title(f"width {width}", fontsize=10)
        axes.grid(alpha=0.3, which="both", linewidth=0.5)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4,
                  fontsize=8, frameon=False)  # fmt: skip
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_options(parser, rounds=9, block=0.25)
    add = parser.add_argument
    add("--members", type=integers, metavar="N,...")
    add("--widths", type=integers, default=[64, 256], metavar="N,...")
    add("--batch", type=int, default=256)
    add("--rows", type=int, default=50_000)
    add("--captured-updates", type=int, default=8, help="updates a call of the captured form")
    add("--only", default="", metavar="NAME,...", help="competitors whose names hold these words")
    o = parser.parse_args()
    members = o.members or MEMBERS[o.device.split(":")[0]]
    torch._dynamo.config.recompile_limit = 2**16  # every population is a program of its own
    path = place("population", o.device, o.result, folder=o.output)
    title = "{name}, {threads} threads".format_map(machine(o.device))
    points: list[Results] = []
    for width in o.widths:
        sizes = Sizes(width=width, batch=o.batch, rows=o.rows)
        dataset = dataset_of(sizes)
        for count in members:
            rivals = competitors(dataset, o.captured_updates, count)
            rivals = {n: m for n, m in rivals.items() if any(w in n for w in o.only.split(","))}
            results, _ = measure(rivals, sizes, o.device, rounds=o.rounds, block=o.block)
            summarise(results, *SINGLES, "floor batched", "floor one by one")
            show(f"width {width}, batch {o.batch}, {count} members", results)
            points.append({"sizes": asdict(sizes), "members": count, "competitors": results})
            save(path, {"points": points}, device=o.device)
            draw(path.with_suffix(".png"), points, title)
            gc.collect()


if __name__ == "__main__":
    main()
