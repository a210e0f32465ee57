"""Goals of batches: where they come from, rewards, leaves, statistics, and how they are refused."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats
from small_logs import counted, pair, refused

from iql_torchrl import load_dataset
from iql_torchrl.data import DatasetError, GoalOrigins, build_shards
from iql_torchrl.data.goals import RAW

LENGTHS = (6, 4, 1, 2)


@pytest.fixture
def dataset():
    return load_dataset(counted(*LENGTHS, terminated=[0]))


def raw(share: float) -> int:
    return int(share * RAW)


def test_goals_and_rewards_by_hand():
    """Rows 0 to 3 observe (0, -0) to (3, -3) and row 4 (100, -100), the only one of its trajectory.

    The discount is 1/2: a future goal is 1 step ahead for numbers below 1/2, 2 below 3/4, and so on.
    """
    relabelled = load_dataset(counted(4, 1, terminated=[0, 1])).relabelled(discount=0.5)
    sampler = relabelled.device_sampler(1)
    cases = [  # row, origin, choice: row of the goal
        (1, 0.10, 0.90, 1),  # current
        (0, 0.30, 0.40, 1), (0, 0.30, 0.60, 2), (0, 0.60, 0.80, 3),  # future
        (0, 0.69, 0.95, 3), (2, 0.21, 0.99, 3), (3, 0.50, 0.10, 3),  # cut off at the end
        (4, 0.50, 0.10, 4),
    ]  # fmt: skip
    rows, origins, choices, expected = zip(*cases, strict=True)
    random = [(2, 0.71, 4), (0, 0.99, 0)]  # row, origin, row of the goal, as the number modulo 5
    rows += tuple(row for row, _, _ in random)
    expected += tuple(goal for _, _, goal in random)
    origins = [raw(x) for x in (*origins, *(x for _, x, _ in random))]
    choices = [*map(raw, choices), *(5 * 10**9 + goal for _, _, goal in random)]
    uniform = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]  # of the policy, modulo the rows ahead
    indices = torch.tensor([rows, origins, choices, [0] * 10, uniform])
    actor = [2, 2, 3, 1, 2, 3, 3, 4, 3, 1]
    batch = sampler.gather(indices)
    state = torch.tensor([0.0, 1, 2, 3, 100])
    goals = torch.stack([state, -state], 1)
    assert batch.batch_size == (10,)
    for side in (batch, batch["next"]):
        assert torch.equal(side["observation", "goal"], goals[list(expected)])
    assert torch.equal(batch["observation", "observation"], goals[list(rows)])
    for side in (batch["for_actor"], batch["for_actor", "next"]):
        assert torch.equal(side["observation", "goal"], goals[actor])
    at_goal = [row == goal for row, goal in zip(rows, expected, strict=True)]
    assert at_goal == [True, *[False] * 5, True, True, False, True]
    assert batch["next", "terminated"].flatten().tolist() == at_goal
    assert batch["next", "reward"].flatten().tolist() == [0.0 if at else -1.0 for at in at_goal]
    assert not batch["next", "truncated"].any()  # both trajectories terminate, which is not read
    assert torch.equal(batch["next", "done"], batch["next", "terminated"])


def pmf(origin: GoalOrigins, row: int, end: int, count: int) -> list[float]:
    """Probabilities of the goal's row, by the sums of the definition."""
    chances = [origin.random / count] * count
    chances[row] += origin.current
    ahead = end - row
    if ahead == 0:
        chances[row] += origin.future
    elif origin.discount is None:
        for step in range(1, ahead + 1):
            chances[row + step] += origin.future / ahead
    else:
        left = 1.0
        for step in range(1, ahead):
            chance = (1 - origin.discount) * origin.discount ** (step - 1)
            chances[row + step] += origin.future * chance
            left -= chance
        chances[end] += origin.future * left
    return chances


@pytest.mark.parametrize("discount", [0.7, 0.0, None])
def test_goals_have_the_distribution_of_the_definition(dataset, discount):
    """Chi-square of 10^5 pairs of row and goal; two lists of goals are independent."""
    values, actor = GoalOrigins(0.2, 0.5, 0.3, discount), GoalOrigins(0.1, 0.85, 0.05, 0.9)
    sampler = dataset.relabelled(discount=discount, actor=actor).device_sampler(100_000, seed=1)
    indices, rows = sampler.indices(), len(dataset)
    chosen = sampler.goal_rows(indices)
    ends = np.repeat(np.cumsum(LENGTHS) - 1, LENGTHS)
    assert torch.equal(sampler.last, torch.as_tensor(ends))
    for goals, origin in zip(chosen, (values, actor), strict=True):
        expected = np.array([pmf(origin, row, ends[row], rows) for row in range(rows)]) / rows
        np.testing.assert_allclose(expected.sum(), 1)
        counts = np.zeros((rows, rows))
        np.add.at(counts, (indices[0].numpy(), goals.numpy()), 1)
        assert stats.chisquare(counts.ravel(), expected.ravel() * 1e5).pvalue > 1e-3
    indices[0] = 0
    both = np.zeros((rows, rows))
    np.add.at(both, tuple(goals.numpy() for goals in sampler.goal_rows(indices)), 1)
    assert stats.chi2_contingency(both).pvalue > 1e-3  # independent


def test_a_batch_is_a_function_of_its_indices_and_of_the_generator(dataset):
    relabelled = dataset.relabelled()
    first, second = (relabelled.replay_buffer(16, seed=5) for _ in range(2))
    out = torch.zeros(second.index_shape(16), dtype=torch.int64)
    for _ in range(3):
        assert (first.sample() == second.gather(second.draw(out))).all()
    first.load_state_dict(second.state_dict())
    assert (first.sample(4) == second.sample(4)).all()
    shared = dataset.relabelled(actor=None).device_sampler(16, seed=5)
    assert shared.index_shape(16) == (3, 16)
    assert "for_actor" not in shared.sample()


def test_nothing_is_stored_twice(dataset):
    plain, sampler = dataset.device_sampler(4), dataset.relabelled().device_sampler(4)
    more = sum(t.nbytes for t in sampler.tables) - sum(t.nbytes for t in plain.tables)
    assert more == 8 * len(dataset)  # the ends of the trajectories


# -- what a goal is


def leaves(steps):
    return {
        "achieved_goal": pair(steps)[:, :1] + 0.5,
        "cell": steps.astype(np.int64) % 5,
        "desired_goal": np.full((len(steps), 1), 7, np.float32),
        "observation": pair(steps),
    }


@pytest.fixture
def mixed():
    return load_dataset(counted(6, 4, 1, observe=leaves))


def test_a_leaf_is_the_goal(mixed):
    """By default that of gymnasium-robotics, in whose place the goal is."""
    relabelled = mixed.relabelled()
    assert relabelled.relabelling.name == "desired_goal"
    assert relabelled.observation_space == mixed.observation_space
    batch = relabelled.device_sampler(64, seed=0).sample()
    names = {"achieved_goal", "cell", "desired_goal", "observation"}
    assert set(batch["observation"].keys()) == names
    goal, achieved = batch["observation", "desired_goal"], batch["observation", "achieved_goal"]
    assert set(goal.flatten().tolist()) <= set(
        mixed.transitions["observation", "achieved_goal"].flatten().tolist()
    )
    assert torch.equal(batch["next", "terminated"], goal == achieved)
    assert torch.equal(batch["next", "reward"], (goal == achieved).float() - 1)
    before, after = mixed.statistics, relabelled.statistics
    assert after["observation", "desired_goal"] == before["observation", "achieved_goal"]
    assert {*after} == {*before}
    cell = mixed.relabelled("cell", rewards=(1, 0))
    assert cell.observation_space["goal"] == mixed.observation_space["cell"]
    sampler = cell.device_sampler(64, seed=0)
    batch = sampler.sample()
    same = batch["observation", "goal"] == batch["observation", "cell"]
    assert torch.equal(batch["next", "reward"].squeeze(1), same.float())
    assert torch.equal(
        sampler.column(("observation", "goal")), mixed.transitions["observation", "cell"]
    )
    assert torch.equal(
        sampler.column(("next", "observation", "cell")),
        mixed.transitions["next", "observation", "cell"],
    )


def test_places_of_a_vector_and_functions_are_goals(dataset):
    places = dataset.relabelled([1])
    space = places.observation_space["goal"]
    assert space.shape == (1,)
    batch = places.device_sampler(64, seed=0).sample()
    assert batch["observation", "goal"].shape == (64, 1)
    assert bool((batch["observation", "goal"] <= 0).all())
    statistics = dataset.statistics["observation"]
    goal_statistics = places.statistics["observation", "goal"]
    assert torch.equal(goal_statistics.mean, statistics.mean[1:])
    assert torch.equal(goal_statistics.std, statistics.std[1:])
    assert torch.equal(places.statistics["observation", "observation"].mean, statistics.mean)

    def negated(observation):
        return -observation[:, 1:]

    function = dataset.relabelled(negated, reached=2.0)
    batch = function.device_sampler(256, seed=0).sample()
    goal, here = batch["observation", "goal"], batch["observation", "observation"][:, :1]
    assert torch.equal(batch["next", "terminated"], (goal - here).abs() <= 2)
    goal_statistics = function.statistics["observation", "goal"]
    torch.testing.assert_close(goal_statistics.mean, statistics.mean[:1])
    torch.testing.assert_close(goal_statistics.std, statistics.std[:1])
    batch = dataset.relabelled(reached=lambda one, other: one[:, 0] > other[:, 0])
    batch = batch.device_sampler(256, seed=0).sample()
    above = batch["observation", "observation"][:, 0] > batch["observation", "goal"][:, 0]
    assert torch.equal(batch["next", "terminated"].squeeze(1), above)


def test_the_goal_is_repeated_in_windows(mixed):
    plain = mixed.relabelled("achieved_goal").device_sampler(32, seed=4)
    indices = plain.indices()
    batch = plain.gather(indices)
    for stack, shape in ((False, (32, 3, 1)), (True, (32, 3))):
        windows = mixed.relabelled("achieved_goal").windows(3, stack=stack)
        sampler = windows.replay_buffer(32, "cpu", 4)
        window = sampler.gather(indices)
        assert torch.equal(window["next", "reward"], batch["next", "reward"])
        for side in ((), ("next",), ("for_actor",)):
            key = (*side, "observation", "goal")
            assert window[key].shape == shape
            expected = batch[key].unsqueeze(1).expand(32, 3, 1)
            assert torch.equal(window[key].reshape(32, 3, 1), expected)


def test_the_dataset_describes_its_batches(dataset):
    relabelled = dataset.relabelled()
    assert len(relabelled) == len(dataset)
    assert "Dict of 'goal', 'observation'" in str(relabelled)
    assert np.isnan(relabelled.episode_returns).all()
    low, high = relabelled.range_of(("next", "observation", "observation"))
    assert (low, high) == (-302.0, 302.0)
    assert relabelled.range_of(("observation", "goal")) == (-301.0, 301.0)
    prints = [
        each.fingerprint()["goals"]
        for each in (
            relabelled,
            dataset.relabelled(current=0.3, future=0.4),
            dataset.relabelled(reached=1.0),
        )
    ]
    assert all(one != other for one, other in itertools.combinations(prints, 2))
    assert prints[0] == load_dataset(counted(*LENGTHS)).relabelled().fingerprint()["goals"]


def test_a_dataset_without_rewards_can_be_relabelled():
    rows = counted(3, 2)
    del rows["reward"]
    refused("no column for reward |columns={'reward': None}", rows)
    data = load_dataset(rows, columns={"reward": None})
    assert not data.transitions["next", "reward"].any()
    assert data.relabelled().device_sampler(8).sample()["next", "reward"].shape == (8, 1)


def test_wrong_goals_are_refused(dataset, mixed, tmp_path):
    for wrong in ("place", "observation.x", [2], [], [-1], 0, slice(0, 2)):
        refused("goal is |places of a vector such as [0, 1]", wrong, dataset.relabelled)
    refused("goal is 'missing', and the observations are Dict of", "missing", mixed.relabelled)
    refused("gives torch.int64 (2,); expected floats", lambda o: o["cell"], mixed.relabelled)
    with pytest.raises(DatasetError, match=r"'observation' is Box .* already, and the goals are"):
        dataset.relabelled(name="observation")
    words = "'cell' is Discrete|choose another name="
    refused(words, "achieved_goal", mixed.relabelled, name="cell")
    with pytest.raises(
        ValueError, match=r"\(0.5, 0.5, 0.3\); expected probabilities whose sum is 1"
    ):
        dataset.relabelled(current=0.5)
    with pytest.raises(ValueError, match=r"discount is 1\.0; expected None or a number in"):
        dataset.relabelled(discount=1.0)
    for wrong in (-1.0, float("nan")):
        with pytest.raises(ValueError, match=r"reached is .*; expected None, a distance"):
            dataset.relabelled(reached=wrong)
    with pytest.raises(
        DatasetError, match=r"goals are drawn for batches.*\.dataset for the transitions"
    ):
        _ = dataset.relabelled().transitions
    shards = build_shards(counted(3, 2), tmp_path / "shards", 2)
    with pytest.raises(AttributeError, match="relabelled needs all transitions at once"):
        shards.relabelled()


def test_chunks_of_a_dataset_with_goals_are_refused(dataset):
    refused("chunks of 3 actions | Choose action_chunk=1", 3, dataset.relabelled().chunks)
