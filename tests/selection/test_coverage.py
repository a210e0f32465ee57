"""States and actions outside a log against a k-d tree, distances to the clone by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree
from small_agents import small_columns
from small_mdp import STATES, actor, policy_of, random_mdp, uniform

from iql_torchrl import load_dataset
from iql_torchrl.selection.candidates import bc_distance, resolve_candidate
from iql_torchrl.selection.coverage import Coverage, features_of


def limit_of(scores):
    """The smallest score that at least 99 % of ``scores`` do not exceed."""
    return np.sort(scores)[min(int(0.99 * len(scores)), len(scores) - 1)]


def box_parts(rows=400):
    draw = np.random.default_rng(0)
    observation = draw.normal(size=(rows, 2)).astype(np.float32) * np.array([1, 20], np.float32)
    noise = 0.05 * draw.normal(size=(rows, 2))
    action = (0.3 * np.tanh(observation) + noise).astype(np.float32)
    return load_dataset(small_columns(rows, observation=observation, action=action)).split(0.5, 0)


def scaled(dataset, rows):
    return rows["observation"].numpy() / dataset.statistics["observation"].std.numpy()


def test_states_against_a_tree():
    train, held_out = box_parts()
    coverage = Coverage(train, held_out)
    tree = cKDTree(scaled(train, train.transitions))
    limit = limit_of(tree.query(scaled(train, held_out.transitions))[0])
    probes = held_out.transitions.clone()
    probes["observation"] = probes["observation"] * torch.linspace(0, 4, len(probes))[:, None]
    outside = tree.query(scaled(train, probes))[0] > limit
    assert 0.1 < outside.mean() < 0.9
    features = features_of(train, probes)
    np.testing.assert_array_equal(coverage.unsupported_states(features).numpy(), outside)
    probes["next", "observation"] = probes["observation"].clone()
    probes["observation"] = held_out.transitions["observation"]
    assert torch.equal(features_of(train, probes, following=True), features)
    own = coverage.unsupported_states(features_of(train, held_out.transitions)).float().mean()
    assert own <= 0.01


@pytest.mark.parametrize("neighbours", [1, 10])
def test_continuous_actions_against_a_tree(neighbours):
    train, held_out = box_parts()
    coverage = Coverage(train, held_out, neighbours=neighbours)
    spread = train.transitions["action"].numpy().std(0)
    tree = cKDTree(scaled(train, train.transitions))
    _, nearest = tree.query(scaled(train, held_out.transitions), k=[*range(1, neighbours + 1)])
    logged = train.transitions["action"].numpy()[nearest] / spread

    def gap(chosen):
        return np.linalg.norm(logged - (chosen / spread)[:, None], axis=-1).min(1)

    limit = limit_of(gap(held_out.transitions["action"].numpy()))
    state, features = held_out.transitions["observation"], features_of(train, held_out.transitions)
    choices = torch.stack([gain * state.tanh() for gain in (0.3, -0.4, -0.9)])
    expected = np.array([gap(choice.numpy()) > limit for choice in choices])
    shares = coverage.unsupported_choices(features, choices[:, :, None])
    np.testing.assert_array_equal(shares.numpy(), expected)
    assert expected[0].mean() < 0.05 < expected[1].mean()
    assert expected[2].mean() > 0.5
    both = torch.stack([choices[0], choices[2]], 1)[None]  # two draws in each state
    share = coverage.unsupported_choices(features, both)
    np.testing.assert_allclose(share[0].numpy(), (expected[0] + 1.0 * expected[2]) / 2)


@pytest.mark.parametrize("count", [1, 3])
def test_discrete_actions_against_a_tree_for_each_action(count):
    draw = np.random.default_rng(1)
    observation = draw.normal(size=(600, 2)).astype(np.float32)
    # action 2 is taken on the right side only, action 3 hardly ever
    right = np.where(observation[:, 0] > 0.5, 2, draw.integers(2, size=600))
    action = np.where(np.arange(600) == 7, 3, right)
    dataset = load_dataset(small_columns(600, observation=observation, action=action))
    train, held_out = dataset.split(0.5, 0)
    coverage = Coverage(train, held_out, min_count=count)
    points, taken = scaled(train, train.transitions), train.transitions["action"].numpy()
    queries = scaled(train, held_out.transitions)
    distances = np.full((len(queries), 4), np.inf)
    for number in range(4):
        if (taken == number).sum() >= count:
            tree = cKDTree(points[taken == number])
            distances[:, number] = tree.query(queries, k=[count])[0][:, 0]
    logged = held_out.transitions["action"].numpy()
    limit = limit_of(distances[np.arange(len(queries)), logged])
    rare = distances > limit
    probabilities = draw.dirichlet(np.ones(4), (2, len(queries)))
    features = features_of(train, held_out.transitions)
    result = coverage.unsupported_choices(features, torch.as_tensor(probabilities).float())
    np.testing.assert_allclose(result.numpy(), (probabilities * rare).sum(-1), atol=1e-5)
    left = queries[:, 0] < 0
    assert rare[left, 2].mean() > 0.5
    assert rare[:, 3].mean() > 0.5


def test_an_action_that_the_fit_lacks_is_unsupported_even_if_held_out_steps_took_it():
    """Then logged steps themselves have infinite scores, which say nothing of what is usual."""
    draw = np.random.default_rng(2)
    observation = draw.normal(size=(60, 2)).astype(np.float32)
    train = load_dataset(small_columns(60, observation=observation, action=np.arange(60) % 3))
    rows = train.transitions.clone()
    rows["action"] = rows["action"] % 2
    lacking = replace(train, transitions=rows)
    never = torch.tensor([0.0, 0.0, 1.0]).expand(1, 60, 3)
    features = features_of(train, train.transitions)
    for count in (2, 100):  # with 100 rows at least, every action is one that the fit lacks
        share = Coverage(lacking, train, min_count=count).unsupported_choices(features, never)
        assert share.mean() == 1


def test_large_logs_are_sampled():
    train, held_out = box_parts(4000)
    coverage = Coverage(train, held_out, logged=300, queries=200, seed=3)
    assert coverage.features.shape == (300, 2)
    again = Coverage(train, held_out, logged=300, queries=200, seed=3)
    assert torch.equal(coverage.features, again.features)
    assert coverage.state_limit == again.state_limit
    assert not torch.equal(coverage.features, Coverage(train, held_out, logged=300).features)
    features = features_of(train, held_out.transitions)
    fresh = coverage.unsupported_states(features).float().mean()
    assert fresh < 0.03


def test_categories_are_known_or_unknown():
    dataset = random_mdp().dataset(uniform(), episodes=200)
    features = features_of(dataset, dataset.transitions)
    assert not Coverage(dataset, dataset).unsupported_states(features).any()
    rows = dataset.transitions[dataset.transitions["observation"] != 4]
    fewer = replace(dataset, transitions=rows)
    outside = Coverage(fewer, fewer).unsupported_states(features)
    np.testing.assert_array_equal(outside.numpy(), dataset.transitions["observation"].numpy() == 4)


def named(policy):
    return resolve_candidate("m", policy)


def test_distance_to_a_clone_of_discrete_actions():
    dataset = random_mdp().dataset(uniform(), episodes=50)
    probabilities = [0.5, 0.49, 0.01], [0.1, 0.2, 0.7], [0.5, 0.5, 0.0]
    clone, other, zero = (named(actor(np.tile(p, (STATES, 1)))) for p in probabilities)
    assert bc_distance(other, zero, dataset) == math.inf
    expected = 0.5 * math.log(0.5 / 0.1) + 0.49 * math.log(0.49 / 0.2) + 0.01 * math.log(0.01 / 0.7)
    assert bc_distance(clone, other, dataset) == pytest.approx(expected, rel=1e-4)
    expected = 0.5 * math.log(0.5 / 0.1) + 0.5 * math.log(0.5 / 0.2)
    assert bc_distance(zero, other, dataset) == pytest.approx(expected, rel=1e-4)
    assert bc_distance(clone, clone, dataset) == 0


def test_distance_to_a_clone_of_continuous_actions():
    dataset = box_parts()[1]
    pair = (policy_of(lambda x, gain=gain: gain * x.tanh()) for gain in (0.3, -0.9))
    gaps = (1.2 * np.tanh(dataset.transitions["observation"].numpy())) ** 2
    distance = bc_distance(*map(named, pair), dataset)
    assert distance == pytest.approx(gaps.sum(1).mean(), rel=1e-4)
