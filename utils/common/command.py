"""Run a script's `main`: exit statuses, one-sentence user errors, signals, robust output, warnings."""

import contextlib
import io
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

from .errors import UserError, user_message
from .limits import MORE_SHARED_MEMORY, shared_memory
from .messages import show_messages

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("networks", "dataset", "utils", "loss", "libs")
_format_other_warning = warnings.formatwarning

# Signals that ask a run to stop: from Ctrl-C, a supervisor, a closing terminal (Windows has no signal for the last).
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Interrupted(KeyboardInterrupt):
    """The signal `number` ended a run early. Everything that had to be saved has been saved."""

    def __init__(self, number):
        super().__init__()
        self.number = number


# Matches those messages of gloo, NCCL and the store that mean a lost peer, and none of their other messages.
LOST_PEER = re.compile(r"connection (closed|reset) by peer|connection was likely closed|broken pipe|ncclRemoteError|"
                       r"remote process exit|failed to recv, got 0 bytes", re.I)
DEAD_WORKER = "DataLoader worker (pid"      # not "in DataLoader worker process", which is an exception raised there


def run(main):
    """Call `main()` and end the process with the exit status that shells expect.

    Exit status: 0 for success; 2 after one sentence if the user's input is at fault; 128 + the signal's number if a
    signal ended the run early; 1 after a traceback. With several processes, a process that fails exits at once and
    skips the teardown, which is collective; processes that lose a peer also exit, with a message.
    """
    _ignore_output_errors()
    show_messages()
    warnings.formatwarning = _format_warning
    if "LOCAL_RANK" in os.environ and hasattr(signal, "setitimer"):
        signal.signal(signal.SIGTERM, _exit_after_a_second)
    else:
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        main()
        return
    except (Exception, KeyboardInterrupt) as error:
        status, message = _exit_status_and_message(error)
    if not _among_processes():
        print(message, file=sys.stderr, end="\n" * bool(message))
        sys.exit(status)
    if message:
        print(f"[process {dist.get_rank()}] {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _format_warning(message, category, filename, *location):
    """Format a warning. Those of this project concern the user's data, so the line of code is left out."""
    path = Path(filename)
    if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in PACKAGES:
        return f"warning: {message}\n"
    return _format_other_warning(message, category, filename, *location)


def _exit_status_and_message(error):
    """(exit status, message for standard error) for the exception being handled."""
    if isinstance(error, UserError):
        return error.status, f"error: {user_message(error)}"
    if isinstance(error, KeyboardInterrupt):
        return 128 + getattr(error, "number", signal.SIGINT), ""
    text = str(error)
    if DEAD_WORKER in text:
        memory = shared_memory()
        return 2, ("error: a process that reads samples died, often for lack of memory: expected all --num-workers "
                   f"to live, found: {text.splitlines()[0].strip(' .')}{memory and f', and {memory}'}; fewer workers "
                   f"need less memory, and with 0 the error appears in this process; {MORE_SHARED_MEMORY}")
    if _among_processes() and isinstance(error, RuntimeError) and (lost := LOST_PEER.search(text)):
        return 1, f"another process of this run has ended; see its message for the reason ({lost[0]})"
    return 1, traceback.format_exc().rstrip()


def _among_processes():
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _interrupt(number, frame):
    """Handle the first SIGTERM like Ctrl-C, so that unfinished files are removed."""
    signal.signal(number, signal.SIG_IGN)
    raise Interrupted(number)


def _exit_after_a_second(number, frame):
    """Handle SIGTERM in one of several processes by exiting a second later.

    torchrun sends SIGTERM to the other processes as soon as one has died; the delay lets them print their messages.
    """
    signal.signal(signal.SIGALRM, lambda *_: os._exit(128 + number))
    signal.setitimer(signal.ITIMER_REAL, 1.0)


@contextlib.contextmanager
def give_up_after(seconds, message):
    """End the process with status 2 and a message if the context takes longer than `seconds`.

    For library code that blocks where neither a signal nor a Python exception gets through.
    """
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


class _LossyFile(io.FileIO):
    """A file whose `write` never fails: what cannot be written is dropped."""

    def write(self, data):
        with contextlib.suppress(OSError):
            return super().write(data) or len(data)     # None: a full non-blocking pipe
        return len(data)


def _ignore_output_errors():
    """Make standard output and error survive a closed terminal, a broken pipe, a full disk, and characters that their
    encoding cannot represent."""
    # A closed standard stream leaves its number to the next file that is opened: occupy it.
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):
            continue        # replaced by the caller, such as a test
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.flush()
        raw = _LossyFile(os.devnull if stream is None else number, "w", closefd=stream is None)
        setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), getattr(stream, "encoding", "utf-8"),
                                            "backslashreplace", line_buffering=True))


class StopRequest:
    """Context in which the first of `STOP_SIGNALS` is recorded instead of ending the process; a second ends it at once.

    A signal often arrives twice, since supervisors, shells and torchrun pass on what the terminal has already sent:
    repeats within `debounce` seconds are ignored.

    Args:
        debounce: seconds.

    Attributes:
        number: of the signal; 0 before one arrives.
    """

    def __init__(self, debounce=1.0):
        self.debounce, self.number, self.received = debounce, 0, 0.0

    @property
    def requested(self):
        """Whether a signal has arrived."""
        return self.number > 0

    def __enter__(self):
        # nohup makes a run ignore SIGHUP.
        ignored = {number for number in STOP_SIGNALS[2:] if signal.getsignal(number) is signal.SIG_IGN}
        may_set = threading.current_thread() is threading.main_thread()
        self.before = {number: signal.signal(number, self._record) for number in STOP_SIGNALS
                       if may_set and number not in ignored}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _record(self, number, frame):
        if not self.requested:
            self.number, self.received = number, time.monotonic()
            with contextlib.suppress(OSError):      # not print, which the signal may have interrupted
                os.write(2, b"\nstopping after this step; repeat to stop at once\n")
        elif time.monotonic() - self.received >= self.debounce:
            raise Interrupted(number)
