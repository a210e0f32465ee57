"""Milliseconds of one IQL update: TorchRL's loop, a plain torch script, JAX, this package.

    python benchmarks/bench_step.py
    python benchmarks/bench_step.py --widths 64,256,1024 --critics 2,5,10 --only compiled,floor

Sampling is included. Blocks of all competitors alternate and have about the same duration; medians
are compared. ``floor`` is the time of the matrix products of one update alone, each network by itself;
``floor of ours`` is that of the products that our update has; a computed time of bytes and kernels is
shown besides (``step_floors.py``). Axes with several
values are swept one at a time around the default point. Writes
benchmarks/results/step_DEVICE[_NAME].json; ``report.py`` makes table and picture.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from record import RESULTS, machine, processor, save
from step_floors import floor, floor_of_ours, limit_of_bytes
from step_rivals import (
    FORMS,
    ORDERS,
    Made,
    Rival,
    Sizes,
    Update,
    ours,
    packed,
    plain_torch,
    torchrl_loop,
    transitions,
)

import torch
from tensordict import TensorDict

REFERENCE, FLOOR = "TorchRL eager", "floor"

#: option: field of Sizes
AXES = {"widths": "width", "batches": "batch", "critics": "critics", "rows": "rows"}
Results = dict[str, Any]


def jax_rival(name: str) -> Rival:
    def build(rows: TensorDict, sizes: Sizes, device: str) -> Made:
        import step_rivals_jax

        return getattr(step_rivals_jax, name)(rows, sizes, device)

    return build


def competitors(device: str, updates: int = 8, only: str = "") -> dict[str, Rival]:
    """Those whose name holds one of the comma-separated words of ``only``."""
    results: dict[str, Rival] = {
        REFERENCE: torchrl_loop,
        "TorchRL compiled": partial(torchrl_loop, compile=True),
        "plain torch eager": plain_torch,
        "plain torch compiled": partial(plain_torch, compile=True),
        "JAX scan": jax_rival("jax_scan"),
        "JAX step": jax_rival("jax_step"),
    }
    for order in ORDERS:
        for form in FORMS:
            results[f"ours {order} {form}"] = partial(ours, order=order, form=form, updates=updates)
    results |= {FLOOR: floor, "floor of ours": floor_of_ours}
    if device.startswith("cuda"):
        results["floor graph"] = partial(floor, graph=True)
        results["floor of ours graph"] = partial(floor_of_ours, graph=True)
    words = [word.strip() for word in only.split(",") if word.strip()]
    for word in words:
        if not any(word in name for name in results):
            raise SystemExit(
                f"--only {word}: no competitor is called so; there are {list(results)}."
            )
    return {n: rival for n, rival in results.items() if not words or any(w in n for w in words)}


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
    if on_cuda and torch.cuda.max_memory_allocated() > before:  # JAX allocates for itself
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


def attempt(results: Results, action: Callable[[], Any]) -> Any:
    """``action()``, or None where the competitor has failed, now or before."""
    if "failed" in results:
        return None
    try:
        return action()
    except Exception as error:
        if not isinstance(error, ModuleNotFoundError):
            traceback.print_exc()
        results["failed"] = why(error)
        results.pop("update", None)
        return None


def measure(
    rivals: dict[str, Rival],
    sizes: Sizes,
    device: str,
    rounds: int,
    block: float,
    updates: int,
    limit: float = float("inf"),
) -> tuple[dict[str, Results], float]:
    """Milliseconds per update of every block, and a block's seconds.

    ``block`` is those seconds; with 0 they are what ``updates`` of the first competitor take.
    After 0.7 of ``limit`` seconds no other competitor is prepared, and after all of them no other
    round begins except the first.
    """
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
    names = list(results)
    for number in range(rounds):
        if number and time.perf_counter() - began > limit:
            break
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            entry = results[name]
            if "update" in entry:
                calls = entry["calls_per_block"]
                taken = attempt(entry, partial(timed, entry["update"], calls, sizes, device))
                if taken is not None:
                    entry["ms"].append(1e3 * taken / calls / entry["updates_per_call"])
    return {n: {k: v for k, v in f.items() if k != "update"} for n, f in results.items()}, block


def summarise(results: dict[str, Results]) -> None:
    """Medians, and ratios to the reference: of medians, and least and greatest within a round."""
    reference, ground = ({"ms": [], **results.get(name, {})}["ms"] for name in (REFERENCE, FLOOR))
    for entry in results.values():
        if "failed" in entry:
            continue
        entry["median_ms"] = statistics.median(entry["ms"])
        entry["updates_per_second"] = 1e3 / entry["median_ms"]
        if reference:
            ratios = [a / b for a, b in zip(entry["ms"], reference, strict=False)]
            entry["of_torchrl"] = entry["median_ms"] / statistics.median(reference)
            entry["of_torchrl_range"] = [min(ratios), max(ratios)]
        if ground:
            entry["of_floor"] = entry["median_ms"] / statistics.median(ground)


def show(sizes: Sizes, results: dict[str, Results]) -> None:
    names = ("width", "batch", "critics", "rows", "dtype", "matmul_precision")
    print("\n" + ", ".join(f"{name} {getattr(sizes, name)}" for name in names))
    memory = any("peak_mib" in entry for entry in results.values())
    head = f"{'':28}{'ms':>9}{'updates/s':>11}{'of TorchRL':>12}{'in a round':>14}{'of floor':>10}"
    print(head + f"{'peak MiB':>10}" * memory)
    for name, entry in results.items():
        if "failed" in entry:
            print(f"{name:28} {entry['failed']}")
            continue
        line = f"{name:28}{entry['median_ms']:9.3f}{entry['updates_per_second']:11.0f}"
        low, high = entry.get("of_torchrl_range", (float("nan"),) * 2)
        line += f"{entry.get('of_torchrl', float('nan')):12.3f}{f'{low:.2f}..{high:.2f}':>14}"
        line += f"{entry.get('of_floor', float('nan')):10.2f}"
        line += f"{entry['peak_mib']:10.0f}" if "peak_mib" in entry else ""
        print(line, flush=True)


def show_limit(limit: Results) -> None:
    speeds = ", ".join(f"{speed:.0f}" for speed in limit["bandwidth_gb_per_s"].values())
    print(
        f"bytes and kernels: {limit['ms']:.4f} ms = {limit['bytes']['all'] / 1e6:.2f} MB / "
        f"{max(limit['bandwidth_gb_per_s'].values()):.0f} GB/s (measured {speeds}) + "
        f"{limit['kernels']} kernels * {limit['launch_us']:.2f} us",
        flush=True,
    )


def sweep(options: argparse.Namespace) -> Iterator[tuple[str, Sizes]]:
    """The default point, then every other value of each axis, the other axes as there."""
    base = Sizes(dtype=options.dtype, matmul_precision=options.matmul_precision)
    values = {field: getattr(options, option) for option, field in AXES.items()}
    for field, results in values.items():
        if getattr(base, field) not in results:
            base = replace(base, **{field: results[0]})
    yield "default", base
    for field, results in values.items():
        for value in results:
            if value != getattr(base, field):
                yield field, replace(base, **{field: value})


def machine_of(device: str) -> Results:
    """Machine and versions; ``name`` is the processor's or the GPU's."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else processor()
    versions = {}
    for package in ("jax", "optax"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    more = {"threads": torch.get_num_threads(), "device": device, "name": name}
    return machine() | versions | more


def integers(text: str) -> list[int]:
    return [int(float(word)) for word in text.split(",")]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    for option, field in AXES.items():
        add(f"--{option}", type=integers, default=[getattr(Sizes(), field)], metavar="N,...")
    add("--device", default="cpu")
    add("--rounds", type=int, default=15)
    add("--block", type=int, default=50, help="updates of the first competitor in a block")
    add("--captured-updates", type=int, default=8, help="updates a call of the captured form")
    add("--only", default="", metavar="NAME,...", help="competitors whose names hold these words")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the products")
    add("--matmul-precision", default="highest", choices=("highest", "high", "medium"))
    add("--result", default="", metavar="NAME", help="ending of the result file's name")
    add("--output", type=Path, default=RESULTS, help="folder of the result file")
    add("--limit", type=float, default=float("inf"), help="about how many seconds a point may take")
    return parser.parse_args()


def main() -> None:
    options = parse()
    device = options.device
    torch.set_float32_matmul_precision(options.matmul_precision)
    torch._dynamo.config.recompile_limit = 64  # several steps share one code object
    warnings.filterwarnings("ignore", category=FutureWarning)  # tensordict under torch.compile
    ending = f"_{options.result}" if options.result else ""
    path = options.output / f"step_{device.split(':')[0]}{ending}.json"
    record = {"machine": machine_of(device), "points": []}
    rivals, block = competitors(device, options.captured_updates, options.only), 0.0
    for axis, sizes in sweep(options):
        torch._dynamo.reset()
        results, block = measure(
            rivals, sizes, device, options.rounds, block, options.block, options.limit
        )
        summarise(results)
        show(sizes, results)
        point = {"axis": axis, "sizes": asdict(sizes), "competitors": results}
        record["points"].append(point)
        save(path, record)
        point["limit_of_bytes"] = limit_of_bytes(sizes, device)
        show_limit(point["limit_of_bytes"])
        save(path, record)
        packed.cache_clear()
        gc.collect()
        if device.startswith("cuda"):
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
