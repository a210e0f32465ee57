"""What ``rank_policies`` answered in 400 trials with exact values: trust.png.

    python docs/pictures/trust.py

Draws benchmarks/results/trust.json (``benchmarks/bench_trust.py``).
"""

import json
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
TRUST = HERE.parents[1] / "benchmarks" / "results" / "trust.json"
PARTS = {
    "a policy better than the behaviour policy": "#009E73",
    "a policy worse than the behaviour policy": "#D55E00",
    "none": "0.8",
}


def main() -> None:
    families = json.loads(TRUST.read_text())["families"]
    order = sorted(families, key=lambda name: (families[name]["none"], name), reverse=True)
    figure = Figure(figsize=(7, 5), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for place, name in enumerate(order):
        family, left = families[name], 0
        better = family["trials"] - family["none"] - family["harmful"]
        counts = (better, family["harmful"], family["none"])
        for count, colour in zip(counts, PARTS.values(), strict=True):
            axes.barh(place, count, left=left, color=colour, height=0.75)
            left += count
    gains = {name: family["possible_gain"] for name, family in families.items()}
    labels = [name if gains[name] else f"{name} (nothing to gain)" for name in order]
    axes.set_yticks(range(len(order)), labels, fontsize=8.5)
    axes.set(xlim=(0, 20), ylim=(-0.6, len(order) - 0.4), xlabel="number of trials")
    axes.set_xticks((0, 5, 10, 15, 20))
    for label, colour in PARTS.items():
        axes.barh(0, 0, color=colour, label=label)
    figure.legend(
        loc="outside upper center",
        ncols=3,
        frameon=False,
        fontsize=9,
        title="rank_policies recommended",
    )
    figure.savefig(HERE / "trust.png", dpi=100)


if __name__ == "__main__":
    main()
