"""LeRobot's folders, written by hand as versions 2.1 and 3.0 lay them out."""

import json
import sys

import numpy as np
import pytest
import torch
from extras import needs
from small_logs import assert_counted, counted, first, marked, png, refused, save

from iql_torchrl.data import load_dataset

needs("pyarrow")

LENGTHS, BEGINS = (4, 2, 5), (0, 4, 6)
KEPT, FOLLOWING = [0, 1, 2, 4, 5, 6, 7, 8, 9], [1, 2, 3, 5, 5, 7, 8, 9, 10]
TOP = "observation.images.top"
STEP, EPISODE = counted(*LENGTHS)["reward"].astype(int), np.repeat(np.arange(3), LENGTHS)
#: Frame n of episode t, ``(11, 16, 24, 3)``: the first half of the columns has the red value 20 n.
FRAMES = np.zeros((11, 16, 24, 3), np.uint8)
FRAMES[:, :, :12, 0], FRAMES[..., 1] = 20 * STEP[:, None, None], 60 * EPISODE[:, None, None]
#: The second episode ends with success.
SOLVED = {"terminated": "next.success"}


def columns_of(rows):
    """The columns of these rows of the log; ``rows`` is a slice or a list."""
    log = counted(*LENGTHS, terminated=[1])
    columns = {
        "observation.state": log["observation"],
        TOP: np.array([{"bytes": png(frame), "path": None} for frame in FRAMES]),
        "action": log["action"],
        "next.reward": log["reward"],
        "next.done": log["terminated"] | log["truncated"],
        "next.success": log["terminated"],
        "timestamp": STEP / 10,
        "frame_index": STEP,
        "episode_index": EPISODE,
        "index": np.arange(11),
        "task_index": np.zeros(11, np.int64),
    }
    return {key: list(values[rows]) for key, values in columns.items()}


def video(path, frames, codec="libx264rgb"):
    av = needs("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options={"qp": "0"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "rgb24"
        for values in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(values, format="rgb24")))
        container.mux(stream.encode())


def layout(folder, *, version=3, videos=False, drop=()):
    """A complete dataset; ``drop``: columns to leave out."""
    data, clips, meta = (folder / name for name in ("data/chunk-000", "videos", "meta"))
    drop = (*drop, TOP) if videos else drop
    described = {"episode_index": [0, 1, 2], "tasks": [["push"]] * 3, "length": list(LENGTHS)}
    # version 2 has a file an episode; the first file of version 3 has two episodes
    names = ["episode_{:06d}", "file-{:03d}"][version - 2]
    edges = [*BEGINS, 11] if version == 2 else [0, 6, 11]
    for number in range(len(edges) - 1):
        rows, name = slice(*edges[number : number + 2]), names.format(number)
        columns = {k: v for k, v in columns_of(rows).items() if k not in drop}
        save(data / f"{name}.parquet", columns)
        if videos:
            place = ["chunk-000", TOP] if version == 2 else [TOP, "chunk-000"]
            video(clips.joinpath(*place, f"{name}.mp4"), FRAMES[rows])
    if videos and version == 3:
        described |= {f"videos/{TOP}/chunk_index": [0, 0, 0], f"videos/{TOP}/file_index": [0, 0, 1]}
        described[f"videos/{TOP}/from_timestamp"] = [0.0, 0.4, 0.0]
    if version == 2:
        lines = [
            dict(zip(described, row, strict=True)) for row in zip(*described.values(), strict=True)
        ]
        meta.mkdir()
        (meta / "episodes.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    else:
        save(meta / "episodes" / "chunk-000" / "file-000.parquet", described)
    paths = (
        "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    )
    info = {
        "codebase_version": f"v{version}.0", "fps": 10, "chunks_size": 1000, "total_frames": 11,
        "video_path": paths[version - 2],
        "features": {
            "observation.state": {"dtype": "float32", "shape": [2]},
            TOP: {"dtype": "video" if videos else "image", "shape": [16, 24, 3]},
        },
    }  # fmt: skip
    (meta / "info.json").write_text(json.dumps(info))
    return folder


def assert_frames(dataset):
    for rows, frames in ((dataset.transitions, KEPT), (dataset.transitions["next"], FOLLOWING)):
        pictures = rows["observation", "images", "top"]
        assert pictures.dtype == torch.uint8
        assert np.array_equal(pictures.numpy(), FRAMES[frames])


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("videos", [False, True])
def test_every_value(version, videos, tmp_path):
    folder = layout(tmp_path / "push", version=version, videos=videos)
    dataset = load_dataset(folder, columns=SOLVED)
    assert_counted(dataset, LENGTHS, [1], ("observation", "state"))
    assert_frames(dataset)
    assert list(dataset.observation_spec["observation"].keys()) == ["images", "state"]


def test_text_paths_small_pieces_and_memory_mapped_tables(tmp_path, monkeypatch):
    monkeypatch.setattr("iql_torchrl.data.readers.episodes.CHUNK_BYTES", 2 * FRAMES[0].nbytes)
    monkeypatch.setattr("iql_torchrl.data.readers.lerobot.PART_BYTES", 3 * FRAMES[0].nbytes)
    folder = layout(tmp_path / "push", videos=True)
    for _ in range(2):  # the second time from the table
        assert_frames(load_dataset(str(folder), columns=SOLVED, memmap=tmp_path / "table"))


def test_chosen_leaves_marks_and_rewards(tmp_path):
    folder = layout(tmp_path / "push", drop=("next.reward",))
    refused("no column for reward |'next/success' is 1 where", folder, columns=SOLVED)
    dataset = load_dataset(folder, columns={**SOLVED, "reward": "next.success"})
    assert first(dataset, ("next", "reward")) == [0, 0, 0, 0, 1, 0, 0, 0, 0]
    folder = layout(tmp_path / "other")
    refused("'next/done' may merge |'next/success' is 1, name that", folder)
    assert marked(load_dataset(folder, columns={"terminated": "next.done"})) == ([3, 5, 10], [])
    columns = {"terminated": None, "observation": "observation.state"}
    assert_counted(load_dataset(folder, columns=columns), LENGTHS)


# -- bad folders


def without(*drop):
    return lambda folder: layout(folder, drop=drop)


def edited(change, **options):
    def make(folder):
        layout(folder, **options)
        change(folder)
        return folder

    return make


def info(**values):
    def change(folder):
        path = folder / "meta" / "info.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def lose_a_step(folder):
    save(folder / "data" / "chunk-000" / "file-001.parquet", columns_of([6, 7, 9, 10]))
    info(total_frames=10)(folder)


def shorten_video(folder):
    video(folder / "videos" / TOP / "chunk-000" / "file-001.mp4", FRAMES[6:9])


def shrink_video(folder):
    video(folder / "videos" / TOP / "chunk-000" / "file-001.mp4", FRAMES[6:, :8])


def describe_wrongly(folder):
    path = folder / "meta" / "episodes.jsonl"
    path.write_text(path.read_text().replace('"length": 5', '"length": 6'))


def damage(*place):
    return lambda folder: folder.joinpath(*place).write_bytes(b"no video, Parquet or JSON")


def depth(folder):
    feature = {"dtype": "video", "info": {"video.is_depth_map": True}}
    info(features={"observation.images.depth": feature})(folder)


VIDEO = ("videos", TOP, "chunk-000", "file-000.mp4")
BAD = [
    (without("observation.state", TOP), "no column for observation"),
    (without("action"), "no column for action"),
    (edited(lambda f: [p.unlink() for p in (f / "data").rglob("*.parquet")]), "no Parquet files|data"),
    (
        edited(lambda f: (f / "data" / "chunk-000" / "file-001.parquet").unlink()),
        "6 rows|announces 11|incomplete",
    ),
    (edited(lose_a_step), "frame_index is 3|row 8|episode 2|2 is expected"),
    (
        edited(damage("data", "chunk-000", "file-001.parquet")),
        "file-001.parquet|not a complete Parquet",
    ),
    (edited(damage("meta", "info.json")), "info.json|not complete JSON"),
    (edited(lambda f: (f / "meta" / "info.json").write_text("[]")), "info.json|has a list"),
    (edited(shrink_video, videos=True), "frames of shape (8, 24, 3)|the first video (16, 24, 3)"),
    (edited(lambda f: f.joinpath(*VIDEO).unlink(), videos=True), "file-000.mp4|episode 0|missing"),
    (edited(damage(*VIDEO), videos=True), "file-000.mp4|cannot be decoded"),
    (edited(shorten_video, videos=True), "file-001.mp4|ends before frame 3"),
    (edited(describe_wrongly, videos=True, version=2), "episode 2|5 rows|the length 6"),
    (
        edited(lambda f: (f / "meta" / "episodes.jsonl").unlink(), videos=True, version=2),
        "episode 0|of no episode",
    ),
    (
        edited(info(video_path="../{video_key}.mp4"), videos=True),
        "leads to the video '../|below the dataset's own folder",
    ),
    (edited(info(video_path=None), videos=True), f"video_path|{TOP}"),
    (edited(info(video_path="{camera}.mp4"), videos=True), "{camera}|'camera'|video_key"),
    (edited(depth, videos=True), "observation.images.depth|depth|columns={'observation'"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "words"), BAD)
def test_bad_folders_are_refused(make, words, tmp_path):
    refused(words, make(tmp_path / "push"), columns=SOLVED)


def test_without_a_decoder_the_columns_and_the_remedy_are_named(tmp_path, monkeypatch):
    folder = layout(tmp_path / "push", videos=True)
    monkeypatch.setitem(sys.modules, "av", None)
    remedy = "pip install \"iql_torchrl[readers]\"|{'observation': 'observation.state'}"
    refused(f"{TOP}|{remedy}", folder, columns=SOLVED)
    columns = {**SOLVED, "observation": "observation.state"}
    assert len(load_dataset(folder, columns=columns)) == 9
