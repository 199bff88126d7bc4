"""The objects and settings of a training run."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ..runs.log import NoLog, RunLog
from .engine import Engine
from .optimization import Schedule
from .resume import SnapshotFolder
from .validation import QuickValidation


@dataclass(frozen=True, kw_only=True)
class Run:
    """All that `train.train` needs.

    Attributes:
        engine: takes the optimization steps.
        schedule: number of steps, and factor of the learning rates.
        start: steps done before.
        accumulate: parts of each batch.
        batches: yields the parts of the remaining steps, {"image", "label", "name"} of this process.
        log: logs progress, metrics and pictures.
        snapshots: writes the snapshots.
        panel: function that returns a picture of the predictions, (H, W, 3) uint8; None for no pictures.
        validate: `QuickValidation`, or None.
        patience: number of validations without a better score after which the run ends; 0 for all steps.
        save_every, val_every, log_every, panel_every: steps between snapshots, validations, log entries and pictures;
            all are also done after the last step.
    """

    engine: Engine
    schedule: Schedule
    start: int = 0
    accumulate: int = 1
    batches: Iterable = ()
    log: RunLog | NoLog = field(default_factory=NoLog)
    snapshots: SnapshotFolder | None = None
    panel: Callable | None = None
    validate: QuickValidation | None = None
    patience: int = 0
    save_every: int = 5000
    val_every: int = 0
    log_every: int = 10
    panel_every: int = 500
