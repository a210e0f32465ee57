"""Through how many files of the package, and how many lines in all, one call passes.

    python benchmarks/count_path.py
    python benchmarks/count_path.py --package ../old --case "eager update" --show

A file counts as a whole where at least one of its functions is called; ``__init__`` files do not count.
Everything is imported and built before, batches are drawn before, and each call but the first update of
an agent was made once before: an update of the same agent, ``load_dataset`` of a copy of the files. The
agent is ``make_agent``'s default for continuous actions.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "iql_torchrl"
ROWS, EPISODE, OBSERVATION, ACTION = 400, 20, 3, 2
UPDATES = 4  # of a captured call


class Calls:
    """A context in which calls of the package's functions are counted by file."""

    def __init__(self, package: Path) -> None:
        self._prefix = f"{package}/"
        self.of_file: Counter[Path] = Counter()

    def _seen(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(self._prefix):
            path = Path(code.co_filename)
            if path.name != "__init__.py" and code.co_name != "<module>":
                self.of_file[path] += 1

    def __enter__(self) -> Calls:
        threading.setprofile(self._seen)
        sys.setprofile(self._seen)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)


def columns() -> dict[str, Any]:
    """A dataset of ``ROWS`` steps whose episodes end by a time limit, and some by a terminal state."""
    generator = np.random.default_rng(0)
    last = np.arange(ROWS) % EPISODE == EPISODE - 1
    terminated = last & (np.arange(ROWS) % (3 * EPISODE) == EPISODE - 1)
    observation = generator.normal(size=(ROWS, OBSERVATION)).astype(np.float32)
    following = np.roll(observation, -1, 0)
    following[last] = generator.normal(size=(int(last.sum()), OBSERVATION))
    return {
        "observation": observation,
        "action": generator.uniform(-1, 1, (ROWS, ACTION)).astype(np.float32),
        "reward": generator.normal(size=ROWS).astype(np.float32),
        "next_observation": following,
        "terminated": terminated,
        "truncated": last & ~terminated,
    }


def npz_file(folder: Path) -> Path:
    folder.mkdir()
    np.savez(folder / "rows.npz", **columns())
    return folder / "rows.npz"


def parquet_folder(folder: Path) -> Path:
    """Two files, one row a step."""
    folder.mkdir()
    lists = {name: values.tolist() for name, values in columns().items()}
    for number, part in enumerate((slice(0, ROWS // 2), slice(ROWS // 2, ROWS))):
        table = pa.table({name: values[part] for name, values in lists.items()})
        pq.write_table(table, folder / f"part-{number}.parquet")
    return folder


def cases(folder: Path) -> dict[str, Callable[[], Callable[[], object]]]:
    """By name, a function that prepares a case and returns the call that is counted."""
    from iql_torchrl import IQLConfig, captured, load_dataset, make_agent, rank_policies
    from iql_torchrl.data import DeviceSampler

    dataset = load_dataset(npz_file(folder / "rows"))
    agent = make_agent(IQLConfig(), dataset)

    batch = dataset.replay_buffer(agent.config.batch_size, seed=0).sample()

    def first_update() -> Callable[[], object]:
        agent.step(batch)  # what is imported lazily
        other = make_agent(IQLConfig(), dataset)
        return lambda: other.step(batch)

    def eager_update() -> Callable[[], object]:
        agent.step(batch)
        return lambda: agent.step(batch)

    def captured_update() -> Callable[[], object]:
        sampler = DeviceSampler(dataset.transitions, agent.config.batch_size, seed=0)
        step = captured(agent.step, sampler, updates=UPDATES)
        step()
        return step

    def loaded(make: Callable[[Path], Path]) -> Callable[[], Callable[[], object]]:
        def prepared() -> Callable[[], object]:
            load_dataset(make(folder / f"{make.__name__} before"))
            source = make(folder / make.__name__)
            return lambda: load_dataset(source)

        return prepared

    def ranking() -> Callable[[], object]:
        members = {
            f"seed {i}": make_agent(IQLConfig(seed=i, hidden=(8,)), dataset) for i in range(3)
        }
        parts = dataset.split(0.5, 0)
        return lambda: rank_policies(members, *parts, discount=0.9, progress=False)

    return {
        "first eager update": first_update,
        "eager update": eager_update,
        "captured update": captured_update,
        "make_agent": lambda: lambda: make_agent(IQLConfig(), dataset),
        "load_dataset of .npz": loaded(npz_file),
        "load_dataset of Parquet": loaded(parquet_folder),
        "rank_policies of 3": ranking,
    }


def count(checkout: Path, only: str = "") -> dict[str, dict[str, int]]:
    """By case, the calls of each file that it passes."""
    sys.path.insert(0, str(checkout))
    import iql_torchrl

    package = Path(iql_torchrl.__file__).parent
    if package != checkout / PACKAGE:
        raise RuntimeError(f"{PACKAGE} was imported from {package}, not from {checkout}.")
    results = {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, prepare in cases(Path(folder)).items():
            if only and name != only:
                continue
            call = prepare()
            with Calls(package) as calls:
                call()
            results[name] = {
                str(p.relative_to(package)): n for p, n in sorted(calls.of_file.items())
            }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--package", type=Path, default=ROOT, metavar="DIR", help="a checkout")
    parser.add_argument("--case", default="", help="only this one")
    parser.add_argument("--show", action="store_true", help="list the files of each case")
    options = parser.parse_args()
    checkout = options.package.resolve()
    print("| call | files | lines |\n|---|---:|---:|")
    for name, files in count(checkout, options.case).items():
        lines = {f: (checkout / PACKAGE / f).read_bytes().count(b"\n") for f in files}
        print(f"| {name} | {len(files)} | {sum(lines.values()):,} |")
        if options.show:
            for file, calls in files.items():
                print(f"    {file}: {lines[file]} lines, {calls} calls")


if __name__ == "__main__":
    main()
