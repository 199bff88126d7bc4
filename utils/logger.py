"""What a training run tells: a progress line, `metrics.jsonl`, TensorBoard."""

import json
import sys
import time
from pathlib import Path

from tensorboardX import SummaryWriter
from tqdm import tqdm

from . import checkpoint


class RunLog:
    """Progress of a run of `num_steps` steps, in the console and in files below `folder`.

    On a terminal progress is a bar; elsewhere it is one plain line each time something is logged.

    Args:
        folder: where `metrics.jsonl` and `tensorboard/` go.
        num_steps: steps in all.
        start: steps done before.
    """

    def __init__(self, folder, num_steps, start=0):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.num_steps = num_steps
        self.first = start
        self.started = time.monotonic()
        self.bar = tqdm(total=num_steps, initial=start, unit="step", dynamic_ncols=True,
                        disable=not sys.stderr.isatty())
        _forget_steps_after(start, self.folder / "metrics.jsonl")
        self.metrics = open(self.folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115, closed in close
        self.board = SummaryWriter(str(self.folder / "tensorboard"))

    def step(self):
        self.bar.update()

    def metric(self, step, values):
        """values: {name: number}, with loss, lr, images_per_second among them."""
        self.metrics.write(json.dumps({"step": step, **values}) + "\n")
        self.metrics.flush()
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        terms = "  ".join(f"{name.removeprefix('loss_')} {value:.3f}" for name, value in values.items()
                          if name.startswith("loss"))
        speed = f"{values['images_per_second']:.1f} images/s"
        if self.bar.disable:
            done = step - self.first
            left = (time.monotonic() - self.started) / done * (self.num_steps - step)
            print(f"step {step}/{self.num_steps}  {terms}  lr {values['lr']:.2e}  {speed}  "
                  f"{_duration(left)} left", flush=True)
        else:
            self.bar.set_postfix_str(f"{terms}  lr {values['lr']:.2e}  {speed}")

    def picture(self, name, image, step):
        """image (H, W, 3) uint8."""
        self.board.add_image(name, image, step, dataformats="HWC")

    def say(self, text):
        """A line that stays, above the bar."""
        tqdm.write(text) if not self.bar.disable else print(text, flush=True)

    def close(self):
        self.bar.close()
        self.metrics.close()
        self.board.close()


class NoLog:
    """A `RunLog` of which nothing is seen, for all processes but the first."""

    def step(self):
        pass

    def metric(self, step, values):
        pass

    def say(self, text):
        pass

    def close(self):
        pass


def progress(iterable, what, unit, every=10.0):
    """Iterate with progress: a bar on a terminal, elsewhere a plain line every so many seconds."""
    total = len(iterable)
    if sys.stderr.isatty():
        yield from tqdm(iterable, desc=what, unit=unit, dynamic_ncols=True)
        return
    started = said = time.monotonic()
    for done, item in enumerate(iterable, 1):
        yield item
        now = time.monotonic()
        if now - said > every or done == total:
            said = now
            print(f"{what}: {done}/{total} {unit}s, {_duration((now - started) / done * (total - done))} left",
                  flush=True)


def _forget_steps_after(step, path):
    """Drop lines of steps that will be done again, and a last line that was cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            continue
    checkpoint.write_atomically(path, lambda file: file.write("".join(kept).encode()))


def _duration(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
