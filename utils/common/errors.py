"""Errors in the user's input, and helpers for the wording of messages."""

import re


class UserError(Exception):
    """The user's input is at fault. The message is one sentence: file or flag, what was expected, what was found."""

    status = 2      # exit status of a command that ends with it


def plural(number, noun):
    """1, "image" → "1 image"; 2, "class" → "2 classes"."""
    return f"{number} {noun}" + ("" if number == 1 else "es" if noun.endswith("s") else "s")


def user_message(error):
    """The message of a `UserError`, also where a worker process of a DataLoader wrapped it in its traceback."""
    *_, last = re.split(r"UserError: ", str(error))
    return last.strip()


def first_line(error):
    """The first line of another library's error, at most 200 characters; its type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
