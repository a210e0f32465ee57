"""LeRobot's datasets on local disk: Parquet files of steps, and videos.

Format by LeRobot's own code (``lerobot/datasets``, versions 0.3.3 and 0.4.4): ``v2.x`` has one Parquet
file and one video an episode, ``v3.0`` files with many episodes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from iql_torchrl.data.readers.arrays import Column, PartsColumn, UnreadableColumn, package, reading
from iql_torchrl.data.readers.arrow import PART_BYTES, arrow_columns
from iql_torchrl.data.readers.parquet import ParquetRows, parquet_files
from iql_torchrl.data.schema import DatasetError
from iql_torchrl.files import leads_below

#: What is read of an episode's description.
DESCRIPTION = ("episode_index", "length", "videos")
#: Consecutive frames of a file: its path, the number of the first one, and how many.
Clip: TypeAlias = tuple[Path, int, int]


def lerobot_columns(folder: Path, mapping: Mapping[str, str | None]) -> dict[str, Column]:
    """The columns of a LeRobot dataset; names with dots become groups.

    ``observation.state`` and ``observation.images.top`` are the leaves ``state`` and ``images/top``
    of the observation, ``next.reward`` is the reward, and ``episode_index`` numbers the episodes. A
    picture is uint8 ``(height, width, channels)`` as stored, a frame of a video is decoded by PyAV.
    ``next.done`` marks the last step of an episode for any cause, so that it is not read as a
    termination unless ``columns`` says so.

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
    table = ParquetRows(folder.name, files, folder)
    announced = info.get("total_frames")
    if isinstance(announced, int) and announced != table.rows:
        raise DatasetError(
            f"{folder}: its Parquet files have {table.rows} rows, but meta/info.json announces "
            f"{announced}; the copy is incomplete, or old files are left in it: download it again."
        )
    columns = arrow_columns(table, mapping)
    if {"episode_index", "frame_index"} <= set(columns):
        _check_steps(folder, *(np.ravel(columns[k][:]) for k in ("episode_index", "frame_index")))
    for name, feature in info.get("features", {}).items():
        if feature.get("dtype") == "video":
            try:
                clips = _clips(folder, info, name, np.ravel(columns["episode_index"][:]))
                column = _video(clips, f"{folder.name}: {name}")
            except DatasetError as error:  # only an error if the column is used
                leaf = next(
                    (k for k in columns if k.startswith("observation/")), "observation/state"
                )
                column = UnreadableColumn(
                    f"{str(error).rstrip('.')}; or leave {name} out, as with "
                    f"columns={{'observation': {leaf.replace('/', '.', 1)!r}}}."
                )
            columns[name.replace(".", "/")] = column
    return columns


def _check_steps(folder: Path, episode: NDArray[Any], step: NDArray[Any]) -> None:
    """Raises where a step is missing inside an episode: its row would get a wrong successor."""
    begins = np.concatenate([[True], episode[1:] != episode[:-1]])
    expected = np.where(begins, 0, np.concatenate([[0], step[:-1] + 1]))
    if len(wrong := np.flatnonzero(step != expected)):
        row = int(wrong[0])
        raise DatasetError(
            f"{folder}: frame_index is {step[row]} at row {row} (episode {episode[row]}), where "
            f"{expected[row]} is expected; steps are missing or out of order: download the dataset "
            "again."
        )


def _clips(folder: Path, info: Mapping[str, Any], name: str, episode: NDArray[Any]) -> list[Clip]:
    """The frames of each episode, in the order of the rows."""
    feature = info["features"][name]
    described = [feature, feature.get("info") or {}, feature.get("video_info") or {}]
    if any(part.get("is_depth_map") or part.get("video.is_depth_map") for part in described):
        raise DatasetError(
            f"{folder.name}: {name} is a video of depth, which is not read: convert it to arrays."
        )
    if not (isinstance(info.get("video_path"), str) and info.get("fps")):
        raise DatasetError(
            f"{folder.name}: {name} is stored as videos, but meta/info.json has no video_path or fps: "
            "download it again."
        )
    rows = {row.get("episode_index"): row for row in _episodes(folder)}
    begins = np.flatnonzero(np.concatenate([[True], episode[1:] != episode[:-1]]))
    lengths = np.diff([*begins, len(episode)])
    clips = []
    for number, length in zip(episode[begins].tolist(), lengths.tolist(), strict=True):
        row = rows.get(number, {})
        if row.get("length") != length:
            raise DatasetError(
                f"{folder}: episode {number} has {length} rows, and the length "
                f"{row.get('length', 'of no episode')} in meta/episodes (or episodes.jsonl), by which "
                "frames of videos are found; download the dataset again."
            )
        clips.append((*_place(folder, info, name, row), length))
    return clips


def _place(
    folder: Path, info: Mapping[str, Any], name: str, row: Mapping[str, Any]
) -> tuple[Path, int]:
    """The file, and in it the first frame, of the episode that ``row`` describes."""
    episode, start = int(row["episode_index"]), 0
    fields = {"video_key": name, "episode_index": episode}
    if f"videos/{name}/file_index" in row:  # v3.0
        fields["chunk_index"] = int(row[f"videos/{name}/chunk_index"])
        fields["file_index"] = int(row[f"videos/{name}/file_index"])
        start = round(float(row[f"videos/{name}/from_timestamp"]) * float(info["fps"]))
    else:
        fields["episode_chunk"] = episode // int(info.get("chunks_size", 1000))
    try:
        place = info["video_path"].format(**fields)
    except (KeyError, IndexError, ValueError) as error:
        raise DatasetError(
            f"{folder}: meta/info.json has the video_path {info['video_path']!r}, which names the "
            f"unknown field {error}; expected one of {', '.join(fields)}."
        ) from error
    if not leads_below(place):
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
        table = ParquetRows("meta/episodes", parquet_files(folder / "meta" / "episodes"))
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


def _video(clips: Sequence[Clip], name: str) -> Column:
    """The frames of clips, one after the other, ``(rows, height, width, 3)`` uint8."""
    shape = next(_decoded(clips[0][0]), np.zeros(1, np.uint8)).shape
    most = max(1, PART_BYTES // int(np.prod(shape)))
    parts = [
        (path, first + done, min(most, length - done))
        for path, first, length in clips
        for done in range(0, length, most)
    ]
    frames: Iterator[NDArray[np.uint8]] = iter(())
    place: tuple[Path | None, int] = (None, 0)  # of the next frame

    def part(number: int) -> NDArray[np.uint8]:
        nonlocal frames, place
        path, first, length = parts[number]
        if place != (path, first):
            frames = islice(_decoded(path), first, None)
        values, place = list(islice(frames, length)), (path, first + length)
        if len(values) < length:
            raise DatasetError(
                f"{path}: ends before frame {first + len(values)}, which the rows need; the video is "
                "incomplete: download or copy it again."
            )
        if any(frame.shape != shape for frame in values):
            raise DatasetError(
                f"{name}: {path} has frames of shape {values[0].shape}, the first video {shape}; "
                "expected one size: write the videos again in one size."
            )
        return np.stack(values)

    return PartsColumn([length for *_, length in parts], part, shape, np.uint8)


def _decoded(path: Path) -> Iterator[NDArray[np.uint8]]:
    """All frames of a file in the order of time, RGB."""
    av = package("av", f"{path}: no decoder of videos is installed")
    errors = (av.error.FFmpegError, OSError, IndexError)
    with reading(path, "cannot be decoded as a video", *errors), av.open(str(path)) as container:
        for frame in container.decode(video=0):
            yield np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
