"""What both command lines share: errors that are one sentence, and flag types."""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import io
import itertools
import math
import os
import re
import signal
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path

import torch.distributed as dist

from .limits import MORE_SHARED_MEMORY, shared_memory

ROOT = Path(__file__).resolve().parent.parent
_format_warning = warnings.formatwarning

# Signals that ask a run to end: from Ctrl-C, a supervisor, a terminal that closes (Windows has none for this).
ENDINGS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class UserError(Exception):
    """The user's input is at fault. The message is one sentence naming file or flag, expected and found."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence, without the list of all flags before it.

    Flags are written out, since run_local.sh hands on some by their names; descriptions keep their lines.
    """

    def __init__(self, **options):
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False} | options)

    def parse_args(self, args=None, namespace=None):
        """As in argparse, with errors that say what is expected; that for an unknown flag names those like it."""
        words = sys.argv[1:] if args is None else args
        for word in itertools.takewhile(lambda word: word != "--", words):
            flag, known = word.split("=")[0], self._option_string_actions
            if re.fullmatch(r"--?[A-Za-z][\w-]*", flag) and flag not in known:
                alike = [name for name in known if name.startswith(flag)] or difflib.get_close_matches(
                    flag, known, 2, 0.8)
                self.error(f"{flag}: expected a flag of this command{', perhaps ' * bool(alike)}{' or '.join(alike)}, "
                           "found an unknown one")
        found, rest = self.parse_known_args(words, namespace)
        if rest:
            self.error(f"expected flags and their values, found {rest[0]!r}, which belongs to none")
        return found

    def error(self, message):
        self.exit(2, f"error: {message} (--help lists all flags)\n")


class Interrupted(KeyboardInterrupt):
    """The signal `number` ended a run before its time. Whatever was to be saved is saved."""

    def __init__(self, number):
        super().__init__()
        self.number = number


# Messages of gloo, NCCL and the store that mean a lost peer, and no other messages of theirs.
LOST_PEER = re.compile(r"connection (closed|reset) by peer|connection was likely closed|broken pipe|ncclRemoteError|"
                       r"remote process exit|failed to recv, got 0 bytes", re.I)
DEAD_WORKER = "DataLoader worker (pid"      # not "in DataLoader worker process": that is an error of the code there


def run(main):
    """Call `main()` and end the process as shells expect it.

    Exit status: 0 done; 2 after one sentence, if the user's input is at fault; 128 + the signal's number, if one
    ended it early; 1 after a traceback. One of several processes leaves at once, without tearing down what the
    others would have to agree to; those that lose it end too, and say so.
    """
    _keep_output_from_failing()
    warnings.formatwarning = _own_as_sentences
    if "LOCAL_RANK" in os.environ and hasattr(signal, "setitimer"):
        signal.signal(signal.SIGTERM, _end_after_last_words)
    try:
        main()
        return
    except (Exception, KeyboardInterrupt) as error:
        status, said = _account(error)
    if not _among_processes():
        print(said, file=sys.stderr, end="\n" * bool(said))
        sys.exit(status)
    if said:
        print(f"[process {dist.get_rank()}] {said}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _own_as_sentences(message, category, filename, *place):
    """Format a warning: of this project, which is about the user's data, without the line of code that gave it."""
    if Path(filename).parent.parent == ROOT:
        return f"warning: {message}\n"
    return _format_warning(message, category, filename, *place)


def _account(error):
    """(exit status, what is to be said) of the error that is being handled."""
    if isinstance(error, UserError):
        return 2, f"error: {sentence(error)}"
    if isinstance(error, KeyboardInterrupt):
        return 128 + getattr(error, "number", signal.SIGINT), ""
    text = str(error)
    if DEAD_WORKER in text:
        memory = shared_memory()
        return 2, ("error: a process that reads samples died, often of too little memory: expected all --num-workers "
                   f"to live, found: {text.splitlines()[0].strip(' .')}{memory and f', and {memory}'}; fewer workers "
                   f"need less, and with 0 the error shows here; {MORE_SHARED_MEMORY}")
    if _among_processes() and isinstance(error, RuntimeError) and (lost := LOST_PEER.search(text)):
        return 1, f"another process of this run has ended; its own message says why ({lost[0]})"
    return 1, traceback.format_exc().rstrip()


def _among_processes():
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _end_after_last_words(number, frame):
    """SIGTERM for one of several processes, which torchrun sends to the others as soon as one has died: what they
    have to say about that is on its way, so they get another second."""
    signal.signal(signal.SIGALRM, lambda *_: os._exit(128 + number))
    signal.setitimer(signal.ITIMER_REAL, 1.0)


@contextlib.contextmanager
def give_up_after(seconds, message):
    """End the process with status 2 and one sentence if what is inside takes longer: for code of others that waits
    where no signal and no exception of Python gets through."""
    def end():
        print(f"error: {message}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class _Output(io.FileIO):
    """A file whose writing never fails: what nobody takes any more is silence."""

    def write(self, data):
        with contextlib.suppress(OSError):
            return super().write(data) or len(data)     # None: a full pipe that does not block
        return len(data)


def _keep_output_from_failing():
    """Let standard output and error survive a closed terminal, a broken pipe, a full disk, and letters which their
    encoding has not."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:      # closed: the next file would take its place
        os.set_inheritable(number, True)
    os.close(number)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):
            continue        # somebody has put their own there
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.flush()
        raw = _Output(os.devnull if stream is None else number, "w", closefd=stream is None)
        setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), getattr(stream, "encoding", "utf-8"),
                                            "backslashreplace", line_buffering=True))


@functools.cache
def print_once(text):
    """Print a line, unless this process has printed it before."""
    print(text)


def plural(number, thing):
    """1, "image" → "1 image"; 2, "class" → "2 classes"."""
    return f"{number} {thing}" + ("" if number == 1 else "es" if thing.endswith("s") else "s")


def sentence(error):
    """The message of a `UserError`, also where a worker process of a DataLoader wrapped it in its traceback."""
    *_, last = re.split(r"UserError: ", str(error))
    return last.strip()


def first_words(error):
    """The first line of an error that is somebody else's, at most 200 characters; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def deaf_for_a_second(handler):
    """A signal handler that hears nothing for a second after it was called: a request to end often comes twice or
    more, and the first is being followed."""
    heard = -math.inf

    def hear(number, frame):
        nonlocal heard
        if time.monotonic() - heard >= 1.0:
            heard = time.monotonic()
            handler(number, frame)
    return hear


class StopRequest:
    """Inside this context the first of `ENDINGS` is noted in `number` instead of ending the process; one more than
    `deaf` seconds later ends it at once.

    A request often comes twice: supervisors, shells and torchrun pass on what the terminal has sent already.
    """

    def __init__(self, deaf=1.0):
        self.deaf, self.number, self.when = deaf, 0, 0.0

    @property
    def asked(self):
        return self.number > 0

    def __enter__(self):
        ignored = {number for number in ENDINGS[2:] if signal.getsignal(number) is signal.SIG_IGN}     # by nohup
        self.before = {number: signal.signal(number, self._note) for number in ENDINGS if number not in ignored}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        if not self.asked:
            self.number, self.when = number, time.monotonic()
            with contextlib.suppress(OSError):      # not by print, which may be at work where this comes between
                os.write(2, b"\nstopping after this step; once more to stop at once\n")
        elif time.monotonic() - self.when >= self.deaf:
            raise Interrupted(number)


def leave_signals_to_the_parent(worker):
    """Worker processes of a DataLoader: terminals and supervisors tell them to end too, but the parent needs their
    samples to finish its step. SIGTERM, by which it may end them itself, works half a minute later."""
    for number in ENDINGS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, lambda *_: signal.setitimer(signal.ITIMER_REAL, 30.0))


# No crop or window is larger: it would not fit into the memory of any device, and OpenCV stops at 32,767 pixels a side.
LONGEST_SIDE = 16384
LONGEST_NAME, LONGEST_PATH = 255, 3800      # bytes; Linux takes paths of 4095, and names are added to these


def path(text):
    """Flag type: a path that is not empty, and that a file system can take; ~ is the home folder, also in --flag=~/x,
    which shells leave as it is."""
    text = os.path.expanduser(text)
    encoded = os.fsencode(text)
    if not encoded or b"\0" in encoded:
        raise argparse.ArgumentTypeError("expected a path, found an empty one" if not encoded else
                                         f"expected a path, found {text!r}")
    if max(map(len, encoded.split(b"/"))) > LONGEST_NAME or len(encoded) > LONGEST_PATH:
        raise argparse.ArgumentTypeError(f"expected names of at most {LONGEST_NAME} bytes and paths of at most "
                                         f"{LONGEST_PATH}, found {_shortened(text)}")
    return text


def split(text):
    """Flag type: a split, or several as `--split` joins them: the name of a folder, not a path."""
    if os.path.basename(text) != text or "\0" in text or text in ("", ".", "..") or len(
            os.fsencode(text)) > LONGEST_NAME:
        raise argparse.ArgumentTypeError("expected the name of a split, such as train or val, "
                                         f"found {_shortened(text)}")
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


def words(text):
    """Flag type: "a,b,..." → a tuple of words."""
    return tuple(filter(None, text.split(",")))


def named_numbers(text):
    """Flag type: "a=1,b=0.5" → {name: number of at least 0}, not all 0."""
    parts = [part.partition("=") for part in text.split(",")]
    values = {name: not_negative(float)(value) for name, _, value in parts if name and value}
    if len(values) != len(parts) or not any(values.values()):
        raise argparse.ArgumentTypeError(f"expected NAME=NUMBER,..., such as fine=0.7,coarse=0.6,aux=0.4, found "
                                         f"{_shortened(text)}")
    return values


def plain_numbers(values):
    """{name: number} → the text that `named_numbers` reads."""
    return ",".join(f"{name}={value:g}" for name, value in values.items())


def from_flags(kind, args):
    """A dataclass of that kind whose fields are the flags of the same names."""
    return kind(**{field.name: getattr(args, field.name) for field in dataclasses.fields(kind)})


def plain_values(flags):
    """{flag's name: value} as a snapshot and JSON can hold it: tuples as lists, named numbers as their text."""
    kinds = {tuple: list, dict: plain_numbers}
    return {name: kinds.get(type(value), lambda same: same)(value) for name, value in flags.items()}


# Largest values of flags: steps and pixels are counted in 32 bits elsewhere, and float32 ends at 3.4e38.
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
