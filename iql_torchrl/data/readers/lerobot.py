"""LeRobot's datasets on local disk: Parquet files of steps, and videos.

Format by LeRobot's own code (``lerobot/datasets``, versions 0.3.3 and 0.4.4): ``v2.x`` has one Parquet
file and one video an episode, ``v3.0`` files with many episodes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from iql_torchrl.data.readers.arrays import Column, UnreadableColumn
from iql_torchrl.data.readers.arrow_columns import arrow_columns
from iql_torchrl.data.readers.parquet import ParquetRows, parquet_files
from iql_torchrl.data.readers.video import Clip, VideoColumn
from iql_torchrl.data.schema import DatasetError
from iql_torchrl.descriptions import one_line
from iql_torchrl.files import leads_below

__all__ = ["is_lerobot", "lerobot_columns"]

#: What is read of an episode's description.
DESCRIPTION = ("episode_index", "length", "videos")


def is_lerobot(folder: Path) -> bool:
    return (folder / "meta" / "info.json").is_file()


def lerobot_columns(folder: Path, mapping: Mapping[str, str | None]) -> dict[str, Column]:
    """The columns of a LeRobot dataset; names with dots become groups.

    ``observation.state`` and ``observation.images.top`` are the leaves ``state`` and ``images/top``
    of the observation, ``next.reward`` is the reward, and ``episode_index`` numbers the episodes. A
    picture is uint8 ``(height, width, channels)`` as stored, a frame of a video is decoded by PyAV.
    ``next.done`` marks the last step of an episode for any cause, so that it is not read as a
    termination unless ``columns`` says so.

    Raises ``DatasetError`` naming what is missing or damaged: the description, Parquet files with as
    many rows as it announces, steps within an episode, videos.
    """
    info = _json(folder / "meta" / "info.json")
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
    _check_steps(folder, columns)
    return {**columns, **_videos(folder, info, columns)}


def _check_steps(folder: Path, columns: Mapping[str, Column]) -> None:
    """Raises where a step is missing inside an episode: its row would get a wrong successor."""
    if not {"episode_index", "frame_index"} <= set(columns):
        return
    episode, step = (np.asarray(columns[k][:]).ravel() for k in ("episode_index", "frame_index"))
    begins = np.concatenate([[True], episode[1:] != episode[:-1]])
    expected = np.where(begins, 0, np.concatenate([[0], step[:-1] + 1]))
    if len(wrong := np.flatnonzero(step != expected)):
        row = int(wrong[0])
        raise DatasetError(
            f"{folder}: frame_index is {step[row]} at row {row} (episode {episode[row]}), where "
            f"{expected[row]} is expected; steps are missing or out of order: download the dataset "
            "again."
        )


def _videos(folder: Path, info: Mapping[str, Any], columns: Mapping[str, Column]) -> dict[str, Any]:
    """A column for each feature that is stored as videos."""
    features = info.get("features", {})
    names = [name for name, feature in features.items() if feature.get("dtype") == "video"]
    if not names:
        return {}
    reason = _unreadable(info, names)
    if reason is not None:
        leaf = _leaf(columns)
        text = (
            f"{folder.name}: {reason}, or leave them out with columns={{'observation': {leaf!r}}}."
        )
        return {name.replace(".", "/"): UnreadableColumn(text) for name in names}
    rows = _episodes(folder, columns)
    return {
        name.replace(".", "/"): VideoColumn(
            [_clip(folder, info, name, row) for row in rows], f"{folder.name}: {name}"
        )
        for name in names
    }


def _unreadable(info: Mapping[str, Any], names: list[str]) -> str | None:
    """Why the videos cannot be decoded, and what to do; None if they can."""
    features = info["features"]
    depth = [name for name in names if _is_depth(features[name])]
    if depth:
        return f"{', '.join(depth)} are videos of depth, which are not read: convert them to arrays"
    stored = f"{', '.join(names)} are stored as videos"
    if find_spec("av") is None:
        return f'{stored}, and no decoder is installed: pip install "iql_torchrl[readers]"'
    if not (isinstance(info.get("video_path"), str) and info.get("fps")):
        return f"{stored}, but meta/info.json has no video_path or fps: download it again"
    return None


def _is_depth(feature: Mapping[str, Any]) -> bool:
    described = [feature, feature.get("info") or {}, feature.get("video_info") or {}]
    return any(part.get("is_depth_map") or part.get("video.is_depth_map") for part in described)


def _leaf(columns: Mapping[str, Column]) -> str:
    leaves = [name for name in columns if name.startswith("observation/")]
    return (leaves[0] if leaves else "observation/state").replace("/", ".", 1)


def _clip(folder: Path, info: Mapping[str, Any], name: str, row: Mapping[str, Any]) -> Clip:
    """Where the frames of one episode are."""
    episode, length = int(row["episode_index"]), int(row["length"])
    fields = {"video_key": name, "episode_index": episode}
    start = 0
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
    path = folder / place
    if not path.is_file():
        raise DatasetError(
            f"{folder}: the video {path.relative_to(folder)} of {name}, episode {episode}, is missing; "
            "download the dataset completely."
        )
    return Clip(path, start, length)


def _episodes(folder: Path, columns: Mapping[str, Column]) -> list[dict[str, Any]]:
    """The descriptions of the episodes, in the order of their rows."""
    rows: list[dict[str, Any]] = []
    if (folder / "meta" / "episodes").is_dir():
        for path in parquet_files(folder / "meta" / "episodes"):
            table = ParquetRows(path.name, [path])
            chosen = [name for name in table.schema.names if name.split("/")[0] in DESCRIPTION]
            cells = {name: table.read(name, 0, table.rows).to_pylist() for name in chosen}
            rows.extend({name: cells[name][i] for name in chosen} for i in range(table.rows))
    elif (path := folder / "meta" / "episodes.jsonl").is_file():
        lines = path.read_text().splitlines()
        rows = [_parsed(path, line) for line in lines if line.strip()]
    episode = np.asarray(columns["episode_index"][:]).ravel()
    begins = np.flatnonzero(np.concatenate([[True], episode[1:] != episode[:-1]]))
    lengths = np.diff(np.concatenate([begins, [len(episode)]]))
    described = {row.get("episode_index"): row for row in rows}
    ordered = [described.get(int(number), {}) for number in episode[begins]]
    for number, length, row in zip(episode[begins], lengths, ordered, strict=True):
        if row.get("length") != length:
            raise DatasetError(
                f"{folder}: episode {number} has {length} rows, and the length "
                f"{row.get('length', 'of no episode')} in meta/episodes (or episodes.jsonl), by which "
                "frames of videos are found; download the dataset again."
            )
    return ordered


def _json(path: Path) -> dict[str, Any]:
    return _parsed(path, path.read_text())


def _parsed(path: Path, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise DatasetError(
            f"{path}: not complete JSON ({one_line(error)}); download or copy it again."
        ) from error
    if not isinstance(value, dict):
        raise DatasetError(f"{path}: has a {type(value).__name__}; expected an object of names.")
    return value
