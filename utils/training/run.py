"""What a training is made of."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ..runs.log import NoLog, RunLog
from .engine import Engine
from .optimization import PolySchedule
from .resume import SnapshotFolder


@dataclass(frozen=True, kw_only=True)
class Run:
    """What `train.train` needs.

    Attributes:
        engine: takes the steps.
        schedule: their number, and the factor of the rates.
        start: steps done before.
        accumulate: parts in which a batch goes through.
        batches: those parts, {"image", "label", "name"} of this process, for the steps that are left.
        log: what is said of each step.
        snapshots: writes them.
        panel: () → a picture of what the network does, (H, W, 3) uint8; None for none.
        validate: (step, () → whether to stop early) → a score if it is the best so far, else None; None for none.
        save_every, val_every, log_every, panel_every: steps between these; also after the last one.
    """

    engine: Engine
    schedule: PolySchedule
    start: int = 0
    accumulate: int = 1
    batches: Iterable = ()
    log: RunLog | NoLog = field(default_factory=NoLog)
    snapshots: SnapshotFolder | None = None
    panel: Callable | None = None
    validate: Callable | None = None
    save_every: int = 5000
    val_every: int = 0
    log_every: int = 10
    panel_every: int = 500
