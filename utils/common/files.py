"""Reading and writing of files: atomic writes, and reads that never run code stored in a file."""

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
from .errors import UserError, first_line

# Modules that weights never need, but malicious pickles do.
COMMANDS = {"builtins", "os", "posix", "nt", "subprocess", "sys"}
MAX_FILE_BYTES = 1 << 30        # larger files are refused
KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
         stat.S_IFSOCK: "a socket"}


@contextlib.contextmanager
def replacing(path, suffix=""):
    """Context manager: write a file under a temporary name; at the end it is flushed to the disk and renamed to `path`.

    An existing file at `path` stays intact until the new content is complete.

    Args:
        path: the file to write; its folder is created.
        suffix: of the temporary name.

    Yields:
        The temporary path, in the same folder.

    Raises:
        UserError: if the disk is full or the folder cannot be written to.
    """
    path = Path(path)
    # The stem is cut so that the temporary name stays within the length limit of file names.
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
        with contextlib.suppress(OSError):      # the folder is a file, or a name is too long
            temporary.unlink()


def write_atomically(path, write):
    """Write `path` atomically (see `replacing`) by calling `write(file)`."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        write(file)


def write_checked(path, content, check):
    """Write bytes to `path` atomically, but only if a check of the temporary file passes.

    Args:
        path: the file to write.
        content: bytes.
        check: called with the temporary name before the file is renamed; raises an exception to refuse it.

    Returns:
        What `check` returns.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content)
        return check(str(temporary))


def write_json(path, values):
    """Write plain values as indented JSON, atomically."""
    text = json.dumps(values, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def load(path):
    """Read a file from `torch.save` or safetensors onto the CPU, as data only.

    The checksums in a file from `torch.save`, which torch itself ignores, are verified.

    Raises:
        UserError: if the file cannot be read, is damaged, or holds more than tensors and plain values.
    """
    path = Path(path)
    if not os.path.isfile(path):        # False, not an error, if a name is too long
        raise UserError(f"{path}: expected a file of weights, found "
                        f"{'a folder' if os.path.isdir(path) else 'no such file'}")
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    damaged = True
    try:
        _verify_checksums(path)
        damaged = False
        with plain_classes(_plain_classes()):
            content = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(content, torch.jit.ScriptModule):     # PyTorch 2.4 loads it
            raise ValueError("TorchScript")
        return content
    except Exception as error:  # noqa: BLE001, torch raises many kinds for a file that is not its own
        if not damaged:
            _refuse_objects(path, str(error))
        # torch's message begins with advice to let the file run code; the reason comes last.
        reason = str(error).rpartition("WeightsUnpickler error: ")[2] or error
        raise UserError(f"{path}: expected a file of tensors written by torch.save, such as a snapshot, found a file "
                        f"of another kind or a damaged one, which cannot be read as data alone ({first_line(reason)})"
                        ) from None


def _plain_classes():
    """{"module.name": class} of harmless classes that other projects save with tensors: flags, paths, NumPy numbers.

    Covers the module names of all versions of Python and NumPy.
    """
    pure = {"PosixPath": pathlib.PurePosixPath, "WindowsPath": pathlib.PureWindowsPath,
            "PurePosixPath": pathlib.PurePosixPath, "PureWindowsPath": pathlib.PureWindowsPath,
            type(pathlib.Path()).__name__: type(pathlib.Path())}
    classes = {f"{module}.{name}": kind for module in ("pathlib", "pathlib._local") for name, kind in pure.items()}
    scalar, reconstruct = np.float64(0).__reduce__()[0], np.empty(0).__reduce__()[0]    # called by NumPy's pickles
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        classes |= {f"{module}.scalar": scalar, f"{module}._reconstruct": reconstruct}
    kinds = {type(np.dtype(code)) for code in "?bhilqBHILQefd"}        # saved by name since NumPy 1.25
    classes |= {f"{kind.__module__}.{kind.__name__}": kind for kind in kinds}
    return classes | {"argparse.Namespace": argparse.Namespace, "numpy.dtype": np.dtype, "numpy.ndarray": np.ndarray,
                      "_codecs.encode": codecs.encode}      # stores the bytes of a number


def _refuse_objects(path, error):
    """Raise `UserError`, with a command that converts the file, if it holds more than tensors and plain values.

    Args:
        path: the file.
        error: message of `torch.load`. If it has another cause, the function returns.
    """
    classes = sorted({*classes_in_file(path, error)} - _plain_classes().keys())
    if "TorchScript" in error:
        contents, lines = "a TorchScript program", f"t = torch.jit.load('{path.name}', map_location='cpu').state_dict()"
    elif classes and not {name.split(".")[0] for name in classes} & COMMANDS:
        own = [name for name in classes if not name.startswith("torch.")] or classes
        contents = f"objects of {', '.join(own[:4])}{f' and {len(own) - 4} more classes' * (len(own) > 4)}"
        # The file holds a network, or a dict with networks or state dicts: take the one with the most tensors.
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
    except Exception as error:  # noqa: BLE001, safetensors has its own exceptions
        raise UserError(f"{path}: expected a safetensors file, found one that cannot be read: {error}") from None


def _verify_checksums(path):
    """Raise ValueError if a zip file's contents do not match its checksums; other files have none."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":       # torch recognizes zip files in the same way
            return
    with zipfile.ZipFile(path) as archive:
        has_checksums = any(member.CRC for member in archive.infolist())      # torch can be configured to omit them
        damaged = archive.testzip() if has_checksums else None
    if damaged:
        raise ValueError(f"damaged since it was written: {damaged} has another checksum")


def check_room(flag, folder, needed, purpose):
    """Raise `UserError` if the disk of a folder, which need not exist yet, has less than `needed` bytes free.

    Args:
        flag, purpose: start of the message, and what the space is for.
    """
    existing = Path(folder).absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(f"{flag}: expected {needed / 1e6:,.0f} MB free for {purpose}, found {free / 1e6:,.0f} MB")


def kind_of(path):
    """Describe what is at a path: "a file", "a folder", "a pipe", ..., or "no such file"."""
    try:
        return KINDS.get(stat.S_IFMT(os.stat(path).st_mode), "a file")
    except (OSError, ValueError):       # ValueError: a null byte in the name
        return "no such file"


def open_file(path, what="an image"):
    """Open a regular file for reading in binary mode.

    Pipes and devices are refused at once, because waiting for a pipe or reading a device may never end. Raises
    `UserError`: "expected `what`, found ...".
    """
    try:
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))
    except FileNotFoundError:
        problem = "no such file"
    except IsADirectoryError:
        problem = "a folder"
    except (OSError, ValueError) as error:
        problem = f"one that cannot be read: {error}"
    else:
        kind = stat.S_IFMT(os.fstat(file.fileno()).st_mode)
        if kind == stat.S_IFREG:
            return file
        file.close()
        problem = KINDS.get(kind, "something else")
    raise UserError(f"{path}: expected {what}, found {problem}")


def read_file(path, what="an image"):
    """The bytes of a regular file. Raises `UserError` as `open_file` does, and if it exceeds `MAX_FILE_BYTES`."""
    with open_file(path, what) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_FILE_BYTES:
            raise UserError(f"{path}: expected {what} of at most {MAX_FILE_BYTES / 1e9:.1f} GB, "
                            f"found {size / 1e9:.1f} GB")
        try:
            return file.read()
        except OSError as error:
            raise UserError(f"{path}: expected {what}, found one that cannot be read: {error}") from None
