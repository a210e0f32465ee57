"""Warnings that episode boundaries are wrong; they never change what is read.

Contradictions are exact: next observations that are not the next rows' observations. Hints compare the
distance between consecutive observations with that of random pairs (``readers.distances``).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from iql_torchrl.data.readers.arrays import Column, Columns, UnreadableColumn
from iql_torchrl.data.readers.columns import IDS
from iql_torchrl.data.readers.distances import (
    PAIRS,
    Flags,
    Steps,
    differs,
    leading_values,
    rank,
    steps_of,
)

#: In sources of up to so many rows, or episodes, nothing is said about what most of them are.
MANY = 20
#: Share of rows above which a statement about them is made; fewest ends or jumps of a hint.
MOST, FEWEST = 0.9, 3
#: Most rows that are compared to find out what wrong next observations are.
LOOKED_AT = 32_768
#: Columns that often contain done flags, in sources that have no column of our names for them.
POSSIBLE_FLAGS = (
    "episode_terminals", "dones", "done", "next/done", "dones_float", "terminals", "timeouts",
    "timeout", "is_last", "episode_ends",
)  # fmt: skip


# -- what cannot be right


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
        known = bool({"truncated", "trajectory_end", "valid", "time", *IDS} & paths.keys())
        inside = flags["valid"][:-1] & ~(last if known else flags["terminated"])[:-1]
        texts += _breaks_inside(columns, inside, broken & inside, last[:-1] & ~broken, known)
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
    if not (known and count):  # episodes were cut where rows break
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
    here, after = (
        np.hstack(
            [
                np.asarray(side[key][:PAIRS], "f4").reshape(min(PAIRS, columns.rows), -1)
                for key in observed
            ]
        )
        for side in (observed, following)
    )
    known = set(map(bytes, here))
    if np.mean([bytes(row) in known for row in after]) > 0.5 * len(here) / columns.rows:
        return (
            "the rows are not in the order of time, as shuffled transitions are. Each transition "
            "is used as it stands, but lengths and returns of episodes have no meaning."
        )
    return f"the next observations may be shifted, in another scale, or of other rows. {remedy}"


# -- what is unlikely


def boundary_hints(
    columns: Columns, terminated: Flags, last: Flags, broken: Flags | None
) -> list[str]:
    """Sentences about episode boundaries that the observations contradict; empty if there are none.

    ``terminated``: rows that terminate; ``last``: rows that end an episode; ``broken``: rows whose next
    observation is not the next row's observation, if known. Where ids end the episodes only autoreset
    is hinted at. There are no hints where consecutive rows are hardly nearer than random pairs, or
    every row terminates, as in a bandit.
    """
    ids = bool({*IDS} & columns.paths.keys())
    values = leading_values(columns.leaves("observation"))
    steps = steps_of(values, last[: max(0, len(values) - 1)])
    if steps and rank(steps.inside, steps.unrelated) > 0.35:
        steps = None
    zero = np.ravel(np.asarray(columns.columns["next/reward"][:])) == 0
    env = np.ravel(columns.columns.get("env_index", zero & False)[:])
    ends = np.flatnonzero(last[:-1] & (env[1:] == env[:-1]))
    others = np.delete(zero, ends + 1).mean()
    count = int((zero & ~np.append(last[:-1], False))[ends + 1].sum())  # a reset ends no episode
    later = steps is not None and steps.longer_at(1)
    resets = len(ends) >= FEWEST and count >= 0.9 * len(ends)
    # a warning of the reader explains that no other rewards are 0
    rare = broken is None and others <= 0.01 and not columns.warnings
    if resets and (rare or (later and others < 0.5)):
        return [
            f"the rows after {count} of the {len(ends)} ends of episodes have reward 0, as "
            f"{'hardly any other row has' if rare else 'resets have, and then the observation jumps'}: "
            "these rows look like resets of a vector environment with autoreset, which ignores their "
            "action. Pass autoreset=True to drop them, or autoreset=False if they are steps."
        ]
    if steps is None or (terminated.all() and not ids):
        return []
    terminates = terminated[: len(steps.ended)]
    # a next observation that is not the next row's proves an end
    same = np.ones_like(steps.ended) if broken is None else ~broken[: len(steps.ended)]
    if broken is not None and (text := _first_of_next(steps, same, terminates)):
        return [text]
    if ids:
        return []
    if later or steps.longer_at(-1):
        where, move = ("before", "later") if later else ("after", "earlier")
        remedy = "; or pass autoreset=True if they are resets of a vector environment" * (
            later and resets
        )
        return [
            f"the flags of the {len(ends)} ends of episodes are shifted: each lies one row {where} a "
            f"row after which the observation jumps. Set them one row {move}{remedy}."
        ]
    texts = [
        _continued(steps, steps.ended & kind, same, key, columns.paths)
        for key, kind in (("terminated", terminates), ("truncated", ~terminates))
    ]
    if not any(texts) and broken is None:
        texts = [_jumps(steps, len(last), columns.unused)]
    return [text for text in texts if text]


def _first_of_next(steps: Steps, same: Flags, terminates: Flags) -> str:
    """A sentence if the next observations of most ends are the first ones of the next episodes."""
    ends, found = int(steps.ended.sum()), steps.ended & same
    count = int(found.sum())
    if count < max(FEWEST, ends / 2) or not (found & ~terminates).any():
        return ""
    if rank(steps.length[found], steps.inside) <= 0.8:
        return ""
    return (
        f"next_observation of {count} of the {ends} rows that end episodes is the following row's "
        "observation, to which the observation jumps: a vector environment that resets itself in the "
        "same step returns the first observation of the next episode there, from which truncated "
        "rows bootstrap. Record infos['final_obs'] of those rows as their next observation, or pass "
        "columns={'next_observation': None}, which drops the truncated ones."
    )


def _continued(steps: Steps, ended: Flags, same: Flags, key: str, names: Mapping[str, str]) -> str:
    """A sentence if the rows after three quarters of the ends continue their episodes.

    Their steps are ordinary, and mostly shorter than the distances of random pairs.
    """
    lengths, ordinary = steps.length[ended], np.quantile(steps.inside, [0.9, 0.99])
    found = int((same[ended] & (lengths <= min(2 * ordinary[0], ordinary[1]))).sum())
    if found < max(FEWEST, 0.75 * len(lengths)) or rank(lengths, steps.unrelated) > 0.4:
        return ""
    keys = ("terminated", "not_terminated") if key == "terminated" else (key, "trajectory_end")
    path = next((names[k] for k in keys if k in names), "max_episode_steps")
    remedy = f"{path!r} may be wrong; if recording was cut there on purpose, ignore this warning."
    if key == "terminated":
        remedy = (
            f"If {path!r} only flags where recording was cut, pass columns={{'terminated': None, "
            f"'truncated': {path!r}}}; if it is 0 where a row terminates, columns={{'not_terminated': "
            f"{path!r}}}; if episodes do continue there, name their ids: columns={{'episode': ...}}."
        )
    return (
        f"{found} of the {len(lengths)} rows flagged {key} ({path!r}) are followed by a row that "
        f"continues the same episode. {remedy}"
    )


def _jumps(steps: Steps, rows: int, unused: Mapping[str, Column]) -> str:
    """A sentence if the observation jumps inside episodes as it does at their ends.

    A jump is longer than a tenth of the random pairs, and than the longest of so many steps with an
    exponential tail. Rows after an end are left out: first steps often are long. A third of the ends
    must jump, and a quarter as many rows inside.
    """
    middle, high = np.quantile(steps.inside, [0.5, 0.9])
    longest = high + (high - middle) * np.log(len(steps.length) / 10) / np.log(5)
    jumps = steps.length > max(longest, np.quantile(steps.unrelated, 0.1))
    ends, at_ends = int(steps.ended.sum()), int((jumps & steps.ended).sum())
    jumps &= ~(steps.ended | np.append(False, steps.ended[:-1]))
    if 3 * at_ends < ends or jumps.sum() < max(FEWEST, at_ends / 4):
        return ""
    why = "done flags are missing there" if ends else f"all {rows:,} rows were read as one episode"
    text = (
        f"the observation jumps in {jumps.sum()} rows inside episodes (of {len(steps.values):,} looked "
        f"at), first at row {int(jumps.argmax())}: {why}. Flag them as truncated or terminated, or "
        "name a column of flags or ids: columns={'truncated': ...} or columns={'episode': ...}."
    )
    for name, column in unused.items():
        if name in POSSIBLE_FLAGS and not isinstance(column, UnreadableColumn):
            flags = np.asarray(column[:])
            if flags.size == rows and np.isin(flags, [0, 1]).all() and 0 < flags.mean() < 0.5:
                return f"{text} {name!r} looks like done flags: columns={{'truncated': {name!r}}}."
    return text
