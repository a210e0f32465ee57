"""``benchmarks/gpu_session.sh``: what it needs and writes; a failed stage ends no other."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
SCRIPT = TOP / "benchmarks" / "gpu_session.sh"
STAGES = [
    "collect", "tests", "float32", "autotune", "tf32", "bfloat16", "population", "profile_eager",
    "profile_compiled", "profile_captured", "memory",
]  # fmt: skip


def session(folder: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], dict]:
    settings = {**os.environ, "PYTHON": sys.executable, **environment}
    done = subprocess.run(
        [SCRIPT, "--dry-run", folder], env=settings, capture_output=True, text=True, check=False
    )
    (summary,) = folder.glob("session_*.json")
    return done, json.loads(summary.read_text())


def imported(tree: ast.Module) -> set[str]:
    """First names of the modules that a file imports when it is loaded."""
    names = {alias.name for n in tree.body if isinstance(n, ast.Import) for alias in n.names}
    names |= {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)}
    return {name.partition(".")[0] for name in names}


def test_files_with_gpu_tests_need_no_plugin():
    files = [p for p in (TOP / "tests").rglob("test_*.py") if "mark.gpu" in p.read_text()]
    assert TOP / "tests" / "update" / "test_cuda.py" in files
    for path in files:
        absent = imported(ast.parse(path.read_text())) & {"hypothesis", "xdist", "jax", "mujoco"}
        assert not absent, f"{path.name} imports {absent}"


def test_time_limits_fit_into_ten_minutes():
    """Of the stages on a GPU, where ``slow`` is 1; the three forms are profiled in one loop."""
    words = SCRIPT.read_text().split()
    limits = [
        int(words[i + 0].removeprefix("$((")) * (3 if words[i - 1].startswith('"profile_') else 1)
        for i, word in enumerate(words)
        if word.startswith("$((") and words[i + 1 : i + 3] == ["*", "slow))"]
    ]
    assert len(limits) == 8
    assert sum(limits) <= 600


@pytest.mark.parametrize(("processors", "times"), [(4, 1), (16, 2)])
def test_with_many_processors_all_stages_run_once_before_they_are_timed(
    processors, times, tmp_path
):
    """With an interpreter that only writes down what it is asked to run."""
    tools, folder, calls = tmp_path / "tools", tmp_path / "results", tmp_path / "calls"
    tools.mkdir()
    texts = {
        "nproc": f"echo {processors}",
        "python": f'case "$1" in *session_summary.py) exec {sys.executable} "$@";; esac\n'
        f'echo "$@" >> {calls}',
    }
    for name, text in texts.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    settings = {**os.environ, "PYTHON": str(tools / "python"), "DEVICE": "cuda:9"}
    settings["PATH"] = f"{tools}:{settings['PATH']}"
    subprocess.run([SCRIPT, folder], env=settings, capture_output=True, text=True, check=True)
    (summary,) = folder.glob("session_*.json")
    stages = json.loads(summary.read_text())["stages"]
    assert {name: entry["result"] for name, entry in stages.items()} == dict.fromkeys(
        STAGES[1:], "passed"
    )
    lines = calls.read_text().splitlines()
    assert sum("-m pytest" in line for line in lines) == 1
    for name in ("bench_population.py", "--form captured", "_float32 ", "_memory"):
        outputs = [line.split("--output ")[1].split()[0] for line in lines if name in line]
        assert len(outputs) == times, name
        assert outputs[-1] == str(folder)
        assert str(folder) not in outputs[:-1]


@pytest.mark.slow
def test_a_failed_stage_is_recorded_and_ends_no_other(tmp_path):
    """An interpreter that fails in pytest and runs everything else."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\n[ "$2" = pytest ] && {{ echo "no pytest here"; exit 3; }}\n'
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    folder = tmp_path / "results"
    folder.mkdir()
    done, summary = session(folder, PYTHON=str(python), STAGES="collect tests profile_eager")
    assert done.returncode == 2
    results = {name: entry["result"] for name, entry in summary["stages"].items()}
    assert results == {"collect": "failed", "tests": "failed", "profile_eager": "passed"}
    assert summary["stages"]["tests"]["status"] == 3
    assert "no pytest here" in (folder / summary["stages"]["tests"]["log"]).read_text()
    assert "1 of 3 stages passed" in done.stdout
    machine = summary["machine"]
    assert machine["device"] == "cpu"
    assert machine["torch"]
    (profile,) = folder.glob("profile_cpu_sequential_eager_*.json")
    assert json.loads(profile.read_text())["kernels_per_update"] > 22


@pytest.mark.slow
def test_every_stage_on_the_cpu(tmp_path):
    done, summary = session(tmp_path)
    results = {name: entry["result"] for name, entry in summary["stages"].items()}
    assert results == dict.fromkeys(STAGES, "passed"), done.stdout
    assert done.returncode == 0
    steps = {path.stem for path in tmp_path.glob("step_cpu_*.json")}
    card = next(tmp_path.glob("session_*.json")).stem.removeprefix("session_")
    assert steps == {f"step_cpu_{card}_{n}" for n in ("float32", "tf32", "bfloat16", "memory")}
    point = json.loads((tmp_path / f"step_cpu_{card}_float32.json").read_text())["points"][0]
    names = ("TorchRL eager", "ours sequential captured", "floor", "floor of ours")
    assert all(point["competitors"][name]["median_ms"] > 0 for name in names)
    assert point["limit_of_bytes"]["kernels"] == 27
    population = json.loads((tmp_path / f"population_cpu_{card}.json").read_text())
    assert [entry["members"] for entry in population["points"]] == [1, 2]
