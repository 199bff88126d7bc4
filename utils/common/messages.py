"""Messages about what goes on: library code logs them, scripts show them as plain lines."""

import logging
import sys

from tqdm import tqdm

logger = logging.getLogger("acfnet")


class _Lines(logging.Handler):
    """Prints what is logged, above a progress bar if there is one: warnings to standard error, all else to standard
    output."""

    def emit(self, record):
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        tqdm.write(self.format(record), file=stream)
        stream.flush()


def show_messages(rank=0):
    """Show all messages, of several processes only warnings but for the first. Scripts call it; libraries do not."""
    if not any(isinstance(handler, _Lines) for handler in logger.handlers):
        logger.addHandler(_Lines())
        logger.propagate = False
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
