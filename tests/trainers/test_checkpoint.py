"""Checkpoints: what comes back is what was written, and what must not be loaded is refused."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from copy import deepcopy

import numpy as np
import pytest
import small_trainers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from small_agents import config, log
from small_trainers import make_step, table
from torchrl import torchrl_logger
from torchrl.checkpoint import Checkpoint

from iql_torchrl import Agent, OfflineTrainer, load_dataset, make_agent
from iql_torchrl.data import replay_buffer
from iql_torchrl.data.digests import fingerprint
from iql_torchrl.files import CheckpointError, newest, read_components, write_components

scalars = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False)
plain = st.recursive(
    scalars | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
shapes = st.tuples(st.integers(0, 4), st.integers(0, 3))
numbers = arrays(np.float32, shapes, elements=st.floats(-1e3, 1e3, width=32))


@settings(max_examples=25, deadline=None)
@given(plain, numbers)
def test_what_is_read_is_what_was_written(tmp_path_factory, value, numbers):
    path = tmp_path_factory.mktemp("checkpoint") / "state.torchrl"
    tensor = torch.from_numpy(numbers)
    write_components(path, {"a": {"value": value, "tensor": tensor}, "b": [tensor.bool(), 1]})
    result = read_components(path)
    assert result["a"]["value"] == value
    assert torch.equal(result["a"]["tensor"], tensor)
    assert torch.equal(result["b"][0], tensor.bool())
    assert read_components(path, ["b"]).keys() == {"b"}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "state.torchrl"
    write_components(path, {"a": {"x": torch.arange(3000.0)}})
    return path


@pytest.mark.parametrize(
    ("damage", "share"),
    [*(("cut", share) for share in (0.0, 0.1, 0.5, 0.9, 0.999)),
     *(("flip", share) for share in (0.2, 0.4, 0.6))],
)  # fmt: skip
def test_a_file_that_is_truncated_or_has_a_flipped_bit_is_refused(file, damage, share):
    content = bytearray(file.read_bytes())
    place = int(share * len(content))
    if damage == "cut":
        del content[place:]
    else:
        content[place] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"state\.torchrl: truncated or damaged"):
        read_components(file)


def test_no_file_no_part(file, tmp_path):
    with pytest.raises(CheckpointError, match="there is no such file"):
        read_components(tmp_path / "elsewhere.torchrl")
    with pytest.raises(CheckpointError, match=r"has no part 'b'; it holds \['a'\]"):
        read_components(file, ["b"])
    with pytest.raises(CheckpointError, match="there is no such folder"):
        newest(tmp_path / "checkpoints")


def rewrite(file, change):
    """The archive with ``change(name, bytes)`` applied to each of its members."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, change(name, content))


OTHER = "of iql_torchrl: .*'a'.* "


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"adapter_version": 99}, f"{OTHER}version is 99, target adapter version is 1"),
        ({"adapter": "torchrl.x"}, f"{OTHER}adapter is 'torchrl.x', target"),
        ({}, "another version of TorchRL"),
    ],
)
def test_another_version_is_refused(file, change, words):
    def changed(name, content):
        if name != "manifest.json":
            return content
        manifest = json.loads(content)
        manifest["components"]["a"] |= change
        manifest["format_version"] += not change
        return json.dumps(manifest)

    rewrite(file, changed)
    with pytest.raises(CheckpointError, match=words):
        read_components(file, ["a"])


class Malicious:
    """Unpickled, it would create the file ``ran``."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("save", [torch.save, pickle.dump])
def test_a_malicious_pickle_is_not_run(tmp_path, save):
    words = "not loaded, because loading it could run a progr"
    words += "" if save is torch.save else "|truncated or damaged"
    mark, content, path = tmp_path / "ran", io.BytesIO(), tmp_path / "agent.torchrl"
    save({"x": Malicious(mark)}, content)
    pickle.loads(pickle.dumps(Malicious(mark))).close()
    assert mark.exists(), "the pickle does what it says when it is loaded"
    mark.unlink()
    write_components(path, {"agent": {"config": {}}, "loss_module": {}})
    rewrite(path, lambda name, old: content.getvalue() if name.endswith("state.pt") else old)
    for read in (lambda: read_components(path), lambda: Agent.from_hub(tmp_path)):
        with pytest.raises(CheckpointError, match=words):
            read()
    assert not mark.exists()


def make_trainer(data=None, step=(), folder=None, **buffer):
    data = table(60) if data is None else data
    buffer = replay_buffer(data, **({"batch_size": 8, "seed": 0} | buffer))
    step = make_step(**dict(step))
    return small_trainers.make_trainer(step, 6, replay_buffer=buffer, folder=folder)


@pytest.fixture
def saved(tmp_path):
    make_trainer(folder=tmp_path / "run").train()
    return newest(tmp_path / "run" / "checkpoints")


def changed_table():
    data = table(60)
    data["action"][7, 0] += 1e-6
    return data


def refuses(trainer, path, words):
    """``load_from_file`` raises, and nothing of the trainer has changed."""
    before, generator = deepcopy(trainer.loss_module.state_dict()), torch.get_rng_state()
    with pytest.raises(CheckpointError, match=words):
        trainer.load_from_file(path)
    after = trainer.loss_module.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before if torch.is_tensor(before[n]))
    assert torch.equal(generator, torch.get_rng_state())
    assert trainer.updates == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"step": {"hidden": (16, 8)}},
            r"the shape of .* was \(16, 16\) and is \(8, 16\).* and \d+ more",
        ),
        ({"step": {"hidden": (16,)}}, r"the shape of .* was \(\d+,.*\) and is None"),
        ({"step": {"critics": 3}}, "the shape of .*qvalue.* was .2, .* and is .3, "),
        ({"capacity": 100}, "the kind of replay buffer was 'fixed' and is 'growing'"),
        ({"seed": None}, "seed= of the replay buffer was True and is False"),
        ({"batch_size": 16}, "batch_size was 8 and is 16"),
        (
            {"data": changed_table()},
            "another run: action of the dataset was 'float32 .*' and is 'float32 .*'",
        ),
    ],
)
def test_another_run_is_refused_by_name(saved, options, words):
    refuses(make_trainer(**options), saved, words)


def test_another_expectile_or_a_state_without_a_part_is_refused(saved):
    trainer = make_trainer()
    state = trainer.state_dict()
    trainer.loss_module.expectile = 0.9
    refuses(trainer, saved, r"expectile was 0\.7.* and is 0\.9")
    del state["step"]
    with pytest.raises(CheckpointError, match=r"the checkpoint lacks \['step'\]; it has \['data'"):
        make_trainer().load_state_dict(state)


def of_agent(folder=None, reward="raw", **fields):
    data = load_dataset(log(), reward=reward)
    agent = make_agent(config(updates=4, **fields), data)
    return OfflineTrainer(agent=agent, dataset=data, folder=folder, progress_bar=False)


def test_another_reward_map_or_other_settings_are_refused_by_name(tmp_path):
    trainer = of_agent(tmp_path)
    trainer.train()
    path, state = newest(tmp_path / "checkpoints"), trainer.state_dict()
    words = r"the reward map \(reward= of load_dataset\) was \[1\.0, 0\.0\] and is \[2\.0, 1\.0\]"
    refuses(of_agent(reward=(2.0, 1.0)), path, f"{words}; next.reward of the dataset was")
    words = r"expectile was 0\.7 and is 0\.9; temperature was 3\.0 and is 1\.0"
    refuses(of_agent(expectile=0.9, temperature=1.0), path, words)
    assert of_agent(compile=False).load_from_file(path).updates == 4
    # settings that an older version did not save have their defaults
    del state["agent"]["config"]["max_grad_norm"], state["settings"]["max_weight"]
    of_agent().load_state_dict(state)
    for name, value in {"max_grad_norm": 1.0, "max_weight": 50.0}.items():
        with pytest.raises(CheckpointError, match=rf"{name} was .* and is {value}"):
            of_agent(**{name: value}).load_state_dict(state)


def test_torchrls_own_load_checks_the_data_too(saved):
    def load(trainer):
        assert trainer.loss_module.value_estimator is not None  # made at its first use
        trainer._sync_checkpoint_components(Checkpoint()).load(saved)
        return trainer

    assert load(make_trainer()).updates == 6
    with pytest.raises(CheckpointError, match="action of the dataset was"):
        load(make_trainer(changed_table()))


def test_random_generators_come_back(saved):
    trainer = make_trainer()
    torch.manual_seed(123)
    np.random.seed(123)
    trainer.load_from_file(saved)
    numbers = torch.rand(3), np.random.rand(3), trainer.replay_buffer.sample()["observation"]
    again = make_trainer()
    again.load_from_file(saved)
    assert torch.equal(numbers[0], torch.rand(3))
    assert np.array_equal(numbers[1], np.random.rand(3))
    assert torch.equal(numbers[2], again.replay_buffer.sample()["observation"])


@given(st.integers(0, 59), st.sampled_from(["action", "observation", ("next", "reward")]))
@settings(max_examples=20, deadline=None)
def test_a_fingerprint_notices_any_value(row, key):
    data = table(60)
    whole = fingerprint(data)
    assert fingerprint(data.clone()) == whole
    data[key][row, 0] += 1.0
    changed = fingerprint(data)
    name = key if isinstance(key, str) else ".".join(key)
    assert {k for k in whole if whole[k] != changed[k]} == {name}


# -- an agent with a dataset that it was not made for


@pytest.mark.parametrize(
    ("asked", "loaded", "lines"),
    [("return_range", "raw", 1), ("raw", (2.0, 0.0), 1), ("raw", "raw", 0), ("minus_one", -1, 0)],
)
def test_a_config_of_another_reward_is_reported(asked, loaded, lines, caplog):
    reward = (1.0, -1.0) if loaded == -1 else loaded
    dataset = load_dataset(log(), reward=reward)
    agent = make_agent(config(reward=asked), dataset)
    with caplog.at_level("WARNING", logger="torchrl"):
        torchrl_logger.addHandler(caplog.handler)
        try:
            OfflineTrainer(agent=agent, dataset=dataset, total_updates=1, progress_bar=False)
        finally:
            torchrl_logger.removeHandler(caplog.handler)
    assert len(caplog.messages) == lines
    for line in caplog.messages:
        assert line.startswith(f"config.reward is '{asked}' and the rewards of ")


def observations(width: int, dtype: type = np.float32):
    return np.random.default_rng(1).normal(size=(40, width)).astype(dtype)


@pytest.mark.parametrize(
    ("own", "given", "key", "words"),
    [
        ({}, {"observation": observations(5)}, "observation", r"Box.*\(3,\).*Box of shape \(5,\)"),
        ({}, {"action": np.full((40, 3), 0.5, "f4")}, "action", r"Box.*\(2,\).*Box of shape \(3,\)"),
        ({}, {"action": np.arange(40) % 4}, "action", r"Box of shape \(2,\).*Discrete\(4\)"),
        ({"action": np.arange(40) % 4}, {"action": np.arange(40) % 5}, "action",
         r"Discrete\(4\).*Discrete\(5\)"),
    ],
)  # fmt: skip
def test_a_dataset_of_other_shapes_or_categories_is_refused_and_other_rows_are_taken(
    own, given, key, words
):
    agent = make_agent(config(), load_dataset(log(**own)))
    with pytest.raises(ValueError, match=rf"^{key}: the agent was made for {words}.*make_agent"):
        OfflineTrainer(agent=agent, dataset=load_dataset(log(**given)), progress_bar=False)
    if not own:
        other = load_dataset(log(observation=observations(3)))
        OfflineTrainer(agent=agent, dataset=other, total_updates=2, progress_bar=False).train()
