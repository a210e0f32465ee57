"""Competitors timed in turn: blocks of about the same duration, medians, ratios within a round."""

from __future__ import annotations

import argparse
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from iql_torchrl.report import text_table
from record import RESULTS
from step_rivals import Rival, Sizes, Update, transitions

import torch
from tensordict import TensorDict

Results = dict[str, Any]


def timed(update: Update, calls: int, sizes: Sizes, device: str) -> float:
    """Seconds of ``calls`` calls, waiting for the device at both ends only."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    began = time.perf_counter()
    with sizes.autocast(device):
        for _ in range(calls):
            result = update()
    getattr(result, "block_until_ready", lambda: None)()  # JAX
    wait()
    return time.perf_counter() - began


def turns(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """The number of a round and a name, in an order that changes from round to round."""
    for number in range(rounds):
        turn = number % len(names)
        yield from ((number, name) for name in [*names[turn:], *names[:turn]])


def alternated(
    calls: Mapping[str, Update], *, rounds: int, block: int = 1, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each call's blocks of ``block`` calls, which alternate; a first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _, name in turns(list(calls), rounds + 1):
        times[name].append(timed(calls[name], block, Sizes(), device))
    return {name: seconds[1:] for name, seconds in times.items()}


def median_seconds(update: Update, calls: int, sizes: Sizes, device: str) -> float:
    """Of one call, over seven blocks of ``calls``."""
    timed(update, calls, sizes, device)
    return statistics.median(timed(update, calls, sizes, device) for _ in range(7)) / calls


def prepare(rival: Rival, rows: TensorDict, sizes: Sizes, device: str) -> Results:
    """The competitor built, compiled and warm; its memory on CUDA includes its sampler's."""
    on_cuda = device.startswith("cuda")
    if on_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    with sizes.autocast(device):
        update, updates_per_call = rival(rows, sizes, device)
    timed(update, 3, sizes, device)
    results = {"update": update, "updates_per_call": updates_per_call}
    if on_cuda and torch.cuda.max_memory_allocated() > before:  # JAX allocates its memory itself
        results["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return results


def calls_for(seconds: float, update: Update, sizes: Sizes, device: str) -> int:
    """How many calls last ``seconds``."""
    calls, taken = 1, 0.0
    while taken < seconds / 5:
        calls *= 2
        taken = timed(update, calls, sizes, device)
    return max(1, round(seconds * calls / taken))


def why(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"not installed ({error.name})"
    words = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {words[:160]}"


def attempt(entry: Results, action: Callable[[], Any]) -> Any:
    """``action()``, or None where the competitor has failed, now or before."""
    if "failed" in entry:
        return None
    try:
        return action()
    except Exception as error:
        if not isinstance(error, ModuleNotFoundError):
            traceback.print_exc()
        entry["failed"] = why(error)
        entry.pop("update", None)
        return None


def measure(
    rivals: Mapping[str, Rival],
    sizes: Sizes,
    device: str,
    *,
    rounds: int,
    block: float = 0.0,
    updates: int = 0,
    limit: float = float("inf"),
) -> tuple[dict[str, Results], float]:
    """Milliseconds per update of every block, and a block's seconds.

    ``block`` is those seconds; with 0 they are what ``updates`` of the first competitor take.
    After 0.7 of ``limit`` seconds no other competitor is prepared, and after all of them no other
    round begins except the first.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)  # tensordict under torch.compile
    rows, began = transitions(sizes, device), time.perf_counter()
    results: dict[str, Results] = {name: {} for name in rivals}
    for name, rival in rivals.items():
        entry = results[name]
        if time.perf_counter() - began > 0.7 * limit:
            entry["failed"] = f"not prepared: most of the {limit:g} seconds had passed"
            continue
        entry |= attempt(entry, partial(prepare, rival, rows, sizes, device)) or {}
        if "update" in entry and not block:
            first = max(1, updates // entry["updates_per_call"])
            timed(entry["update"], first, sizes, device)
            block = timed(entry["update"], first, sizes, device)
        if "update" in entry:
            seek = partial(calls_for, block, entry["update"], sizes, device)
            entry |= {"calls_per_block": attempt(entry, seek), "ms": []}
    last_round = 0
    for number, name in turns(list(results), rounds):
        if number > last_round and time.perf_counter() - began > limit:
            break
        last_round, entry = number, results[name]
        if "update" in entry:
            calls = entry["calls_per_block"]
            taken = attempt(entry, partial(timed, entry["update"], calls, sizes, device))
            if taken is not None:
                entry["ms"].append(1e3 * taken / calls / entry["updates_per_call"])
    return {n: {k: v for k, v in f.items() if k != "update"} for n, f in results.items()}, block


def summarise(results: Mapping[str, Results], *references: str) -> None:
    """Adds medians, and of the ratios to each reference's block of the same round the median, least
    and greatest: ``of NAME``."""
    for entry in results.values():
        if "failed" in entry:
            continue
        entry["median_ms"] = statistics.median(entry["ms"])
        for name in references:
            blocks = zip(entry["ms"], results.get(name, {}).get("ms", ()), strict=False)
            if ratios := [own / other for own, other in blocks]:
                entry[f"of {name}"] = [statistics.median(ratios), min(ratios), max(ratios)]


def show(title: str, results: Mapping[str, Results]) -> None:
    """The summary as a table; failures are lines below."""
    done = {name: entry for name, entry in results.items() if "failed" not in entry}
    keys = list(dict.fromkeys(k for e in done.values() for k in e if k.startswith("of ")))
    memory = any("peak_mib" in entry for entry in done.values())
    rows = [["", "ms", "a second", *keys, *["peak MiB"] * memory]]
    for name, entry in done.items():
        cells = [f"{entry['median_ms']:.4g}", f"{1e3 / entry['median_ms']:,.0f}"]
        ratios = [entry.get(key, ()) for key in keys]
        cells += ["{:.3f} ({:.2f}..{:.2f})".format(*each) if each else "" for each in ratios]
        rows.append([name, *cells, *[f"{entry.get('peak_mib', 0):.0f}"] * memory])
    print(f"\n{title}\n{text_table(rows)}")
    for name, entry in results.items():
        if "failed" in entry:
            print(f"{name}: {entry['failed']}")
    print(end="", flush=True)


def integers(text: str) -> list[int]:
    return [int(float(word)) for word in text.split(",")]


def add_options(parser: argparse.ArgumentParser, *, rounds: int, block: float) -> None:
    """What all measurements can be asked for; ``block``: the default number of seconds."""
    add = parser.add_argument
    add("--device", default="cpu")
    add("--rounds", type=int, default=rounds)
    add("--block", type=float, default=block, help="seconds of a block")
    add("--result", default="", metavar="NAME", help="ending of the result file's name")
    add("--output", type=Path, default=RESULTS, help="folder of the result file")
