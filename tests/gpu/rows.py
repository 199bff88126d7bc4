"""What the sections find: rows of plain values, handed on as soon as they are known."""

import traceback


class Rows:
    """Rows of one section.

    Args:
        section: its name.
        emit: called with each row, a dict of plain values with `section`, `name`, `kind`: "check",
            "figure", "goal" or "note".
    """

    def __init__(self, section, emit):
        self.section, self.emit = section, emit

    def check(self, name, function, *args, **options):
        """Call a function that raises if something is wrong, and returns a few words on what it found."""
        try:
            ok, result = True, function(*args, **options)
        except Exception as error:  # noqa: BLE001, whatever it is, the next check is still of interest
            ok, result = False, _words(error)
        self._row("check", name, ok=ok, found=result)

    def figure(self, name, function, *args, **options):
        """Call a function that returns {unit: number}, and hand them on. Returns them; {} where it failed."""
        try:
            result = function(*args, **options)
        except Exception as error:  # noqa: BLE001, such as too little memory for one way of several
            self._row("figure", name, failed=_words(error))
            return {}
        self._row("figure", name, **result)
        return result

    def goal(self, name, goal, result, met):
        """What was hoped for, in words, beside what was found; it decides nothing."""
        self._row("goal", name, goal=goal, found=result, met=bool(met))

    def note(self, name, words):
        """What was left out, and why."""
        self._row("note", name, found=words)

    def _row(self, kind, name, **values):
        self.emit({"section": self.section, "kind": kind, "name": name, **values})


def _words(error):
    """An error in one line, with the place in this project where it came up."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
    output = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {output[:200]} ({frames[-1].filename.split('/')[-1]}:{frames[-1].lineno})"


def distance(actual, expected):
    """Euclidean norm of the difference, as a share of that of the expected tensor; both as float64 on the CPU."""
    actual, expected = (tensor.detach().cpu().double() for tensor in (actual, expected))
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-30))


def near(actual, expected, tolerance, what):
    """Raise AssertionError unless a tensor is within a relative distance of another; returns the distance."""
    shape = tuple(expected.shape)
    assert actual.shape == shape, f"{what}: expected shape {shape}, found {tuple(actual.shape)}"
    error = distance(actual, expected)
    assert error <= tolerance, f"{what}: expected a distance of at most {tolerance:.1e}, found {error:.1e}"
    return error
