"""Read and write files: written whole or not at all, and read without running any code in them."""

import argparse
import codecs
import contextlib
import json
import os
import pathlib
import shutil
import stat
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from .compat import classes_in_file, plain_classes
from .errors import UserError, first_words

COMMANDS = {"builtins", "os", "posix", "nt", "subprocess", "sys"}      # modules that no weights need, but attacks do


@contextlib.contextmanager
def replacing(path, suffix=""):
    """A temporary path beside `path`, that ends in `suffix`, for a file to be written there; at the end of the context
    it is flushed to the disk and renamed.

    Whatever stood at `path` stays whole until the new content is. Raises `UserError` where the disk is
    full or the folder cannot be written.
    """
    path = Path(path)
    # Not longer than the name itself may be.
    temporary = path.with_name(f".{path.stem[:20]}.{zlib.crc32(os.fsencode(path.name)):08x}.{os.getpid()}.tmp{suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        cause = error       # torch.save hides an error of the disk behind one of its own
        while cause.__context__ is not None:
            cause = cause.__context__
        if not isinstance(cause, OSError):
            raise cause from None
        raise UserError(f"{path}: expected to write a file there, found: {cause}") from error
    finally:
        with contextlib.suppress(OSError):      # where the folder is none, or its name too long
            temporary.unlink()


def write_atomically(path, write):
    """Call `write(file)` on a temporary file beside `path`, and rename it: `replacing`."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        write(file)


def write_checked(path, content, check):
    """Write bytes as `write_atomically` does, but rename the file only after `check(its temporary name)`, which may
    raise. Returns what that returns."""
    answers = []

    def write(file):
        file.write(content)
        file.flush()
        answers.append(check(file.name))

    write_atomically(path, write)
    return answers[0]


def write_json(path, values):
    """Write plain values as indented JSON, atomically."""
    text = json.dumps(values, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def load(path):
    """Read a file that `torch.save` wrote, or one of safetensors, on the CPU, as data only. Raises `UserError`, also
    where a bit of the former has flipped since: torch itself does not look at the check sums that the file holds."""
    path = Path(path)
    if not os.path.isfile(path):        # false, not an error, for a name too long
        raise UserError(f"{path}: expected a file of weights, found "
                        f"{'a folder' if os.path.isdir(path) else 'no such file'}")
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    damaged = True
    try:
        _check_sums(path)
        damaged = False
        with plain_classes(_plain_classes()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001, torch raises many kinds for a file that is not its own
        if not damaged:
            _refuse_objects(path, str(error))
        # torch's message begins with advice to let the file run code; what is wrong stands at its end.
        reason = str(error).rpartition("WeightsUnpickler error: ")[2] or error
        raise UserError(f"{path}: expected a file of tensors written by torch.save, found one that cannot be "
                        f"read as data alone ({first_words(reason)})") from None


def _plain_classes():
    """{"module.name": class} of what other projects save beside tensors, and what holds values alone: flags, paths,
    numbers of NumPy. The modules are those of all versions of Python and NumPy."""
    pure = {"PosixPath": pathlib.PurePosixPath, "WindowsPath": pathlib.PureWindowsPath,
            "PurePosixPath": pathlib.PurePosixPath, "PureWindowsPath": pathlib.PureWindowsPath,
            type(pathlib.Path()).__name__: type(pathlib.Path())}
    classes = {f"{module}.{name}": kind for module in ("pathlib", "pathlib._local") for name, kind in pure.items()}
    scalar, reconstruct = np.float64(0).__reduce__()[0], np.empty(0).__reduce__()[0]    # what pickles of NumPy call
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        classes |= {f"{module}.scalar": scalar, f"{module}._reconstruct": reconstruct}
    kinds = {type(np.dtype(code)) for code in "?bhilqBHILQefd"}        # NumPy saves them by name from 1.25 on
    classes |= {f"{kind.__module__}.{kind.__name__}": kind for kind in kinds}
    return classes | {"argparse.Namespace": argparse.Namespace, "numpy.dtype": np.dtype, "numpy.ndarray": np.ndarray,
                      "_codecs.encode": codecs.encode}      # of the bytes of a number


def _refuse_objects(path, error):
    """Raise the `UserError` for a file that holds more than tensors and plain values, with the line that converts it.

    error: what torch said of it; where that is something else, nothing happens.
    """
    classes = sorted({*classes_in_file(path, error)} - _plain_classes().keys())
    if "TorchScript" in error:
        contents, lines = "a TorchScript program", f"t = torch.jit.load('{path.name}', map_location='cpu').state_dict()"
    elif classes and not {name.split(".")[0] for name in classes} & COMMANDS:
        own = [name for name in classes if not name.startswith("torch.")] or classes
        contents = f"objects of {', '.join(own[:4])}{f' and {len(own) - 4} more classes' * (len(own) > 4)}"
        # A network, or a dict that holds one or its tensors: what has the most of them.
        lines = (f"f = torch.load('{path.name}', map_location='cpu', weights_only=False); "
                 "d = [f, *f.values()] if isinstance(f, dict) else [f]; "
                 "d = [getattr(v, 'state_dict', lambda: v)() for v in d]; "
                 "d = [{k: t for k, t in v.items() if torch.is_tensor(t)} for v in d if isinstance(v, dict)]; "
                 "t = max(d, key=len)")
    else:
        return
    raise UserError(f"{path}: expected tensors and plain values alone, found {contents}, which need the code of the "
                    f"project that wrote them; there, python -c \"import torch; {lines}; torch.save(t, "
                    "'weights.pth')\" makes a file of its tensors, which can be read here") from None


def _load_safetensors(path):
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"{path}: expected the package safetensors for this file, found none; pip install safetensors"
                        ) from None
    try:
        return load_file(path)
    except Exception as error:  # noqa: BLE001, its own kinds of error
        raise UserError(f"{path}: expected a file of safetensors, found one that cannot be read: {error}") from None


def _check_sums(path):
    """Raise ValueError where the bytes of a zip file are not those that were written; other files have no sums."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":       # by which torch tells them too
            return
    with zipfile.ZipFile(path) as members:
        written = any(member.CRC for member in members.infolist())      # torch can be told to leave them out
        damaged = members.testzip() if written else None
    if damaged:
        raise ValueError(f"damaged since it was written: {damaged} has another check sum")


def check_room(flag, folder, needed, purpose):
    """Raise `UserError` that begins with `flag` if the disk of a folder, which need not exist yet, has less than
    `needed` bytes free."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(f"{flag}: expected {needed / 1e6:,.0f} MB free for {purpose}, found {free / 1e6:,.0f} MB")
MOST_BYTES = 1 << 30            # of a file; a larger one is refused
KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
         stat.S_IFSOCK: "a socket"}


def kind_of(path):
    """What stands at a path, in words: "a file", "a folder", "a pipe" ..., or "no such file"."""
    try:
        return KINDS.get(stat.S_IFMT(os.stat(path).st_mode), "a file")
    except (OSError, ValueError):       # ValueError: a null byte in the name
        return "no such file"


def open_file(path, what="an image"):
    """A regular file, open for reading in binary. Raises `UserError`: `what` was expected, and what was found.

    Pipes and devices are refused at once: waiting for a pipe, or reading a device, may never end.
    """
    try:
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))
    except FileNotFoundError:
        found = "no such file"
    except IsADirectoryError:
        found = "a folder"
    except (OSError, ValueError) as error:
        found = f"one that cannot be read: {error}"
    else:
        kind = stat.S_IFMT(os.fstat(file.fileno()).st_mode)
        if kind == stat.S_IFREG:
            return file
        file.close()
        found = KINDS.get(kind, "something else")
    raise UserError(f"{path}: expected {what}, found {found}")


def read_file(path, what="an image"):
    """The bytes of a regular file. Raises `UserError` as `open_file`, and for files beyond `MOST_BYTES`."""
    with open_file(path, what) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MOST_BYTES:
            raise UserError(f"{path}: expected {what} of at most {MOST_BYTES / 1e9:.1f} GB, found {size / 1e9:.1f} GB")
        try:
            return file.read()
        except OSError as error:
            raise UserError(f"{path}: expected {what}, found one that cannot be read: {error}") from None
