"""Which rows are transitions, which of these terminate or are truncated, where episodes end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from iql_torchrl.data.readers.arrays import Columns
from iql_torchrl.data.readers.columns import FLAGS, IDS
from iql_torchrl.data.readers.contradictions import MANY, contradictions
from iql_torchrl.data.readers.following import SAMPLE, differs
from iql_torchrl.data.readers.hints import boundary_hints, interleaved_by
from iql_torchrl.data.readers.options import ReadOptions
from iql_torchrl.data.readers.order import sorted_rows, time_gaps
from iql_torchrl.data.schema import DatasetError

Flags = NDArray[np.bool_]


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
    and at gaps of ``time`` (``order.time_gaps``). Without truncated flags and ids they also end where
    ``next_observation`` is not the following row's observation (:func:`differs`), and after
    ``max_episode_steps``. Rows whose ids recur are sorted by them (``order.sorted_rows``).

    Where a file has ``masks`` (``not_terminated``: 0 where a row terminates) or ``valids``
    (``valid``), as OGBench's have, ``terminals`` is 1 at the last rows of trajectories: truncated
    unless ``masks`` is 0 there. A row that terminates inside its trajectory, or inside an episode with
    an id, is ``done`` and is not bootstrapped, but the episode continues; without ``terminals``, or
    where these equal the terminations, only if ``next_observation`` is the next row's observation. A
    row where ``valid`` is 0, or that a vector environment wrote after an episode's end
    (:func:`_resets`), is not a transition.

    Without ``next_observation`` the following row has the next observation. At the end of an episode
    there is none: a truncated row is dropped and the row before it becomes the last, truncated (as in
    D4RL's ``qlearning_dataset``); a terminated row is kept with its own observation as the next one,
    whose value is never used. With ``reward_offset=1`` row t gets the reward and the flags of row
    t+1, and the last row of each episode is dropped. ``notes`` count what was dropped; ``warnings``
    name what contradicts the flags.
    """
    columns, has, notes, ids = source, source.paths.keys(), list[str](), dict[str, Flags]()
    if has & {*IDS}:
        columns, ids, notes = sorted_rows(source)
    flags = read_flags(columns)
    ended = flags["terminated"] | flags["truncated"] | flags["trajectory_end"]
    id_ends = np.any([*ids.values()], axis=0) if ids else None
    gaps = None
    if "time" in has:
        gaps, texts = time_gaps(columns, ~ended if id_ends is None else ~(ended | id_ends))
        notes += texts
    observed, following = columns.leaves("observation"), columns.leaves("next/observation")
    broken = differs(observed, following, columns.rows) if following else None
    follows = broken is not None and 2 * int(broken.sum()) < len(broken)
    if not (ids or follows) and options.columns.get("env_index", "") is not None:
        _refuse_interleaved(columns)
    warnings = list[str]()
    unflagged = not ended.any()
    ended &= ~ids.get("env_index", np.zeros_like(ended))
    ended[-1:] = False
    if options.autoreset is not False and ended.any() and "valid" not in has:
        resets, texts = _resets(columns, ended, broken, options)
        warnings += texts
        if resets.any():
            flags["valid"] = flags["valid"] & ~resets
            notes.append(
                f"dropped {int(resets.sum())} rows that a vector environment wrote when it reset "
                "itself (autoreset in the step after an episode's end): their actions were ignored. "
                "autoreset=False keeps them."
            )
    last = _last_rows(columns, flags, broken, gaps, id_ends, options)
    truncated = flags["truncated"]
    if "truncated" not in has or {"trajectory_end", "valid"} & has:
        truncated = last & ~flags["terminated"]
    elif "not_terminated" in has:
        truncated = truncated & ~flags["terminated"]
    elif gaps is not None:
        truncated = truncated | (gaps & ~flags["terminated"])
    episodes = _transitions(columns, flags | {"truncated": truncated}, last, options.reward_offset)
    warnings = contradictions(columns, flags, last, broken, episodes.lengths) + warnings
    if not warnings:
        proved = None if broken is None else broken | ~flags["valid"][:-1]
        hints = boundary_hints(
            observed, proved, columns.columns["next/reward"], flags["terminated"], last,
            names=columns.paths, unused=columns.unused, ids_given=bool(ids),
        )  # fmt: skip
        if options.autoreset is False:  # the user knows that these rows are steps
            hints = [text for text in hints if "autoreset" not in text]
        warnings = hints
        if unflagged and not (hints or ids or last[:-1].any()) and columns.rows > MANY:
            warnings = [
                f"all {columns.rows:,} rows were read as one episode, because no row is terminated or "
                "truncated and there are no episode ids. If there are several, pass "
                "max_episode_steps=, or name the column of episode ids or done flags with "
                "columns={'episode': ...} or columns={'truncated': ...}."
            ]
    return columns, replace(
        episodes, notes=(*notes, *episodes.notes), warnings=(*episodes.warnings, *warnings)
    )


def read_flags(columns: Columns) -> dict[str, Flags]:
    """Each of ``FLAGS`` as bool ``(rows,)``; rows are valid, and nothing else, where it is missing."""
    flags, name, rows, paths = dict[str, Flags](), columns.name, columns.rows, columns.paths
    for key in FLAGS:
        if key not in columns.columns:
            flags[key] = np.full(rows, key == "valid")
            continue
        values = np.ravel(columns.columns[key][:])
        if len(wrong := np.flatnonzero((values != 0) & (values != 1))):
            raise DatasetError(
                f"{name}: {key} ({paths[key]!r}) has {values[wrong[0]]} in {len(wrong)} of "
                f"{rows} rows with other values than 0 and 1, first at row "
                f"{columns.source_row(wrong[0])}; expected 0 or 1."
            )
        flags[key] = values.astype(np.bool_)
    if "not_terminated" in paths:
        opposite = ~flags["not_terminated"]
        differ = np.flatnonzero(flags["terminated"] != opposite)
        if "terminated" in paths and len(differ):
            first, second = paths["not_terminated"], paths["terminated"]
            raise DatasetError(
                f"{name}: {first!r} (0 where a row terminates) and {second!r} (1 there) disagree in "
                f"{len(differ)} of {rows} rows, first at row {columns.source_row(differ[0])}; choose "
                f"one with columns={{'terminated': {second!r}}} or columns={{'not_terminated': "
                f"{first!r}, 'terminated': None}}."
            )
        flags["terminated"] = opposite
    return flags


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


def _resets(
    columns: Columns, ended: Flags, broken: Flags | None, options: ReadOptions
) -> tuple[Flags, list[str]]:
    """Rows that a vector environment wrote in the step after an episode's end, ``(rows,)``.

    Gymnasium's vector environments (1.0 and later, by default) reset in that step: its row leads from
    the last observation to the first one of the next episode, its action is ignored, its reward is 0.
    Recognised if every ended row's next observation is the following row's observation, whose row
    has no reward and does not end, while most other rows have rewards. Without next observations there
    is a warning if 99 % of the other rows have rewards. ``autoreset=True`` takes every row after an
    end. With ``reward_offset`` the reward of that row is not for its action.
    """
    after, none = np.append(False, ended[:-1]), np.zeros_like(ended)
    rewarded = np.asarray(columns.columns["next/reward"][:]).reshape(-1) != 0
    wrong, usual = rewarded & after, float(rewarded[~after].mean())
    if options.autoreset and wrong.any():
        return after, [
            f"autoreset=True dropped {int(after.sum())} rows, of which {int(wrong.sum())} have "
            f"rewards, first at row {columns.source_row(int(wrong.argmax()))}; the step that resets a "
            "vector environment has the reward 0. If these rows are transitions, pass autoreset=False."
        ]
    if options.autoreset:
        return after, []
    if options.reward_offset or wrong.any() or (after & ended).any() or usual < 0.5:
        return none, []
    if broken is not None:
        recognised = ended.sum() > 1 and not (broken & ended[:-1]).any()
        return after if recognised else none, []
    # a warning of the reader explains such rewards: d3rlpy before 1.1 moved them by one row
    if usual < 0.99 or ended.sum() < 3 or columns.warnings:
        return none, []
    return none, [
        f"the rows after all {int(ended.sum())} ends of episodes have reward 0, and hardly any other "
        "row: they look like rows that a vector environment wrote when it reset itself, whose actions "
        "were ignored. Pass autoreset=True to drop them, or autoreset=False if they are steps."
    ]


def _last_rows(
    columns: Columns, flags: Mapping[str, Flags], broken: Flags | None, gaps: Flags | None,
    ids: Flags | None, options: ReadOptions,
) -> Flags:  # fmt: skip
    """The last row of each episode, ``(rows,)``; see :func:`find_episodes` for the rules."""
    has, limit = columns.paths.keys(), options.max_episode_steps
    terminated, truncated, end, valid = (
        flags[key] for key in ("terminated", "truncated", "trajectory_end", "valid")
    )
    others = "valid" in has or ("trajectory_end" in has and not np.array_equal(end, terminated))
    last = truncated | end
    # A termination ends its trajectory, unless another column says where trajectories end.
    if "not_terminated" in has and broken is not None and not has & {"trajectory_end", "valid"}:
        last[:-1] |= terminated[:-1] & broken
    elif "not_terminated" not in has or not others:
        last |= terminated
    last = (last & valid & np.append(valid[1:], True)) | ~valid
    last[-1] = True
    unknown = not others and "truncated" not in has
    if "episode" in has and ids is not None:
        inside = last & ~ids & valid
        inside[:-1] &= valid[1:]  # the following row only has the last observation
        wrong = inside & ~terminated
        if broken is not None:
            wrong[:-1] |= inside[:-1] & broken
        if wrong.any():
            path = columns.paths["episode"]
            raise DatasetError(
                f"{columns.name}: {int(wrong.sum())} rows are terminated or truncated although the "
                f"episode id ({path!r}) continues, first at row "
                f"{columns.source_row(int(wrong.argmax()))}; expected done flags and ids to agree. If "
                f"the ids number environments, pass columns={{'env_index': {path!r}, 'episode': None}}."
            )
        last = (last & ~inside) | ids
    elif ids is not None:  # an environment has many episodes
        last |= ids
    elif unknown and broken is not None:
        last[:-1] |= broken
    elif (
        unknown
        and not ("trajectory_end" in has or limit or gaps is not None or terminated.all())
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
    if gaps is not None:
        last |= gaps & valid
    if unknown and limit:
        row = np.arange(len(last))
        first = np.maximum.accumulate(np.where(np.append(True, last[:-1]), row, 0))
        last |= (row - first + 1) % limit == 0
    return last


def _transitions(
    columns: Columns, flags: Mapping[str, Flags], last: Flags, reward_offset: int
) -> Episodes:
    """The transitions, with what was dropped or repaired."""
    terminated, truncated = flags["terminated"].copy(), flags["truncated"].copy()
    drop, paths, notes, warnings = ~flags["valid"], columns.paths, list[str](), list[str]()
    if "valid" in paths and drop.any():
        notes.append(
            f"dropped {int(drop.sum())} rows of {columns.rows} where {paths['valid']!r} is 0: "
            "they only contain the observation after a trajectory's last step."
        )
    if reward_offset:
        drop = drop | last
        notes.append(
            f"reward_offset: dropped {int(drop.sum())} last rows, whose reward is unknown."
        )
        # The flags of a row belong to the transition into it.
        inside = np.flatnonzero(~last)
        terminated[inside], truncated[inside] = terminated[inside + 1], truncated[inside + 1]
    else:
        if not columns.leaves("next/observation"):
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
        # A row before a dropped row is truncated, unless it terminates.
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
    found = Episodes(
        rows=rows, after=rows + ~last[rows], terminated=terminated[rows],
        truncated=truncated[rows], lengths=lengths, notes=tuple(notes), warnings=tuple(warnings),
    )  # fmt: skip
    return _with_repaired_flags(columns, flags, found)


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


def _with_repaired_flags(columns: Columns, flags: Mapping[str, Flags], found: Episodes) -> Episodes:
    """No transition has both flags, each episode's last one has one; notes on how flags were read."""
    terminated, paths = found.terminated, columns.paths
    notes, warnings = [*found.notes], [*found.warnings]
    if both := int((terminated & found.truncated).sum()):
        warnings.append(
            f"{both} steps are both terminated and truncated; kept as terminated (never "
            "bootstrapped)."
        )
    truncated, ends = found.truncated & ~terminated, np.cumsum(found.lengths) - 1
    open_ends = ends[~(terminated | truncated)[ends]]
    truncated[open_ends] = True
    if len(open_ends) and "truncated" in paths:
        # a recording of several environments stops inside their episodes
        (notes if "env_index" in paths else warnings).append(
            f"{len(open_ends)} episodes end without a done flag; their last step was read as truncated "
            "(bootstrapped)."
        )
    if path := paths.get("not_terminated"):
        count = int((flags["terminated"] & flags["valid"]).sum())
        notes.append(
            f"{path!r} was read as 0 where a row terminates and 1 elsewhere ({count} terminations)."
        )
    if path := paths.get("trajectory_end"):
        notes.append(f"{path!r} was read as ends of trajectories, not as terminations.")
    if inside := int(terminated.sum() - terminated[ends].sum()):
        notes.append(
            f"{inside} rows terminate inside a trajectory that continues: bootstrapping stops there, "
            "the episode does not end."
        )
    return replace(found, truncated=truncated, notes=tuple(notes), warnings=tuple(warnings))
