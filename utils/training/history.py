"""How a training has gone, told by its losses, for when a step is no longer finite."""

import math
import statistics
from collections import deque

from ..common.errors import UserError
from ..parallel.processes import gather_from_ranks
from ..runs import snapshots


class Course:
    """Whether training goes on normally, told by its losses.

    A loss is normal up to three times the median of the last 200 normal ones: crops differ by less, and a run that
    diverges passes that long before its numbers overflow. What is not normal does not move the median.
    """

    def __init__(self):
        self.losses = deque(maxlen=200)
        self.normal = False     # whether the last one was

    def add(self, loss):
        """The loss of a step, which judges the weights that the step before it made. Returns whether it is normal."""
        self.normal = math.isfinite(loss) and (not self.losses or loss <= 3 * statistics.median(self.losses))
        if self.normal:
            self.losses.append(loss)
        return self.normal


class History:
    """Whether a run went on normally, for when it no longer does.

    Attributes:
        saved: step of the newest snapshot; 0 for none.
        sound: step of the newest snapshot after which the loss was normal; 0 for none.
    """

    def __init__(self, engine, saved):
        self.engine, self.course, self.first_norm = engine, Course(), engine.weight_norm()
        self.saved, self.sound = saved, 0

    def add(self, loss, step):
        """The loss of a step, which judges the state before it."""
        if self.course.add(loss) and self.saved == step - 1:
            self.sound = self.saved

    def make_error(self, error, run, step, factor, parts):
        """The `UserError` for a step that was not finite and has left the state as it was; saves that state if it is
        worth it, and removes nothing.

        error: `NotFinite`; factor: of the rates; parts: the batch.
        """
        engine = self.engine
        names = sum(gather_from_ranks(engine.processes, [name for part in parts for name in part["name"]]), [])
        rate = factor * engine.optimizer.param_groups[0]["initial_lr"]
        return UserError(f"step {step}: expected a finite {error.what}, found {error.terms} at the learning rate "
                         f"{rate:.3g}; images: {', '.join(names)}; {self._advice(error, run, step - 1)}")

    def _advice(self, error, run, done):
        """What the user can do, for the end of a sentence. done: steps that made the state."""
        if error.what == "gradient":
            healthy = self.course.add(self.engine.criterion.total(
                {name: error.terms[name] for name in self.engine.criterion.weights}))
        else:       # if the step before was normal and left weights of normal size, the batch may be at fault
            healthy = self.course.normal and self.engine.weight_norm() < 10 * self.first_norm
        if healthy:
            if self.saved != done:
                run.snapshots.save(done, remove=False)
            return f"the state before is the snapshot of step {done}: a lower --learning-rate with --resume may help"
        lost = "" if self.saved == done else ", so that state is not saved"
        elsewhere = " and another --snapshot-dir" if self.saved > self.sound else ""
        if self.sound:
            return (f"training had left its course before{lost}; the newest snapshot that trained on normally is "
                    f"{snapshots.NAME.format(step=self.sound)}: --resume with that file{elsewhere} and a lower "
                    "--learning-rate may help")
        return (f"training had left its course before{lost}, and no snapshot of this start trained on normally: a "
                f"lower --learning-rate from the beginning{elsewhere} may help")
