"""Frames of video files as a column, decoded forwards by PyAV."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from iql_torchrl.data.readers.arrays import row_range
from iql_torchrl.data.schema import DatasetError
from iql_torchrl.descriptions import one_line

__all__ = ["Clip", "VideoColumn"]


class Clip(NamedTuple):
    """Consecutive frames of one file: ``length`` frames from frame ``first`` on."""

    path: Path
    first: int
    length: int


class VideoColumn:
    """The frames of clips, one after the other, ``(rows, height, width, 3)`` uint8.

    Frames are decoded when they are asked for, in the order of the file; a frame before the last
    one is found by decoding the file again from its beginning. The last frame is kept, because
    successive slices often overlap in it. ``name`` begins messages.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, clips: Sequence[Clip], name: str) -> None:
        self._clips, self._name = list(clips), name
        self._ends = np.cumsum([clip.length for clip in clips], dtype=np.int64)
        self._row_shape: tuple[int, ...] | None = None
        self._path: Path | None = None
        self._frames: Iterator[NDArray[np.uint8]] = iter(())
        self._next = 0
        self._kept: tuple[int, Any] = (-1, None)

    @property
    def shape(self) -> tuple[int, ...]:
        if self._row_shape is None:
            self._row_shape = self._frame(0).shape
        return (int(self._ends[-1]), *self._row_shape)

    def __getitem__(self, rows: slice, /) -> NDArray[np.uint8]:
        shape = self.shape
        start, stop = row_range(rows, shape[0])
        values = np.empty((stop - start, *shape[1:]), np.uint8)
        for row in range(start, stop):
            values[row - start] = frame = self._frame(row)
            if frame.shape != shape[1:]:
                raise DatasetError(
                    f"{self._name}: the frame of row {row} has shape {frame.shape}, the first one "
                    f"{shape[1:]}; expected one size: write the videos again in one size."
                )
        return values

    def _frame(self, row: int) -> NDArray[np.uint8]:
        if self._kept[0] != row:
            number = int(np.searchsorted(self._ends, row, side="right"))
            clip = self._clips[number]
            begin = int(self._ends[number]) - clip.length
            self._kept = (row, self._decoded(clip, clip.first + row - begin))
        frame: NDArray[np.uint8] = self._kept[1]
        return frame

    def _decoded(self, clip: Clip, place: int) -> NDArray[np.uint8]:
        if clip.path != self._path or place < self._next:
            self._path, self._next = clip.path, 0
            self._frames = _frames(clip.path)
        for frame in self._frames:
            self._next += 1
            if self._next > place:
                return frame
        raise DatasetError(
            f"{clip.path}: has {self._next} frames, but the rows need frame {place}; the video is "
            "incomplete: download or copy it again."
        )


def _frames(path: Path) -> Iterator[NDArray[np.uint8]]:
    """All frames of a file in the order of time, RGB."""
    import av

    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                yield np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
    except (av.error.FFmpegError, OSError, IndexError) as error:
        raise DatasetError(
            f"{path}: cannot be decoded as a video ({one_line(error)}); download or copy it again."
        ) from error
