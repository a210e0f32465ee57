"""Videos: every frame of the episodes that evaluate runs, in a file that can be read again."""

import gymnasium
import numpy as np
import pytest
from extras import needs
from gymnasium import spaces
from tensordict.nn import TensorDictModule

from iql_torchrl.evaluation import video
from iql_torchrl.evaluation.video import record_video


class Shades(gymnasium.Env):
    """Episode ``seed`` lasts ``seed`` steps; its frames have the shade ``10 seed + 20 count``."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 12}  # noqa: RUF012
    observation_space = spaces.Box(-1.0, 1.0, (1,))
    action_space = spaces.Box(-1.0, 1.0, (1,))
    opened = []  # noqa: RUF012

    def __init__(self, render_mode="rgb_array", size=(33, 47), fail_at=None):
        self.render_mode, self.size, self.fail_at, self.closed = render_mode, size, fail_at, False
        Shades.opened.append(self)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed, self.count = seed, 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.count += 1
        if self.count == self.fail_at:
            raise RuntimeError("the simulator fell over")
        return np.zeros(1, np.float32), 1.0, self.count == self.seed, False, {}

    def render(self):
        return np.full((*self.size, 3), 10 * self.seed + 20 * self.count, np.uint8)

    def close(self):
        self.closed = True


@pytest.fixture(autouse=True)
def _forget_environments():
    Shades.opened = []


def policy(function=lambda observation: observation[:, :1]):
    return TensorDictModule(function, in_keys=["observation"], out_keys=["action"])


def read(path):
    """Frames ``(T, H, W, 3)`` and frames per second of a film."""
    needs("av")
    reader = needs("imageio.v3")
    return reader.imread(path, plugin="pyav"), reader.immeta(path, plugin="pyav")["fps"]


needs_extra = pytest.mark.skipif(
    not (video.find_spec("av") and video.find_spec("imageio")), reason="needs the extra video"
)


def shades(seed, episodes, longest=10**9):
    return [
        10 * number + 20 * count
        for number in range(seed, seed + episodes)
        for count in range(min(number, longest) + 1)
    ]


@pytest.mark.slow
@needs_extra
def test_every_frame_of_every_episode_in_order(tmp_path):
    path = record_video(policy(), Shades, tmp_path / "new" / "film.mp4", episodes=3, seed=2)
    assert path == tmp_path / "new" / "film.mp4"
    frames, fps = read(path)
    assert frames.shape == (3 + 4 + 5, 34, 48, 3), "odd sizes are made even"
    np.testing.assert_allclose(frames.mean((1, 2, 3)), shades(2, 3), atol=4)
    assert frames.std((1, 2, 3)).max() < 4, "the added row and column look like their neighbours"
    assert fps == 12
    assert [file.name for file in path.parent.iterdir()] == ["film.mp4"]
    assert all(env.closed for env in Shades.opened)
    path = record_video(policy(), Shades, tmp_path / "a.mp4", seed=6, max_steps=3, fps=25)
    frames, fps = read(str(path))
    np.testing.assert_allclose(frames.mean((1, 2, 3)), shades(6, 1, longest=3), atol=4)
    assert fps == 25


@needs_extra
def test_a_video_shows_the_pendulum_at_the_angle_of_the_environment(tmp_path):
    needs("pygame")

    def make():
        return gymnasium.make("Pendulum-v1", render_mode="rgb_array")

    push = policy(lambda observation: 1.5 * observation[:, :1])
    frames, fps = read(record_video(push, make, tmp_path / "p.mp4", seed=3, max_steps=15))
    env = make()
    observation, _ = env.reset(seed=3)
    expected = [env.render()]
    for _ in range(15):
        observation, *_ = env.step(np.float32(1.5) * observation[:1])
        expected.append(env.render())
    env.close()
    expected = np.stack(expected).astype(float)
    assert frames.shape == (16, 500, 500, 3)
    assert fps == 30
    assert frames.std((1, 2, 3)).min() > 10, "no frame is of one colour"
    loss = np.abs(expected - frames).mean((1, 2, 3)).max()
    moved = np.abs(expected[:-5] - frames[5:]).mean((1, 2, 3)).min()
    assert loss < 1 < moved, (loss, moved)


@pytest.mark.slow
@needs_extra
def test_an_error_leaves_the_old_film_and_no_half_of_a_new_one(tmp_path):
    path = record_video(policy(), Shades, tmp_path / "film.mp4", seed=1)
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="fell over"):
        record_video(policy(), lambda: Shades(fail_at=2), path, seed=5)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["film.mp4"]
    record_video(policy(), Shades, path, seed=5)
    assert path.read_bytes() != before


@needs_extra
def test_how_to_make_an_environment_that_renders(tmp_path):
    def make_env():
        return gymnasium.make("Pendulum-v1")

    with pytest.raises(ValueError, match=r"render_mode=None.*pass lambda: (.*)$") as caught:
        record_video(policy(), make_env, tmp_path / "a.mp4", seed=0)
    advice = str(caught.value).split("pass lambda: ")[1]
    made = eval(advice, {"gymnasium": gymnasium, "make_env": make_env})
    assert (made.render_mode, made.spec.id) == ("rgb_array", "Pendulum-v1")
    with pytest.raises(ValueError, match=r"'human'.*pass Shades\(render_mode=\"rgb_array\"\)"):
        record_video(policy(), lambda: Shades("human"), tmp_path / "a.mp4", seed=0)
    with pytest.raises(ValueError, match=r"expected a picture \(height, width, 3\)"):
        record_video(policy(), lambda: Shades(size=(33,)), tmp_path / "a.mp4", seed=2)
    assert list(tmp_path.iterdir()) == []
    assert all(env.closed for env in Shades.opened)


def test_arguments_are_checked_before_anything_runs(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"path must end in \.mp4, found '.*a\.avi'"):
        record_video(policy(), Shades, tmp_path / "a.avi", seed=0)
    for fps in (0, 2.5, True):
        with pytest.raises(ValueError, match=f"fps is {fps}; expected an integer >= 1"):
            record_video(policy(), Shades, tmp_path / "a.mp4", seed=0, fps=fps)
    with pytest.raises(ValueError, match="episodes is 0"):
        record_video(policy(), Shades, tmp_path / "a.mp4", seed=0, episodes=0)
    monkeypatch.setattr(video, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "iql_torchrl\[video\]"'):
        record_video(policy(), Shades, tmp_path / "a.mp4", seed=0)
    assert Shades.opened == []
    assert list(tmp_path.iterdir()) == []
