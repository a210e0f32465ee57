"""Many runs trained as one."""

from iql_torchrl.population.runs import IQLPopulation, PopulationEvent

__all__ = [
    "IQLPopulation",
    "PopulationEvent",
]
