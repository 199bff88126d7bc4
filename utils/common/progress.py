"""Progress of long work in the terminal."""

import functools
import os
import sys
import time

from tqdm import tqdm

from .messages import logger


@functools.cache
def log_once(text):
    """Log a line, unless this process has logged it before."""
    logger.info(text)


def progress(iterable, description, unit, every=10.0, total=None):
    """Iterate and show progress: a bar on a terminal, otherwise a plain line every `every` seconds.

    Args:
        iterable: the items.
        description: what is being done.
        unit: name of an item, in the singular.
        every: seconds between lines.
        total: number of items; None for the length of the iterable, 0 if unknown.
    """
    total = len(iterable) if total is None else total
    if sys.stderr.isatty():
        yield from tqdm(iterable, total=total or None, desc=description, unit=unit, dynamic_ncols=True,
                        disable=os.environ.get("RANK", "0") != "0")     # only rank 0 shows the bar
        return
    started = last_line = time.monotonic()
    for done, item in enumerate(iterable, 1):
        yield item
        now = time.monotonic()
        if now - last_line > every or done == total:
            last_line = now
            rate = done / max(now - started, 1e-9)
            of, left = (f"/{total}", f", {duration(max(0, total - done) / rate)} left") if total else ("", "")
            logger.info(f"{description}: {done}{of} {unit}s, {rate:.3g} {unit}s/s{left}")


class FirstImage:
    """Progress within the first image, which may take minutes before `progress` shows its first line.

    Args:
        images: total number of images.
        every: seconds between lines; the first line comes after the first windows.
    """

    def __init__(self, images, every=10.0):
        self.images, self.every = images, every
        self.started = self.last_line = None

    def __call__(self, done, windows):
        """Log a line if `every` seconds have passed; done: windows done, 0 at the start; windows: their total number.

        Returns whether the image is done; from then on `progress` shows lines.
        """
        now = time.monotonic()
        if done == 0:
            self.started = self.started or now
        elif done < windows and (self.last_line is None or now - self.last_line > self.every):
            self.last_line = now
            seconds = (now - self.started) / done * windows
            logger.info(f"first image: {done}/{windows} windows; at this rate {duration(seconds)} per image, "
                        f"{duration(seconds * self.images)} for {self.images}")
        return done == windows


def duration(seconds):
    """Seconds as "M:SS" or "H:MM:SS"."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
