"""``score_population.py``: which population trains when; policies written, read and evaluated."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import test_bench_scores

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import score_datasets
import score_population


class Clock:
    """In place of the module ``time``; a call of a population takes ``seconds``."""

    now, seconds = 0.0, 1.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def populations(monkeypatch):
    """Stands in for ``Training``: the populations made, with the calls they were written at."""
    made, clock = [], Clock()

    class Training:
        def __init__(self, name, o):
            self.name, self.calls, self.last, self.written = name, 0, o.updates // 100, []
            made.append(self)

        def advance(self):
            self.calls, clock.now = self.calls + 1, clock.now + clock.seconds

        def write(self):
            self.written.append(self.calls)

    monkeypatch.setattr(score_population, "Training", Training)
    monkeypatch.setattr(score_population, "time", clock)
    monkeypatch.setattr(score_population, "CALLS_A_CHECK", 10)
    return made


def options(**changed):
    given = {"datasets": ["first", "second"], "updates": 10_000, "device": "cpu", "seconds": 1e9}
    return Namespace(**(given | changed))


def test_populations_take_turns_where_time_suffices(populations):
    score_population.train(options(seconds=201))
    assert [each.calls for each in populations] == [100, 100]
    assert not any(
        each.written for each in populations
    )  # only at the points, which advance looks at


def test_the_last_population_waits_and_trains_as_far_as_time_allows(populations):
    score_population.train(options(seconds=150))
    first, second = populations
    assert first.calls == 100  # 110 s, in which the second made 10 calls
    assert second.calls == 60  # the first check after 150 s
    assert (first.written, second.written) == ([], [60])


def test_what_is_unfinished_is_written_when_time_is_over(populations):
    score_population.train(options(datasets=["first", "second", "third"], seconds=35))
    assert [each.calls for each in populations] == [20, 20, 10]
    assert [each.written for each in populations] == [[20], [20], [10]]


@pytest.mark.slow
def test_trained_policies_are_evaluated_and_added_to_the_results(tmp_path, monkeypatch):
    small = {"hidden": [8, 8], "batch_size": 16}
    scored = score_datasets.ScoredDataset(
        lambda folder: test_bench_scores.small_data(),
        20,
        2,
        raw_reward=True,
        options={"ours": small},
    )
    for module in (score_datasets, score_population):
        monkeypatch.setattr(module, "DATASETS", {"sum": scored})

    monkeypatch.setattr(score_population, "RESULTS", tmp_path)
    monkeypatch.setattr(score_population, "UPDATES_A_CALL", 5)
    monkeypatch.setattr(score_population, "OURS", small)
    monkeypatch.setattr(score_population, "EVALUATION_SEED", 0)
    o = Namespace(
        datasets=["sum"], peers=tmp_path, folder=tmp_path / "policies", seeds=2, updates=20, points=2,
        device="cpu", seconds=1e9, change={}, result="scores", method="cloning",
    )  # fmt: skip
    score_population.train(o)
    assert sorted(path.name for path in (o.folder / "sum").glob("*.pt")) == ["10.pt", "20.pt"]
    for _ in range(2):  # the second time in place of the first
        score_population.play(o)
    content = json.loads((tmp_path / "scores.json").read_text())
    assert [cell["seed"] for cell in content["cells"]] == [0, 1]
    for cell in content["cells"]:
        assert [point[0] for point in cell["curve"]] == [10, 20]
        assert cell["return"] == cell["curve"][-1][1]
        assert cell["score"] == pytest.approx(50 * cell["return"])
    assert content["settings"]["sum"]["cloning"]["settings"]["temperature"] == 0.0
    assert np.ptp([cell["return"] for cell in content["cells"]]) > 0  # two runs
