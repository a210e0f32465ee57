"""Every private name of torch, tensordict and TorchRL that this package uses.

A private name may change in any release, so each one is used here and nowhere else, behind a
function or name of our own whose docstring says why no public one serves. ``tests/test_host.py``
holds the behaviour that is relied on, and importing this module raises ``ImportError`` naming what
is missing.

Classes derived from TorchRL's ``LossModule`` and ``Trainer`` also call and override private methods
of those base classes, because a subclass has no other way to take part in what the base class does.
``INHERITED`` lists them; ``tests/test_architecture.py`` allows these names and no others.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensordict
import torch
import torchrl
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictParams
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.optim import Optimizer
from torchrl.checkpoint import Checkpoint
from torchrl.data import ImmutableDatasetWriter, LazyTensorStorage, ReplayBuffer
from torchrl.objectives import LossModule

with warnings.catch_warnings():  # TorchRL warns about its own classes when these are first imported
    warnings.simplefilter("ignore", DeprecationWarning)
    from torchrl.trainers import Trainer

__all__ = [
    "DETACHED_CRITICS",
    "INHERITED",
    "LIVE_CRITICS",
    "LIVE_ENCODER",
    "TARGET_CRITICS",
    "TARGET_ENCODER",
    "add_to_all",
    "assert_dtype",
    "assert_later",
    "buffers_of",
    "children_of",
    "compile_program",
    "generator_of",
    "has_hooks",
    "has_onednn_linear",
    "hook_tables",
    "inductor_settings",
    "keeps_batch_statistics",
    "logged_values",
    "mark_stepped",
    "onednn_linear",
    "parameters_of",
    "plain_entries",
    "reads_positions",
    "registered_modules",
    "remove_path",
    "stored_rows",
    "summed_in_graph",
    "tracing_gradients",
    "untiled_loops_only",
    "validates_distributions",
    "version_of",
    "without_prefetched",
]

# What a TorchRL loss calls the parameters of its critics; the last are this package's: the live
# ones, of which an evaluation differentiates the inputs alone.
LIVE_CRITICS, TARGET_CRITICS = "qvalue_network_params", "target_qvalue_network_params"
DETACHED_CRITICS = "detached_qvalue_network_params"
LIVE_ENCODER, TARGET_ENCODER = "encoder_network_params", "target_encoder_network_params"

TESTED = "torch 2.13, TorchRL 0.14.1 and tensordict 0.14.3"

# Private names of base classes that derived classes call, override or read.
INHERITED: Mapping[type, tuple[str, ...]] = {
    nn.Module: ("_apply",),  # device and dtype moves, of tensors that are no buffers too
    LossModule: (
        "_AcceptedKeys",  # the dataclass of keys that set_keys renames
        "_apply",  # device and dtype moves, after which shared tensors are tied again
        "_clear_weakrefs",  # what every TorchRL loss calls at the end of forward
        "_loss_mask_keys",  # entries that say which steps count
        "_make_vmap",  # set_vmap_randomness calls it
        "_set_deprecated_ctor_keys",  # the error for priority_key=
        # attributes of an instance
        "_has_update_associated",  # networks whose targets have an updater; set where one is made
        "_tensor_keys",  # the names behind tensor_keys
    ),
    Trainer: (
        "_checkpoint_manifest_metadata",
        "_has_checkpoint_destination",
        "_log",
        "_post_epoch_hook",
        "_post_epoch_log_hook",
        "_post_loss_hook",
        "_post_optim_complete_log_hook",
        "_post_optim_hook",
        "_post_optim_log",
        "_post_steps_hook",
        "_post_steps_log_hook",
        "_pre_epoch_log_hook",
        "_pre_optim_hook",
        "_pre_steps_log_hook",
        "_save_trainer",
        "_setup_hook",
        "_shutdown_hook",
        "_sync_checkpoint_components",
        # attributes of an instance: lists of registered hooks, values logged and shown
        "_batch_process_ops",
        "_log_dict",
        "_post_loss_ops",
        "_post_optim_log_ops",
        "_post_optim_ops",
        "_post_steps_log_ops",
        "_pre_epoch_log_ops",
        "_pre_epoch_ops",
        "_pre_steps_log_ops",
        "_process_optim_batch_ops",
    ),
}
# Of these, attributes that only instances have, so that the check at import leaves them out.
OF_INSTANCES = {
    "_has_update_associated",
    "_tensor_keys",
    "_log_dict",
    *(name for name in INHERITED[Trainer] if name.endswith("_ops")),
}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _require(owner: Any, *names: str) -> None:
    """Raise ``ImportError`` where ``owner`` lacks one of the private ``names``."""
    for name in names:
        if not hasattr(owner, name):
            kind = owner if isinstance(owner, type) else type(owner)
            where = getattr(owner, "__name__", None) or kind.__qualname__
            raise ImportError(
                f"{where}.{name} is missing in torch {torch.__version__}, TorchRL "
                f"{torchrl.__version__}, tensordict {tensordict.__version__}. iql_torchrl uses this "
                f"private name and was tested with {TESTED}: install those versions."
            )


# -- torch -----------------------------------------------------------------------------------------


def tracing_gradients() -> Any:
    """A context in which ``torch.compile`` traces ``torch.autograd.grad``; no public setting exists.

    Every step is a program of its own although steps share code, so the number of compilations per
    function is not limited.
    """
    return torch._dynamo.config.patch(
        trace_autograd_ops=True,
        recompile_limit=2**31,
        accumulated_recompile_limit=2**31,
    )


def compile_program(
    graph: torch.fx.GraphModule, inputs: Sequence[Any], options: Mapping[str, Any]
) -> Callable[..., Any]:
    """Inductor's program of ``graph``; ``torch.compile`` gives one only behind its guards.

    Inductor is imported here, when it is used: importing it takes seconds and emits warnings.
    """
    from torch._inductor import compile_fx

    program: Any = compile_fx.compile_fx(graph, inputs, config_patches=dict(options))
    return program


@functools.cache
def untiled_loops_only() -> Any:
    """A pass for Inductor's ``_post_fusion_custom_pass`` without which CPU programs can be wrong.

    Inductor may compute several tensors in one loop over rows and keep an intermediate result in a
    buffer of one row. Where that loop is vectorised over rows, the rows overwrite each
    other's values and the program silently returns wrong numbers (pytorch/pytorch issue 185702;
    seen with torch 2.13 in populations with one thread). With this pass such loops stay separate.
    """
    from torch._inductor import custom_graph_pass

    base: Any = getattr(custom_graph_pass, "CustomSchedulerPass", custom_graph_pass.CustomGraphPass)

    class UntiledLoopsOnly(base):
        def __call__(self, nodes: list[Any]) -> list[Any]:
            for node in nodes:
                if hasattr(node, "check_outer_fusion_loop_level_attr"):
                    accepts = node.check_outer_fusion_loop_level_attr
                    node.check_outer_fusion_loop_level_attr = functools.partial(_untiled, accepts)
            return nodes

        def uuid(self) -> str:  # part of the keys of Inductor's cache of programs
            return "iql_torchrl.untiled_loops_only.1"

        def __reduce__(self) -> Any:
            return untiled_loops_only, ()

    return UntiledLoopsOnly()


def _untiled(accepts: Callable[..., bool], proxies: Sequence[Any], depth: int) -> bool:
    """Whether Inductor ``accepts`` one loop for all and steps through it row by row."""
    loops = [loop for proxy in proxies for loop in proxy.loop_nest.loops[:depth]]
    return all(loop.steps == 1 for loop in loops) and accepts(proxies, depth)


def inductor_settings() -> set[str]:
    """Names of Inductor's settings in this version of torch, which refuses others."""
    import torch._inductor  # here, as in compile_program

    return set(torch._inductor.list_options())


def has_onednn_linear() -> bool:
    """Whether float32 products may be MKL's or oneDNN's; see :func:`onednn_linear`."""
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` by oneDNN, without autograd; matrices of any strides.

    No public function of torch computes float32 by oneDNN outside of compiled inference.
    """
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def keeps_batch_statistics(module: nn.Module) -> bool:
    """Whether the layer normalises with statistics of a batch, or averages them over batches.

    That is every BatchNorm, SyncBatchNorm too, and InstanceNorm with running averages. Their common
    base class has no public name. TorchRL's BatchRenorm is a class of its own.
    """
    from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
    from torchrl.modules import BatchRenorm1d

    if isinstance(module, _NormBase) and not isinstance(module, _BatchNorm):
        return bool(module.track_running_stats)
    return isinstance(module, _BatchNorm | BatchRenorm1d)


def summed_in_graph(values: Tensor) -> Tensor:
    """The sum over all ranks of the default group, as one node of a graph under ``torch.compile``.

    ``torch.distributed.all_reduce`` writes in place; this form, of which ``torch.distributed`` has no
    public one, returns a new tensor.
    """
    from torch.distributed import _functional_collectives, group

    everyone: Any = group.WORLD
    total: Tensor = _functional_collectives.all_reduce(values, "sum", everyone)
    return total


def add_to_all(totals: Sequence[Tensor], values: Sequence[Tensor], factor: float) -> None:
    """``total += factor * value`` in one call; the public optimizers offer no such sum."""
    torch._foreach_add_(list(totals), list(values), alpha=factor)


def assert_later(condition: Tensor, message: str) -> None:
    """An assertion that ``torch.export`` keeps in the program; Python's is evaluated once."""
    torch._assert_async(condition, message)


def assert_dtype(values: Tensor, dtype: torch.dtype) -> None:
    """As :func:`assert_later`, for the dtype of an input."""
    torch.ops.aten._assert_tensor_metadata.default(values, dtype=dtype)


def mark_stepped(optimizer: Optimizer) -> None:
    """Record that the optimizer has stepped where its ``step`` was not called.

    Schedulers warn about their order unless this mark, which the optimizer's own ``step`` sets, is
    there.
    """
    setattr(optimizer, "_opt_called", True)  # noqa: B010


def version_of(tensor: Tensor) -> int:
    """How often the tensor was written to in place; only this counter says so without a read."""
    return tensor._version


def validates_distributions() -> bool:
    """torch's default for ``validate_args``; a setter is public, the value is not."""
    return bool(Distribution._validate_args)


def children_of(module: nn.Module) -> dict[str, Any]:
    """Submodules by name, the module's own table.

    ``named_children()`` names a module once, however often it is used, and ``getattr`` of a TorchRL
    loss warns about targets.
    """
    return module._modules


def parameters_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The module's own table of parameters; ``setattr`` accepts only ``nn.Parameter``."""
    return module._parameters  # type: ignore[return-value]


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The module's own table of buffers."""
    return module._buffers


def has_hooks(module: nn.Module) -> bool:
    """Whether anything is registered that runs with the module's forward or backward."""
    return any(hook_tables(module))


def hook_tables(module: nn.Module) -> list[Any]:
    """What is registered to run with the module's forward or backward: the module's own tables."""
    return [getattr(module, name) for name in _HOOKS]


# -- tensordict ------------------------------------------------------------------------------------


def plain_entries(params: TensorDictParams) -> TensorDictBase:
    """The parameters as a plain TensorDict; ``TensorDictParams.copy`` gives parameters again."""
    entries: TensorDictBase = params._param_td
    return entries


def reads_positions(module: TensorDictModule) -> bool:
    """Whether it passes the entries of its in_keys by position, and reads them with no options."""
    return not (module._kwargs or module._get_kwargs)


# -- TorchRL ---------------------------------------------------------------------------------------


def generator_of(replay: ReplayBuffer) -> torch.Generator | None:
    """The generator given with ``set_rng``, which has no public reader."""
    generator: torch.Generator | None = getattr(replay, "_rng", None)
    return generator


def stored_rows(replay: ReplayBuffer) -> Any:
    """What a buffer's storage holds, without the copy that reading rows makes."""
    return getattr(replay.storage, "_storage", None)


def without_prefetched(state: Mapping[str, Any]) -> dict[str, Any]:
    """A buffer's state without batches drawn ahead, which are no plain data."""
    return {key: value for key, value in state.items() if key != "_prefetch_state"}


def registered_modules(trainer: Trainer) -> Mapping[str, Any]:
    """What ``Trainer.register_module`` was given, by name; there is no public reader."""
    modules: Mapping[str, Any] = trainer._modules
    return modules


def remove_path(path: Path) -> None:
    """Delete a file or folder of a checkpoint as ``Checkpoint`` does."""
    Checkpoint._remove_path(path)


def logged_values(trainer: Trainer) -> dict[str, list[Any]]:
    """Everything the trainer has logged so far, by name."""
    values: dict[str, list[Any]] = trainer._log_dict
    return values


_require(torch, "_assert_async", "_dynamo", "_foreach_add_")
_require(torch._dynamo.config, "trace_autograd_ops", "recompile_limit")
_require(torch.ops.aten, "_assert_tensor_metadata")
_require(Distribution, "_validate_args")
_require(torch.empty(0), "_version")
_require(nn.Identity(), "_modules", "_parameters", *_HOOKS)
_require(TensorDictParams(TensorDict({})), "_param_td")
_require(TensorDictModule(nn.Identity(), ["a"], ["b"]), "_kwargs", "_get_kwargs")
_storage = LazyTensorStorage(1, compilable=True)  # otherwise multiprocessing starts a process
_require(ReplayBuffer(storage=_storage, writer=ImmutableDatasetWriter()), "_rng")
_require(_storage, "_storage")
_require(Checkpoint, "_remove_path")
for _base, _names in INHERITED.items():
    _require(_base, *(name for name in _names if name not in OF_INSTANCES))
