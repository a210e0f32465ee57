"""Time of one member's update as a population grows, and of the same number of single runs.

    python benchmarks/bench_population.py
    python benchmarks/bench_population.py --device cuda --widths 256 --only shared,single,floor
    python benchmarks/bench_population.py --members 1,8 --widths 64 --only shared,single

HalfCheetah's sizes, sampling included. Blocks of all competitors alternate and have about the same
duration; medians are compared. P single runs one after the other take P times as long as one, so one
of each form is timed, in the same rounds. ``floor`` is the matrix products of the updates of P
members: one batched product for all, or P products, whichever is faster; on CUDA as a graph. Writes
benchmarks/results/population_DEVICE[_NAME].json and its picture.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import warnings
from dataclasses import asdict
from pathlib import Path

from bench_step import Results, integers, machine_of, measure
from iql_torchrl.report.figures import save as save_figure
from population_rivals import FLOORS, SINGLES, competitors, dataset_of
from record import RESULTS, save
from step_rivals import Sizes

import torch

MEMBERS = {"cpu": [1, 2, 4, 8, 16, 32], "cuda": [1, 4, 16, 64, 256, 512]}
#: competitor: colour, marker and dashes of its line
LOOKS = {
    "shared captured": ("#1f77b4", "D", "-"),
    "shared eager": ("#1f77b4", "o", ":"),
    "own captured": ("#2ca02c", "D", "-"),
    "own eager": ("#2ca02c", "o", ":"),
    "single captured": ("#d62728", "", "-"),
    "single compiled": ("#d62728", "", "--"),
    "floor": ("black", "", "-"),
}


def summarise(results: dict[str, Results], count: int) -> None:
    """Medians, per member, and as a share of ``count`` single runs and of the faster floor."""
    done = {name: entry for name, entry in results.items() if entry.get("ms")}
    for name, entry in done.items():
        runs = 1 if name in SINGLES else count
        entry["median_ms"] = statistics.median(entry["ms"])
        entry["ms_per_member"] = entry["median_ms"] / runs
        entry["member_updates_per_second"] = 1e3 / entry["ms_per_member"]
    floors = [done[name]["ms_per_member"] for name in FLOORS if name in done]
    for entry in done.values():
        for name in SINGLES:
            if name in done:
                entry[f"of_{name.replace(' ', '_')}"] = (
                    entry["ms_per_member"] / done[name]["median_ms"]
                )
        if floors:
            entry["of_floor"] = entry["ms_per_member"] / min(floors)


def show(results: dict[str, Results], sizes: Sizes, count: int) -> None:
    print(f"\nwidth {sizes.width}, batch {sizes.batch}, {count} members")
    print(f"{'':18}{'ms':>10}{'ms/member':>11}{'of captured':>13}{'of compiled':>13}"
          f"{'of floor':>10}{'member-upd./s':>15}{'peak MiB':>10}")  # fmt: skip
    for name, entry in results.items():
        if "median_ms" not in entry:
            print(f"{name:18} {entry.get('failed', 'not run')}")
            continue
        keys = ("of_single_captured", "of_single_compiled", "of_floor")
        ratios = [entry.get(key, float("nan")) for key in keys]
        print(f"{name:18}{entry['median_ms']:10.3f}{entry['ms_per_member']:11.4f}"
              f"{ratios[0]:13.3f}{ratios[1]:13.3f}{ratios[2]:10.2f}"
              f"{entry['member_updates_per_second']:15,.0f}"
              + (f"{entry['peak_mib']:10.0f}" if "peak_mib" in entry else ""), flush=True)  # fmt: skip


def draw(path: Path, points: list[Results], title: str) -> None:
    """Time of a member's update against the number of members, one panel per width."""
    from matplotlib.figure import Figure

    widths = list(dict.fromkeys(point["sizes"]["width"] for point in points))
    figure = Figure(figsize=(5.2 * len(widths), 4.4), layout="constrained")
    figure.suptitle(title, fontsize=10)
    for axes, width in zip(figure.subplots(1, len(widths), squeeze=False)[0], widths, strict=True):
        entry = [point for point in points if point["sizes"]["width"] == width]
        for name, (colour, marker, dashes) in LOOKS.items():
            costs = {p["members"]: cost(p["competitors"], name) for p in entry}
            costs = {count: value for count, value in costs.items() if value is not None}
            if costs:
                axes.plot(costs.keys(), costs.values(), color=colour, marker=marker,
                          linestyle=dashes, markersize=4, linewidth=1.4, label=name)  # fmt: skip
        counts = [point["members"] for point in entry]
        axes.set(xscale="log", yscale="log", xlabel="members P")
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.tick_params(axis="y", which="minor", labelsize=7)
        axes.set_ylabel("ms per member's update")
        axes.set_title(f"width {width}, batch {entry[0]['sizes']['batch']}", fontsize=10)
        axes.grid(alpha=0.3, which="both", linewidth=0.5)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4,
                  fontsize=8, frameon=False)  # fmt: skip
    save_figure(figure, path)


def cost(results: dict[str, Results], name: str) -> float | None:
    names = FLOORS if name == "floor" else (name,)
    costs = [
        results[key]["ms_per_member"] for key in names if "ms_per_member" in results.get(key, {})
    ]
    return min(costs, default=None)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--device", default="cpu")
    add("--members", type=integers, metavar="N,...")
    add("--widths", type=integers, default=[64, 256], metavar="N,...")
    add("--batch", type=int, default=256)
    add("--rows", type=int, default=50_000)
    add("--rounds", type=int, default=9)
    add("--block", type=float, default=0.25, help="seconds")
    add("--captured-updates", type=int, default=8, help="updates a call of the captured form")
    add("--only", default="", metavar="NAME,...", help="competitors whose names hold these words")
    add("--result", default="", metavar="NAME", help="ending of the result file's name")
    add("--output", type=Path, help="folder of the results (benchmarks/results)")
    options = parser.parse_args()
    options.members = options.members or MEMBERS[options.device.split(":")[0]]
    return options


def main() -> None:
    o = parse()
    torch._dynamo.config.recompile_limit = 2**16  # every population is a program of its own
    warnings.filterwarnings("ignore", category=FutureWarning)  # tensordict under torch.compile
    ending = f"_{o.result}" if o.result else ""
    path = (o.output or RESULTS) / f"population_{o.device.split(':')[0]}{ending}.json"
    machine = machine_of(o.device)
    record: Results = {"machine": machine, "points": []}
    words = o.only.split(",")
    title = str(machine["name"]) + ("" if "cuda" in o.device else f", {machine['threads']} threads")
    for width in o.widths:
        sizes = Sizes(width=width, batch=o.batch, rows=o.rows)
        log = dataset_of(sizes)
        for count in o.members:
            rivals = competitors(log, o.captured_updates, count)
            rivals = {n: m for n, m in rivals.items() if any(w in n for w in words)}
            results, _ = measure(rivals, sizes, o.device, o.rounds, o.block, 0)
            summarise(results, count)
            show(results, sizes, count)
            point = {"sizes": asdict(sizes), "members": count, "competitors": results}
            record["points"].append(point)
            save(path, record)
            draw(path.with_suffix(".png"), record["points"], title)
            gc.collect()


if __name__ == "__main__":
    main()
