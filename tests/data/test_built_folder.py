"""Built tables: opened without their source and elsewhere, verified, and refused where damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

from iql_torchrl.data import DatasetError, load_dataset
from iql_torchrl.data.__main__ import main
from iql_torchrl.data.digests import fingerprint
from iql_torchrl.data.saved import verify

ENV = "MountainCarContinuous-v0"


def arrays() -> dict[str, np.ndarray]:
    """Six episodes of five steps inside MountainCarContinuous' bounds."""
    rng, rows = np.random.default_rng(0), np.arange(30)
    observation = rng.uniform(-0.05, 0.05, (31, 2)).astype(np.float32)
    return {
        "observation": observation[:-1],
        "next_observation": observation[1:],
        "action": rng.uniform(-1, 1, (30, 1)).astype(np.float32),
        "reward": rng.normal(size=30).astype(np.float32),
        "terminated": rows % 10 == 4,
        "truncated": rows % 10 == 9,
    }


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """A table, at another place than where it was built and without its source."""
    source = tmp_path / "log.npz"
    np.savez(source, **arrays())
    assert main(["build", str(source), str(tmp_path / "first"), "--env", ENV]) == 0
    source.unlink()
    (tmp_path / "other").mkdir()
    return Path(shutil.move(tmp_path / "first", tmp_path / "other" / "copy"))


@pytest.mark.parametrize("reward", ["raw", "return_range", "minus_one", (0.5, 2.0)])
def test_a_copy_without_its_source_equals_the_source_bit_for_bit(built: Path, reward) -> None:
    direct = load_dataset(arrays(), env=ENV, reward=reward)
    opened = load_dataset(str(built), env=ENV, reward=reward)
    assert fingerprint(opened.transitions) == fingerprint(direct.transitions)
    assert opened.reward_map == direct.reward_map
    np.testing.assert_array_equal(opened.episode_returns, direct.episode_returns)
    for key, value in direct.statistics.items():
        assert torch.equal(opened.statistics[key].mean, value.mean)
        assert torch.equal(opened.statistics[key].std, value.std)
    assert opened.action_space == gym.make(ENV).action_space
    # the files keep the raw rewards
    raw = load_dataset(built).transitions["next", "reward"]
    np.testing.assert_array_equal(raw.squeeze(-1).numpy(), arrays()["reward"])


def test_the_digest_depends_neither_on_the_path_nor_on_the_time(tmp_path: Path) -> None:
    records = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "log.npz", **arrays())
        load_dataset(tmp_path / name / "log.npz", env=ENV, memmap=tmp_path / name / "table")
        records.append(json.loads((tmp_path / name / "table" / "built.json").read_text()))
    assert records[0]["source"] != records[1]["source"]  # of the sources: their paths
    assert records[0]["shards"] == records[1]["shards"]
    tables = [load_dataset(tmp_path / name / "table") for name in ("a", "b")]
    assert fingerprint(tables[0].transitions) == fingerprint(tables[1].transitions)


def test_checksums_find_a_flipped_bit_that_the_sizes_do_not_show(built: Path, capsys) -> None:
    size = verify(built)
    assert size > 30 * (2 * 2 * 4 + 4 + 4)
    assert main(["verify", str(built)]) == 0
    path = built / "shard-00000" / "action.memmap"
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(bytes(content))
    load_dataset(built)  # opening reads no rows
    with pytest.raises(DatasetError, match=r"action\.memmap has another content"):
        verify(built)
    assert main(["verify", str(built)]) == 1
    assert "another content" in capsys.readouterr().err


def drop(folder: Path, name: str) -> None:
    (folder / name).unlink()


def cut(folder: Path, name: str) -> None:
    with (folder / name).open("r+b") as file:
        file.truncate(11)


@pytest.mark.parametrize(
    ("damage", "name", "words"),
    [
        (drop, "built.json", "built.json is missing"),
        (cut, "built.json", "built.json .* cannot be read"),
        (drop, "episodes.npz", "episodes.npz is missing"),
        (cut, "episodes.npz", "incomplete or damaged"),
        (drop, "shard-00000/action.memmap", "shard-00000: .*action.memmap is missing"),
        (cut, "shard-00000/next/reward.memmap", "reward.memmap has 11 bytes, built with 120"),
    ],
)
def test_incomplete_and_damaged_folders_get_one_sentence(built, damage, name, words) -> None:
    damage(built, name)
    with pytest.raises(DatasetError, match=words) as raised:
        load_dataset(built)
    assert str(built) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"limit": 5}, "limit=5 cannot be applied"),
        ({"memmap": "x"}, "memmap='x' cannot be applied"),
        ({"clip_actions": True}, "clip_actions=True cannot be applied"),
        ({"dtype": torch.float64}, "pass dtype=torch.float32"),
    ],
)
def test_options_that_only_a_build_can_follow_are_refused(built, options, words) -> None:
    with pytest.raises(DatasetError, match=words):
        load_dataset(built, **options)


def test_rewards_that_the_build_mapped_are_not_mapped_again(tmp_path: Path) -> None:
    load_dataset(arrays(), env=ENV, reward="minus_one", memmap=tmp_path / "table")
    opened = load_dataset(tmp_path / "table", reward="minus_one")
    np.testing.assert_array_equal(
        opened.transitions["next", "reward"].squeeze(-1).numpy(), arrays()["reward"] - 1
    )
    with pytest.raises(DatasetError, match=r"mapped with reward=\(1.0, -1.0\)"):
        load_dataset(tmp_path / "table")


def test_other_folders_are_not_built_tables(built: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match=r"built.json is missing: no folder of a built table"):
        verify(tmp_path / "empty")
    with pytest.raises(DatasetError, match="loaded alone"):
        load_dataset([built, built])
