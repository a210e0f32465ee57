"""The table that compares evaluated policies with the log that they were learned from."""

from __future__ import annotations

import math
from collections.abc import Mapping

from iql_torchrl.data import OfflineDataset
from iql_torchrl.evaluation.result import Evaluation
from iql_torchrl.evaluation.statistics import standard_error

__all__ = ["results_table"]


def results_table(dataset: OfflineDataset, results: Mapping[str, Evaluation]) -> str:
    """One line for the log, then one for each entry of ``results``, by name.

    Columns: mean of the undiscounted returns, its standard error (``-`` for one episode), number of
    episodes; and the normalised score of the mean, 0 to 100, if the dataset has reference scores.
    """
    returns = {"the log": dataset.episode_returns}
    returns |= {name: result.returns for name, result in results.items()}
    scored = dataset.reference_scores is not None
    head = f"{'':18} {'mean return':>12} {'std. error':>11} {'episodes':>9}"
    lines = [head + scored * "  score 0..100"]
    for name, values in returns.items():
        mean, error = float(values.mean()), standard_error(values)
        shown = "-" if math.isnan(error) else f"{error:.1f}"
        score = f"  {float(dataset.normalised_score(mean)):12.1f}" if scored else ""
        lines.append(f"{name:18} {mean:12.1f} {shown:>11} {len(values):9d}{score}")
    return "\n".join(lines)
