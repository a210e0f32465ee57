"""The ranking: its order, its doubts, its sentence, and what it writes."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from small_agents import box_agent
from small_agents import log as small_log
from small_mdp import (
    DISCOUNT,
    actor,
    greedy_policy,
    plain_returns,
    random_mdp,
    random_policies,
    steps_log,
    uniform,
)
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import Delta, IndependentNormal, ProbabilisticActor

from iql_torchrl import IQLConfig, load_dataset, make_agent
from iql_torchrl.evaluation.statistics import rank_correlations
from iql_torchrl.selection import (
    Ranking,
    bounds,
    fitted_q_evaluation,
    importance_sampling,
    rank_members,
)
from iql_torchrl.selection import ranking as ranking_module
from iql_torchrl.selection.bounds import mean_bounds

WORLD = random_mdp()
POLICIES = [0.5 * uniform() + 0.5 * policy for policy in random_policies(4)]
NAMES = ("p0", "p1", "p2", "p3")
GREEDY = greedy_policy(WORLD)


@pytest.fixture(scope="module", autouse=True)
def _few_draws():
    """A fifth of the draws that bounds are made of: enough for every number here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bounds, "MAX_DRAWS", 2000)
        yield


@pytest.fixture(scope="module")
def parts(_few_draws):
    return WORLD.log(uniform(), episodes=1600).split(0.5, 0)


@pytest.fixture(scope="module")
def members():
    tables = [*POLICIES, uniform(), GREEDY]
    return {n: actor(t) for n, t in zip((*NAMES, "clone", "greedy"), tables, strict=True)}


@pytest.fixture(scope="module")
def fitted(parts, members):
    return fitted_q_evaluation(members, *parts, discount=DISCOUNT)


@pytest.fixture(scope="module")
def ranking(parts, members, fitted):
    return rank_members(members, *parts, discount=DISCOUNT, fitted_q=fitted, clone="clone")


@pytest.fixture
def again(parts, members, fitted):
    """The ranking after some of its estimates were changed: of scores, or of everything else."""

    def run(scores=None, fit=None, **options):
        changed = replace(fitted, episodes=replace(fitted.episodes, **scores or {}), **fit or {})
        given = {"discount": DISCOUNT, "fitted_q": changed, "clone": "clone"} | options
        return rank_members(members, *parts, **given)

    return run


def row_of(ranking, name):
    return next(row for row in ranking.rows if row["member"] == name)


def test_members_are_sorted_by_value_and_the_best_is_recommended(ranking, parts):
    exact = {n: WORLD.start @ WORLD.values(t) for n, t in zip(NAMES, POLICIES, strict=True)}
    exact |= {"clone": WORLD.start @ WORLD.values(uniform())}
    exact |= {"greedy": WORLD.start @ WORLD.values(GREEDY)}
    order = [row["member"] for row in ranking.rows]
    assert order[0] == max(exact, key=exact.__getitem__)
    assert order[-1] == min(exact, key=exact.__getitem__)
    values = {row["member"]: row["value"] for row in ranking.rows}
    assert list(values.values()) == sorted(values.values(), reverse=True)
    assert values == pytest.approx(exact, abs=0.3)
    assert [row["rank"] for row in ranking.rows] == [1, 2, 3, 4, 5, 6]
    assert ranking.recommended == order[0] == "greedy"
    assert ranking.recommendation.startswith(
        "Recommendation: greedy, with an estimated gain over the log of "
    )
    best = ranking.rows[0]
    numbers = (
        f"{best['gain']:.4g} (95% interval for all 6 members at once {best['gain_low']:.4g} to"
    )
    assert numbers in ranking.recommendation
    assert "doubted" not in ranking.recommendation
    for row in ranking.rows:
        gain = exact[row["member"]] - exact["clone"]
        assert row["gain_low"] < gain < row["gain_high"]
        assert row["value_low"] < row["value"] < row["value_high"]
    assert ranking.log_value == pytest.approx(plain_returns(parts[1]).mean())
    assert ranking.log_low < exact["clone"] < ranking.log_high
    clone = row_of(ranking, "clone")
    assert clone["clone_distance"] == 0
    assert clone["effective_episodes"] == pytest.approx(ranking.episodes, rel=1e-4)
    assert clone["importance_value"] == pytest.approx(ranking.log_value, rel=1e-4)
    sound = [row for row in ranking.rows if row["effective_episodes"] >= 100]
    assert 2 < len(sound) < 6
    pairs = ([row[key] for row in sound] for key in ("value", "importance_value"))
    pairs = list(pairs)
    assert ranking.spearman == pytest.approx(stats.spearmanr(*pairs).statistic)
    assert ranking.kendall == pytest.approx(stats.kendalltau(*pairs).statistic)
    assert (ranking.discount, ranking.episodes) == (DISCOUNT, 800)


def test_gains_are_paired_and_hold_for_all_members_at_once(parts, fitted, ranking):
    scores = fitted.episodes
    gains = scores.scores - plain_returns(parts[1])
    assert scores.log_surprise == 0  # no episode was truncated
    limits = gains.mean(1) - scores.surprise, gains.mean(1) + scores.surprise
    low, high = mean_bounds(gains, *limits)
    alone = mean_bounds(gains, *limits, together=False)
    for number, name in enumerate(fitted.names):
        row = row_of(ranking, name)
        assert row["gain"] == pytest.approx(gains[number].mean())
        assert row["gain_low"] == pytest.approx(low[number])
        assert row["gain_high"] == pytest.approx(high[number])
        width = row["gain_high"] - row["gain_low"]
        spread = 2 * stats.norm.ppf(1 - 0.025 / 6) * gains[number].std() / len(gains[0]) ** 0.5
        assert 0.7 * spread < width < 1.3 * spread
        assert width > alone[1][number] - alone[0][number]
    own = fitted.intervals()
    assert row_of(ranking, "p1")["value_low"] == own[1, 0]


def test_no_better_member_no_recommendation(parts):
    worst = {"worst": actor(np.roll(GREEDY, 1, axis=1)), "log": actor(uniform())}
    ranking = rank_members(worst, *parts, discount=DISCOUNT, clone="log")
    assert ranking.recommended is None
    assert "no member is reliably better than the log (the best, log" in ranking.recommendation
    assert "doubted" not in ranking.recommendation
    assert ranking.rows[0]["member"] == "log"


def shifted(fitted, by, *names):
    """Both scores of the members ``names``, or of all of them, so much higher."""
    chosen = np.isin(fitted.names, names or fitted.names)[:, None]
    return {key: getattr(fitted.episodes, key) + by * chosen for key in ("scores", "scores_high")}


def warnings_with(ranking, text):
    return [warning for warning in ranking.warnings if text in warning]


@pytest.mark.parametrize("kind", ["table", "network"])
def test_a_value_that_the_log_cannot_give_is_doubted(again, fitted, parts, kind):
    """Networks: outside every logged return. Tables: beyond the best reward at every step."""
    low, high = fitted.episodes.return_range
    fit = {}
    if kind == "table":
        rewards = np.concatenate([p.transitions["next", "reward"].reshape(-1) for p in parts])
        low, high = (10 * float(r) for r in (rewards.min(), rewards.max()))  # 1 / (1 - 0.9)
    else:
        fit = {"backups": 1e9, "passes": 1e9}
    own = fitted.values[fitted.names.index("p0")]
    for target, doubted in (
        (high + 0.1, True), (high - 0.1, False), (low + 0.1, False), (low - 0.1, True)
    ):  # fmt: skip
        ranking = again(shifted(fitted, target - own, "p0"), fit)
        assert ("range" in row_of(ranking, "p0")["doubts"]) == doubted
        text = f"p0: values are outside the range that the log allows, {low:.4g} to {high:.4g};"
        assert bool(warnings_with(ranking, text)) == doubted
        assert not doubted or ranking.recommended != "p0"


@pytest.mark.parametrize(
    ("key", "value", "doubt", "text"),
    [
        ("effective_episodes", 20.0, None, ""),
        ("effective_episodes", 19.9, "few", "has only 19.9 effective episodes of 800, at least 20 are"),
        ("unsupported", 0.049, None, ""),
        ("unsupported", 0.051, "extrapolation", "greedy: up to 5% of their actions are rare or"),
        ("worst_unsupported", 0.499, None, ""),
        ("worst_unsupported", 0.501, "extrapolation", "own actions: 0%), in the worst state 50%; the"),
    ],
)  # fmt: skip
def test_a_doubted_member_is_not_recommended(again, fitted, key, value, doubt, text):
    values = np.where(np.array(fitted.names) == "greedy", value, getattr(fitted.episodes, key))
    result = again({key: values})
    assert set(row_of(result, "greedy")["doubts"]) - {"importance"} == ({doubt} - {None})
    assert (result.recommended == "greedy") == (doubt is None)
    assert doubt is None or warnings_with(result, text)
    column = {"effective_episodes": "correcting_episodes", "unsupported": "extrapolation"}
    assert row_of(result, "greedy")[column.get(key, "worst_extrapolation")] == value
    if doubt is None:
        assert not any(set(row["doubts"]) & {"few", "extrapolation"} for row in result.rows)


def other_estimates(fitted, kind):
    """Changes of the estimates, and a sentence that they cause."""
    step = "the number of the step"
    mirrored = 2 * fitted.values.mean() - fitted.episodes.scores
    return {
        "history": ({"history": {step: 4.6, "the step before": 1.0}}, {}, f"{step} (t statistic 4.6)"),
        "negative": ({"history": {step: -4.6}}, {}, f"{step} (t statistic -4.6)"),
        "no history": ({"history": {step: 4.4}}, {}, ""),
        "updates": ({}, {"backups": 3.0, "passes": 9.0}, "renewed its targets 3 times, in 9 passes"),
        "passes": ({}, {"backups": 1e3, "passes": 0.5}, "times, in 0.5 passes of the data, where"),
        "enough": ({}, {"backups": 1e3, "passes": 9.0}, ""),
        "few ends": ({"unlogged_ends": 0.009}, {}, ""),
        "many ends": ({"unlogged_ends": 0.2}, {}, "leave 20% of the discounted future in states that"),
        "order": ({"scores": mirrored, "scores_high": mirrored}, {}, "differently (Spearman -"),
        "clone": (shifted(fitted, -2.0), {}, "clone, which imitates the log, is estimated at "),
    }[kind]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "recommended"),
    [
        ("history", None), ("negative", None), ("no history", "greedy"), ("updates", None),
        ("passes", None),
        ("enough", "greedy"), ("few ends", "greedy"), ("many ends", "greedy"), ("order", "other"),
        ("clone", "other"),
    ],
)  # fmt: skip
def test_sentences_about_the_whole_ranking(again, fitted, ranking, kind, recommended):
    scores, fit, text = other_estimates(fitted, kind)
    result = again(scores, fit, min_effective_episodes=0 if kind == "order" else 100.0)
    assert recommended == "other" or result.recommended == recommended
    if not text:
        assert result.warnings == ranking.warnings
        return
    (warning,) = warnings_with(result, text)
    assert not warnings_with(ranking, text)
    if kind == "order":
        assert result.spearman < 0
        assert f"(Spearman {result.spearman:.2f})" in warning
    if kind == "clone":
        assert f"is estimated at {row_of(result, 'clone')['value']:.4g}" in warning
        assert f"the log at {result.log_value:.4g} ({result.log_low:.4g} to" in warning


def test_the_log_s_own_share_outside_itself_is_allowed(again, fitted):
    shares = np.full(6, 0.08)
    for own, doubted in ((0.02, True), (0.04, False)):
        result = again({"unsupported": shares, "log_unsupported": own})
        assert ("extrapolation" in row_of(result, "greedy")["doubts"]) == doubted
        assert result.log_extrapolation == own
    result = again({"unsupported": shares}, max_extrapolation=0.1)
    assert result.recommended == "greedy"


def test_critics_that_err_more_on_held_out_steps_are_named(again):
    result = again(
        fit={"td_error": np.array([1.0, 10, 1, 1, 1, 4.1]), "td_error_training": np.ones(6)}
    )
    doubted = {row["member"] for row in result.rows if "td_error" in row["doubts"]}
    assert doubted == {"p1", "greedy"}
    (warning,) = warnings_with(result, "errors of the critics")
    assert warning.startswith("greedy, p1: errors of the critics are up to 10.0 times as large on")
    assert result.recommended == "greedy"  # their intervals are wider, and hold


@pytest.mark.parametrize("by", [3.0, -40.0])
def test_no_recommendation_where_the_estimators_contradict_each_other(again, fitted, ranking, by):
    """About any member: the clone's scores far above, or below, what importance sampling says."""
    assert not warnings_with(ranking, "contradict")
    result = again(shifted(fitted, by, "clone"))
    row = row_of(result, "clone")
    assert "contradiction" in row["doubts"]
    assert result.recommended is None
    (warning,) = warnings_with(result, "contradict each other")
    assert f"(clone: {row['value_low']:.4g} to {row['value_high']:.4g} against" in warning
    if by > 0:
        assert row["gain_low"] > 0
        assert row["importance_high"] < row["value_low"]
        assert row["doubts"] == ("contradiction",)
        assert "better estimates are doubted, see the warnings" in result.recommendation


def test_no_recommendation_where_logged_probabilities_are_too_low(parts, members, fitted):
    rows = parts[1].transitions.clone()
    rows["action_log_prob"] = rows["action_log_prob"] - 0.5
    wrong = replace(parts[1], transitions=rows)
    result = rank_members(
        members, parts[0], wrong, discount=DISCOUNT, fitted_q=fitted, clone="clone"
    )
    assert "contradiction" in row_of(result, "greedy")["doubts"]
    assert warnings_with(result, "check action_log_prob")
    assert result.recommended is None


def test_importance_intervals_hold_for_all_members_at_once(parts, members, fitted, ranking):
    alone = importance_sampling(
        members, parts[1], behaviour="action_log_prob", discount=DISCOUNT,
        confidence=1 - 0.05 / 6, return_limits=fitted.episodes.return_range,
    )  # fmt: skip
    for number, name in enumerate(alone.names):
        row = row_of(ranking, name)
        assert row["importance_value"] == alone.values[number]
        assert row["importance_low"] == alone.low[number]
        assert row["importance_high"] == alone.high[number]


def test_the_best_that_is_not_doubted_is_recommended(again, fitted, ranking):
    second = next(row for row in ranking.rows[1:] if row["gain_low"] > 0)
    shares = fitted.episodes.unsupported.copy()
    for row in ranking.rows[: second["rank"] - 1]:
        shares[fitted.names.index(row["member"])] = 0.5
    result = again({"unsupported": shares})
    assert [row["member"] for row in result.rows] == [row["member"] for row in ranking.rows]
    assert result.recommended == second["member"]
    more = f"; {second['rank'] - 1} with higher estimates are doubted or uncertain)."
    assert result.recommendation.endswith(more)


def test_at_most_three_members_are_named(again):
    result = again({"unsupported": np.full(6, 0.5)})
    order = [row["member"] for row in result.rows]
    (warning,) = warnings_with(result, "rare or missing")
    assert warning.startswith(f"{', '.join(order[:3])} and 3 more: up to 50% of their actions")


def test_a_tenth_of_the_episodes_must_bear_the_weight(again):
    result = again(min_effective_episodes=0)
    sizes = {row["member"]: row["effective_episodes"] for row in result.rows}
    doubted = {row["member"] for row in result.rows if "importance" in row["doubts"]}
    assert doubted == {n for n, size in sizes.items() if size < 0.1 * result.episodes} != set()
    (warning,) = warnings_with(result, "importance weights")
    assert f"have only {min(sizes.values()):.1f} effective episodes of 800" in warning
    result = again(min_effective_episodes=sorted(sizes.values())[-2])
    assert math.isnan(result.spearman)  # two are left, and always in some order
    assert not warnings_with(result, "order the members differently")


def test_the_clone_is_the_first_of_temperature_zero(parts):
    dataset = load_dataset(small_log(rows=120))
    train, held_out = dataset.split(0.5, 0)
    agents = {"iql": box_agent(seed=1), "clone": box_agent(temperature=0.0)}
    how = {"discount": 0.9, "hidden": (8,), "updates": 20, "batch_size": 16, "deterministic": False}
    fitted = fitted_q_evaluation(agents, train, held_out, **how)
    options = {"discount": 0.9, "fitted_q": fitted, "behaviour": agents["clone"]}
    result = rank_members(agents, train, held_out, **options)
    assert row_of(result, "clone")["clone_distance"] == 0 < row_of(result, "iql")["clone_distance"]
    assert row_of(result, "clone")["effective_episodes"] == pytest.approx(6)
    assert row_of(result, "clone")["temperature"] == 0
    assert str(result) == str(rank_members(agents, train, held_out, **options))


def test_without_behaviour_and_clone(parts):
    log = [replace(part, transitions=part.transitions.exclude("action_log_prob")) for part in parts]
    policies = {"p0": actor(POLICIES[0]), "greedy": actor(GREEDY)}
    result = rank_members(policies, *log, discount=DISCOUNT)
    assert math.isnan(result.rows[0]["importance_value"])
    assert math.isnan(result.rows[0]["clone_distance"])
    assert math.isnan(result.spearman)
    text = " ".join(result.warnings)
    assert "no behaviour model was given" in text
    assert " - " in str(result)
    assert result.recommended == "greedy"
    assert not any(row["doubts"] for row in result.rows)


def test_truncated_returns_are_continued_without_a_clone():
    parts = WORLD.log(uniform(), episodes=1600, horizon=2).split(0.5, 0)
    policies = {"greedy": actor(GREEDY), "p0": actor(POLICIES[0])}
    result = rank_members(policies, *parts, discount=DISCOUNT)
    exact = WORLD.start @ WORLD.values(uniform())
    assert result.log_value == pytest.approx(exact, abs=0.3)
    assert abs(plain_returns(parts[1]).mean() - exact) > 0.3
    assert result.log_low < exact < result.log_high
    assert result.recommended == "greedy"
    clone = rank_members(policies | {"c": actor(uniform())}, *parts, discount=DISCOUNT, clone="c")
    assert clone.log_value == result.log_value


def test_what_is_unknown_counts_against_members_and_for_the_log(again, fitted):
    """The least return in the lower bound of a gain, for the log the greatest, and vice versa."""
    wide = again(
        {
            "scores_high": fitted.episodes.scores + 1.0,
            "log_scores_high": fitted.episodes.log_scores + 2.0,
        }
    )
    plain = again()
    for row in plain.rows:
        other = row_of(wide, row["member"])
        assert other["gain"] == row["gain"]
        assert row["gain_low"] - other["gain_low"] == pytest.approx(2.0, abs=0.1)
        assert other["gain_high"] - row["gain_high"] == pytest.approx(1.0, abs=0.1)
    assert wide.log_high - plain.log_high == pytest.approx(2.0, abs=0.1)


def agent_of(dataset, **options):
    config = IQLConfig(updates=2, hidden=(8,), batch_size=16, reward="raw", **options)
    return make_agent(config, dataset)


class Shipped:
    """What ``rank_members`` reads of an agent: its policy, and its task's episodes."""

    def __init__(self, policy, trained_on):
        self.policy, self.task = actor(policy), agent_of(trained_on).task


def test_members_trained_on_held_out_episodes_are_not_recommended(parts):
    own = WORLD.log(uniform(), episodes=300, seed=77)
    agents = {"held": agent_of(parts[1]), "fit": agent_of(parts[0]), "own": agent_of(own)}
    agents |= {"greedy": actor(GREEDY), "shipped": Shipped(GREEDY, parts[1])}
    result = rank_members(agents, *parts, discount=DISCOUNT)
    seen = {row["member"]: row["seen"] for row in result.rows}
    assert min(seen["held"], seen["shipped"]) > 0.9
    assert [seen[name] for name in ("fit", "own", "greedy")] == [0, 0, 0]
    doubted = {row["member"] for row in result.rows if "seen" in row["doubts"]}
    assert doubted == {"held", "shipped"}
    (warning,) = warnings_with(result, "cannot test them")
    text = f": trained on up to {max(seen.values()):.0%} of the held-out episodes"
    assert warning.startswith((f"held, shipped{text}", f"shipped, held{text}"))
    assert warnings_with(result, "members were trained on up to 1")  # 100% of the fit
    clean = rank_members({"own": agents["own"]}, *parts, discount=DISCOUNT)
    assert not warnings_with(clean, "trained on")
    alone = {"shipped": agents["shipped"], "clone": actor(uniform())}
    alone = rank_members(alone, *parts, discount=DISCOUNT)
    assert row_of(alone, "shipped")["gain_low"] > 0
    assert row_of(alone, "shipped")["doubts"] == ("importance", "seen")
    assert alone.recommended is None


def test_no_recommendation_where_fit_and_held_out_share_episodes(parts, members):
    one, other = parts[0].split(0.5, 0)
    result = rank_members(members, parts[0], other, discount=DISCOUNT)
    assert result.recommended is None
    (warning,) = warnings_with(result, "cannot show the error of the fit")
    assert "of the held-out episodes are also among those fitted on" in warning
    assert "dataset.split(fraction, seed)" in warning
    separate = rank_members(members, one, other, discount=DISCOUNT)
    assert separate.recommended == "greedy"


@pytest.mark.parametrize("confidence", [0.5, 0.99])
def test_the_confidence_is_that_of_every_interval(again, ranking, confidence):
    result = again(confidence=confidence)
    for row in ranking.rows:
        other = row_of(result, row["member"])
        for key in ("value", "gain", "importance"):
            width, new = (r[f"{key}_high"] - r[f"{key}_low"] for r in (row, other))
            assert (new < width) == (confidence < 0.95)
    assert (result.log_high - result.log_low < ranking.log_high - ranking.log_low) == (
        confidence < 0.95
    )


def test_table_and_files(ranking, tmp_path):
    lines = str(ranking).splitlines()
    assert lines[0].split()[:2] == ["member", "value"]
    assert [line.split()[0] for line in lines[1:7]] == [row["member"] for row in ranking.rows]
    assert lines[7].startswith("the log")
    assert lines[-1] == ranking.recommendation
    assert all(f"Warning: {warning}" in lines for warning in ranking.warnings)
    ranking.to_json(tmp_path / "ranking.json")
    read = json.loads((tmp_path / "ranking.json").read_text())
    assert read["rows"][0]["member"] == "greedy"
    assert read["rows"][0]["temperature"] is None
    assert read["rows"][0]["td_error"] is None
    assert read["rows"][0]["gain_low"] == ranking.rows[0]["gain_low"]
    assert read["recommended"] == "greedy"
    copy = Ranking.from_json(tmp_path / "ranking.json")
    assert str(copy) == str(ranking)
    assert repr(copy) == repr(ranking)
    ranking.to_csv(tmp_path / "ranking.csv")
    with (tmp_path / "ranking.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["member"] for row in rows] == [row["member"] for row in ranking.rows]
    assert float(rows[0]["value"]) == ranking.rows[0]["value"]
    assert rows[0]["temperature"] == ""
    assert rows[0]["doubts"] == "importance"
    assert float(rows[0]["seen"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ranking.csv", "ranking.json"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"clone": "x"}, r"clone is 'x', which is none of the members \['p0'"),
        ({"discount": 0.5}, "fitted_q has"),
        ({"discount": -1}, "discount is -1"),
        ({"members": {"p0": actor(POLICIES[0])}}, "fitted_q has"),
        ({"held_out": None}, "fitted_q has"),
        ({"confidence": 1.0}, "confidence is 1.0"),
        ({"confidence": 0}, "confidence is 0"),
        ({"max_extrapolation": -0.1}, "max_extrapolation is -0.1"),
    ],
)
def test_what_cannot_be_is_refused(parts, members, fitted, changed, message):
    given = {"members": members, "train": parts[0], "held_out": parts[1], "discount": DISCOUNT}
    given |= {"fitted_q": fitted} | changed
    given["held_out"] = given["held_out"] or parts[1].split(0.5, 0)[0]
    with pytest.raises(ValueError, match=message):
        rank_members(**given)


def test_rank_correlations_by_hand():
    """Values 1..5 against 2, 1, 4, 3, 5: 2 of 10 pairs are discordant, squared rank differences 4."""
    by_hand = 1 - 6 * 4 / 120, 0.6
    assert rank_correlations([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(by_hand)
    # One tie on one side: tau-b is 5 / sqrt(5 * 6); the ranks are 1.5, 1.5, 3, 4.
    tied = rank_correlations([1, 1, 2, 3], [1, 2, 3, 4])
    assert tied == pytest.approx((4.5 / math.sqrt(4.5 * 5), 5 / math.sqrt(30)))


@pytest.mark.parametrize(
    ("values", "checks"),
    [
        ([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [2, 2, 2]), ([1, math.nan, 2], [1, 2, 3]),
        ([1.0], [2.0]), ([], []), ([1.0, 1.0], [1.0, 2.0]),
    ],
)  # fmt: skip
def test_rank_correlations_that_are_not_defined_are_nan(values, checks):
    assert np.isnan(rank_correlations(values, checks)).all()


# -- continuous actions: both estimators evaluate the same policies


class Normals(nn.Module):
    """The same normal distribution of the action in every state, or its mean alone."""

    def __init__(self, mean, std):
        super().__init__()
        self.values = (mean, std)

    def forward(self, observation):
        return tuple(torch.full((*observation.shape[:-1], 1), x) for x in self.values)


def normal_actor(mean, std, distribution=IndependentNormal):
    net = TensorDictModule(Normals(mean, std), ["observation"], ["loc", "scale"])
    keys = ["loc", "scale"] if distribution is IndependentNormal else {"param": "loc"}
    return ProbabilisticActor(net, in_keys=keys, distribution_class=distribution)


@pytest.fixture(scope="module")
def one_step_logs():
    """Episodes of one step with reward -a**2, and actions from N(0, 1) with their log-probability."""
    generator = np.random.default_rng(0)
    action = generator.normal(size=(1200, 1)).astype(np.float32)
    log_prob = -0.5 * action[:, 0] ** 2 - 0.5 * np.log(2 * np.pi)
    observation = generator.normal(size=(1200, 1)).astype(np.float32)
    return steps_log(
        1200, observation=observation, next_observation=observation, action=action,
        reward=-(action[:, 0] ** 2), action_log_prob=log_prob.astype(np.float32),
    ).split(0.5, 0)  # fmt: skip


@pytest.fixture
def quick(monkeypatch):
    """Fitted Q evaluation in a second; which policies it was asked for."""
    asked = []

    def evaluate(*args, deterministic, **options):
        asked.append(deterministic)
        options |= {"updates": 600, "hidden": (32,), "model": "network"}
        return fitted_q_evaluation(*args, deterministic=deterministic, **options)

    monkeypatch.setattr(ranking_module, "fitted_q_evaluation", evaluate)
    return asked


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("num_samples", "clone"), [(1, True), (4, False)])
def test_the_best_of_several_actions_of_a_clone_is_no_clone(
    one_step_logs, quick, num_samples, clone
):
    options = {"policy": "flow", "temperature": 0.0, "num_samples": num_samples, "flow_steps": 2}
    config = IQLConfig(hidden=(8,), reward="raw", **options)
    members = {"flow": make_agent(config, one_step_logs[0])}
    result = rank_members(members, *one_step_logs, discount=0.9, deterministic=True)
    assert math.isnan(result.rows[0]["clone_distance"]) is not clone


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_both_estimators_evaluate_the_same_continuous_policies(one_step_logs, quick):
    """E[-a**2] of N(m, s) is -(m**2 + s**2); of the deterministic action -m**2."""
    members = {"wide": normal_actor(0.0, 0.8), "right": normal_actor(0.5, 0.5)}
    result = rank_members(members, *one_step_logs, discount=0.9)
    assert quick == [False]
    for name, value in (("wide", -0.64), ("right", -0.5)):
        row = row_of(result, name)
        assert row["value"] == pytest.approx(value, abs=0.12)
        assert row["importance_value"] == pytest.approx(value, abs=0.12)
        assert "contradiction" not in row["doubts"]
    assert warnings_with(result, "as the members draw them")

    alone = rank_members(members, *one_step_logs, discount=0.9, deterministic=True)
    assert quick == [False, True]
    assert row_of(alone, "wide")["value"] == pytest.approx(0, abs=0.12)
    assert row_of(alone, "right")["value"] == pytest.approx(-0.25, abs=0.12)
    assert math.isnan(alone.rows[0]["importance_value"])
    assert warnings_with(alone, "deterministic continuous actions, which have no density")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_without_a_density_there_is_no_importance_sampling(one_step_logs, quick):
    members = {"wide": normal_actor(0.0, 0.8), "fixed": normal_actor(0.5, 0.5, Delta)}
    result = rank_members(members, *one_step_logs, discount=0.9)
    assert quick == [True]
    assert row_of(result, "fixed")["value"] == pytest.approx(-0.25, abs=0.12)
    assert math.isnan(result.rows[0]["importance_value"])
    assert warnings_with(result, "because fixed has no density of actions")
