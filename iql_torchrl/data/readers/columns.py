"""The columns of a source by our keys: which column is which, text and booleans as numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import h5py
import numpy as np
from numpy.typing import NDArray

from iql_torchrl.data.readers.arrays import (
    Column,
    Columns,
    ComputedColumn,
    group_numbered,
    group_of,
    side_by_side,
)
from iql_torchrl.data.readers.options import ReadOptions
from iql_torchrl.data.schema import DatasetError
from iql_torchrl.tolerance import rounding

#: Names of columns that are done flags of trajectories in some files, terminations in others. In a
#: file that has ``not_terminated`` or ``valid`` they end trajectories.
TRAJECTORY_ENDS = ("terminals", "dones_float")
#: Keys without which there are no transitions.
REQUIRED = ("observation", "action", "reward", "terminated")
#: Keys that may name a group of columns.
GROUPS = ("observation", "next_observation")
#: Keys of what follows a row, which ``next`` has in a table of transitions.
OF_NEXT = ("reward", "next_observation", "next_action_mask")
#: Keys of columns of 0 and 1.
FLAGS = ("terminated", "not_terminated", "truncated", "trajectory_end", "valid")
#: Keys of columns of names or numbers that say which rows belong together.
IDS = ("episode", "env_index")
#: Keys whose columns may be text.
TEXTS = (*GROUPS, *IDS, "action", "time")
#: Keys of one value a row.
SINGLE = (*FLAGS, *IDS, "reward", "time", "action_log_prob", "action_prob")
#: Keys whose columns are taken by name only if they have one value a row: others may have the name.
ONLY_SINGLE = ("not_terminated", "valid", "time", "env_index", "action_log_prob", "action_prob")

#: Names that a file may use for our keys, compared exactly; ``columns`` overrides them.
NAMES: dict[str, tuple[str, ...]] = {
    "observation": ("observation", "observations", "obs"),
    "action": ("action", "actions"),
    "reward": ("reward", "rewards", "next/reward"),
    "next_observation": (
        "next_observation", "next_observations", "next_obs", "new_obs", "next/observation",
    ),
    "terminated": (
        "terminated", "terminateds", "terminals", "terminations", "next/terminated",
    ),
    "not_terminated": ("masks",),
    "truncated": ("truncated", "truncateds", "timeouts", "truncations", "next/truncated"),
    "valid": ("valids",),
    "episode": (
        "episode", "episodes", "episode_id", "episode_ids", "episode_index", "eps_id",
        "collector/traj_ids",
    ),
    "env_index": ("env_index", "env_idx"),
    "time": ("time", "timestamp", "timestamps"),
    "action_mask": ("action_mask", "action_masks"),
    "next_action_mask": ("next_action_mask", "next_action_masks", "next/action_mask"),
    "action_log_prob": ("action_log_prob", "action_log_probs", "action_logp"),
    "action_prob": ("action_prob", "action_probs", "propensity", "pscore"),
}  # fmt: skip


def name_columns(source: Columns, options: ReadOptions) -> Columns:
    """The same columns by our names, each with one row of numbers a step; raises ``DatasetError``.

    Booleans become 0 and 1; text stays (:func:`number_texts`). ``reward`` is 0 where ``options``
    leave it out.
    """
    columns = group_numbered(source.columns, source.name)
    source = replace(source, columns=columns)
    if source.named:
        options = replace(options, columns={})
    for key, listed in options.columns.items():
        if isinstance(listed, list | tuple):
            columns[str(options.named[key])] = _joined(source, key, listed)
    paths = _paths(source, options.named)
    entries, notes = _entries(source, paths)
    unused = {path: column for path, column in columns.items() if path not in paths.values()}
    named = replace(
        source, columns=entries, paths=paths, unused=unused, notes=(*source.notes, *notes)
    )
    here, after = (
        ", ".join(
            sorted(f"{'.'.join(key)} {tuple(each.shape[1:])}" for key, each in leaves.items())
        )
        for leaves in (named.leaves("observation"), named.leaves("next/observation"))
    )
    if after and here != after:
        raise DatasetError(
            f"{source.name}: next_observation has the leaves {after}, observation has {here}; "
            "expected the same."
        )
    return named


def _entries(source: Columns, paths: Mapping[str, str]) -> tuple[dict[str, Column], list[str]]:
    """The columns at ``paths`` by our names, checked; notes."""
    entries, notes, rows = dict[str, Column](), list[str](), None
    for key, path in paths.items():
        place = "next/" + key.removeprefix("next_") if key in OF_NEXT else key
        single = key not in GROUPS
        leaves = {(): _single(source, key, path)} if single else group_of(source.columns, path)
        for rest, column in leaves.items():
            if rest and not column.shape:
                continue
            if key in IDS and isinstance(column, ComputedColumn) and column.ids is not None:
                column = column.ids
            if key in IDS and np.dtype(column.dtype).kind in "mM":  # such as a day for each episode
                column = np.asarray(column[:]).astype(str)
            if key in TEXTS:
                column = _decoded(column)
            rows = _checked_rows(f"{source.name}: {'/'.join((key, *rest))}", column, rows, key)
            if np.dtype(column.dtype) == np.bool_ and key in (*GROUPS, "action", "reward"):
                column = np.asarray(column[:], np.float32 if key == "reward" else np.int64)
                if key != "reward":
                    what = ".".join((*place.split("/"), *rest))
                    notes.append(f"{what}: False and True are 0 and 1.")
            entries["/".join((place, *rest))] = column
    if not rows:
        raise DatasetError(
            f"{source.name}: observation has 0 rows; expected at least one transition."
        )
    if "action_mask" not in entries:
        entries.pop("next/action_mask", None)
    entries.setdefault("next/reward", np.zeros(rows, np.float32))  # left out: data without a task
    return entries, notes


# -- which column is which


def _single(source: Columns, key: str, path: str) -> Column:
    """The column ``path``; raises for a group."""
    if path in source.columns:
        return source.columns[path]
    inner = ", ".join(map("/".join, group_of(source.columns, path)))
    raise DatasetError(
        f"{source.name}: {key} ({path!r}) is a group of {inner}; expected one array."
    )


def _joined(source: Columns, key: str, listed: Sequence[str]) -> Column:
    """The columns of one number that ``listed`` names as one column of floats."""
    parts = [_single(source, key, _named(source, key, each)) for each in listed]
    rows: int | None = None
    for each, part in zip(listed, parts, strict=True):
        subject = f"{source.name}: {each!r}, one of the columns of {key},"
        rows = _checked_rows(subject, part, rows, "reward")
    return side_by_side(parts, np.float64)


def _paths(source: Columns, options: Mapping[str, str | None]) -> dict[str, str]:
    """The column, or group of columns, of each key that has one."""
    name, mapping = source.name, dict(options)
    if unknown := set(options) - set(NAMES):
        raise DatasetError(
            f"{name}: columns maps {sorted(unknown)}; the keys are {', '.join(NAMES)}."
        )
    if mapping.get("terminated") in NAMES["not_terminated"]:
        # The name gives the meaning of its values: 0 where a row terminates.
        mapping.setdefault("not_terminated", mapping.pop("terminated"))
    elif "terminated" in mapping:
        if mapping.get("not_terminated") and mapping["terminated"]:
            raise DatasetError(
                f"{name}: columns maps terminated to {mapping['terminated']!r} and not_terminated to "
                f"{mapping['not_terminated']!r}; one is the opposite of the other: name one of them."
            )
        mapping.setdefault("not_terminated", None)
    if mapping.get("action_log_prob", "") is None:  # which probabilities would give
        mapping.setdefault("action_prob", None)
    paths = {key: _find(source, mapping, key) for key in NAMES if key != "terminated"}
    if paths["not_terminated"] or (paths["valid"] and "terminated" not in mapping):
        # Columns that could mean either end trajectories, they do not terminate.
        ends = [path for path in TRAJECTORY_ENDS if path in source.columns]
        if mapping.get("truncated") in TRAJECTORY_ENDS:
            ends = [str(paths.pop("truncated"))]
        paths["trajectory_end"] = ends[0] if ends else None
        others = [path for path in NAMES["terminated"] if path not in TRAJECTORY_ENDS]
        flags = [path for path in others if path in source.columns]
        paths["terminated"] = flags[0] if flags and "terminated" not in mapping else None
    else:
        paths["terminated"] = _find(source, mapping, "terminated")
    return {key: path for key, path in paths.items() if path is not None}


def _named(source: Columns, key: str, path: str) -> str:
    """The column, or group of columns, that ``columns`` names for a key."""
    # LeRobot's names have dots, such as next.reward.
    for present in (path, path.replace(".", "/")):
        if group_of(source.columns, present):
            return present
    known = ", ".join(sorted(source.columns))
    raise DatasetError(f"{source.name}: columns maps {key} to {path!r}; the data has {known}.")


def _find(source: Columns, mapping: Mapping[str, str | None], key: str) -> str | None:
    """The column (or group of columns) of a key."""
    name, columns = source.name, source.columns
    if (path := mapping.get(key)) is not None:
        return _named(source, key, path)
    if key in mapping:
        if key in ("observation", "action"):
            raise DatasetError(f"{name}: {key} cannot be left out.")
        return None
    matches = [path for path in NAMES[key] if group_of(columns, path)]
    if key not in (*REQUIRED, "next_observation"):  # neither single numbers nor groups
        matches = [p for p in matches if p in columns and columns[p].shape]
    if key in ONLY_SINGLE:
        matches = [p for p in matches if np.prod(columns[p].shape[1:]) == 1]
    if len(matches) > 1:
        raise DatasetError(
            f"{name}: {key} could be any of {', '.join(matches)}; choose with "
            f"columns={{{key!r}: ...}}."
        )
    if not matches and key in REQUIRED:
        left = ", ".join(sorted(columns.keys() - set(mapping.values())))  # without joined columns
        raise DatasetError(
            f"{name}: no column for {key} among {left or 'nothing'}; name it with "
            f"columns={{{key!r}: ...}}.{_hint(key, columns)}"
        )
    return matches[0] if matches else None


def _hint(key: str, columns: Mapping[str, Column]) -> str:
    """What to do without a column for the key."""
    merged = [path for path in ("done", "dones", "next/done") if path in columns]
    if key == "terminated" and merged:
        more = (
            "; if rows terminate where 'next/success' is 1, name that, and None if none terminates"
        )
        return (
            f" {merged[0]!r} may merge termination with truncation: if it means termination "
            f"alone, name it in columns{more if 'next/success' in columns else ''}."
        )
    if key == "terminated":
        return (
            " Pass columns={'terminated': None} if no row terminates; if each row is an episode of its "
            "own, as in a bandit, add a column of ones."
        )
    if key != "reward":
        return ""
    if "next/success" in columns:
        return " 'next/success' is 1 where the task is solved; it can be named as the reward."
    return (
        " Data recorded without a task has no rewards: load it for one single task (OGBench: "
        "load_dataset('ogbench/ENVIRONMENT-KIND-singletask-taskN-v0')); or compute the task's "
        "rewards, and which rows terminate, and pass a dict of arrays with both; or learn to reach "
        "any observation of the dataset: columns={'reward': None}, then dataset.relabelled()."
    )


# -- values


def _checked_rows(subject: str, column: Column, rows: int | None, key: str) -> int:
    """The column's number of rows, which is ``rows`` if known; raises unless its values fit ``key``.

    These are numbers and booleans; text for ids, actions, observations and times; dates for ``time``.
    """
    shape, kind = tuple(column.shape), np.dtype(column.dtype)
    kinds = "biuf" + "UO" * (key in TEXTS) + "mM" * (key == "time")
    expected = "an array of real numbers or booleans with one row per step, all rows of one shape"
    remedy = (
        "Join episodes of different lengths with numpy.concatenate and set the done flags of their "
        "last rows."
    )
    if not shape:
        problem = f"is a single value of dtype {kind}"
        if kind.kind == "U":
            remedy = "If RLlib compressed the column, write it with output_compress_columns=[]."
    elif kind.kind not in kinds and (text := _first_text(column)):
        problem = f"has {kind} values of shape {shape}, such as {text}"
        remedy = (
            "Correct text that should be numbers. Categories are read as the whole observation or "
            "action; in a list of columns replace them by one column of 0 and 1 a category."
        )
        if key in FLAGS:
            remedy = "Replace the text by true and false, or 1 and 0."
        elif key == "time":
            remedy = "Times are numbers, or ISO 8601 such as 2024-01-31T08:00."
    elif kind.kind == "O" and ("O" not in kinds or not _is_text(column)):
        problem = "has Python objects (dtype object): rows of different lengths, or no numbers"
    elif kind.kind not in kinds:
        problem = f"has {kind} values of shape {shape}"
    elif 0 in shape[1:]:
        problem = f"has shape {shape}: its rows hold no numbers"
    elif rows not in (None, shape[0]):
        problem = f"has {shape[0]} rows, where the columns before it have {rows}"
    elif key in SINGLE and int(np.prod(shape[1:])) != 1:
        problem = f"has shape {shape}, where ({shape[0]},) or ({shape[0]}, 1) is needed"
        if len(shape) == 2:
            remedy = (
                "Join the first two dimensions of each column with numpy.concatenate. If they are "
                f"{shape[0]} episodes of {shape[1]} steps, add a column episode: "
                f"numpy.repeat(numpy.arange({shape[0]}), {shape[1]}); if they are {shape[0]} steps of "
                f"{shape[1]} environments, a column env_index: "
                f"numpy.tile(numpy.arange({shape[1]}), {shape[0]})."
            )
    else:
        return shape[0]
    raise DatasetError(f"{subject} {problem}; expected {expected}. {remedy}")


def _decoded(column: Column) -> Column:
    """The column with text that HDF5 or NumPy stores as bytes as str."""
    if h5py.check_string_dtype(np.dtype(column.dtype)) is None or not column.shape:
        return column
    return np.char.decode(np.asarray(column[:]).astype("S"), "utf-8", "backslashreplace")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _first_text(column: Column) -> str:
    """The first text that is not a number, and its row; empty if there is none."""
    if np.dtype(column.dtype).kind not in "UO" or not (column.shape[0] and _is_text(column)):
        return ""
    values = np.asarray(column[:]).reshape(column.shape[0], -1)
    found = ((r, text) for r, texts in enumerate(values) for text in texts if not _is_number(text))
    return next((f"{str(text)!r} at row {row}" for row, text in found), "")


def _is_text(column: Column) -> bool:
    """All values are text; a missing value (None, NaN) is not."""
    return all(isinstance(value, str) for value in np.ravel(column[:]))


def number_texts(parts: Sequence[Columns]) -> list[Columns]:
    """The named columns with each text in actions and observations as its number in sorted order.

    The numbers are those of all ``parts`` and both sides of ``next``; notes name them. Raises
    ``DatasetError`` where some texts are numbers: a damaged column, not categories.
    """
    columns, notes = [dict(part.columns) for part in parts], list[str]()
    for place in dict.fromkeys(name for each in columns for name in each):
        if place != "action" and not place.startswith("observation"):
            continue
        sides = [
            (part.name, each, side)
            for part, each in zip(parts, columns, strict=True)
            for side in (place, f"next/{place}")
            if side in each
        ]
        if not any(np.dtype(each[side].dtype).kind in "UO" for _, each, side in sides):
            continue
        values = [np.asarray(each[side][:]).astype(str) for _, each, side in sides]
        texts = np.unique(np.concatenate([each.ravel() for each in values]))
        numbers = [_is_number(text) for text in texts]
        wrong = texts[numbers.index(False)] if not all(numbers) else texts[0]
        for (name, each, side), rows in zip(sides, values, strict=True):
            found = (rows == wrong).reshape(len(rows), -1).any(1)
            if any(numbers) and found.any():
                raise DatasetError(
                    f"{name}: {side.replace('/', '.')} has numbers, and the text {str(wrong)!r}, first "
                    f"at row {int(found.argmax())}; expected a number in every row, or the names of "
                    "categories: correct or leave out those rows, and convert numbers that are stored "
                    "as text (astype(float))."
                )
            each[side] = np.searchsorted(texts, rows)
        known = ", ".join(f"{text!r} {number}" for number, text in enumerate(texts[:12].tolist()))
        more = f", ... ({len(texts)} in all)" if len(texts) > 12 else ""
        what = place.replace("/", ".")
        notes.append(f"{what}: text is numbered in sorted order: {known}{more}.")
    numbered = [replace(p, columns=each) for p, each in zip(parts, columns, strict=True)]
    numbered[0] = replace(numbered[0], notes=(*numbered[0].notes, *notes))
    return numbered


def log_probabilities(named: Columns, rows: NDArray[np.int64]) -> Columns:
    """With ``action_log_prob``, of probabilities if it has these; without it if some are missing.

    ``rows``: those of transitions; what the others have is not read.
    """
    columns, warnings = dict(named.columns), named.warnings
    prob = columns.pop("action_prob", None)
    if prob is not None and "action_log_prob" not in columns:
        values = np.ones(len(prob[:]))
        values[rows] = np.asarray(prob[:], np.float64).reshape(-1)[rows]
        values[(values > 1) & (values <= 1 + rounding(np.float32))] = 1.0
        if (wrong := (values <= 0) | (values > 1)).any():
            raise DatasetError(
                f"{named.name}: action_prob ({named.paths['action_prob']!r}) is "
                f"{values[wrong][0]:.9g}, and outside (0, 1] in {named.place_of(wrong)}; expected the "
                "behaviour policy's probability of the row's action."
            )
        columns["action_log_prob"] = np.log(values)
    if (log_prob := columns.get("action_log_prob")) is not None:
        values = np.asarray(log_prob[:], np.float64)[rows]
        if missing := int(np.isnan(values).sum()):
            del columns["action_log_prob"]
            warnings = (
                *warnings,
                f"{named.name}: action_log_prob is NaN in {missing} of {len(values)} rows; the column "
                "is left out.",
            )
        elif (
            np.dtype(columns["action"].dtype).kind in "iuUO"
            and (values > rounding(np.float32)).any()
        ):
            raise DatasetError(
                f"{named.name}: action_log_prob is {values.max():g} at row "
                f"{int(rows[values.argmax()])}, more than 0, and the actions are discrete; expected "
                "logarithms of probabilities. Name a column of probabilities with "
                "columns={'action_prob': ...}."
            )
    return replace(named, columns=columns, warnings=warnings)
