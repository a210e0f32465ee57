"""LeRobot's folders, written by hand as versions 2.1 and 3.0 lay them out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from arrow_tables import png, write

from iql_torchrl.data import DatasetError, load_dataset

pytest.importorskip("pyarrow")

LENGTHS = (4, 2, 5)
TOP = "observation.images.top"
#: Frame n of episode t, ``(11, 16, 24, 3)``: the first half of the columns has the red value 20 n.
FRAMES = np.zeros((sum(LENGTHS), 16, 24, 3), np.uint8)
for _row, (_episode, _step) in enumerate((t, n) for t, k in enumerate(LENGTHS) for n in range(k)):
    FRAMES[_row, :, :12, 0], FRAMES[_row, :, :, 1] = 20 * _step, 60 * _episode
#: The second episode ends with success.
SOLVED = {"terminated": "next.success"}


def parts(episode: int) -> dict[str, Any]:
    """The columns of one episode."""
    length, begin = LENGTHS[episode], sum(LENGTHS[:episode])
    steps = np.arange(length)
    observed = np.stack([100.0 * episode + steps, -steps], 1).astype(np.float32)
    return {
        "observation.state": list(observed),
        TOP: [{"bytes": png(f), "path": None} for f in FRAMES[begin : begin + length]],
        "action": list(np.full((length, 2), 0.1, np.float32) * steps[:, None].astype(np.float32)),
        "next.reward": steps.astype(np.float32),
        "next.done": steps == length - 1,
        "next.success": (steps == length - 1) & (episode == 1),
        "timestamp": steps / 10,
        "frame_index": steps,
        "episode_index": np.full(length, episode),
        "index": begin + steps,
        "task_index": np.zeros(length, np.int64),
    }


def joined(*rows: dict[str, Any]) -> dict[str, Any]:
    return {key: [value for row in rows for value in row[key]] for key in rows[0]}


def video(path: Path, frames: np.ndarray, codec: str = "libx264rgb") -> None:
    av = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options={"qp": "0"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "rgb24"
        for values in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(values, format="rgb24")))
        container.mux(stream.encode())


def layout(
    folder: Path, *, version: int = 3, videos: bool = False, drop: tuple[str, ...] = ()
) -> Path:
    """A complete dataset; ``drop``: columns to leave out."""
    if videos:
        drop = (*drop, TOP)
    episodes = [{k: v for k, v in parts(t).items() if k not in drop} for t in range(3)]
    described: list[dict[str, Any]] = [
        {"episode_index": t, "tasks": ["push"], "length": length}
        for t, length in enumerate(LENGTHS)
    ]
    if version == 2:
        for number, rows in enumerate(episodes):
            write(folder / "data" / "chunk-000" / f"episode_{number:06d}.parquet", rows)
    else:  # the first file has two episodes
        write(folder / "data" / "chunk-000" / "file-000.parquet", joined(*episodes[:2]))
        write(folder / "data" / "chunk-000" / "file-001.parquet", episodes[2])
    if videos and version == 2:
        for number, (begin, length) in enumerate(zip((0, 4, 6), LENGTHS, strict=True)):
            path = folder / "videos" / "chunk-000" / TOP / f"episode_{number:06d}.mp4"
            video(path, FRAMES[begin : begin + length])
    elif videos:
        video(folder / "videos" / TOP / "chunk-000" / "file-000.mp4", FRAMES[:6])
        video(folder / "videos" / TOP / "chunk-000" / "file-001.mp4", FRAMES[6:])
        for row, file, start in zip(described, (0, 0, 1), (0.0, 0.4, 0.0), strict=True):
            row[f"videos/{TOP}/chunk_index"], row[f"videos/{TOP}/file_index"] = 0, file
            row[f"videos/{TOP}/from_timestamp"] = start
    if version == 2:
        lines = "\n".join(json.dumps(row) for row in described)
        (folder / "meta").mkdir()
        (folder / "meta" / "episodes.jsonl").write_text(lines + "\n")
    else:
        table = {key: [row[key] for row in described] for key in described[0]}
        write(folder / "meta" / "episodes" / "chunk-000" / "file-000.parquet", table)
    info = {
        "codebase_version": f"v{version}.0",
        "fps": 10,
        "chunks_size": 1000,
        "total_frames": 11,
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
        if version == 2
        else "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "features": {
            "observation.state": {"dtype": "float32", "shape": [2]},
            TOP: {"dtype": "video" if videos else "image", "shape": [16, 24, 3]},
        },
    }
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    return folder


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("videos", [False, True])
def test_every_value(version: int, videos: bool, tmp_path: Path) -> None:
    folder = layout(tmp_path / "push", version=version, videos=videos)
    dataset = load_dataset(folder, columns=SOLVED)
    rows = dataset.transitions
    assert dataset.episode_lengths.tolist() == [3, 2, 4]
    kept = [0, 1, 2, 4, 5, 6, 7, 8, 9]
    following = [1, 2, 3, 5, 5, 7, 8, 9, 10]
    state = np.concatenate([parts(t)["observation.state"] for t in range(3)])
    assert np.array_equal(rows["observation", "state"].numpy(), state[kept])
    assert np.array_equal(rows["next", "observation", "state"].numpy(), state[following])
    pictures = rows["observation", "images", "top"]
    assert pictures.dtype == torch.uint8
    assert np.array_equal(pictures.numpy(), FRAMES[kept])
    assert np.array_equal(rows["next", "observation", "images", "top"].numpy(), FRAMES[following])
    assert rows["next", "reward"].flatten().tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3]
    assert rows["next", "terminated"].flatten().nonzero().flatten().tolist() == [4]
    assert rows["next", "truncated"].flatten().nonzero().flatten().tolist() == [2, 8]
    assert list(dataset.observation_spec["observation"].keys()) == ["images", "state"]


def test_text_paths_small_pieces_and_memory_mapped_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("iql_torchrl.data.readers.episodes.CHUNK_BYTES", 2 * FRAMES[0].nbytes)
    monkeypatch.setattr("iql_torchrl.data.readers.lerobot.PART_BYTES", 3 * FRAMES[0].nbytes)
    folder = layout(tmp_path / "push", videos=True)
    for _ in range(2):  # the second time from the table
        rows = load_dataset(str(folder), columns=SOLVED, memmap=tmp_path / "table").transitions
        frames, following = (
            row["observation", "images", "top"].numpy() for row in (rows, rows["next"])
        )
        assert np.array_equal(frames, FRAMES[[0, 1, 2, 4, 5, 6, 7, 8, 9]])
        assert np.array_equal(following, FRAMES[[1, 2, 3, 5, 5, 7, 8, 9, 10]])


def test_one_leaf_is_a_plain_observation(tmp_path: Path) -> None:
    columns = {"terminated": None, "observation": "observation.state"}
    dataset = load_dataset(layout(tmp_path / "push"), columns=columns)
    assert dataset.transitions["observation"][:, 0].tolist() == [0, 1, 2, 100, 200, 201, 202, 203]


def test_success_as_a_reward(tmp_path: Path) -> None:
    folder = layout(tmp_path / "push", drop=("next.reward",))
    with pytest.raises(DatasetError, match=r"no column for reward .*'next/success' is 1 where"):
        load_dataset(folder, columns=SOLVED)
    dataset = load_dataset(folder, columns={**SOLVED, "reward": "next.success"})
    assert dataset.transitions["next", "reward"].flatten().tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0]


def test_done_is_not_taken_for_termination(tmp_path: Path) -> None:
    folder = layout(tmp_path / "push")
    with pytest.raises(
        DatasetError, match=r"'next/done' may merge .*'next/success' is 1, name that"
    ):
        load_dataset(folder)
    dataset = load_dataset(folder, columns={"terminated": "next.done"})
    assert len(dataset) == 11
    dataset = load_dataset(folder, columns={"terminated": None})
    assert dataset.episode_lengths.tolist() == [3, 1, 4]


def without(*drop: str) -> Any:
    return lambda folder: layout(folder, drop=drop)


def edited(change: Any, **options: Any) -> Any:
    def make(folder: Path) -> Path:
        layout(folder, **options)
        change(folder)
        return folder

    return make


def info(**values: Any) -> Any:
    def change(folder: Path) -> None:
        path = folder / "meta" / "info.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def lose_a_step(folder: Path) -> None:
    rows = {key: [v for i, v in enumerate(values) if i != 2] for key, values in parts(2).items()}
    write(folder / "data" / "chunk-000" / "file-001.parquet", rows)
    info(total_frames=10)(folder)


def shorten_video(folder: Path) -> None:
    video(folder / "videos" / TOP / "chunk-000" / "file-001.mp4", FRAMES[6:9])


def describe_wrongly(folder: Path) -> None:
    path = folder / "meta" / "episodes.jsonl"
    path.write_text(path.read_text().replace('"length": 5', '"length": 6'))


def damage(*place: str) -> Any:
    return lambda folder: folder.joinpath(*place).write_bytes(b"no video, Parquet or JSON")


def depth(folder: Path) -> None:
    feature = {"dtype": "video", "info": {"video.is_depth_map": True}}
    info(features={"observation.images.depth": feature})(folder)


VIDEO = ("videos", TOP, "chunk-000", "file-000.mp4")
BAD: dict[str, tuple[Any, list[str]]] = {
    "no state or picture": (without("observation.state", TOP), ["no column for observation"]),
    "no actions": (without("action"), ["no column for action"]),
    "no Parquet files": (
        edited(lambda f: [p.unlink() for p in (f / "data").rglob("*.parquet")]),
        ["no Parquet files", "data"],
    ),
    "a missing Parquet file": (
        edited(lambda f: (f / "data" / "chunk-000" / "file-001.parquet").unlink()),
        ["6 rows", "announces 11", "incomplete"],
    ),
    "a missing step": (
        edited(lose_a_step), ["frame_index is 3", "row 8", "episode 2", "2 is expected"],
    ),
    "a damaged Parquet file": (
        edited(damage("data", "chunk-000", "file-001.parquet")),
        ["file-001.parquet", "not a complete Parquet"],
    ),
    "a damaged description": (edited(damage("meta", "info.json")), ["info.json", "not complete JSON"]),
    "a missing video": (
        edited(lambda f: f.joinpath(*VIDEO).unlink(), videos=True),
        ["file-000.mp4", "episode 0", "missing"],
    ),
    "a damaged video": (edited(damage(*VIDEO), videos=True), ["file-000.mp4", "cannot be decoded"]),
    "a short video": (edited(shorten_video, videos=True), ["file-001.mp4", "ends before frame 3"]),
    "other lengths of episodes": (
        edited(describe_wrongly, videos=True, version=2), ["episode 2", "5 rows", "the length 6"],
    ),
    "no description of episodes": (
        edited(lambda f: (f / "meta" / "episodes.jsonl").unlink(), videos=True, version=2),
        ["episode 0", "of no episode"],
    ),
    "a video elsewhere": (
        edited(info(video_path="../{video_key}.mp4"), videos=True),
        ["leads to the video '../", "below the dataset's own folder"],
    ),
    "no template of paths": (edited(info(video_path=None), videos=True), ["video_path", TOP]),
    "an unknown template": (
        edited(info(video_path="{camera}.mp4"), videos=True), ["{camera}", "'camera'", "video_key"],
    ),
    "videos of depth": (
        edited(depth, videos=True), ["observation.images.depth", "depth", "columns={'observation'"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_folders_are_refused(case: str, tmp_path: Path) -> None:
    make, words = BAD[case]
    folder = make(tmp_path / "push")
    with pytest.raises(DatasetError) as caught:
        load_dataset(folder, columns=SOLVED)
    assert all(word in str(caught.value) for word in words), caught.value


def test_without_a_decoder_the_columns_and_the_remedy_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = layout(tmp_path / "push", videos=True)
    monkeypatch.setitem(sys.modules, "av", None)
    advice = r'{}.* pip install "iql_torchrl\[readers\]".*{{.observation.: .observation.state.}}'
    with pytest.raises(DatasetError, match=advice.format(TOP)):
        load_dataset(folder, columns=SOLVED)
    columns = {**SOLVED, "observation": "observation.state"}
    assert len(load_dataset(folder, columns=columns)) == 9
