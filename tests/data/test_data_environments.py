"""Environments that data name: made from registered ids and Gymnasium's wrappers alone."""

import gymnasium as gym
import pytest
from gymnasium.envs.registration import EnvSpec, WrapperSpec

from iql_torchrl.data.readers.environments import recorded_env
from iql_torchrl.data.schema import DatasetError


class Danger(gym.Env):
    """An environment that a table must not be able to make."""

    def __init__(self):
        raise AssertionError("code that a file names was run")


def spec(id="Pendulum-v1", entry_point=f"{__name__}:Danger", **options):
    return EnvSpec(id, entry_point=entry_point, **options)


def test_an_entry_point_in_a_table_is_not_called_and_wrappers_of_gymnasium_are_made():
    made = recorded_env(spec(kwargs={"g": 5.0}, max_episode_steps=7))
    assert type(made.unwrapped).__name__ == "PendulumEnv"
    assert made.unwrapped.g == 5.0
    assert made.spec.max_episode_steps == 7
    wrapper = WrapperSpec("TimeAware", "gymnasium.wrappers.stateful_observation:TimeAwareObservation", {
        "flatten": True, "normalize_time": False, "dict_time_key": "time",
    })  # fmt: skip
    made = recorded_env(spec(additional_wrappers=(wrapper,), max_episode_steps=9))
    assert made.observation_space.shape == (4,)


def wrapped(name, entry_point, **options):
    return spec(additional_wrappers=(WrapperSpec(name, entry_point, options),))


RENDERING = "gymnasium.wrappers.rendering"


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (spec("os:Pendulum-v1"), r"'os:Pendulum-v1'.*begins with a module to import.*pass env="),
        (spec("Danger-v0"), r"'Danger-v0', as the data name it, is not registered.*pass env="),
        (
            wrapped("Danger", f"{__name__}:Danger"),
            r"has the wrapper '.*:Danger'; only Gymnasium's wrappers",
        ),
        (wrapped("x", f"{RENDERING}:os"), r"has the wrapper 'gymnasium\.wrappers\.rendering:os'"),
        (wrapped("x", f"{RENDERING}:RecordVideo", video_folder="/x"), "that write no files"),
    ],
)
def test_what_a_table_may_not_name(stored, message):
    with pytest.raises(DatasetError, match=message):
        recorded_env(stored)
