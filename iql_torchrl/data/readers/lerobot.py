"""LeRobot's datasets on local disk: Parquet files of steps, and videos.

Format by LeRobot's own code (``lerobot/datasets``, versions 0.3.3 and 0.4.4): ``v2.x`` has one Parquet
file and one video an episode, ``v3.0`` files with many episodes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from iql_torchrl.data.readers.arrays import (
    Column,
    Columns,
    UnreadableColumn,
    column_of_parts,
    package,
    reading,
)
from iql_torchrl.data.readers.arrow import PART_BYTES, arrow_columns
from iql_torchrl.data.readers.options import ReadOptions
from iql_torchrl.data.readers.parquet import parquet_files, parquet_rows
from iql_torchrl.data.schema import DatasetError
from iql_torchrl.descriptions import one_line
from iql_torchrl.files import is_safe_relative_path

#: What is read of an episode's description.
DESCRIPTION = ("episode_index", "length", "videos")
#: Columns that say which step of which episode a row is.
STEPS: tuple[str, ...] = ("episode_index", "frame_index", "timestamp")
#: How far a frame may be from the time of its row, in frame intervals. Videos round timestamps to
#: their time base (a millisecond in Matroska). Beyond half an interval another frame is nearer.
TOLERANCE = 0.25


class Clip(NamedTuple):
    """The rows of an episode, whose frames are in one video."""

    path: Path
    episode: int
    rows: range


def open_lerobot(folder: Path, options: ReadOptions) -> Columns:
    """The columns of a LeRobot dataset; names with dots become groups.

    Pictures are uint8 ``(height, width, channels)``. ``next.done`` flags the last step of an episode
    for any cause, so that it is not read as a termination unless ``columns`` says so. A video's frame
    belongs to the row with its timestamp (else ``frame_index / fps``; in version 3.0 plus the
    episode's ``from_timestamp``), within ``TOLERANCE`` frame intervals. Frames without a row are
    skipped; a row without a frame, and two rows with the same one, raise ``DatasetError``.

    Raises ``DatasetError`` naming what is missing or damaged: the description, Parquet files with as
    many rows as it announces, steps within an episode; and videos where they are used.
    """
    description = folder / "meta" / "info.json"
    info = _json(description, description.read_text())
    files = parquet_files(folder / "data")
    if not files:
        raise DatasetError(
            f"{folder}: has no Parquet files below {folder / 'data'}; expected data/chunk-000/... as "
            "LeRobot writes them: download or copy the dataset completely."
        )
    table = parquet_rows(folder.name, files, folder)
    announced = info.get("total_frames")
    if isinstance(announced, int) and announced != table.rows:
        raise DatasetError(
            f"{folder}: its Parquet files have {table.rows} rows, but meta/info.json announces "
            f"{announced}; the copy is incomplete, or old files are left in it: download it again."
        )
    columns = arrow_columns(table, options.named)
    steps = {key: np.ravel(columns[key][:]) for key in STEPS if key in columns}
    if {"episode_index", "frame_index"} <= steps.keys():
        _check_steps(folder, steps["episode_index"], steps["frame_index"])
    for name, feature in info.get("features", {}).items():
        if feature.get("dtype") == "video":
            try:
                column = _video(folder, info, name, steps)
            except DatasetError as error:  # only an error if the column is used
                leaf = next(
                    (k for k in columns if k.startswith("observation/")), "observation/state"
                )
                column = UnreadableColumn(
                    f"{str(error).rstrip('.')}; or leave {name} out, as with "
                    f"columns={{'observation': {leaf.replace('/', '.', 1)!r}}}."
                )
            columns[name.replace(".", "/")] = column
    return Columns(folder.name, columns)


def _check_steps(folder: Path, episode: NDArray[Any], step: NDArray[Any]) -> None:
    """Raise where a step is missing inside an episode: its row would get a wrong next observation."""
    begins = np.concatenate([[True], episode[1:] != episode[:-1]])
    expected = np.where(begins, 0, np.concatenate([[0], step[:-1] + 1]))
    if len(wrong := np.flatnonzero(step != expected)):
        row = int(wrong[0])
        raise DatasetError(
            f"{folder}: frame_index is {step[row]} at row {row} (episode {episode[row]}), where "
            f"{expected[row]} is expected; steps are missing or out of order: download the dataset "
            "again."
        )


def _video(
    folder: Path, info: Mapping[str, Any], name: str, steps: Mapping[str, NDArray[Any]]
) -> Column:
    """The frames of all rows, ``(rows, height, width, 3)`` uint8."""
    clips, seconds = _clips(folder, info, name, steps)
    fps = float(info["fps"])
    tolerance, frames = TOLERANCE / fps, _Frames()
    shape = _rgb(next(_decoded(clips[0].path))).shape
    most = max(1, PART_BYTES // int(np.prod(shape)))
    parts = [
        clip._replace(rows=clip.rows[start : start + most])
        for clip in clips
        for start in range(0, len(clip.rows), most)
    ]

    def part(number: int) -> NDArray[np.uint8]:
        path, episode, rows = parts[number]
        pictures = np.empty((len(rows), *shape), np.uint8)
        for place, row in enumerate(rows):
            frame = frames.nearest(path, seconds[row])
            if not abs(frame.time - seconds[row]) <= tolerance:
                raise DatasetError(
                    f"{path}: has no frame at {seconds[row]:.6g} s, the time of row {row} (episode "
                    f"{episode}); the nearest one is at {frame.time:.6g} s, expected within "
                    f"{tolerance:.3g} s, which is {TOLERANCE} of a frame at {fps:g} frames per second. "
                    "Download or copy the video again; if frames were lost in recording, leave out the "
                    "episode."
                )
            picture = _rgb(frame)
            if picture.shape != shape:
                raise DatasetError(
                    f"{folder.name}: {name}: {path} has frames of shape {picture.shape}, the first "
                    f"video {shape}; expected one size: write the videos again in one size."
                )
            pictures[place] = picture
        return pictures

    return column_of_parts([len(clip.rows) for clip in parts], part, shape, np.uint8)


def _clips(
    folder: Path, info: Mapping[str, Any], name: str, steps: Mapping[str, NDArray[Any]]
) -> tuple[list[Clip], NDArray[np.float64]]:
    """The videos of the episodes, and the time of each row in its video."""
    feature = info["features"][name]
    described = [feature, feature.get("info") or {}, feature.get("video_info") or {}]
    if any(part.get("is_depth_map") or part.get("video.is_depth_map") for part in described):
        raise DatasetError(
            f"{folder.name}: {name} is a video of depth, which is not read: convert it to arrays."
        )
    known = isinstance(info.get("video_path"), str) and info.get("fps")
    if not known or "episode_index" not in steps:
        raise DatasetError(
            f"{folder.name}: {name} is stored as videos, which are found by video_path and fps in "
            "meta/info.json and the column episode_index; one of them is missing: download it again."
        )
    episode = steps["episode_index"]
    rows = {row.get("episode_index"): row for row in _episodes(folder)}
    begins = np.flatnonzero(np.concatenate([[True], episode[1:] != episode[:-1]]))
    lengths = np.diff([*begins, len(episode)])
    frame_index = steps.get("frame_index", np.arange(len(episode)) - np.repeat(begins, lengths))
    seconds = np.array(steps.get("timestamp", frame_index / float(info["fps"])), np.float64)
    clips = []
    for begin, length in zip(begins.tolist(), lengths.tolist(), strict=True):
        number = int(episode[begin])
        row = rows.get(number, {})
        if row.get("length") != length:
            raise DatasetError(
                f"{folder}: episode {number} has {length} rows, and the length "
                f"{row.get('length', 'of no episode')} in meta/episodes (or episodes.jsonl); download "
                "the dataset again."
            )
        path, start = _place(folder, info, name, row)
        clips.append(Clip(path, number, range(begin, begin + length)))
        seconds[begin : begin + length] += start
    _check_times(clips, seconds, 2 * TOLERANCE / float(info["fps"]))
    return clips, seconds


def _check_times(clips: list[Clip], seconds: NDArray[np.float64], apart: float) -> None:
    """Raise where rows have less than ``apart`` seconds between them, so that they share a frame."""
    numbers = np.unique([str(clip.path) for clip in clips], return_inverse=True)[1]
    file = np.repeat(numbers, [len(clip.rows) for clip in clips])
    order = np.lexsort((seconds, file))
    near = (np.diff(file[order]) == 0) & (np.diff(seconds[order]) < apart)
    if near.any():
        first, second = sorted(order[near.argmax() :][:2].tolist())
        path = next(clip.path for clip in clips if first in clip.rows)
        raise DatasetError(
            f"{path}: rows {first} and {second} have the times {seconds[first]:.6g} and "
            f"{seconds[second]:.6g} s in it, closer than half a frame; expected a frame for each row: "
            "correct the column timestamp (or from_timestamp in meta/episodes), or leave timestamp out."
        )


def _place(
    folder: Path, info: Mapping[str, Any], name: str, row: Mapping[str, Any]
) -> tuple[Path, float]:
    """The video of the episode that ``row`` describes, and in it the time of the beginning."""
    episode, start = int(row["episode_index"]), 0.0
    fields = {"video_key": name, "episode_index": episode}
    try:
        if f"videos/{name}/file_index" in row:  # v3.0
            for key in ("chunk_index", "file_index"):
                fields[key] = int(row[f"videos/{name}/{key}"])
            start = float(row[f"videos/{name}/from_timestamp"])
        else:
            fields["episode_chunk"] = episode // int(info.get("chunks_size", 1000))
        place = info["video_path"].format(**fields)
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise DatasetError(
            f"{folder}: the video of {name} in episode {episode} is not found by the video_path "
            f"{info['video_path']!r} of meta/info.json: {one_line(error)}; expected the fields "
            f"{', '.join(fields)}, and in meta/episodes from_timestamp. Download the dataset again."
        ) from error
    if not is_safe_relative_path(place):
        raise DatasetError(
            f"{folder}: meta/info.json leads to the video {place!r}; expected a path below the "
            "dataset's own folder. Get the dataset from its author again."
        )
    if not (folder / place).is_file():
        raise DatasetError(
            f"{folder}: the video {place} of {name}, episode {episode}, is missing; download the "
            "dataset completely."
        )
    return folder / place, start


def _episodes(folder: Path) -> list[dict[str, Any]]:
    """The descriptions of the episodes."""
    if (folder / "meta" / "episodes").is_dir():
        table = parquet_rows("meta/episodes", parquet_files(folder / "meta" / "episodes"))
        names = [name for name in table.schema.names if name.split("/")[0] in DESCRIPTION]
        cells = [table.read(name, 0, table.rows).to_pylist() for name in names]
        return [dict(zip(names, values, strict=True)) for values in zip(*cells, strict=True)]
    path = folder / "meta" / "episodes.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [_json(path, line) for line in lines if line.strip()]


def _json(path: Path, text: str) -> dict[str, Any]:
    with reading(path, "not complete JSON", ValueError):
        value = json.loads(text)
    if not isinstance(value, dict):
        raise DatasetError(f"{path}: has a {type(value).__name__}; expected an object of names.")
    return value


class _Frames:
    """Frames of videos by their time. Ascending times in one video decode each frame once."""

    _path: Path | None = None
    _frame: Any
    _following: Any

    def nearest(self, path: Path, seconds: float) -> Any:
        """The frame whose ``time`` is nearest to ``seconds``."""
        if path != self._path or seconds < self._frame.time:
            self._path, self._frames = path, _decoded(path)
            self._frame = self._following = next(self._frames)
        while self._following is not None and (
            abs(self._following.time - seconds) <= abs(self._frame.time - seconds)
        ):
            self._frame, self._following = self._following, next(self._frames, None)
        return self._frame


def _decoded(path: Path) -> Iterator[Any]:
    """The frames of a video in the order of time, at least one."""
    av = package("av", f"{path}: no decoder of videos is installed")
    errors = (av.error.FFmpegError, OSError, IndexError)
    frame = None
    with reading(path, "cannot be decoded as a video", *errors), av.open(str(path)) as container:
        for frame in container.decode(video=0):
            if frame.time is None:
                break
            yield frame
    if frame is None or frame.time is None:
        raise DatasetError(
            f"{path}: has {'no frames' if frame is None else 'frames without timestamps'}; expected a "
            "frame with a timestamp for each row: write the video again."
        )


def _rgb(frame: Any) -> NDArray[np.uint8]:
    return np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
