"""Videos: frames out of a file or of numbered images, and frames into a file."""

import contextlib
import itertools
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch

from ..common import files
from ..common.compat import opencv_silent
from ..common.errors import UserError
from ..common.files import open_file
from ..common.messages import logger
from ..common.progress import log_once
from .decode import read_image

SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv"}
COUNTED = {".avi", ".m4v", ".mov", ".mp4"}      # files that say how many frames they have; of others OpenCV guesses
NUMBER = re.compile(r"%0?\d*d")                 # in "frames/%05d.png", as FFmpeg and OpenCV write it
RATE = 25.0             # frames/s of numbered images, as FFmpeg takes them
MOST = 1000.0           # frames/s; more is an error in the file's header, and cannot be written
CODECS = ("vp09", "mp4v")       # VP9, which browsers play; MPEG-4, which every OpenCV can write
ROOM = 16 * 10 ** 6     # bytes; no further frame is begun with less on the disk than these, and
MIN_FREE_BYTES_PER_PIXEL = 10      # bytes per pixel of a frame: VP9 keeps 25 frames back until a file is closed, of three videos
ATTEMPTS = 250          # frames in succession that cannot be read, after which none is expected any more
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")      # FFmpeg's own words: what is wrong is said in a sentence


def is_video(path):
    """Whether a path is to be read as a video: by its suffix, or as the pattern of numbered images."""
    return Path(path).suffix.lower() in SUFFIXES or is_numbered(path)


def is_numbered(path):
    """Whether a path stands for numbered images: "frames/%05d.png"."""
    return len(NUMBER.findall(os.path.basename(path))) == 1 and not os.path.lexists(path)


def numbered_images(path):
    """The files that a pattern "frames/%05d.png" stands for, by their number, without regard to gaps."""
    before, after = map(re.escape, NUMBER.split(Path(path).name))
    found = {}
    with contextlib.suppress(OSError):
        for name in os.listdir(Path(path).parent):
            if match := re.fullmatch(f"{before}([0-9]+){after}", name):
                found[int(match[1]), name] = Path(path).with_name(name)
    return [found[key] for key in sorted(found)]


@dataclass(frozen=True)
class Video:
    """Frames one after the other, upright as the file says.

    Iterating gives items as `ImageFiles` does: {"image": uint8 (3, H, W) RGB, "name": number of the frame from 1, six
    digits at least}, or {"error": sentence, "frames": how many it is about}.

    Attributes:
        path: of the file, or pattern of numbered images.
        rate: frames/s.
        count: of frames, as far as the file says; 0 if it does not.
    """

    path: Path
    rate: float
    count: int

    def __len__(self):
        return self.count

    def __iter__(self):
        size = None
        for number, frame in self._numbered() if is_numbered(self.path) else self._decoded():
            if isinstance(frame, dict):     # an error
                yield frame
            elif frame.shape != (size := size or frame.shape):
                yield {"error": f"{self.path}, frame {number}: expected {size[1]}×{size[0]} pixels as before, found "
                                f"{frame.shape[1]}×{frame.shape[0]}", "frames": 1}
            else:
                yield {"image": torch.from_numpy(frame).permute(2, 0, 1), "name": f"{number:06}"}

    def last(self):
        """The number of the last frame that can be read, by reading all: no header is to be trusted."""
        return max((int(item["name"]) for item in self if "name" in item), default=0)

    def _numbered(self):
        """(number, frame or error) of numbered images."""
        for number, path in enumerate(numbered_images(self.path), 1):
            try:
                yield number, read_image(path)
            except UserError as error:
                yield number, {"error": str(error), "frames": 1}

    def _decoded(self):
        """(number, frame or error) of a file. OpenCV stumbles once over each frame that it cannot decode."""
        capture = _capture(self.path)
        number = failed = 0
        times = {}      # number of a frame → s
        while failed < ATTEMPTS and (not failed or number + failed < self.count):
            there, frame = capture.read()
            if not there:
                failed += 1
                continue
            if failed:
                yield self._missing(number + 1, failed)
            number, failed = number + failed + 1, 0
            times[number] = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
            yield number, cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        capture.release()
        self._compare_times(times)
        if number < self.count and self.path.suffix.lower() in COUNTED:
            yield self._missing(number + 1, self.count - number)

    def _compare_times(self, times):
        """Say where frames, {number: s}, come at other times than those of a constant rate, at which results come."""
        if len(times) < 2 or not all(earlier < later for earlier, later in itertools.pairwise(times.values())):
            return      # of one frame, or a file that does not tell
        start = min(times.values())
        errors = {number: (number - 1) / self.rate - (time - start) for number, time in times.items()}
        worst = max(errors, key=lambda number: abs(errors[number]))
        if abs(errors[worst]) > 1.5 / self.rate:
            log_once(f"{self.path}: its frames come at varying intervals, those of results at {self.rate:g} a "
                       f"second: frame {worst} at {(worst - 1) / self.rate:.2f} s instead of "
                       f"{times[worst] - start:.2f} s")

    def _missing(self, first, frames):
        which = f"frame {first}" if frames == 1 else f"frames {first} to {first + frames - 1}"
        return first, {"error": f"{self.path}, {which} of {self.count}: expected data that can be decoded, found none",
                       "frames": frames}


def open_video(path):
    """A file or a pattern of numbered images → `Video`. Raises `UserError` where it has no frame that can be read."""
    path = Path(path)
    if is_numbered(path):
        video = Video(path, RATE, len(numbered_images(path)))
    else:
        capture = _capture(path)
        rate, count = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
        if not 0 < rate <= MOST:
            logger.info(f"{path}: its frame rate is unknown; {RATE:g} frames/s are assumed")
            rate = RATE
        video = Video(path, rate, int(count) if 0 < count < 2 ** 31 else 0)
    if not any("image" in item for item in video):
        raise UserError(f"{path}: expected a video with frames that can be read, found none")
    return video


def _capture(path):
    open_file(path, "a video").close()
    with opencv_silent():
        capture = cv2.VideoCapture(str(path))
    if not capture.isOpened():
        raise UserError(f"{path}: expected a video that OpenCV can read, found one of another kind, or damaged")
    return capture


class VideoWriter:
    """A video file that grows frame by frame under another name and gets its own when it is closed.

    It is opened by its first frame, whose size all others must have; without a frame there is no file. Odd sizes, which
    codecs do not know, get their last row or column twice.

    Args:
        path: of the file, .mp4.
        rate: frames/s; rounded so that its digits make a number up to 65535, as MPEG-4 has no others.
    """

    def __init__(self, path, rate):
        self.path, self.rate = Path(path), round(rate, int(math.log10(65535 / rate)))
        self.file, self.frames, self.open = None, 0, contextlib.ExitStack()     # which ends what is open

    def write(self, picture):
        """picture (H, W, 3) RGB or (H, W) gray, uint8. Raises `UserError` where no such video can be written."""
        if picture.ndim == 2:
            picture = picture[..., None].repeat(3, 2)
        height, width, _ = picture.shape
        picture = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), "edge")
        # OpenCV says nothing of a full disk, and without the table that comes last all frames would be lost.
        files.check_room(self.path, self.path.parent, ROOM + MIN_FREE_BYTES_PER_PIXEL * height * width,
                         "the frames that follow")
        if self.file is None:
            self._open(picture.shape[1::-1])
        self.file.write(np.ascontiguousarray(picture[..., ::-1]))
        self.frames += 1

    def _open(self, size):
        with contextlib.ExitStack() as stack:
            self.temporary = stack.enter_context(files.replacing(self.path, self.path.suffix))
            self.temporary.unlink(missing_ok=True)      # nothing is written through a link
            for codec in CODECS:
                with opencv_silent():
                    file = cv2.VideoWriter(str(self.temporary), cv2.VideoWriter_fourcc(*codec), self.rate, size)
                if file.isOpened():
                    break
            else:
                raise UserError(f"{self.path}: expected OpenCV to write {' or '.join(CODECS)} video of "
                                f"{size[0]}×{size[1]} pixels at {self.rate:g} frames/s there, found that it cannot")
            if codec != CODECS[0]:
                log_once("videos are MPEG-4, since this OpenCV cannot write them as VP9; browsers do not play them; "
                           "ffmpeg -i VIDEO.mp4 -c:v libx264 OTHER.mp4 converts one")
            self.file, self.open = file, stack.pop_all()

    def close(self):
        """Finish the file. Raises `UserError` where not all frames have reached it: OpenCV keeps silent then."""
        with self.open:
            if self.frames:
                self.file.release()
                with opencv_silent():
                    found = int(cv2.VideoCapture(str(self.temporary)).get(cv2.CAP_PROP_FRAME_COUNT))
                if found != self.frames:
                    raise UserError(f"{self.path}: expected room on the disk for {self.frames} frames, found "
                                    f"{max(0, found)} of them written")
