"""Returns of the dataset, behaviour cloning and IQL over several training seeds.

    python benchmarks/bench_learning.py --result pendulum
    python benchmarks/bench_learning.py --result halfcheetah --dataset halfcheetah_medium.npz \\
        --env HalfCheetah-v5 --preset locomotion --updates 100000 --seeds 2

Writes benchmarks/results/NAME.json.
"""

from __future__ import annotations

import argparse

from iql_torchrl import PRESETS, load_dataset
from iql_torchrl.data.builtin import ensure_source
from study import Task, make_parser, returns_task, run

VARIANTS = {"behaviour cloning": {"temperature": 0.0}, "IQL": {}}


def task_of(o: argparse.Namespace) -> Task:
    config = PRESETS[o.preset]
    data = load_dataset(ensure_source(o.dataset), env=o.env, reward=config.reward, progress=False)
    return returns_task(data, config, VARIANTS, o.episodes, num_envs=8)


def main() -> None:
    sizes = {"seeds": 5, "updates": None, "episodes": 100, "points": 5}
    parser = make_parser(__doc__, "learning", **sizes)
    add = parser.add_argument
    add("--dataset", default="pendulum/mixed-v0", help="Minari id or file")
    add("--env", help="Gymnasium id, for files without one")
    add("--preset", default="quick", choices=list(PRESETS))
    o = parser.parse_args()
    run(o, {o.dataset: task_of}, batches="own")


if __name__ == "__main__":
    main()
