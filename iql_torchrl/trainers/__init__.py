"""The offline trainer, a TorchRL ``Trainer``, and the files of its runs."""

from iql_torchrl.trainers.trainer import OfflineTrainer

__all__ = [
    "OfflineTrainer",
]
