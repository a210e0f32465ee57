"""The offline trainer on TorchRL's Trainer, and what a run leaves on disk."""

from iql_torchrl.trainers.trainer import OfflineTrainer

__all__ = [
    "OfflineTrainer",
]
