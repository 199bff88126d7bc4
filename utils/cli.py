"""What both command lines share: errors that are one sentence, and flag types."""

import argparse
import os
import re
import signal
import sys
import time
import traceback

import torch.distributed as dist


class UserError(Exception):
    """The user's input is at fault. The message is one sentence naming file or flag, expected and found."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence, without the list of all flags before it."""

    def error(self, message):
        self.exit(2, f"error: {message} (--help lists all flags)\n")


# What torch.distributed's backends say when a peer is gone.
LOST_PEER = re.compile(r"Connection (closed|reset) by peer|gloo/transport|NCCL|Broken pipe", re.I)


def run(main):
    """Call `main()`; a `UserError` is printed as one sentence and ends the process with status 2.

    One of several processes leaves at once, without tearing down what the others would have to agree to; those
    that lose it end too, and say so.
    """
    try:
        main()
        return
    except UserError as error:
        status, said = 2, f"error: {sentence(error)}"
    except KeyboardInterrupt:
        status, said = 130, ""
    except Exception as error:
        if not _among_processes():
            raise
        lost = LOST_PEER.search(str(error))
        status, said = 1, "another process of this run has ended; its own message says why" if lost else (
            traceback.format_exc())
    if not _among_processes():
        print(said, file=sys.stderr, end="\n" * bool(said))
        sys.exit(status)
    print(f"[process {dist.get_rank()}] {said}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _among_processes():
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sentence(error):
    """The message of a `UserError`, also where a worker process of a DataLoader wrapped it in its traceback."""
    *_, last = re.split(r"UserError: ", str(error))
    return last.strip()


class StopRequest:
    """Inside this context Ctrl-C and SIGTERM are noted in `asked` instead of ending the process; a second one
    ends it at once.

    Args:
        deaf: seconds after the first signal in which others do not count. A process of torchrun gets every
            Ctrl-C twice: from the terminal, and from torchrun.
    """

    def __init__(self, deaf=0.0):
        self.deaf, self.asked, self.when = deaf, False, 0.0

    def __enter__(self):
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        if self.asked and time.monotonic() - self.when >= self.deaf:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self.when = True, time.monotonic()
            print("\nstopping after this step; once more to stop at once", file=sys.stderr, flush=True)


def leave_ctrl_c_to_the_parent(worker):
    """Worker processes of a DataLoader: a terminal sends Ctrl-C to them too, but the parent decides."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# No crop or window is larger: it would not fit into the memory of any device, and OpenCV stops at 32,767 pixels a side.
LONGEST_SIDE = 16384
LONGEST_NAME, LONGEST_PATH = 255, 3800      # bytes; Linux takes paths of 4095, and names are added to these


def path(text):
    """Flag type: a path that is not empty, and that a file system can take."""
    encoded = os.fsencode(text)
    if not encoded or b"\0" in encoded:
        raise argparse.ArgumentTypeError("expected a path, found an empty one" if not encoded else
                                         f"expected a path, found {text!r}")
    if max(map(len, encoded.split(b"/"))) > LONGEST_NAME or len(encoded) > LONGEST_PATH:
        raise argparse.ArgumentTypeError(f"expected names of at most {LONGEST_NAME} bytes and paths of at most "
                                         f"{LONGEST_PATH}, found {_shortened(text)}")
    return text


def size(text):
    """Flag type: "H,W" or one number for both → (height, width) in pixels."""
    try:
        values = [int(part) for part in text.replace("x", ",").split(",")]
    except ValueError:
        values = []
    if len(values) not in (1, 2) or min(values) < 1 or max(values) > LONGEST_SIDE:
        raise argparse.ArgumentTypeError(f"expected HEIGHT,WIDTH in pixels, at most {LONGEST_SIDE}, such as 769,769, "
                                         f"found {_shortened(text)}")
    return (values[0], values[-1])


def numbers(count, text, check, what):
    """"a,b,..." → a tuple of `count` floats that pass a check, or an error that names what was expected."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != count or not check(values):
        raise argparse.ArgumentTypeError(f"expected {what}, found {_shortened(text)}")
    return values


def scale_range(text):
    """Flag type: "LO,HI", factors above 0."""
    return numbers(2, text, lambda v: 0.01 <= v[0] <= v[1] <= 100, "LO,HI from 0.01 to 100, such as 0.5,2.0")


def jitter(text):
    """Flag type: "B,C,S,H", changes of brightness, contrast, saturation (0 to 1) and hue (0 to 0.5)."""
    return numbers(4, text, lambda v: all(0 <= x <= 1 for x in v[:3]) and 0 <= v[3] <= 0.5,
                   "BRIGHTNESS,CONTRAST,SATURATION,HUE, at most 1,1,1,0.5")


def kernels(text):
    """Flag type: "k,k,k,k", odd numbers."""
    values = numbers(4, text, lambda v: all(x % 2 == 1 and 0 < x < 100 for x in v),
                     "four odd numbers below 100, such as 3,3,5,7")
    return tuple(map(int, values))


# Beyond these no flag means anything: steps and pixels are counted in 32 bits elsewhere, and float32 ends at 3.4e38.
LARGEST = {int: 2 ** 31 - 1, float: 1e30}


def positive(number, most=None):
    """Flag type: `positive(int)` or `positive(float)` parses a number above 0, at most `most`."""
    return _bounded(number, "above 0", lambda value: value > 0, most)


def not_negative(number, most=None):
    """Flag type: `not_negative(int)` or `not_negative(float)` parses a number of at least 0, at most `most`."""
    return _bounded(number, "of at least 0", lambda value: value >= 0, most)


def probability(text):
    """Flag type: a number from 0 to 1."""
    value = _number(float, text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, found {_shortened(text)}")
    return value


def _bounded(number, lowest, check, most):
    most = LARGEST[number] if most is None else most

    def parse(text):
        value = _number(number, text)
        if not (check(value) and value <= most):
            above = f" and at most {most}" * (value > most)
            raise argparse.ArgumentTypeError(f"expected a number {lowest}{above}, found {_shortened(text)}")
        return value
    return parse


def _number(number, text):
    try:
        return number(text)
    except ValueError:
        kind = "a whole number" if number is int else "a number"
        raise argparse.ArgumentTypeError(f"expected {kind}, found {_shortened(text)}") from None


def _shortened(text):
    return repr(text if len(text) <= 80 else f"{text[:60]}...{text[-10:]}")


# Flag types that several commands share.
batch_size = positive(int, 65536)
num_workers = not_negative(int, 1024)       # processes
random_seed = not_negative(int, 2 ** 32 - 1)
scale = positive(float, 100)                # of an image
