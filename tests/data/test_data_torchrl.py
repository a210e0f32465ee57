"""TorchRL's dataset classes, run on small local files in place of their downloads."""

import gzip
import io
import tarfile
import warnings
from pathlib import Path

import h5py
import minari
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from minari.data_collector import EpisodeBuffer
from small_logs import first, loaded, marked, refused, save
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer, VideoClipRef, datasets
from torchrl.data.datasets import atari_dqn, d4rl, openx

from iql_torchrl.data import load_dataset

ZEROS = "rows hold zeros"


def check(source, observed, ends, *words, following=None, key=("observation",), **options):
    """What is read of a source whose observations count on, with one warning for each of ``words``."""
    dataset, texts = loaded(source, **options)
    assert len(texts) == len(words), texts
    assert all(word in text for word, text in zip(words, texts, strict=True)), texts
    assert first(dataset, key) == observed
    following = [n + 1 for n in observed] if following is None else following
    assert first(dataset, ("next", *key)) == following
    assert marked(dataset) == ends
    return dataset


def collected():
    """Two trajectories of 4 and 3 steps as a collector delivers them, with flags before the step."""
    done = torch.tensor([0, 0, 0, 1, 0, 0, 1], dtype=torch.bool)[:, None]
    steps = torch.tensor([1.0, 2, 3, 4, 11, 12, 13])[:, None]
    before = {key: torch.zeros_like(done) for key in ("done", "terminated", "truncated")}
    after = {"observation": steps + 1, "reward": steps, "done": done}
    after |= {"terminated": done & (steps < 10), "truncated": done & (steps > 10)}
    action = torch.full((7, 1), 0.5)
    return TensorDict({"observation": steps, "action": action, **before, "next": after}, [7])


@pytest.mark.parametrize("key", [None, ("collector", "mask"), "mask"])
def test_marks_before_a_step_are_not_those_after_it_and_padded_steps_left_out(key):
    source = TensorDictReplayBuffer(storage=LazyTensorStorage(20), batch_size=2)
    source.extend(collected())
    if key is not None:
        table = collected().exclude("done", "terminated", "truncated")
        source = torch.stack([table[:4], torch.cat([table[4:], torch.zeros_like(table[:1])])])
        source[key] = torch.tensor([[True] * 4, [True] * 3 + [False]])
        source = source.contiguous()
    check(source, [1, 2, 3, 4, 11, 12, 13], ([3], [6]))


def test_minaris_table_of_zeros_is_refused_and_one_with_values_read(empty_folder):
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
    spaces = {"observation_space": Box(-np.inf, np.inf, (1,)), "action_space": Box(-1, 1, (1,))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no code permalink, author or e-mail
        minari.create_dataset_from_buffers("toy/steps-v0", buffer=episodes, **spaces)
    cls, options = datasets.MinariExperienceReplay, {"batch_size": 2, "root": empty_folder / "t"}
    made = cls("toy/steps-v0", load_from_local_minari=True, **options)
    for buffer in (made, cls("toy/steps-v0", download=False, **options)):
        # The fault: Minari's own observations begin 1, 2, 3.
        assert not buffer[:]["observation"].any()
        refused("every value is zero|load_dataset('toy/steps-v0')", buffer)
    # As a version of TorchRL without the fault would store them.
    expected = load_dataset("toy/steps-v0")
    right = expected.transitions
    assert first(expected)[:3] == [1, 2, 3]
    for key in ("observation", "action", ("next", "observation"), ("next", "reward"),
                ("next", "truncated"), ("next", "done")):  # fmt: skip
        made.storage[:][key].copy_(right[key])
    made.storage[:]["episode"].copy_(right["collector", "traj_ids"])
    dataset = check(made, first(expected), ([], [4, 9, 14]))
    assert dataset.episode_returns.tolist() == [15, 15, 15]


def of_d4rl(tmp_path, monkeypatch, timeout, with_next=False, **options):
    """Twelve steps with the observations 1, 2, ..., of which 4 terminates."""
    steps = np.arange(1, 13, dtype=np.float32)
    columns = {
        "observations": steps[:, None], "rewards": steps, "terminals": steps == 4,
        "actions": np.full((12, 1), 0.5, np.float32), "timeouts": steps == timeout,
        **({"next_observations": steps[:, None] + 1} if with_next else {}),
    }  # fmt: skip
    path = save(tmp_path / "d4rl.hdf5", columns)
    monkeypatch.setattr(d4rl, "_download_dataset_from_url", lambda *_: str(path))
    return datasets.D4RLExperienceReplay(
        "hopper-medium-v2", 2, root=tmp_path / "out", direct_download=True, **options
    )


@pytest.mark.parametrize("with_next", [False, True])
def test_d4rls_zeroed_successors_at_timeouts(with_next, tmp_path, monkeypatch):
    buffer = of_d4rl(tmp_path, monkeypatch, 8, with_next)
    # The fault: the file's timeout at 8 has the successor 9 with next_observations.
    assert buffer[:]["next", "observation"].flatten().tolist()[7] == 0
    words = (
        "1 rows hold zeros in place of their next observation",
        "1 episodes end without a done flag",
    )
    observed, following = [1, 2, 3, 4, 5, 6, 7, 9, 10, 11], [2, 3, 4, 0, 6, 7, 8, 10, 11, 12]
    dataset = check(buffer, observed, ([3], [6, 9]), *words, following=following)
    assert first(dataset, ("next", "reward")) == observed


def test_split_trajectories_of_d4rl(tmp_path, monkeypatch):
    buffer = of_d4rl(tmp_path, monkeypatch, 9, split_trajs=True)
    assert buffer.storage[:].shape == (3, 5)  # trajectories of 4, 5 and 2 steps
    observed, following = [1, 2, 3, 4, 5, 6, 7, 8, 10, 11], [2, 3, 4, 0, 6, 7, 8, 9, 11, 12]
    words = f"1 {ZEROS}", "1 episodes end without a done flag"
    check(buffer, observed, ([3], [7, 9]), *words, following=following)


def test_robosets_merged_marks_are_named(tmp_path, monkeypatch):
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
    copy = "'terminated' is a copy of the file's done"
    check(buffer, [1, 2, 3, 4, 11, 12, 13, 14], ([3, 7], []), copy,
          following=[2, 3, 4, 0, 12, 13, 14, 0])  # fmt: skip
    columns = {"terminated": None, "truncated": "next/done"}
    check(buffer, [1, 2, 3, 11, 12, 13], ([], [2, 5]), ZEROS, columns=columns)


def test_openx_successors_at_ends(tmp_path):
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
    options = {"batch_size": 2, "root": tmp_path, "download": False, "streaming": False}
    buffer = datasets.OpenXExperienceReplay("cmu_stretch", **options)
    check(buffer, [1, 2, 3, 4, 11, 12, 13], ([3], [6]), f"1 {ZEROS}",
          following=[2, 3, 4, 0, 12, 13, 14], key=("observation", "state"))  # fmt: skip


def pixels(*shape):
    return np.broadcast_to(np.arange(1, 7).reshape(6, *[1] * len(shape)), (6, *shape))


def test_vd4rls_pixels_by_name(tmp_path, monkeypatch):
    steps = np.arange(6)
    path = save(tmp_path / "episode.npz", {
        "observation": pixels(3, 4, 4).astype(np.uint8),
        "action": np.full((6, 2), 0.5, np.float32), "reward": steps.astype(np.float32),
        "is_first": steps == 0, "is_last": steps == 5, "is_terminal": np.zeros(6, bool),
        "discount": np.ones(6, np.float32),
    })  # fmt: skip
    cls, name = datasets.VD4RLExperienceReplay, "main/walker_walk/random/64px"
    found = {Path("vd4rl", name): [Path("episode.npz")]}
    monkeypatch.setattr(cls, "_parse_datasets", classmethod(lambda _: found))
    monkeypatch.setattr(cls, "_hf_hub_download", classmethod(lambda *_, **__: str(path)))
    buffer = cls(name, batch_size=2, root=tmp_path / "out", num_workers=0)
    refused("no column for observation among |pixels", buffer)
    columns = {"observation": "pixels", "next_observation": "next/pixels"}
    rows = check(buffer, [1, 2, 3, 4, 5], ([], [4]), f"1 {ZEROS}", columns=columns).transitions
    assert rows["observation"].dtype == torch.uint8
    assert rows["next", "observation"][:, 2, 3, 3].tolist() == [2, 3, 4, 5, 6]


def test_gendgrls_unfilled_rows(tmp_path, monkeypatch):
    path, frames = tmp_path / "episode.npy", pixels(3, 4, 4).astype(np.uint8)
    episode = {"observations": frames, "actions": np.arange(5), "rewards": np.arange(5.0)}
    np.save(path, episode | {"dones": np.arange(5) == 4}, allow_pickle=True)

    def download(folder, *, skip_downloaded_files, link):
        with tarfile.open(Path(folder) / link[1], "w:xz") as archive:
            archive.add(path, "first.npy")
            archive.add(path, "second.npy")

    cls = datasets.GenDGRLExperienceReplay
    monkeypatch.setattr(cls, "_download_category_file", staticmethod(download))
    monkeypatch.setattr(cls, "_get_category_len", classmethod(lambda *_: 14))
    buffer = cls("bigfish-1M_E", batch_size=2, root=tmp_path / "out")
    words = "'terminated' is a copy", "the last 4 of 14 rows hold only zeros"
    check(buffer, [1, 2, 3, 4, 5] * 2, ([4, 9], []), *words)


def test_atari_runs_are_not_joined(tmp_path):
    files = tmp_path / "gz"
    files.mkdir()
    for run in range(2):
        columns = {
            "observation": (pixels(4, 4) + 10 * run).astype(np.uint8),
            "action": np.arange(6, dtype=np.int32) % 3,
            "reward": np.arange(6, dtype=np.float32),
            "terminal": (np.arange(6) == 3).astype(np.uint8),
        }
        for name, values in columns.items():
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
    observed, following = [1, 2, 3, 4, 5, 11, 12, 13, 14, 15], [2, 3, 4, 0, 6, 12, 13, 14, 0, 16]
    check(buffer, observed, ([3, 8], [4, 9]), f"2 {ZEROS}", following=following)


def test_lerobots_class_has_no_termination_mark():
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
    refused("'next/done' may merge termination with truncation", buffer)
    none = {"terminated": None}
    check(buffer, [1, 2, 3, 5, 6, 7], ([], [2, 5]), key=("observation", "state"), columns=none)
    # References to videos are not read as numbers.
    frames = VideoClipRef.from_files(["camera.mp4"], num_frames_per_file=[8])
    columns |= {"observation.images.top": frames}
    options = {"batch_size": 2, "decode_video": False}
    buffer = datasets.LeRobotExperienceReplay.from_columns(columns, **options)
    refused("observation/image/top: its frames are in video files", buffer, columns=none)
    names = {"terminated": None, "observation": "observation/state"}
    check(buffer, [1, 2, 3, 5, 6, 7], ([], [2, 5]), columns=names)


def test_streams_are_refused():
    class Stream(LazyTensorStorage):
        def __len__(self):
            raise RuntimeError("has no length")

    refused("Stream: has no length |download=True", Stream(4))


def test_the_default_storage_of_a_buffer_is_read():
    """ListStorage, which returns lists of TensorDicts."""
    buffer = TensorDictReplayBuffer(batch_size=4)
    rows = TensorDict({"observation": torch.arange(6.0)[:, None], "action": torch.zeros(6, 1)}, [6])
    flags = torch.tensor([0, 0, 1, 0, 0, 1], dtype=torch.bool)[:, None]
    following = {"observation": rows["observation"] + 1, "reward": torch.ones(6, 1)}
    rows["next"] = TensorDict(following | {"terminated": flags, "done": flags}, [6])
    buffer.extend(rows)
    assert first(load_dataset(buffer), "observation") == [0, 1, 2, 3, 4, 5]
    buffer.extend(TensorDict({"observation": torch.zeros(2, 2)}, [2]))
    refused("ListStorage: its rows cannot be stacked|expected the same entries", buffer)
