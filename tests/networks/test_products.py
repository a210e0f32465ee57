"""Products by oneDNN: equal to torch's own, and used for large float32 matrices on a CPU alone."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from conftest import make_batch, make_networks
from small_losses import assert_same_state, make_step

from iql_torchrl import IQLLoss, compiled
from iql_torchrl.config import Arithmetic, choose_products, chosen_products
from iql_torchrl.networks import products
from iql_torchrl.networks.evaluation import affine, product
from iql_torchrl.networks.products import matmul

SHAPES = [
    ((256, 128), (128, 256)),
    ((2, 256, 128), (2, 128, 256)),
    ((3, 256, 128), (128, 256)),
    ((256, 128), (2, 128, 256)),
    ((1, 256, 128), (2, 128, 256)),
    ((9, 256, 128), (9, 128, 256)),  # more networks than FEW
    ((2, 2, 256, 128), (2, 1, 128, 256)),  # a population of 2, with 2 critics each
]

pytestmark = pytest.mark.skipif(
    not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()),
    reason="needs a build of torch with MKL and oneDNN",
)


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """The shapes of all products that oneDNN computes, on processors of any maker."""
    seen, original = [], products.onednn_linear

    def counted(x, weight, bias):
        seen.append((*x.shape, weight.shape[0]))
        return original(x, weight, bias)

    choose_products("onednn")
    monkeypatch.setattr(products, "onednn_linear", counted)
    return seen


def transposed(*shape: int) -> torch.Tensor:
    return torch.randn(*shape[:-2], shape[-1], shape[-2]).mT


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("make", [torch.randn, transposed])
def test_products_and_their_gradients(shapes, make, calls):
    first, second = (make(*shape).requires_grad_() for shape in shapes)
    a, b = (x.detach().double().requires_grad_() for x in (first, second))
    expected, actual = a @ b, matmul(first, second)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(product(first, second).double(), expected, rtol=1e-4, atol=1e-4)
    one = torch.broadcast_shapes(*(shape[:-2] for shape in shapes)).numel()
    assert calls == [(256, 128, 256)] * (2 * one)
    actual.sin().sum().backward()
    expected.sin().sum().backward()
    torch.testing.assert_close(first.grad.double(), a.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(second.grad.double(), b.grad, rtol=1e-3, atol=1e-3)
    assert len(calls) == 4 * one


@pytest.mark.parametrize("networks", [None, 2])
def test_affine(networks, calls):
    stack = () if networks is None else (networks,)
    x, weight, bias = torch.randn(256, 128), torch.randn(*stack, 256, 128), torch.randn(*stack, 256)
    expected = x @ weight.mT + bias.unsqueeze(-2)
    torch.testing.assert_close(affine(x, weight, bias), expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == (networks or 1)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (torch.randn(256, 63), torch.randn(63, 1024)),  # a short side
        (torch.randn(64, 256), torch.randn(256, 255)),  # fewer than 2 ** 22 multiplications
        (torch.randn(256, 256).double(), torch.randn(256, 256).double()),
        (torch.zeros(256, 256, device="meta"), torch.zeros(256, 256, device="meta")),
    ],
)
def test_other_products_are_torchs(first, second, calls):
    for function in (product, matmul):
        out = function(first, second)
        assert out.dtype == first.dtype
        if out.device.type == "cpu":
            assert torch.equal(out, first @ second)
    assert calls == []


def test_products_under_autocast_are_torchs(calls):
    x = torch.randn(256, 256)
    with torch.autocast("cpu", torch.bfloat16):
        assert matmul(x, x).dtype == torch.bfloat16
    assert calls == []


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch 2.15's own check
@pytest.mark.parametrize(
    ("make", "shape"), [(transposed, (128, 256)), (torch.randn, (3, 128, 256))]
)
def test_the_operation_follows_torchs_rules(make, shape):
    inputs = torch.randn(256, 128, requires_grad=True), make(*shape).requires_grad_()
    torch.library.opcheck(torch.ops.iql_torchrl.product.default, inputs)


FORMS = ["eager", "compiled", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.parametrize("form", FORMS)
def test_updates_of_wide_networks(form, calls, monkeypatch):
    torch._dynamo.reset()
    loss = IQLLoss(*make_networks(hidden=(128, 128)))
    plain, fast = (make_step(each, lr=1e-3, eps=1e-2) for each in (loss, copy.deepcopy(loss)))
    if form != "eager":
        fast = compiled(fast) if form == "inductor" else compiled(fast, backend="aot_eager")
    for number in range(3):
        torch.manual_seed(number)
        batch = make_batch(256)
        with monkeypatch.context() as patch:
            patch.setattr(products, "LARGE", 2**60)
            expected = plain(batch.clone())
        before = len(calls)
        actual = fast(batch.clone())
        # forward: actor, two critics, two targets, V twice; backward, twice: actor, two critics, V
        assert len(calls) == before + 15 or form == "eager"
        for name, mine in actual.items():
            torch.testing.assert_close(mine, expected[name], rtol=1e-4, atol=1e-5, msg=name)
    assert calls
    assert_same_state(plain.loss, fast.loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("share", "expected"), [(0.5, "onednn"), (0.97, "mkl")])
def test_the_faster_library_is_chosen_once_and_kept_in_states(share, expected, monkeypatch):
    choose_products("auto")
    measured = []
    monkeypatch.setattr(products, "_share_of_time", lambda: measured.append(1) or share)
    step = make_step(IQLLoss(*make_networks(hidden=(256, 256))))
    step(make_batch(256))
    step(make_batch(256))
    assert (chosen_products(), measured) == (expected, [1])
    state, settings = step.state_dict(), Arithmetic.current()
    choose_products("auto")
    step.load_state_dict(state)
    assert chosen_products() == expected
    choose_products("auto")
    settings.adopt()
    assert chosen_products() == expected


def test_narrow_networks_measure_nothing(monkeypatch):
    choose_products("auto")
    monkeypatch.setattr(products, "_share_of_time", lambda: pytest.fail("measured"))
    make_step(IQLLoss(*make_networks()))(make_batch(32))
    assert chosen_products() is None


def test_a_measurement_gives_a_share():
    assert 0 < products._share_of_time() < 100


def test_unknown_products_are_refused():
    with pytest.raises(ValueError, match="products is 'eigen'; choose"):
        choose_products("eigen")


def test_the_module_can_be_imported_again():
    importlib.reload(products)
