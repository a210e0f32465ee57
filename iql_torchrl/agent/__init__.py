"""From a config and a dataset to the parts of a run; acting, export and sharing."""

from iql_torchrl.agent.build import Agent, build_agent, make_agent
from iql_torchrl.agent.hub import HubError
from iql_torchrl.agent.task import Task

__all__ = [
    "Agent",
    "HubError",
    "Task",
    "build_agent",
    "make_agent",
]
