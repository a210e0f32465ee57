"""The ranking: its order, its doubts, its sentence, and what it writes."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from iql_torchrl.fqe import fitted_q_evaluation
from iql_torchrl.members import returns_to_go
from scipy import stats
from small_agents import box_agent
from small_agents import log as small_log
from small_mdp import ACTIONS, DISCOUNT, actor, random_mdp, random_policies, uniform

from iql_torchrl import load_dataset
from iql_torchrl.selection import rank_members

FAST = {"hidden": (), "lr": 0.1, "updates": 600, "batch_size": 512, "polyak": 0.1}
MDP = random_mdp()
POLICIES = random_policies(4)
NAMES = ("p0", "p1", "p2", "p3")


def greedy():
    """The policy that is best at each state for the uniform policy's values."""
    value = MDP.values(uniform())
    ahead = MDP.reward + DISCOUNT * (1 - MDP.ending) * (MDP.transition @ value)
    return np.eye(ACTIONS)[ahead.argmax(1)] * 0.94 + 0.02


@pytest.fixture(scope="module")
def parts():
    return MDP.log(uniform(), episodes=2500).split(0.6, 0)


@pytest.fixture(scope="module")
def members():
    tables = [*POLICIES, uniform(), greedy()]
    return {n: actor(t) for n, t in zip((*NAMES, "clone", "greedy"), tables, strict=True)}


@pytest.fixture(scope="module")
def fitted(parts, members):
    return fitted_q_evaluation(members, *parts, discount=DISCOUNT, **FAST)


@pytest.fixture(scope="module")
def ranking(parts, members, fitted):
    return rank_members(members, *parts, discount=DISCOUNT, fitted_q=fitted, clone="clone")


def test_members_stand_by_value_and_the_best_is_recommended(ranking, parts):
    exact = {n: MDP.start @ MDP.values(t) for n, t in zip(NAMES, POLICIES, strict=True)}
    exact |= {"clone": MDP.start @ MDP.values(uniform())}
    exact |= {"greedy": MDP.start @ MDP.values(greedy())}
    order = [row["member"] for row in ranking.rows]
    assert order[0] == max(exact, key=exact.__getitem__)
    assert order[-1] == min(exact, key=exact.__getitem__)
    found = {row["member"]: row["value"] for row in ranking.rows}
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert found == pytest.approx(exact, abs=0.25)  # 1,500 episodes
    assert [row["rank"] for row in ranking.rows] == [1, 2, 3, 4, 5, 6]
    assert ranking.recommended == order[0] == "greedy"
    assert "Recommendation: greedy" in ranking.recommendation
    held_out = parts[1]
    returns = returns_to_go(held_out, DISCOUNT)[np.r_[0, np.cumsum(held_out.episode_lengths)[:-1]]]
    assert ranking.log_value == pytest.approx(returns.mean())
    assert ranking.log_low < exact["clone"] < ranking.log_high
    clone = next(row for row in ranking.rows if row["member"] == "clone")
    assert clone["clone_distance"] == 0
    assert clone["effective_episodes"] == pytest.approx(ranking.episodes, rel=1e-4)
    assert clone["importance_value"] == pytest.approx(ranking.log_value, rel=1e-4)
    assert clone["gain_low"] < 0 < clone["gain_high"]
    sound = [row for row in ranking.rows if row["effective_episodes"] >= 100]
    assert 2 < len(sound) < 6
    values, checks = ([row[key] for row in sound] for key in ("value", "importance_value"))
    assert ranking.spearman == pytest.approx(stats.spearmanr(values, checks).statistic)
    assert ranking.kendall == pytest.approx(stats.kendalltau(values, checks).statistic)


def test_gains_are_paired(parts, fitted, ranking):
    held_out = parts[1]
    returns = returns_to_go(held_out, DISCOUNT)[np.r_[0, np.cumsum(held_out.episode_lengths)[:-1]]]
    for row in ranking.rows:
        gain = fitted.initial_values[fitted.names.index(row["member"])] - returns
        assert row["gain"] == pytest.approx(gain.mean())
        spread = 2 * 1.96 * gain.std() / len(gain) ** 0.5
        assert row["gain_high"] - row["gain_low"] == pytest.approx(spread, rel=0.1)


def test_no_better_member_no_recommendation(parts):
    worst = {"worst": actor(np.roll(greedy(), 1, axis=1)), "log": actor(uniform())}
    fitted = fitted_q_evaluation(worst, *parts, discount=DISCOUNT, **FAST)
    found = rank_members(worst, *parts, discount=DISCOUNT, fitted_q=fitted, clone="log")
    assert found.recommended is None
    assert "no member is reliably better than the log" in found.recommendation
    assert found.rows[0]["member"] == "log"


def test_doubts_are_sentences(parts, members, fitted):
    wild = fitted.initial_values.copy()
    wild[0] += 1e4
    error = fitted.td_error.copy()
    error[1] *= 10
    promise, unsure = np.zeros((2, len(members)))
    promise[2], unsure[2] = 50.0, 10.0
    promise[3], unsure[3] = 50.0, 30.0  # may be nothing
    fitted = replace(
        fitted, initial_values=wild, td_error=error, optimism=promise, optimism_error=unsure
    )
    found = rank_members(
        members, *parts, discount=DISCOUNT, fitted_q=fitted, clone="clone",
        min_count=10**6, min_effective_episodes=200,
    )  # fmt: skip
    rows = {row["member"]: row["doubts"] for row in found.rows}
    text = "\n".join(found.warnings)
    assert rows["p0"] == ("importance", "extrapolation", "range")
    assert "p0: values lie outside every return of the log" in text
    assert rows["p1"] == ("importance", "extrapolation", "td_error")
    assert "p1: critics err up to" in text
    assert "optimism" in rows["p2"]
    assert "optimism" not in rows["p3"]
    assert "p2: held-out steps earn less" in text
    assert "too high by up to about 50 (standard error 10)" in text
    assert rows["clone"] == ("extrapolation",)
    assert "and 1 more: importance weights rest on as few as" in text
    assert "and 3 more: up to 100% of the actions" in text
    assert "(of the log's own, 100%)" in text
    assert found.recommended is None
    assert "the best, p0, gains" in found.recommendation
    assert "what looks better is doubted, see the warnings" in found.recommendation
    assert all(f"Warning: {warning}" in str(found) for warning in found.warnings)


def test_the_best_that_is_not_doubted_is_recommended(parts, members, fitted, ranking):
    second = next(row for row in ranking.rows[1:] if row["gain_low"] > 0)
    names = list(fitted.names)
    promise = np.zeros(len(names))
    for row in ranking.rows[: second["rank"] - 1]:
        promise[names.index(row["member"])] = 100.0
    optimistic = replace(fitted, optimism=promise, optimism_error=np.ones(len(names)))
    found = rank_members(members, *parts, discount=DISCOUNT, fitted_q=optimistic, clone="clone")
    assert [row["member"] for row in found.rows] == [row["member"] for row in ranking.rows]
    assert found.recommended == second["member"]
    assert f"{second['rank'] - 1} with higher estimates are doubted" in found.recommendation


def test_critics_that_have_not_converged_recommend_nobody(parts, members, fitted):
    few = replace(fitted, backups=3.0)
    rare = replace(fitted, passes=0.5)
    for unfinished in (few, rare):
        found = rank_members(members, *parts, discount=DISCOUNT, fitted_q=unfinished, clone="clone")
        assert found.recommended is None
        (warning,) = (w for w in found.warnings if "has not converged" in w)
        assert f"renewed its targets {unfinished.backups:.3g} times" in warning
    assert fitted.backups == 60
    assert fitted.passes == pytest.approx(600 * 512 / len(parts[0]))


def test_a_tenth_of_the_episodes_must_bear_the_weight(parts, members, fitted):
    found = rank_members(
        members, *parts, discount=DISCOUNT, fitted_q=fitted, clone="clone", min_effective_episodes=0
    )
    sizes = {row["member"]: row["effective_episodes"] for row in found.rows}
    doubted = {row["member"] for row in found.rows if "importance" in row["doubts"]}
    assert doubted == {n for n, size in sizes.items() if size < 0.1 * found.episodes} != set()
    found = rank_members(
        members, *parts, discount=DISCOUNT, fitted_q=fitted, clone="clone",
        min_effective_episodes=sorted(sizes.values())[-2],
    )  # fmt: skip
    assert math.isnan(found.spearman)  # two are left, and always in some order
    assert not any("order the members differently" in warning for warning in found.warnings)


def test_a_clone_far_from_the_log_is_doubted(parts, members, fitted, ranking):
    assert not any("imitates the log" in warning for warning in ranking.warnings)
    shifted = replace(fitted, initial_values=fitted.initial_values + 1.0)
    found = rank_members(members, *parts, discount=DISCOUNT, fitted_q=shifted, clone="clone")
    (warning,) = (w for w in found.warnings if "imitates the log" in w)
    clone = next(row for row in found.rows if row["member"] == "clone")
    assert f"gives clone, which imitates the log, {clone['value']:.4g}" in warning
    assert f"earned {found.log_value:.4g} ({found.log_low:.4g} to" in warning
    assert "first read the warnings" in found.recommendation
    assert "warnings" not in ranking.recommendation


def test_without_behaviour_and_clone(parts):
    log = [replace(part, transitions=part.transitions.exclude("action_log_prob")) for part in parts]
    policies = {n: actor(t) for n, t in zip(NAMES[:2], POLICIES, strict=False)}
    fitted = fitted_q_evaluation(policies, *log, discount=DISCOUNT, **(FAST | {"updates": 50}))
    found = rank_members(policies, *log, discount=DISCOUNT, fitted_q=fitted)
    assert math.isnan(found.rows[0]["importance_value"])
    assert math.isnan(found.rows[0]["clone_distance"])
    assert math.isnan(found.spearman)
    text = " ".join(found.warnings)
    assert "no behaviour model was given" in text
    assert "no member imitates the log" in text
    assert " - " in str(found)


def test_truncated_returns_are_completed_by_the_clone():
    log = MDP.log(uniform(), episodes=1500, horizon=2)
    policies = {"clone": actor(uniform()), "greedy": actor(greedy())}
    fitted = fitted_q_evaluation(policies, log, log, discount=DISCOUNT, **FAST)
    found = rank_members(policies, log, log, discount=DISCOUNT, fitted_q=fitted, clone="clone")
    returns = returns_to_go(log, DISCOUNT)[np.r_[0, np.cumsum(log.episode_lengths)[:-1]]]
    wanted = (returns + fitted.end_values[0]).mean()
    assert found.log_value == pytest.approx(wanted)
    assert abs(found.log_value - returns.mean()) > 0.1
    assert found.log_value == pytest.approx(MDP.start @ MDP.values(uniform()), abs=0.15)
    without = rank_members(policies, log, log, discount=DISCOUNT, fitted_q=fitted)
    assert without.log_value == pytest.approx(returns.mean())
    assert any("leave" in warning and "unlogged" in warning for warning in without.warnings)
    assert without.recommended is None
    assert found.recommended == "greedy"


def test_agents_of_continuous_actions_are_ranked_without_a_model_fitted_by_hand():
    dataset = load_dataset(small_log(rows=120))
    agents = {"clone": box_agent(temperature=0.0), "iql": box_agent(seed=1)}
    train, held_out = dataset.split(0.5, 0)
    fitted = fitted_q_evaluation(
        agents, train, held_out, discount=0.9, hidden=(8,), updates=20, batch_size=16
    )
    found = rank_members(
        agents, train, held_out, discount=0.9, fitted_q=fitted, behaviour=agents["clone"]
    )
    rows = {row["member"]: row for row in found.rows}
    assert rows["clone"]["clone_distance"] == 0 < rows["iql"]["clone_distance"]
    assert rows["clone"]["effective_episodes"] == pytest.approx(6)
    assert rows["clone"]["temperature"] == 0
    again = rank_members(
        agents, train, held_out, discount=0.9, fitted_q=fitted, behaviour=agents["clone"]
    )
    assert str(found) == str(again)


def test_table_and_files(ranking, tmp_path):
    lines = str(ranking).splitlines()
    assert lines[0].split()[:2] == ["member", "value"]
    assert [line.split()[0] for line in lines[1:7]] == [row["member"] for row in ranking.rows]
    assert lines[-1] == ranking.recommendation
    ranking.to_json(tmp_path / "ranking.json")
    read = json.loads((tmp_path / "ranking.json").read_text())
    assert read["rows"][0]["member"] == "greedy"
    assert read["rows"][0]["temperature"] is None
    assert read["recommended"] == "greedy"
    ranking.to_csv(tmp_path / "ranking.csv")
    with (tmp_path / "ranking.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["member"] for row in rows] == [row["member"] for row in ranking.rows]
    assert float(rows[0]["value"]) == ranking.rows[0]["value"]
    assert rows[0]["temperature"] == ""
    assert rows[0]["doubts"] == "importance"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ranking.csv", "ranking.json"]


def test_what_cannot_be_is_refused(parts, members):
    with pytest.raises(ValueError, match=r"clone is 'x', which is none of the members \['p0'"):
        rank_members(members, *parts, discount=DISCOUNT, clone="x")
    fitted = fitted_q_evaluation(members, *parts, discount=0.5, **(FAST | {"updates": 1}))
    with pytest.raises(ValueError, match="fitted_q has"):
        rank_members(members, *parts, discount=DISCOUNT, fitted_q=fitted)
