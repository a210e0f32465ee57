"""How the time of one update divides into kinds of work.

    python benchmarks/profile_step.py --form compiled --order sequential
    python benchmarks/profile_step.py --form captured --device cuda

The wall time and the floor are measured without the profiler. The profiler itself takes time, on a
CPU within every kernel: its numbers show the proportions, not the total, and nothing is scaled to
the wall time. With ``--output`` the numbers are also written to
FOLDER/profile_DEVICE_ORDER_FORM[_NAME].json. On a CPU ``host`` is the time outside of kernels: wall
minus kernels, where a negative number is the profiler's own time. On CUDA kernels may overlap one
another.
"""

from __future__ import annotations

import argparse
import warnings
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

from iql_torchrl.report import text_table
from measuring import median_seconds, timed
from record import machine, place, save
from step_floors import floor
from step_rivals import FORMS, ORDERS, Sizes, ours, transitions

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

#: kind: words in the names of its kernels, in the order in which they are asked
KINDS = {
    "matrix products": (
        "::mm", "_mm_out", "addmm", "bmm", "::linear", "_mm_plus_mm", "gemm", "cutlass", "nvjet",
        "splitk", "mkl_linear", "mkldnn", "packed_linear", "xmma",
    ),
    "optimizer": ("_fused_adam", "fusedadam", "multi_tensor", "_foreach_"),
    "copies": ("memcpy", "memset", "copy_", "_to_copy", "clone", "contiguous"),
}  # fmt: skip
FUSED = ("triton", "cpp_fused", "kernel_cpp", "graph_")
#: operators that compute nothing: their time is the host's
HOST = (
    "view", "reshape", "as_strided", "expand", "empty", "detach", "::t", "transpose", "squeeze",
    "select", "slice", "split", "chunk", "unbind", "alias", "permute", "resize", "set_", "unsafe",
    "narrow", "flatten", "_local_scalar", "item", "result_type", "lift_fresh", "is_nonzero",
)  # fmt: skip
#: what the host does on CUDA: words in the names of its calls
HOST_CALLS = {
    "launches": ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch"),
    "synchronisations": ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize",
                         "DtoH"),
}  # fmt: skip
AXES = ("width", "batch", "critics", "rows")


def kind_of(name: str, on_cuda: bool) -> str | None:
    """The kind of a kernel; None for what is the host's."""
    low = name.lower()
    if any(word in low for word in FUSED):  # Adam and SoftUpdate are in those with these words
        return "fused, optimizer" if "lerp" in low and "sqrt" in low else "fused, losses"
    for kind, words in KINDS.items():
        if any(word in low for word in words):
            return kind
    if on_cuda:
        return "other kernels"
    operator = low.removeprefix("aten::")
    if not low.startswith("aten::") or any(w.strip(":") in operator.split("_") for w in HOST):
        return None
    return None if operator.startswith(tuple(w.strip(":") for w in HOST)) else "other kernels"


def show(
    events: Any, updates: int, wall_ms: float, floor_ms: float, on_cuda: bool
) -> dict[str, Any]:
    """Tables over ``updates`` profiled updates, everything per update; returns their numbers."""
    device_type = DeviceType.CUDA if on_cuda else DeviceType.CPU
    kernels, counts = defaultdict(float), defaultdict(float)
    calls: dict[str, tuple[float, float, str]] = {}
    for event in events:
        kind = kind_of(event.key, on_cuda)
        if event.device_type != device_type or kind is None:
            continue
        spent = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        ms, count = spent / 1e3 / updates, event.count / updates
        kernels[kind] += ms
        counts[kind] += count
        calls[event.key] = (ms, count, kind)
    parts = {"wall, no profiler": wall_ms, "floor, no profiler": floor_ms}
    parts |= dict(sorted(kernels.items(), key=lambda entry: -entry[1]))
    parts["host: wall minus kernels"] = wall_ms - sum(kernels.values())
    table = [["", "ms", "of wall", "kernels"]]
    for kind, ms in parts.items():
        times = f"{counts[kind]:.1f}" if kind in counts else ""
        table.append([kind, f"{ms:.3f}", f"{ms / wall_ms:.2f}", times])
    print(f"\n{text_table(table)}\n\n{'ms':>9}{'times':>8}  kernel")
    for name, (ms, count, kind) in sorted(calls.items(), key=lambda entry: -entry[1][0])[:15]:
        print(f"{ms:9.4f}{count:8.1f}  {name[:96]} ({kind})")
    return {
        "wall_ms": wall_ms,
        "floor_ms": floor_ms,
        "kernels_per_update": sum(counts.values()),
        "kinds": {kind: {"ms": kernels[kind], "times": counts[kind]} for kind in kernels},
        "kernels": {name: {"ms": ms, "times": count} for name, (ms, count, _) in calls.items()},
    }


def show_host_calls(events: Any, updates: int) -> dict[str, float]:
    """CUDA: launches and waits per update; the profiler's own wait at its end is among them."""
    sums = {}
    for title, words in HOST_CALLS.items():
        results = {e.key: e.count / updates for e in events if any(w in e.key for w in words)}
        listed = ", ".join(f"{name} {count:.2f}" for name, count in results.items())
        sums[title] = sum(results.values())
        print(f"{title} an update: {sums[title]:.2f} ({listed or 'none'})")
    return sums


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--form", default="compiled", choices=FORMS)
    add("--order", default="sequential", choices=ORDERS)
    add("--device", default="cpu")
    add("--updates", type=int, default=100, help="updates profiled, and in each timed block")
    add("--captured-updates", type=int, default=8, help="updates a call of the captured form")
    add("--output", type=Path, help="folder of a result file; none is written otherwise")
    add("--result", default="", metavar="NAME", help="ending of the result file's name")
    for name in AXES:
        add(f"--{name}", type=int, default=getattr(Sizes(), name))
    options = parser.parse_args()
    device, on_cuda = options.device, options.device.startswith("cuda")
    sizes = Sizes(**{name: getattr(options, name) for name in AXES})
    warnings.filterwarnings("ignore", category=FutureWarning)  # tensordict under torch.compile
    from torch._inductor import config

    # the profiler sees generated C++ only if it is compiled so
    config.cpp.enable_kernel_profile = not on_cuda
    rows = transitions(sizes, device)
    update, a_call = ours(
        rows, sizes, device, options.order, options.form, options.captured_updates
    )
    timed(update, 5, sizes, device)
    calls = max(1, options.updates // a_call)
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_cuda]
    with profile(activities=activities, acc_events=True) as profiler:
        timed(update, calls, sizes, device)
    events = profiler.key_averages()
    wall_ms = 1e3 * median_seconds(update, calls, sizes, device) / a_call
    products, _ = floor(rows, sizes, device)
    floor_ms = 1e3 * median_seconds(products, options.updates, sizes, device)
    print("{name}, {threads} threads, torch {torch}; ".format_map(machine(device)) + f"{sizes}")
    print(f"{options.order} {options.form}, {calls * a_call} updates under the profiler")
    results = show(events, calls * a_call, wall_ms, floor_ms, on_cuda)
    if on_cuda:
        results |= show_host_calls(events, calls * a_call)
    if options.output is not None:
        words = ("profile", device, options.order, options.form, options.result)
        path = place(*words, folder=options.output)
        save(path, {"sizes": asdict(sizes)} | results, device=device)


if __name__ == "__main__":
    main()
