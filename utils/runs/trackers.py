"""What a run tells services that keep experiments: Weights & Biases, MLflow.

Where they keep it is said in their own environment variables: WANDB_PROJECT, WANDB_MODE=offline, MLFLOW_TRACKING_URI,
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

PROJECT = "acfnet"      # of runs for which the environment names none
IDS = "trackers.json"   # in the folder of a run: its name at each service, by which --resume goes on there
BEHIND = 100            # entries that a service may be behind
PATIENCE = 60.0         # seconds that a run waits for it at its end


class WandB:
    """A run at Weights & Biases.

    Args:
        folder: of our run.
        known: id of the run to go on with, or None.
        about: plain values that describe our run.
    """

    def __init__(self, folder, known, about):
        import wandb
        self.image = wandb.Image
        # Its copy of the console is off: it would replace our standard output, which survives a closed terminal.
        self.run = wandb.init(project=os.environ.get("WANDB_PROJECT", PROJECT), dir=str(folder), id=known,
                              resume="allow" if known else None, config=about,
                              settings=wandb.Settings(console="off"))
        self.id = self.run.id

    def numbers(self, values, step):
        self.run.log(values, step=step)

    def picture(self, name, image, step):
        self.run.log({name: self.image(image)}, step=step)

    def close(self, failed):
        self.run.finish(exit_code=int(failed))


class MLflow:
    """A run at MLflow, through its client, which any thread may use. The arguments are those of `WandB`."""

    def __init__(self, folder, known, about):
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param
        self.client, self.metric = MlflowClient(), Metric
        if known:
            self.id = known
            self.client.update_run(known, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self.client.get_experiment_by_name(name)
        number = os.environ.get("MLFLOW_EXPERIMENT_ID") or (
            experiment.experiment_id if experiment else self.client.create_experiment(name))
        self.id = self.client.create_run(number, run_name=folder.absolute().name).info.run_id
        self.client.log_batch(self.id, params=[Param(key, str(value)[:250])     # the length that all its stores take
                                               for key, value in about.get("arguments", {}).items()])

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
    """Passes a run on to a service from a thread of its own, so that one which fails or hangs costs the training
    nothing; what it misses is said once."""

    def __init__(self, name, service):
        self.name, self.service, self.missed = name, service, False
        self.entries = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def numbers(self, values, step):
        """values: {name: number}."""
        self._pass_on(self.service.numbers, values, step)

    def picture(self, name, image, step):
        """image (H, W, 3) uint8."""
        self._pass_on(self.service.picture, name, image, step)

    def close(self, failed):
        self.entries.put((self.service.close, failed))
        self.entries.put(None)
        self.thread.join(PATIENCE)
        if self.thread.is_alive():
            self._say(f"one that was not done {PATIENCE:.0f} seconds after the end")

    def _pass_on(self, *entry):
        if self.entries.qsize() < BEHIND:
            self.entries.put(entry)
        else:
            self._say(f"one that is {BEHIND} entries behind")

    def _work(self):
        while entry := self.entries.get():
            call, *values = entry
            try:
                call(*values)
            except Exception as error:  # noqa: BLE001, services raise kinds of their own
                self._say(first_line(error))

    def _say(self, found):
        if not self.missed:
            self.missed = True
            logger.warning(f"--log {self.name}: expected a service that takes what it is told, found: {found}; "
                           "training goes on, and what is missing there is in metrics.jsonl and TensorBoard")


def check_packages(names):
    """Raise `UserError` where the package of a service is not installed."""
    for name in names:
        found = find_spec(name)
        if found is None or found.origin is None:       # without origin: only a folder of that name
            raise UserError(f"--log {name}: expected the package {name}, found none; pip install {name}")


def start_trackers(names, folder, resumed, about):
    """A `Tracker` for each name of `SERVICES`. Raises `UserError` where a service does not begin.

    folder: of the run; resumed: whether it goes on, there too; about: plain values that describe it.
    """
    path, trackers = Path(folder, IDS), []
    known = _read_ids(path) if resumed and names else {}
    for name in dict.fromkeys(names):
        if resumed and name not in known:
            logger.info(f"--log {name}: {path} knows no earlier run there, so a new one begins")
        try:
            service = SERVICES[name](Path(folder), known.get(name), about)
        except Exception as error:  # noqa: BLE001, services raise kinds of their own
            raise UserError(f"--log {name}: expected a run to begin there, found: {first_line(error)}") from None
        trackers.append(Tracker(name, service))
        known[name] = service.id
    if names:
        files.write_json(path, known)
    return trackers


def _read_ids(path):
    """{name of a service: id of the run there}; empty without the file."""
    if not os.path.lexists(path):
        return {}
    try:
        known = json.loads(read_file(path, "the ids of a run's trackers"))
    except (ValueError, RecursionError):
        known = None
    if not isinstance(known, dict) or not all(isinstance(one, str) for one in known.values()):
        raise UserError(f"{path}: expected the ids of this run's trackers, found something else; without the file new "
                        "runs begin there")
    return known
