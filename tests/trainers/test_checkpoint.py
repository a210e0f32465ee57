"""Checkpoints: what comes back is what was written, and what must not be loaded is refused."""

import errno
import io
import json
import os
import pickle
import zipfile
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from small_agents import by_hand, config, following, small_columns
from small_agents import saved as saved_agent
from small_trainers import make_step, make_trainer, table, weight
from test_background import pendulum_log
from torchrl import torchrl_logger
from torchrl.checkpoint import Checkpoint

from iql_torchrl import Agent, IQLConfig, IQLPopulation, OfflineTrainer, load_dataset, make_agent
from iql_torchrl.config import arithmetic
from iql_torchrl.data import DatasetWarning, build_shards, replay_buffer
from iql_torchrl.data.digests import fingerprint
from iql_torchrl.files import (
    CheckpointError,
    atomic_write,
    newest,
    read_components,
    replace_by_link,
    write_components,
)
from iql_torchrl.losses import DDPGBC, AdvantageWeighted, Expectile, Sparse
from iql_torchrl.report.figures import draw
from iql_torchrl.report.tables import write_csv

pytestmark = pytest.mark.usefixtures("no_pictures")
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


def run_of(data=None, step=(), folder=None, **buffer):
    data = table(60) if data is None else data
    buffer = replay_buffer(data, **({"batch_size": 8, "seed": 0} | buffer))
    step = make_step(**dict(step))
    return make_trainer(step, 6, replay_buffer=buffer, folder=folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint that no test changes."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    run_of(folder=folder).train()
    return newest(folder / "checkpoints")


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
            r"shape of .* was \(16, 16\) and is \(8, 16\).* and \d+ more",
        ),
        ({"step": {"hidden": (16,)}}, r"the shape of .* was \(\d+,.*\) and is None"),
        ({"step": {"critics": 3}}, "the shape of .*qvalue.* was .2, .* and is .3, "),
        ({"capacity": 100}, "the kind of replay buffer was 'fixed' and is 'growing'"),
        ({"seed": None}, "seed= of the replay buffer was True and is False"),
        ({"batch_size": 16}, "batch_size was 8 and is 16"),
        ({"data": changed_table()}, "run: action of the dataset was 'float32 .*' and is 'float32 "),
    ],
)
def test_another_run_is_refused_by_name(saved, options, words):
    refuses(run_of(**options), saved, words)


@pytest.mark.parametrize(
    ("of", "objective", "words"),
    [
        ("value", Expectile(0.9), r"expectile was 0\.7.* and is 0\.9"),
        ("actor", DDPGBC(), "actor_objective was 'log_prob' and is 'ddpg_bc'"),
        (
            "actor",
            AdvantageWeighted(weight="positive"),
            "weight was 'exponential' and is 'positive'",
        ),
        ("actor", AdvantageWeighted(weight=torch.exp), "weight was 'exponential' and is .*builtin"),
        ("actor", AdvantageWeighted(temperature=1.0), r"temperature was 3\.0 and is 1\.0"),
    ],
)
def test_another_objective_is_refused(saved, of, objective, words):
    trainer = run_of()
    setattr(trainer.loss_module, f"{of}_objective", objective)
    refuses(trainer, saved, words)


def test_both_objectives_have_their_numbers_in_a_checkpoint_without_gaps():
    """SQL's alpha is in the loss of V and in the weight of the policy."""
    trainer = run_of()
    trainer.loss_module.value_objective = Sparse(alpha=0.5)
    trainer.loss_module.actor_objective = AdvantageWeighted(weight="sparse", alpha=0.25)
    state = trainer.state_dict()
    settings = state["settings"]
    assert (settings["alpha"], settings["actor_objective.alpha"]) == (0.5, 0.25)
    del state["step"]
    with pytest.raises(CheckpointError, match=r"the checkpoint lacks \['step'\]; it has \['data'"):
        run_of().load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.loss_module.make_value_estimator(gamma=0.5), r"gamma was 0\.99 and is 0\.5"),
        (lambda t: setattr(t.step.target_updater, "eps", 0.5), r"updater was 0\.1 and is 0\.5"),
        (lambda t: setattr(t.step, "precision", "bfloat16"), "precision was 'float32' and is"),
    ],
)
def test_other_settings_of_parts_made_by_hand_are_refused(saved, change, words):
    """Weights and shapes are the same: without this check the run would go on as another one."""
    trainer = run_of()
    state = trainer.state_dict()
    change(trainer)
    refuses(trainer, saved, words)
    del state["settings"]["others"]  # as in checkpoints of older versions
    trainer.load_state_dict(state)


def process_settings():
    """What torch and this package keep for the whole process and an update reads."""
    mkl, cpu = torch.backends.mkldnn, torch.get_num_threads()
    kept = {name: value for name, value in vars(arithmetic).items() if not callable(value)}
    return kept, mkl.enabled, cpu, torch.get_float32_matmul_precision()


@pytest.mark.parametrize("products", ["mkl", "onednn"])
def test_loading_a_state_changes_nothing_outside_of_its_step(products):
    """Older states name a library of matrix multiplications, which all of the process then used."""
    step = make_step()
    before = process_settings()
    step.load_state_dict(step.state_dict() | {"products": products})
    assert process_settings() == before


def annealed(folder, total):
    """The temperature is 0.7 of what it was, before the first update and after every 5."""
    step = make_step()

    def anneal():
        step.loss.temperature = 0.7 * float(step.loss.temperature)
        return {"return_mean": 0.0}

    return make_trainer(step, total, evaluation=anneal, eval_interval=5, folder=folder)


def test_an_annealed_run_is_resumed_with_the_same_bits(tmp_path):
    once, twice = annealed(tmp_path / "once", 20), annealed(tmp_path / "twice", 20)
    once.train()
    annealed(tmp_path / "twice", 10).train()
    assert twice.resume().updates == 10
    assert float(twice.loss_module.temperature) == pytest.approx(3.0 * 0.7**3)
    twice.train()
    assert float(twice.loss_module.temperature) == float(once.loss_module.temperature)
    states = [run.loss_module.state_dict() for run in (once, twice)]
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items() if torch.is_tensor(v))


def trainer_of(agent, dataset, **options):
    return OfflineTrainer(agent=agent, dataset=dataset, progress_bar=False, **options)


def of_agent(folder=None, reward="raw", **fields):
    data = load_dataset(small_columns(), reward=reward)
    return trainer_of(make_agent(config(updates=4, **fields), data), data, folder=folder)


def test_another_reward_map_or_other_settings_are_refused_by_name(tmp_path):
    trainer = of_agent(tmp_path)
    trainer.train()
    path, state = newest(tmp_path / "checkpoints"), trainer.state_dict()
    words = (
        r"the reward scaling \(reward= of load_dataset\) was \[1\.0, 0\.0\] and is \[2\.0, 1\.0\]"
    )
    refuses(of_agent(reward=(2.0, 1.0)), path, f"{words}; next.reward of the dataset was")
    words = r"expectile was 0\.7 and is 0\.9; temperature was 3\.0 and is 1\.0"
    refuses(of_agent(expectile=0.9, temperature=1.0), path, words)
    assert of_agent(compile=False).load_from_file(path).updates == 4
    # settings that an older version did not save have their defaults
    del state["agent"]["config"]["max_grad_norm"], state["settings"]["max_weight"]
    of_agent().load_state_dict(state)
    for name, value in {"max_grad_norm": 1.0, "max_weight": 50.0, "discount": 0.5}.items():
        with pytest.raises(CheckpointError, match=rf"{name} was .* and is {value}"):
            of_agent(**{name: value}).load_state_dict(state)


def test_torchrls_own_load_checks_the_data_too(saved):
    def load(trainer):
        assert trainer.loss_module.value_estimator is not None  # made at its first use
        trainer._sync_checkpoint_components(Checkpoint()).load(saved)
        return trainer

    assert load(run_of()).updates == 6
    with pytest.raises(CheckpointError, match="action of the dataset was"):
        load(run_of(changed_table()))


def test_random_generators_come_back(saved):
    trainer = run_of()
    torch.manual_seed(123)
    np.random.seed(123)
    trainer.load_from_file(saved)
    numbers = torch.rand(3), np.random.rand(3), trainer.replay_buffer.sample()["observation"]
    again = run_of()
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
    [
        ("return_range", "raw", 1),
        ("raw", (2.0, 0.0), 1),
        ("raw", "raw", 0),
        ("minus_one", -1, 0),
        (IQLConfig().reward, "raw", 0),  # the defaults of both
        (IQLConfig().reward, "return_range", 0),
    ],
)
def test_a_config_of_another_reward_is_reported(asked, loaded, lines, caplog):
    reward = (1.0, -1.0) if loaded == -1 else loaded
    dataset = load_dataset(small_columns(), reward=reward)
    with caplog.at_level("WARNING", logger="torchrl"):
        torchrl_logger.addHandler(caplog.handler)
        try:
            agent = make_agent(config(reward=asked), dataset)
            of_agent = len(caplog.messages)
            trainer_of(agent, dataset)
            IQLPopulation([config(reward=asked)], dataset)
        finally:
            torchrl_logger.removeHandler(caplog.handler)
    assert (of_agent, len(caplog.messages)) == (lines, 2 * lines)
    for line in caplog.messages:
        assert line.startswith(f"config.reward is '{asked}' and the rewards of ")


def test_continuing_with_another_reward_scaling_gives_a_warning(tmp_path):
    agent = make_agent(config(), load_dataset(small_columns(), reward=(2.0, 0.5)))
    for each in (agent, Agent.load(saved_agent(agent, tmp_path / "agent.torchrl"))):
        words = r"\(scale, shift\) \(2.0, 0.5\), .* have \(240.0, 0.5\).*reward=\(2.0, 0.5\)"
        with pytest.warns(DatasetWarning, match=words):
            trainer_of(each, load_dataset(small_columns(), reward=(240.0, 0.5)))
        trainer_of(each, load_dataset(small_columns(60), reward=(2.0, 0.5)))


def test_continuing_with_observations_in_another_unit_gives_a_warning():
    metres = small_columns()["observation"].copy()
    agent = make_agent(config(), load_dataset(small_columns()))
    metres[:, 1] /= 1e4
    ends = np.arange(40) % 10 == 9
    other = load_dataset(
        small_columns(observation=metres, next_observation=following(metres, ends))
    )
    with pytest.warns(DatasetWarning, match=r"^observation: column 1 was -.* and is .*same unit"):
        trainer_of(agent, other)


def actions(high: float):
    return load_dataset(
        small_columns(
            action=np.random.default_rng(3).uniform(-high, high, (40, 2)).astype(np.float32)
        ),
        action_space=spaces.Box(-high, high, (2,), np.float32),
    )


def test_continuing_with_actions_that_the_policy_cannot_take_is_refused(tmp_path):
    agent = make_agent(config(), actions(1.0))
    words = r"of 'arrays' lie in \[-1.9\d+, 1.\d+\] in dimension 0, .* acts within \[-1, 1\]"
    with pytest.raises(ValueError, match=words):
        trainer_of(agent, actions(2.0))
    wider = replace(actions(0.9), action_space=spaces.Box(-5, 5, (2,), np.float32))
    trainer_of(agent, wider)  # the actions themselves are inside
    rows = small_columns(action=actions(2.0).transitions["action"].numpy())
    space = spaces.Box(-2, 2, (2,), np.float32)
    shards = build_shards(rows, tmp_path / "shards", shards=2, action_space=space)
    with pytest.raises(ValueError, match="that it can never take"):
        trainer_of(agent, shards)
    choice = load_dataset(small_columns(action=np.arange(40) % 3))
    shifted = replace(choice, action_space=spaces.Discrete(3, start=1))
    with pytest.raises(ValueError, match=r"^action: the agent was made for Discrete\(3\) and"):
        trainer_of(make_agent(config(), choice), shifted)


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
    agent = make_agent(config(), load_dataset(small_columns(**own)))
    with pytest.raises(ValueError, match=rf"^{key}: the agent was made for {words}.*make_agent"):
        trainer_of(agent, load_dataset(small_columns(**given)))
    if not own:
        trainer_of(
            agent, load_dataset(small_columns(observation=observations(3))), total_updates=2
        ).train()


# -- Files on a full disk: an ``OSError`` that names the file, and what was saved before stays


FULL = Path("/dev/full")  # every write to it fails as on a full disk
needs_full = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
ROWS = [{"update": 1, "loss_value": 0.5}]


def fill(path: Path) -> None:
    """Writing to ``path`` fails because the disk is full."""
    path.with_name(f".{path.name}.{os.getpid()}").symlink_to(FULL)


@contextmanager
def names(path: Path):
    """The block fails because the disk is full, with the name of the file."""
    with pytest.raises(OSError, match="No space left") as caught:
        yield
    assert caught.value.errno == errno.ENOSPC
    assert str(caught.value) == f"[Errno 28] No space left on device: '{path}'"


@needs_full
def test_an_export_names_the_file_and_leaves_the_earlier_one(tmp_path):
    agent = make_agent(IQLConfig(hidden=(8,)), pendulum_log())
    path = agent.export(tmp_path / "policy.pt2")
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    with torch.no_grad():
        next(agent.actor.parameters()).add_(1.0)
    for suffix in (".pt2", ".json"):
        fill(path.with_suffix(suffix))
        with names(path.with_suffix(suffix)):
            agent.export(path)
        assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before
    agent.export(path)
    assert path.read_bytes() != before[path]
    assert torch.export.load(path).module()(torch.zeros(2, 3)).shape == (2, 1)


@needs_full
@pytest.mark.parametrize(
    ("name", "write"),
    [("metrics.csv", lambda path: write_csv(path, ROWS)), ("curves.png", lambda p: draw(p, ROWS))],
)
def test_tables_and_pictures_too(tmp_path, name, write):
    path = tmp_path / name
    path.write_bytes(b"before")
    fill(path)
    with names(path):
        write(path)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def full_disk(monkeypatch):
    """After a call the disk has space for only half of the next write."""
    write = Path.write_bytes

    def half(path, content):
        write(path, bytes(content)[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")  # names no file, as write() does

    return lambda: monkeypatch.setattr(Path, "write_bytes", half)


def test_training_names_the_checkpoint_and_the_last_one_survives(tmp_path, full_disk, monkeypatch):
    step, weights = make_step(), {}

    def evaluation():
        weights[trainer.updates] = weight(step)
        if trainer.updates == 10:
            full_disk()
        return {"return_mean": float(trainer.updates)}

    settings = {"eval_interval": 5, "folder": tmp_path}
    trainer = make_trainer(step, evaluation=evaluation, **settings)
    folder = tmp_path / "checkpoints"
    with names(folder / "checkpoint-000000000010.torchrl"):
        trainer.train()
    assert newest(folder).name == "checkpoint-000000000005.torchrl"
    assert not list(tmp_path.glob("**/.*")), "nothing half written stays"
    with names(tmp_path / "run.torchrl"):
        make_trainer(total=4, save_trainer_file=tmp_path / "run.torchrl").train()
    monkeypatch.undo()
    again = make_step()
    assert make_trainer(again, **settings).resume().updates == 5
    assert weight(again) == weights[5]


def test_components_and_copies_name_their_file(tmp_path, full_disk, monkeypatch):
    path = write_components(tmp_path / "a.torchrl", {"part": {"x": 1}})
    unwritable = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(os, "link", unwritable)
    monkeypatch.setattr("shutil.copyfile", unwritable)
    with names(tmp_path / "best.torchrl"):
        replace_by_link(path, tmp_path / "best.torchrl")
    full_disk()
    with names(path):
        write_components(path, {"part": {"x": 2}})
    assert read_components(path) == {"part": {"x": 1}}
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_that_names_another_file_keeps_its_name(tmp_path):
    missing, nowhere = tmp_path / "missing", tmp_path / "no folder" / "table"
    for path, text, name in (
        (tmp_path / "table", missing.read_text, missing),
        (nowhere, lambda: "x", nowhere),  # not the temporary one
    ):
        with pytest.raises(FileNotFoundError) as caught, atomic_write(path) as temporary:
            temporary.write_text(text())
        assert caught.value.filename == str(name)
    with pytest.raises(OSError, match="without a number"), atomic_write(tmp_path / "table"):
        raise OSError("without a number")


def test_what_a_killed_process_left_of_a_copy_is_not_written_to(tmp_path):
    """It can be a link to a checkpoint, and a later process can have the same number."""
    old, new, best = (tmp_path / name for name in ("old", "new", "best"))
    old.write_bytes(b"old")
    new.write_bytes(b"new")
    os.link(old, best.with_name(f".{best.name}.{os.getpid()}"))
    replace_by_link(new, best)
    assert [path.read_bytes() for path in (old, new, best)] == [b"old", b"new", b"new"]
    assert len(list(tmp_path.iterdir())) == 3


# -- Checkpoints that an earlier version wrote load, and training continues from them


FOLDER = Path(__file__).with_name("old_checkpoints")
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
CONFIG = {"hidden": (8,), "batch_size": 8, "reward": "raw", "compile": False}


def dataset():
    """60 steps of made-up numbers that fit Pendulum's spaces, the same bits on every machine."""

    def numbers(*shape: int, factor: int) -> np.ndarray:
        whole = np.arange(np.prod(shape)) * factor % 129 - 64
        return (whole / 64).astype(np.float32).reshape(shape)

    observation = numbers(6, 11, 3, factor=37)  # six episodes of ten steps
    return load_dataset(
        {
            "observations": observation[:, :-1].reshape(60, 3),
            "next_observations": observation[:, 1:].reshape(60, 3),
            "actions": numbers(60, 1, factor=53),
            "rewards": numbers(60, factor=71),
            "terminals": np.arange(60) % 20 == 19,
            "timeouts": np.arange(60) % 20 == 9,
        },
        env="Pendulum-v1",
        reward="raw",
        progress=False,
    )


def trainer(folder: Path) -> OfflineTrainer:
    data = dataset()
    agent = make_agent(IQLConfig(updates=20, seed=3, **CONFIG), data)

    def score():
        return {"return_mean": float(next(agent.actor.parameters()).detach().sum())}

    return trainer_of(
        agent, data, log_interval=5, eval_interval=10, evaluation=score, folder=folder
    )


def weights(agent: Agent) -> list[float]:
    return torch.cat([p.detach().flatten() for p in agent.actor.parameters()]).tolist()


def test_an_old_agent_loads_and_acts():
    agent = Agent.load(FOLDER / "agent.torchrl")
    assert agent.config == IQLConfig(updates=20, seed=3, **CONFIG)
    assert agent.task.action_space.shape == (1,)
    saved = torch.load(io.BytesIO(member_of("agent.torchrl", "loss_module")), weights_only=True)
    actual = agent.state_dict()
    assert set(actual) == set(saved)
    assert all(torch.equal(actual[n], saved[n]) for n in actual if torch.is_tensor(actual[n]))
    observation = np.array([[0.5, -0.25, 1.0]], np.float32)
    action = 2.0 * np.tanh(by_hand(agent, observation))  # Pendulum's bounds are -2 and 2
    np.testing.assert_allclose(agent.act(observation), action, rtol=1e-5)


def member_of(file: str, part: str) -> bytes:
    with zipfile.ZipFile(FOLDER / file) as archive:
        (name,) = (n for n in archive.namelist() if part in n and n.endswith("state.pt"))
        return archive.read(name)


def test_training_continues_from_an_old_checkpoint(tmp_path):
    """Recorded rows keep their names: ``weight_at_ceiling`` is ``clip_fraction`` now."""
    run = trainer(tmp_path).load_from_file(FOLDER / "agent.torchrl")
    assert run.updates == 10
    assert run.progress.rows == [row for row in EXPECTED["rows"] if row["update"] <= 10]
    run.train()
    assert weights(run.agent) == pytest.approx(EXPECTED["agent"], rel=1e-4, abs=1e-6)
    for row, other in zip(run.progress.rows, EXPECTED["rows"], strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-6)


def test_an_old_population_loads_and_continues():
    runs = IQLPopulation.load(FOLDER / "population.torchrl", dataset())
    assert runs.updates == 4
    assert [config.expectile for config in runs.configs] == [0.7, 0.9]
    before = weights(runs.member(0))
    for _ in runs.train(4):
        pass
    for number, values in enumerate(EXPECTED["population"]):
        assert weights(runs.member(number)) == pytest.approx(values, rel=1e-4, abs=1e-6)
    assert before != pytest.approx(EXPECTED["population"][0], rel=1e-4, abs=1e-6)
