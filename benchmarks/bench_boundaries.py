"""How often ``load_dataset`` reports wrong episode boundaries, and right ones: two checkouts compared.

    python benchmarks/bench_boundaries.py --old ../old     # a checkout of the code before, minutes
    python benchmarks/bench_boundaries.py --only maze,walk --seeds 2

Each family of ``boundary_families.py`` is written with right flags in several forms, and with each
fault; ``load_dataset`` reads it. A fault is found if there is a warning or a refusal about episode
boundaries, or a note that rows of autoreset were dropped; on right flags these are false alarms.
Writes benchmarks/results/boundaries.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from boundary_families import MOVING, NATURAL, OTHERS, Array, Episode, Family, bandit, contexts
from iql_torchrl.report import text_table
from record import machine, place, save

import numpy as np

Table: TypeAlias = dict[str, Any]
EPISODES, ENVS, CUT = 40, 4, 25
#: Warnings that are not about episode boundaries.
UNRELATED = re.compile(r"float32|actions reach|whole numbers|integers|all rewards|sum of squares")
#: What a report of these faults must name, to count as named; and the only report that is wrong of rows
#: that are transitions in any order.
NAMES = {"interleaved": "interleaved", "autoreset": "autoreset"}
WRONG_ADVICE = {"right, shuffled": "Repair the column"}


# -- tables


def table_of(episodes: Sequence[Episode]) -> Table:
    """The rows of the episodes with right flags, next observations and episode ids."""

    def rows(observation: Any, part: slice) -> Any:
        if isinstance(observation, dict):
            return {key: values[part] for key, values in observation.items()}
        return observation[part]

    lengths = np.array([len(e) for e in episodes])
    ends = np.isin(np.arange(lengths.sum()), np.cumsum(lengths) - 1)
    terminates = np.repeat([e.terminates for e in episodes], lengths)
    rng = np.random.default_rng(0)
    return {
        "observation": _joined([rows(e.observation, slice(None, -1)) for e in episodes]),
        "next_observation": _joined([rows(e.observation, slice(1, None)) for e in episodes]),
        "action": rng.uniform(-1, 1, (len(ends), 2)).astype("f4"),
        "reward": np.concatenate([e.reward for e in episodes]).astype("f4"),
        "terminated": ends & terminates,
        "truncated": ends & ~terminates,
        "episode": np.repeat(np.arange(len(lengths)), lengths),
    }


def _joined(parts: Sequence[Any]) -> Any:
    if isinstance(parts[0], dict):
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    return np.concatenate(parts)


def chosen(table: Table, rows: Array) -> Table:
    return {
        key: {k: v[rows] for k, v in values.items()} if isinstance(values, dict) else values[rows]
        for key, values in table.items()
    }


def without(table: Table, *names: str) -> Table:
    return {key: values for key, values in table.items() if key not in names}


def at(table: Table, place: Callable[[Array], Array]) -> Table:
    """With the flags of ``place(ends)``, terminated where most episodes terminate."""
    moved = place(table["terminated"] | table["truncated"])
    terminates = table["terminated"].sum() > table["truncated"].sum()
    return table | {"terminated": moved & terminates, "truncated": moved & (not terminates)}


# -- faults: ``(family, generator) -> table``


def right(family: Family, rng: np.random.Generator) -> Table:
    return table_of(list(family(rng, EPISODES, 0)))


def few_long(family: Family, rng: np.random.Generator) -> Table:
    return table_of(list(family(rng, 8, 500)))


def missing(family: Family, rng: np.random.Generator) -> Table:
    """3 of 4 flags are removed."""
    table = right(family, rng)
    ends = np.flatnonzero(table["terminated"] | table["truncated"])
    removed = rng.permutation(ends)[: 3 * len(ends) // 4]
    for key in ("terminated", "truncated"):
        table[key][removed] = False
    return table


def late(family: Family, rng: np.random.Generator) -> Table:
    return at(right(family, rng), lambda ends: np.append(False, ends[:-1]))


def early(family: Family, rng: np.random.Generator) -> Table:
    return at(right(family, rng), lambda ends: np.append(ends[1:], True))


def misplaced(family: Family, rng: np.random.Generator) -> Table:
    return at(right(family, rng), rng.permutation)


def cut(family: Family, rng: np.random.Generator) -> Table:
    """One recording that is flagged as terminated where it was cut, every 25 rows."""
    table = table_of(list(family(rng, 1, 1000)))
    flags = np.arange(1, len(table["reward"]) + 1) % CUT == 0
    return table | {"terminated": flags, "truncated": np.zeros_like(flags)}


def unflagged(family: Family, rng: np.random.Generator) -> Table:
    table = right(family, rng)
    return table | {key: np.zeros_like(table[key]) for key in ("terminated", "truncated")}


def interleaved(family: Family, rng: np.random.Generator) -> Table:
    """Row t * 4 + e is step t of environment e."""
    streams = [right(family, rng) for _ in range(ENVS)]
    rows = min(len(stream["reward"]) for stream in streams)
    rows = min(rows, 5000)
    order = np.arange(ENVS * rows).reshape(ENVS, rows).T.ravel()
    parts = [chosen(stream, np.arange(rows)) for stream in streams]
    joined = {key: _joined([part[key] for part in parts]) for key in parts[0]}
    for number in range(ENVS):
        joined["episode"][rows * number : rows * (number + 1)] += number * 10_000
    return chosen(joined, order)


def autoreset(family: Family, rng: np.random.Generator) -> Table:
    """After each end a row leads from the last observation to the next episode's first, reward 0."""
    episodes = list(family(rng, EPISODES, 0))
    table, lengths = table_of(episodes), [len(e) for e in episodes]
    ends = np.cumsum(lengths) - 1
    source = np.insert(np.arange(len(table["reward"])), ends + 1, ends)
    fake = np.insert(np.zeros(len(table["reward"]), bool), ends + 1, True)
    result = chosen(table, source)
    result["reward"][fake] = 0
    for key in ("terminated", "truncated"):
        result[key] &= ~fake
    here, following = result["observation"], result["next_observation"]
    for leaf in here if isinstance(here, dict) else [None]:
        now, after = (x if leaf is None else x[leaf] for x in (here, following))
        now[fake] = after[fake]
        after[fake] = np.roll(now, -1, 0)[fake]
    return result


FAULTS: tuple[Callable[[Family, np.random.Generator], Table], ...] = (
    missing, early, late, misplaced, cut, unflagged, interleaved, autoreset,
)  # fmt: skip
#: What is removed of a table; "ids" has neither flags nor next observations.
FORMS: dict[str, tuple[str, ...]] = {
    "following rows": ("next_observation", "episode"),
    "next observations": ("episode",),
    "ids and flags": ("next_observation",),
    "ids": ("next_observation", "truncated"),
}


def shuffled(family: Family, rng: np.random.Generator) -> Table:
    table = right(family, rng)
    return chosen(table, rng.permutation(len(table["reward"])))


def deleted(family: Family, rng: np.random.Generator) -> Table:
    """5 % of the rows were deleted at random."""
    table = right(family, rng)
    keep = (rng.random(len(table["reward"])) > 0.05) | table["terminated"] | table["truncated"]
    return chosen(table, np.flatnonzero(keep))


def cells(family: Family) -> Iterator[tuple[str, str, Callable[..., Table]]]:
    """Names of what is wrong (or "right"), of the form, and the function that makes the table."""
    for form in FORMS:
        yield "right", form, right
    if family not in NATURAL:
        for form in ("following rows", "next observations"):
            yield "right, few long episodes", form, few_long
    if family is not bandit:
        yield "right, interleaved", "ids", interleaved
    yield "right, 5 % of rows deleted", "ids", deleted
    yield "right, shuffled", "next observations", shuffled
    for fault in FAULTS:
        if family in (bandit, contexts) and fault is not unflagged:
            continue
        if fault is cut and family in NATURAL:
            continue
        for form in ("following rows", "next observations"):
            yield fault.__name__, form, fault


# -- measurement


def reports(table: Table) -> list[str]:
    """What ``load_dataset`` says about episode boundaries."""
    from iql_torchrl.data import DatasetError, load_dataset

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            notes = load_dataset(table).notes
        except DatasetError as error:
            return [f"refused: {error}"]
    texts = [str(w.message) for w in caught]
    texts += [note for note in notes if "autoreset" in note and note not in texts]
    return [text for text in texts if not UNRELATED.search(text)]


def measure(names: Sequence[str], seeds: int) -> dict[str, Any]:
    """By family, fault and form: how many of the seeds are reported, named, and the first text."""
    result: dict[str, Any] = {}
    for family in (*MOVING, *OTHERS):
        if names and family.__name__ not in names:
            continue
        entries = result.setdefault(family.__name__, {})
        for fault, form, make in cells(family):
            said = []
            for seed in range(seeds):
                table = make(family, np.random.default_rng(seed))
                texts = reports(without(table, *FORMS[form]))
                said.append([text for text in texts if WRONG_ADVICE.get(fault, "") in text])
            word = NAMES.get(fault, "")
            entries.setdefault(fault, {})[form] = {
                "reported": sum(map(bool, said)),
                "named": sum(any(word in text for text in texts) for texts in said),
                "text": next((texts[0] for texts in said if texts), ""),
            }
    return result


def of_checkout(code: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """``measure`` in a process that imports the package from ``code``."""
    environment = os.environ | {"PYTHONPATH": str(code.resolve()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--print", *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return dict(json.loads(done.stdout))


def tables(results: Mapping[str, Mapping[str, Any]], seeds: int) -> str:
    """How many tables are reported: by kind of rows, form and kind of family, for each checkout."""
    counts: dict[tuple[str, str, str], dict[str, list[int]]] = {}
    moving = [family.__name__ for family in MOVING]
    for code, families in results.items():
        for family, faults in families.items():
            kind = "moving" if family in moving else "others"
            for fault, forms in faults.items():
                for form, entry in forms.items():
                    of_kind = counts.setdefault((fault, form, kind), {name: [] for name in results})
                    of_kind[code].append(entry["reported"])
    lines = [["rows", "form", "families", *results]]
    for names, numbers in counts.items():
        lines.append([*names, *(f"{sum(n)} of {seeds * len(n)}" for n in numbers.values())])
    return text_table(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--old", type=Path, help="a second checkout to compare with")
    parser.add_argument("--code", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--only", default="", help="families, separated by commas")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--print", action="store_true", help="measure this process's package only")
    parser.add_argument("--output", type=Path, default=place("boundaries"))
    options = parser.parse_args()
    if options.print:
        names = [name for name in options.only.split(",") if name]
        print(json.dumps(measure(names, options.seeds)))
        return
    arguments = ["--only", options.only, "--seeds", str(options.seeds)]
    codes = {"old": options.old} if options.old else {}
    codes["new"] = options.code
    results = {name: of_checkout(code, arguments) for name, code in codes.items()}
    print(tables(results, options.seeds))
    commits = {name: machine(checkout=code)["commit"] for name, code in codes.items()}
    save(options.output, {"commits": commits, "seeds": options.seeds, "results": results})


if __name__ == "__main__":
    main()
