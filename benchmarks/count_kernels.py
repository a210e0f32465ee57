"""How many operations of one update become kernels on a GPU, counted in the traced program.

    python benchmarks/count_kernels.py --width 256 --critics 2

Traced on the CPU, no GPU needed and nothing timed: the update reads no device. Counted by kind:
``products`` (of matrices), ``reductions`` and ``elementwise``, the groups of connected element-wise
operations and copies between them, each of which a compiler can fuse into one kernel. Their sum is an
estimate: groups of several shapes take more kernels, and a compiler may fuse a group into a reduction.
``unfused`` is the number of kernels without any fusion, an upper limit. Views are free.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from tensordict import TensorDict
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule, Node
from torchrl.data import Bounded
from torchrl.modules import ValueOperator
from torchrl.objectives import SoftUpdate

from iql_torchrl import IQLLoss, IQLStep, compiled, networks, policies

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "mv", "dot")
REDUCTIONS = (
    "sum", "mean", "amax", "amin", "max", "min", "argmax", "argmin", "any", "all", "logsumexp",
    "_log_softmax", "_softmax", "cumsum", "prod", "var", "var_mean", "linalg_vector_norm",
    "native_layer_norm", "mse_loss",
)  # fmt: skip
VIEWS = (
    "getitem", "detach", "alias", "as_strided", "t", "transpose", "permute", "view", "_unsafe_view",
    "reshape", "expand", "squeeze", "unsqueeze", "select", "slice", "split", "split_with_sizes",
    "unbind", "unfold", "scalar_tensor",
)  # fmt: skip


def paper_step(
    width: int = 256, critics: int = 2, observations: int = 17, actions: int = 6
) -> IQLStep:
    """One update of the paper's agent: two hidden layers each, Adam, soft targets."""
    hidden = (width, width)
    spec = Bounded(-torch.ones(actions), torch.ones(actions), (actions,))
    reads = ["observation", "action"]
    loss = IQLLoss(
        policies.gaussian(observations, spec, hidden=hidden),
        lambda: ValueOperator(networks.Critic(observations, actions, hidden=hidden), in_keys=reads),
        ValueOperator(networks.StateValue(observations, hidden=hidden), in_keys=["observation"]),
        num_qvalue_nets=critics,
    )
    loss.make_value_estimator(gamma=0.99)
    optimizer = torch.optim.Adam(loss.parameters(), lr=3e-4, capturable=True)
    return IQLStep(loss, optimizer, SoftUpdate(loss, tau=0.005))


def paper_batch(rows: int = 256, observations: int = 17, actions: int = 6) -> TensorDict:
    flags = torch.zeros(rows, 1, dtype=torch.bool)
    return TensorDict(
        {
            "observation": torch.randn(rows, observations),
            "action": torch.rand(rows, actions) - 0.5,
            "next": {
                "observation": torch.randn(rows, observations),
                "reward": torch.randn(rows, 1),
                "terminated": flags,
                "done": flags.clone(),
            },
        },
        batch_size=[rows],
    )


def traced_program(step: Any, batch: Any) -> GraphModule:
    """The one graph of torch's operations that an update is; makes the update."""
    graphs: list[GraphModule] = []

    def keep(graph: GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled(step, backend=aot_autograd(fw_compiler=keep))(batch)
    (graph,) = graphs
    return graph


def count_kernels(graph: GraphModule) -> dict[str, int]:
    """``products``, ``reductions``, ``elementwise``, their sum ``kernels``, and ``unfused``."""
    depth: dict[Node, int] = {}
    group: dict[Node, Node] = {}

    def root(node: Node) -> Node:
        while group[node] is not node:
            node = group[node]
        return node

    counts = {"products": 0, "reductions": 0}
    unfused = 0
    for node in graph.graph.nodes:
        kind = _kind(node)
        before = list(_computed(node))
        depth[node] = max((depth[each] + (_kind(each) in counts) for each in before), default=0)
        if kind in counts:
            counts[kind] += 1
        elif kind == "elementwise":
            unfused += 1
            group[node] = node
            for each in before:
                if each in group and depth[each] == depth[node]:
                    group[root(each)] = node
    counts["elementwise"] = len({root(node) for node in group})
    total = sum(counts.values())
    unfused += counts["products"] + counts["reductions"]
    return counts | {"kernels": total, "unfused": unfused}


def _kind(node: Node) -> str:
    if node.op != "call_function":
        return "input"
    packet = getattr(node.target, "overloadpacket", node.target)
    name = packet.__name__
    for kind, names in (("products", PRODUCTS), ("reductions", REDUCTIONS), ("view", VIEWS)):
        if name in names:
            return kind
    return "elementwise"


def _computed(node: Node) -> Iterator[Node]:
    """What the node reads, through views."""
    for each in node.all_input_nodes:
        if _kind(each) == "view":
            yield from _computed(each)
        else:
            yield each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--critics", type=int, default=2)
    options = parser.parse_args()
    step = paper_step(options.width, options.critics)
    for kind, count in count_kernels(traced_program(step, paper_batch())).items():
        print(f"{kind:12} {count:4}")


if __name__ == "__main__":
    main()
