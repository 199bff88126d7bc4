"""Detection of divergence by the losses of a run, and advice when a step is not finite."""

import math
import statistics
from collections import deque

from ..common.errors import UserError
from ..parallel.processes import gather_from_ranks
from . import snapshots


class LossMonitor:
    """Decides by the losses whether training diverges.

    A loss is normal if it is at most three times the median of the last 200 normal losses. Losses of different crops
    differ by less, and a diverging run exceeds this limit long before its numbers overflow. Losses that are not normal
    do not change the median.
    """

    def __init__(self):
        self.losses = deque(maxlen=200)
        self.normal = False     # whether the last loss was normal

    def add(self, loss):
        """Add the loss of a step, which depends on the weights after the step before; return whether it is normal."""
        self.normal = math.isfinite(loss) and (not self.losses or loss <= 3 * statistics.median(self.losses))
        if self.normal:
            self.losses.append(loss)
        return self.normal


class History:
    """Records which snapshot was the last one before a divergence.

    Attributes:
        saved: step of the newest snapshot; 0 for none.
        healthy: step of the newest snapshot that was followed by a normal loss; 0 for none.
    """

    def __init__(self, engine, saved):
        self.engine, self.monitor, self.first_norm = engine, LossMonitor(), engine.weight_norm()
        self.saved, self.healthy = saved, 0

    def add(self, loss, step):
        """Add the loss of a step, which depends on the state before this step."""
        if self.monitor.add(loss) and self.saved == step - 1:
            self.healthy = self.saved

    def make_error(self, error, run, step, factor, parts):
        """Make the `UserError` for a step that was not finite and did not change the state.

        Saves a snapshot of the state if training has not diverged, and removes no snapshots.

        Args:
            error: `NotFinite`.
            run, step: `Run`, and number of the failed step.
            factor, parts: factor of the learning rates, and parts of the batch in this step.
        """
        engine = self.engine
        names = sum(gather_from_ranks(engine.processes, [name for part in parts for name in part["name"]]), [])
        rate = factor * engine.optimizer.defaults["lr"]
        return UserError(f"step {step}: expected a finite {error.what}, found {error.terms} at the learning rate "
                         f"{rate:.3g}; images: {', '.join(names)}; {self._advice(error, run, step - 1)}")

    def _advice(self, error, run, done):
        """Return advice for the user, the end of a message; done: steps done before the failed step."""
        if error.what == "gradient":
            state_is_healthy = self.monitor.add(self.engine.criterion.total(
                {name: error.terms[name] for name in self.engine.criterion.weights}))
        else:       # after a normal loss and with weights of normal size, the batch may have caused the problem
            state_is_healthy = self.monitor.normal and self.engine.weight_norm() < 10 * self.first_norm
        if state_is_healthy:
            if self.saved != done:
                run.snapshots.save(done, remove=False)
            return (f"the state before this step is the snapshot of step {done}: a lower --learning-rate with --resume "
                    "may help")
        lost = "" if self.saved == done else ", so this state is not saved"
        elsewhere = " and another --snapshot-dir" if self.saved > self.healthy else ""
        if self.healthy:
            return (f"training had already diverged{lost}; the newest snapshot that was followed by a normal loss is "
                    f"{snapshots.NAME.format(step=self.healthy)}: --resume with that file{elsewhere} and a lower "
                    "--learning-rate may help")
        return (f"training had already diverged{lost}, and no snapshot of this start was followed by a normal loss: a "
                f"lower --learning-rate from the beginning{elsewhere} may help")
