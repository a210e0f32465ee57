"""Minari's tutorial with TorchRL's ``IQLLoss``: run as written, and with the loss and loader of this package.

    curl -O https://raw.githubusercontent.com/Farama-Foundation/Minari/main/docs/tutorials/using_datasets/IQL_torchrl.py
    python benchmarks/minari_tutorial.py IQL_torchrl.py

The tutorial's data are a download (``D4RL/pen/human-v2``, 25 demonstrations by hand). ``--dataset`` names a
Minari folder that contains them; without it a dataset of the same id, spaces and number of episodes is made
from random actions, which shows whether the script runs and what it trains on, and not how well it
learns. ``CHANGES`` lists what is replaced in its text, each with the reason; a replaced text must occur.
Writes benchmarks/results/minari_tutorial.json.
"""  # noqa: E501

from __future__ import annotations

import argparse
import contextlib
import io
import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

from iql_torchrl.data.builtin.recipes import play
from record import RESULTS, save

import gymnasium
import gymnasium_robotics  # noqa: F401 (registers the hand)
import matplotlib
import minari
import numpy as np
from minari.data_collector import EpisodeBuffer

DATASET, ENVIRONMENT, EPISODES = "D4RL/pen/human-v2", "AdroitHandPen-v1", 25
END = "viewer_env = TransformedEnv("
#: Reason, text, replacement; those of every variant.
CHANGES = [
    (
        "no display",
        "from pyvirtualdisplay import Display\n\n"
        "virtual_display = Display(visible=0, size=(1400, 900))\nvirtual_display.start()\n",
        "",
    ),
    ("no pictures", "GymEnv(env_id, from_pixels=True, pixels_only=False)", "GymEnv(env_id)"),
    ("no pictures", 'plt.imshow(tensordict["pixels"][0].numpy());', ""),
    ("no video", "from gymnasium.utils.save_video import save_video\n", ""),
    (
        "no network",
        "    split_trajs=False,\n",
        "    split_trajs=False, load_from_local_minari=True,\n",
    ),
]
LENGTH = [
    ("shorter", "iterations = 10_000", "iterations = {updates}"),
    ("shorter", "eval_interval = 1_000", "eval_interval = {every}"),
    ("shorter", "num_eval_episodes=20", "num_eval_episodes={episodes}"),
    ("shorter", "num_eval_episodes=100", "num_eval_episodes={episodes}"),
]
OUR_LOSS = (
    "our loss",
    "from torchrl.objectives import IQLLoss, SoftUpdate",
    "from iql_torchrl import IQLLoss\nfrom torchrl.objectives import SoftUpdate",
)
OUR_LOADER = (
    "our loader",
    "pbar = tqdm(range(iterations))",
    "from iql_torchrl import load_dataset\n"
    "replay_buffer = load_dataset(dataset_id, progress=False).replay_buffer(batch_size)\n"
    "pbar = tqdm(range(iterations))",
)
VARIANTS: dict[str, list[tuple[str, str, str]]] = {
    "TorchRL's loss": [],
    "our loss": [OUR_LOSS],
    "our loss, our loader": [OUR_LOSS, OUR_LOADER],
    "TorchRL's loss, our loader": [OUR_LOADER],
}
#: Appended: what the script trains on.
SEEN = """
rows = replay_buffer.sample()
largest = {
    str(key): float(rows[key].abs().max()) for key in ("observation", "action", ("next", "reward"))
}
"""


def make_dataset(folder: Path) -> None:
    """A dataset with the tutorial's id and layout: 25 episodes of uniform actions times 0.3."""
    env, generator, buffers = gymnasium.make(ENVIRONMENT), np.random.default_rng(0), []

    def act(*_: Any) -> Any:
        return np.float32(0.3 * generator.uniform(-1, 1, env.action_space.shape))  # type: ignore[arg-type]

    for number in range(EPISODES):
        columns = play(env, act, *env.reset(seed=number))
        del columns["infos"]
        arrays = {name: np.stack(values) for name, values in columns.items()}
        buffers.append(EpisodeBuffer(**arrays))
    with (
        mock.patch.dict(os.environ, {"MINARI_DATASETS_PATH": str(folder)}),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers(DATASET, buffers, env=env, author="iql_torchrl")


def changed(text: str, changes: list[tuple[str, str, str]]) -> str:
    for reason, old, new in changes:
        if old not in text:
            raise SystemExit(
                f"the tutorial does not contain {old!r} ({reason}): it is another version, so CHANGES "
                "must be adapted."
            )
        text = text.replace(old, new)
    return text


def execute(text: str, folder: Path) -> dict[str, Any]:
    """The names of the script after its end, or ``{"error": ...}``."""
    names: dict[str, Any] = {"__name__": "__main__"}
    environment = {"MINARI_DATASETS_PATH": str(folder), "HOME": str(folder / "home")}
    began, quiet = time.perf_counter(), io.StringIO()
    with (
        mock.patch.dict(os.environ, environment),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(quiet),
        contextlib.redirect_stderr(quiet),
    ):
        try:
            exec(compile(text, "IQL_torchrl.py", "exec"), names)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    return {**names, "seconds": time.perf_counter() - began}


def as_written(text: str, folder: Path) -> list[dict[str, str]]:
    """The first error of the script, then that after each change that removes it."""
    errors, done = [], 0
    while done < len(CHANGES):
        result = execute(changed(text, CHANGES[:done]), folder)
        errors.append({"changes": str(done), "error": result.get("error", "none")})
        print(f"{done} changes: {errors[-1]['error']}", flush=True)
        done += 1
        while done < len(CHANGES) and CHANGES[done][0] == CHANGES[done - 1][0]:
            done += 1
    return errors


def measured(names: dict[str, Any], o: argparse.Namespace) -> dict[str, Any]:
    return {
        "updates": [i * o.every for i in range(len(names["eval_reward_logs"]))],
        "returns": [float(value) for value in names["eval_reward_logs"]],
        "final_return": float(names["final_score"]),
        "loss": names["loss_logs"][:: max(1, o.updates // 20)],
        "largest_value_of_a_batch": names["largest"],
        "seconds": names["seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("tutorial", type=Path, help="the tutorial's file")
    add("--dataset", type=Path, help="a Minari folder that contains its dataset")
    add("--updates", type=int, default=1_000)
    add("--every", type=int, default=250, help="updates between two evaluations")
    add("--episodes", type=int, default=5, help="of each evaluation")
    o = parser.parse_args()
    matplotlib.use("agg")
    with tempfile.TemporaryDirectory() as scratch:
        folder = o.dataset or Path(scratch)
        (folder / "home").mkdir(exist_ok=True)
        if o.dataset is None:
            make_dataset(folder)
        text = o.tutorial.read_text().partition(END)[0]
        numbers = {"updates": o.updates, "every": o.every, "episodes": o.episodes}
        length = [(reason, old, new.format(**numbers)) for reason, old, new in LENGTH]
        content: dict[str, Any] = {
            "dataset": "25 episodes of random actions"
            if o.dataset is None
            else str(o.dataset.name),
            "as_written": as_written(changed(text, length), folder),
            "variants": [],
        }
        for label, changes in VARIANTS.items():
            names = execute(changed(text, [*CHANGES, *length, *changes]) + SEEN, folder)
            line = {"variant": label, **(names if "error" in names else measured(names, o))}
            content["variants"].append(line)
            shown = {key: value for key, value in line.items() if key not in ("loss", "updates")}
            print(shown, flush=True)
            packages = ("minari", "gymnasium-robotics")
            save(RESULTS / "minari_tutorial.json", content, packages=packages)


if __name__ == "__main__":
    main()
