"""Recommendations in small problems with exact values: never a harmful one, often the right one."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import bench_trust
from trust_families import FAMILIES

from iql_torchrl.selection import rank_policies

TABLES = argparse.Namespace(networks=False)
EASY = ("plain arms", "plain chain", "random MDP")


def trial(family, seed):
    return bench_trust.trial(FAMILIES[family](seed), seed, TABLES)


def value(problem, name):
    return problem.value(problem.behaviour if name is None else problem.candidates[name])


@pytest.mark.parametrize(
    ("family", "seed"),
    [
        ("rare state", 0), ("rare state", 1), ("censored", 0), ("winner's curse", 0),
        ("winner's curse", 1), ("poor clone", 0), ("poor clone", 1), ("tiny dataset", 0),
    ],
)  # fmt: skip
def test_no_member_worse_than_the_log_is_recommended(family, seed):
    problem = FAMILIES[family](seed)
    truth = {name: problem.value(policy) for name, policy in problem.candidates.items()}
    dataset = problem.value(problem.behaviour)
    assert min(truth.values()) < dataset - 0.05  # there is somebody to be wrong about
    outcome = trial(family, seed)
    assert not outcome["harmful"]
    assert outcome["covered"]


@pytest.mark.parametrize("family", ["winner's curse", "plain arms"])
def test_no_recommendation_where_episodes_are_used_twice(family):
    """The held-out steps then have the same random errors as the fit and cannot show them."""
    problem = FAMILIES[family](0)
    dataset = problem.dataset(0)
    ranking = rank_policies(problem.actors(), dataset, dataset, discount=problem.discount)
    assert ranking.recommended is None
    assert any("100% of the held-out episodes" in warning for warning in ranking.warnings)


def test_a_policy_fitted_to_its_own_log_is_not_flattered():
    """The best arm of a noisy log, by that log: on other episodes it is nobody's recommendation."""
    problem = FAMILIES["winner's curse"](0)

    def means(seed):
        rows = problem.dataset(seed).transitions
        arms, reward = (rows[key].reshape(-1) for key in ("action", ("next", "reward")))
        return [float(reward[arms == arm].mean()) for arm in range(4)]

    every = [means(seed) for seed in range(9)]
    own = next(each for each in every if max(each) != each[0])
    lucky = own.index(max(own))
    assert max(own) > 2  # its true mean is -1
    actors = {f"arm {lucky}": problem.actors()[f"arm {lucky}"]}
    fresh = problem.dataset(101), problem.dataset(102)
    ranking = rank_policies(actors, *fresh, discount=problem.discount)
    assert ranking.recommended is None
    row, gain = ranking.rows[0], value(problem, f"arm {lucky}") - value(problem, None)
    assert row["gain_low"] < gain < row["gain_high"]


@pytest.mark.parametrize("family", EASY)
def test_the_right_one_is_recommended_where_it_is_easy(family):
    outcome = trial(family, 0)
    assert outcome["right"]
    assert not outcome["harmful"]
    assert outcome["covered"]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_ten_logs_of_every_family(family):
    outcomes = [trial(family, seed) for seed in range(10)]
    assert sum(outcome["harmful"] for outcome in outcomes) <= 1
    if family in EASY:
        assert FAMILIES[family](0).easy
        assert sum(outcome["right"] for outcome in outcomes) >= 8
