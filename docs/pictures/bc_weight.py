"""Pendulum's return over ``bc_weight`` of DDPG+BC, beside IQL, best of 32 and cloning: bc_weight.png.

    python docs/pictures/bc_weight.py

Draws benchmarks/results/policies.json and policies_weights.json (``benchmarks/bench_policies.py``).
"""

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parents[1] / "benchmarks" / "results"
LINES = {"flow, best of 32": "#009E73", "IQL": "#0072B2", "cloning": "#E69F00"}
PREFIX = "DDPG+BC, min of online, weight "


def scores(name: str) -> dict[str, list[float]]:
    """Pendulum's returns by variant and way to act, one of each seed."""
    found: dict[str, list[float]] = {}
    for row in json.loads((RESULTS / name).read_text())["rows"]:
        if row["task"] == "pendulum" and "seed" in row:
            label = f"{row['variant']}, {row['way']}".removesuffix(", ")
            found.setdefault(label, []).append(row["return"])
    return found


def main() -> None:
    other = scores("policies.json")
    every = scores("policies_weights.json") | other
    weights = {float(k.removeprefix(PREFIX)): v for k, v in every.items() if k.startswith(PREFIX)}
    figure = Figure(figsize=(7, 3.6), layout="constrained", facecolor="white")
    axes = figure.subplots()
    order = sorted(weights)
    means = [np.mean(weights[weight]) for weight in order]
    axes.plot(order, means, "-", color="#CC79A7", label="DDPG+BC (points: 4 seeds)")
    for weight in order:
        axes.plot([weight] * len(weights[weight]), weights[weight], ".", color="#CC79A7")
    for name, colour in LINES.items():
        axes.axhline(np.mean(other[name]), color=colour, ls="--", lw=1.4)
        below = name == "IQL"
        axes.annotate(
            name, (0.99, np.mean(other[name])), xycoords=("axes fraction", "data"),
            xytext=(0, -4 if below else 3), textcoords="offset points",
            ha="right", va="top" if below else "bottom", color=colour,
        )  # fmt: skip
    axes.set(
        xscale="log", xlabel="bc_weight", ylabel="mean return, Pendulum", ylim=(-1200, 0),
        title="DDPG+BC: as good as IQL or no better than cloning, by its weight",
    )  # fmt: skip
    axes.set_xticks(order, [f"{weight:g}" for weight in order])
    axes.minorticks_off()
    axes.legend(loc="center right", frameon=False)
    figure.savefig(HERE / "bc_weight.png", dpi=100)


if __name__ == "__main__":
    main()
