"""``benchmarks/make_replay.py``, at small size."""

from __future__ import annotations

import gymnasium
import make_replay
import numpy as np
import pytest
import torch
from extras import needs

from iql_torchrl import load_dataset


def test_the_log_has_every_step_and_the_ends_of_its_episodes(tmp_path):
    needs("mujoco")
    path, other = tmp_path / "log.npz", tmp_path / "other.npz"
    sizes = ["--steps", "120", "--random-steps", "110", "--width", "8"]
    make_replay.main([f"Hopper-v5={path}", f"HalfCheetah-v5={other}", *sizes])
    with np.load(path) as table:
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
    dataset = load_dataset(path, env="Hopper-v5", progress=False)
    assert len(dataset.episode_returns) == ends.sum()
    with np.load(other) as table:
        assert table["obs"].shape == (120, 17)
        assert table["truncated"].sum() == 1  # its episodes have 1,000 steps


@pytest.mark.gpu
def test_on_cuda_graphs_act_and_learn_from_the_rows_so_far(tmp_path, monkeypatch):
    needs("mujoco")
    made = []

    class Observed(make_replay.Learner):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append((self, [p.detach().clone() for p in self.loss.parameters()]))

    monkeypatch.setattr(make_replay, "Learner", Observed)
    path, other = tmp_path / "log.npz", tmp_path / "other.npz"
    sizes = ["--steps", "120", "--random-steps", "90", "--width", "8", "--device", "cuda"]
    make_replay.main([f"Hopper-v5={path}", f"HalfCheetah-v5={other}", *sizes])
    for (learner, before), file, size in zip(made, (path, other), (3, 6), strict=True):
        assert learner.update.graph is not None
        assert learner._act.graph is not None
        assert learner.filled.item() == 120
        after = list(learner.loss.parameters())
        assert all(torch.isfinite(p).all() for p in after)
        assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        with np.load(file) as table:
            assert table["action"].shape == (120, size)
            assert len(np.unique(table["action"], axis=0)) == 120  # new noise in each replay


@pytest.mark.parametrize("wrong", ["Hopper-v5", "Hopper-v5=log.csv", "=log.npz"])
def test_a_task_is_an_environment_and_a_file(wrong, capsys):
    with pytest.raises(SystemExit):
        make_replay.main([wrong])
    assert f"{wrong!r}; expected ENVIRONMENT=FILE" in capsys.readouterr().err


def test_a_row_of_the_replay_is_read_as_it_was_written():
    needs("mujoco")
    env = gymnasium.make("Hopper-v5")
    learner = make_replay.Learner(env, width=4, rows=3)
    first = (np.arange(11), [0.1, 0.2, 0.3], np.arange(11, 22), 5.0, True, False)
    second = (np.arange(11, 22), [0.4, 0.5, 0.6], np.arange(22, 33), 6.0, False, True)
    learner.add(0, *first)
    learner.add(1, *second)
    columns = learner.columns(2)
    for name, a, b in zip(("obs", "action", "next_obs"), first, second, strict=False):
        assert np.allclose(columns[name], [a, b])
    assert columns["reward"].tolist() == [5.0, 6.0]
    assert columns["terminated"].tolist() == [True, False]
    assert columns["truncated"].tolist() == [False, True]
    batch = learner._batch()  # the third row, which was not written, is never drawn
    assert set(batch["next", "reward"].ravel().tolist()) == {5.0, 6.0}
    rows = batch["next", "reward"][:, 0] == 5
    assert torch.equal(batch["next", "terminated"][:, 0], rows)
    assert torch.equal(batch["next", "done"][:, 0], rows)  # truncation bootstraps
    env.close()
