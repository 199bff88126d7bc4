"""Command line of `python -m dataset.streets`."""

from utils.common import command

from . import main

if __name__ == "__main__":
    command.run(main)
