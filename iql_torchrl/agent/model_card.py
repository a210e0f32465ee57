"""The card of a shared agent: what it was trained on and how, its scores, and how to use it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from iql_torchrl.agent.export_note import versions
from iql_torchrl.agent.task import Task
from iql_torchrl.data import DatasetSummary
from iql_torchrl.data.episode_digests import digest_of_sketch
from iql_torchrl.data.schema import leaf_spaces
from iql_torchrl.descriptions import describe_space
from iql_torchrl.evaluation.result import Evaluation

if TYPE_CHECKING:
    from iql_torchrl.agent.build import Agent

__all__ = ["TAGS", "check_dataset", "model_card", "scores_of"]

TAGS = ("reinforcement-learning", "offline-reinforcement-learning", "implicit-q-learning")


def model_card(
    agent: Agent,
    repo: str,
    scores: Mapping[str, float] | None,
    dataset: DatasetSummary | None,
    license: str | None,
    tags: Sequence[str],
) -> str:
    """The text of ``README.md``: YAML for the Hub, then Markdown."""
    metadata: dict[str, Any] = {
        "library_name": "iql_torchrl",
        "pipeline_tag": "reinforcement-learning",
        "tags": list(dict.fromkeys((*TAGS, *tags))),
    }
    if license is not None:
        metadata["license"] = license
    # a JSON value is a YAML value
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in metadata.items())
    sections = [
        f"---\n{front}\n---\n",
        f"# {repo.rpartition('/')[2]}\n",
        "A policy learned from logged data by Implicit Q-Learning "
        "([Kostrikov et al. 2021](https://arxiv.org/abs/2110.06169)) with iql_torchrl.\n",
        _usage(repo),
        _section("Task", _task_rows(agent.task)),
        _section("Data", _data_rows(agent.task, dataset)),
    ]
    if scores is not None:
        rows = {name: f"{value:.6g}" for name, value in scores.items()}
        sections.append(_section("Scores", rows))
    settings = {name: json.dumps(value) for name, value in agent.config.to_dict().items()}
    sections += [_section("Settings", settings), _section("Versions", versions())]
    return "\n".join(sections)


def scores_of(evaluation: Evaluation | Mapping[str, float] | None) -> dict[str, float] | None:
    """Scores by name, of an evaluation its ``summary()`` without what one episode leaves undefined.

    Raises ``TypeError`` for anything else, ``ValueError`` naming a score that is no finite number.
    """
    if evaluation is None:
        return None
    if isinstance(evaluation, Evaluation):
        summary = evaluation.summary()
        return {name: value for name, value in summary.items() if not math.isnan(value)}
    if not isinstance(evaluation, Mapping):
        raise TypeError(
            f"evaluation is {type(evaluation).__name__}; expected what evaluate(...) returns, or a "
            "mapping from names to numbers."
        )
    for name, value in evaluation.items():
        number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            raise ValueError(f"evaluation has {name} = {value!r}; expected finite numbers.")
    return {str(name): float(value) for name, value in evaluation.items()}


def check_dataset(dataset: DatasetSummary, task: Task) -> None:
    """Raise ``ValueError`` where ``task`` is known to be of other episodes than ``dataset``."""
    if not isinstance(dataset, DatasetSummary):
        raise TypeError(
            f"dataset is {type(dataset).__name__}; expected what load_dataset(...) returns."
        )
    if task.episodes is not None and not np.array_equal(dataset.sketch(), task.episodes):
        raise ValueError(
            f"dataset is {dataset.name!r}, whose episodes are not those that the agent was made for "
            f"({task.name!r}); pass the dataset that make_agent was given."
        )


def _usage(repo: str) -> str:
    return f"""## Use

```python
from iql_torchrl import Agent

agent = Agent.from_hub({json.dumps(repo)})
action = agent.act(observation)
```

Loading it executes none of its contents. `policy.pt2` is the same policy for plain torch;
`policy.json` describes its inputs and output, with an example.
"""


def _task_rows(task: Task) -> dict[str, str]:
    rows = {
        " ".join(key): describe_space(space)
        for key, space in leaf_spaces(task.observation_space).items()
    }
    rows["action"] = describe_space(task.action_space)
    if task.masked:
        rows["action_mask"] = "one bool per action: True where the action is allowed"
    if task.reference_scores is not None:
        random, expert = task.reference_scores
        rows["returns of score 0 and 100"] = f"{random:.6g}, {expert:.6g}"
    return rows


def _data_rows(task: Task, dataset: DatasetSummary | None) -> dict[str, str]:
    rows = {"name": task.name}
    if task.episodes is not None:
        rows["digest of its episodes"] = digest_of_sketch(task.episodes)
    if dataset is not None:
        rows["episodes"] = str(len(dataset.episode_lengths))
        rows["transitions"] = str(len(dataset))
        rows["mean return"] = f"{dataset.episode_returns.mean():.6g}"
        scale, shift = dataset.reward_map.scale, dataset.reward_map.shift
        rows["rewards were mapped to"] = f"{scale:.6g} * reward + {shift:.6g}"
    return rows


def _section(title: str, rows: Mapping[str, str]) -> str:
    lines = [f"## {title}\n", "| | |", "|---|---|"]
    lines += [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items()]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Text for a cell of a table, shown as code so that no character of it has a meaning."""
    plain = " ".join(text.split()).replace("`", "'").replace("|", "\\|")
    return f"`{plain}`" if plain else ""
