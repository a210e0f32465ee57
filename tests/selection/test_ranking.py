"""The ranking: its order, its caveats, its recommendation, and what it writes."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from gymnasium import spaces
from scipy import stats
from small_agents import box_agent, config, small_columns
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
from small_populations import CONDITIONED
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import Delta, IndependentNormal, ProbabilisticActor

from iql_torchrl import IQLConfig, load_dataset, make_agent, policies
from iql_torchrl.evaluation import value_gap
from iql_torchrl.evaluation.statistics import rank_correlations
from iql_torchrl.losses import LossCritics
from iql_torchrl.selection import (
    Ranking,
    bounds,
    fitted_q_evaluation,
    importance_sampling,
    rank_policies,
    ranking,
)
from iql_torchrl.selection.bounds import mean_bounds
from iql_torchrl.selection.recommendation import recommendation

WORLD, GREEDY = random_mdp(), greedy_policy(random_mdp())
MIXED = [0.5 * uniform() + 0.5 * policy for policy in random_policies(4)]
TABLES = {f"p{i}": table for i, table in enumerate(MIXED)} | {"clone": uniform(), "greedy": GREEDY}
EXACT = {name: WORLD.start @ WORLD.values(table) for name, table in TABLES.items()}
STEP = "the number of the step"


@pytest.fixture(scope="module", autouse=True)
def _few_draws():
    """A fifth of the draws that bounds are made of: enough for every number here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bounds, "MAX_DRAWS", 2000)
        yield


@pytest.fixture(scope="module")
def parts(_few_draws):
    return WORLD.dataset(uniform(), episodes=1600).split(0.5, 0)


@pytest.fixture(scope="module")
def candidates():
    return {name: actor(table) for name, table in TABLES.items()}


@pytest.fixture(scope="module")
def fitted(parts, candidates):
    """With the model's weights, not those of the known propensities."""
    return fitted_q_evaluation(candidates, *parts, discount=DISCOUNT, behaviour=False)


@pytest.fixture(scope="module")
def ranked(parts, candidates, fitted):
    return rank_policies(
        candidates, *parts, discount=DISCOUNT, fitted_q=fitted, bc_baseline="clone"
    )


@pytest.fixture
def again(parts, candidates, fitted):
    """The ranking after some of its estimates were changed: of scores, or of everything else."""

    def run(scores=None, fit=None, **options):
        changed = replace(fitted, episodes=replace(fitted.episodes, **scores or {}), **fit or {})
        given = {"discount": DISCOUNT, "fitted_q": changed, "bc_baseline": "clone"} | options
        return rank_policies(candidates, *parts, **given)

    return run


def column(result, key):
    """By candidate, in the order of the ranking."""
    return {row["candidate"]: row[key] for row in result.rows}


def doubted(result, caveat):
    return {row["candidate"] for row in result.rows if caveat in row["caveats"]}


def row_of(result, name):
    return next(row for row in result.rows if row["candidate"] == name)


def warnings_with(result, text):
    return [warning for warning in result.warnings if text in warning]


def shifted(fitted, by, *names):
    """Both scores of the candidates ``names`` so much higher."""
    chosen = np.isin(fitted.names, names)[:, None]
    added = np.where(chosen, by, 0.0)
    return {key: getattr(fitted.episodes, key) + added for key in ("scores", "scores_high")}


def test_a_member_whose_critic_diverged_is_last_and_changes_no_other(again, fitted, ranked):
    """Its NaN made every simultaneous bound fail, and mixed up the order of the others."""
    result = again(shifted(fitted, math.nan, "greedy", "p1"))
    assert result.recommended != "greedy"
    last = {row["candidate"] for row in result.rows[-2:]}
    assert last == {"greedy", "p1"} == doubted(result, "range")
    assert all(math.isnan(row["gain_low"]) for row in result.rows[-2:])
    rest = [row["candidate"] for row in ranked.rows if row["candidate"] not in ("greedy", "p1")]
    assert [row["candidate"] for row in result.rows[:-2]] == rest
    for row in result.rows[:-2]:
        before = row_of(ranked, row["candidate"])
        assert row["value_low"] == before["value_low"]
        # of fewer candidates together
        assert before["gain_low"] <= row["gain_low"] < row["gain_high"] <= before["gain_high"]


def test_members_are_sorted_by_value_and_the_best_is_recommended(ranked, parts):
    values = column(ranked, "value")
    order = list(values)
    assert (order[0], order[-1]) == (max(EXACT, key=EXACT.get), min(EXACT, key=EXACT.get))
    assert list(values.values()) == sorted(values.values(), reverse=True)
    assert values == pytest.approx(EXACT, abs=0.3)
    assert list(column(ranked, "rank").values()) == [1, 2, 3, 4, 5, 6]
    assert ranked.recommended == order[0] == "greedy"
    best, clone = ranked.rows[0], row_of(ranked, "clone")
    assert ranked.recommendation.startswith(
        f"Recommendation: greedy, with an estimated gain over the behaviour policy of "
        f"{best['gain']:.4g} (95% interval for all 6 candidates at once {best['gain_low']:.4g} to"
    )
    assert "doubted" not in ranked.recommendation
    for row in ranked.rows:
        assert row["gain_low"] < EXACT[row["candidate"]] - EXACT["clone"] < row["gain_high"]
        assert row["value_low"] < row["value"] < row["value_high"]
    assert ranked.behaviour_value == pytest.approx(plain_returns(parts[1]).mean())
    assert ranked.behaviour_low < EXACT["clone"] < ranked.behaviour_high
    assert clone["bc_distance"] == 0
    assert clone["effective_episodes"] == pytest.approx(ranked.episodes, rel=1e-4)
    assert clone["importance_value"] == pytest.approx(ranked.behaviour_value, rel=1e-4)
    sound = [row for row in ranked.rows if row["effective_episodes"] >= 100]
    assert 2 < len(sound) < 6
    pairs = [[row[key] for row in sound] for key in ("value", "importance_value")]
    assert ranked.spearman == pytest.approx(stats.spearmanr(*pairs).statistic)
    assert ranked.kendall == pytest.approx(stats.kendalltau(*pairs).statistic)
    assert (ranked.discount, ranked.episodes) == (DISCOUNT, 800)


def test_gains_are_paired_and_intervals_hold_for_all_members_at_once(
    parts, candidates, fitted, ranked
):
    scores = fitted.episodes
    gains = scores.scores - plain_returns(parts[1])
    assert scores.behaviour_max_deviation == 0  # no episode was truncated
    limits = [gains.mean(1) + s * scores.max_score_deviation[:, 0] for s in (-1, 1)]
    low, high = mean_bounds(gains, *limits)
    alone = np.subtract(*mean_bounds(gains, *limits, together=False)[::-1])
    importance = importance_sampling(
        candidates, parts[1], behaviour="action_log_prob", discount=DISCOUNT,
        confidence=1 - 0.05 / 6, return_limits=scores.return_range,
    )  # fmt: skip
    for number, name in enumerate(fitted.names):
        row = row_of(ranked, name)
        assert row["gain"] == pytest.approx(gains[number].mean())
        assert row["gain_low"] == pytest.approx(low[number])
        assert row["gain_high"] == pytest.approx(high[number])
        width = row["gain_high"] - row["gain_low"]
        spread = 2 * stats.norm.ppf(1 - 0.025 / 6) * gains[number].std() / len(gains[0]) ** 0.5
        assert 0.7 * spread < width < 1.3 * spread
        assert width > alone[number]
        assert row["importance_value"] == importance.values[number]
        assert row["importance_low"] == importance.low[number]
        assert row["importance_high"] == importance.high[number]
    assert row_of(ranked, "p1")["value_low"] == fitted.intervals()[1, 0]


def test_no_better_member_no_recommendation(parts):
    worst = {"worst": actor(np.roll(GREEDY, 1, axis=1)), "log": actor(uniform())}
    result = rank_policies(worst, *parts, discount=DISCOUNT, bc_baseline="log")
    assert result.recommended is None
    text = "no candidate is reliably better than the behaviour policy (the highest estimate, log"
    assert text in result.recommendation
    assert "doubted" not in result.recommendation
    assert result.rows[0]["candidate"] == "log"


@pytest.mark.parametrize("kind", ["table", "network"])
def test_a_value_that_the_log_cannot_give_is_doubted(again, fitted, parts, kind):
    """Networks: outside every logged return. Tables: beyond the best reward at every step."""
    (low, high), fit = fitted.episodes.return_range, {"backups": 1e9, "passes": 1e9}
    if kind == "table":
        rewards = np.concatenate([p.transitions["next", "reward"].reshape(-1) for p in parts])
        low, high = (10 * float(r) for r in (rewards.min(), rewards.max()))  # 1 / (1 - 0.9)
        fit = {}
    own = fitted.values[fitted.names.index("p0")]
    for target, outside in (
        (high + 0.1, True), (high - 0.1, False), (low + 0.1, False), (low - 0.1, True)
    ):  # fmt: skip
        result = again(shifted(fitted, target - own, "p0"), fit)
        assert ("p0" in doubted(result, "range")) == outside
        text = f"p0: values are outside the range that the dataset allows, {low:.4g} to {high:.4g};"
        assert bool(warnings_with(result, text)) == outside
        assert not outside or result.recommended != "p0"


OF_GREEDY = ("effective_episodes", "unsupported", "worst_unsupported", "td_error")
ONES = np.ones(6)


@pytest.mark.parametrize(
    ("changes", "caveat", "recommended", "text"),
    [
        ({"effective_episodes": 20.0}, None, True, ""),
        ({"effective_episodes": 19.9}, "few", False, "19.9 effective episodes of 800, at least 20"),
        ({"unsupported": 0.049}, None, True, ""),
        ({"unsupported": 0.051}, "extrapolation", False, "greedy: 5% of the episodes of greedy"),
        ({"unsupported": 0.08, "behaviour_unsupported": 0.02}, "extrapolation", False, "policy's: 2%"),
        ({"unsupported": 0.08, "behaviour_unsupported": 0.04}, None, True, ""),
        ({"worst_unsupported": 0.499}, None, True, ""),
        ({"worst_unsupported": 0.501}, "extrapolation", False, "policy's: 0%), in a single state"),
        ({"td_error": 2.1, "td_error_training": ONES}, "td_error", True, "up to 2.1 times as"),
        ({"td_error": 1.9, "td_error_training": ONES}, None, True, ""),
        ({"history": {STEP: 4.6, "the step before": 1.0}}, None, False, f"on {STEP} (t statistic 4.6)"),
        ({"history": {STEP: -4.6}}, None, False, f"on {STEP} (t statistic -4.6)"),
        ({"history": {STEP: 4.4}}, None, True, ""),
        ({"backups": 3.0, "passes": 9.0}, None, False, "renewed its targets 3 times, in 9 passes"),
        ({"backups": 1e3, "passes": 0.5}, None, False, "use more updates, 2.0 times as many or more"),
        ({"backups": 1e3, "passes": 9.0}, None, True, ""),
        ({"uncovered_ends": 0.009}, None, True, ""),
        ({"uncovered_ends": 0.2}, None, True, "leave 20% of the discounted future in states that"),
    ],
)  # fmt: skip
def test_each_doubt_and_sentence(again, fitted, ranked, changes, caveat, recommended, text):
    scores, fit = {}, {}
    for key, value in changes.items():
        owner, changed = (fitted, fit) if hasattr(fitted, key) else (fitted.episodes, scores)
        greedy = np.array(fitted.names) == "greedy"
        changed[key] = np.where(greedy, value, getattr(owner, key)) if key in OF_GREEDY else value
    result = again(scores, fit)
    row = row_of(result, "greedy")
    assert set(row["caveats"]) - {"importance"} == ({caveat} - {None})
    assert (result.recommended == "greedy") == recommended
    more = [warning for warning in result.warnings if warning not in ranked.warnings]
    assert len(more) == bool(text)
    assert all(text in warning for warning in more)
    names = "correcting_episodes", "extrapolation", "worst_extrapolation", "td_error"
    for key, name in zip(OF_GREEDY, names, strict=True):
        assert key not in changes or row[name] == changes[key]
    assert result.behaviour_extrapolation == pytest.approx(changes.get("behaviour_unsupported", 0))


@pytest.mark.parametrize(
    ("lows", "blocked", "reason"),
    [
        ((1.0, -1.0), False, "; it has caveats, see the warnings)."),
        ((1.0, 0.5), False, "; all 2 with an interval above 0 have caveats, see the warnings)."),
        ((1.0, -1.0), True, "; a warning concerns all candidates, see the warnings)."),
        ((-0.5, -1.0), False, " -0.5 to 9)."),
    ],
)
def test_reasons_why_no_candidate_is_recommended(lows, blocked, reason):
    rows = [
        {"candidate": name, "rank": number, "gain": 4.0 - number, "gain_low": low, "gain_high": 9.0,
         "caveats": ("extrapolation",)}
        for number, (name, low) in enumerate(zip("ab", lows, strict=True), 1)
    ]  # fmt: skip
    chosen, sentence = recommendation(rows, blocked, 0.95)
    assert chosen is None
    assert "(the highest estimate, a, gains 3, 95% interval for all 2" in sentence
    assert sentence.endswith(reason)


def test_more_extrapolation_may_be_allowed(again):
    result = again({"unsupported": np.full(6, 0.08)}, max_extrapolation=0.1)
    assert result.recommended == "greedy"


def test_estimators_of_other_orders_and_a_clone_unlike_the_log_are_named(again, fitted, ranked):
    mirrored = 2 * fitted.values.mean() - fitted.episodes.scores
    result = again({"scores": mirrored, "scores_high": mirrored}, min_effective_episodes=0)
    assert result.spearman < 0
    assert warnings_with(result, f"differently (Spearman {result.spearman:.2f})")
    result = again(shifted(fitted, -2.0, *TABLES))
    (warning,) = warnings_with(result, "clone, trained by behaviour cloning, is estimated at ")
    assert f"is estimated at {row_of(result, 'clone')['value']:.4g}" in warning
    text = f"behaviour policy at {result.behaviour_value:.4g} ({result.behaviour_low:.4g} to"
    assert f"the {text}" in warning
    assert not warnings_with(ranked, "differently") + warnings_with(ranked, "behaviour cloning")


@pytest.mark.parametrize("by", [3.0, -40.0])
def test_no_recommendation_where_the_estimators_contradict_each_other(again, fitted, ranked, by):
    """About any candidate: the clone's scores far above, or below, what importance sampling says."""
    assert not warnings_with(ranked, "contradict")
    result = again(shifted(fitted, by, "clone"))
    row = row_of(result, "clone")
    assert "contradiction" in row["caveats"]
    assert result.recommended is None
    (warning,) = warnings_with(result, "contradict each other")
    assert f"(clone: {row['value_low']:.4g} to {row['value_high']:.4g} against" in warning
    if by > 0:
        assert row["gain_low"] > 0
        assert row["importance_high"] < row["value_low"]
        assert row["caveats"] == ("contradiction",)
        assert "; a warning concerns all candidates, see the warnings)." in result.recommendation


def test_no_recommendation_where_logged_probabilities_are_too_low(parts, candidates, fitted):
    rows = parts[1].transitions.clone()
    rows["action_log_prob"] = rows["action_log_prob"] - 0.5
    wrong = parts[0], replace(parts[1], transitions=rows)
    options = {"discount": DISCOUNT, "fitted_q": fitted, "bc_baseline": "clone"}
    result = rank_policies(candidates, *wrong, **options)
    assert "clone" in doubted(result, "propensities")
    assert warnings_with(result, "exact propensities give 1")
    for row in result.rows:
        assert row["importance_low"] < row["importance_high"]
    assert result.recommended is None


def test_the_best_that_is_not_doubted_is_recommended_and_three_are_named(again, fitted):
    shares = 0.5 * (np.array(fitted.names) == "greedy")
    result = again(shifted(fitted, 0.3, "p0") | {"unsupported": shares})
    assert list(column(result, "rank"))[:2] == ["greedy", "p0"]
    assert result.recommended == "p0"
    more = "; 1 with higher estimates have caveats or are uncertain)."
    assert result.recommendation.endswith(more)
    result = again({"unsupported": np.full(6, 0.5)})
    (warning,) = warnings_with(result, "rare or missing")
    first = ", ".join(list(column(result, "rank"))[:3])
    assert warning.startswith(f"{first} and 3 more: 50% of the episodes of")


def test_a_tenth_of_the_episodes_must_bear_the_weight(again):
    result = again(min_effective_episodes=0)
    sizes = column(result, "effective_episodes")
    few = {name for name, size in sizes.items() if size < 0.1 * result.episodes}
    assert doubted(result, "importance") == few != set()
    (warning,) = warnings_with(result, "importance weights")
    assert f"have only {min(sizes.values()):.1f} effective episodes of 800" in warning
    result = again(min_effective_episodes=sorted(sizes.values())[-2])
    assert math.isnan(result.spearman)  # two are left, and always in some order
    assert not warnings_with(result, "order the candidates differently")


def test_the_clone_is_the_first_of_temperature_zero():
    parts = load_dataset(small_columns(rows=120)).split(0.5, 0)
    agents = {"iql": box_agent(seed=1), "clone": box_agent(temperature=0.0)}
    how = {"hidden": (8,), "updates": 20, "batch_size": 16, "deterministic": False}
    fitted = fitted_q_evaluation(agents, *parts, discount=0.9, **how)
    options = {"discount": 0.9, "fitted_q": fitted, "behaviour": agents["clone"]}
    result = rank_policies(agents, *parts, **options)
    clone, iql = row_of(result, "clone"), row_of(result, "iql")
    assert clone["bc_distance"] == 0 < iql["bc_distance"]
    assert clone["effective_episodes"] == pytest.approx(6)
    assert clone["temperature"] == 0
    assert str(result) == str(rank_policies(agents, *parts, **options))


def test_without_behaviour_and_clone(parts):
    dataset = [
        replace(part, transitions=part.transitions.exclude("action_log_prob")) for part in parts
    ]
    policies = {"p0": actor(MIXED[0]), "greedy": actor(GREEDY)}
    result = rank_policies(policies, *dataset, discount=DISCOUNT)
    first = result.rows[0]
    assert np.isnan([first["importance_value"], first["bc_distance"], result.spearman]).all()
    assert warnings_with(result, "no behaviour model was given")
    assert " - " in str(result)
    assert result.recommended == "greedy"
    assert not any(row["caveats"] for row in result.rows)
    assert not any(row["exact"] for row in result.rows)


def test_truncated_returns_are_continued_without_a_clone():
    parts = WORLD.dataset(uniform(), episodes=1600, horizon=2).split(0.5, 0)
    policies = {"greedy": actor(GREEDY), "p0": actor(MIXED[0])}
    result = rank_policies(policies, *parts, discount=DISCOUNT)
    assert result.behaviour_value == pytest.approx(EXACT["clone"], abs=0.3)
    assert abs(plain_returns(parts[1]).mean() - EXACT["clone"]) > 0.3
    assert result.behaviour_low < EXACT["clone"] < result.behaviour_high
    assert result.recommended == "greedy"
    policies["c"] = actor(uniform())
    clone = rank_policies(policies, *parts, discount=DISCOUNT, bc_baseline="c")
    assert clone.behaviour_value == result.behaviour_value


def test_what_is_unknown_counts_against_members_and_for_the_log(again, fitted):
    """The least return in the lower bound of a gain, for the log the greatest, and vice versa."""
    scores, plain = fitted.episodes, again()
    behaviour = scores.behaviour_scores + 2.0
    wide = again({"scores_high": scores.scores + 1.0, "behaviour_scores_high": behaviour})
    for row in plain.rows:
        other = row_of(wide, row["candidate"])
        assert other["gain"] == row["gain"]
        assert row["gain_low"] - other["gain_low"] == pytest.approx(2.0, abs=0.1)
        assert other["gain_high"] - row["gain_high"] == pytest.approx(1.0, abs=0.1)
    assert wide.behaviour_high - plain.behaviour_high == pytest.approx(2.0, abs=0.1)


class Shipped:
    """What ``rank_policies`` reads of an agent: its policy, and its task's episodes."""

    def __init__(self, policy, trained_on):
        self.policy, self.task = actor(policy), make_agent(config(), trained_on).task


def test_members_trained_on_held_out_episodes_are_not_recommended(parts):
    own = WORLD.dataset(uniform(), episodes=300, seed=77)
    logs = {"held": parts[1], "fit": parts[0], "own": own}
    agents = {name: make_agent(config(), dataset) for name, dataset in logs.items()}
    agents |= {"greedy": actor(GREEDY), "shipped": Shipped(GREEDY, parts[1])}
    result = rank_policies(agents, *parts, discount=DISCOUNT)
    seen = column(result, "seen")
    assert min(seen["held"], seen["shipped"]) > 0.9
    assert [seen[name] for name in ("fit", "own", "greedy")] == [0, 0, 0]
    assert doubted(result, "seen") == {"held", "shipped"}
    (warning,) = warnings_with(result, "cannot test them")
    text = f": trained on up to {max(seen.values()):.0%} of the held-out episodes"
    assert warning.startswith((f"held, shipped{text}", f"shipped, held{text}"))
    assert warnings_with(result, "candidates were trained on up to 1")  # 100% of the fit
    clean = rank_policies({"own": agents["own"]}, *parts, discount=DISCOUNT)
    assert not warnings_with(clean, "trained on")
    alone = {"shipped": agents["shipped"], "clone": actor(uniform())}
    alone = rank_policies(alone, *parts, discount=DISCOUNT)
    assert row_of(alone, "shipped")["gain_low"] > 0
    assert row_of(alone, "shipped")["caveats"] == ("importance", "seen")
    assert alone.recommended is None


def test_no_recommendation_where_fit_and_held_out_share_episodes(parts, candidates):
    one, other = parts[0].split(0.5, 0)
    result = rank_policies(candidates, parts[0], other, discount=DISCOUNT)
    assert result.recommended is None
    (warning,) = warnings_with(result, "cannot show the error of the fit")
    assert "of the held-out episodes are also among those fitted on" in warning
    assert "dataset.split(fraction, seed)" in warning
    assert rank_policies(candidates, one, other, discount=DISCOUNT).recommended == "greedy"


@pytest.mark.parametrize("confidence", [0.5, 0.99])
def test_the_confidence_is_that_of_every_interval(again, ranked, confidence):
    result = again(confidence=confidence)
    for row in ranked.rows:
        other = row_of(result, row["candidate"])
        for key in ("value", "gain", "importance"):
            width, new = (r[f"{key}_high"] - r[f"{key}_low"] for r in (row, other))
            assert (new < width) == (confidence < 0.95)
    width, new = (r.behaviour_high - r.behaviour_low for r in (ranked, result))
    assert (new < width) == (confidence < 0.95)


def test_table_and_files(ranked, tmp_path):
    lines, order = str(ranked).splitlines(), list(column(ranked, "rank"))
    assert lines[0].split()[:2] == ["candidate", "value"]
    assert [line.split()[0] for line in lines[1:7]] == order
    assert lines[7].startswith("behaviour policy")
    assert lines[-1] == ranked.recommendation
    assert all(f"Warning: {warning}" in lines for warning in ranked.warnings)
    ranked.to_json(tmp_path / "ranking.json")
    read = json.loads((tmp_path / "ranking.json").read_text())
    first = read["rows"][0]
    assert (read["recommended"], first["candidate"]) == ("greedy", "greedy")
    assert (first["temperature"], first["td_error"]) == (None, None)
    assert first["gain_low"] == ranked.rows[0]["gain_low"]
    copy = Ranking.from_json(tmp_path / "ranking.json")
    assert (str(copy), repr(copy)) == (str(ranked), repr(ranked))
    ranked.to_csv(tmp_path / "ranking.csv")
    with (tmp_path / "ranking.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["candidate"] for row in rows] == order
    assert float(rows[0]["value"]) == ranked.rows[0]["value"]
    assert (rows[0]["temperature"], rows[0]["caveats"]) == ("", "importance")
    assert float(rows[0]["seen"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ranking.csv", "ranking.json"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bc_baseline": "x"}, r"bc_baseline is 'x'; expected one of the candidates \['p0'"),
        ({"discount": 0.5}, "fitted_q has"),
        ({"discount": -1}, "discount is -1"),
        ({"candidates": {"p0": actor(MIXED[0])}}, "fitted_q has"),
        ({"held_out": None}, "fitted_q has"),
        ({"confidence": 1.0}, "confidence is 1.0"),
        ({"confidence": 0}, "confidence is 0"),
        ({"max_extrapolation": -0.1}, "max_extrapolation is -0.1"),
    ],
)
def test_what_cannot_be_is_refused(parts, candidates, fitted, changed, message):
    given = {"candidates": candidates, "train": parts[0], "held_out": parts[1], "fitted_q": fitted}
    given |= {"discount": DISCOUNT} | changed
    given["held_out"] = given["held_out"] or parts[1].split(0.5, 0)[0]
    with pytest.raises(ValueError, match=message):
        rank_policies(**given)


@pytest.mark.parametrize(
    ("values", "checks", "expected"),
    [
        # 2 of 10 pairs are discordant, and squared differences of ranks sum to 4
        ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], (1 - 6 * 4 / 120, 0.6)),
        # one tie on one side: tau-b is 5 / sqrt(5 * 6); the ranks are 1.5, 1.5, 3, 4
        ([1, 1, 2, 3], [1, 2, 3, 4], (4.5 / math.sqrt(4.5 * 5), 5 / math.sqrt(30))),
        ([1, 1, 1], [1, 2, 3], (math.nan, math.nan)),
        ([1, 2, 3], [2, 2, 2], (math.nan, math.nan)),
        ([1, math.nan, 2], [1, 2, 3], (math.nan, math.nan)),
        ([1.0], [2.0], (math.nan, math.nan)),
        ([], [], (math.nan, math.nan)),
    ],
)
def test_rank_correlations_by_hand(values, checks, expected):
    assert rank_correlations(values, checks) == pytest.approx(expected, nan_ok=True)


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
        options |= {"updates": 600, "hidden": (32,), "model": "network", "batch_size": 256}
        return fitted_q_evaluation(*args, deterministic=deterministic, **options)

    monkeypatch.setattr(ranking, "fitted_q_evaluation", evaluate)
    return asked


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("num_samples", "clone"), [(1, True), (4, False)])
def test_the_best_of_several_actions_of_a_clone_is_no_clone(
    one_step_logs, quick, num_samples, clone
):
    options = {"policy": "flow", "temperature": 0.0, "num_samples": num_samples, "flow_steps": 2}
    config = IQLConfig(hidden=(8,), reward="raw", **options)
    candidates = {"flow": make_agent(config, one_step_logs[0])}
    result = rank_policies(candidates, *one_step_logs, discount=0.9, deterministic=True)
    assert math.isnan(result.rows[0]["bc_distance"]) is not clone


@pytest.mark.parametrize("kind", ["sampled", "deterministic", "without a density"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_both_estimators_evaluate_the_same_continuous_policies(one_step_logs, quick, kind):
    """E[-a**2] of N(m, s) is -(m**2 + s**2); of the deterministic action -m**2."""
    kinds = {"distribution": Delta} if kind == "without a density" else {}
    candidates = {"wide": normal_actor(0.0, 0.8), "right": normal_actor(0.5, 0.5, **kinds)}
    deterministic = True if kind == "deterministic" else None
    result = rank_policies(candidates, *one_step_logs, discount=0.9, deterministic=deterministic)
    assert quick == [kind != "sampled"]
    exact = {"wide": -0.64, "right": -0.5} if kind == "sampled" else {"wide": 0, "right": -0.25}
    assert column(result, "value") == pytest.approx(exact, abs=0.12)
    if kind == "sampled":
        assert column(result, "importance_value") == pytest.approx(exact, abs=0.12)
        assert not doubted(result, "contradiction")
    else:
        assert math.isnan(result.rows[0]["importance_value"])
    text = {
        "sampled": "as the candidates draw them",
        "deterministic": "deterministic continuous actions, which have no density",
        "without a density": "because right has no density of actions",
    }[kind]
    assert warnings_with(result, text)


class Towards(nn.Module):
    """The velocity of straight lines: to -0.8 where c is unknown, to 0 where it is 1."""

    def forward(self, joined):
        x, t, known, _ = joined[..., 1:].unbind(-1)
        return ((torch.where(known == 1, 0.0, -0.8) - x) / (1 - t)).unsqueeze(-1)


@pytest.mark.usefixtures("quick")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_values_of_w_are_ranked_without_retraining():
    """Reward -a**2: the conditioned flow is made to act at -0.8 (unknown) and at 0 (c = 1)."""
    draw = np.random.default_rng(0)
    observation, action = (draw.uniform(-1, 1, (1200, 1)).astype(np.float32) for _ in range(2))
    train, held_out = steps_log(
        1200, {"action_space": spaces.Box(-1.0, 1.0, (1,))}, observation=observation,
        next_observation=observation, action=action, reward=-(action[:, 0] ** 2),
    ).split(0.5, 0)  # fmt: skip
    agent = make_agent(IQLConfig(hidden=(8,), reward="raw", **CONDITIONED), train)
    agent.actor.head.mlp = Towards()
    members = {f"w = {w}": policies.guided(agent.policy, w) for w in (0.0, 0.5, 1.0)}
    result = rank_policies(members, train, held_out, discount=0.9, deterministic=True)
    expected = {"w = 0.0": -0.64, "w = 0.5": -0.16, "w = 1.0": 0}
    assert column(result, "value") == pytest.approx(expected, abs=0.12)
    critics = LossCritics(agent.loss)
    for w, member in zip((0.0, 0.5, 1.0), members.values(), strict=True):
        gap = value_gap(member, train.transitions, critics=critics, rows=64)
        action = torch.full((64, 1), -0.8 * (1 - w))
        order = torch.randperm(len(train.transitions), generator=torch.Generator().manual_seed(0))
        data = train.transitions[order[:64]].select("observation").set("action", action)
        np.testing.assert_allclose(gap.chosen, critics(data)["state_action_value"][:, 0], atol=1e-5)
