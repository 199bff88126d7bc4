"""Progress of long work in the terminal."""

import functools
import os
import sys
import time

from tqdm import tqdm

from .messages import logger


@functools.cache
def print_once(text):
    """Print a line, unless this process has printed it before."""
    logger.info(text)


def progress(iterable, what, unit, every=10.0, total=None):
    """Iterate with progress: a bar on a terminal, elsewhere a plain line every so many seconds.

    total: of items; None for the length of the iterable, 0 where nobody knows.
    """
    total = len(iterable) if total is None else total
    if sys.stderr.isatty():
        yield from tqdm(iterable, total=total or None, desc=what, unit=unit, dynamic_ncols=True,
                        disable=os.environ.get("RANK", "0") != "0")     # of several processes the first has the bar
        return
    started = said = time.monotonic()
    for done, item in enumerate(iterable, 1):
        yield item
        now = time.monotonic()
        if now - said > every or done == total:
            said = now
            rate = done / max(now - started, 1e-9)
            of, left = (f"/{total}", f", {duration(max(0, total - done) / rate)} left") if total else ("", "")
            logger.info(f"{what}: {done}{of} {unit}s, {rate:.3g} {unit}s/s{left}")


class FirstImage:
    """Tells how the first image gets on, which may take minutes before `progress` has anything to say.

    Args:
        images: in all.
        every: seconds between lines; the first comes after the first windows.
    """

    def __init__(self, images, every=10.0):
        self.images, self.every = images, every
        self.started = self.said = None

    def __call__(self, done, windows):
        """So many windows of an image are done; none when it begins. Returns whether the image is done."""
        now = time.monotonic()
        if done == 0:
            self.started = self.started or now
        elif done < windows and (self.said is None or now - self.said > self.every):
            self.said = now
            image = (now - self.started) / done * windows
            logger.info(f"first image: {done}/{windows} windows; at this rate {duration(image)} an image, "
                        f"{duration(image * self.images)} for {self.images}")
        return done == windows      # from there on `progress` speaks


def duration(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
