"""One run on several processes: the group of ranks, and the update that they share."""

from iql_torchrl.distributed.parallel_step import data_parallel
from iql_torchrl.distributed.ranks import Ranks

__all__ = ["Ranks", "data_parallel"]
