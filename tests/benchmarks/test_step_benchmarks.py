"""The competitors of ``benchmarks/bench_step.py`` do the same work; its files make a report."""

from __future__ import annotations

import json
import math
import sys

import bench_step
import measuring
import pytest
import report
import step_floors
import step_rivals
from record import machine, save
from step_rivals import Sizes

from iql_torchrl import IQLStep

LAYERS = (0, 2, 4)
SIZES = Sizes(width=16, batch=32, critics=3, rows=100, observation=5, action=2)


def as_jax(step: IQLStep):
    """Parameters of a step's loss as ``step_rivals_jax`` holds them, and its target critics."""
    jnp = pytest.importorskip("jax.numpy")
    state = {name: jnp.asarray(p.detach().numpy()) for name, p in step.loss.state_dict().items()}

    def net(prefix: str, of=lambda p: p):
        layers = [
            (of(state[f"{prefix}.{n}.weight"]), of(state[f"{prefix}.{n}.bias"])) for n in LAYERS
        ]
        return [(weight.T, bias) for weight, bias in layers]

    def critics(prefix: str):
        return [net(f"{prefix}.module.mlp", lambda p, k=k: p[k]) for k in range(SIZES.critics)]

    head = "actor_network_params.module.0.module"
    live = {
        "actor": {"mean": net(f"{head}.mlp"), "log_std": state[f"{head}.log_std"]},
        "value": net("value_network_params.module.mlp"),
        "critics": critics("qvalue_network_params"),
    }
    return live, critics("target_qvalue_network_params")


def largest_difference(mine, other) -> float:
    jax = pytest.importorskip("jax")
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: float(abs(a - b).max()), mine, other)))


@pytest.mark.parametrize("order", ["sequential", "simultaneous"])
def test_jax_does_the_same_updates(order):
    pytest.importorskip("jax")
    pytest.importorskip("optax")
    import jax
    import step_rivals_jax as rivals

    step = step_rivals.make_step(SIZES, "cpu", order)
    live, target = as_jax(step)
    state = rivals.with_adam(live) | {"target": target}
    update = jax.jit(getattr(rivals, order), static_argnames="dtype")
    rows = step_rivals.transitions(SIZES)
    for number in range(3):
        batch = rows[number * 32 : (number + 1) * 32].clone()
        place = jax.devices("cpu")[0]
        with jax.default_device(place):
            state, loss = update(state, rivals.on_device(batch, place), dtype="float32")
        metrics = step(batch)
        total = sum(metrics[f"loss_{name}"] for name in ("actor", "qvalue", "value"))
        assert abs(float(loss) - float(total)) < 1e-4 * max(1.0, abs(float(total)))
        mine, targets = as_jax(step)
        assert largest_difference(state["live"], mine) < 1e-5
        assert largest_difference(state["target"], targets) < 1e-5
    assert largest_difference(live, mine) > 1e-4  # something was learned


def test_jax_samples_and_loops():
    pytest.importorskip("jax")
    pytest.importorskip("optax")
    import step_rivals_jax as rivals

    rows = step_rivals.transitions(SIZES)
    update, updates = rivals.looped(rows, SIZES, "cpu", rivals.sequential, 3)
    assert updates == 3
    losses = [float(update()) for _ in range(3)]
    assert len(set(losses)) == 3


def test_products_count_what_a_sequential_update_multiplies():
    """The floor is the multiplications of an update, counted by torch, less V(s) read again."""
    from torch.utils.flop_counter import FlopCounterMode

    step, rows = step_rivals.make_step(SIZES, "cpu", "simultaneous"), step_rivals.transitions(SIZES)
    with FlopCounterMode(display=False) as counter:
        step(rows[: SIZES.batch].clone())
    counted = sum(2 * a[0] * a[1] * b[1] for a, b in step_floors.products(SIZES))
    assert counted == counter.get_total_flops()


def test_our_update_has_fewer_products():
    """Critics are evaluated together, and V of both states; layers of width 1 are sums."""
    for order, count in {"sequential": 22, "simultaneous": 22}.items():
        operands = step_floors.our_products(SIZES, order)
        assert len(operands) == count
        sizes = [(*a, b[-1]) for (a, _), (b, _) in operands]
        wide = [(*a, b[1]) for a, b in step_floors.products(SIZES) if 1 not in (*a, *b)]
        again = SIZES.batch * SIZES.width * (SIZES.observation + SIZES.width)  # V(s) once more
        expected = sum(map(math.prod, wide)) + (again if order == "sequential" else 0)
        assert sum(map(math.prod, sizes)) == expected


def test_bytes_and_kernels_by_hand():
    """One critic, layers 2-3-3-1 and so on: every number of parameters written out."""
    sizes = Sizes(width=3, batch=5, critics=1, rows=100, observation=2, action=1)
    value = (2 * 3 + 3) + (3 * 3 + 3) + (3 + 1)
    critic = (3 * 3 + 3) + (3 * 3 + 3) + (3 + 1)
    actor = (2 * 3 + 3) + (3 * 3 + 3) + (3 + 1) + 1
    live = value + critic + actor
    assert step_floors.update_bytes(sizes) == {
        "parameters": 8 * live,
        "moments": 16 * live,
        "gradients": 8 * live,
        "targets": 8 * critic,
        "batch": 5 * (4 * (2 + 2 + 1 + 1) + 2),
    }
    limit = step_floors.limit_of_bytes(sizes, "cpu")
    speed = 1e9 * max(limit["bandwidth_gb_per_s"].values())
    seconds = limit["bytes"]["all"] / speed + limit["kernels"] * limit["launch_us"] / 1e6
    assert limit["ms"] == pytest.approx(1e3 * seconds)


def test_failures_are_lines_and_files_make_a_report(tmp_path, capsys, monkeypatch):
    def broken(rows, sizes, device):
        raise RuntimeError("no room left\nand more")

    def absent(rows, sizes, device):
        raise ModuleNotFoundError("No module named 'jaxish'", name="jaxish")

    rivals = bench_step.competitors("cpu", only="TorchRL eager,floor")
    rivals |= {"broken": broken, "absent": absent}
    points = []
    for axis, sizes in (("default", SIZES), ("width", Sizes(**{**vars(SIZES), "width": 8}))):
        results, block = measuring.measure(rivals, sizes, "cpu", rounds=2, updates=3)
        measuring.summarise(results, bench_step.REFERENCE, bench_step.FLOOR)
        measuring.show(axis, results)
        points.append({"axis": axis, "sizes": vars(sizes), "competitors": results})
    assert block > 0
    assert results["broken"] == {"failed": "RuntimeError: no room left"}
    assert results["absent"] == {"failed": "not installed (jaxish)"}
    assert results["TorchRL eager"]["of TorchRL eager"] == [1, 1, 1]
    assert len(results["floor"]["ms"]) == 2
    record = {"machine": machine("cpu"), "points": points}
    for name in ("step_cpu.json", "step_cpu_again.json"):
        save(tmp_path / name, record)
    (tmp_path / "step_cpu_old.json").write_text(json.dumps({"median_ms": {}}))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    arguments = ["report.py", "--results", str(tmp_path), "--readme", str(readme)]
    monkeypatch.setattr(sys, "argv", arguments)
    report.main()
    text = readme.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n")
    assert text.endswith(f"\n{report.END}\nafter\n")
    assert "old" not in text
    assert "2 runs" in text
    assert "no room left" in text
    for name in ("step.png", "step_sweeps.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    assert "step_cpu_old.json contains no points" in capsys.readouterr().out
    readme.write_text("no markers")
    with pytest.raises(SystemExit, match="lacks the lines"):
        report.main()


def test_a_sweep_moves_one_axis_at_a_time(monkeypatch):
    given = ["bench_step.py", "--widths", "64,256", "--rows", "1e3,1e4"]
    monkeypatch.setattr(sys, "argv", given)
    found = [(axis, s.width, s.rows) for axis, s in bench_step.sweep(bench_step.parse())]
    assert found == [("default", 256, 1000), ("width", 64, 1000), ("rows", 256, 10_000)]
    with pytest.raises(SystemExit, match="no competitor is called so"):
        bench_step.competitors("cpu", only="nobody")
