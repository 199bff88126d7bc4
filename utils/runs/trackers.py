"""Experiment trackers: Weights & Biases and MLflow.

Their own environment variables set where they store runs: WANDB_PROJECT, WANDB_MODE=offline, MLFLOW_TRACKING_URI,
MLFLOW_EXPERIMENT_NAME and so on.
"""

import json
import os
import queue
import re
import threading
import time
from importlib.util import find_spec
from pathlib import Path

from ..common import files
from ..common.errors import UserError, first_line
from ..common.files import read_file
from ..common.messages import logger

PROJECT = "acfnet"      # default project or experiment
IDS = "trackers.json"   # file in the folder of a run with its id at each service, so that --resume continues that run
MAX_QUEUED = 100        # entries that may wait for a service
CLOSE_TIMEOUT = 60.0    # seconds to wait for a service at the end of a run


class WandB:
    """A run at Weights & Biases.

    Args:
        folder: of the training run.
        run_id: id of the W&B run to continue, or None.
        description: plain values that describe the training run.
    """

    def __init__(self, folder, run_id, description):
        import wandb
        self.image = wandb.Image
        # Console capture is off: it would replace our standard output, which survives a closed terminal.
        self.run = wandb.init(project=os.environ.get("WANDB_PROJECT", PROJECT), dir=str(folder), id=run_id,
                              resume="allow" if run_id else None, config=description,
                              settings=wandb.Settings(console="off"))
        self.id = self.run.id

    def numbers(self, values, step):
        self.run.log(values, step=step)

    def picture(self, name, image, step):
        self.run.log({name: self.image(image)}, step=step)

    def close(self, failed):
        self.run.finish(exit_code=int(failed))


class MLflow:
    """A run at MLflow, through its thread-safe client; arguments as for `WandB`."""

    def __init__(self, folder, run_id, description):
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param
        self.client, self.metric = MlflowClient(), Metric
        if run_id:
            self.id = run_id
            self.client.update_run(run_id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self.client.get_experiment_by_name(name)
        experiment_id = os.environ.get("MLFLOW_EXPERIMENT_ID") or (
            experiment.experiment_id if experiment else self.client.create_experiment(name))
        self.id = self.client.create_run(experiment_id, run_name=folder.absolute().name).info.run_id
        self.client.log_batch(self.id, params=[Param(key, str(value)[:250])     # all its stores allow this length
                                               for key, value in description.get("arguments", {}).items()])

    def numbers(self, values, step):
        now = int(1000 * time.time())
        self.client.log_batch(self.id, [self.metric(re.sub(r"[^\w./ -]", "_", name), value, now, step)
                                        for name, value in values.items()])

    def picture(self, name, image, step):
        self.client.log_image(self.id, image, f"{name}/{step:07}.png")

    def close(self, failed):
        self.client.set_terminated(self.id, "FAILED" if failed else "FINISHED")


SERVICES = {"wandb": WandB, "mlflow": MLflow}


class Tracker:
    """Sends the log of a run to a service from a separate thread.

    A service that fails or hangs does not disturb the training; the first problem is logged as a warning.
    """

    def __init__(self, name, service):
        self.name, self.service, self.warned = name, service, False
        self.entries = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def numbers(self, values, step):
        """Send the scalars of a step; values: {name: number}."""
        self._enqueue(self.service.numbers, values, step)

    def picture(self, name, image, step):
        """Send a picture; image (H, W, 3) uint8."""
        self._enqueue(self.service.picture, name, image, step)

    def close(self, failed):
        """End the run at the service, and wait at most `CLOSE_TIMEOUT` for it; failed: whether the run failed."""
        self.entries.put((self.service.close, failed))
        self.entries.put(None)
        self.thread.join(CLOSE_TIMEOUT)
        if self.thread.is_alive():
            self._warn_once(f"entries not sent {CLOSE_TIMEOUT:.0f} seconds after the end of the run")

    def _enqueue(self, *entry):
        if self.entries.qsize() < MAX_QUEUED:
            self.entries.put(entry)
        else:
            self._warn_once(f"{MAX_QUEUED} entries that wait to be sent")

    def _work(self):
        while entry := self.entries.get():
            call, *values = entry
            try:
                call(*values)
            except Exception as error:  # noqa: BLE001, services raise their own exception classes
                self._warn_once(first_line(error))

    def _warn_once(self, problem):
        if not self.warned:
            self.warned = True
            logger.warning(f"--log {self.name}: expected a service that accepts all entries, found: {problem}; "
                           "training goes on, and the entries that are missing there are in metrics.jsonl and "
                           "TensorBoard")


def check_packages(names):
    """Raise `UserError` if the package of a service is not installed."""
    for name in names:
        spec = find_spec(name)
        if spec is None or spec.origin is None:     # without an origin it is only a folder of that name
            raise UserError(f"--log {name}: expected the package {name}, found none; pip install {name}")


def start_trackers(names, folder, resumed, description):
    """Start the trackers of a run.

    Args:
        names: keys of `SERVICES`.
        folder: of the run.
        resumed: whether the run is resumed, so that its runs at the services are continued.
        description: plain values that describe the run.

    Returns:
        A list of `Tracker`.

    Raises:
        UserError: if a run cannot be started at a service.
    """
    path, trackers = Path(folder, IDS), []
    run_ids = _read_ids(path) if resumed and names else {}
    for name in dict.fromkeys(names):
        if resumed and name not in run_ids:
            logger.info(f"--log {name}: {path} has no earlier run there, so a new one begins")
        try:
            service = SERVICES[name](Path(folder), run_ids.get(name), description)
        except Exception as error:  # noqa: BLE001, services raise their own exception classes
            raise UserError(f"--log {name}: expected a run to begin there, found: {first_line(error)}") from None
        trackers.append(Tracker(name, service))
        run_ids[name] = service.id
    if names:
        files.write_json(path, run_ids)
    return trackers


def _read_ids(path):
    """Read {name of a service: id of the run there}; empty without the file."""
    if not os.path.lexists(path):
        return {}
    try:
        run_ids = json.loads(read_file(path, "the ids of a run's trackers"))
    except (ValueError, RecursionError):
        run_ids = None
    if not isinstance(run_ids, dict) or not all(isinstance(run_id, str) for run_id in run_ids.values()):
        raise UserError(f"{path}: expected the ids of this run's trackers, found something else; remove the file to "
                        "begin new runs there")
    return run_ids
