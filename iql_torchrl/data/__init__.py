"""Offline data: readers, checks of every row, scaling of rewards, TorchRL buffers."""

from iql_torchrl.data.chunks import Chunks as Chunks
from iql_torchrl.data.dataset import DatasetSummary as DatasetSummary
from iql_torchrl.data.dataset import OfflineDataset as OfflineDataset
from iql_torchrl.data.dataset import RelabelledDataset as RelabelledDataset
from iql_torchrl.data.goals import GoalEnv as GoalEnv
from iql_torchrl.data.goals import GoalOrigins as GoalOrigins
from iql_torchrl.data.goals import GoalSampler as GoalSampler
from iql_torchrl.data.load import load_dataset as load_dataset
from iql_torchrl.data.replay import DeviceSampler as DeviceSampler
from iql_torchrl.data.replay import MemberSampler as MemberSampler
from iql_torchrl.data.replay import replay_buffer as replay_buffer
from iql_torchrl.data.scaling import REFERENCE_RETURNS as REFERENCE_RETURNS
from iql_torchrl.data.scaling import ObservationStatistics as ObservationStatistics
from iql_torchrl.data.scaling import RewardMap as RewardMap
from iql_torchrl.data.scaling import normalised_score as normalised_score
from iql_torchrl.data.schema import DatasetError as DatasetError
from iql_torchrl.data.schema import DatasetWarning as DatasetWarning
from iql_torchrl.data.shards import ShardedDataset as ShardedDataset
from iql_torchrl.data.shards import ShardedReplay as ShardedReplay
from iql_torchrl.data.shards import build_shards as build_shards
from iql_torchrl.data.shards import load_shards as load_shards
from iql_torchrl.data.spaces import stacked_space as stacked_space
from iql_torchrl.data.spaces import stacked_statistics as stacked_statistics
from iql_torchrl.data.windows import Windows as Windows
from iql_torchrl.data.windows import WindowSampler as WindowSampler
