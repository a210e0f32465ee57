"""Flat storage: the user's tensors become views, and any that is replaced is laid out again."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from conftest import make_batch
from test_step import assert_same, make_loss, snapshot
from torch import optim
from torch.nn.utils import parameters_to_vector
from torchrl.objectives import HardUpdate, SoftUpdate

from iql_torchrl import IQLStep, compiled
from iql_torchrl.update.graph import GraphUpdate

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def make_step(loss, groups="one", updater=SoftUpdate, **options):
    if groups == "networks":
        names = ("value", "actor", "qvalue")
        groups = [
            {
                "params": [p for n, p in loss.named_parameters() if n.startswith(f"{x}_network")],
                "lr": 1e-2 * (i + 1),
            }
            for i, x in enumerate(names)
        ]
    else:
        groups = list(loss.parameters())
    keywords = {"tau": 0.1} if updater is SoftUpdate else {"value_network_update_interval": 3}
    return IQLStep(loss, optim.Adam(groups, lr=1e-2), updater(loss, **keywords), **options)


class Eager:
    """What a program of the update does, without compiling one."""

    def __init__(self, step):
        self.step, self.update = step, GraphUpdate(step, flat=True)

    def __call__(self, batch):
        self.update.follow_freezing()
        moments = self.update.moments()
        with self.step.setting():
            self.update(self.step.loss.read(batch), moments)
        self.update.counted()

    @property
    def flat(self):
        return self.step.storage.flat


def pair(**options):
    """A plain step, and the same one on flat storage."""
    loss = make_loss().double()
    return make_step(copy.deepcopy(loss), **options), Eager(make_step(loss, **options))


def batch_of(number):
    torch.manual_seed(number)
    return make_batch(dtype=torch.float64)


def train(plain, fast, updates=3):
    for number in range(updates):
        plain(batch_of(number))
        fast(batch_of(number))
    assert_same(snapshot(plain.loss), snapshot(fast.step.loss), **CLOSE)
    states = [step.optimizer.state_dict()["state"] for step in (plain, fast.step)]
    assert states[0].keys() == states[1].keys()
    for i, state in states[0].items():
        for name, value in state.items():
            torch.testing.assert_close(states[1][i][name], value, **CLOSE)


@pytest.mark.parametrize("groups", ["one", "networks"])
@pytest.mark.parametrize("order", ["sequential", "simultaneous"])
@pytest.mark.parametrize("limit", [None, 0.1])
def test_equals_the_plain_step(groups, order, limit):
    plain, fast = pair(groups=groups, order=order, max_grad_norm=limit)
    train(plain, fast)
    assert len(fast.flat.parameters) == 3
    assert len(fast.flat.targets) == 1


def test_without_a_soft_update_targets_stay_where_they_are():
    plain, fast = pair(updater=HardUpdate)
    addresses = [
        t.data_ptr() for t in fast.step.loss.target_qvalue_network_params.values(True, True)
    ]
    train(plain, fast)
    assert fast.flat.targets == []
    now = [t.data_ptr() for t in fast.step.loss.target_qvalue_network_params.values(True, True)]
    assert now == addresses


def test_the_users_objects_stay_and_are_views():
    plain, fast = pair()
    loss, optimizer = fast.step.loss, fast.step.optimizer
    before, listed = dict(loss.named_parameters()), list(optimizer.param_groups[0]["params"])
    train(plain, fast)
    for name, parameter in loss.named_parameters():
        assert parameter is before[name]
        assert parameter.is_leaf
        assert parameter.requires_grad
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], listed, strict=True))
    storages = {p.untyped_storage().data_ptr() for p in loss.parameters()}
    assert storages == {t.untyped_storage().data_ptr() for t in fast.flat.parameters}
    for range_, flat in zip(fast.update.ranges, fast.flat.parameters, strict=True):
        assert len(flat) == range_.length
        assert all(listed[piece.parameter].data_ptr() % 64 == 0 for piece in range_.pieces)
        values = parameters_to_vector([listed[piece.parameter].data for piece in range_.pieces])
        assert float(flat.sum()) == pytest.approx(float(values.sum()))  # gaps hold zeros


def replace_data(step):
    parameter = next(step.loss.parameters())
    parameter.data = parameter.data * 2


def replace_target(step):
    target = step.followed.targets[0]
    target.data = target.data + 1
    step.loss.forget_evaluator()


def load_optimizer(step):
    step.optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))


def load_loss(step):
    state = {k: v * 1.5 if torch.is_tensor(v) else v for k, v in step.loss.state_dict().items()}
    step.loss.load_state_dict(state)


def freeze(step):
    for parameter in list(step.loss.value_network_params.parameters())[:2]:
        parameter.requires_grad_(False)


def unfreeze(step):
    for parameter in step.loss.value_network_params.parameters():
        parameter.requires_grad_(True)


def reset_moment(step):
    state = step.optimizer.state[next(step.loss.parameters())]
    state["exp_avg"] = torch.ones_like(state["exp_avg"])


def count_further(step):
    """One parameter has been updated more often than the others of its range."""
    step.optimizer.state[next(step.loss.parameters())]["step"].add_(5)


def plain_update(step):
    step(batch_of(77))


def move_and_back(step):
    step.loss.float()
    step.loss.double()


CHANGES = (
    replace_data,
    replace_target,
    load_optimizer,
    load_loss,
    freeze,
    plain_update,
    unfreeze,
    reset_moment,
    plain_update,
    count_further,
    move_and_back,
)


@pytest.mark.parametrize("groups", ["one", "networks"])
def test_the_update_after_any_change_is_right(groups):
    plain, fast = pair(groups=groups)
    train(plain, fast)
    for change in CHANGES:
        change(plain)
        change(fast.step)
        train(plain, fast, updates=2)
        assert fast.flat is not None, change.__name__


def test_what_was_read_from_old_storage_keeps_its_values():
    plain, fast = pair()
    train(plain, fast)
    parameter = next(fast.step.loss.parameters())
    old, copied = parameter.data, parameter.data.clone()
    replace_data(plain)
    replace_data(fast.step)
    train(plain, fast)
    assert torch.equal(old, copied)
    assert old.data_ptr() != parameter.data_ptr()


def test_nothing_moves_while_nothing_changes():
    plain, fast = pair()
    train(plain, fast)
    flat = fast.flat
    train(plain, fast)
    assert fast.flat is flat


def test_two_updates_of_one_step_and_two_steps_of_one_loss_share_their_storage():
    plain, fast = pair()
    train(plain, fast)
    other = Eager(fast.step)
    third = Eager(IQLStep(fast.step.loss, fast.step.optimizer, fast.step.target_updater))
    addresses = [[t.data_ptr() for t in tensors] for tensors in fast.flat]
    for number, each in enumerate((other, third, fast, third)):
        plain(batch_of(number))
        each(batch_of(number))
        assert [[t.data_ptr() for t in tensors] for tensors in each.flat] == addresses
    assert_same(snapshot(plain.loss), snapshot(fast.step.loss), **CLOSE)


def size_of(state) -> int:
    content = io.BytesIO()
    torch.save(state, content)
    return content.tell()


def test_saved_states_do_not_grow_and_load():
    plain, fast = pair()
    train(plain, fast)
    parts = (
        lambda step: step.loss.state_dict(),
        lambda step: step.state_dict(),
        lambda step: step.loss.actor_network_params.state_dict(),
    )
    gaps = sum(r.length - sum(p.size for p in r.pieces) for r in fast.update.ranges)
    for part in parts:
        assert size_of(part(fast.step)) <= size_of(part(plain)) + 4 * 8 * gaps
    again = Eager(make_step(make_loss().double()))
    again.step.loss.load_state_dict(fast.step.loss.state_dict())
    again.step.load_state_dict(copy.deepcopy(fast.step.state_dict()))
    train(plain, again)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copied_loss_is_independent_and_trains(how):
    plain, fast = pair()
    train(plain, fast)
    copied = how(fast.step.loss)
    kept = snapshot(copied)
    train(plain, fast)
    assert_same(snapshot(copied), kept)
    own = {p.untyped_storage().data_ptr() for p in fast.step.loss.parameters()}
    assert own.isdisjoint(p.untyped_storage().data_ptr() for p in copied.parameters())
    other = make_step(how(copied)), Eager(make_step(copied))
    train(*other)
    assert other[1].flat is not None


def no_room(loss):
    """The first parameter is a part of a storage that the user keeps."""
    parameter = next(loss.parameters())
    storage = torch.zeros(parameter.numel() + 8, dtype=parameter.dtype)
    view = storage[: parameter.numel()].view(parameter.shape).copy_(parameter.data)
    parameter.data = view
    return storage


def in_shared_memory(loss):
    loss.share_memory()


def transposed(loss):
    parameter = next(p for p in loss.parameters() if p.ndim > 1)
    parameter.data = parameter.data.mT.contiguous().mT


@pytest.mark.parametrize("prepare", [no_room, in_shared_memory, transposed])
def test_tensors_that_do_not_fit_stay_where_they_are(prepare):
    loss = make_loss().double()
    plain = make_step(copy.deepcopy(loss))
    kept = prepare(loss)
    fast = Eager(make_step(loss))
    addresses = [p.data_ptr() for p in fast.step.loss.parameters()]
    train(plain, fast)
    assert fast.flat is None
    assert [p.data_ptr() for p in fast.step.loss.parameters()] == addresses
    if kept is not None:
        first = next(fast.step.loss.parameters())
        assert torch.equal(kept[: first.numel()].view(first.shape), first)


def test_memory_that_becomes_shared_later_is_left_there():
    plain, fast = pair()
    train(plain, fast)
    fast.step.loss.share_memory()
    addresses = [p.data_ptr() for p in fast.step.loss.parameters()]
    train(plain, fast)
    assert all(p.is_shared() for p in fast.step.loss.parameters())
    assert [p.data_ptr() for p in fast.step.loss.parameters()] == addresses
    assert fast.flat is not None


def test_what_no_longer_fits_gets_storage_of_its_own():
    plain, fast = pair()
    train(plain, fast)
    transposed(plain.loss)
    transposed(fast.step.loss)
    train(plain, fast)
    assert fast.flat is None
    state = fast.step.optimizer.state
    for parameter in fast.step.loss.parameters():
        tensors = [parameter, *state[parameter].values()]
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in tensors)


def test_steps_of_other_groups_take_turns_on_one_loss():
    """Each lays the parameters out in its own order, and both train them."""
    loss = make_loss().double()
    other = copy.deepcopy(loss)
    backwards = [list(reversed(list(each.parameters()))) for each in (loss, other)]
    plain = [make_step(loss), make_step(loss)]
    fast = [make_step(other), make_step(other)]
    for steps, parameters in ((plain, backwards[0]), (fast, backwards[1])):
        steps[1] = IQLStep(steps[0].loss, optim.Adam(parameters, lr=1e-2), steps[0].target_updater)
    quick = [Eager(step) for step in fast]
    for number in range(4):
        plain[number % 2](batch_of(number))
        quick[number % 2](batch_of(number))
        assert quick[number % 2].flat is not None
    assert_same(snapshot(loss), snapshot(other), **CLOSE)


def test_decoupled_and_coupled_weight_decay_leave_gaps_at_zero():
    for kind in (optim.Adam, optim.AdamW):
        loss = make_loss().double()
        steps = []
        for each in (copy.deepcopy(loss), loss):
            optimizer = kind(each.parameters(), lr=1e-2, weight_decay=0.1)
            steps.append(IQLStep(each, optimizer, SoftUpdate(each, tau=0.1)))
        plain, fast = steps[0], Eager(steps[1])
        train(plain, fast)
        for range_, flat in zip(fast.update.ranges, fast.flat.parameters, strict=True):
            outside = flat.clone()
            for piece in range_.pieces:
                piece.of(outside).zero_()
            assert not outside.any()


@pytest.mark.parametrize("order", ["sequential", "simultaneous"])
def test_a_traced_program_before_and_after_the_tensors_no_longer_fit(order):
    """Programs cannot write to several tensors of one storage, so none may be left in one."""
    torch._dynamo.reset()
    loss = make_loss().double()
    plain = make_step(copy.deepcopy(loss), order=order)
    step = make_step(loss, order=order)
    fast = compiled(step, backend="aot_eager")
    for change in (None, replace_data, transposed_step):
        if change is not None:
            change(plain)
            change(step)
        for number in range(2):
            plain(batch_of(number))
            fast(batch_of(number))
        assert_same(snapshot(plain.loss), snapshot(loss), **CLOSE)
        assert (step.storage.flat is None) == (change is transposed_step)


def transposed_step(step):
    transposed(step.loss)
