"""Flags from files: `@FILE` on the command line, and `--like RUN`, the flags of an earlier run."""

import argparse
import os
import re
import shlex
import sys
from pathlib import Path

from ..common.errors import UserError
from .log import RUNS, read_runs

# A comment or the end of a continued line; before it what may contain # and is kept: quotations, escaped characters.
COMMENT = re.compile(r"""("(?:\\[\s\S]|[^"\\])*"|'[^']*'|\\[^\r\n])|\\\r?\n|(?<!\S)#.*""")
# Flags of the machine and the results, which another run does not share.
NOT_TAKEN = {"gpu", "parallel", "num_workers", "cache", "amp", "opt_level", "channels_last", "compile", "cuda_graph",
             "kernels", "snapshot_dir", "save_pred_every", "keep", "log_every", "panel_every", "resume", "log", "like"}
# Where the command line has one of the first flags, these and the second ones are not taken from the run: they would
# contradict each other.
REPLACED = (({"data_dir", "images_dir", "labels_dir"}, {"data_list", "val_list"}),
            ({"restore_from", "pretrained"}, set()), ({"model", "acf"}, {"ablations", "loss_weights"}))


def parse_args(parser, words=None):
    """Parse a command line, in which @FILE stands for the flags in that file, and --like RUN for those of that run.

    Args:
        parser: `flags.Parser`.
        words: of the command line; None for those of this process.
    """
    words = list(expand(sys.argv[1:] if words is None else words))
    args = parser.parse_args(words)
    if not getattr(args, "like", None):
        return args
    unset = object()        # in place of defaults
    parsed = parser.parse_args(words, argparse.Namespace(**{action.dest: unset for action in parser._actions}))
    given = {name for name, value in vars(parsed).items() if value is not unset}
    left_out = NOT_TAKEN.union(*(first | second for first, second in REPLACED if first & given))
    taken = [action for action in parser._actions if action.dest not in left_out]
    return parser.parse_args([*words_of_run(args.like, taken), *words])


def expand(words, within=()):
    """Yield words of a command line; instead of @FILE, the flags and values in that file, as a shell splits them.

    within: paths of the files from which these words come. Raises `UserError` if a file cannot be read.
    """
    for word in words:
        if not word.startswith("@"):
            yield word
            continue
        path = os.path.realpath(os.path.expanduser(word[1:]))
        try:
            if path in within:
                raise ValueError("a file that names itself")
            with open(path, encoding="utf-8-sig") as file:
                inside = shlex.split(COMMENT.sub(r"\1", file.read()))
        except (OSError, ValueError) as error:      # ValueError: not UTF-8, or a quotation without an end
            raise UserError(f"{word}: expected a text file of flags and their values, found: "
                            f"{getattr(error, 'strerror', None) or error}") from None
        yield from expand(inside, (*within, path))


def words_of_run(folder, actions):
    """Return flags of the newest start of the run in a folder, as words; actions: `argparse.Action` of each flag."""
    path = Path(folder, RUNS)
    runs = read_runs(path) if path.is_file() else []
    arguments = runs[-1].get("arguments") if runs and isinstance(runs[-1], dict) else None
    if not isinstance(arguments, dict):
        raise UserError(f"--like {folder}: expected the folder of a run, whose flags are in {RUNS}, found none there")
    words = []
    for action in actions:
        flag, value = action.option_strings[0], arguments.get(action.dest)
        if value is None or value is False or value == []:      # as without the flag
            continue
        if action.nargs == "+":
            words += [flag, *map(str, value if isinstance(value, list) else [value])]
        elif action.nargs == 0:
            words.append(flag)
        else:
            words.append(f"{flag}={','.join(map(str, value)) if isinstance(value, list) else value}")
    return words
