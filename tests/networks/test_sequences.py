"""Networks over windows: their equations against torch's own layers, padding, export, updates."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from small_losses import Forms, make_step
from tensordict.nn import ProbabilisticTensorDictSequential as Actor
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.data import Bounded
from torchrl.modules import ValueOperator

from iql_torchrl import IQLLoss, IQLStep, load_dataset, networks, policies
from iql_torchrl.networks import CausalTransformer, LSTMEncoder, Standardise

F, H, T = 3, 8, 5
ENCODERS = {
    "lstm": lambda **more: LSTMEncoder(F, H, **more),
    "two layers of lstm": lambda **more: LSTMEncoder(F, H, layers=2, **more),
    "transformer": lambda **more: CausalTransformer(F, H, heads=2, length=T, **more),
    "one block": lambda **more: CausalTransformer(F, H, heads=2, layers=1, length=T, **more),
}


def windows(*batch: int, dtype=torch.float64):
    """Windows with 1 to T real steps at their end; row i of the last dimension has i % T + 1."""
    steps = torch.arange(torch.Size(batch).numel()).view(batch) % T + 1
    mask = torch.arange(T) >= T - steps.unsqueeze(-1)
    return torch.randn(*batch, T, F, dtype=dtype), mask


def test_lstm_is_torchs_on_the_real_steps():
    for layers in (1, 2):
        encoder = LSTMEncoder(F, H, layers=layers).double()
        theirs = nn.LSTM(F, H, layers, batch_first=True).double()
        state = {}
        for number in range(layers):
            state[f"weight_ih_l{number}"] = encoder.inputs[number].weight
            state[f"weight_hh_l{number}"] = encoder.recurrent[number].weight
            state[f"bias_ih_l{number}"] = encoder.inputs[number].bias
            state[f"bias_hh_l{number}"] = torch.zeros(4 * H).double()
        theirs.load_state_dict(state)
        window, mask = windows(10)
        found = encoder(window, mask)
        for row, real, out in zip(window, mask, found, strict=True):
            expected = theirs(row[real][None])[0][0, -1]
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)


def theirs_of(block) -> nn.TransformerEncoderLayer:
    """torch's layer with the weights of one of our blocks."""
    layer = nn.TransformerEncoderLayer(
        H, 2, 4 * H, dropout=0.0, activation=nn.GELU("tanh"), batch_first=True, norm_first=True
    ).double()
    state = {
        "self_attn.in_proj_weight": torch.cat([block.query.weight, block.key_value.weight]),
        "self_attn.in_proj_bias": torch.cat([block.query.bias, block.key_value.bias]),
    }
    names = {"self_attn.out_proj": block.joined, "norm1": block.norm, "norm2": block.perceptron[0],
             "linear1": block.perceptron[1], "linear2": block.perceptron[3]}  # fmt: skip
    for name, module in names.items():
        state |= {f"{name}.weight": module.weight, f"{name}.bias": module.bias}
    layer.load_state_dict(state)
    return layer.train()  # without torch's fused path of inference


def test_transformer_is_torchs_on_the_real_steps():
    encoder = CausalTransformer(F, H, layers=3, heads=2, length=T).double()
    for parameter in encoder.parameters():  # so that no bias is zero and no norm the identity
        nn.init.normal_(parameter, 0.3, 0.5)
    blocks = [theirs_of(block) for block in encoder.blocks]
    window, mask = windows(10)
    found = encoder(window, mask)
    for row, real, out in zip(window, mask, found, strict=True):
        x = (encoder.first(row[real]) + encoder.positions[-int(real.sum()) :])[None]
        causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        for block in blocks:
            x = block(x, src_mask=causal, is_causal=True)
        torch.testing.assert_close(out, encoder.norm(x)[0, -1], rtol=0, atol=1e-12)


def results(encoder, window, mask):
    """Output, and gradients of the parameters for a random direction."""
    out = encoder(window, mask)
    loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum()
    gradients = torch.autograd.grad(loss, list(encoder.parameters()))
    return [out.detach(), *gradients]


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_padding_has_no_influence(name, dtype):
    mean, std = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.5, 2.0])
    encoder = ENCODERS[name](preprocess=Standardise(mean, std)).to(dtype)
    window, mask = windows(7, dtype=dtype)
    expected = results(encoder, window, mask)
    assert expected[0].dtype == dtype
    assert all(value.isfinite().all() and value.any() for value in expected)
    for padding in (torch.nan, torch.inf, 1e30, -3.0):
        changed = torch.where(mask[..., None], window, padding)
        for found, value in zip(results(encoder, changed, mask), expected, strict=True):
            assert torch.equal(found, value)


@pytest.mark.parametrize("name", ENCODERS)
def test_every_real_step_is_read_and_batches_may_have_any_shape(name):
    encoder = ENCODERS[name]().double()
    window, mask = windows(4, 5)
    found = encoder(window, mask)
    assert found.shape == (4, 5, H)
    for row, column in itertools.product(range(4), range(5)):
        alone = encoder(window[row, column], mask[row, column])
        torch.testing.assert_close(alone, found[row, column])
    window.requires_grad_()
    (gradient,) = torch.autograd.grad(encoder(window, mask).square().sum(), window)
    assert torch.equal(gradient.abs().sum(-1) > 0, mask)
    mask[:] = torch.arange(T) >= 2  # a shorter window is a longer one with padding
    shorter = encoder(window[..., 2:, :], mask[..., 2:])
    torch.testing.assert_close(shorter, encoder(window, mask))


@pytest.mark.parametrize("name", ["lstm", "one block"])
def test_export_takes_any_batch(name):
    encoder = ENCODERS[name]()
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(
        encoder, windows(3, dtype=torch.float32), dynamic_shapes=(({0: batch}, {0: batch}),)
    )
    for size in (1, 9):
        example = windows(size, dtype=torch.float32)
        torch.testing.assert_close(program.module()(*example), encoder(*example))


def test_several_windows_go_to_the_first_layer():
    class Joined(nn.Module):
        def forward(self, position, category):
            return torch.cat([position, nn.functional.one_hot(category, 2).to(position)], -1)

    encoder = LSTMEncoder(F + 2, H, preprocess=Joined())
    window, mask = windows(6, dtype=torch.float32)
    category = torch.randint(2, (6, T))
    expected = encoder(window, category, mask)
    moved = LSTMEncoder(F + 2, H)
    moved.load_state_dict(encoder.state_dict())
    joined = torch.cat([window, nn.functional.one_hot(category, 2)], -1)
    assert torch.equal(moved(joined, mask), expected)
    wrong = category.masked_fill(~mask, 77)  # padding reaches no first layer
    assert torch.equal(encoder(window, wrong, mask), expected)


def test_wrong_arguments_are_refused():
    for make in (LSTMEncoder, lambda *a: CausalTransformer(*a, length=T)):
        with pytest.raises(ValueError, match="features is 0; expected an integer >= 1"):
            make(F, 0)
    with pytest.raises(ValueError, match=r"features is 8 and heads is 3; .* multiple"):
        CausalTransformer(F, 8, heads=3, length=T)
    window, mask = windows(2, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"has 5 steps and .* at most 4; make it with length=5"):
        CausalTransformer(F, 8, length=4)(window, mask)
    for wrong in (mask.float(), mask[:, 1:], mask[:1]):
        with pytest.raises(ValueError, match=r"window has shape \(2, 5, 3\) and its mask"):
            LSTMEncoder(F, 8)(window, wrong)


ROWS = 12  # episodes of 3, 7 and 2 steps


def dataset():
    observations = torch.randn(ROWS + 3, F).double().numpy()
    first = np.array([0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 12, 13])
    ends = np.isin(np.arange(ROWS), (2, 9, 11))
    return load_dataset(
        {
            "observation": observations[first],
            "next_observation": observations[first + 1],
            "action": np.random.default_rng(0).uniform(-1, 1, (ROWS, 2)),
            "reward": np.arange(ROWS) % 3 - 1.0,
            "terminated": ends & (np.arange(ROWS) < 5),
            "truncated": ends & (np.arange(ROWS) > 5),
        },
        dtype=torch.float64,
    )


class Last(nn.Module):
    """The last step of a window, padded to H numbers: a critic and a policy without history."""

    def forward(self, window, mask):
        return nn.functional.pad(window[..., -1, :], (0, H - F))


def step_of(names: dict[str, Callable[[], nn.Module]]) -> IQLStep:
    """IQL whose networks read windows through the encoders given by the networks' names."""
    torch.manual_seed(1)

    def reads(network: str) -> TensorDictModule:
        keys = ["observation", "history_mask"]
        return TensorDictModule(names[network](), in_keys=keys, out_keys=["features"])

    spec = Bounded(-torch.ones(2), torch.ones(2), (2,))
    head = policies.gaussian(H, spec, hidden=(16,), in_keys=["features"])
    critic = ValueOperator(networks.Critic(H, 2, hidden=(16,)), in_keys=["features", "action"])
    value = ValueOperator(networks.StateValue(H, hidden=(16,)), in_keys=["features"])
    loss = IQLLoss(
        Actor(reads("actor"), *head.module),
        TensorDictSequential(reads("critic"), critic),
        TensorDictSequential(reads("value"), value),
    )
    return make_step(loss.make_value_estimator(gamma=0.9).double())


def trained_as_eager(names: dict[str, Callable[[], nn.Module]], length: int) -> None:
    windows = dataset().windows(length)
    forms = Forms(step_of(names).loss, lambda: windows.device_sampler(16, seed=2), ["captured"])
    for _ in range(2):
        forms.run()
    forms.assert_equal(rtol=1e-9, atol=1e-11)


def test_captured_updates_are_the_eager_ones(uncompiled):
    """Dynamo's graph of whole updates, with the windows made inside of it."""
    trained_as_eager({"actor": Last, "critic": Last, "value": ENCODERS["lstm"]}, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lstm", "transformer"])
def test_compiled_updates_are_the_eager_ones(name):
    trained_as_eager(dict.fromkeys(("actor", "critic", "value"), ENCODERS[name]), T)
