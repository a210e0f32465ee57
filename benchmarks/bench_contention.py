"""Updates of small networks while another training uses the same cores.

    python benchmarks/bench_contention.py

Each form is timed in one process alone, and in two at once: with as many threads as there are cores and
``GOMP_SPINCOUNT=2000``, which importing the package sets, or libgomp's own default; and with one
thread each. Writes benchmarks/results/contention.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

import torch

from record import RESULTS, save
from step_rivals import Rival, Sizes, ours, torchrl_loop, transitions

CALLED = 8  # updates of a call
FORMS = ("eager", "compiled", "captured", "torchrl")
# GOMP_SPINCOUNT, and OMP_NUM_THREADS: what importing the package sets, what torch does without it, and
# what the documentation asks for.
SETTINGS: dict[str, dict[str, str]] = {
    "2000": {"GOMP_SPINCOUNT": "2000"},
    "default": {},
    "1 thread": {"OMP_NUM_THREADS": "1"},
}


def child(form: str, width: int, seconds: float) -> None:
    """Print the median time of an update in ms, timed from the line that the parent sends."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(os.cpu_count() or 1)
    sizes = Sizes(width=width, rows=10_000, observation=3, action=1)

    def built() -> Rival:
        rows = transitions(sizes)
        if form == "torchrl":
            return torchrl_loop(rows, sizes, "cpu")
        return ours(rows, sizes, "cpu", "sequential", form, CALLED)

    update, updates = built()
    for _ in range(3 * CALLED // updates):
        update()
    print("ready", flush=True)
    sys.stdin.readline()
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        for _ in range(CALLED // updates):
            update()
        times.append((time.perf_counter() - began) / CALLED * 1e3)
    print(statistics.median(times), flush=True)


def measured(form: str, width: int, seconds: float, count: int, setting: str) -> float:
    """Median ms of an update in the slowest of ``count`` processes that run at the same time."""
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
    environment = {k: v for k, v in os.environ.items() if k not in names} | SETTINGS[setting]
    command = [sys.executable, __file__, "--child", form, "--width", str(width)]
    command += ["--seconds", str(seconds)]
    processes = [
        subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(count)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:  # all at once, before any answer is waited for
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return max(float(process.communicate()[0]) for process in processes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--width", type=int, default=64)
    add("--seconds", type=float, default=4.0, help="of each measurement")
    add("--rounds", type=int, default=3)
    add("--forms", default=",".join(FORMS), help="which, with commas between them")
    add("--child", choices=FORMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        child(options.child, options.width, options.seconds)
        return
    rows = []
    for form in options.forms.split(","):
        for name in SETTINGS:
            pairs = [
                [measured(form, options.width, options.seconds, n, name) for n in (1, 2)]
                for _ in range(options.rounds)
            ]
            alone, beside = (statistics.median(each) for each in zip(*pairs, strict=True))
            ratio = statistics.median(two / one for one, two in pairs)
            rows.append(
                {"form": form, "setting": name, "alone": alone, "beside": beside, "ratio": ratio}
            )
            print(f"{form:9} {name:8} {alone:7.2f} {beside:8.2f} ms  {ratio:6.1f}", flush=True)
    save(RESULTS / "contention.json", {"results": rows})


if __name__ == "__main__":
    main()
