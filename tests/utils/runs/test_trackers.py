"""What services that keep experiments are told: stand-ins for them, and the real packages where they are installed."""

import json
import sys
import threading

import pytest

import train
from tests.conftest import SMALL
from utils.common.errors import UserError
from utils.runs import trackers
from utils.runs.log import RunLog

pytestmark = pytest.mark.usefixtures("short_networks")
NUMBERS = {"lr": 0.1, "loss": 2.5, "images_per_second": 1.0, "seconds_data": 0.1, "skipped": None}


class Kept:
    """A service that keeps what it is told."""

    began = []

    def __init__(self, folder, known, about):
        self.id, self.about, self.entries = known or f"run {len(self.began)}", about, []
        self.began.append(self)

    def numbers(self, values, step):
        self.entries.append(("numbers", step, values))

    def picture(self, name, image, step):
        self.entries.append(("picture", step, (name, image.shape[2], str(image.dtype))))

    def close(self, failed):
        self.entries.append(("close", None, failed))


class Failing(Kept):
    def numbers(self, values, step):
        raise ConnectionError("no route to the service\nand more")


@pytest.fixture
def serve(monkeypatch):
    """Put a class in the place of a service, installed or not."""
    def put(name, service):
        monkeypatch.setitem(trackers.SERVICES, name, service)
        monkeypatch.setattr(trackers, "check_packages", lambda names: None)
        monkeypatch.setattr(train, "check_packages", lambda names: None)
        monkeypatch.setattr(Kept, "began", [])
    return put


def run(streets, folder, *words):
    train.main([*SMALL, "--data-dir", str(streets), "--snapshot-dir", str(folder), "--batch-size", "2", *words])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", trackers.SERVICES)
def test_a_package_that_is_missing_is_a_sentence_before_anything_is_read(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)        # to the import system: not there
    with pytest.raises(UserError, match=f"--log {name}: expected the package {name}, found none; pip install {name}$"):
        run(tmp_path / "nowhere", tmp_path / "s", "--classes", "gone.csv", "--log", name)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_the_name_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "mlflow").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    with pytest.raises(UserError, match="expected the package mlflow, found none"):
        trackers.check_packages(["mlflow"])


def test_what_is_in_the_files_goes_there_too_and_resume_goes_on_there(streets, tmp_path, serve, capsys):
    serve("wandb", Kept)
    flags = ["--val-every", "2", "--panel-every", "2", "--num-steps"]
    run(streets, tmp_path, *flags, "2", "--log", "wandb")
    run(streets, tmp_path, *flags, "4", "--log", "wandb", "--resume")
    first, second = Kept.began
    assert first.id == second.id == json.loads((tmp_path / trackers.IDS).read_text())["wandb"]
    assert first.about["arguments"]["batch_size"] == 2
    received = first.entries + second.entries
    steps = [(step, values) for kind, step, values in received if kind == "numbers"]
    assert [{"step": step, **values} for step, values in steps if "loss" in values] == lines(tmp_path / "metrics.jsonl")
    quick = [(step, values["quick_mean_iou/fine"]) for step, values in steps if "loss" not in values]
    written = lines(tmp_path / "quick_validation.jsonl")
    assert quick == [(line["step"], line["quick_mean_iou_fine"]) for line in written]
    assert [(step, what) for kind, step, what in received if kind == "picture"] == [
        (step, ("image_truth_coarse_fine_difference", 3, "uint8")) for step in (2, 4)]
    assert first.entries[-1] == second.entries[-1] == ("close", None, False)
    assert "has no earlier run" not in capsys.readouterr().out


def test_a_run_that_was_not_told_begins_anew_there(streets, tmp_path, serve, capsys):
    run(streets, tmp_path, "--num-steps", "1")
    serve("mlflow", Kept)
    run(streets, tmp_path, "--num-steps", "2", "--resume", "--log", "mlflow", "mlflow")
    assert len(Kept.began) == 1 and "has no earlier run there, so a new one begins" in capsys.readouterr().out


def test_a_service_that_fails_costs_nothing_but_one_line(streets, tmp_path, serve, capsys):
    serve("wandb", Failing)
    run(streets, tmp_path, "--num-steps", "3", "--log", "wandb")
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    (output,) = [line for line in capsys.readouterr().err.splitlines() if "--log" in line]
    assert output.startswith("--log wandb: expected ") and "found: no route to the service; training goes on" in output


def test_a_service_that_hangs_is_left_behind(tmp_path, serve, monkeypatch, capsys):
    blocked = threading.Event()
    serve("wandb", type("Hanging", (Kept,), {"numbers": lambda self, values, step: blocked.wait(30)}))
    monkeypatch.setattr(trackers, "CLOSE_TIMEOUT", 0.05)
    with RunLog(tmp_path, 500, track=["wandb"]) as log:
        for step in range(1, 301):
            log.metric(step, NUMBERS, 1.0)
        assert log.trackers[0].entries.qsize() <= trackers.MAX_QUEUED
    assert len(lines(tmp_path / "metrics.jsonl")) == 300
    assert capsys.readouterr().err.count("--log wandb: ") == 1
    blocked.set()


def test_a_service_hears_of_a_run_that_failed(tmp_path, serve):
    serve("wandb", Kept)
    with pytest.raises(KeyError), RunLog(tmp_path, 5, track=["wandb"]) as log:
        log.metric(1, NUMBERS, 1.0)
        raise KeyError
    known = {key: value for key, value in NUMBERS.items() if value is not None}
    assert Kept.began[0].entries == [("numbers", 1, known), ("close", None, True)]


def test_a_service_that_does_not_begin_is_a_sentence(tmp_path, serve):
    serve("wandb", lambda *args: Failing(*args).numbers(None, None))
    with pytest.raises(UserError, match="--log wandb: expected a run to begin there, found: no route to the service$"):
        trackers.start_trackers(["wandb"], tmp_path, False, {})
    assert not (tmp_path / trackers.IDS).exists()


@pytest.mark.parametrize("text", ["", "[1]", "{\"wandb\": 3}", "\xff"])
def test_ids_that_are_none_are_a_sentence(tmp_path, text, serve):
    serve("wandb", Kept)
    (tmp_path / trackers.IDS).write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match="trackers.json: expected the ids"):
        trackers.start_trackers(["wandb"], tmp_path, True, {})
    assert Kept.began == [] and (tmp_path / trackers.IDS).read_text(encoding="latin-1") == text


def test_mlflow_itself(streets, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "kept").as_uri())
    for steps in ("2", "3"):
        run(streets, tmp_path / "s", "--num-steps", steps, "--panel-every", "1", "--log", "mlflow", "--resume")
    client = mlflow.MlflowClient()
    number = json.loads((tmp_path / "s" / trackers.IDS).read_text())["mlflow"]
    assert [(one.step, one.value) for one in client.get_metric_history(number, "loss")] == [
        (line["step"], line["loss"]) for line in lines(tmp_path / "s/metrics.jsonl")]
    assert client.get_run(number).info.status == "FINISHED" and client.get_run(number).data.params["batch_size"] == "2"
    assert len(client.list_artifacts(number, "image_truth_coarse_fine_difference")) == 3


def test_wandb_itself_offline(streets, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for steps in ("2", "3"):
        run(streets, tmp_path, "--num-steps", steps, "--panel-every", "1", "--log", "wandb", "--resume")
    number = json.loads((tmp_path / trackers.IDS).read_text())["wandb"]
    assert len(list(tmp_path.glob(f"wandb/offline-run-*-{number}/run-{number}.wandb"))) == 2
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/*.png"))) == 3
