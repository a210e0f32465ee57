"""Which rows are transitions, and where episodes end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iql_torchrl.data.readers.arrays import Columns, Flags
from iql_torchrl.data.readers.columns import IDS
from iql_torchrl.data.readers.contradictions import MANY, SAMPLE, contradictions, differs
from iql_torchrl.data.readers.ends import read_flags, reset_rows, time_gaps
from iql_torchrl.data.readers.hints import (
    boundary_hints,
    distance,
    interleaved_by,
    leading_values,
    steps_of,
)
from iql_torchrl.data.readers.options import ReadOptions
from iql_torchrl.data.schema import DatasetError


@dataclass(frozen=True, kw_only=True)
class Episodes:
    """The transitions of columns, ordered by episodes.

    Attributes:
        rows, after: int64 ``(n,)``: the rows of each transition's observation, and of its next
            observation where the source has none (the row itself where nothing is known).
        terminated, truncated: bool ``(n,)``; a transition is never both.
        lengths: int64 ``(E,)``, transitions of each episode; they add up to n.
    """

    rows: NDArray[np.int64]
    after: NDArray[np.int64]
    terminated: Flags
    truncated: Flags
    lengths: NDArray[np.int64]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def limited(self, limit: int) -> Episodes:
        """At most ``limit`` transitions: the first complete episodes, or a part of the first."""
        total = len(self.rows)
        if total <= limit:
            return self
        complete = int(np.searchsorted(np.cumsum(self.lengths), limit, side="right"))
        lengths = self.lengths[:complete] if complete else np.array([limit], np.int64)
        kept = slice(int(lengths.sum()))
        truncated = self.truncated[kept].copy()
        truncated[-1] |= not self.terminated[kept][-1]
        note = f"limit: kept {kept.stop} of {total} transitions, {len(lengths)} episodes."
        return replace(
            self, rows=self.rows[kept], after=self.after[kept], truncated=truncated,
            terminated=self.terminated[kept], lengths=lengths, notes=(*self.notes, note),
        )  # fmt: skip


def find_episodes(source: Columns, options: ReadOptions) -> tuple[Columns, Episodes]:
    """The episodes of named columns, and the columns in the order of the episodes.

    Episodes end at rows that are terminated or truncated, where ``episode`` or ``env_index`` changes,
    and at gaps of ``time`` (:func:`time_gaps`). Without truncated flags and ids they also end where
    ``next_observation`` is not the following row's observation (:func:`differs`), and after
    ``max_episode_steps``. Rows whose ids recur are sorted by them (:func:`_sorted_rows`).

    Where a file has ``masks`` (``not_terminated``: 0 where a row terminates) or ``valids``
    (``valid``), as OGBench's have, ``terminals`` is 1 at the last rows of trajectories: truncated
    unless ``masks`` is 0 there. A row that terminates inside its trajectory, or inside an episode with
    an id, is ``done`` and is not bootstrapped, but the episode continues; without ``terminals``, or
    where these equal the terminations, only if ``next_observation`` is the next row's observation. A
    row where ``valid`` is 0, or that a vector environment wrote after an episode's end
    (:func:`reset_rows`), is not a transition.

    Without ``next_observation`` the following row has the next observation. At the end of an episode
    there is none: a truncated row is dropped and the row before it becomes the last, truncated (as in
    D4RL's ``qlearning_dataset``); a terminated row is kept with its own observation as the next one,
    whose value is never used. With ``reward_offset=1`` row t gets the reward and the flags of row
    t+1, and the last row of each episode is dropped. ``notes`` count what was dropped; ``warnings``
    name what contradicts the flags (hints: what observations make unlikely).
    """
    columns, ids, notes = _sorted_rows(source)
    has, flags = columns.paths.keys(), read_flags(columns)
    ended = flags["terminated"] | flags["truncated"] | flags["trajectory_end"]
    unflagged, none = not ended.any(), np.zeros_like(ended)
    id_ends = np.any([none, *ids.values()], axis=0)
    gaps, texts = time_gaps(columns, ~(ended | id_ends)) if "time" in has else (none, [])
    notes += texts
    observed, following = columns.leaves("observation"), columns.leaves("next/observation")
    broken = differs(observed, following, columns.rows) if following else None
    follows = broken is not None and 2 * int(broken.sum()) < len(broken)
    if not (ids or follows) and options.columns.get("env_index", "") is not None:
        _refuse_interleaved(columns)
    ended &= ~ids.get("env_index", none)
    ended[-1:] = False
    resets, warnings = none, list[str]()
    if options.autoreset is not False and ended.any() and "valid" not in has:
        resets, warnings = reset_rows(columns, ended, broken, options)
    if resets.any():
        flags["valid"] = flags["valid"] & ~resets
        notes.append(
            f"dropped {int(resets.sum())} rows that a vector environment wrote when it reset "
            "itself (autoreset in the step after an episode's end): their actions were ignored. "
            "autoreset=False keeps them."
        )
    last = _last_rows(columns, flags, broken, gaps, id_ends, options)
    truncated = flags["truncated"] | (gaps & ~flags["terminated"])
    if "truncated" not in has or {"trajectory_end", "valid"} & has:
        truncated = last & ~flags["terminated"]
    elif "not_terminated" in has:
        truncated = truncated & ~flags["terminated"]
    found = _transitions(columns, flags | {"truncated": truncated}, last, options.reward_offset)
    warnings = contradictions(columns, flags, last, broken, found.lengths) + warnings
    if not warnings:
        proved = None if broken is None else broken | ~flags["valid"][:-1]
        warnings = boundary_hints(columns, flags["terminated"], last, proved)
        if options.autoreset is False:  # the user knows that these rows are steps
            warnings = [text for text in warnings if "autoreset" not in text]
        elif unflagged and not (warnings or ids or last[:-1].any()) and columns.rows > MANY:
            warnings = [
                f"all {columns.rows:,} rows were read as one episode, because no row is terminated or "
                "truncated and there are no episode ids. If there are several, pass "
                "max_episode_steps=, or name the column of episode ids or done flags with "
                "columns={'episode': ...} or columns={'truncated': ...}."
            ]
    return columns, replace(
        found, notes=(*notes, *found.notes), warnings=(*found.warnings, *warnings)
    )


# -- the order of rows


def _sorted_rows(columns: Columns) -> tuple[Columns, dict[str, Flags], list[str]]:
    """The columns with the rows of each id together, in the order of the source; and notes.

    Rows are sorted, stably, by ``env_index`` and ``episode`` where an id occurs again after another,
    unless their numbers begin again there, as in joined recordings (:func:`_numbers_begin_again`).
    Second: by these keys, True at the last row of each block of equal ids.
    """
    notes: list[str] = []
    keys = [key for key in ("env_index", "episode") if key in columns.columns]
    ids: dict[str, NDArray[Any]] = {key: _id_codes(columns, key) for key in keys}
    for key in keys:
        codes, path = ids[key], columns.paths[key]
        ends = np.append(codes[1:] != codes[:-1], True)
        blocks, count = int(ends.sum()), int(codes.max()) + 1
        if blocks == count:
            continue
        if key == "episode" and _numbers_begin_again(columns, codes, ends):
            notes.append(
                f"{path!r} has {count} ids in {blocks} blocks of rows, which do not continue each "
                "other: every block is an episode."
            )
            continue
        order = np.argsort(codes, kind="stable")
        sources = order if columns.order is None else columns.order[order]
        rows = {name: np.asarray(each[:])[order] for name, each in columns.columns.items()}
        columns = replace(columns, columns=rows, order=sources)
        ids = {each: values[order] for each, values in ids.items()}
        notes.append(
            f"rows are sorted by {path!r}, whose {count} ids take turns in {blocks} blocks of rows; "
            "the order inside an id is that of the source."
        )
    return columns, {k: np.append(v[1:] != v[:-1], True) for k, v in ids.items()}, notes


def _id_codes(columns: Columns, key: str) -> NDArray[np.int64]:
    """A number for each row's id, ``(rows,)``, from 0 in the order of the first occurrence."""
    values = np.asarray(columns.columns[key][:]).reshape(-1)
    if values.dtype.kind == "f" and (unknown := ~np.isfinite(values)).any():
        raise DatasetError(
            f"{columns.name}: {key} ({columns.paths[key]!r}) is NaN or infinite in "
            f"{columns.place_of(unknown)}; expected one id per "
            f"{'episode' if key == 'episode' else 'environment'} in every row."
        )
    if values.dtype.kind == "O":
        values = values.astype(str)
    # blocks of equal ids are few: numbers them, not the rows
    starts = np.flatnonzero(np.append(True, values[1:] != values[:-1]))
    _, first, inverse = np.unique(values[starts], return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    return np.repeat(rank[inverse], np.diff(np.append(starts, len(values))))


def _numbers_begin_again(columns: Columns, codes: NDArray[np.int64], ends: Flags) -> bool:
    """Ids occur again because their numbers begin again, not because they take turns.

    Decided for the blocks of rows whose id occurs again, by the first that is known: done flags at all
    of their ends; next observations, of which the most are not those of the id's next row; blocks of
    one row, which take turns; the median distance to the id's next row, which is above 90 % of the
    steps inside blocks.
    """
    flags = read_flags(columns)
    done = flags["terminated"] | flags["truncated"] | flags["trajectory_end"]
    order = np.argsort(codes, kind="stable")
    again = (codes[order[1:]] == codes[order[:-1]]) & ends[order[:-1]]
    rows, successors = order[:-1][again], order[1:][again]
    if done[rows].all():
        return True
    observed = columns.leaves("observation")
    if following := columns.leaves("next/observation"):
        parts = (observed, following)
        by_id = [{key: np.asarray(each[:])[order] for key, each in part.items()} for part in parts]
        return bool(differs(by_id[0], by_id[1], len(order) - 1)[again].mean() > 0.5)
    if len(codes) < 2 * int(ends.sum()):
        return False
    values = leading_values(observed)
    steps = steps_of(values, ends[: max(0, len(values) - 1)])
    if steps is None or not (known := successors < len(values)).any():
        return True
    jump = distance(steps.values[successors[known]] - steps.values[rows[known]], steps.unit)
    return bool(np.median(jump) > np.quantile(steps.length[~steps.ended], 0.9))


def _refuse_interleaved(columns: Columns) -> None:
    """Raise where the rows of several environments take turns, and no ids say so.

    The observations say how many environments may take turns; next observations, if known, must agree.
    """
    observed, following = columns.leaves("observation"), columns.leaves("next/observation")
    envs = interleaved_by(observed)
    if envs is None or (following and differs(observed, following, SAMPLE, envs).mean() > 0.5):
        return
    raise DatasetError(
        f"{columns.name}: the rows of {envs} environments are interleaved (row = t * {envs} + env): "
        f"the observation {envs} rows ahead is much nearer than the next one. Add a column that "
        f"numbers the environments, numpy.arange(rows) % {envs}, and pass columns={{'env_index': "
        "...}: rows are then sorted by it. If all rows are of one environment, pass "
        "columns={'env_index': None}."
    )


# -- last rows and transitions


def _last_rows(
    columns: Columns, flags: Mapping[str, Flags], broken: Flags | None, gaps: Flags, ids: Flags,
    options: ReadOptions,
) -> Flags:  # fmt: skip
    """The last row of each episode, ``(rows,)``; see :func:`find_episodes` for the rules."""
    has, limit = columns.paths.keys(), options.max_episode_steps
    terminated, end, valid = (flags[key] for key in ("terminated", "trajectory_end", "valid"))
    others = "valid" in has or ("trajectory_end" in has and not np.array_equal(end, terminated))
    last = flags["truncated"] | end
    # A termination ends its trajectory, unless another column says where trajectories end.
    if "not_terminated" in has and broken is not None and not has & {"trajectory_end", "valid"}:
        last[:-1] |= terminated[:-1] & broken
    elif "not_terminated" not in has or not others:
        last |= terminated
    last = (last & valid & np.append(valid[1:], True)) | ~valid
    last[-1] = True
    unknown = not (others or has & {"truncated", *IDS})
    if "episode" in has:
        last = _agreeing(columns, last, terminated, valid, broken, ids)
    elif unknown and broken is not None:
        last[:-1] |= broken
    elif (
        unknown
        and not (has & {"trajectory_end", "time"} or limit or terminated.all())
        and options.columns.get("truncated", "") is not None
    ):
        remedy = "columns={'truncated': None} if every episode terminates"
        if not has & {"terminated", "not_terminated"}:
            remedy = "add a column of ones as terminated if each row is an episode, as in a bandit"
        raise DatasetError(
            f"{columns.name}: neither truncated, episode, time nor next_observation shows where "
            "episodes end besides termination; pass max_episode_steps or env, name one with "
            f"columns={{...}}, or {remedy}."
        )
    last |= ids | (gaps & valid)
    if limit and not (others or "truncated" in has):
        row = np.arange(len(last))
        first = np.maximum.accumulate(np.where(np.append(True, last[:-1]), row, 0))
        last |= (row - first + 1) % limit == 0
    return last


def _agreeing(
    columns: Columns, last: Flags, terminated: Flags, valid: Flags, broken: Flags | None, ids: Flags
) -> Flags:
    """``last`` without rows that terminate inside an episode with an id; raises for other such rows."""
    inside = last & ~ids & valid
    inside[:-1] &= valid[1:]  # the following row only has the last observation
    wrong = inside & ~terminated
    if broken is not None:
        wrong[:-1] |= inside[:-1] & broken
    if wrong.any():
        path = columns.paths["episode"]
        raise DatasetError(
            f"{columns.name}: rows are terminated or truncated although the episode id ({path!r}) "
            f"continues, in {columns.place_of(wrong)}; expected done flags and ids to agree. If the "
            f"ids number environments, pass columns={{'env_index': {path!r}, 'episode': None}}."
        )
    return last & ~inside


def _transitions(
    columns: Columns, flags: Mapping[str, Flags], last: Flags, reward_offset: int
) -> Episodes:
    """The transitions, with what was dropped or repaired."""
    terminated, truncated = flags["terminated"].copy(), flags["truncated"].copy()
    if reward_offset:  # The flags of a row belong to the transition into it.
        inside = np.flatnonzero(~last)
        terminated[inside], truncated[inside] = terminated[inside + 1], truncated[inside + 1]
    drop, notes, warnings = _dropped_rows(columns, flags, last, reward_offset)
    if not reward_offset:  # A row before a dropped row is truncated, unless it terminates.
        before = np.flatnonzero(drop[1:] & ~last[:-1])
        truncated[before] = ~terminated[before]
    end_rows = np.flatnonzero(last)
    lengths = np.diff(end_rows, prepend=-1) - drop[end_rows]
    if empty := int((lengths == 0).sum()):
        notes.append(f"{empty} episodes of one row were dropped with that row.")
    rows, lengths = np.flatnonzero(~drop), lengths[lengths > 0].astype(np.int64)
    if not len(rows):
        raise DatasetError(
            f"{columns.name}: no transition is left of {columns.rows} rows; {' '.join(notes)}"
        )
    # No transition has both flags, each episode's last one has one.
    terminated, truncated, ends = terminated[rows], truncated[rows], np.cumsum(lengths) - 1
    if both := int((terminated & truncated).sum()):
        warnings.append(
            f"{both} steps are both terminated and truncated; kept as terminated (never "
            "bootstrapped)."
        )
        truncated &= ~terminated
    open_ends = ends[~(terminated | truncated)[ends]]
    truncated[open_ends] = True
    if len(open_ends) and "truncated" in columns.paths:
        # a recording of several environments stops inside their episodes
        (notes if "env_index" in columns.paths else warnings).append(
            f"{len(open_ends)} episodes end without a done flag; their last step was read as truncated "
            "(bootstrapped)."
        )
    notes += _how_flags_were_read(columns, flags, int(terminated.sum() - terminated[ends].sum()))
    return Episodes(
        rows=rows, after=rows + ~last[rows], terminated=terminated, truncated=truncated,
        lengths=lengths, notes=tuple(notes), warnings=tuple(warnings),
    )  # fmt: skip


def _dropped_rows(
    columns: Columns, flags: Mapping[str, Flags], last: Flags, reward_offset: int
) -> tuple[Flags, list[str], list[str]]:
    """Rows that are not transitions, ``(rows,)``; notes and warnings on them."""
    drop, notes, warnings = ~flags["valid"], list[str](), list[str]()
    if "valid" in columns.paths and drop.any():
        notes.append(
            f"dropped {int(drop.sum())} rows of {columns.rows} where {columns.paths['valid']!r} is 0: "
            "they only contain the observation after a trajectory's last step."
        )
    if reward_offset:
        drop = drop | last
        notes.append(
            f"reward_offset: dropped {int(drop.sum())} last rows, whose reward is unknown."
        )
    elif not columns.leaves("next/observation"):
        terminated = flags["terminated"]
        cut = last & ~drop & ~terminated  # A terminated row needs no next observation.
        drop = drop | cut
        if cut.any():
            notes.append(
                f"dropped {int(cut.sum())} truncated last rows of {columns.rows}: without "
                "next_observation they have no next observation."
            )
            warnings += _lost_rewards(columns, cut, drop)
        if alone := int((terminated & last & ~drop).sum()):
            notes.append(
                f"{alone} terminated rows have no next observation in the source; their own "
                "observation is used."
            )
    return drop, notes, warnings


def _how_flags_were_read(columns: Columns, flags: Mapping[str, Flags], inside: int) -> list[str]:
    """Notes; ``inside``: how many rows terminate inside a trajectory that continues."""
    notes, paths = list[str](), columns.paths
    if path := paths.get("not_terminated"):
        count = int((flags["terminated"] & flags["valid"]).sum())
        notes.append(
            f"{path!r} was read as 0 where a row terminates and 1 elsewhere ({count} terminations)."
        )
    if path := paths.get("trajectory_end"):
        notes.append(f"{path!r} was read as ends of trajectories, not as terminations.")
    if inside:
        notes.append(
            f"{inside} rows terminate inside a trajectory that continues: bootstrapping stops there, "
            "the episode does not end."
        )
    return notes


def _lost_rewards(columns: Columns, cut: Flags, drop: Flags) -> list[str]:
    """A warning where dropped rows have much of the rewards."""
    rewards = np.abs(np.asarray(columns.columns["next/reward"][:], np.float64).reshape(-1))
    with np.errstate(invalid="ignore"):
        lost, kept = float(rewards[cut].sum()), float(rewards[~drop].sum())
        usual = kept / max(int((~drop).sum()), 1)
        if not (lost > 0.1 * kept and rewards[cut].mean() > 10 * usual):
            return []
    return [
        f"the {int(cut.sum())} dropped last rows have {lost / (lost + kept):.0%} of all rewards (by "
        "magnitude), which are lost: keep the rows by terminating them (columns={'terminated': ...}) "
        "if nothing follows, pass next_observation, or reward_offset=1 if a row's reward belongs to "
        "the action of the row before."
    ]
