"""The state of a run: what a checkpoint contains, and what must be equal where a run continues it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torchrl import logger as torchrl_logger
from torchrl.checkpoint import Checkpoint, GlobalRNGState
from torchrl.data import ImmutableDatasetWriter, ReplayBuffer
from torchrl.trainers import Trainer

from iql_torchrl import files, private_apis
from iql_torchrl.config import IQLConfig, config_settings
from iql_torchrl.data import DatasetSummary, ShardedReplay
from iql_torchrl.data.digests import fingerprint
from iql_torchrl.data.windows import WindowStorage
from iql_torchrl.distributed import Ranks
from iql_torchrl.evaluation.background import BackgroundEvaluation
from iql_torchrl.update.step import part_of

Self = TypeVar("Self", bound="ResumableTrainer")
MODULE = "trainer_module."  # begins the name of a part that was registered on the trainer
MOST_LISTED = 5  # differences in one message


def data_state(replay_buffer: Any, dataset: DatasetSummary | None) -> dict[str, Any]:
    """Identity of the data: digests (None for a buffer that can grow), reward scaling, name."""
    if dataset is None and isinstance(replay_buffer, ShardedReplay):
        dataset = replay_buffer.dataset
    if dataset is not None:
        mapped = [dataset.reward_map.scale, dataset.reward_map.shift]
        return {"fingerprint": dataset.fingerprint(), "reward_map": mapped, "name": dataset.name}
    digests = None
    if _is_fixed(replay_buffer):
        storage = replay_buffer.storage
        windows = isinstance(storage, WindowStorage)
        digests = fingerprint(storage.windows.table() if windows else storage.get(slice(None)))
    return {"fingerprint": digests, "reward_map": None, "name": None}


def data_digest(data: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits of ``data_state``: equal for equal rows with an equal reward scaling."""
    text = json.dumps([data["fingerprint"], data["reward_map"]], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def _is_fixed(buffer: Any) -> bool:
    """Return True if ``buffer`` is a TorchRL buffer to which nothing can be added."""
    return isinstance(buffer, ReplayBuffer) and isinstance(buffer.writer, ImmutableDatasetWriter)


def check_same_data(ranks: Ranks, data: Mapping[str, Any], replay_buffer: Any) -> None:
    """Raises ``ValueError`` on all ranks unless they have the same data and draw the same rows."""
    ranks.check_same(
        data,
        "the ranks have different data: their datasets' digests differ. Load the same files with the "
        "same arguments on every rank.",
    )
    generator = getattr(replay_buffer, "generator", None)
    if generator is None and isinstance(replay_buffer, ReplayBuffer):
        generator = private_apis.generator_of(replay_buffer)
    state: Any = None if generator is None else generator.get_state().tolist()
    if isinstance(replay_buffer, ShardedReplay):
        whole = replay_buffer.state_dict()
        state = [state, *(whole[name] for name in ("rotation", "since", "replace_every"))]
    ranks.check_same(
        state,
        "the ranks' replay buffers would draw different rows, and each rank must draw the whole "
        "batch: build the buffer with the same seed= and other arguments on every rank.",
    )


def check_same_run(
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    *,
    config: type[IQLConfig] = IQLConfig,
) -> None:
    """Raise ``CheckpointError`` naming everything in which a checkpoint and a run differ.

    ``saved`` and ``current`` are states of a trainer by part; parts that one of them lacks, data
    without digests and settings that may change are not compared. A setting of a config that an older
    version did not save has its default, which ``config`` has; one of a loss is not compared, nor one
    that an older version saved under another name.
    """
    old, new = (_compared(states, config) for states in (saved, current))
    for group in {"settings", "others"} & old.keys() & new.keys():
        known = old[group].keys() & new[group].keys()
        for groups in (old, new):
            groups[group] = {name: groups[group][name] for name in known}
    differences = {
        name: f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for before, now in ((old[group], new[group]) for group in new if group in old)
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    }
    if differences:
        listed, more = list(differences.values())[:MOST_LISTED], len(differences) - MOST_LISTED
        name = saved.get("data", {}).get("name")
        named = f" ({name})" if name else ""
        raise files.CheckpointError(
            f"the checkpoint is of another run: {'; '.join(listed)}"
            f"{f'; and {more} more' if more > 0 else ''}. Resume with the dataset{named}, the settings "
            "and the networks of the checkpoint, or start a new run."
        )


def _compared(states: Mapping[str, Any], config: type[IQLConfig]) -> dict[str, dict[str, Any]]:
    """Values that must be equal in two runs, from the state of one; unknown groups are left out."""
    groups: dict[str, dict[str, Any]] = {}
    data = states.get("data", {})
    if data.get("reward_map") is not None:
        groups["reward"] = {
            "the reward scaling (reward= of load_dataset)": list(data["reward_map"])
        }
    if data.get("fingerprint") is not None:
        groups["data"] = {f"{key} of the dataset": v for key, v in data["fingerprint"].items()}
    if "settings" in states:
        settings = {name: v for name, v in states["settings"].items() if v is not None}
        if "others" in settings:  # unknown to older checkpoints
            groups["others"] = settings.pop("others")
        groups["settings"] = settings
    if "agent" in states:
        values = config().to_dict() | dict(states["agent"]["config"])
        may_change = {
            name for name, setting in config_settings(config).items() if setting.may_change(values)
        }
        groups["config"] = {name: v for name, v in values.items() if name not in may_change}
    if "replay_buffer" in states:
        replay = states["replay_buffer"]
        sharded, seeded = "rotation" in replay.get("whole", {}), replay.get("generator") is not None
        kind = "fixed" if "sampler" in replay else "of shards" if sharded else "growing"
        sampler = replay.get("sampler") or replay.get("whole", {}).get("_sampler") or {}
        groups["replay"] = {
            "the kind of replay buffer": kind,
            "seed= of the replay buffer": seeded,
            "priorities of the sampler": private_apis.has_priorities(sampler),
        }
    tensors = states.get("loss_module", {}).items()
    if tensors:
        shapes = {f"the shape of {name}": tuple(getattr(v, "shape", ())) for name, v in tensors}
        groups["shapes"] = shapes
    return groups


class ResumableTrainer(Trainer):
    """TorchRL's trainer with one state, in checkpoints that run no code, from which a run continues.

    Abstract: a subclass has ``train``, and the attributes that are read here (``step``, ``agent``,
    ``dataset``, ``ranks``, ``folder``, ``evaluation``, ``monitor``, ``progress``) before
    ``Trainer.__init__``.
    """

    _keep_as: Path | None = None  # where the next checkpoint is kept too
    _in_folder = False  # whether the run in ``folder`` is this one

    @cached_property
    def data_state(self) -> dict[str, Any]:
        """Identity of the data; computed once, because every byte is read."""
        return data_state(self.replay_buffer, self.dataset)

    @property
    def updates(self) -> int:
        """Updates made so far, however often the run was stopped."""
        return int(self.collected_frames)  # which TorchRL's hooks read

    @property
    def total_updates(self) -> int:
        return int(self.total_frames)

    def _check_total(self, updates: int) -> None:
        """Raise ``ValueError`` when ``updates`` made so far are more than ``total_updates``."""
        if updates > self.total_updates:
            raise ValueError(
                f"total_updates is {self.total_updates} and the run has made {updates} updates "
                "already. It counts from the first update of the run, however often that was stopped: "
                f"give at least {updates}, or more to train further."
            )

    # -- what a checkpoint contains ----------------------------------------------------------------

    def _parts(self) -> dict[str, Any]:
        """The parts of a checkpoint by name, each with ``state_dict`` and ``load_state_dict``."""
        parts = {
            "loss_module": self.loss_module,
            "step": self.step,
            "replay_buffer": _part(self._sampling_state, self._load_sampling),
            "trainer_state": _part(self._progress_state, self._load_progress),
        }
        compared = {"data": lambda: self.data_state, "settings": self._settings}
        if self.agent is not None:
            compared["agent"] = self.agent.description
        for name, describe in compared.items():
            parts[name] = _part(describe, partial(self._check_part, name))
        modules = private_apis.registered_modules(self)
        parts |= {f"{MODULE}{name}": module for name, module in modules.items()}
        parts["random"] = GlobalRNGState()  # last, because loading others may draw from it
        return {n: part for n, part in parts.items() if callable(getattr(part, "state_dict", None))}

    def _check_part(self, name: str, saved: Any) -> None:
        self._check_same({name: saved})

    def _check_same(self, saved: Mapping[str, Any]) -> None:
        """Raise ``CheckpointError`` where the ``saved`` parts are of another run than this one."""
        current = {n: p.state_dict() for n, p in self._parts().items() if n in saved}
        config = IQLConfig if self.agent is None else type(self.agent.config)
        check_same_run(saved, current, config=config)

    def _settings(self) -> dict[str, Any]:
        """The settings of parts that may have been made by hand."""
        loss = self.loss_module
        settings = getattr(loss, "description", {"reduction": getattr(loss, "reduction", None)})
        return {name: _plain(value) for name, value in settings.items()} | {
            "loss": type(loss).__name__,
            "optimizer": type(self.optimizer).__name__,
            "order": part_of(self.step, "order"),
            "max_grad_norm": part_of(self.step, "max_grad_norm"),
            "batch_size": getattr(self.replay_buffer, "batch_size", None),
            "others": self._other_settings(),
        }

    def _other_settings(self) -> dict[str, Any]:
        """Settings of estimator, updater and step; numbers to six digits, which float32 has."""
        loss, updater = self.loss_module, part_of(self.step, "target_updater")
        gamma = getattr(getattr(loss, "value_estimator", None), "gamma", None)
        one = gamma if isinstance(gamma, torch.Tensor) and gamma.numel() == 1 else None
        eps = getattr(updater, "eps", None)
        return {
            "gamma": None if one is None else float(f"{one.item():.6g}"),
            "tau of the target updater": None if eps is None else float(f"{1 - eps:.6g}"),
            "precision": part_of(self.step, "precision"),
        }

    def _sampling_state(self) -> dict[str, Any]:
        """The state of sampling; the data too if the buffer can grow."""
        buffer = self.replay_buffer
        if _is_fixed(buffer):
            generator = private_apis.generator_of(buffer)
            state = None if generator is None else generator.get_state()
            sampler = private_apis.plain_sampler_state(buffer.sampler)
            return {"sampler": sampler, "generator": state}
        if not hasattr(buffer, "state_dict"):
            return {}
        return {"whole": private_apis.plain_buffer_state(buffer)}

    def _load_sampling(self, state: Mapping[str, Any]) -> None:
        if "whole" in state:
            private_apis.load_buffer_state(self.replay_buffer, state["whole"])
        elif "sampler" in state:
            private_apis.load_sampler_state(self.replay_buffer.sampler, state["sampler"])
            generator = private_apis.generator_of(self.replay_buffer)
            if generator is not None:
                generator.set_state(state["generator"].cpu())

    def _progress_state(self) -> dict[str, Any]:
        logged = {name: values[-1] for name, values in private_apis.logged_values(self).items()}
        background = isinstance(self.evaluation, BackgroundEvaluation)
        return {
            "progress": {"updates": self.updates, **self.progress.state_dict()},
            "last_save": self._last_save,
            "logged": {name: float(v) for name, v in logged.items() if isinstance(v, (int, float))},
            "pending": self.evaluation.pending if background else {},
        }

    def _load_progress(self, state: Mapping[str, Any]) -> None:
        device = next((p.device for p in self.loss_module.parameters()), None)
        self.progress.load_state_dict(state["progress"], device)
        self.collected_frames = self._optim_count = state["progress"]["updates"]
        self._last_save = state["last_save"]
        for name, value in state["logged"].items():
            private_apis.logged_values(self)[name].append(value)
        if isinstance(self.evaluation, BackgroundEvaluation):
            self.evaluation.resubmit(state["pending"])  # they had not ended when this was saved

    # -- saving ------------------------------------------------------------------------------------

    def save_trainer(self, force_save: bool = False) -> None:
        """Save if ``save_trainer_interval`` updates have passed, the policy is kept, or forced."""
        waited = self.updates - max(0, self._last_save) >= self.save_trainer_interval
        due = waited or force_save or self._keep_as is not None
        if not (due and self._has_checkpoint_destination()):
            return
        self._last_save = self.updates
        path = Path(self.save_trainer_file or "")
        if self.checkpoint_rotation is not None:
            name = f"{files.PREFIX}{self.updates:012d}{files.SUFFIX}"
            path = Path(self.checkpoint_rotation.directory) / name
        with files.with_filename(path):
            self._save_trainer()
        if self._keep_as is not None:
            files.replace_by_link(path, self._keep_as)
            self._keep_as = None

    def _checkpoint_manifest_metadata(self) -> dict[str, Any]:
        metadata: dict[str, Any] = super()._checkpoint_manifest_metadata()
        latest = self.progress.latest(self.monitor)
        return metadata | ({} if latest is None else {latest[0]: latest[2]})

    def _sync_checkpoint_components(self, checkpoint: Checkpoint | None = None) -> Checkpoint:
        checkpoint = checkpoint or self.checkpoint or Checkpoint()
        for name, part in self._parts().items():
            if name not in checkpoint:
                checkpoint.register(name, part, adapter=files.StateAdapter())
        return checkpoint

    def state_dict(self) -> dict[str, Any]:
        """The state of every part of a checkpoint, by name."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    # -- continuing --------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue the run of which this is the state; every check precedes every change.

        Raises ``CheckpointError`` for the state of another run, saying what differs, and ``ValueError``
        for a run with more updates than ``total_updates``.
        """
        # made at its first use, and part of the saved state
        _ = getattr(self.loss_module, "value_estimator", None)
        parts = self._parts()
        own, saved = ({n for n in names if n.startswith(MODULE)} for names in (parts, state_dict))
        missing = [n for n in parts if n not in state_dict and n not in ("agent", *own)]
        if missing:
            raise files.CheckpointError(
                f"the checkpoint lacks {missing}; it has {sorted(state_dict)}."
            )
        self._check_same(state_dict)
        if isinstance(self.replay_buffer, ShardedReplay):
            self.replay_buffer.check_state(state_dict["replay_buffer"]["whole"])
        self._check_total(state_dict["trainer_state"]["progress"]["updates"])
        for name in own ^ saved:
            place = "registered here" if name in own else "in the checkpoint"
            torchrl_logger.warning(f"{name} is only {place}; it is not loaded.")
        for name, part in parts.items():
            if name in state_dict:
                part.load_state_dict(state_dict[name])

    def load_from_file(self: Self, file: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Load a checkpoint and return this trainer; ``load_from_file(file).train()`` continues.

        Never runs code from the file; ``kwargs`` are not used.

        Raises ``CheckpointError`` with a sentence, and changes nothing, if the file is truncated,
        damaged or from another version, or of another dataset, reward scaling, settings or shapes; and
        ``ValueError`` if the run has made more updates than this trainer's ``total_updates``.
        """
        self.load_state_dict(self.ranks.from_main(lambda: files.read_components(Path(file))))
        self._in_folder = self.folder is not None and self.folder.contains(Path(file))
        return self

    def resume(self: Self) -> Self:
        """Load the newest checkpoint of ``folder`` and return this trainer; nothing is trained.

        ``trainer.resume().train()`` continues the run. Raises as :meth:`load_from_file`, and
        ``ValueError`` without ``folder``.
        """
        return self.load_from_file(self.ranks.from_main(self._newest))

    def _newest(self) -> Path:
        if self.folder is None:
            raise ValueError("resume() looks into folder=, and there is none; use load_from_file.")
        return files.newest(self.folder.rotation.directory)

    def has_checkpoint(self) -> bool:
        """Return True if ``folder`` has a checkpoint from which :meth:`resume` would continue."""
        folder = self.folder
        return self.ranks.from_main(lambda: folder is not None and any(folder.checkpoints()))


def _part(state_dict: Callable[[], Any], load_state_dict: Callable[[Any], None]) -> Any:
    return SimpleNamespace(state_dict=state_dict, load_state_dict=load_state_dict)


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return value if isinstance(value, (int, float, str)) or value is None else repr(type(value))
