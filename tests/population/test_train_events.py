"""train() without a loop, train_now, numbers of updates, captured calls after a short first one."""

from __future__ import annotations

import pytest
from small_populations import configs, dataset

from iql_torchrl import IQLPopulation
from iql_torchrl.population import runs as population_module


def test_events_that_nothing_reads_are_warned_about():
    population = IQLPopulation(configs(), dataset())
    with pytest.warns(UserWarning, match="nothing was trained"):
        population.train(5)
    assert population.updates == 0
    assert [event.updates for event in population.train(5, every=2)] == [2, 4, 5]


def test_train_now_trains():
    population = IQLPopulation(configs(), dataset())
    assert population.train_now(5).updates == population.updates == 5
    assert population.train_now(0) is None


def test_whole_floats_and_other_numbers():
    population = IQLPopulation(configs(), dataset())
    assert [event.updates for event in population.train(4e0, every=2e0)] == [2, 4]
    for name in ("updates", "every"):
        with pytest.raises(ValueError, match=f"{name} is 2.5; it counts updates"):
            population.train(**{name: 2.5})
        with pytest.raises(ValueError, match=f"{name} is '3'"):
            population.train(**{name: "3"})


def test_a_short_first_training_does_not_fix_the_captured_calls(monkeypatch):
    made = []

    class Captured:
        def __init__(self, step, sampler, *, updates):
            made.append(updates)
            self.step, self.sampler, self.updates = step, sampler, updates

        def __call__(self):
            return sum(self.step(self.sampler.sample()) for _ in range(self.updates)) / self.updates

    monkeypatch.setattr(population_module, "captured", Captured)
    population = IQLPopulation(configs(compile=True), dataset())
    population.train_now(1)
    population.train_now(64)
    population.train_now(3)
    assert made == [1, 32]
    assert population.updates == 68
