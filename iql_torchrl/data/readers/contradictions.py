"""Exact contradictions between the flags of rows, their ids, and their next observations."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from iql_torchrl.data.readers.arrays import Columns
from iql_torchrl.data.readers.columns import IDS
from iql_torchrl.data.readers.following import SAMPLE, differs, found_among

Flags = NDArray[np.bool_]
#: In sources of up to so many rows, or episodes, nothing is said about what most of them are.
MANY = 20
#: Share of rows above which a statement about them is made.
MOST = 0.9
#: Rows that are compared to find out what wrong next observations are.
LOOKED_AT = 32_768
#: Keys of columns that show where episodes end.
ENDS = ("truncated", "trajectory_end", "valid", "time", *IDS)


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
        known = any(key in paths for key in ENDS)
        inside = flags["valid"][:-1] & ~(last if known else flags["terminated"])[:-1]
        if (breaks := broken & inside).any():
            texts += _breaks_inside(columns, inside, breaks, last[:-1] & ~broken, known)
    remedy = (
        "check which column has the done flags and whether it is 1 where an episode ends "
        "(columns={...} names it)."
    )
    rows, remaining = int(flags["valid"].sum()), int(lengths.sum())
    single = int((lengths == 1).sum())
    flagged = (last & (flags["terminated"] | flags["truncated"])).sum()
    if rows > MANY and 2 * remaining < rows:
        texts.append(f"only {remaining} of {rows} rows make transitions, see the notes: {remedy}")
    elif (
        not texts
        and len(lengths) > MANY
        and 2 * single > len(lengths)
        and 2 * flagged <= last.sum()
    ):
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
    """Most rows break: what the next observations seem to be."""
    observed, following = columns.leaves("observation"), columns.leaves("next/observation")
    reason = "the next observations may be shifted, in another scale, or of other rows"
    for ahead, meaning in (
        (0, "the same row's observation: they are copies, or shifted by one row to the end"),
        (2, "the observation two rows later: they are shifted by one row to the beginning"),
    ):
        equal = ~differs(observed, following, min(LOOKED_AT, len(inside)), ahead)
        rows = inside[: len(equal)]
        if 2 * (equal & rows).sum() > rows.sum():
            reason = f"{(equal & rows).sum()} of {rows.sum()} rows looked at contain {meaning}"
            break
    else:
        # Of shuffled rows, the leading next observations are as often among the leading observations.
        if found_among(observed, following) > 0.5 * min(1.0, SAMPLE / columns.rows):
            return (
                "the rows are not in the order of time, as shuffled transitions are. Each transition "
                "is used as it stands, but lengths and returns of episodes have no meaning."
            )
    return (
        f"{reason}. Repair the column, or pass columns={{'next_observation': None}} to use the "
        "following rows."
    )
