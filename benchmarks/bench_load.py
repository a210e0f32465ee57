"""Processor seconds of ``load_dataset`` for each kind of source: two checkouts compared.

    python benchmarks/bench_load.py --old ../old     # a checkout of the code before, minutes

The processes of both checkouts alternate, so that another load on the machine affects both. Writes
benchmarks/results/load.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from bench_data import MINARI_ID, write_minari
from record import apart, machine, place, write

ROWS, EPISODE = 100_000, 1000
KINDS = ("npz", "hdf5", "parquet", "csv", "minari")


def write_sources(folder: Path) -> None:
    """The same transitions of HalfCheetah's shapes as files of each kind."""
    import h5py
    import numpy as np
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    columns: dict[str, Any] = {
        "observation": rng.standard_normal((ROWS, 17), np.float32),
        "action": np.tanh(rng.standard_normal((ROWS, 6), np.float32)),
        "reward": rng.standard_normal(ROWS, np.float32),
        "terminated": np.zeros(ROWS, bool),
        "truncated": np.arange(ROWS) % EPISODE == EPISODE - 1,
    }
    np.savez(folder / "table.npz", **columns)
    with h5py.File(folder / "table.hdf5", "w") as file:
        for key, values in columns.items():
            file[key] = values
    (folder / "parquet").mkdir()
    for number, part in enumerate(np.split(np.arange(ROWS), 4)):
        arrays = {key: values[part] for key, values in columns.items()}
        lists = {
            key: pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1])
            if x.ndim > 1
            else pa.array(x)
            for key, x in arrays.items()
        }
        pq.write_table(pa.table(lists), folder / "parquet" / f"{number}.parquet")
    flat = {
        f"{key}.{n}" if x.ndim > 1 else key: x[:, n] if x.ndim > 1 else x
        for key, x in columns.items()
        for n in range(x.shape[1] if x.ndim > 1 else 1)
    }
    pd.DataFrame(flat)[: ROWS // 4].to_csv(folder / "table.csv", index=False)


def measure(folder: Path) -> dict[str, float]:
    """The shortest of five loads of each kind; the first one of a process warms files and imports."""
    import warnings

    from iql_torchrl import load_dataset

    warnings.simplefilter("ignore")
    sources: dict[str, Any] = {kind: folder / f"table.{kind}" for kind in KINDS}
    sources |= {"parquet": folder / "parquet", "minari": MINARI_ID}
    seconds: dict[str, float] = {}
    for kind, source in sources.items():
        times = []
        for _ in range(5):
            began = time.process_time()
            load_dataset(source, progress=False)
            times.append(time.process_time() - began)
        seconds[kind] = min(times)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--old", type=Path, help="a second checkout to compare with")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--print", type=Path, help="measure this process's package only")
    parser.add_argument("--output", type=Path, default=place("load"))
    options = parser.parse_args()
    if options.print:
        print(json.dumps(measure(options.print)))
        return
    here = Path(__file__).parents[1]
    codes = ({"old": options.old.resolve()} if options.old else {}) | {"new": here}
    times: dict[str, dict[str, list[float]]] = {name: {} for name in codes}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ |= {"MINARI_DATASETS_PATH": name, "OMP_NUM_THREADS": "1"}
        apart(write_minari, ROWS)
        write_sources(folder)
        for _ in range(options.rounds):
            for code, path in codes.items():
                done = subprocess.run(
                    [sys.executable, __file__, "--print", name],
                    env=os.environ | {"PYTHONPATH": str(path)},
                    stdout=subprocess.PIPE, check=True, text=True,
                )  # fmt: skip
                for kind, seconds in json.loads(done.stdout).items():
                    times[code].setdefault(kind, []).append(seconds)
    medians = {code: {k: median(v) for k, v in each.items()} for code, each in times.items()}
    for kind in KINDS:
        row = " ".join(f"{code} {each[kind]:.3f} s" for code, each in medians.items())
        if options.old:
            ratios = [n / o for n, o in zip(times["new"][kind], times["old"][kind], strict=True)]
            row += f"  median of the ratios {median(ratios):.3f}"
        print(f"{kind:8} {row}")
    commits = {name: machine(checkout=path)["commit"] for name, path in codes.items()}
    command = " ".join(["python", *sys.argv])
    content = {"command": command, "machine": machine(), "commits": commits, "rows": ROWS}
    write(options.output, {**content, "seconds": times})


if __name__ == "__main__":
    main()
