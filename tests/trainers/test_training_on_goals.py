"""Training and evaluation with goals: losses, values and success in a maze, resuming, populations."""

from copy import deepcopy
from dataclasses import replace
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from goal_maze import LARGE, SMALL, Maze, walks
from scipy import stats
from small_agents import Walk, config, small_columns
from tensordict import TensorDict
from tensordict.nn import TensorDictModule

from iql_torchrl import (
    IQLConfig,
    IQLPopulation,
    OfflineTrainer,
    captured,
    compiled,
    evaluate,
    load_dataset,
    make_agent,
)
from iql_torchrl.data import GoalEnv, GoalOrigins
from iql_torchrl.files import CheckpointError


@pytest.fixture(scope="module")
def dataset():
    return walks(SMALL, episodes=40, steps=25)


def vectors():
    return load_dataset(small_columns(60), columns={"reward": None})


# -- the losses


@pytest.mark.parametrize(
    "settings", [{}, {"actor_objective": "ddpg_bc"}, {"order": "simultaneous"}]
)
def test_the_policys_loss_reads_its_own_goals_and_the_others_do_not(settings):
    """The losses of a batch with two goals are those of two batches with one goal each."""
    data = vectors().relabelled([0, 1])
    loss = make_agent(config(**settings), data).loss
    batch = data.device_sampler(32, seed=1).sample()
    of_values = batch.exclude("for_actor")
    of_actor = of_values.clone()
    of_actor["observation", "goal"] = batch["for_actor", "observation", "goal"]
    both, one, other = (loss(each.clone()) for each in (batch, of_values, of_actor))
    for name in ("loss_value", "loss_qvalue", "td_error_mean"):
        assert torch.equal(both[name], one[name])
    for name in ("loss_actor", "advantage_mean", "weight_mean"):
        torch.testing.assert_close(both[name], other[name])
    assert not torch.allclose(both["loss_actor"], one["loss_actor"])
    alone, _ = loss.actor_loss(batch.clone())
    torch.testing.assert_close(alone, other["loss_actor"])


def weights(agent):
    return list(agent.loss.state_dict().values())


@pytest.mark.slow
@pytest.mark.parametrize("form", ["compiled", "captured"])
@pytest.mark.parametrize("history", [1, 3])
def test_programs_draw_and_compute_what_the_plain_step_does(form, history):
    data = load_dataset(vectors().transitions, dtype=torch.float64).relabelled([0, 1])
    settings = config(history=history, updates=12)
    first, second = make_agent(settings, data), make_agent(settings, data)
    source = data if history == 1 else data.windows(3)
    one, two = (source.device_sampler(16, seed=3) for _ in range(2))
    for _ in range(12):
        first.step(one.sample())
    if form == "compiled":
        step = compiled(second.step)
        for _ in range(12):
            step(two.sample())
    else:
        call = captured(second.step, two, updates=4)
        for _ in range(3):
            call()
    for mine, other in zip(weights(first), weights(second), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-10)
    assert (one.sample() == two.sample()).all()


# -- runs


def run(data, total, **settings):
    agent = make_agent(config(updates=12, seed=2), data)
    return OfflineTrainer(
        agent=agent, dataset=data, total_updates=total, progress_bar=False, **settings
    )


def test_a_loaded_run_has_the_bits_of_one_without_interruption(dataset):
    data = dataset.relabelled(discount=0.9)
    alone, stopped, again = run(data, 12), run(data, 5), run(data, 12)
    alone.train()
    stopped.train()
    state = deepcopy(stopped.state_dict())
    again.load_state_dict(state)
    again.train()
    assert all(map(torch.equal, weights(alone.agent), weights(again.agent)))
    with pytest.raises(
        CheckpointError, match="goals of the dataset was 'goal of None, GoalOrigins"
    ):
        run(dataset.relabelled(discount=0.8), 12).load_state_dict(state)


def test_curves_have_no_line_of_the_logs_return(dataset, tmp_path):
    trainer = run(dataset.relabelled(), 4, folder=tmp_path / "run")
    trainer.train()
    assert (tmp_path / "run" / "curves.png").is_file()
    assert trainer.data_state["reward_map"] == [1.0, 0.0]


def test_an_agent_with_a_history_trains_and_acts():
    data = vectors().relabelled([0, 1])
    data = replace(
        data, env=partial(GoalEnv, still(), data.relabelling, data.observation_space["goal"])
    )
    agent = make_agent(config(history=2, history_encoder="stack", updates=2), data)
    OfflineTrainer(agent=agent, dataset=data, progress_bar=False).train()
    goals = [{"goal": [0.0, 1.0]}]
    assert evaluate(agent.policy, data.make_env, episodes=1, seed=0, goals=goals).lengths == [3]


def still(kind=Walk):
    """Observes zeros for three steps."""
    seen, actions = gym.spaces.Box(-np.inf, np.inf, (3,)), gym.spaces.Box(-1, 1, (2,))
    return kind(seen, actions, lambda step: np.zeros(3, np.float32), lambda *_: 5.0, steps=3)


def test_runs_of_a_population_are_those_trained_alone():
    data = vectors().relabelled([0, 1])
    configs = [config(seed=seed, updates=6) for seed in (0, 1)]
    population = IQLPopulation(configs, data)
    population.train_now()
    sampler, alone = data.device_sampler(16, seed=0), make_agent(configs[1], data)
    for _ in range(6):
        alone.step(sampler.sample())
    for mine, other in zip(weights(population.member(1)), weights(alone), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="batches is 'own' and the dataset has goals"):
        IQLPopulation(configs, data, batches="own")


# -- evaluation


def test_success_of_each_goal_by_hand():
    """Cells of a corridor: from 0 always to the right, so 3 steps to cell 3, and none to cell 0."""
    data = walks(("....",), 3, 5).relabelled()
    right = TensorDictModule(
        lambda state: torch.full_like(state, 2),
        in_keys=[("observation", "observation")],
        out_keys=["action"],
    )
    goals = [{"goal": 3, "start": 0}, {"goal": 0, "start": 1}]
    result = evaluate(right, data.make_env, episodes=5, seed=0, goals=goals, max_steps=6)
    assert result.goals.tolist() == [0, 1, 0, 1, 0]
    assert result.lengths.tolist() == [3, 6, 3, 6, 3]
    assert result.returns.tolist() == [-2, -6, -2, -6, -2]
    assert result.goal_success_rates.tolist() == [1.0, 0.0]
    summary = result.summary()
    assert summary["success_rate"] == 0.6
    assert (summary["success_rate_goal_0"], summary["success_rate_goal_1"]) == (1.0, 0.0)
    wrong = ([], [3], {"goal": 3}, [{"goal": 0}] * 6)
    for each in wrong:
        with pytest.raises(ValueError, match="goals must be a list of 1 to 5 dicts"):
            evaluate(right, data.make_env, episodes=5, seed=0, goals=each)
    with pytest.raises(ValueError, match=r"goal is None; expected one of .*goals=\[{'goal': goal}"):
        evaluate(right, data.make_env, episodes=1, seed=0)
    with pytest.raises(ValueError, match=r"goal is \[3\]; expected one of Discrete"):
        evaluate(right, data.make_env, episodes=1, seed=0, goals=[{"goal": [3]}])
    plain = partial(Maze, ("....",))
    whole = TensorDictModule(
        lambda state: torch.full_like(state, 2), in_keys=["observation"], out_keys=["action"]
    )
    result = evaluate(whole, plain, episodes=1, seed=0, max_steps=2)
    with pytest.raises(ValueError, match="without goals="):
        _ = result.goal_success_rates


class Reporting(Walk):
    """As OGBench: ``info`` has an observation of the goal, and success."""

    def reset(self, *, seed=None, options=None):
        first, _ = super().reset(seed=seed)
        return first, {"goal": np.full(3, float(options["task_id"]), np.float32)}

    def step(self, action):
        *rest, _ = super().step(action)
        return *rest, {"success": float(self.number == 2)}


def test_goals_and_success_of_the_environment_itself():
    data = vectors().relabelled([0, 1], rewards=(1, 0))
    env = GoalEnv(still(Reporting), data.relabelling, data.observation_space["goal"])
    observation, _ = env.reset(options={"task_id": 4})
    assert observation["goal"].tolist() == [4, 4]
    assert env.observation_space.contains(observation)
    steps = [env.step(env.action_space.sample())[1:4] for _ in range(2)]
    assert steps == [(0.0, False, False), (1.0, True, False)]


# -- values and policies in a maze


def learned(dataset, goals=None, **settings):
    base = IQLConfig(
        batch_size=256, hidden=(64, 64), critic_lr=3e-3, value_lr=3e-3, actor_lr=3e-3,
        discount=0.9, expectile=0.95, temperature=20.0, polyak=0.05, reward="raw", seed=1,
    )  # fmt: skip
    settings = replace(base, **settings)
    data = dataset.relabelled(discount=settings.discount, **(goals or {}))
    agent = make_agent(settings, data)
    OfflineTrainer(agent=agent, dataset=data, progress_bar=False).train()
    return agent, data


def check_maze(agent, data, maze):
    """Spearman's correlation of V with exact values, for all pairs and the lowest of one goal.

    Also the share of pairs that the greedy actions of Q solve, and an evaluation of the policy.
    """
    steps = maze.distances()
    count, most = len(steps), 2 * int(steps.max())
    start, goal = (torch.as_tensor(each.ravel()) for each in np.indices((count, count)))
    batch = data.device_sampler(count**2).sample().exclude("for_actor")
    for side in (batch, batch["next"]):
        side["observation"] = TensorDict({"observation": start, "goal": goal}, [count**2])
    loss, of_actions = agent.loss, []
    with torch.no_grad():
        value = loss.state_value(loss.prepare_batch(batch)).view(count, count)
        for action in range(4):
            batch["action"] = torch.full_like(start, action)
            of_actions.append(loss.target_qvalue(loss.prepare_batch(batch)))
    greedy = torch.stack(of_actions).argmax(0).view(count, count)
    solved = 0
    for state, goal in np.ndindex(count, count):
        for _ in range(most):
            state = state if state == goal else maze.after(state, int(greedy[state, goal]))
        solved += state == goal
    gamma = agent.config.discount
    exact = -(1 - gamma**steps) / (1 - gamma)
    ranks = [stats.spearmanr(value[:, g], exact[:, g]).statistic for g in range(count)]
    goals = [{"start": s, "goal": g} for s in range(count) for g in range(count) if s != g]
    result = evaluate(
        agent.policy, data.make_env, episodes=len(goals), num_envs=64, seed=0, goals=goals,
        max_steps=most,
    )  # fmt: skip
    overall = stats.spearmanr(value.flatten(), exact.ravel()).statistic
    return overall, min(ranks), solved / count**2, result.goal_success_rates.mean()


def test_values_order_the_cells_and_the_greedy_policy_reaches_every_goal(dataset):
    agent, data = learned(
        dataset, updates=400, batch_size=64, critic_lr=5e-3, value_lr=5e-3, polyak=0.1
    )
    spearman, worst, greedy, _ = check_maze(agent, data, Maze(SMALL))
    assert spearman > 0.98
    assert worst > 0.9
    assert greedy == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_values_and_policy_in_a_larger_maze(seed):
    """Distant pairs need random goals, a discount that is not small, and width: docs/goals.md."""
    goals = {"current": 0.1, "future": 0.3, "random": 0.6}
    agent, data = learned(
        walks(LARGE, episodes=300, steps=60, seed=seed),
        {**goals, "actor": GoalOrigins(0.0, 0.5, 0.5, discount=None)},
        updates=6000, hidden=(128, 128), discount=0.95, schedule="cosine", seed=seed,
    )  # fmt: skip
    spearman, worst, greedy, learned_policy = check_maze(agent, data, Maze(LARGE))
    assert spearman > 0.98
    assert worst > 0.98
    assert greedy > 0.99
    assert learned_policy == 1.0
