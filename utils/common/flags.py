"""Command-line parsing: a parser with one-sentence errors, and flag types."""

import argparse
import dataclasses
import difflib
import itertools
import os
import re
import sys

from .errors import UserError


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `UserError`, one sentence without the usage text.

    The usage is one line. Flags cannot be abbreviated, because run_local.sh forwards some by name; descriptions keep
    their line breaks.
    """

    def __init__(self, **options):
        super().__init__(**{"usage": "%(prog)s [flags]", "formatter_class": argparse.RawDescriptionHelpFormatter,
                            "allow_abbrev": False} | options)

    def parse_args(self, args=None, namespace=None):
        """Parse as argparse does; the error for an unknown flag names similar flags."""
        args = sys.argv[1:] if args is None else args
        for arg in itertools.takewhile(lambda arg: arg != "--", args):
            flag, known = arg.split("=")[0], self._option_string_actions
            if re.fullmatch(r"--?[A-Za-z][\w-]*", flag) and flag not in known:
                similar = [name for name in known if name.startswith(flag)] or difflib.get_close_matches(
                    flag, known, 2, 0.8)
                self.error(f"{flag}: expected a flag of this command{', perhaps ' * bool(similar)}"
                           f"{' or '.join(similar)}, found an unknown one")
        parsed, rest = self.parse_known_args(args, namespace)
        if rest:
            self.error(f"expected flags and their values, found {rest[0]!r}, which belongs to no flag")
        return parsed

    def error(self, message):
        raise UserError(f"{message} (--help lists all flags)")


# Crops and windows are at most this large: more fits no device's memory, and OpenCV ends at 32,767 pixels per side.
LONGEST_SIDE = 16384
LONGEST_NAME, LONGEST_PATH = 255, 3800      # bytes; Linux allows paths of 4095, and file names are appended to these


def path(text):
    """Flag type: a path that is not empty and that a file system accepts.

    ~ is the home folder, also in --flag=~/x, where shells do not expand it.
    """
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
    """Flag type: a split, or several splits as `--split` joins them: the name of a folder, not a path."""
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


def numbers(count, text, check, description):
    """Parse "a,b,..." as a tuple of `count` floats.

    Args:
        count: how many numbers.
        text: of the flag.
        check: (floats) → whether they are valid.
        description: what was expected, for the error.
    """
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != count or not check(values):
        raise argparse.ArgumentTypeError(f"expected {description}, found {_shortened(text)}")
    return values


def scale_range(text):
    """Flag type: "LO,HI" → the smallest and largest scale."""
    return numbers(2, text, lambda v: 0.01 <= v[0] <= v[1] <= 100, "LO,HI from 0.01 to 100, such as 0.5,2.0")


def jitter(text):
    """Flag type: "B,C,S,H" → largest changes of brightness, contrast, saturation (0 to 1) and hue (0 to 0.5)."""
    return numbers(4, text, lambda v: all(0 <= x <= 1 for x in v[:3]) and 0 <= v[3] <= 0.5,
                   "BRIGHTNESS,CONTRAST,SATURATION,HUE, at most 1,1,1,0.5")


def kernels(text):
    """Flag type: "k,k,k,k" → four odd kernel sizes."""
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


def format_named_numbers(values):
    """{name: number} → "a=1,b=0.5", which `named_numbers` parses."""
    return ",".join(f"{name}={value:g}" for name, value in values.items())


def from_flags(dataclass, values):
    """An instance of a dataclass whose fields are named like flags; values: {flag's name: value}."""
    return dataclass(**{field.name: values[field.name] for field in dataclasses.fields(dataclass)})


def plain_values(flags):
    """{flag's name: value} with values that snapshots and JSON can hold: tuples as lists, named numbers as text."""
    converters = {tuple: list, dict: format_named_numbers}
    return {name: converters.get(type(value), lambda same: same)(value) for name, value in flags.items()}


# Largest values of flags: steps and pixels are counted in 32 bits elsewhere, and float32 ends at 3.4e38.
LARGEST = {int: 2 ** 31 - 1, float: 1e30}


def positive(number, maximum=None):
    """Flag type: `positive(int)` or `positive(float)` parses a number above 0, at most `maximum`."""
    return _bounded(number, "above 0", lambda value: value > 0, maximum)


def not_negative(number, maximum=None):
    """Flag type: `not_negative(int)` or `not_negative(float)` parses a number of at least 0, at most `maximum`."""
    return _bounded(number, "of at least 0", lambda value: value >= 0, maximum)


def probability(text):
    """Flag type: a number from 0 to 1."""
    value = _number(float, text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, found {_shortened(text)}")
    return value


def _bounded(number, lower_bound, check, maximum):
    maximum = LARGEST[number] if maximum is None else maximum

    def parse(text):
        value = _number(number, text)
        if not (check(value) and value <= maximum):
            upper_bound = f" and at most {maximum}" * (value > maximum)
            raise argparse.ArgumentTypeError(f"expected a number {lower_bound}{upper_bound}, found {_shortened(text)}")
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


# Flag types shared by several commands.
batch_size = positive(int, 65536)
num_workers = not_negative(int, 1024)       # processes
random_seed = not_negative(int, 2 ** 32 - 1)
scale = positive(float, 100)                # factor by which an image is resized
