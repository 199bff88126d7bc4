"""Run a command: exit statuses, one sentence for an error of the user, signals, output, warnings."""

import contextlib
import io
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

from .errors import UserError, sentence
from .limits import MORE_SHARED_MEMORY, shared_memory
from .messages import show_messages

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("networks", "dataset", "utils", "loss", "libs")
_format_warning = warnings.formatwarning

# Signals that ask a run to end: from Ctrl-C, a supervisor, a terminal that closes (Windows has none for this).
ENDINGS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


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
    show_messages()
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
    path = Path(filename)
    if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in ROOMS:
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


def debounce_signals(handler):
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
