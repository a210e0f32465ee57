"""Evaluations in a process of their own: the same numbers, and no process left behind."""

import gc
import importlib
import io
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import warnings
from functools import partial
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from small_agents import small_columns
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import NormalParamExtractor, ProbabilisticActor, TanhNormal

from iql_torchrl import IQLConfig, evaluate, load_dataset, make_agent
from iql_torchrl.config import Arithmetic
from iql_torchrl.data import DatasetError
from iql_torchrl.evaluation import background as background_module
from iql_torchrl.evaluation.background import (
    BackgroundEvaluation,
    named_tensors,
    run_task,
    serialize,
    serialize_call,
)

SETTINGS = {
    "episodes": 5, "num_envs": 3, "seed": 7, "max_steps": 40, "deterministic": False,
    "reference_scores": (-400.0, 0.0),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def stochastic_actor():
    network = nn.Sequential(
        nn.Linear(3, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Linear(32, 2), NormalParamExtractor()
    )
    return ProbabilisticActor(
        TensorDictModule(network, in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        distribution_kwargs={"low": -2.0, "high": 2.0},
    )


def pendulum_log(**more):
    """A few made-up steps that pass for a Pendulum log."""
    observations = np.random.default_rng(0).uniform(-1, 1, (13, 3)).astype(np.float32)
    data = {
        "observations": observations[:-1],
        "next_observations": observations[1:],
        "actions": observations[:-1, :1],
        "rewards": observations[:-1, 1],
        "terminals": np.zeros(12, bool),
        "timeouts": np.arange(12) % 6 == 5,
    }
    return load_dataset(data, **{"env": "Pendulum-v1", **more})


def change(actor, seed):
    """Other weights and other BatchNorm statistics."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*actor.parameters(), *actor.buffers()):
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand(tensor.shape, generator=generator))


def same(one, other):
    return all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in ("returns", "lengths", "scores")
    )


def process_of(background):
    return background._worker and background._worker.process


@pytest.fixture(scope="module")
def shared():
    """An actor, the environments of a dataset, and their background process, used by turns."""
    torch.manual_seed(0)
    actor, make_env = stochastic_actor(), pendulum_log().make_env
    with BackgroundEvaluation(actor, make_env, **SETTINGS) as background:
        assert process_of(background) is None, "it starts when it is needed"
        yield actor, make_env, background
    assert has_ended(process_of(background))


def played(actor, make_env):
    return evaluate(actor, make_env, **SETTINGS)


def result_of(background, number):
    """Of the policy as it is now, in the other process."""
    background.submit(number)
    ((finished, result),) = background.results(wait=True)
    assert finished == number
    return result


def has_ended(process):
    """Another thread may have asked for its exit code, and not have noted it yet."""
    deadline = time.monotonic() + 5
    while process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not process.is_alive()


def started(background):
    """The process, as soon as there is one."""
    deadline = time.monotonic() + 60
    while process_of(background) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return process_of(background)


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
def test_a_killed_process_is_named_and_replaced(shared):
    """First of all, because starting a process takes seconds: it is killed while it starts."""
    actor, make_env, background = shared
    background.submit(2)
    background.submit(3)
    process = started(background)
    process.kill()
    with pytest.raises(RuntimeError, match=r"exit code -9 \(SIGKILL\) while .* number 2"):
        background.results(wait=True)
    assert list(background.pending) == [3]
    assert same(background.results(wait=True)[0][1], played(actor, make_env))
    assert process_of(background).pid != process.pid


def test_the_same_results_as_in_the_foreground(shared):
    actor, make_env, background = shared
    expected = {}
    for number in (30, 10, 20):
        background.submit(number)
        expected[number] = played(actor, make_env), actor.module[0].module[0].weight.clone()
        change(actor, seed=number)
    assert list(background.pending) == [30, 10, 20]
    for number, snapshot in background.pending.items():
        weight = snapshot["module.0.module.0.weight"]
        assert torch.equal(weight, expected[number][1])
        assert "module.0.module.1.running_mean" in snapshot
        assert not weight.requires_grad
    results = background.results(wait=True)
    assert [number for number, _ in results] == [30, 10, 20]
    assert all(same(result, expected[number][0]) for number, result in results)
    assert not same(results[0][1], results[1][1]), "the weights matter"
    assert background.pending == {}
    assert background.results() == background.results(wait=True) == []


def test_without_waiting_it_gives_what_there_is(shared):
    actor, make_env, background = shared
    background.submit(1)
    result, deadline = [], time.monotonic() + 60
    while not result and time.monotonic() < deadline:
        assert list(background.pending) == [1]
        result = background.results()
        time.sleep(0.01)
    assert same(result[0][1], played(actor, make_env))
    assert background.pending == {}


def test_pending_policies_go_through_a_checkpoint(shared):
    actor, make_env, background = shared
    expected = played(actor, make_env)
    background.submit(4)
    file = io.BytesIO()
    torch.save(background.pending, file)
    background.results(wait=True)
    change(actor, seed=4)
    file.seek(0)
    background.resubmit(torch.load(file, weights_only=True))
    background.submit(5)
    (four, first), (five, second) = background.results(wait=True)
    assert (four, five) == (4, 5)
    assert same(first, expected)
    assert same(second, played(actor, make_env))


def test_an_error_comes_with_its_message_and_traceback(shared):
    actor, make_env, background = shared
    before = {name: tensor.clone() for name, tensor in actor.state_dict().items()}
    background.submit(1)
    with torch.no_grad():
        actor.module[0].module[3].weight.fill_(torch.nan)
    background.submit(2)
    with pytest.raises(ValueError, match="nan") as expected:
        played(actor, make_env)
    actor.load_state_dict(before)
    background.submit(3)
    process = process_of(background)
    with pytest.raises(ValueError, match="nan") as caught:
        background.results(wait=True)
    assert str(caught.value) == str(expected.value)
    assert "background.py" in str(caught.value.__cause__)
    assert list(background.pending) == [1, 3], "what succeeded is kept for the next call"
    assert [number for number, _ in background.results(wait=True)] == [1, 3]
    assert process_of(background) is process, "an error does not end the process"


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_are_handled_by_the_parent_only(shared, number):
    actor, make_env, background = shared
    result_of(background, 1)
    process = process_of(background)
    os.kill(process.pid, number)
    assert same(result_of(background, 2), played(actor, make_env))
    assert process_of(background) is process


def test_what_is_forgotten_ends_its_process():
    background = BackgroundEvaluation(stochastic_actor(), pendulum_log().make_env, **SETTINGS)
    background.submit(0)
    process = started(background)
    assert process.is_alive()
    del background
    gc.collect()
    assert has_ended(process)


SCRIPT = """
import os, signal, sys, time
from pathlib import Path
import gymnasium, numpy as np, torch
from gymnasium import spaces
from tensordict.nn import TensorDictModule
from iql_torchrl.evaluation.background import BackgroundEvaluation

print("the script runs", flush=True)
torch.set_num_threads(1)
folder = Path(sys.argv[1])

class Mine(gymnasium.Env):
    observation_space = spaces.Box(-1.0, 1.0, (1,))
    action_space = spaces.Box(-1.0, 1.0, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.slow = (folder / "slow").exists()
        if self.slow:
            (folder / "pid").write_text(str(os.getpid()))
            (folder / "pid").rename(folder / "started")
        return np.zeros(1, np.float32), {}

    def step(self, action):
        for _ in range(6000 * self.slow):
            time.sleep(0.01)
        if (folder / "leave").exists():
            os._exit(3)
        print("an environment may print")
        return np.zeros(1, np.float32), float(action @ [1.0, 10.0]), False, False, {}

gymnasium.register("Mine-v0", entry_point=Mine, max_episode_steps=3)

def settings(observation):  # what the process computes with
    doubles = torch.get_default_dtype() == torch.float64
    action = torch.tensor([torch.get_num_threads() / 10, float(doubles)])
    return action.expand(len(observation), 2)

policy = TensorDictModule(settings, ["observation"], ["action"])
background = BackgroundEvaluation(policy, lambda: gymnasium.make("Mine-v0"), episodes=2, seed=0)

def returns(number):
    background.submit(number)
    return background.results(wait=True)[0][1].returns.round(3).tolist()

def wait_for_a_slow_evaluation():
    (folder / "slow").touch()
    background.submit(3)
    while not (folder / "started").exists():
        time.sleep(0.05)
"""


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def run(script, folder, before=""):
    """Runs ``SCRIPT + script``; its exit code and output. Its pipes may stay open."""
    (folder / "script.py").write_text(before + SCRIPT + script)
    command = [sys.executable, "-W", "error", str(folder / "script.py"), str(folder)]
    (folder / "elsewhere").mkdir()
    with (folder / "output").open("w") as output:
        ended = subprocess.run(
            command, cwd=folder / "elsewhere", stdout=output, stderr=output, timeout=100,
            start_new_session=True,
        )  # fmt: skip
    return ended.returncode, (folder / "output").read_text().splitlines()


def assert_gone(folder):
    pid, deadline = int((folder / "started").read_text()), time.monotonic() + 15
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(pid)


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="looks processes up in /proc"
)


@pytest.mark.slow
@needs_proc
def test_a_script_without_main_guard_and_its_sudden_death(tmp_path):
    """It runs once, its own environments are found, its settings kept; -9 leaves no orphan."""
    code, lines = run(
        """
print(returns(1))
torch.set_default_dtype(torch.float64)
print(returns(2), flush=True)
wait_for_a_slow_evaluation()
if os.fork() == 0:  # a copy of the parent that outlives it, and holds its ends of the pipes
    time.sleep(20)
    os._exit(0)
os.kill(os.getpid(), signal.SIGKILL)
""",
        tmp_path,
    )
    assert code == -signal.SIGKILL, lines
    printed = [line for line in lines if line != "an environment may print"]
    assert printed == ["the script runs", "[0.3, 0.3]", "[30.3, 30.3]"]
    assert len(lines) == 3 + 2 * 2 * 3, "what environments print is not lost"
    assert_gone(tmp_path)


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "codes"),
    # 1 where TorchRL has imported Ray, which compiles code at exit
    [("sys.exit(0)", (0,)), ("os.killpg(0, signal.SIGINT); time.sleep(60)", (-signal.SIGINT, 1))],
    ids=["exit", "interrupt"],
)
def test_a_script_that_ends_without_closing(end, codes, tmp_path):
    began = time.monotonic()
    result, lines = run(f"wait_for_a_slow_evaluation()\n{end}\n", tmp_path)
    assert result in codes, lines
    assert sum(line.startswith("Traceback") for line in lines) == (result != 0), (
        "the parent's alone"
    )
    assert_gone(tmp_path)
    assert time.monotonic() - began < 55, "it does not wait for the 60 seconds of a step"


@pytest.mark.slow
def test_an_interpreter_that_exits_ends_the_process_whatever_was_registered_before(tmp_path):
    """multiprocessing waits at exit for its processes, so it must be ended before."""
    early = "import weakref\nweakref.finalize(weakref.finalize, int)  # registers with atexit\n"
    code, lines = run("print(returns(1))\n", tmp_path, before=early)
    assert code == 0
    assert lines[0] == "the script runs"


@pytest.mark.slow
def test_a_process_that_an_environment_ends_and_one_killed_at_rest(tmp_path):
    code, lines = run(
        """
(folder / "leave").touch()
try:
    returns(1)
except RuntimeError as error:
    print(error)
(folder / "leave").unlink()
print(returns(2))
process = background._worker.process
process.kill()
process.join()
print(returns(3))
""",
        tmp_path,
    )
    assert code == 0
    assert "died with exit code 3 while it evaluated number 1" in lines[1]
    printed = [line for line in lines if line != "an environment may print"]
    assert printed[2:] == ["[0.3, 0.3]"] * 2


# ---- what can be sent ----------------------------------------------------------------------


def sent(thing):
    """``thing`` as it arrives, in this process, and the size of what is sent."""
    return run_task(serialize_call(lambda: thing)), len(serialize("thing", thing))


def sent_alone(dataset):
    """What makes the environments of a dataset, as it arrives: without the data."""
    make, size = sent(dataset.make_env)
    assert size < 10_000
    one, other = make(), dataset.make_env()
    assert one.observation_space == other.observation_space
    np.testing.assert_array_equal(one.reset(seed=3)[0], other.reset(seed=3)[0])
    assert make() is not one
    return make


@pytest.mark.parametrize(
    "env",
    ["Pendulum-v1", gymnasium.spec("Pendulum-v1"), lambda: gymnasium.make("Pendulum-v1"),
     gymnasium.make("Pendulum-v1", g=5.0)],
    ids=["id", "spec", "function", "instance"],
)  # fmt: skip
def test_the_environments_of_a_dataset_are_sent_without_the_data(env):
    make = sent_alone(pendulum_log(env=env))
    if isinstance(env, gymnasium.Env):
        assert make().unwrapped.g == 5.0


class Goals(gymnasium.Env):
    observation_space = gymnasium.spaces.Dict(
        {
            "observation": gymnasium.spaces.Box(-1, 1, (2,), np.float64),
            "goal": gymnasium.spaces.Box(-1, 1, (1,), np.float64),
        }
    )
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        start = self.np_random.random(2)
        return {"observation": start, "goal": start[:1] / 2}, {}


def test_joined_environments_and_those_of_minari_are_sent(tmp_path, monkeypatch):
    rows = np.random.default_rng(0).uniform(-1, 1, (40, 3))
    split = {"observation": rows[:, :2], "goal": rows[:, 2:]}
    table = small_columns(observation=split, action=rows[:, :1].astype(np.float32))
    sent_alone(load_dataset(table, env=Goals, concatenate=["goal", "observation"]))
    minari = pytest.importorskip("minari")
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    buffer = EpisodeBuffer(
        id=None, observations=rows[:5].astype(np.float32), rewards=rows[:4, 0], infos={},
        actions=rows[:4, :1].astype(np.float32), terminations=np.zeros(4, bool),
        truncations=np.arange(4) == 3,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about an author, a description and the like
        minari.create_dataset_from_buffers("made/pendulum-v0", [buffer], env="Pendulum-v1")
    sent_alone(load_dataset("made/pendulum-v0"))


def test_making_the_environment_of_a_dataset_without_one_is_an_error():
    dataset = pendulum_log(env=None, action_space=gymnasium.spaces.Box(-2, 2, (1,)))
    make, _ = sent(dataset.make_env)
    for each in (make, dataset.make_env):
        with pytest.raises(DatasetError, match="records no environment; pass env="):
            each()


def test_environments_registered_here_are_found_there():
    gymnasium.register("Mine-v0", entry_point=Goals)
    try:
        call = serialize_call(lambda: gymnasium.make("Mine-v0").spec.id)
        del gymnasium.registry["Mine-v0"]
        assert run_task(call) == "Mine-v0"
    finally:
        gymnasium.registry.pop("Mine-v0", None)


def test_a_compiled_policy_and_a_trained_one_are_sent():
    agent = make_agent(IQLConfig(hidden=(8,), batch_size=4), pendulum_log())
    batch = pendulum_log().transitions.select("observation")
    for policy in (agent.policy, torch.compile(agent.policy, backend="eager")):
        arrived, _ = sent(policy)
        with torch.no_grad():
            first, second = (p(batch.clone())["loc"] for p in (policy, arrived))
        assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["policy", "make_env"])
def test_what_cannot_be_sent_is_named(name):
    lock, given = threading.Lock(), {"policy": stochastic_actor(), "make_env": Goals}
    if name == "policy":
        given["policy"].lock = lock
    else:
        given["make_env"] = lambda: (lock, Goals())[1]
    with pytest.raises(TypeError, match=f"{name} cannot be sent .*cannot pickle '_thread.lock'"):
        BackgroundEvaluation(**given, episodes=1, seed=0)


def test_a_function_that_drags_much_along_is_warned_of(monkeypatch):
    monkeypatch.setattr(background_module, "LARGE", 2**20)
    ballast = np.zeros(2**20)
    with pytest.warns(UserWarning, match="make_env sends 8 MiB"):
        BackgroundEvaluation(
            stochastic_actor(), lambda: (ballast, Goals())[1], episodes=1, seed=0
        )  # fmt: skip


def test_parts_that_the_process_cannot_import_are_explained(tmp_path, monkeypatch):
    (tmp_path / "here_only.py").write_text("def make_env(): ...")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        here_only = importlib.import_module("here_only")
        gymnasium.register("HereOnly-v0", entry_point=here_only.make_env)
        unknown = serialize_call(here_only.make_env)
        call = serialize_call(lambda: "performed")
        del gymnasium.registry["HereOnly-v0"], sys.modules["here_only"]
    (tmp_path / "here_only.py").unlink()
    with pytest.raises(RuntimeError, match=r"cannot be rebuilt .*No module named 'here_only'"):
        run_task(unknown)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(tmp_path)])
    assert run_task(call) == "performed", "what is only registered is not missed"
    assert "HereOnly-v0" not in gymnasium.registry


# ---- what crosses over ---------------------------------------------------------------------


class Awkward(Exception):
    def __init__(self, code, place):
        super().__init__(f"{code} at {place}")


class Plain(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (partial(Plain, "out of paint"), Plain, "out of paint"),
        (partial(Awkward, 3, "home"), RuntimeError, "Awkward: 3 at home"),
        (partial(SystemExit, 3), RuntimeError, "SystemExit: 3"),
    ],
)
def test_exceptions_keep_their_class_where_pickle_allows(error, kind, text):
    def fail():
        raise error()

    with pytest.raises(kind, match=text) as caught:
        run_task(serialize_call(fail))
    assert type(caught.value) is kind
    assert type(pickle.loads(pickle.dumps(caught.value))) is kind


def test_settings_on_which_rounding_depends_are_taken_over():
    before = Arithmetic.current()
    try:
        torch.set_num_threads(2)
        torch.set_default_dtype(torch.float64)
        torch.set_float32_matmul_precision("medium")
        torch.use_deterministic_algorithms(True)
        expected = Arithmetic.current()
    finally:
        torch.set_float32_matmul_precision("highest")
        before.adopt()
    assert expected != before
    assert Arithmetic.current().dtype == torch.float32
    try:
        expected.adopt()
        assert Arithmetic.current() == expected
        assert torch.get_num_threads() == 2
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        before.adopt()
    assert Arithmetic.current() == before


# ---- what is refused -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"policy": nn.Linear(1, 1)}, TypeError, "policy must be a TensorDict module"),
        ({"episodes": 0}, ValueError, "episodes is 0; expected an integer"),
        ({"reference_scores": (2, 1)}, ValueError, "reference_scores must be"),
        ({"max_episodes": 2}, TypeError, "max_episodes"),
    ],
)
def test_arguments_are_checked_at_once(options, error, message):
    given = {"policy": stochastic_actor(), "make_env": Goals, "episodes": 1, "seed": 0}
    with pytest.raises(error, match=message):
        BackgroundEvaluation(**given | options)


def test_numbers_and_snapshots_are_checked():
    actor = stochastic_actor()
    other = stochastic_actor()
    other.module[0].module[0] = nn.Linear(3, 32, bias=False)
    with BackgroundEvaluation(actor, Goals, episodes=1, seed=0) as background:
        for number in (1.0, True, "a"):
            with pytest.raises(ValueError, match="number must be an integer"):
                background.submit(number)
        snapshot = {n: t.detach() for n, t in named_tensors(other).items()}
        with pytest.raises(ValueError, match=r"'module.0.module.0.bias' of snapshot 3 is missing"):
            background.resubmit({3: snapshot})
        snapshot["module.0.module.0.bias"] = torch.zeros(31)
        with pytest.raises(ValueError, match=r"shape \(31,\), expected torch.float32 of .*\(32,\)"):
            background.resubmit({3: snapshot})
        assert background.pending == {}
        assert process_of(background) is None
        background.submit(7)
        with pytest.raises(ValueError, match="number 7 is pending already"):
            background.submit(7)
    assert list(background.pending) == [7], "for a last checkpoint"
    assert background.results(wait=True) == []
    with pytest.raises(RuntimeError, match="is closed"):
        background.submit(8)
    background.close()


class Moved(nn.Module):
    """A policy that notes where it was moved to."""

    def to(self, device):
        self.places = [*getattr(self, "places", []), device]
        return self


def test_the_policy_is_moved_to_the_device_of_the_evaluation(monkeypatch):
    policy, devices = Moved(), []

    def recorded(policy, make_env, *, device, episodes):
        devices.append((list(policy.places), device, episodes))

    monkeypatch.setattr(background_module, "evaluate", recorded)
    background_module.evaluate_on(policy, None, device="cuda:1", episodes=3)
    assert devices == [(["cuda:1"], "cuda:1", 3)]


@pytest.mark.gpu
def test_a_policy_on_cuda_is_evaluated_on_the_cpu_by_default():
    agent = make_agent(IQLConfig(hidden=(8,), batch_size=4, device="cuda"), pendulum_log())
    settings = {**SETTINGS, "deterministic": True}
    make_env = pendulum_log().make_env
    for device in (None, "cuda"):
        with BackgroundEvaluation(agent.policy, make_env, device=device, **settings) as background:
            background.submit(1)
            assert all(t.device.type == "cpu" for t in background.pending[1].values())
            ((_, result),) = background.results(wait=True)
        policy = agent.policy.to("cpu") if device is None else agent.policy.to("cuda")
        expected = evaluate(policy, make_env, **settings)
        assert same(result, expected)
        agent.policy.to("cuda")
