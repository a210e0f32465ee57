"""``make_hopper.py``, ``plain_population.py`` and ``bench_hopper.py``, at small size."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import nn

from iql_torchrl import IQLConfig, load_dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import bench_hopper
import make_hopper
import plain_population

WIDTH = 8


def rows(count: int = 50) -> TensorDict:
    generator = torch.Generator().manual_seed(1)
    following = {
        "observation": torch.randn(count, 3, generator=generator),
        "reward": torch.randn(count, 1, generator=generator),
        "terminated": torch.rand(count, 1, generator=generator) < 0.3,
    }
    observation = 5 + 2 * torch.randn(count, 3, generator=generator)
    action = 2 * torch.rand(count, 2, generator=generator) - 1
    data = {"observation": observation, "action": action, "next": following}
    return TensorDict(data, [count])


def net(inputs: int, outputs: int) -> nn.Sequential:
    hidden = [nn.Linear(inputs, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(WIDTH, outputs))


def train_modules(seed: int, updates: int, total: int) -> list[torch.Tensor]:
    """CORL's updates of one run, with modules; the layers of its policy."""
    data = rows()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        critics, value, actor = nn.ModuleList([net(5, 1), net(5, 1)]), net(3, 1), net(3, 2)
    targets, log_std = copy.deepcopy(critics), nn.Parameter(torch.zeros(2))
    adams = [torch.optim.Adam(part.parameters(), 3e-4) for part in (value, critics)]
    adams.append(torch.optim.Adam([*actor.parameters(), log_std], 3e-4))
    generator = torch.Generator().manual_seed(seed)
    mean, std = data["observation"].mean(0), data["observation"].std(0, correction=0) + 1e-3
    for number in range(updates):
        batch = data[torch.randint(50, (256,), generator=generator)]
        s, a = (batch["observation"] - mean) / std, batch["action"]
        s2 = (batch["next", "observation"] - mean) / std
        sa = torch.cat([s, a], 1)
        with torch.no_grad():
            goal = batch["next", "reward"] + 0.99 * value(s2) * ~batch["next", "terminated"]
            advantage = torch.minimum(*(t(sa) for t in targets)) - value(s)
            weight = (3 * advantage).exp().clamp(max=100)
        error = advantage + value(s).detach() - value(s)
        losses = [(torch.where(error < 0, 0.3, 0.7) * error**2).mean()]
        losses.append(sum(nn.functional.mse_loss(c(sa), goal) for c in critics) / 2)
        policy = torch.distributions.Normal(actor(s).tanh(), log_std.clamp(-20, 2).exp())
        losses.append(-(weight * policy.log_prob(a).sum(1, keepdim=True)).mean())
        adams[2].param_groups[0]["lr"] = 3e-4 * (1 + np.cos(np.pi * number / total)) / 2
        for adam, loss in zip(adams, losses, strict=True):
            adam.zero_grad()
            loss.backward()
            adam.step()
        with torch.no_grad():
            for slow, live in zip(targets.parameters(), critics.parameters(), strict=True):
                slow.copy_(0.995 * slow + 0.005 * live)
    return [p.detach() for p in actor.parameters()]


def test_each_plain_run_is_what_modules_compute():
    population = plain_population.PlainPopulation(rows(), [4, 9], width=WIDTH, total=20)
    start = [p.detach().clone() for p in population.actor]
    for _ in range(10):
        population.update()
    for number, seed in enumerate([4, 9]):
        for part, expected in zip(population.actor, train_modules(seed, 10, 20), strict=True):
            own = part.detach()[number]
            expected = expected.T if expected.ndim == 2 else expected[None]
            torch.testing.assert_close(own, expected, atol=2e-6, rtol=1e-4)
    assert all((p - q).abs().max() > 5e-4 for p, q in zip(population.actor, start, strict=True))
    action = population.policy(1)(rows())["action"]
    assert action.shape == (50, 2)
    assert action.abs().max() <= 1


def finished(variant, first, *last):
    return {"variant": variant, "curve": [{"updates": 5, "returns": [first] * 3},
                                          {"updates": 10, "returns": list(last)}]}  # fmt: skip


def test_the_table_by_hand():
    runs = [finished("default", 1.0, 10.0, 20.0, 30.0), finished("torch", 2.0, 20.0, 40.0, 60.0)]
    lines = bench_hopper.summarise(runs)
    # Student's t with two degrees of freedom: 4.3027; the deviation of 10, 20, 30 is 10
    half = 4.3027 * 10 / 3**0.5
    assert lines[1]["interval"] == pytest.approx([20 - half, 20 + half], abs=1e-3)
    assert "better" not in lines[1]
    assert (lines[2]["mean"], lines[2]["better"]) == (2, 1)
    # of 9 pairs, 20 is above 10 and equal to 20; 40 and 60 are above all: (1.5 + 3 + 3) / 9
    assert lines[3]["better"] == pytest.approx(7.5 / 9)
    low, high = lines[3]["better_interval"]
    assert low < 7.5 / 9 < high == 1
    log = {"episodes": 7, "mean": 3.0, "quartiles": [1.0, 2.0, 4.0]}
    text = bench_hopper.table(lines, log)
    assert "| torch | 2 (2 to 2) | 40 (-10 to 90) | 1.00, 0.83 |" in text
    assert "7 episodes, mean return 3, quartiles 1, 2, 4" in text


def test_every_variant_is_a_config():
    assert next(iter(bench_hopper.VARIANTS)) == bench_hopper.FIRST
    for settings in bench_hopper.VARIANTS.values():
        assert IQLConfig(**settings) is not None


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    pytest.importorskip("mujoco")
    path = tmp_path_factory.mktemp("hopper") / "log.npz"
    make_hopper.main([str(path), "--steps", "120", "--random-steps", "110", "--width", "8"])
    return path


def test_the_log_has_every_step_and_the_ends_of_its_episodes(log):
    with np.load(log) as table:
        columns = dict(table)
    ends = columns["terminated"] | columns["truncated"]
    assert columns["obs"].shape == columns["next_obs"].shape == (120, 11)
    assert columns["action"].shape == (120, 3)
    assert ends[-1]
    inside = ~ends[:-1]
    assert np.array_equal(columns["next_obs"][:-1][inside], columns["obs"][1:][inside])
    # Hopper terminates below a height of 0.7 and beyond an angle of 0.2
    height, angle = columns["next_obs"][:, 0], columns["next_obs"][:, 1]
    assert np.array_equal(columns["terminated"], (height <= 0.7) | (np.abs(angle) >= 0.2))
    assert columns["terminated"].sum() >= 2
    dataset = load_dataset(log, env=bench_hopper.ENVIRONMENT, progress=False)
    assert len(dataset.episode_returns) == ends.sum()
    with pytest.raises(SystemExit):
        make_hopper.main(["log.csv"])


def test_a_small_run(log, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_hopper, "RESULTS", tmp_path)
    options = [str(log), "--seeds=2", "--width=8", "--episodes=1", "--result=trial", "--every=2"]
    options += ["--updates", "2", "5", "--variants"]
    bench_hopper.main([*options, "default", "plain", "torch"])
    record = json.loads((tmp_path / "trial.json").read_text())
    assert [each["variant"] for each in record["runs"]] == ["default", "plain", "torch"]
    for each in record["runs"]:
        assert [(p["updates"], len(p["returns"])) for p in each["curve"]] == [(2, 2), (5, 2)]
    assert record["log"]["rows"] == 120
    assert len(record["summary"]) == 6
    out = capsys.readouterr().out
    assert "default, 5 updates" in out
    assert "| plain |" in out
    bench_hopper.main([*options, "constant"])
    alone = json.loads((tmp_path / "trial.json").read_text())
    assert "better" not in alone["summary"][0]  # there is nothing to compare with
    with pytest.raises(SystemExit):
        bench_hopper.main([str(log), "--updates", "5", "2"])
