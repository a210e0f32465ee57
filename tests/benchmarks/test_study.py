"""``benchmarks/study.py``: populations, rows, the table, and what ``--keep`` keeps."""

from __future__ import annotations

import json

import numpy as np
import pytest
import study
from scipy import stats

from iql_torchrl import IQLConfig, load_dataset

CONFIG = IQLConfig(hidden=(8,), batch_size=4, updates=4, policy="deterministic")
DDPG = {"actor_objective": "ddpg_bc", "q_reduction": "mean"}
VARIANTS = {"cloning": {"temperature": 0.0}, "IQL": {}, "DDPG+BC": DDPG}


@pytest.fixture
def task():
    rng = np.random.default_rng(0)
    columns = {
        "observation": rng.standard_normal((40, 2)).astype(np.float32),
        "action": rng.uniform(-1, 1, (40, 1)).astype(np.float32),
        "reward": rng.standard_normal(40).astype(np.float32),
        "terminated": np.ones(40, bool),
        "truncated": np.zeros(40, bool),
    }
    return study.Task(
        data=load_dataset(columns, progress=False),
        config=CONFIG,
        variants=VARIANTS,
        scores=lambda agent: [{"way": w, "score": float(agent.config.seed)} for w in ("a", "b")],
        references={"the dataset": {"score": 7.0}},
    )


def test_variants_that_differ_in_settings_of_a_run_are_one_population():
    found = study.populations(CONFIG, VARIANTS)
    assert [(list(configs), objective) for configs, objective in found] == [
        (["cloning", "IQL"], {}),
        (["DDPG+BC"], {"q_reduction": "mean"}),
    ]
    assert found[0][0]["cloning"].temperature == 0


def test_a_table_has_the_last_updates_and_student_intervals():
    rows = [
        {"task": "t", "variant": "v", "seed": s, "updates": n, "score": x}
        for s, last in enumerate((1.0, 2.0, 6.0))
        for n, x in ((1, 100.0), (2, last))
    ]
    rows.append({"task": "t", "variant": "the dataset", "score": 4.0})
    low, high = stats.t.interval(0.95, 2, loc=3, scale=stats.sem([1, 2, 6]))
    lines = study.table(rows).splitlines()
    assert lines[1].split() == f"t, v 3 ({low:.4g} to {high:.4g})".split()
    assert lines[2].split() == ["t,", "the", "dataset", "4"]


def test_a_file_has_every_row_and_keep_trains_what_it_lacks(task, tmp_path, capsys):
    def call(*arguments):
        parser = study.make_parser("A study.", "trial", tasks=["t"], seeds=2, points=2)
        o = parser.parse_args([f"--output={tmp_path}", *arguments])
        return study.run(o, {"t": lambda o: task}, keys=("task", "variant", "way"))

    call("--only", "IQL")
    record = json.loads((tmp_path / "trial.json").read_text())
    assert record["rows"][0] == {"task": "t", "variant": "the dataset", "score": 7.0}
    first = record["rows"][1:]
    assert [(r["updates"], r["seed"], r["way"]) for r in first] == [
        (n, seed, way) for n in (2, 4) for seed in (0, 1) for way in "ab"
    ]
    assert all(row["seconds"] > 0 for row in first)
    assert "t, IQL, b" in capsys.readouterr().out
    rows = call("--keep")
    assert rows[: 1 + len(first)] == record["rows"]
    assert list(dict.fromkeys(r["variant"] for r in rows)) == [
        "the dataset", "IQL", "cloning", "DDPG+BC",
    ]  # fmt: skip
    assert len(call("--only", "IQL")) == 1 + len(first)
