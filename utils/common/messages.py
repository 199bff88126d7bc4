"""Progress and status messages: library code logs them, scripts show them as plain lines."""

import logging
import sys

from tqdm import tqdm

logger = logging.getLogger("acfnet")


class _LineHandler(logging.Handler):
    """Print log records above a progress bar, if there is one: warnings and errors to standard error, the rest to
    standard output."""

    def emit(self, record):
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        tqdm.write(self.format(record), file=stream)
        stream.flush()


def show_messages(rank=0):
    """Show log messages: all of them on rank 0, only warnings on other ranks. For scripts, not for libraries."""
    if not any(isinstance(handler, _LineHandler) for handler in logger.handlers):
        logger.addHandler(_LineHandler())
        logger.propagate = False
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
