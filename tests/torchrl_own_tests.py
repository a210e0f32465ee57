"""Pytest plugin: run TorchRL's own IQL tests against this package's two losses.

In a checkout of pytorch/rl, from its ``test/objectives`` folder and with this folder on the path:

    python -m pytest -p torchrl_own_tests test_iql.py -k "not param_buffer_types"

The classes are put in place of TorchRL's before any test module is collected.
"""

import torchrl.objectives
import torchrl.objectives.iql

import iql_torchrl

for module in (torchrl.objectives, torchrl.objectives.iql):
    module.IQLLoss = iql_torchrl.IQLLoss
    module.DiscreteIQLLoss = iql_torchrl.DiscreteIQLLoss
