"""IQL, behaviour cloning and the dataset in two mazes, over several training seeds.

    python benchmarks/bench_pointmaze.py

One distant goal, to be reached by joining parts of drives (share of episodes that reach it, and their
steps), and the dataset's task of random observed targets (the return is the number of targets reached;
with fewer updates, because it is learned sooner). Settings are those of ``examples/iql_pointmaze.py``.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from iql_torchrl import Agent, load_dataset
from iql_torchrl.data.builtin import ensure_dataset
from study import Row, Task, make_parser, play, returns_task, run

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from iql_pointmaze import FIXED, MAZES, fixed_goal

VARIANTS = {"cloning": {"temperature": 0.0}, "IQL": {}}
# The dataset is good at this task, and advantages are fractions of a target instead of steps.
RANDOM = replace(FIXED, discount=0.99, expectile=0.7, temperature=10.0, reward="raw", updates=4_000)


def fixed(maze: str, o: argparse.Namespace) -> Task:
    data, level = fixed_goal(load_dataset(ensure_dataset(f"pointmaze/{maze}-v0")), maze)

    def scores(agent: Agent) -> list[Row]:
        played = play(agent.policy, data, o.episodes)
        reached = played.returns > 0
        steps = float(played.lengths[reached].mean()) if reached.any() else None
        return [{"reached": float(reached.mean()), "steps": steps}]

    level = {name: float(value) for name, value in level.items()}
    return Task(
        data=data, config=FIXED, variants=VARIANTS, scores=scores, references={"the dataset": level}
    )


def random(maze: str, o: argparse.Namespace) -> Task:
    source = ensure_dataset(f"pointmaze/{maze}-v0")
    data = load_dataset(source, concatenate=["observation", "desired_goal"])
    return returns_task(data, RANDOM, VARIANTS, o.episodes)


TASKS = {
    f"{make.__name__} {maze}": partial(make, maze) for make in (fixed, random) for maze in MAZES
}


def main() -> None:
    sizes = {"seeds": 3, "updates": None, "episodes": 20}
    o = make_parser(__doc__, "pointmaze", tasks=TASKS, **sizes).parse_args()
    run(o, TASKS, batches="own", packages=["gymnasium-robotics"])


if __name__ == "__main__":
    main()
