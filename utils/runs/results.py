"""Folders of results, with a record of the files that runs wrote there."""

import contextlib
import json
import os
import stat
from pathlib import Path, PurePosixPath

from ..common.errors import UserError, plural
from ..common.files import write_json
from ..common.messages import logger

RECORD = "written.json"


class ResultsFolder:
    """The results of a run, in a folder that may contain other files.

    A run records the names of its files in `written.json` before it writes any of them. Only recorded files are ever
    removed or replaced, and never through a link. All other files stay.

    Args:
        flag: command-line flag that named the folder, for messages.
        folder: made by `prepare`.
        overwrite: whether to replace the results of an earlier run.
    """

    def __init__(self, flag, folder, overwrite):
        self.folder, self.overwrite = Path(folder), overwrite
        self.label = f"{flag} {folder}"     # for messages

    def check(self, names):
        """Raise `UserError` if files or folders of these names exist and must not be replaced."""
        if os.path.lexists(self.folder) and not os.path.isdir(self.folder):
            raise UserError(f"{self.label}: expected a folder, found a file")
        earlier = [name for name in names if os.path.lexists(self.folder / name)]
        if earlier and not self.overwrite:
            raise UserError(f"{self.label}: expected a folder without results (or --overwrite), found "
                            f"{', '.join(earlier)}")

    def prepare(self, files, folders):
        """Remove the files of earlier runs, and record the files of this run.

        Args:
            files: relative paths, "name" or "folder/name".
            folders: names of all folders of results, also those that this run does not write.

        Raises:
            UserError: before anything is changed, if a file cannot be written, or if a file exists that no run has
                recorded.
        """
        earlier = recorded(self.folder)
        existing = [RECORD] * any(map(self._is_file, earlier))      # a run that ended early has recorded files in vain
        self.check([*existing, *folders, *(name for name in files if "/" not in name)])
        check_names(self.label, self.folder, [*files, RECORD])
        for name in folders:
            if os.path.islink(self.folder / name):
                raise UserError(f"{self.folder / name}: expected a folder of results, found a link; results are "
                                "never written through links")
            if os.path.lexists(self.folder / name) and not os.path.isdir(self.folder / name):
                raise UserError(f"{self.folder / name}: expected a folder of results, found a file")
        for name in files:
            if os.path.lexists(self.folder / name) and not (name in earlier and self._is_file(name)):
                raise UserError(f"{self.folder / name}: expected nothing there, or the result of an earlier run that "
                                f"{RECORD} records, found something else, which stays; move it, or name another folder")
        self._make(folders)
        self._record({*earlier, *files})        # both, until the earlier files are removed
        old = [self.folder / name for name in sorted(earlier, key=lambda name: "/" in name)     # scores first
               if not os.path.islink((self.folder / name).parent) and self._is_file(name)]
        for path in old:
            path.unlink()
        for parent in {path.parent for path in old} - {self.folder}:
            with contextlib.suppress(OSError):      # other files are in it
                parent.rmdir()
        self._record(files)
        others = [f"{name}/{file}" for name in folders if os.path.isdir(self.folder / name)
                  for file in os.listdir(self.folder / name)]
        if others:
            logger.info(f"{self.label}: {plural(len(others), 'file')} left there, which no run has recorded, such as "
                        f"{min(others)}")

    def close(self):
        """Remove the files that were not written from the record."""
        self._record(name for name in recorded(self.folder) if self._is_file(name))

    def _make(self, folders):
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.label}: expected a folder, found: {error}") from None
        for path in (self.folder, *(self.folder / name for name in folders)):
            if os.path.isdir(path) and not os.access(path, os.R_OK | os.W_OK | os.X_OK):
                raise UserError(f"{path}: expected a folder that can be read and written, found one that cannot")

    def _is_file(self, name):
        """Whether the name is a regular file, not a link to one."""
        return _is_regular(self.folder / name)

    def _record(self, names):
        write_json(self.folder / RECORD, sorted(names))


def recorded(folder):
    """Read the names of the results that earlier runs recorded in a folder.

    Returns:
        A set of names; empty without a record.

    Raises:
        UserError: if the record cannot be read.
    """
    path = folder / RECORD
    if not os.path.lexists(path):
        return set()
    if not _is_regular(path):
        raise UserError(f"{path}: expected a record of results, found no regular file")
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
        valid = all(not name.startswith("/") and ".." not in name.split("/") and name.count("/") < 2 for name in names)
    except (OSError, ValueError, TypeError, AttributeError):
        valid = False
    if not valid or not isinstance(names, list):
        raise UserError(f"{path}: expected the names of the results beside it, found something else")
    return set(names)


def _is_regular(path):
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


def check_names(label, folder, names):
    """Raise `UserError` if a file name is longer than the file system of the folder allows; label: for the message."""
    limit = os.pathconf(_nearest(folder.absolute(), os.path.isdir), "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    longest = max((PurePosixPath(name).name for name in names), key=lambda name: len(os.fsencode(name)))
    if len(os.fsencode(longest)) > limit:
        raise UserError(f"{label}: expected names of at most {limit} bytes, found {longest[:40]}... with "
                        f"{len(os.fsencode(longest))}")


def check_file(flag, path, overwrite=True):
    """Raise `UserError` if a file cannot be written or must not be overwritten.

    Args:
        flag: command-line flag that named the file, for messages.
        path: of the file.
        overwrite: whether the file may exist.
    """
    path, label = Path(path), f"{flag} {path}"
    if os.path.lexists(path) and not os.path.isfile(path):
        raise UserError(f"{label}: expected a file, or nothing there, found something else")
    if os.path.lexists(path) and not overwrite:
        raise UserError(f"{label}: expected nothing there (or --overwrite), found a file")
    parent = _nearest(path.absolute().parent, os.path.lexists)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{label}: expected a folder that can be written, found {parent}, which "
                        f"{'cannot be written' if parent.is_dir() else 'is not a folder'}")


def _nearest(path, predicate):
    """Return the path itself or the nearest folder above it that fulfills the predicate."""
    while not predicate(path):
        path = path.parent
    return path
