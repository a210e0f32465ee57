"""The picture of docs/finetuning.md, from benchmarks/results/finetune.json.

python docs/pictures/finetune.py
"""

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from iql_torchrl.files import atomic_write

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "benchmarks" / "results" / "finetune.json"
LOOKS = {"fine-tuned": "#0072B2", "dataset only": "#009E73", "no pretraining": "#D55E00"}


def main() -> None:
    record = json.loads(RESULTS.read_text())
    figure = Figure(figsize=(8.6, 3.7), layout="constrained", facecolor="white")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (name, level) in zip(panels, record["dataset_returns"].items(), strict=True):
        switch = record["configs"][name]["updates"] - record["online_steps"]
        axes.axvline(switch, color="0.4", linestyle=":", linewidth=1)
        axes.text(switch, -1720, " environment from here", fontsize=8, color="0.3")
        axes.set_ylim(-1750, -60)
        axes.axhline(level, color="0.4", linestyle="--", linewidth=1, label="the dataset")
        for method, colour in LOOKS.items():
            runs = [
                r["curve"] for r in record["runs"] if (r["dataset"], r["method"]) == (name, method)
            ]
            values = np.array([run["return_mean"] for run in runs])
            start = switch if method == "no pretraining" else 0
            updates = start + np.array(runs[0]["updates"])
            axes.plot(updates, values.mean(0), color=colour, linewidth=2, label=method)
            axes.fill_between(
                updates, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0
            )
        axes.set_title(f"dataset of {name}", fontsize=10, loc="left")
        axes.set_xlabel("updates", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("mean return", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=4, frameon=False, fontsize=9)
    with atomic_write(HERE / "finetune.png") as temporary:
        figure.savefig(temporary, dpi=100, format="png")


if __name__ == "__main__":
    main()
