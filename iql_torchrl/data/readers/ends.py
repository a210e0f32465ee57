"""What columns say about ends of episodes: done flags, gaps of time, rows of autoresets."""

from __future__ import annotations

from typing import Any

import numpy as np

from iql_torchrl.data.readers.arrays import Columns, Flags, text_seconds
from iql_torchrl.data.readers.columns import FLAGS
from iql_torchrl.data.readers.hints import leading_values, steps_of
from iql_torchrl.data.readers.options import ReadOptions
from iql_torchrl.data.schema import DatasetError

#: A gap ends an episode if it is longer than so many usual steps: where most steps of time are equal
#: (within 1 %), and where they are not.
REGULAR_GAP, IRREGULAR_GAP = 1.5, 20.0


def read_flags(columns: Columns) -> dict[str, Flags]:
    """Each of ``FLAGS`` as bool ``(rows,)``; rows are valid, and nothing else, where it is missing."""
    flags, name, paths = dict[str, Flags](), columns.name, columns.paths
    for key in FLAGS:
        if key not in columns.columns:
            flags[key] = np.full(columns.rows, key == "valid")
            continue
        values = np.ravel(columns.columns[key][:])
        if (wrong := (values != 0) & (values != 1)).any():
            raise DatasetError(
                f"{name}: {key} ({paths[key]!r}) has {values[wrong][0]} in {columns.place_of(wrong)}, "
                "with other values than 0 and 1; expected 0 or 1."
            )
        flags[key] = values.astype(np.bool_)
    if "not_terminated" in paths:
        opposite = ~flags["not_terminated"]
        differ = flags["terminated"] != opposite
        if "terminated" in paths and differ.any():
            first, second = paths["not_terminated"], paths["terminated"]
            raise DatasetError(
                f"{name}: {first!r} (0 where a row terminates) and {second!r} (1 there) disagree in "
                f"{columns.place_of(differ)}; choose one with columns={{'terminated': {second!r}}} or "
                f"columns={{'not_terminated': {first!r}, 'terminated': None}}."
            )
        flags["terminated"] = opposite
    return flags


def time_gaps(columns: Columns, inside: Flags) -> tuple[Flags, list[str]]:
    """Rows after which ``time`` has a gap or goes back inside episodes, ``(rows,)``; and notes.

    Raises ``DatasetError`` where it goes back after most rows.

    A gap is a step of more than 1.5 usual (median) ones where most steps are equal, and of more than
    20 where they are not. ``inside``: rows that do not end an episode.
    """
    subject = f"time ({columns.paths['time']!r})"
    raw: Any = np.asarray(columns.columns["time"][:]).reshape(-1)
    if raw.dtype.kind in "UO":
        text, raw = raw[0], text_seconds(raw.tolist())
        if raw is None:
            raise DatasetError(
                f"{columns.name}: {subject} has text that is not a date of ISO 8601, such as "
                f"{text!s}; convert it to numbers, or pass columns={{'time': None}}."
            )
    if raw.dtype.kind in "mM":
        raw = (raw - raw[0]) / np.timedelta64(1, "s")
    times = raw.astype(np.float64)
    if (unknown := ~np.isfinite(times)).any():
        raise DatasetError(
            f"{columns.name}: {subject} is missing in {columns.place_of(unknown)}; expected a time in "
            "every row, or columns={'time': None}."
        )
    step, inside, notes = np.append(np.diff(times), 0), inside.copy(), list[str]()
    inside[-1] = False
    if 2 * int((backwards := inside & (step < 0)).sum()) > int((inside & (step != 0)).sum()):
        raise DatasetError(
            f"{columns.name}: {subject} goes back inside episodes, after "
            f"{columns.place_of(backwards)}; expected rows in the order of time: sort them by episode "
            "and time, or pass columns={'time': None} if the column is not the time of the step."
        )
    if not (usual := step[inside & (step > 0)]).size:
        return np.zeros_like(inside), []
    middle = float(np.median(usual))
    regular = (np.abs(usual - middle) <= 0.01 * middle).mean() >= 0.5
    limit = (REGULAR_GAP if regular else IRREGULAR_GAP) * middle
    gap, back = inside & (step > limit), inside & (step < 0)
    gap_text = f"has gaps of more than {limit:g} (a usual step is {middle:g})"
    for where, text in ((gap, gap_text), (back, "goes back")):
        if where.any():
            notes.append(
                f"{subject} {text} after {int(where.sum())} rows inside episodes, first after "
                f"row {columns.source_row(int(where.argmax()))}: episodes are truncated there. "
                "columns={'time': None} ignores the column."
            )
    return gap | back, notes


def reset_rows(
    columns: Columns, ended: Flags, broken: Flags | None, options: ReadOptions
) -> tuple[Flags, list[str]]:
    """Rows that a vector environment wrote in the step after an episode's end, ``(rows,)``.

    Gymnasium's vector environments (1.0 and later, by default) reset in that step: its row leads from
    the last observation to the first one of the next episode, its action is ignored, its reward is 0.
    Recognised if every ended row's next observation is known and the following row's observation,
    whose row has no reward and does not end, while most other rows have rewards, and if the observation
    jumps over these rows. Else there is a warning if 99 % of the other rows have rewards.
    ``autoreset=True`` takes every row after an end. With ``reward_offset`` the reward of that row is
    not for its action.
    """
    after, none = np.append(False, ended[:-1]), np.zeros_like(ended)
    rewarded = np.asarray(columns.columns["next/reward"][:]).reshape(-1) != 0
    wrong, usual, count = rewarded & after, float(rewarded[~after].mean()), int(ended.sum())
    if options.autoreset:
        text = (
            f"autoreset=True dropped {count} rows, of which {int(wrong.sum())} have rewards, first at "
            f"row {columns.source_row(int(wrong.argmax()))}; the step that resets a vector environment "
            "has the reward 0. If these rows are transitions, pass autoreset=False."
        )
        return after, [text] if wrong.any() else []
    if options.reward_offset or wrong.any() or (after & ended).any() or usual < 0.5:
        return none, []
    if broken is not None and (count < 2 or (broken & ended[:-1]).any()):
        return none, []
    if broken is not None and not _unknown(columns, ended) and _jumps(columns, after):
        return after, []
    # a warning of the reader explains such rewards: d3rlpy before 1.1 moved them by one row
    if usual < 0.99 or count < 3 or columns.warnings:
        return none, []
    return none, [
        f"the rows after all {count} ends of episodes have reward 0, and hardly any other "
        "row: they look like rows that a vector environment wrote when it reset itself, whose actions "
        "were ignored. Pass autoreset=True to drop them, or autoreset=False if they are steps."
    ]


def _unknown(columns: Columns, ended: Flags) -> bool:
    """Return whether the next observation of an ended row is NaN."""
    parts = [np.asarray(column[:])[ended] for column in columns.leaves("next/observation").values()]
    return any(part.dtype.kind == "f" and bool(np.isnan(part).any()) for part in parts)


def _jumps(columns: Columns, rows: Flags) -> bool:
    """Return whether the observation jumps from ``rows`` to the next ones, or cannot be compared.

    The median step there is longer than nine tenths of the others.
    """
    values = leading_values(columns.leaves("observation"))
    here = rows[: max(0, len(values) - 1)]
    steps = steps_of(values, here)
    if steps is None or not here.any():
        return True
    return bool(np.median(steps.length[here]) > np.quantile(steps.length[~here], 0.9))
