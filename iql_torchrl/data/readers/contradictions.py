"""What flags, ids and next observations contradict; hints from distances are in ``hints``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iql_torchrl.data.readers.arrays import Column, Columns, Flags
from iql_torchrl.data.readers.columns import IDS
from iql_torchrl.data.schema import Key
from iql_torchrl.tolerance import EQUAL, rounding

#: In sources of up to so many rows, or episodes, nothing is said about what most of them are.
MANY = 20
#: Share of rows above which a statement about them is made.
MOST = 0.9
#: Most rows that are compared to find out what wrong next observations are; most numbers of a column
#: that are compared at once; and how many leading rows tell the spread of a column.
LOOKED_AT, VALUES, SAMPLE = 32_768, 2**22, 4096


def contradictions(
    columns: Columns, flags: Mapping[str, Flags], last: Flags, broken: Flags | None,
    lengths: NDArray[np.int64],
) -> list[str]:  # fmt: skip
    """Sentences on what cannot be right; empty if there is nothing.

    ``broken``: rows whose next observation is not the following row's observation, if known; ``last``:
    last rows of episodes; ``lengths``: of the episodes' transitions.
    """
    paths, texts = columns.paths, list[str]()
    if "trajectory_end" in paths and not {"terminated", "not_terminated"} & paths.keys():
        path = paths["trajectory_end"]
        texts.append(
            f"no column says which rows terminate: together with {paths['valid']!r}, {path!r} "
            "ends trajectories, and all of them were read as truncated. Add 'masks' (0 where a "
            f"row terminates), or pass columns={{'terminated': None, 'truncated': {path!r}}} if none "
            "does."
        )
    elif 3 * int(flags["terminated"].sum()) > columns.rows:
        texts += _opposite(columns, flags, last, broken)
    if broken is not None:
        known = {"truncated", "trajectory_end", "valid", "time", *IDS} & paths.keys()
        inside = flags["valid"][:-1] & ~(last if known else flags["terminated"])[:-1]
        if (breaks := broken & inside).any():
            texts += _breaks_inside(columns, inside, breaks, last[:-1] & ~broken, bool(known))
    remedy = (
        "check which column has the done flags and whether it is 1 where an episode ends "
        "(columns={...} names it)."
    )
    rows, remaining = int(flags["valid"].sum()), int(lengths.sum())
    single = int((lengths == 1).sum())
    flagged = (last & (flags["terminated"] | flags["truncated"])).sum()
    if rows > MANY and 2 * remaining < rows:
        texts.append(f"only {remaining} of {rows} rows make transitions, see the notes: {remedy}")
    elif not texts and 2 * single > len(lengths) > MANY and 2 * flagged <= last.sum():
        texts.append(f"{single} of {len(lengths)} episodes have one row: {remedy}")
    return texts


def _opposite(
    columns: Columns, flags: Mapping[str, Flags], last: Flags, broken: Flags | None
) -> list[str]:
    """Nearly all rows terminate, although the following rows continue their trajectories."""
    key, other = "terminated", "not_terminated"
    if other in columns.paths:
        key, other = other, key
        going_on = flags["valid"] & ~last
    elif broken is not None and not flags["terminated"].all():  # as those of a bandit
        going_on = np.append(~broken, False)
    else:
        return []
    ends = flags["terminated"][going_on]
    if len(ends) <= MANY or 2 * len(ends) < columns.rows or ends.mean() <= MOST:
        return []
    sides = columns.leaves("observation"), columns.leaves("next/observation")
    if broken is not None and differs(*sides, LOOKED_AT, 7).mean() < 0.8:
        return []  # few states: rows equal each other by chance
    path = columns.paths[key]
    return [
        f"{path!r} says that {ends.mean():.0%} of the rows terminate that the following row continues: "
        f"it may mean the opposite. columns={{{other!r}: {path!r}}} reads it in this way."
    ]


def _breaks_inside(
    columns: Columns, inside: Flags, breaks: Flags, flagged: Flags, known: bool
) -> list[str]:
    """Rows ``inside`` episodes whose ``next_observation`` is not the following row's: ``breaks``.

    ``flagged``: ends of episodes that do not break. ``known``: a column says where episodes end.
    """
    count, total = int(breaks.sum()), int(inside.sum())
    text = (
        f"next_observation ({columns.paths['next_observation']!r}) is not the following row's "
        f"observation in {count} "
    )
    if 2 * count > total:
        return [f"{text}of {total} rows inside episodes: {_unrelated(columns, inside)}"]
    if not known:  # episodes were cut where rows break
        return []
    text += f"rows inside episodes, first at row {columns.source_row(int(breaks.argmax()))}: "
    if {*IDS} & columns.paths.keys():
        return [
            f"{text}rows may be missing there, or be in another order. Each transition is used as it "
            "stands; windows of observations and chunks of actions need rows that follow each other."
        ]
    why = "done flags are missing there"
    if count == 1:
        why = (
            "a done flag is missing there, or it is where a ring buffer overwrote its oldest rows "
            "(begin the table with the row after it)"
        )
    for shift, place in ((-1, "after"), (1, "before")):
        if (np.roll(flagged, shift) & breaks).sum() >= MOST * count:
            why = f"the done flags are shifted: each lies one row {place} such a row"
    return [
        f"{text}{why}. Flag those rows as truncated or terminated; where no termination is missing, "
        "columns={'truncated': None} ends episodes at such rows."
    ]


def _unrelated(columns: Columns, inside: Flags) -> str:
    """Most rows break: what the next observations seem to be, and a remedy."""
    observed, following = columns.leaves("observation"), columns.leaves("next/observation")
    remedy = (
        "Repair the column, or pass columns={'next_observation': None} to use the following rows."
    )
    for ahead, meaning in (
        (0, "the same row's observation: they are copies, or shifted by one row to the end"),
        (2, "the observation two rows later: they are shifted by one row to the beginning"),
    ):
        equal = ~differs(observed, following, min(LOOKED_AT, len(inside)), ahead)
        rows = inside[: len(equal)]
        count = int((equal & rows).sum())
        if 2 * count > rows.sum():
            return f"{count} of {rows.sum()} rows looked at contain {meaning}. {remedy}"
    # Of shuffled rows, the leading next observations are as often among the leading observations.
    known = set(map(bytes, _leading(observed, np.float32)))
    sides = _leading({key: following[key] for key in observed}, np.float32)
    if np.mean([bytes(row) in known for row in sides]) > 0.5 * min(1.0, SAMPLE / columns.rows):
        return (
            "the rows are not in the order of time, as shuffled transitions are. Each transition "
            "is used as it stands, but lengths and returns of episodes have no meaning."
        )
    return f"the next observations may be shifted, in another scale, or of other rows. {remedy}"


# -- comparison of next observations with the observations of other rows


def differs(
    observed: Mapping[Key, Column], following: Mapping[Key, Column], steps: int, ahead: int = 1
) -> Flags:
    """True where ``following`` is not ``observed`` so many rows ``ahead``, in leading ``steps`` rows.

    The norm of the difference is above ``tolerance.EQUAL``; columns of a standard deviation below 1
    are divided by their standard deviation. Entries that differ by rounding of the less precise dtype
    are equal, and so is NaN, which is reported elsewhere.
    """
    with np.errstate(invalid="ignore"):
        units = [_leading({(): column}, np.float64).std(axis=0) for column in observed.values()]
    size = max(1, min(65_536, VALUES // max(map(len, units))))
    gap = np.zeros(max(0, min(steps, next(iter(observed.values())).shape[0] - ahead)))
    # columns of one chunk often lie in the same part of a file
    for start in range(0, len(gap), size):
        stop = min(start + size, len(gap))
        for (key, column), unit in zip(observed.items(), units, strict=True):
            later = np.asarray(column[start + ahead : stop + ahead]).reshape(stop - start, -1)
            after = np.asarray(following[key][start:stop]).reshape(stop - start, -1)
            relative = rounding(later.dtype, after.dtype)
            unequal = (later != after).any(axis=1)  # few rows, and the rest is slow
            later, after = (part[unequal].astype(np.float64) for part in (later, after))
            with np.errstate(invalid="ignore"):
                difference = np.abs(later - after)
                difference[difference <= relative * np.abs(later)] = 0
                difference /= np.where((unit > 0) & (unit < 1), unit, 1)
                gap[start:stop][unequal] += np.square(difference).sum(1)
    return np.asarray(np.sqrt(np.nan_to_num(gap)) > EQUAL)


def _leading(columns: Mapping[Key, Column], dtype: Any) -> NDArray[Any]:
    """The leading rows of all columns, flattened: ``(rows, numbers)``."""
    parts = [np.asarray(column[:SAMPLE], dtype) for column in columns.values()]
    return np.hstack([part.reshape(len(part), -1) for part in parts])
