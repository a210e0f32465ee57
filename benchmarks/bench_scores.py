"""Scores of IQL here, in d3rlpy, TorchRL and CORL, and of behaviour cloning, on the same datasets.

    python benchmarks/bench_scores.py --peers FOLDER --jobs 2
    python benchmarks/bench_scores.py --peers FOLDER --time
    python benchmarks/bench_scores.py --page docs/scores.md

Every cell (dataset, method, seed) trains in a process of its own with one thread, in the virtual
environment of its library below FOLDER, which the first call makes (d3rlpy pins an older Gymnasium).
Its policy is then asked for deterministic actions, and ``iql_torchrl.evaluate`` plays it, so that
environment, seeds and loop are the same for all. A cell is written to benchmarks/results/scores.json
as soon as it is done, and the evaluations of an unfinished one under ``unfinished``; the same command
continues with the cells that are missing.

The defaults are the plan of the published table: ``--seeds 5``, and for each dataset the updates in
``DATASETS`` (``--updates DATASET=N`` changes them). Settings are those of each library's authors
(``METHODS`` names the files); only the schedules' lengths, and the bounds of actions, follow from
the dataset. CORL takes part if ``--corl FILE`` names its iql.py, which is not a package:

    curl -O https://raw.githubusercontent.com/corl-team/CORL/main/algorithms/offline/iql.py

``--join NAME ...`` adds the cells of other result files, of runs at the same time or of
score_population.py. ``--time`` measures the time of 1,000 updates instead: blocks of all methods
alternate, each in its own process while the others wait, and medians are written to
benchmarks/results/scores_time.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from iql_torchrl import evaluate
from record import RESULTS, processor, save
from score_datasets import (
    CACHE,
    CONTINUOUS,
    DATASETS,
    OWN,
    Data,
    about_dataset,
    options_of,
    scored_data,
)
from score_tables import add, identity, join, read, table, write_page

import gymnasium
import numpy as np
import torch
from tensordict.nn import TensorDictModule

WORKER = Path(__file__).with_name("score_methods.py")
EVALUATION_SEED = 10_000
CHUNK = 250  # updates of one command to a process: the least that may be asked for
CAPTURED = 25  # updates of one call of the captured form, as in score_methods.py
RESULT_LOCK = threading.Lock()

#: The pip requirements of each method's environment; none: that of this package.
ENVIRONMENTS: dict[str, tuple[str, ...]] = {
    "ours": (),
    "cloning": (),
    "TorchRL": ("torch==2.13.0", "torchrl==0.14.1", "tensordict==0.14.3"),
    "d3rlpy": ("torch==2.13.0", "d3rlpy==2.8.1"),
    "CORL": ("torch==2.13.0", "numpy"),
}
#: What a call without ``--datasets`` runs: the published table, about an hour and a half of one core.
PLAN = ("pendulum", "sepsis", "cartpole", "maze2d-umaze")


# -- processes ----------------------------------------------------------------------------------------


def interpreter(method: str, peers: Path) -> Path:
    """Python of the method's virtual environment, which is made first if it is absent."""
    requirements = ENVIRONMENTS[method]
    if not requirements:
        return Path(sys.executable)
    folder = peers / method.lower()
    python, done = folder / "bin" / "python", folder / "complete"
    if not done.is_file():
        print(f"making the environment of {method} in {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", *requirements]
        subprocess.run(install, check=True)
        done.touch()
    return python


class Worker:
    """A process that has one learner; see score_methods.py."""

    def __init__(self, python: Path, method: str, task: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        # A peer's environment must not see this package.
        if python != Path(sys.executable):
            environment.pop("PYTHONPATH", None)
        else:
            environment["PYTHONPATH"] = str(Path(__file__).parents[1])
        self.messages = task.with_suffix(".log")
        with self.messages.open("w") as messages:
            self.process = subprocess.Popen(
                [str(python), str(WORKER), method, str(task)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=messages,
                text=True,
                env=environment,
            )

    def ask(self, **command: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):  # if the process has ended, its messages are read below
            print(json.dumps(command), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            last = "\n".join(self.messages.read_text().splitlines()[-15:])
            raise RuntimeError(f"a process has ended ({self.messages}):\n{last}")
        result: dict[str, Any] = json.loads(line)
        return result

    def act(self, observations: Any, masks: Any = None) -> Any:
        given = {"mask": np.asarray(masks).tolist()} if masks is not None else {}
        return np.asarray(self.ask(act=np.asarray(observations).tolist(), **given)["actions"])

    def close(self) -> None:
        with suppress(BrokenPipeError), self.process:  # closes the pipes and waits for its end
            pass


@contextmanager
def worker(
    o: argparse.Namespace, name: str, method: str, seed: int, updates: int, **changed: Any
) -> Iterator[tuple[Worker, Data]]:
    """A process that will train ``method`` on the dataset ``name``, and the dataset."""
    data, path = scored_data(name, o.peers)
    task: dict[str, Any] = {
        "rows": str(path), "seed": seed, "updates": updates,
        "chunk": o.block if o.time else min(CHUNK, updates),
        "options": options_of(DATASETS[name], method, data, o.corl) | changed,
    }  # fmt: skip
    env = data.make_env()
    if isinstance(env.action_space, gymnasium.spaces.Discrete):
        task["actions"] = int(env.action_space.n)
    else:
        assert isinstance(env.action_space, gymnasium.spaces.Box)
        task |= {"low": env.action_space.low.tolist(), "high": env.action_space.high.tolist()}
    if isinstance(env.observation_space, gymnasium.spaces.Discrete):
        task["states"] = int(env.observation_space.n)
    env.close()
    label = "-".join(str(each) for each in (name, method, seed, updates, *changed.values()))
    file = o.peers / "tasks" / f"{label}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(task))
    process = Worker(interpreter(method, o.peers), method, file)
    try:
        yield process, data
    finally:
        process.close()


# -- scores -------------------------------------------------------------------------------------------


def mean_return(data: Data, act: Callable[..., Any], episodes: int) -> float:
    """Of ``episodes`` episodes from fixed seeds, by the package's own loop; or the exact value."""
    if data.play is not None:
        return data.play(act)
    env = data.make_env()
    box = env.action_space if isinstance(env.action_space, gymnasium.spaces.Box) else None
    env.close()

    class Asked(torch.nn.Module):
        """Actions from the other process, within the bounds."""

        def forward(self, observation: torch.Tensor) -> torch.Tensor:
            actions = act(observation.numpy())
            if box is None:
                return torch.as_tensor(actions)
            return torch.as_tensor(np.clip(actions, box.low, box.high).astype(np.float32))

    policy = TensorDictModule(Asked(), in_keys=["observation"], out_keys=["action"])
    played = evaluate(
        policy, data.make_env, episodes=episodes, num_envs=episodes, seed=EVALUATION_SEED
    )
    return float(played.returns.mean())


def cell(
    o: argparse.Namespace,
    name: str,
    method: str,
    seed: int,
    evaluated: Callable[[list[Any]], None] = lambda curve: None,
) -> dict[str, Any]:
    """Train and evaluate one method with one seed; ``evaluated`` gets the curve so far."""
    scored, updates, began = DATASETS[name], o.updates[name], time.perf_counter()
    changed = o.change if method in OWN or o.methods == [method] else {}
    with worker(o, name, method, seed, updates, **changed) as (process, data):
        about = process.ask(about=True)
        points = sorted({updates * (i + 1) // o.points // CHUNK * CHUNK for i in range(o.points)})
        points, done, cpu, curve = [point for point in points if point] or [updates], 0, 0.0, []
        for point in [*points[:-1], updates]:
            cpu += process.ask(learn=point - done)["cpu_seconds"]
            done, value = point, mean_return(data, process.act, scored.episodes)
            curve.append([point, value, data.score(value)])
            evaluated(curve)
    return {
        "dataset": name, "method": method, "seed": seed, "updates": updates,
        "return": curve[-1][1], "score": curve[-1][2], "curve": curve,
        "cpu_seconds": cpu, "wall_seconds": time.perf_counter() - began, **about,
    }  # fmt: skip


def missing(o: argparse.Namespace, cells: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """The cells of the plan that are not in ``cells``; all methods of a seed before the next seed."""
    done = set(map(identity, cells))
    plan = [
        (name, method, seed)
        for name in o.datasets
        for seed in range(o.seeds)
        for method in DATASETS[name].methods
        if method in o.methods and (method != "CORL" or o.corl is not None)
    ]
    return [each for each in plan if (*each, o.updates[each[0]]) not in done]


def run(o: argparse.Namespace, path: Path) -> None:
    content = read(path)
    plan = missing(o, content["cells"])
    for method in dict.fromkeys(each[1] for each in plan):
        interpreter(method, o.peers)  # one after the other, before processes need it

    def one(each: tuple[str, str, int]) -> None:
        label = ", ".join(map(str, (*each, o.updates[each[0]])))

        def evaluated(curve: list[Any]) -> None:
            with RESULT_LOCK:
                content["unfinished"][label] = {"curve": curve, "processor": processor()}
                save(path, content, packages=("gymnasium", "mujoco"))

        result = cell(o, *each, evaluated=evaluated) | {"processor": processor()}
        described = about_dataset(each[0], o.peers)
        with RESULT_LOCK:
            content["datasets"][each[0]] = described
            content["unfinished"].pop(label, None)
            add(content, result)
            save(path, content, packages=("gymnasium", "mujoco"))
            left = len(missing(o, content["cells"]))
            text = f"{each[0]} {each[1]} seed {each[2]}: return {result['return']:.4g}, score "
            text += f"{result['score']:.1f} ({result['wall_seconds']:.0f} s; {left} left)"
            print(text, flush=True)

    with ThreadPoolExecutor(o.jobs) as pool:
        for done in [pool.submit(one, each) for each in plan]:
            done.result()


# -- time ---------------------------------------------------------------------------------------------


def measure(o: argparse.Namespace, path: Path) -> None:
    """Seconds of 1,000 updates: blocks of all methods alternate, each alone while the others wait."""
    content: dict[str, Any] = {"block": o.block, "rounds": o.rounds, "times": []}
    for name in o.datasets:
        methods = [m for m in DATASETS[name].methods if m in o.methods and m != "cloning"]
        variants = [(m, m, {}) for m in methods if m != "CORL" or o.corl is not None]
        variants += [
            (f"ours {f}", "ours", {"form": f}) for f in ("compiled", "captured") if o.forms
        ]
        blocks: dict[str, list[float]] = {label: [] for label, *_ in variants}
        processes: dict[str, Worker] = {}
        stack = []
        try:
            for label, method, changed in variants:
                context = worker(o, name, method, 0, 10**6, **changed)
                stack.append(context)
                processes[label], _ = context.__enter__()
                processes[label].ask(learn=o.block)
            for _ in range(o.rounds):
                for label, process in processes.items():
                    blocks[label].append(process.ask(learn=o.block)["seconds"] / o.block * 1000)
        finally:
            for context in stack:
                context.__exit__(None, None, None)
        for label, seconds in blocks.items():
            ratios = [a / b for a, b in zip(seconds, blocks["ours"], strict=True)]
            line = {
                "dataset": name, "method": label, "seconds": statistics.median(seconds),
                "of_ours": statistics.median(ratios), "least": min(ratios), "greatest": max(ratios),
                "blocks": seconds,
            }  # fmt: skip
            content["times"].append(line)
            text = f"{name} {label}: {line['seconds']:.2f} s, of ours {line['of_ours']:.2f}"
            print(f"{text} ({line['least']:.2f} to {line['greatest']:.2f})", flush=True)
        save(path, content, packages=("gymnasium",))


def main(arguments: Sequence[str] | None = None) -> None:
    o = _options(arguments)
    if o.page is not None:
        write_page(o.page, o.result)
    elif o.join:
        join(o.join, RESULTS / f"{o.result}.json")
    elif o.time:
        measure(o, RESULTS / f"{o.result}_time.json")
    else:
        run(o, RESULTS / f"{o.result}.json")
        print(table(read(RESULTS / f"{o.result}.json")))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--peers", type=Path, default=CACHE, help="folder of environments and datasets; may be new")
    add("--datasets", nargs="+", choices=DATASETS, default=list(PLAN))
    add("--methods", nargs="+", choices=CONTINUOUS, default=list(CONTINUOUS))
    add("--seeds", type=int, default=5)
    add("--updates", nargs="+", default=[], metavar="DATASET=N", help="in place of the plan's")
    add("--corl", type=Path, metavar="FILE", help="CORL's iql.py; without it CORL is left out")
    add("--jobs", type=int, default=1, help="processes that train at the same time")
    add("--points", type=int, default=4, help="evaluations of each run; the last is its score")
    add("--result", default="scores", help="name of the result file")
    add(
        "--change", nargs="+", default=[], metavar="KEY=VALUE",
        help="other settings of ours, or of the only one of --methods; give --result too",
    )  # fmt: skip
    add("--join", nargs="+", default=[], metavar="NAME", help="result files whose cells are added")
    add("--time", action="store_true", help="measure times instead of scores")
    add("--block", type=int, default=100, help="of --time: updates between two changes")
    add("--rounds", type=int, default=11, help="of --time: blocks of each method")
    add("--forms", action="store_true", help="of --time: also ours compiled and captured")
    add("--page", type=Path, help="write the tables into this page, and train nothing")
    o = parser.parse_args(arguments)
    updates = {name: scored.updates for name, scored in DATASETS.items()}
    for each in o.updates:
        name, _, number = each.partition("=")
        if name not in DATASETS or not number.isdigit() or int(number) % CHUNK or int(number) == 0:
            parser.error(
                f"--updates {each}: expected DATASET=N with a dataset of {', '.join(DATASETS)} and a "
                f"multiple of {CHUNK}"
            )
        updates[name] = int(number)
    if min(o.seeds, o.jobs, o.points, o.rounds, o.block) < 1 or o.block % CAPTURED:
        parser.error(f"numbers must be at least 1, and --block a multiple of {CAPTURED}")
    o.updates = updates
    o.change = changes(o.change)
    return o


def changes(texts: Sequence[str]) -> dict[str, Any]:
    """Settings of ``KEY=VALUE``."""
    return {key: _value(text) for key, _, text in (each.partition("=") for each in texts)}


def _value(text: str) -> Any:
    """A JSON value; other text is itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


if __name__ == "__main__":
    main()
