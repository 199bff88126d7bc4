"""The command: `python -m dataset.streets`."""

from utils import cli

from . import main

if __name__ == "__main__":
    cli.run(main)
