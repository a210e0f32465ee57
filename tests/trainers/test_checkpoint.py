"""Checkpoints: what comes back is what was written, and what must not be loaded is refused."""

from __future__ import annotations

import io
import json
import pickle
import zipfile

import numpy as np
import pytest
import small_trainers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from small_agents import config, log
from small_trainers import make_step, same_weights, table
from torchrl.checkpoint import Checkpoint

from iql_torchrl import OfflineTrainer, load_dataset, make_agent
from iql_torchrl.data import replay_buffer
from iql_torchrl.data.digests import fingerprint
from iql_torchrl.files import (
    CheckpointError,
    newest,
    read_components,
    write_components,
)

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=25, deadline=None)
@given(
    plain,
    arrays(
        np.float32,
        st.tuples(st.integers(0, 4), st.integers(0, 3)),
        elements=st.floats(-1e3, 1e3, width=32),
    ),
)
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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"adapter_version": 99},
            "of iql_torchrl: .*'a'.* version is 99, target adapter version is 1",
        ),
        ({"adapter": "torchrl.x"}, "of iql_torchrl: .*'a'.* adapter is 'torchrl.x', target"),
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


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_a_malicious_pickle_is_not_run(file, tmp_path, form):
    mark = tmp_path / "ran"
    content = io.BytesIO()
    if form == "torch":
        torch.save({"x": Malicious(mark)}, content)
    else:
        pickle.dump(Malicious(mark), content)
    pickle.loads(pickle.dumps(Malicious(mark))).close()
    assert mark.exists(), "the pickle does what it says when it is loaded"
    mark.unlink()
    rewrite(file, lambda name, old: content.getvalue() if name.endswith("state.pt") else old)
    with pytest.raises(CheckpointError, match=r"run a program|truncated or damaged"):
        read_components(file)
    assert not mark.exists()


def test_a_failed_write_leaves_the_old_file(file, monkeypatch):
    before = file.read_bytes()

    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space"):
        write_components(file, {"a": {}})
    assert file.read_bytes() == before
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def make_trainer(data=None, *, buffer=None, **options):
    built = {name: options.pop(name) for name in ("hidden", "critics") if name in options}
    if buffer is None:
        buffer = replay_buffer(table(60) if data is None else data, 8, seed=0)
    return small_trainers.make_trainer(make_step(**built), 6, replay_buffer=buffer, **options)


@pytest.fixture
def saved(tmp_path):
    trainer = make_trainer(folder=tmp_path / "run")
    trainer.train()
    return newest(tmp_path / "run" / "checkpoints")


def refuses(trainer, path, words):
    """``load_from_file`` raises, and nothing of the trainer has changed."""
    before = {
        n: t.clone() for n, t in trainer.loss_module.state_dict().items() if torch.is_tensor(t)
    }
    generator = torch.get_rng_state()
    with pytest.raises(CheckpointError, match=words):
        trainer.load_from_file(path)
    after = trainer.loss_module.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert torch.equal(generator, torch.get_rng_state())
    assert trainer.updates == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hidden": (16, 8)}, r"the shape of .* was \(16, 16\) and is \(8, 16\).* and \d+ more"),
        ({"hidden": (16,)}, r"the shape of .* was \(\d+,.*\) and is None"),
        ({"critics": 3}, "the shape of .*qvalue.* was .2, .* and is .3, "),
        ({"capacity": 100}, "the kind of replay buffer was 'fixed' and is 'growing'"),
        ({"seed": None}, "seed= of the replay buffer was True and is False"),
        ({"batch_size": 16}, "batch_size was 8 and is 16"),
        ({"expectile": 0.9}, r"expectile was 0\.7.* and is 0\.9"),
        (
            {"change": 1e-6},
            "another run: action of the dataset was 'float32 .*' and is 'float32 .*'",
        ),
    ],
)
def test_another_run_is_refused_by_name(saved, options, words):
    data = table(60)
    data["action"][7, 0] += options.get("change", 0.0)
    of_buffer = {n: v for n, v in options.items() if n in ("capacity", "seed", "batch_size")}
    buffer = replay_buffer(data, **({"batch_size": 8, "seed": 0} | of_buffer))
    built = {n: v for n, v in options.items() if n in ("hidden", "critics")}
    trainer = make_trainer(buffer=buffer, **built)
    trainer.loss_module.expectile = options.get("expectile", 0.7)
    refuses(trainer, saved, words)


def test_a_growing_buffer_is_saved_with_its_data(tmp_path):
    trainer, other = (
        make_trainer(buffer=replay_buffer(table(60), 8, seed=0, capacity=100), folder=tmp_path)
        for _ in range(2)
    )
    trainer.replay_buffer.extend(table(7))
    trainer.train()
    other.resume()
    assert len(other.replay_buffer) == 67
    for trained in (trainer, other):
        trained.total_frames = 12
        trained.train()
    assert same_weights(trainer, other)


def of_agent(tmp_path, reward="raw", **fields):
    data = load_dataset(log(), reward=reward)
    agent = make_agent(config(updates=4, **fields), data)
    return OfflineTrainer(agent=agent, dataset=data, folder=tmp_path, progress_bar=False)


def test_another_reward_map_or_other_settings_are_refused_by_name(tmp_path):
    of_agent(tmp_path / "run").train()
    saved = newest(tmp_path / "run" / "checkpoints")
    other = of_agent(tmp_path / "b", reward=(2.0, 1.0))
    words = r"the reward map \(reward= of load_dataset\) was \[1\.0, 0\.0\] and is \[2\.0, 1\.0\]"
    refuses(other, saved, f"{words}; next.reward of the dataset was")
    other = of_agent(tmp_path / "c", expectile=0.9, temperature=1.0)
    refuses(other, saved, r"expectile was 0\.7 and is 0\.9; temperature was 3\.0 and is 1\.0")
    resumed = of_agent(tmp_path / "d", compile=False)
    assert resumed.load_from_file(saved).updates == 4


def test_a_setting_that_an_older_version_did_not_save_has_its_default(tmp_path):
    saved = of_agent(tmp_path / "a").state_dict()
    del saved["agent"]["config"]["max_grad_norm"], saved["settings"]["max_weight"]
    of_agent(tmp_path / "b").load_state_dict(saved)
    for name, value in {"max_grad_norm": 1.0, "max_weight": 50.0}.items():
        with pytest.raises(CheckpointError, match=rf"{name} was .* and is {value}"):
            of_agent(tmp_path / "c", **{name: value}).load_state_dict(saved)


def test_a_state_without_a_part_is_refused(tmp_path):
    saved = make_trainer().state_dict()
    del saved["step"]
    with pytest.raises(CheckpointError, match=r"the checkpoint lacks \['step'\]; it has \['data'"):
        make_trainer().load_state_dict(saved)


def test_torchrls_own_load_checks_the_data_too(saved):
    def load(trainer):
        assert trainer.loss_module.value_estimator is not None  # made at its first use
        trainer._sync_checkpoint_components(Checkpoint()).load(saved)
        return trainer

    assert load(make_trainer()).updates == 6
    data = table(60)
    data["action"][7, 0] += 1e-6
    with pytest.raises(CheckpointError, match="action of the dataset was"):
        load(make_trainer(data))


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
