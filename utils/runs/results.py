"""A folder of results, and the record of what runs wrote there."""

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
    """Results of a run, in a folder that may hold other things.

    `written.json` there records what a run writes, before it writes any. Only what is recorded is ever removed or
    replaced, and nothing through a link; what else lies there stays.

    Args:
        flag: that named the folder, for messages.
        folder: made by `prepare`.
        overwrite: whether the results of an earlier run are replaced.
    """

    def __init__(self, flag, folder, overwrite):
        self.folder, self.overwrite = Path(folder), overwrite
        self.what = f"{flag} {folder}"

    def check(self, names):
        """Raise `UserError` where results of these names, files or folders, must not be replaced."""
        if os.path.lexists(self.folder) and not os.path.isdir(self.folder):
            raise UserError(f"{self.what}: expected a folder, found a file")
        earlier = [name for name in names if os.path.lexists(self.folder / name)]
        if earlier and not self.overwrite:
            raise UserError(f"{self.what}: expected a folder without results (or --overwrite), found "
                            f"{', '.join(earlier)}")

    def prepare(self, files, folders):
        """Make room for the files of a run, and record them.

        Args:
            files: "name" or "folder/name", relative.
            folders: in which results lie, whether this run writes there or not.

        Raises `UserError` before anything is changed if one cannot be written, or if something stands there that
        no run is recorded to have written.
        """
        self.check([RECORD, *folders, *(name for name in files if "/" not in name)])
        earlier = recorded(self.folder)
        check_names(self.what, self.folder, [*files, RECORD])
        for name in folders:
            if os.path.islink(self.folder / name):
                raise UserError(f"{self.folder / name}: expected a folder of results, found a link, through which "
                                "nothing is written")
            if os.path.lexists(self.folder / name) and not os.path.isdir(self.folder / name):
                raise UserError(f"{self.folder / name}: expected a folder of results, found a file")
        for name in files:
            if os.path.lexists(self.folder / name) and not (name in earlier and self._is_file(name)):
                raise UserError(f"{self.folder / name}: expected nothing there, or the result of an earlier run that "
                                f"{RECORD} records, found something else; it stays: move it, or name another folder")
        self._make(folders)
        self._record({*earlier, *files})        # until the older ones are gone
        old = [self.folder / name for name in sorted(earlier, key=lambda name: "/" in name)     # scores go first
               if not os.path.islink((self.folder / name).parent) and self._is_file(name)]
        for path in old:
            path.unlink()
        for place in {path.parent for path in old} - {self.folder}:     # this run may want no pictures of that kind
            with contextlib.suppress(OSError):                          # another's file lies there
                place.rmdir()
        self._record(files)
        others = [f"{name}/{file}" for name in folders if os.path.isdir(self.folder / name)
                  for file in os.listdir(self.folder / name)]
        if others:
            logger.info(f"{self.what}: {plural(len(others), 'file')} left there, which no run is recorded to have "
                        f"written, such as {min(others)}")

    def close(self):
        """Strike from the record what was not written after all."""
        self._record(name for name in recorded(self.folder) if self._is_file(name))

    def _make(self, folders):
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.what}: expected a folder, found: {error}") from None
        for place in (self.folder, *(self.folder / name for name in folders)):
            if os.path.isdir(place) and not os.access(place, os.R_OK | os.W_OK | os.X_OK):
                raise UserError(f"{place}: expected a folder that can be read and written, found one that cannot")

    def _is_file(self, name):
        """Whether a regular file lies there, and not a link to one."""
        return _is_regular(self.folder / name)

    def _record(self, names):
        write_json(self.folder / RECORD, sorted(names))


def recorded(folder):
    """Names of the results that earlier runs recorded in a folder; none without a record. Raises `UserError`."""
    path = folder / RECORD
    if not os.path.lexists(path):
        return set()
    if not _is_regular(path):
        raise UserError(f"{path}: expected a record of results, found no regular file")
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
        sound = all(not name.startswith("/") and ".." not in name.split("/") and name.count("/") < 2 for name in names)
    except (OSError, ValueError, TypeError, AttributeError):
        sound = False
    if not sound or not isinstance(names, list):
        raise UserError(f"{path}: expected the names of the results beside it, found something else")
    return set(names)


def _is_regular(path):
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


def check_names(what, folder, names):
    """Raise `UserError` where a file's name is longer than the file system of its folder takes."""
    most = os.pathconf(_nearest(folder.absolute(), os.path.isdir), "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    longest = max((PurePosixPath(name).name for name in names), key=lambda name: len(os.fsencode(name)))
    if len(os.fsencode(longest)) > most:
        raise UserError(f"{what}: expected names of at most {most} bytes, found {longest[:40]}... with "
                        f"{len(os.fsencode(longest))}")


def check_file(flag, path, overwrite=True):
    """Raise `UserError` where a file cannot be written, or must not be overwritten, before anything is done for it."""
    path, what = Path(path), f"{flag} {path}"
    if os.path.lexists(path) and not os.path.isfile(path):
        raise UserError(f"{what}: expected a file, or nothing there, found something else")
    if os.path.lexists(path) and not overwrite:
        raise UserError(f"{what}: expected nothing there (or --overwrite), found a file")
    place = _nearest(path.absolute().parent, os.path.lexists)
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{what}: expected a folder that can be written, found {place}, which "
                        f"{'cannot' if place.is_dir() else 'is none'}")


def _nearest(place, fits):
    """The place itself, or the nearest folder above it that fits."""
    while not fits(place):
        place = place.parent
    return place
