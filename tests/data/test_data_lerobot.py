"""LeRobot's folders, written by hand as versions 2.1 and 3.0 lay them out."""

import json
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from extras import needs
from small_logs import FOLLOWING, KEPT, assert_counted, counted, first, marked, png, refused, save
from small_logs import UNEQUAL as LENGTHS

from iql_torchrl.data import load_dataset

pa, pq = needs("pyarrow"), needs("pyarrow.parquet")

BEGINS = (0, 4, 6)
TOP = "observation.images.top"
STEP, EPISODE = counted(*LENGTHS)["reward"].astype(int), np.repeat(np.arange(3), LENGTHS)
#: Frame n of episode t, ``(11, 16, 24, 3)``: the first half of the columns has the red value 20 n.
FRAMES = np.zeros((11, 16, 24, 3), np.uint8)
FRAMES[:, :, :12, 0], FRAMES[..., 1] = 20 * STEP[:, None, None], 60 * EPISODE[:, None, None]
#: The second episode ends with success.
SOLVED = {"terminated": "next.success"}


def columns_of(rows):
    """The columns of these rows of the dataset; ``rows`` is a slice or a list."""
    dataset = counted(*LENGTHS, terminated=[1])
    columns = {
        "observation.state": dataset["observation"],
        TOP: np.array([{"bytes": png(frame), "path": None} for frame in FRAMES]),
        "action": dataset["action"],
        "next.reward": dataset["reward"],
        "next.done": dataset["terminated"] | dataset["truncated"],
        "next.success": dataset["terminated"],
        "timestamp": np.float32(STEP / 10),
        "frame_index": STEP,
        "episode_index": EPISODE,
        "index": np.arange(11),
        "task_index": np.zeros(11, np.int64),
    }
    return {key: list(values[rows]) for key, values in columns.items()}


def video(path, frames, milliseconds=None, codec="libx264rgb"):
    """A video of ``frames``; without ``milliseconds``, their times, 10 frames a second."""
    av = needs("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    times = np.arange(len(frames)) * 100 if milliseconds is None else milliseconds
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=1000, options={"qp": "0"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "rgb24"
        for values, time in zip(frames, times, strict=True):
            frame = av.VideoFrame.from_ndarray(values, format="rgb24")
            frame.pts, frame.time_base = int(time), Fraction(1, 1000)
            container.mux(stream.encode(frame))
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


def assert_frames(dataset, expected=FRAMES):
    for rows, frames in ((dataset.transitions, KEPT), (dataset.transitions["next"], FOLLOWING)):
        pictures = rows["observation", "images", "top"]
        assert pictures.dtype == torch.uint8
        assert np.array_equal(pictures.numpy(), expected[frames])


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("videos", [False, True])
def test_every_value(version, videos, tmp_path):
    folder = layout(tmp_path / "push", version=version, videos=videos)
    dataset = load_dataset(folder, columns=SOLVED)
    assert_counted(dataset, LENGTHS, [1], ("observation", "state"))
    assert_frames(dataset)
    assert list(dataset.observation_spec["observation"].keys()) == ["images", "state"]


def test_text_paths_small_pieces_and_memory_mapped_tables(tmp_path, monkeypatch):
    monkeypatch.setattr("iql_torchrl.data.build.CHUNK_BYTES", 2 * FRAMES[0].nbytes)
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


# -- videos whose frames are not one a row

#: Videos of episode 0 and 1 together, and of episode 2, in the layout of version 3.
FIRST, SECOND = (("videos", TOP, "chunk-000", f"file-{number:03d}.mp4") for number in range(2))
#: Frames that belong to no row.
EXTRA = np.full((3, 16, 24, 3), 255, np.uint8)


def edit(folder, *place, **values):
    """Columns of a Parquet file in other values; None leaves one out."""
    path = folder.joinpath(*place)
    table = pq.read_table(path)
    for name, column in values.items():
        number, field = table.schema.get_field_index(name), table.schema.field(name)
        table = table.remove_column(number)
        if column is not None:
            table = table.add_column(number, field, pa.array(column, field.type))
    pq.write_table(table, path)


def times(folder, **values):
    edit(folder, "data", "chunk-000", "file-001.parquet", **values)


def descriptions(folder, **values):
    values = {f"videos/{TOP}/{key}": column for key, column in values.items()}
    edit(folder, "meta", "episodes", "chunk-000", "file-000.parquet", **values)


@pytest.mark.parametrize("rounding", [[0] * 5, [1, -1, 2, 0, -2], [24, -20, 24, 0, -24]])
@pytest.mark.parametrize("begin", [0, 300])
def test_frames_have_the_times_of_their_rows(begin, rounding, tmp_path):
    """The rows of episode 2 need five frames; the video has one before and three after them."""
    folder = layout(tmp_path / "push", videos=True)
    milliseconds = begin + np.array([0, *(100 + np.arange(0, 500, 100) + rounding), 600, 700, 800])
    video(folder.joinpath(*SECOND), np.concatenate([EXTRA[:1], FRAMES[6:], EXTRA]), milliseconds)
    descriptions(folder, from_timestamp=[0.0, 0.4, begin / 1000 + 0.1])
    assert_frames(load_dataset(folder, columns=SOLVED))


@pytest.mark.parametrize("version", [2, 3])
def test_a_video_that_begins_with_the_timestamp_of_its_rows(version, tmp_path):
    folder = layout(tmp_path / "push", version=version, videos=True)
    place = ["chunk-000", TOP, "episode_000002.mp4"] if version == 2 else SECOND[1:]
    video(folder.joinpath("videos", *place), FRAMES[6:], 300 + np.arange(5) * 100)
    refused("has no frame at 0 s, the time of row 6 (episode 2)|at 0.3 s", folder, columns=SOLVED)
    name = "episode_000002" if version == 2 else "file-001"
    later = np.arange(5) / 10 + 0.3
    edit(folder, "data", "chunk-000", f"{name}.parquet", timestamp=later)
    assert_frames(load_dataset(folder, columns=SOLVED))


def test_rows_that_were_left_out_take_their_frames_with_them(tmp_path):
    """By count, the rows at 0.1 s and later would have the pictures of the step before."""
    folder = layout(tmp_path / "push", videos=True)
    frames = np.insert(FRAMES[6:], 1, EXTRA[0], axis=0)
    video(folder.joinpath(*SECOND), frames, np.arange(6) * 100)
    times(folder, timestamp=[0.0, 0.2, 0.3, 0.4, 0.5])
    assert_frames(load_dataset(folder, columns=SOLVED | {"time": None}))
    cut = load_dataset(folder, columns=SOLVED)
    assert any("time ('timestamp') has gaps" in note for note in cut.notes)
    assert len(cut) == len(load_dataset(folder, columns=SOLVED | {"time": None})) - 1


@pytest.mark.parametrize("missing", ["timestamp", "frame_index"])
def test_without_timestamps_rows_have_the_times_of_their_numbers(missing, tmp_path):
    folder = layout(tmp_path / "push", videos=True, drop=["timestamp", missing])
    video(folder.joinpath(*SECOND), np.concatenate([FRAMES[6:], EXTRA]))
    assert_frames(load_dataset(folder, columns=SOLVED))


def test_episodes_in_any_order_in_a_video(tmp_path):
    folder = layout(tmp_path / "push", videos=True)
    video(folder.joinpath(*FIRST), FRAMES[[4, 5, 0, 1, 2, 3]])
    descriptions(folder, from_timestamp=[0.2, 0.0, 0.0])
    assert_frames(load_dataset(folder, columns=SOLVED))


def lose_a_frame(folder):
    """One frame is lost, and three more follow: 38 frames by count, of which most are wrong."""
    frames, milliseconds = np.concatenate([FRAMES[6:], EXTRA]), np.arange(8) * 100
    video(folder.joinpath(*SECOND), np.delete(frames, 2, 0), np.delete(milliseconds, 2))


def lose_timestamps(folder):
    """An H.264 stream without a container."""
    video(folder / "stream.h264", FRAMES[6:], codec="libx264rgb")
    (folder / "stream.h264").rename(folder.joinpath(*SECOND))


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


def describe_wrongly(folder):
    path = folder / "meta" / "episodes.jsonl"
    path.write_text(path.read_text().replace('"length": 5', '"length": 6'))


def damage(*place):
    return lambda folder: folder.joinpath(*place).write_bytes(b"no video, Parquet or JSON")


def depth(folder):
    feature = {"dtype": "video", "info": {"video.is_depth_map": True}}
    info(features={"observation.images.depth": feature})(folder)


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
    (
        edited(lambda f: video(f.joinpath(*SECOND), FRAMES[6:, :8]), videos=True),
        "frames of shape (8, 24, 3)|the first video (16, 24, 3)",
    ),
    (edited(lambda f: f.joinpath(*FIRST).unlink(), videos=True), "file-000.mp4|episode 0|missing"),
    (edited(damage(*FIRST), videos=True), "file-000.mp4|cannot be decoded"),
    (
        edited(lambda f: video(f.joinpath(*SECOND), FRAMES[6:9]), videos=True),
        "file-001.mp4: has no frame at 0.3 s, the time of row 9 (episode 2)|nearest one is at 0.2 s",
    ),
    (
        edited(lose_a_frame, videos=True),
        "file-001.mp4: has no frame at 0.2 s, the time of row 8 (episode 2)|within 0.025 s",
    ),
    (
        edited(lambda f: video(f.joinpath(*SECOND), FRAMES[6:], [0, 100, 227, 300, 400]), videos=True),
        "no frame at 0.2 s|nearest one is at 0.227 s",
    ),
    (edited(lose_timestamps, videos=True), "file-001.mp4: has frames without timestamps"),
    (
        edited(lambda f: times(f, timestamp=[0.0, 0.1, 0.1, 0.2, 0.3]), videos=True),
        "file-001.mp4: rows 7 and 8 have the times 0.1 and 0.1 s|timestamp",
    ),
    (
        edited(lambda f: descriptions(f, from_timestamp=[0.0, 0.3, 0.0]), videos=True),
        "file-000.mp4: rows 3 and 4 have the times 0.3 and 0.3 s|from_timestamp",
    ),
    (
        edited(lambda f: descriptions(f, from_timestamp=None), videos=True),
        "episode 0|/from_timestamp|video_path|Download",
    ),
    (edited(lambda f: times(f, timestamp=[np.nan] * 5), videos=True), "timestamp|row 6"),
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
