"""Milliseconds of one IQL update: TorchRL's loop, JAX, this package.

    python benchmarks/bench_step.py
    python benchmarks/bench_step.py --small      # two minutes of one core
    python benchmarks/bench_step.py --widths 64,256,1024 --critics 2,5,10 --only compiled,floor

Sampling is included. Blocks of all competitors alternate and have about the same duration; medians
are compared. ``floor`` is the time of the matrix products of one update alone, each network by itself;
``floor of ours`` is that of the products that our update has; a computed time of bytes and kernels is
shown besides (``step_floors.py``). Axes with several values are swept one at a time around the default
point. Writes benchmarks/results/step_DEVICE[_NAME].json; ``report.py`` makes table and picture.
"""

from __future__ import annotations

import argparse
import ast
import gc
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from iql_torchrl import OfflineTrainer
from iql_torchrl.data import replay_buffer
from measuring import Results, add_options, integers, measure, show, summarise, timed
from record import place, save
from step_floors import floor, floor_of_ours, limit_of_bytes
from step_rivals import FORMS, ORDERS, Made, Rival, Sizes, make_step, ours, torchrl_loop

import torch
import torch._inductor.config
from tensordict import TensorDict

__all__ = ["timed"]  # bench_revisions.py takes it from here, in old revisions too

REFERENCE, FLOOR = "TorchRL eager", "floor"

#: option: field of Sizes
AXES = {"widths": "width", "batches": "batch", "critics": "critics", "rows": "rows"}


def jax_rival(name: str) -> Rival:
    def build(rows: TensorDict, sizes: Sizes, device: str) -> Made:
        import step_rivals_jax

        return getattr(step_rivals_jax, name)(rows, sizes, device)

    return build


def trained(rows: TensorDict, sizes: Sizes, device: str) -> Made:
    """``OfflineTrainer`` with the eager step, writing nothing; a call makes 100 updates."""
    step, buffer = make_step(sizes, device, "sequential"), replay_buffer(rows, sizes.batch, seed=0)
    how = {"total_updates": 100, "log_interval": 100, "progress_bar": False}
    trainer = OfflineTrainer(step=step, replay_buffer=buffer, **how)

    def update() -> None:
        trainer.total_frames = trainer.updates + 100
        trainer.train()

    return update, 100


def captured_with(rows: TensorDict, sizes: Sizes, device: str, setting: str, updates: int) -> Made:
    """The captured form whose program is compiled with ``NAME=VALUE`` of Inductor's settings."""
    name, _, value = setting.partition("=")
    with torch._inductor.config.patch({name: ast.literal_eval(value)}):
        update, a_call = ours(rows, sizes, device, "sequential", "captured", updates)
        update()  # compiles
    return update, a_call


def competitors(
    device: str, updates: int = 8, only: str = "", inductor: Sequence[str] = ()
) -> dict[str, Rival]:
    """Those whose name holds one of the comma-separated words of ``only``; ``inductor``: settings of
    Inductor, with each of which the captured form is one more competitor."""
    results: dict[str, Rival] = {
        REFERENCE: torchrl_loop,
        "TorchRL compiled": partial(torchrl_loop, compile=True),
        "JAX scan": jax_rival("jax_scan"),
        "JAX step": jax_rival("jax_step"),
    }
    for order in ORDERS:
        for form in FORMS:
            results[f"ours {order} {form}"] = partial(ours, order=order, form=form, updates=updates)
    for setting in inductor:
        results[f"ours sequential captured, {setting}"] = partial(
            captured_with, setting=setting, updates=updates
        )
    results["OfflineTrainer eager"] = trained
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


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], conflict_handler="resolve"
    )
    add_options(parser, rounds=15, block=0.0)
    add = parser.add_argument
    for option, field in AXES.items():
        add(f"--{option}", type=integers, default=[getattr(Sizes(), field)], metavar="N,...")
    add("--block", type=int, default=50, help="updates of the first competitor in a block")
    add("--captured-updates", type=int, default=8, help="updates a call of the captured form")
    add("--only", default="", metavar="NAME,...", help="competitors whose names hold these words")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the products")
    add("--matmul-precision", default="highest", choices=("highest", "high", "medium"))
    add("--inductor", nargs="*", default=[], metavar="NAME=VALUE", help="also the captured form with "
        "this setting of Inductor, as in max_autotune_gemm=True")  # fmt: skip
    add("--limit", type=float, default=float("inf"), help="about how many seconds a point may take")
    add(
        "--small",
        action="store_true",
        help="narrow networks and few rounds: two minutes of one core",
    )
    options = parser.parse_args()
    if options.small:
        options.widths, options.batches, options.rows, options.rounds = [64], [64], [10_000], 3
        options.only = options.only or f"{REFERENCE},ours sequential eager,ours sequential captured"
    return options


def main() -> None:
    options = parse()
    device = options.device
    torch.set_float32_matmul_precision(options.matmul_precision)
    torch._dynamo.config.recompile_limit = 64  # several steps share one code object
    path = place("step", device, options.result, folder=options.output)
    points: list[dict[str, Any]] = []
    rivals = competitors(device, options.captured_updates, options.only, options.inductor)
    block = 0.0
    for axis, sizes in sweep(options):
        torch._dynamo.reset()
        results, block = measure(
            rivals, sizes, device, rounds=options.rounds, block=block, updates=options.block,
            limit=options.limit,
        )  # fmt: skip
        summarise(results, REFERENCE, FLOOR)
        show(str(sizes), results)
        point = {"axis": axis, "sizes": asdict(sizes), "competitors": results}
        points.append(point)
        save(path, {"points": points}, ("jax", "optax"), device=device)
        point["limit_of_bytes"] = limit_of_bytes(sizes, device)
        show_limit(point["limit_of_bytes"])
        save(path, {"points": points}, ("jax", "optax"), device=device)
        gc.collect()
        if device.startswith("cuda"):
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
