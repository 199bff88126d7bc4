"""Errors of the user's input, and the words of messages."""

import re


class UserError(Exception):
    """The user's input is at fault. The message is one sentence naming file or flag, expected and found."""


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
