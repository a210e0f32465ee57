"""Every private name of torch, tensordict and TorchRL that this package uses.

A private name may change in any release, so each one is used here and nowhere else, behind a
function of our own whose docstring says why no public one serves. It is looked up when it is used
(:func:`find`), never at import. Where a release lacks it, the function takes a slower public way, or
raises ``NotImplementedError`` with the feature, the versions and another way to the same result.
``tests/test_private_apis.py`` holds the behaviour that is relied on, and hides each name in turn.

Classes derived from TorchRL's ``LossModule`` and ``Trainer`` also call and override private methods
of those base classes, because a subclass has no other way to take part in what the base class does;
``tests/test_architecture.py`` checks that the base classes have them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensordict
import torch
import torchrl
from torch import Tensor, nn
from torch.optim import Optimizer
from torchrl.data import ReplayBuffer

TESTED = "torch 2.14, TorchRL 0.14.1 and tensordict 0.14.3"

PRIORITIES = {"_sum_tree", "_min_tree"}  # of a prioritised sampler, in its state_dict
_NO_EXPORT = "Keep the checkpoint instead, and act with Agent.load(path)."
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def find(owner: Any, name: str, default: Any = None) -> Any:
    """``owner``'s private ``name``, or ``default`` where this release lacks it."""
    return getattr(owner, name, default)


def _needed(owner: Any, name: str, feature: str, way_round: str) -> Any:
    """As :func:`find`; ``NotImplementedError`` where it is missing, which says what to do."""
    attribute = find(owner, name)
    if attribute is None:
        kind = owner if isinstance(owner, type) else type(owner)
        where = getattr(owner, "__name__", None) or kind.__qualname__
        raise NotImplementedError(
            f"{feature} needs {where}.{name}, which is missing in torch {torch.__version__}, TorchRL "
            f"{torchrl.__version__}, tensordict {tensordict.__version__} (tested: {TESTED}). "
            f"{way_round}"
        )
    return attribute


# -- torch -----------------------------------------------------------------------------------------


def tracing_gradients() -> Any:
    """A context in which ``torch.compile`` traces ``torch.autograd.grad``; no public setting exists.

    Every step is a program of its own although steps share code, so the number of compilations per
    function is not limited. Settings that this torch lacks are left out: ``trace_autograd_ops`` is
    meant to disappear once tracing is what torch always does. A torch that has neither the setting
    nor the tracing stops in ``torch.compile`` and names ``autograd.grad``.
    """
    values = {
        "trace_autograd_ops": True,
        "recompile_limit": 2**31,
        "accumulated_recompile_limit": 2**31,
    }
    settings = find(find(torch, "_dynamo"), "config")
    known = {name: value for name, value in values.items() if find(settings, name) is not None}
    return settings.patch(**known) if known else contextlib.nullcontext()


def recompilation_reason() -> str:
    """What differed when torch last compiled a program again, as torch says it; empty if unknown.

    It is in torch's records of compilations; its log has it only with ``TORCH_LOGS=recompiles``.
    """
    records = find(_module("torch._dynamo.utils"), "get_compilation_metrics", list)()
    reasons = [find(record, "recompile_reason") for record in records[-1:]]
    guard = str(reasons[0]).splitlines()[0] if reasons and reasons[0] else ""
    return guard.partition(":")[2].partition("#")[0].strip()


def compile_program(
    graph: torch.fx.GraphModule, inputs: Sequence[Any], options: Mapping[str, Any]
) -> Callable[..., Any]:
    """Inductor's program of ``graph``; ``torch.compile`` gives one only behind its guards.

    Inductor is imported here, when it is used: importing it takes seconds and emits warnings. Without
    it, ``torch.compile``, whose guards cost some time at every call.
    """
    compile_fx = find(_module("torch._inductor.compile_fx"), "compile_fx")
    if compile_fx is None:
        guarded: Any = torch.compile(graph, fullgraph=True, options=dict(options))
        return guarded
    program: Any = compile_fx(graph, inputs, config_patches=dict(options))
    return program


def _module(name: str) -> Any:
    """A private module, or None."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


@functools.cache
def untiled_loops_only() -> Any:
    """A pass for Inductor's ``_post_fusion_custom_pass`` without which CPU programs can be wrong.

    Inductor may compute several tensors in one loop over rows and keep an intermediate result in a
    buffer of one row. Where that loop is vectorised over rows, the rows overwrite each
    other's values and the program silently returns wrong numbers (pytorch/pytorch issue 185702;
    seen with torch 2.13 in populations with one thread, repaired in torch 2.15 by pull request
    185855). With this pass such loops stay separate. None where this torch has no such passes.
    """
    passes = _module("torch._inductor.custom_graph_pass")
    base: Any = find(passes, "CustomSchedulerPass") or find(passes, "CustomGraphPass")
    if base is None:
        return None

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
    """Return whether Inductor ``accepts`` one loop for all and steps through it row by row."""
    loops = [loop for proxy in proxies for loop in proxy.loop_nest.loops[:depth]]
    return all(loop.steps == 1 for loop in loops) and accepts(proxies, depth)


def inductor_settings() -> set[str]:
    """Names of Inductor's settings in this version of torch, which refuses others."""
    options = find(
        _module("torch._inductor"), "list_options"
    )  # imported here, as in compile_program
    return set() if options is None else set(options())


def mode_options(mode: str) -> dict[str, Any]:
    """Inductor's settings of a mode of ``torch.compile``; ``RuntimeError`` on an unknown one."""
    options = _needed(_module("torch._inductor"), "list_mode_options", "mode=", "Leave it out.")
    return dict(options(mode))


def keeps_batch_statistics(module: nn.Module) -> bool:
    """Return whether the layer normalises with statistics of a batch, or averages them over batches.

    That is every BatchNorm, SyncBatchNorm too, and InstanceNorm with running averages. Their common
    base class has no public name, so these are torch's public classes and those derived from them.
    TorchRL's BatchRenorm is a class of its own.
    """
    from torchrl.modules import BatchRenorm1d

    if isinstance(module, nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d):
        return bool(module.track_running_stats)
    return isinstance(
        module,
        nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm | BatchRenorm1d,
    )


def summed_in_graph(values: Tensor) -> Tensor:
    """The sum over all ranks of the default group, as one node of a graph under ``torch.compile``.

    ``torch.distributed.all_reduce`` writes in place; this form, of which ``torch.distributed`` has no
    public one, returns a new tensor.
    """
    collectives: Any
    try:  # not _module, which torch.compile cannot trace
        from torch.distributed import _functional_collectives

        collectives = _functional_collectives
    except ImportError:
        collectives = None
    all_reduce = _needed(
        collectives,
        "all_reduce",
        "a compiled update on several ranks",
        "Train with the eager step.",
    )
    total: Tensor = all_reduce(values, "sum", torch.distributed.group.WORLD)
    return total


def add_to_all(totals: Sequence[Tensor], values: Sequence[Tensor], factor: float) -> None:
    """``total += factor * value`` in one call; without torch's private one, in a loop."""
    foreach = find(torch, "_foreach_add_")
    if foreach is None:
        for total, value in zip(totals, values, strict=True):
            total.add_(value, alpha=factor)
    else:
        foreach(list(totals), list(values), alpha=factor)


def assert_later(condition: Tensor, message: str) -> None:
    """An assertion that ``torch.export`` keeps in the program; Python's is evaluated once."""
    later = _needed(torch, "_assert_async", "exporting a policy", _NO_EXPORT)
    later(condition, message)


def assert_dtype(values: Tensor, dtype: torch.dtype) -> None:
    """As :func:`assert_later`, for the dtype of an input."""
    check = _needed(torch.ops.aten, "_assert_tensor_metadata", "exporting a policy", _NO_EXPORT)
    check.default(values, dtype=dtype)


def mark_stepped(optimizer: Optimizer) -> None:
    """Record that the optimizer has stepped where its ``step`` was not called.

    Schedulers warn about their order unless this mark, which the optimizer's own ``step`` sets, is
    there.
    """
    setattr(optimizer, "_opt_called", True)  # noqa: B010


def version_of(tensor: Tensor) -> int:
    """How often the tensor was written to in place; only this counter says so without a read."""
    version: int = _needed(
        tensor, "_version", "captured(step, replay)",
        "Use compiled(step): it reads every batch and need not know what was written.",
    )  # fmt: skip
    return version


def has_hooks(module: nn.Module) -> bool:
    """Return whether anything is registered that runs with the module's forward or backward."""
    return any(find(module, name) for name in _HOOKS)


# -- TorchRL ---------------------------------------------------------------------------------------


def generator_of(replay: ReplayBuffer) -> torch.Generator | None:
    """The generator given with ``set_rng``, which has no public reader.

    Without it a seeded buffer looks unseeded: a checkpoint lacks the state of its draws.
    """
    generator: torch.Generator | None = find(replay, "_rng")
    return generator


def stored_rows(replay: ReplayBuffer) -> Any:
    """What a buffer's storage holds, without the copy that reading rows makes; None if unknown."""
    return find(replay.storage, "_storage")


def plain_buffer_state(replay: Any) -> dict[str, Any]:
    """A buffer's state as plain data, without batches drawn ahead."""
    state = {key: value for key, value in replay.state_dict().items() if key != "_prefetch_state"}
    return state | (
        {"_sampler": plain_sampler_state(replay.sampler)} if "_sampler" in state else {}
    )


def load_buffer_state(replay: Any, state: Mapping[str, Any]) -> None:
    """Load what :func:`plain_buffer_state` gave."""
    if "_sampler" in state:
        state = {**state, "_sampler": _with_trees(replay.sampler, state["_sampler"])}
    replay.load_state_dict(state)


def plain_sampler_state(sampler: Any) -> dict[str, Any]:
    """A sampler's state as plain data: a tensor in place of each C++ tree of priorities."""
    state = dict(sampler.state_dict())
    for name in PRIORITIES & state.keys():
        state[name] = torch.as_tensor(state[name][_all_rows(sampler)]).cpu()
    return state


def load_sampler_state(sampler: Any, state: Mapping[str, Any]) -> None:
    """Load what :func:`plain_sampler_state` gave."""
    sampler.load_state_dict(_with_trees(sampler, state))


def has_priorities(state: Mapping[str, Any]) -> bool:
    """Return whether a state of :func:`plain_sampler_state` is of a prioritised sampler."""
    return bool(PRIORITIES & state.keys())


def _with_trees(sampler: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    trees = {name: sampler.state_dict()[name] for name in PRIORITIES & state.keys()}  # copies
    for name, tree in trees.items():
        rows = _all_rows(sampler)
        if len(state[name]) != len(rows):
            raise ValueError(
                f"max_capacity of the prioritised sampler is {len(rows)}, and {len(state[name])} in "
                f"the saved state; expected the same."
            )
        tree[rows] = state[name].to(rows.device)
    return {**state, **trees}


def _all_rows(sampler: Any) -> Tensor:
    return torch.arange(sampler.max_size, device=sampler.device)


def registered_modules(trainer: Any) -> Mapping[str, Any]:
    """What ``Trainer.register_module`` was given, by name; there is no public reader."""
    modules: Mapping[str, Any] = _needed(
        trainer, "_modules", "a checkpoint of OfflineTrainer",
        "Save agent.state_dict() and agent.step.state_dict() yourself.",
    )  # fmt: skip
    return modules


def logged_values(trainer: Any) -> dict[str, list[Any]]:
    """Everything the trainer has logged so far, by name."""
    values: dict[str, list[Any]] = _needed(
        trainer, "_log_dict", "the last logged values in a checkpoint",
        "Save agent.state_dict() and agent.step.state_dict() yourself.",
    )  # fmt: skip
    return values
