"""What a sweep repeats by itself, and how often; all that failed is repeated by the next call.

A task whose process dies continues from its last checkpoint: in the engine ``local`` it is performed
``PERFORMED`` times, on Ray it is repeated ``RAY_RETRIES`` times, and on Slurm whenever it is preempted.
A task that raises is not repeated. The evaluation of a member that raises is made ``attempts`` times.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from iql_torchrl.agent.build import Agent
from iql_torchrl.data import OfflineDataset
from iql_torchrl.processes import ProcessEnded

__all__ = ["FAILED", "RAY_RETRIES", "Row", "Score", "first_line", "is_repeated", "scored", "why"]

Row = dict[str, Any]
Score = Callable[[Agent, OfflineDataset], Mapping[str, float]]

PERFORMED, RAY_RETRIES = 3, 3
FAILED = "its evaluation failed"


def is_repeated(error: BaseException, name: str, deaths: Counter[str]) -> bool:
    """Whether a failed call is performed again; ``deaths`` of its processes are counted by name."""
    died = isinstance(error, ProcessEnded)
    deaths[name] += died
    return died and deaths[name] < PERFORMED


def why(error: BaseException) -> str:
    """Why a call failed that is not repeated, in one line."""
    if isinstance(error, ProcessEnded):
        return (
            f"its process ended {PERFORMED} times, with {error}; SIGKILL mostly means that memory ran "
            "out: use fewer workers or members_per_task."
        )
    return f"{type(error).__name__}: {first_line(error)}"


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def scored(score: Score, agent: Agent, dataset: OfflineDataset, attempts: int) -> Row:
    """``score`` and its bounds, or the ``error`` of this member: the others are evaluated."""
    for attempt in range(attempts):
        try:
            given = {name: float(value) for name, value in score(agent, dataset).items()}
            if "score" in given:
                return dict.fromkeys(("score", "score_low", "score_high"), given["score"]) | given
            raise ValueError(
                f"score returned {sorted(given)}; expected a mapping with 'score', and with "
                "'score_low' and 'score_high' where they are known."
            )
        except Exception as error:
            reason = first_line(error)
            print(f"evaluation {attempt + 1} of {attempts} failed: {reason}", file=sys.stderr)
    return {"error": f"{FAILED}: {reason}"}
