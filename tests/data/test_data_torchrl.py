"""TorchRL's dataset classes, run on small local files in place of their downloads."""

from __future__ import annotations

import gzip
import io
import tarfile
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
import torch
from minari.data_collector import EpisodeBuffer
from tensordict import TensorDict
from torchrl.data import (
    LazyTensorStorage,
    TensorDictReplayBuffer,
    VideoClipRef,
    datasets,
)
from torchrl.data.datasets import atari_dqn, d4rl, openx

from iql_torchrl.data import DatasetError, DatasetWarning, load_dataset

Rows = list[float]


def column(dataset: Any, key: Any) -> Rows:
    return dataset.transitions[key].flatten().tolist()


def ends(dataset: Any) -> tuple[list[int], list[int]]:
    """Rows that terminate, and rows that are truncated."""
    marks = (dataset.transitions["next", key].flatten() for key in ("terminated", "truncated"))
    return tuple(mark.nonzero().flatten().tolist() for mark in marks)  # type: ignore[return-value]


def collected(truncated_root: bool = True) -> TensorDict:
    """Two trajectories of 4 and 3 steps as a collector delivers them, with marks before the step."""
    done = torch.tensor([0, 0, 0, 1, 0, 0, 1], dtype=torch.bool)[:, None]
    start = torch.zeros_like(done)
    steps = torch.tensor([1.0, 2, 3, 4, 11, 12, 13])[:, None]
    return TensorDict(
        {
            "observation": steps,
            "action": torch.full((7, 1), 0.5),
            **{key: start.clone() for key in ("done", "terminated", "truncated")},
            "next": {
                "observation": steps + 1,
                "reward": steps,
                "done": done,
                "terminated": done & (steps < 10),
                "truncated": done & (steps > 10),
            },
        },
        [7],
    )


def test_marks_before_a_step_are_not_those_after_it() -> None:
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(20), batch_size=2)
    buffer.extend(collected())
    dataset = load_dataset(buffer)
    assert dataset.episode_lengths.tolist() == [4, 3]
    assert ends(dataset) == ([3], [6])


@pytest.mark.parametrize("key", [("collector", "mask"), "mask"])
def test_padded_steps_are_left_out(key: Any) -> None:
    table = collected().exclude("done", "terminated", "truncated")
    padded = torch.stack([table[:4], torch.cat([table[4:], torch.zeros_like(table[:1])])])
    padded[key] = torch.tensor([[True] * 4, [True] * 3 + [False]])
    dataset = load_dataset(padded.contiguous())
    assert column(dataset, "observation") == [1, 2, 3, 4, 11, 12, 13]
    assert ends(dataset) == ([3], [6])


@pytest.fixture
def minari_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    episodes = [
        EpisodeBuffer(
            observations=list(np.arange(6, dtype=np.float32)[:, None] + 1 + 100 * number),
            actions=list(np.full((5, 1), 0.5, np.float32)),
            rewards=[1.0, 2.0, 3.0, 4.0, 5.0],
            terminations=[False] * 5,
            truncations=[False] * 4 + [True],
        )
        for number in range(3)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no code permalink, author or e-mail
        minari.create_dataset_from_buffers(
            "toy/steps-v0", buffer=episodes, observation_space=gym.spaces.Box(-np.inf, np.inf, (1,)),
            action_space=gym.spaces.Box(-1, 1, (1,)),
        )  # fmt: skip
    return "toy/steps-v0"


def test_minaris_table_of_zeros_is_refused(minari_id: str, tmp_path: Path) -> None:
    options = {"batch_size": 2, "root": tmp_path / "torchrl"}
    made = datasets.MinariExperienceReplay(minari_id, load_from_local_minari=True, **options)
    reopened = datasets.MinariExperienceReplay(minari_id, download=False, **options)
    for buffer in (made, reopened):
        # The fault: Minari's own observations begin 1, 2, 3.
        assert not buffer[:]["observation"].any()
        with pytest.raises(
            DatasetError, match=r"every value is zero.*load_dataset\('toy/steps-v0'\)"
        ):
            load_dataset(buffer)
    assert column(load_dataset(minari_id), "observation")[:3] == [1, 2, 3]


def test_minaris_class_with_values_is_read(minari_id: str, tmp_path: Path) -> None:
    """As a version of TorchRL without the fault would store them."""
    options = {"batch_size": 2, "root": tmp_path / "torchrl"}
    buffer = datasets.MinariExperienceReplay(minari_id, load_from_local_minari=True, **options)
    right = load_dataset(minari_id).transitions
    for key in ("observation", "action", ("next", "observation"), ("next", "reward"),
                ("next", "truncated"), ("next", "done")):  # fmt: skip
        buffer.storage[:][key].copy_(right[key])
    buffer.storage[:]["episode"].copy_(right["collector", "traj_ids"])
    dataset = load_dataset(buffer)
    assert column(dataset, "observation") == column(load_dataset(minari_id), "observation")
    assert dataset.episode_returns.tolist() == [15, 15, 15]


def of_d4rl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timeout: int, with_next: bool = False,
            **options: Any) -> Any:  # fmt: skip
    """Twelve steps with the observations 1, 2, ..., of which 4 terminates."""
    path, steps = tmp_path / "d4rl.hdf5", np.arange(1, 13, dtype=np.float32)
    with h5py.File(path, "w") as file:
        file["observations"], file["rewards"] = steps[:, None], steps
        file["actions"] = np.full((12, 1), 0.5, np.float32)
        file["terminals"], file["timeouts"] = steps == 4, steps == timeout
        if with_next:
            file["next_observations"] = steps[:, None] + 1
    monkeypatch.setattr(d4rl, "_download_dataset_from_url", lambda *_: str(path))
    return datasets.D4RLExperienceReplay(
        "hopper-medium-v2", 2, root=tmp_path / "out", direct_download=True, **options
    )


@pytest.mark.parametrize("with_next", [False, True])
def test_d4rls_zeroed_successors_at_timeouts(
    with_next: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = of_d4rl(tmp_path, monkeypatch, 8, with_next)
    # The fault: the file's timeout at 8 has the successor 9 with next_observations.
    assert buffer[:]["next", "observation"].flatten().tolist()[7] == 0
    with pytest.warns(DatasetWarning) as caught:
        dataset = load_dataset(buffer)
    texts = [str(warning.message) for warning in caught]
    assert "1 rows hold zeros in place of their next observation" in texts[0]
    assert "1 episodes end without a mark" in texts[1]  # the file's last row has none
    assert column(dataset, "observation") == [1, 2, 3, 4, 5, 6, 7, 9, 10, 11]
    assert column(dataset, ("next", "observation")) == [2, 3, 4, 0, 6, 7, 8, 10, 11, 12]
    assert column(dataset, ("next", "reward")) == [1, 2, 3, 4, 5, 6, 7, 9, 10, 11]
    assert ends(dataset) == ([3], [6, 9])


def test_split_trajectories_of_d4rl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = of_d4rl(tmp_path, monkeypatch, 9, split_trajs=True)
    assert buffer.storage[:].shape == (3, 5)  # trajectories of 4, 5 and 2 steps
    with pytest.warns(DatasetWarning) as caught:
        dataset = load_dataset(buffer)
    assert "1 rows hold zeros" in str(caught[0].message)
    assert column(dataset, "observation") == [1, 2, 3, 4, 5, 6, 7, 8, 10, 11]
    assert column(dataset, ("next", "observation"))[4:] == [6, 7, 8, 9, 11, 12]
    assert ends(dataset) == ([3], [7, 9])


def test_robosets_merged_marks_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trials.h5"
    with h5py.File(path, "w") as file:
        for trial in range(2):
            group = file.create_group(f"Trial{trial}")
            group["observations"] = np.arange(1.0, 5)[:, None] + 10 * trial
            group["actions"], group["rewards"] = np.full((4, 2), 0.5), np.arange(4.0)
            group["done"] = np.arange(4) == 3
    cls = datasets.RobosetExperienceReplay
    monkeypatch.setattr(cls, "_download_from_huggingface", lambda *_: [str(path)])
    buffer = cls("DAPG(expert)/door_v2d-v1", batch_size=2, root=tmp_path / "out")
    with pytest.warns(DatasetWarning, match="'terminated' is a copy of the file's done"):
        dataset = load_dataset(buffer)
    assert ends(dataset) == ([3, 7], [])
    marks = {"terminated": None, "truncated": "next/done"}
    with pytest.warns(DatasetWarning, match="hold zeros"):
        dataset = load_dataset(buffer, columns=marks)
    assert column(dataset, "observation") == [1, 2, 3, 11, 12, 13]
    assert column(dataset, ("next", "observation")) == [2, 3, 4, 12, 13, 14]
    assert ends(dataset) == ([], [2, 5])


def test_openx_successors_at_ends(tmp_path: Path) -> None:
    steps, episodes = torch.arange(4), []
    for number in range(2):
        episode = TensorDict(
            {
                "observation": TensorDict({"state": steps[:, None] + 1.0 + 10 * number}, [4]),
                "action": torch.full((4, 2), 0.5),
                "reward": steps.float(),
                "is_first": steps == 0,
                "is_last": steps == 3,
                "is_terminal": (steps == 3) & (number == 0),
            },
            [4],
        )
        openx._format_data(episode, number)
        episodes.append(episode)
    torch.cat(episodes).memmap(str(tmp_path / "cmu_stretch"))
    buffer = datasets.OpenXExperienceReplay(
        "cmu_stretch", batch_size=2, root=tmp_path, download=False, streaming=False
    )
    with pytest.warns(DatasetWarning, match="1 rows hold zeros"):
        dataset = load_dataset(buffer)
    assert column(dataset, ("observation", "state")) == [1, 2, 3, 4, 11, 12, 13]
    assert column(dataset, ("next", "observation", "state"))[4:] == [12, 13, 14]
    assert ends(dataset) == ([3], [6])


def test_vd4rls_pixels_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, steps = tmp_path / "episode.npz", np.arange(6)
    pixels = np.broadcast_to(steps[:, None, None, None] + 1, (6, 3, 4, 4)).astype(np.uint8)
    np.savez(
        path, observation=pixels, action=np.full((6, 2), 0.5, np.float32),
        reward=steps.astype(np.float32), is_first=steps == 0, is_last=steps == 5,
        is_terminal=np.zeros(6, bool), discount=np.ones(6, np.float32),
    )  # fmt: skip
    cls, name = datasets.VD4RLExperienceReplay, "main/walker_walk/random/64px"
    found = {Path("vd4rl", name): [Path("episode.npz")]}
    monkeypatch.setattr(cls, "_parse_datasets", classmethod(lambda _: found))
    monkeypatch.setattr(cls, "_hf_hub_download", classmethod(lambda *_, **__: str(path)))
    buffer = cls(name, batch_size=2, root=tmp_path / "out", num_workers=0)
    with pytest.raises(DatasetError, match=r"no column for observation among .*pixels"):
        load_dataset(buffer)
    names = {"observation": "pixels", "next_observation": "next/pixels"}
    with pytest.warns(DatasetWarning, match="1 rows hold zeros"):
        dataset = load_dataset(buffer, columns=names)
    assert dataset.transitions["observation"].dtype == torch.uint8
    assert dataset.transitions["observation"][:, 0, 0, 0].tolist() == [1, 2, 3, 4, 5]
    assert dataset.transitions["next", "observation"][:, 2, 3, 3].tolist() == [2, 3, 4, 5, 6]
    assert ends(dataset) == ([], [4])


def test_gendgrls_unfilled_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "episode.npy"
    pixels = np.broadcast_to(np.arange(1, 7)[:, None, None, None], (6, 3, 4, 4)).astype(np.uint8)
    episode = {
        "observations": pixels, "actions": np.arange(5), "rewards": np.arange(5.0),
        "dones": np.arange(5) == 4,
    }  # fmt: skip
    np.save(path, episode, allow_pickle=True)  # type: ignore[arg-type]

    def download(folder: str, *, skip_downloaded_files: bool, link: Any) -> None:
        with tarfile.open(Path(folder) / link[1], "w:xz") as archive:
            archive.add(path, "first.npy")
            archive.add(path, "second.npy")

    cls = datasets.GenDGRLExperienceReplay
    monkeypatch.setattr(cls, "_download_category_file", staticmethod(download))
    monkeypatch.setattr(cls, "_get_category_len", classmethod(lambda *_: 14))
    buffer = cls("bigfish-1M_E", batch_size=2, root=tmp_path / "out")
    with pytest.warns(DatasetWarning) as caught:
        dataset = load_dataset(buffer)
    text = " ".join(str(warning.message) for warning in caught)
    assert "the last 4 of 14 rows hold only zeros" in text
    assert "'terminated' is a copy" in text
    assert len(dataset) == 10
    assert ends(dataset) == ([4, 9], [])


def test_atari_runs_are_not_joined(tmp_path: Path) -> None:
    files, names = tmp_path / "gz", {}
    files.mkdir()
    for run in range(2):
        frames = np.broadcast_to(np.arange(1, 7)[:, None, None] + 10 * run, (6, 4, 4))
        names = {
            "observation": frames.astype(np.uint8), "action": np.arange(6, dtype=np.int32) % 3,
            "reward": np.arange(6, dtype=np.float32),
            "terminal": (np.arange(6) == 3).astype(np.uint8),
        }  # fmt: skip
        for name, values in names.items():
            data = io.BytesIO()
            np.save(data, values)
            path = files / f"$store$_{name}_ckpt.{run}.gz"
            path.write_bytes(gzip.compress(data.getvalue()))
    cls = atari_dqn.AtariDQNExperienceReplay
    runs = cls._list_runs(files)
    for run in runs:
        cls._preproc_run(tmp_path / "Pong" / "5" / str(run), runs, run)
    with pytest.warns(DeprecationWarning, match="no longer available"):
        buffer = cls("Pong/5", batch_size=2, root=tmp_path, download=False)
    with pytest.warns(DatasetWarning, match="2 rows hold zeros"):
        dataset = load_dataset(buffer)
    frames = dataset.transitions["observation"][:, 0, 0].tolist()
    assert frames == [1, 2, 3, 4, 5, 11, 12, 13, 14, 15]
    assert dataset.transitions["next", "observation"][:, 0, 0].tolist()[4] == 6
    assert ends(dataset) == ([3, 8], [4, 9])


def test_lerobots_class_has_no_termination_mark() -> None:
    columns = {
        "observation.state": torch.arange(1.0, 9)[:, None],
        "action": torch.full((8, 2), 0.5),
        "episode_index": torch.tensor([0] * 4 + [1] * 4),
        "frame_index": torch.arange(4).repeat(2),
        "next.reward": torch.ones(8),
        "next.done": torch.tensor([False] * 3 + [True]).repeat(2),
        "task": ["push"] * 8,
    }
    buffer = datasets.LeRobotExperienceReplay.from_columns(columns, batch_size=2)
    with pytest.raises(DatasetError, match="'next/done' may merge termination with truncation"):
        load_dataset(buffer)
    dataset = load_dataset(buffer, columns={"terminated": None})
    assert column(dataset, ("observation", "state")) == [1, 2, 3, 5, 6, 7]
    assert column(dataset, ("next", "observation", "state")) == [2, 3, 4, 6, 7, 8]
    assert ends(dataset) == ([], [2, 5])


def test_references_to_videos_are_not_read_as_numbers() -> None:
    frames = VideoClipRef.from_files(["camera.mp4"], num_frames_per_file=[4])
    columns = {
        "observation.state": torch.arange(1.0, 5)[:, None],
        "observation.images.top": frames,
        "action": torch.full((4, 2), 0.5),
        "episode_index": torch.zeros(4, dtype=torch.int64),
        "next.reward": torch.ones(4),
    }
    buffer = datasets.LeRobotExperienceReplay.from_columns(
        columns, batch_size=2, decode_video=False
    )
    with pytest.raises(DatasetError, match="observation/image/top: its frames are in video files"):
        load_dataset(buffer, columns={"terminated": None})
    names = {"terminated": None, "observation": "observation/state"}
    assert column(load_dataset(buffer, columns=names), "observation") == [1, 2, 3]


def test_streams_are_refused() -> None:
    class Stream(LazyTensorStorage):
        def __len__(self) -> int:
            raise RuntimeError("has no length")

    with pytest.raises(DatasetError, match=r"Stream: has no length .*download=True"):
        load_dataset(Stream(4))
