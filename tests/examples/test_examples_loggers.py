"""``iql_offline.py --logger``: a run for each method, finished, with all numbers; or a sentence."""

import struct
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from example_scripts import run, table
from extras import needs
from test_examples import METHODS, TINY, small_pendulum  # noqa: F401

pytestmark = pytest.mark.usefixtures("small_pendulum")
ARGUMENTS = [*TINY, "--name", "both", "--logger"]


def losses(method: str) -> dict[int, float]:
    """``loss_actor`` by update, from the run's own table."""
    rows = table(Path("runs/both", method, "metrics.csv"))
    return {int(row["update"]): float(row["loss_actor"]) for row in rows if row["loss_actor"]}


def check(logged: dict[str, dict[int, float]]) -> None:
    """What a logger holds, by run and update, against the tables of both methods."""
    assert sorted(logged) == sorted(METHODS)
    for method in METHODS:
        assert logged[method] == pytest.approx(losses(method), rel=1e-6)
    assert losses("IQL") != losses("behaviour-cloning")


def wandb_records(path):
    """The records of a ``.wandb`` file: LevelDB's log format (blocks of 32 KiB, each record in
    pieces of 4 bytes checksum, 2 length, 1 kind) behind a header of 7 bytes."""
    content, block = path.read_bytes(), 32_768
    assert content.startswith(b":W&B")
    position, pieces = 7, b""
    while position + 7 <= len(content):
        if block - position % block < 7:
            position += block - position % block
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        pieces += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield pieces
            pieces = b""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # wandb's own dependencies
def test_wandb_has_a_run_for_each_method(monkeypatch):
    wandb = needs("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()  # it reads these when it starts
    assert run("iql_offline", *ARGUMENTS, "wandb") == 0
    assert wandb.run is None, "the last run is finished"
    wandb.teardown()
    logged = {}
    for path in Path("runs").rglob("run-*.wandb"):
        name, updates, values = "", [], []
        for content in wandb_records(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            name = record.run.display_name or name
            items = {i.key or ".".join(i.nested_key): i.value_json for i in record.history.item}
            if "loss_actor" in items:
                (update,) = (v for k, v in items.items() if "step" in k and not k.startswith("_"))
                updates.append(int(update))
                values.append(float(items["loss_actor"]))
        assert name.startswith("both-")
        logged[name.removeprefix("both-")] = dict(zip(updates, values, strict=True))
    check(logged)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("failure", [False, RuntimeError("the key was refused")])
def test_wandb_without_an_account_is_a_sentence_and_leaves_no_folder(
    monkeypatch, capfd, tmp_path, failure
):
    wandb = needs("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    wandb.teardown()

    def login(prompt=True):
        assert not prompt, "nobody may be asked"
        if failure:
            raise failure
        return failure

    monkeypatch.setattr(wandb, "login", login)
    assert run("iql_offline", *TINY, "--logger", "wandb") == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert "--logger wandb: " in line
    assert ("the key was refused" if failure else "not logged in") in line
    assert "`wandb login`, or set WANDB_MODE=offline" in line
    assert not Path("runs").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # mlflow's own dependencies
def test_mlflow_has_a_finished_run_for_each_method(monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert run("iql_offline", *ARGUMENTS, "mlflow") == 0
    assert mlflow.active_run() is None
    database = f"sqlite:///{Path('runs/both/mlflow.db').resolve()}"
    client, logged = mlflow.MlflowClient(database), {}
    for experiment in client.search_experiments():
        for mlflow_run in client.search_runs([experiment.experiment_id]):
            assert mlflow_run.info.status == "FINISHED"
            history = client.get_metric_history(mlflow_run.info.run_id, "loss_actor")
            name = experiment.name.removeprefix("both-")
            logged[name] = {metric.step: metric.value for metric in history}
    check(logged)


@pytest.mark.filterwarnings("ignore")  # trackio's own dependencies
def test_trackio_has_a_run_for_each_method_with_its_losses(monkeypatch, tmp_path):
    pytest.importorskip("trackio")
    from trackio import sqlite_storage

    for module in list(sys.modules.values()):  # each has its copy of the constant
        if getattr(module, "__name__", "").startswith("trackio") and hasattr(module, "TRACKIO_DIR"):
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    assert run("iql_offline", *ARGUMENTS, "trackio") == 0
    logged = {}
    for name in sqlite_storage.SQLiteStorage.get_runs("torchrl"):
        rows = sqlite_storage.SQLiteStorage.get_logs("torchrl", name)
        method = name.removeprefix("both-")
        logged[method] = {r["step"]: r["loss_actor"] for r in rows if "loss_actor" in r}
    check(logged)


def test_a_logger_that_cannot_start_is_a_sentence(monkeypatch, capfd):
    refuse = Mock(side_effect=PermissionError("the server said no"))
    monkeypatch.setattr("torchrl.record.loggers.get_logger", refuse)
    assert run("iql_offline", *TINY, "--logger", "csv") == 2
    assert "error: --logger csv could not be started: the server said no" in capfd.readouterr().err
